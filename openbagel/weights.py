"""The official checkpoint folder, read strictly and written back.

    ema.safetensors | model.safetensors | model.safetensors.index.json + shards      the transformer and the
    ViT ae.safetensors                                                                   the autoencoder
    config.json                          every per-model fact (vLLM's shape plus an `openbagel` part); may be
    old or absent llm_config.json, vit_config.json     the Qwen2 and SigLIP fields tokenizer.json, or
    vocab.json + merges.txt + tokenizer_config.json

What no file states is read from tensor shapes, then takes the 7B's values. Tensors are memory-mapped: weights
that already have the wanted dtype take no memory of their own.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from openbagel.config import (
    FLUX_VAE,
    BagelConfig,
    Experts,
    LLMConfig,
    VAEConfig,
    ViTConfig,
    bagel_7b,
    from_json,
    nearest,
    official_settings,
    to_json,
)
from openbagel.model.bagel import BagelModel
from openbagel.model.vae import AutoEncoder
from openbagel.tokens import TextCodec

MODEL_FILES = ("ema.safetensors", "model.safetensors")
INDEX_FILE = "model.safetensors.index.json"
VAE_FILE = "ae.safetensors"
MAY_BE_MISSING = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")
"""Computable: the sin-cos tables, which trainers leave out to change the grid."""
MAY_BE_LEFT_OVER = (".rotary_emb.inv_freq",)
"""Computable: buffers that old transformers versions stored."""
LISTED = 40
"""Tensors that an error names of each kind; it counts them all."""
GENERATION_PARTS = ("_moe_gen.", "vae2llm.", "llm2vae.", "time_embedder.", "latent_pos_embed.")
FIXED_LLM_FIELDS = {"hidden_act": "silu", "use_sliding_window": False, "rope_scaling": None}
TOP_LEVEL = (
    "layer_module",
    "latent_patch_size",
    "max_latent_size",
    "vit_max_num_patch_per_side",
    "connector_act",
    "interpolate_pos",
)
Shapes = dict[str, tuple[int, ...]]
"""Of tensors, by name."""


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A loaded folder. autoencoder is None where the folder has none, or where drawing was left out."""

    config: BagelConfig
    model: BagelModel
    autoencoder: AutoEncoder | None
    codec: TextCodec


class TensorFiles:
    """The tensors of one or several safetensors files, by name, opened lazily."""

    def __init__(self, paths: list[Path]) -> None:
        self.handles: dict[str, Any] = {}
        for path in paths:
            try:
                handle = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path} is no complete safetensors file ({error}); download it again"
                ) from None
            self.handles.update(dict.fromkeys(handle.keys(), handle))

    def shapes(self) -> Shapes:
        return {name: tuple(handle.get_slice(name).get_shape()) for name, handle in self.handles.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.handles[name].get_tensor(name)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the transformer; averaged weights are preferred to the last ones. A file is its
    own.
    """
    if folder.is_file():
        return [folder]
    for name in MODEL_FILES:
        if (folder / name).is_file():
            return [folder / name]
    index = folder / INDEX_FILE
    if index.is_file():
        shards = sorted(set(read_json(index)["weight_map"].values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ValueError(
                f"{folder} lacks the shards {', '.join(missing)} that {INDEX_FILE} lists; download them"
            )
        return [folder / shard for shard in shards]
    if not folder.is_dir():
        raise ValueError(f"no such model folder: {folder}")
    raise ValueError(f"{folder} holds no weights: expected one of {', '.join((*MODEL_FILES, INDEX_FILE))}")


def load_checkpoint(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    understanding_only: bool = False,
    settings: Mapping[str, Any] | None = None,
    weights: Path | None = None,
) -> Checkpoint:
    """Loads a folder. dtype None keeps the stored one; settings override top-level entries of config.json.

    Raises ValueError listing every missing, unexpected or misshapen tensor. understanding_only leaves the
    generation expert and the autoencoder on disk, device "meta" every tensor of the transformer. weights is
    the file or folder that holds the transformer, if not the same folder in the usual order.
    """
    folder = Path(folder)
    files = TensorFiles(weight_files(weights or folder))
    vae_files = TensorFiles(list(folder.glob(VAE_FILE)))
    shapes = files.shapes()
    config = read_config(folder, shapes, vae_files.shapes(), settings or {})
    if understanding_only:
        config = config.understanding_only()
        shapes = {
            name: shape for name, shape in shapes.items() if not any(p in name for p in GENERATION_PARTS)
        }
    where = str(folder), str(folder / VAE_FILE)
    model, autoencoder = build(config, (files, shapes), vae_files, dtype=dtype, device=device, where=where)
    return Checkpoint(config, model, autoencoder, TextCodec.load(folder))


def build(
    config: BagelConfig,
    stored: tuple[TensorFiles, Shapes],
    vae_files: TensorFiles,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    where: tuple[str, str],
) -> tuple[BagelModel, AutoEncoder | None]:
    """The model and the autoencoder (None without files), filled; `where` names the two in errors. On the
    device "meta" the transformer alone stays without memory.
    """
    with torch.device("meta"):
        model = BagelModel(config)
        autoencoder = AutoEncoder(config.vae) if config.vae and vae_files.handles else None
    fill(model, *stored, dtype=dtype, device=device, where=where[0])
    if autoencoder is not None:
        place = "cpu" if str(device) == "meta" else device
        fill(autoencoder, vae_files, vae_files.shapes(), dtype=dtype, device=place, where=where[1])
    return model.eval(), autoencoder and autoencoder.eval()


def fill(
    module: nn.Module,
    files: TensorFiles,
    shapes: Shapes,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    where: str,
) -> None:
    """Gives a module on the meta device its tensors, one by one."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    computed = {name for name in MAY_BE_MISSING if name in wanted and shapes.get(name) != wanted[name]}
    shapes = {name: shape for name, shape in shapes.items() if name not in computed}  # of another grid
    missing = [name for name in wanted if name not in shapes and name not in MAY_BE_MISSING]
    unexpected = [name for name in shapes if name not in wanted and not name.endswith(MAY_BE_LEFT_OVER)]
    misshapen = [
        f"{name} {shapes[name]}, expected {shape}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(faults.values()):
        listed = "; ".join(
            f"{len(names)} {kind}: {_listed(names)}" for kind, names in faults.items() if names
        )
        raise ValueError(f"{where} does not fit its configuration; {listed}")
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    for owner_name, owner in module.named_modules():
        for leaf, parameter in list(owner._parameters.items()):
            if parameter is None:
                continue
            name = f"{owner_name}.{leaf}" if owner_name else leaf
            if name in shapes:
                tensor = files[name].to(device=device, dtype=dtype)
                owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=name not in frozen)
            else:
                owner._parameters[leaf] = nn.Parameter(
                    torch.empty(wanted[name], dtype=dtype, device=device), False
                )
                owner.reset_parameters()  # pyright: ignore[reportCallIssue]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (" …" if len(names) > LISTED else "")


def read_config(folder: Path, shapes: Shapes, vae_shapes: Shapes, settings: Mapping[str, Any]) -> BagelConfig:
    """Every per-model fact: config.json (overridden by settings), the two part files, tensor shapes, the 7B's
    values.
    """
    stored = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    for key in settings:
        if key not in (*TOP_LEVEL, "openbagel"):
            raise ValueError(f"settings: unknown key {key!r}{nearest(key, TOP_LEVEL)}")
    stored = {**stored, **settings}
    known = {**_facts_of_shapes(shapes), **{key: stored[key] for key in TOP_LEVEL if key in stored}}
    own = stored.get("openbagel")
    tree = {
        "llm": llm_fields_of(_part(folder, stored, "llm_config"), shapes),
        "vit": _vit_fields(_part(folder, stored, "vit_config"), shapes)
        if "connector.fc1.weight" in shapes
        else None,
        "vae": vae_fields_of(stored.get("vae_config", {}), vae_shapes)
        if "vae2llm.weight" in shapes
        else None,
        "settings": own if own is not None else to_json(official_settings()),
        **known,
    }
    if tree["vae"]:
        tree.setdefault(
            "latent_patch_size", round((shapes["vae2llm.weight"][1] / tree["vae"]["z_channels"]) ** 0.5)
        )
    fallback = to_json(bagel_7b())
    return from_json(BagelConfig, {**{key: fallback[key] for key in TOP_LEVEL}, **tree}, str(folder))


def _facts_of_shapes(shapes: Shapes) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    layer = "language_model.model.layers.0."
    if layer + "self_attn.q_proj_moe_gen.weight" in shapes:
        facts["layer_module"] = Experts.MOT.value
    elif layer + "mlp_moe_gen.gate_proj.weight" in shapes:
        facts["layer_module"] = Experts.MOE.value
    else:
        facts["layer_module"] = Experts.DENSE.value
    tables = {
        "max_latent_size": "latent_pos_embed.pos_embed",
        "vit_max_num_patch_per_side": "vit_model.vision_model.embeddings.position_embedding.weight",
    }
    return facts | {key: round(shapes[name][0] ** 0.5) for key, name in tables.items() if name in shapes}


def _part(folder: Path, stored: dict[str, Any], name: str) -> dict[str, Any]:
    """A part's fields: from config.json, else from its own file."""
    if name in stored:
        return stored[name]
    path = folder / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"{folder} has neither {path.name} nor {name!r} in its config.json")
    return read_json(path)


def llm_fields_of(fields: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    for key, value in FIXED_LLM_FIELDS.items():
        if fields.get(key, value) != value:
            raise ValueError(f"llm_config: {key}={fields[key]!r} is not supported, only {value!r}")
    names = [f.name for f in dataclasses.fields(LLMConfig) if f.name in fields]
    qk_norm = "language_model.model.layers.0.self_attn.q_norm.weight" in shapes
    return {name: fields[name] for name in names} | {"qk_norm": qk_norm}


def _vit_fields(fields: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """The stored layer count may or may not include the layer that BAGEL drops; the tensors decide."""
    layers = {
        name.split(".layers.")[1].split(".")[0]
        for name in shapes
        if name.startswith("vit_model.") and ".layers." in name
    }
    stored = fields.get("num_hidden_layers")
    if stored not in (len(layers), len(layers) + 1):
        raise ValueError(
            f"vit_config: num_hidden_layers={stored} does not fit the {len(layers)} stored layers"
        )
    names = [f.name for f in dataclasses.fields(ViTConfig) if f.name in fields]
    return {name: fields[name] for name in names} | {"num_hidden_layers": len(layers) + 1}


def vae_fields_of(fields: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(VAEConfig)}
    known = {key: value for key, value in fields.items() if key in names}
    if not shapes:
        return to_json(FLUX_VAE) | known
    ch = shapes["encoder.conv_in.weight"][0]
    levels = sum(
        name.endswith("block.0.conv1.weight") and name.startswith("encoder.down.") for name in shapes
    )
    blocks = sum(
        name.startswith("encoder.down.0.block.") and name.endswith(".conv1.weight") for name in shapes
    )
    seen = {
        "ch": ch,
        "ch_mult": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] // ch for i in range(levels)],
        "num_res_blocks": blocks,
        "z_channels": shapes["decoder.conv_in.weight"][1],
    }
    return to_json(FLUX_VAE) | seen | known


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid JSON ({error})") from None


def config_json(config: BagelConfig) -> dict[str, Any]:
    """config.json in the shape that vLLM reads, with the `openbagel` part."""
    llm = to_json(config.llm)
    llm.pop("qk_norm")
    qwen = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    vae = config.vae and to_json(config.vae) | {"downsample": config.vae.downsample}
    parts = {
        "llm_config": qwen | llm,
        "vit_config": config.vit and {"model_type": "siglip_vision_model"} | to_json(config.vit),
        "vae_config": vae,
    }
    tree = to_json(config)
    return {
        "model_type": "bagel",
        "architectures": ["BagelForConditionalGeneration"],
        "visual_gen": config.vae is not None,
        "visual_und": config.vit is not None,
        **{key: tree[key] for key in TOP_LEVEL},
        **{name: part for name, part in parts.items() if part},
        "openbagel": tree["settings"],
    }


def save_checkpoint(
    folder: str | Path,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
) -> None:
    """Writes the official folder; dtype None keeps each tensor's. shard_bytes splits the transformer into
    shards. ValueError when an adapter is bound: its tensors have no place there.
    """
    if any(".lora." in name for name, _ in checkpoint.model.named_parameters()):
        raise ValueError("an adapter is bound to the model; merge or remove it first (openbagel.lora)")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = config_json(checkpoint.config)
    for name in ("config", "llm_config", "vit_config"):
        part = config if name == "config" else config.get(name)
        if part:
            (folder / f"{name}.json").write_text(json.dumps(part, indent=2) + "\n", "utf-8")
    checkpoint.codec.save(folder)
    state = {name: _plain(tensor, dtype) for name, tensor in checkpoint.model.state_dict().items()}
    if shard_bytes is None:
        save_file(state, folder / MODEL_FILES[0], {"format": "pt"})
    else:
        _save_shards(folder, state, shard_bytes)
    if checkpoint.autoencoder is not None:
        vae_state = {
            name: _plain(tensor, dtype) for name, tensor in checkpoint.autoencoder.state_dict().items()
        }
        save_file(vae_state, folder / VAE_FILE, {"format": "pt"})


def _plain(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()


def _save_shards(folder: Path, state: dict[str, Tensor], shard_bytes: int) -> None:
    shards = list(_shards(state, shard_bytes))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, {"format": "pt"})
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _shards(state: dict[str, Tensor], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            yield shard
            shard = {}
        shard[name] = tensor
    if shard:
        yield shard


def describe(folder: Path) -> dict[str, Any]:
    """What a folder holds, read from its configuration and tensor headers alone."""
    files = TensorFiles(weight_files(folder))
    vae_files = TensorFiles(list(folder.glob(VAE_FILE)))
    shapes, vae_shapes = files.shapes(), vae_files.shapes()
    config = read_config(folder, shapes, vae_shapes, {})
    parts: Counter[str] = Counter()
    for name, shape in shapes.items():
        draws, looks = any(part in name for part in GENERATION_PARTS), name.startswith(("vit_", "connector."))
        side = "generation expert" if draws else "vit and connector" if looks else "understanding expert"
        parts[side] += math.prod(shape)
    parts["autoencoder"] = sum(map(math.prod, vae_shapes.values()))
    return {
        "folder": str(folder),
        "parameters": dict(parts) | {"all": parts.total()},
        "dtypes": sorted({str(files.handles[name].get_slice(name).get_dtype()) for name in shapes}),
        "config": config_json(config),
    }
