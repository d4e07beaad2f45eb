"""Golden numbers as objects of the package. The layout of a golden folder is described in golden/README.md.

Nothing here knows sizes, names or numbers of one particular folder.
"""

import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from openbagel.config import Sampling, to_json
from openbagel.flow import Guidance, Renorm, interpolate, shifted, velocity_target
from openbagel.images import ImageLimits, normalised, patchify
from openbagel.inference.pipeline import Bagel
from openbagel.sequence import Frame, PackedSequence, Packer, Segment, Text, VaeImage, VitImage
from openbagel.tokens import TextCodec
from openbagel.weights import TOP_LEVEL, VAE_FILE, Checkpoint, load_checkpoint

REFERENCE_DEFAULTS: dict[str, Any] = {
    "think": False,
    "understanding_output": False,
    "max_think_token_n": 1000,
    "do_sample": False,
    "text_temperature": 0.3,
    "cfg_text_scale": 3.0,
    "cfg_img_scale": 1.5,
    "cfg_interval": [0.4, 1.0],
    "timestep_shift": 3.0,
    "num_timesteps": 50,
    "cfg_renorm_min": 0.0,
    "cfg_renorm_type": "global",
    "image_shapes": [1024, 1024],
    "enable_taylorseer": False,
}
"""Options of the reference's `interleave_inference`, and what it takes where a case states none."""


def relative_error(ours: Tensor, golden: Tensor) -> float:
    """‖ours - golden‖ / ‖golden‖; shapes must agree."""
    assert ours.shape == golden.shape
    return (torch.linalg.vector_norm(ours - golden) / torch.linalg.vector_norm(golden)).item()


@cache
def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


@cache
def read_tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def training_names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("training-*.json"))


def has_autoencoder(folder: Path, name: str) -> bool:
    return (folder / read_json(folder / f"{name}.json")["checkpoint"] / VAE_FILE).is_file()


def settings_of(checkpoint: Path) -> dict[str, Any]:
    """What the official code passes by hand and no file of an official checkpoint states."""
    return {
        key: value
        for key, value in read_json(checkpoint / "golden_settings.json").items()
        if key in TOP_LEVEL
    }


def special_tokens(codec: TextCodec) -> dict[str, int]:
    return {
        "bos_token_id": codec.start,
        "eos_token_id": codec.end,
        "start_of_image": codec.vision_start,
        "end_of_image": codec.vision_end,
    }


# training ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One training batch: the file's facts and numbers, the model, and our packing of it."""

    facts: dict[str, Any]
    golden: dict[str, Tensor]
    checkpoint: Checkpoint
    pack: PackedSequence


@cache
def training_batch(folder: Path, name: str) -> Batch:
    facts, golden = read_json(folder / f"{name}.json"), read_tensors(folder / f"{name}.safetensors")
    path = folder / facts["checkpoint"]
    settings = settings_of(path) | {key: facts[key] for key in ("layer_module", "interpolate_pos")}
    checkpoint = load_checkpoint(path, settings=settings)
    segments = _SegmentReader(facts, golden, checkpoint.config.latent_patch_size)
    samples = [segments.sample(items) for items in facts["samples"]]
    return Batch(facts, golden, checkpoint, Packer(checkpoint.config, checkpoint.codec).pack(samples))


class _SegmentReader:
    """Turns the file's samples into segments, counting pictures and latent tokens on the way."""

    def __init__(self, facts: dict[str, Any], golden: dict[str, Tensor], patch: int) -> None:
        self.facts, self.golden, self.patch = facts, golden, patch
        self.pictures = self.latent_tokens = 0

    def sample(self, items: list[dict[str, Any]]) -> list[Segment]:
        segments: list[Segment] = []
        group: list[dict[str, Any]] = []
        for item in items:
            if item["type"] == "text":
                segments.append(Text(tuple(item["ids"]), loss=bool(item["loss"])))
            elif item["type"] == "vit_image":
                segments.append(VitImage(normalised(self.golden["image." + item["image"]])))
            else:
                group.append(item)
                if item.get("split_end", True):
                    segments.append(self._group(group))
                    group = []
        return segments

    def _group(self, items: list[dict[str, Any]]) -> VaeImage:
        learned = bool(items[0]["loss"])
        t = 0.0
        if learned:
            raw = torch.tensor(items[0]["logit_t"], dtype=torch.float32)
            t = shifted(torch.sigmoid(raw), self.facts["timestep_shift"]).item()
        frames = tuple(self._frame(item, t) for item in items)
        alone = len(items) == 1 and "frame_delta" not in items[0]
        return VaeImage(frames, t, hidden=learned and alone)

    def _frame(self, item: dict[str, Any], t: float) -> Frame:
        h, w = self.facts["latent_shapes"][self.pictures]
        latent = self.golden["padded_latent"][self.pictures][:, : h * self.patch, : w * self.patch]
        noise = self.golden["noise"][self.latent_tokens : self.latent_tokens + h * w]
        self.pictures += 1
        self.latent_tokens += h * w
        x0 = patchify(latent, self.patch)
        target = velocity_target(x0, noise) if item["loss"] else None
        return Frame(interpolate(x0, noise, t), (h, w), target, item.get("frame_delta", 0))


def padded_pictures(batch: Batch) -> Tensor:
    """float[pictures, 3, H, W]: every picture of the autoencoder, padded with zeros to one size, in order."""
    vae = batch.checkpoint.config.vae
    assert vae is not None
    padded = batch.golden["padded_latent"]
    pixels = torch.zeros(len(padded), 3, *(side * vae.downsample for side in padded.shape[2:]))
    items = [item for sample in batch.facts["samples"] for item in sample if item["type"] == "vae_image"]
    for place, item in zip(pixels, items, strict=True):
        picture = normalised(batch.golden["image." + item["image"]])
        place[:, : picture.shape[1], : picture.shape[2]] = picture
    return pixels


# inference --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One generation: options under the reference's names, defaults filled in."""

    name: str
    facts: dict[str, Any]
    options: dict[str, Any]
    golden: dict[str, Tensor]
    """The tensors of `inference.safetensors`, of all cases."""

    def numbered(self, kind: str) -> list[Tensor]:
        """`<case>.<kind>.0`, `<case>.<kind>.1`, …"""
        return numbered(self.golden, f"{self.name}.{kind}")

    @property
    def size(self) -> tuple[int, int]:
        height, width = self.options["image_shapes"]
        return height, width

    @property
    def sampling(self) -> Sampling:
        """The limit of the reference counts the start marker."""
        o = self.options
        assert not o["do_sample"], "golden texts are greedy"
        guidance = Guidance(
            text=o["cfg_text_scale"],
            image=o["cfg_img_scale"],
            interval=(o["cfg_interval"][0], o["cfg_interval"][1]),
            renorm=Renorm(o["cfg_renorm_type"]),
            renorm_min=o["cfg_renorm_min"],
        )
        limit = o["max_think_token_n"] - 1
        return Sampling(
            max_tokens=limit,
            max_think_tokens=0 if o["understanding_output"] else limit,
            guidance=guidance,
            num_timesteps=o["num_timesteps"],
            timestep_shift=o["timestep_shift"],
            taylorseer=o["enable_taylorseer"],
        )


def numbered(tensors: dict[str, Tensor], prefix: str) -> list[Tensor]:
    count = sum(name.startswith(prefix + ".") for name in tensors)
    return [tensors[f"{prefix}.{i}"] for i in range(count)]


def case_names(folder: Path, *, drawing: bool) -> list[str]:
    cases = read_json(folder / "inference.json")["cases"]
    return [case["name"] for case in cases if drawing != case["options"].get("understanding_output", False)]


def inference_case(folder: Path, name: str) -> Case:
    (facts,) = (case for case in read_json(folder / "inference.json")["cases"] if case["name"] == name)
    unknown = set(facts["options"]) - set(REFERENCE_DEFAULTS)
    assert not unknown, f"options that these tests do not know: {unknown}"
    options = REFERENCE_DEFAULTS | facts["options"]
    return Case(name, facts, options, read_tensors(folder / "inference.safetensors"))


@cache
def inference_model(folder: Path) -> Bagel:
    facts = read_json(folder / "inference.json")
    path = folder / facts["checkpoint"]
    settings = settings_of(path)
    loaded = Bagel.load(path, device="cpu", dtype=torch.float32, settings=settings)
    limits = {f"{kind}_limits": ImageLimits(**facts[f"{kind}_transform"]) for kind in ("vae", "vit")}
    own = to_json(replace(loaded.config.settings, **limits))
    return Bagel.load(path, device="cpu", dtype=torch.float32, settings=settings | {"openbagel": own})
