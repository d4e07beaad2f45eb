"""GenEval: are the objects of a prompt in the picture, in number, colour and place? A detector says.

The rules are the published evaluator's (djghosh13/geneval, evaluation/evaluate_images.py). The detector is
Mask2Former with a Swin-S from transformers: its authors' weights, where the evaluator has those that mmdet 2
trained. What is done around it is mmdet 2's (open-mmlab/mmdetection: configs/mask2former/
mask2former_r50_lsj_8x2_50e_coco.py; mmdet/models/seg_heads/panoptic_fusion_heads/maskformer_fusion_head.py;
mmdet/core/mask/utils.py): masks at the picture's own size, and boxes around them. Colours are told by CLIP as
in LAION-AI/CLIP_benchmark (metrics/zeroshot_classification.py) but for its half precision.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from openbagel.checks import check_choice, extra, retold
from openbagel.evals.base import Desk, Made, Sample, Verdict, mean
from openbagel.evals.questions import SEED, average, means, rows, samples_of, suite, text_of

KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
SAID = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)
SURE, SURE_TO_COUNT = 0.3, 0.9
"""The least score of an object that counts, and of one where objects are counted."""
MOST = 16
"""Objects of a class, the surest ones; the published limit of their overlap is 1, that is none."""
APART = 0.1
"""Share of two objects' sides by which their centres must differ before one is beside the other."""
GREY = "#999"
LONGEST, SHORTEST, STEP, BORDER = 1333, 800, 32, 128
"""What the detector sees: the largest size of these sides, filled up to whole steps with a grey."""
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
DETECTOR, CLIP = "facebook/mask2former-swin-small-coco-instance", "openai/clip-vit-large-patch14"
PROMPTS = {"geneval": "evaluation_metadata.jsonl", "geneval-rewritten": "evaluation_metadata_long.jsonl"}
PICTURES = 4
"""Of each prompt."""

Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Thing:
    """A detected object: the number of its class, how sure, left, top, right, bottom, bool[H, W]."""

    label: int
    score: float
    box: Box
    mask: Tensor


@dataclass(frozen=True, slots=True)
class Eyes:
    """What looks at a picture: finds things surer than a bound, and tells the colours of some of one name."""

    things: Callable[[Image.Image, float], list[Thing]]
    colours: Callable[[Image.Image, str, Sequence[Thing]], list[str]]


# the detector -----------------------------------------------------------------------------------------------


def instances(
    logits_QC: Tensor, masks_QHW: Tensor, size: tuple[int, int], *, sure: float = 0.0, most: int = 100
) -> list[Thing]:
    """The `most` surest pairs of query and class (the last class is none), each with its mask at `size`
    (height, width), the surest first. A score is the class's probability times the mean one inside the mask.
    """
    chances_QC = logits_QC.softmax(-1)[:, :-1]
    classes = chances_QC.shape[1]
    values, places = chances_QC.flatten().topk(min(most, chances_QC.numel()))
    found: list[Thing] = []
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        if value <= sure:  # the mask can only lower it
            break
        drawn = F.interpolate(masks_QHW[None, None, place // classes], size, mode="bilinear")[0, 0]
        mask = drawn > 0
        inside = (drawn.sigmoid() * mask).sum() / (mask.sum() + 1e-6)
        if (score := value * inside.item()) > sure:
            found.append(Thing(place % classes, score, _box(mask), mask.cpu()))
    return sorted(found, key=lambda thing: -thing.score)


def _box(mask: Tensor) -> Box:
    """Around a mask that is not empty; right and bottom lie one behind its last pixels."""
    across, down = (mask.any(axis).nonzero()[:, 0].tolist() for axis in (0, 1))
    return across[0], down[0], across[-1] + 1, down[-1] + 1


def mask2former(source: str, device: str = "cpu") -> Callable[[Image.Image, float], list[Thing]]:
    """The detector in a folder or in Hugging Face's cache."""
    module = extra("transformers.models.mask2former.modeling_mask2former", "hf", "GenEval's detector")

    class Headed(module.Mask2FormerPreTrainedModel):
        """The published weights without their training loss, which would need scipy."""

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = module.Mask2FormerModel(config)
            self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
            self.post_init()

        def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
            told = self.model(pixels, output_hidden_states=True)
            last = told.transformer_decoder_intermediate_states[-1].transpose(0, 1)
            return self.class_predictor(last)[0], told.masks_queries_logits[-1][0]

    model = _loaded(Headed, source).to(device)

    def things(picture: Image.Image, sure: float) -> list[Thing]:
        width, height = picture.size
        scale = min(LONGEST / max(width, height), SHORTEST / min(width, height))
        size = int(height * scale + 0.5), int(width * scale + 0.5)
        filling = (0, -size[1] % STEP, 0, -size[0] % STEP)
        pixels = F.pad(resized(_pixels(picture), size), filling, value=BORDER)
        pixels = _normalised(pixels, MEAN, STD).to(device)
        with torch.inference_mode():
            logits_QC, masks_QHW = model(pixels)
            masks_QHW = F.interpolate(masks_QHW[None], pixels.shape[2:], mode="bilinear")[0]
            return instances(logits_QC, masks_QHW[:, : size[0], : size[1]], (height, width), sure=sure)

    return things


def clip_colours(
    source: str, device: str = "cpu"
) -> Callable[[Image.Image, str, Sequence[Thing]], list[str]]:
    """Tells colours by CLIP: each thing alone on grey, cut out, against three sentences for each colour."""
    module = extra("transformers", "hf", "GenEval's colours")
    model = _loaded(module.CLIPModel, source).to(device)
    tokenizer = _loaded(module.AutoTokenizer, source)
    side = model.config.vision_config.image_size

    @cache
    def sentences_CD(name: str) -> Tensor:
        said = [form.format(colour=colour, name=name) for colour in COLOURS for form in SAID]
        tokens = tokenizer(said, padding=True, truncation=True, return_tensors="pt").to(device)
        told = model.text_projection(model.text_model(**tokens).pooler_output)
        return F.normalize(F.normalize(told, dim=-1).unflatten(0, (len(COLOURS), len(SAID))).mean(1), dim=-1)

    def colours(picture: Image.Image, name: str, things: Sequence[Thing]) -> list[str]:
        blank = Image.new("RGB", picture.size, GREY)
        cuts = []
        for thing in things:
            alone = Image.composite(picture, blank, Image.fromarray(thing.mask.numpy()))
            cuts.append(_pixels(_middle(alone.crop(thing.box), side)))
        with torch.inference_mode():
            pixels = _normalised(torch.cat(cuts) / 255, CLIP_MEAN, CLIP_STD).to(device)
            seen = model.visual_projection(model.vision_model(pixels).pooler_output)
            return [COLOURS[best] for best in (seen @ sentences_CD(name).T).argmax(-1).tolist()]

    return colours


def resized(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """float[1, 3, H, W] of whole numbers at `size`, as OpenCV's bilinear resize, which mmcv 1 calls
    (open-mmlab/mmcv, mmcv/image/geometric.py), makes them of bytes: weights in 1/2048, what is too fine cut
    off twice, then rounded.
    """
    tops, bottoms, ups, downs = _taps(pixels.shape[2], size[0])
    lefts, rights, nears, fars = _taps(pixels.shape[3], size[1])
    across = pixels[..., lefts].long() * nears + pixels[..., rights].long() * fars >> 4
    rows = (across[:, :, tops] * ups[:, None] >> 16) + (across[:, :, bottoms] * downs[:, None] >> 16)
    return (rows + 2 >> 2).float()


def _taps(length: int, size: int) -> tuple[Tensor, ...]:
    """For each of `size` new pixels the two old ones beside its centre, and their weights in 1/2048."""
    places = ((torch.arange(size, dtype=torch.float64) + 0.5) * (length / size) - 0.5).float()
    first = places.floor()
    weight = ((places - first) * 2048).round().long()
    ends = (first.long().clamp(0, length - 1), (first.long() + 1).clamp(0, length - 1))
    return *ends, 2048 - weight, weight


def _middle(picture: Image.Image, side: int) -> Image.Image:
    """A square from the middle, after the shorter side was brought to `side`, the longer one rounded down
    (mlfoundations/open_clip, src/open_clip/transform.py, by torchvision's Resize and CenterCrop).
    """
    shortest = min(picture.size)
    width, height = (side * length // shortest for length in picture.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    whole = picture.resize((width, height), Image.Resampling.BICUBIC)
    return whole.crop((left, top, left + side, top + side))


def _pixels(picture: Image.Image) -> Tensor:
    """float[1, 3, H, W] of 0 to 255."""
    return torch.tensor(np.asarray(picture.convert("RGB"))).permute(2, 0, 1)[None].float()


def _normalised(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def _loaded(kind: Any, source: str) -> Any:
    """A pretrained model or tokenizer; nothing is downloaded."""
    message = f"{source} cannot be loaded ({{error}}); run `hf download {source}`, or put it below --data"
    with retold(message, OSError, ValueError):
        loaded = kind.from_pretrained(source, local_files_only=True)
    return loaded.eval() if isinstance(loaded, nn.Module) else loaded


@cache
def published_eyes(data: Path) -> Eyes:
    """Detector and CLIP, from folders of their names below the data if there are such."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def source(name: str) -> str:
        return str(folder) if (folder := data / name.rpartition("/")[2]).is_dir() else name

    return Eyes(mask2former(source(DETECTOR), device), clip_colours(source(CLIP), device))


# the rules --------------------------------------------------------------------------------------------------


def relations(a: Box, b: Box) -> set[str]:
    """Where a lies as seen from b. Nearer than `APART` of their sides they lie nowhere; else the rest of the
    way counts in each direction in which it is more than half of the whole distance.
    """
    offset, rest = [], []
    for axis in (0, 1):
        way = (a[axis] + a[axis + 2] - b[axis] - b[axis + 2]) / 2
        sides = a[axis + 2] - a[axis] + b[axis + 2] - b[axis]
        offset.append(way)
        rest.append(max(abs(way) - APART * sides, 0.0) * (1 if way > 0 else -1))
    if max(map(abs, rest)) < 1e-3:
        return set()
    across, down = (length / (offset[0] ** 2 + offset[1] ** 2) ** 0.5 for length in rest)
    told = {"left of": across < -0.5, "right of": across > 0.5, "above": down < -0.5, "below": down > 0.5}
    return {name for name, holds in told.items() if holds}


def faults(
    wanted: Mapping[str, Any],
    found: Mapping[str, Sequence[Thing]],
    colours: Callable[[str, Sequence[Thing]], list[str]],
) -> list[str]:
    """What is wrong with the things that were found, the surest first. Of each wanted class the surest ones,
    as many as are wanted, are looked at; a place refers to those of an earlier one that was right.
    """
    wrong: list[str] = []
    right: list[Sequence[Thing] | None] = []
    for want in wanted.get("include", ()):
        name, count = want["class"], want["count"]
        things, reason = found.get(name, ())[:count], ""
        if len(things) < count:
            reason = f"{len(things)} of {count} {name}"
        elif "color" in want and (told := colours(name, things)).count(want["color"]) < count:
            reason = f"{name} {' '.join(told)}, not {want['color']}"
        elif "position" in want:
            place, target = want["position"]
            others = right[target]
            if others is None:
                reason = f"nothing that {name} could be {place}"
            elif any(place not in relations(one.box, other.box) for one in things for other in others):
                reason = f"{name} not {place} its target"
        wrong += [reason] if reason else []
        right.append(None if reason else things)
    for want in wanted.get("exclude", ()):
        if len(found.get(want["class"], ())) >= want["count"]:
            wrong.append(f"{len(found[want['class']])} {want['class']}, not below {want['count']}")
    return wrong


# the suite --------------------------------------------------------------------------------------------------


def samples(prompts: str, data: Path) -> Iterator[Sample]:
    classes = text_of(data / "object_names.txt").split("\n")

    def make(item: Any) -> Sample:
        line, number, wanted = item
        check_choice("tag", wanted["tag"], KINDS)
        for place, want in enumerate((*wanted["include"], *wanted.get("exclude", ()))):
            check_choice("class", want["class"], classes)
            want["count"] = int(want["count"])
            if "position" in want and want["position"][1] not in range(place):
                raise ValueError(f"{want['position']} names no earlier object")
        folder = f"{int(line):05}"
        return Sample(
            id=f"{folder}-{number}",
            parts=(wanted["prompt"],),
            group=wanted["tag"],
            seed=SEED + number,
            file=f"{folder}/samples/{number:04}.png",
            truth={"wanted": wanted, "classes": classes},
        )

    listed = (
        (f"{at}-{number}", (at, number, row))
        for at, row in rows(data / prompts)
        for number in range(PICTURES)
    )
    return samples_of(listed, make)


_looking = Lock()


def score(eyes: Callable[[Path], Eyes], sample: Sample, made: Made, desk: Desk) -> Verdict:
    wanted, classes = sample.truth["wanted"], sample.truth["classes"]
    picture = desk.picture(made)
    with _looking:  # one picture at a time: the models fill a device
        see = eyes(desk.data)
        found: dict[str, list[Thing]] = {}
        for thing in see.things(picture, SURE_TO_COUNT if wanted["tag"] == "counting" else SURE):
            if len(some := found.setdefault(classes[thing.label], [])) < MOST:
                some.append(thing)
        wrong = faults(wanted, found, partial(see.colours, picture))
    scores = {"right": float(not wrong)}
    return Verdict(id=sample.id, group=sample.group, scores=scores, reason="; ".join(wrong))


def summary(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """The kinds, their mean, the share of right pictures, and of prompts with any right one."""
    found, prompts = means(verdicts, "right", KINDS), dict[str, float]()
    for verdict in verdicts:
        name = verdict.id.rpartition("-")[0]
        prompts[name] = max(prompts.get(name, 0.0), verdict.scores["right"])
    whole = {"overall": average(found.values()), "pictures": mean(verdicts, "right")}
    return {**found, **whole, "prompts": average(prompts.values())}


def metadata(done: Sequence[tuple[Sample, Made]], folder: Path) -> Path:
    """The published evaluator reads a prompt's row beside its pictures."""
    for sample, made in done:
        if made.file:
            path = (folder / "outputs" / made.file).parents[1] / "metadata.jsonl"
            path.write_text(json.dumps(sample.truth["wanted"]) + "\n", "utf-8")
    return folder / "outputs"


GENEVAL, GENEVAL_REWRITTEN = (
    suite(name, partial(samples, file), partial(score, published_eyes), summary, submission=metadata)
    for name, file in PROMPTS.items()
)
