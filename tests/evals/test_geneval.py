"""GenEval: the evaluator's rules on hand-made objects, the detector's post-processing against a slow obvious
one through the real classes, and a whole run.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from openbagel.evals import base, geneval
from openbagel.evals.base import Plan, Verdict
from openbagel.evals.geneval import GENEVAL, Eyes, Thing, faults, instances, relations
from tests import tiny

NAMES = ("bench", "cat", "dog", "")


def thing(label: int = 0, score: float = 0.95, box: tuple[int, int, int, int] = (0, 0, 4, 4)) -> Thing:
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return Thing(label, score, box, mask)


# rules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "told"),
    [
        ((40, 0, 50, 10), {"right of"}),
        ((-40, 0, -30, 10), {"left of"}),
        ((0, 40, 10, 50), {"below"}),
        ((0, -40, 10, -30), {"above"}),
        ((40, 40, 50, 50), {"right of", "below"}),
        ((40, 24, 50, 34), {"right of"}),  # rest (38, 22) of 46.6: 0.82, 0.47
        ((2, 0, 12, 10), set()),  # 2 away, and a tenth of the sides is 2
        ((3, 0, 13, 10), set()),  # a third of the way is left
        ((5, 0, 15, 10), {"right of"}),
        ((0, 0, 10, 10), set()),
    ],
)
def test_relations(box: Any, told: set[str]) -> None:
    assert relations(box, (0, 0, 10, 10)) == told


CASES = [
    ({"include": [{"class": "cat", "count": 2}]}, {"cat": 2}, [], ""),
    ({"include": [{"class": "cat", "count": 2}]}, {"cat": 1}, [], "1 of 2 cat"),
    (
        {"include": [{"class": "cat", "count": 1}], "exclude": [{"class": "cat", "count": 2}]},
        {"cat": 1},
        [],
        "",
    ),
    (
        {"include": [{"class": "cat", "count": 1}], "exclude": [{"class": "cat", "count": 2}]},
        {"cat": 3},
        [],
        "3 cat, not below 2",
    ),
    ({"include": [{"class": "cat", "count": 1, "color": "red"}]}, {"cat": 3}, ["red"], ""),
    (
        {"include": [{"class": "cat", "count": 2, "color": "red"}]},
        {"cat": 3},
        ["red", "blue"],
        "cat red blue, not red",
    ),
    ({"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1}]}, {"cat": 1}, [], "0 of 1 dog"),
]


@pytest.mark.parametrize(("wanted", "counts", "colours", "wrong"), CASES)
def test_objects_their_number_and_colour(wanted: Any, counts: Any, colours: list[str], wrong: str) -> None:
    found = {name: [thing(score=0.9 - i / 10) for i in range(count)] for name, count in counts.items()}

    def told(name: str, things: Sequence[Thing]) -> list[str]:
        assert (
            len(things) == wanted["include"][0]["count"] and things[0].score == 0.9
        )  # the surest ones alone
        return colours

    assert "; ".join(faults(wanted, found, told)) == wrong


def test_places_refer_to_what_was_right() -> None:
    wanted = {
        "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]
    }
    cat, left, right = thing(box=(8, 0, 12, 4)), thing(box=(0, 0, 4, 4)), thing(box=(14, 0, 16, 4))
    told: Any = None
    assert faults(wanted, {"cat": [cat], "dog": [left, right]}, told) == []
    assert faults(wanted, {"cat": [cat], "dog": [right, left]}, told) == ["dog not left of its target"]
    assert faults(wanted, {"dog": [left]}, told) == ["0 of 1 cat", "nothing that dog could be left of"]


# the detector -----------------------------------------------------------------------------------------------


def upsampled(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear, pixel by pixel, by the places of pixels' centres."""
    made = np.zeros(size)
    for y, x in np.ndindex(*size):
        places = [
            min(max((at + 0.5) * of / to - 0.5, 0), of - 1)
            for at, of, to in zip((y, x), plane.shape, size, strict=True)
        ]
        (top, left), (down, across) = [int(place) for place in places], [place % 1 for place in places]
        low, far = min(top + 1, plane.shape[0] - 1), min(left + 1, plane.shape[1] - 1)
        above = plane[top, left] * (1 - across) + plane[top, far] * across
        below = plane[low, left] * (1 - across) + plane[low, far] * across
        made[y, x] = above * (1 - down) + below * down
    return made


Rows = list[tuple[int, float, tuple[int, ...], np.ndarray]]


def slow(logits: np.ndarray, masks: np.ndarray, size: tuple[int, int], most: int) -> Rows:
    """The post-processing of mmdet's instance branch, one pair of query and class at a time."""
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    pairs = [(chances[q, c], q, c) for q in range(len(logits)) for c in range(logits.shape[1] - 1)]
    made: Rows = []
    for chance, query, label in sorted(pairs, reverse=True)[:most]:
        drawn = upsampled(masks[query], size)
        inside = drawn > 0
        if inside.any():
            sure = chance * (1 / (1 + np.exp(-drawn[inside]))).mean()
            ys, xs = np.nonzero(inside)
            made.append((label, sure, (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), inside))
    return sorted(made, key=lambda row: -row[1])


def same(found: list[Thing], rows: Rows) -> None:
    assert len(found) == len(rows)
    for one, (label, sure, box, mask) in zip(found, rows, strict=True):
        assert (one.label, one.box) == (label, tuple(box)) and one.score == pytest.approx(sure, abs=1e-5)
        assert np.array_equal(one.mask.numpy(), mask)


@pytest.mark.parametrize("most", [5, 100])
def test_instances_equal_the_slow_ones(most: int) -> None:
    generator = torch.Generator().manual_seed(most)
    logits, masks = torch.randn(7, 4, generator=generator) * 2, torch.randn(7, 5, 6, generator=generator)
    masks[2] = -1.0  # a query that draws nothing
    rows = slow(logits.double().numpy(), masks.double().numpy(), (13, 9), most)
    same(instances(logits, masks, (13, 9), most=most), rows)
    middle = rows[len(rows) // 2][1]
    same(
        instances(logits, masks, (13, 9), sure=middle + 1e-6, most=most),
        [row for row in rows if row[1] > middle + 1e-6],
    )


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Mask2Former in a folder as the published one is."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    swin = transformers.SwinConfig(
        image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=swin, hidden_dim=32, feature_size=32, mask_feature_size=32, num_attention_heads=2,
        num_queries=6, encoder_layers=1, decoder_layers=2, encoder_feedforward_dim=16, dim_feedforward=16,
        num_labels=3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Mask2FormerModel(config)
        head = torch.nn.Linear(32, 4)
        torch.nn.init.normal_(head.weight)
    weights: dict[str, Tensor] = {f"model.{name}": value for name, value in model.state_dict().items()}
    weights |= {f"class_predictor.{name}": value for name, value in head.state_dict().items()}
    weights["criterion.empty_weight"] = torch.ones(4)
    folder = tmp_path_factory.mktemp("detector")
    save_file(
        {name: value.contiguous().clone() for name, value in weights.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    config.save_pretrained(folder)
    return folder


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def rows_of(*values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[None, None].repeat(1, 3, 1, 1)


@pytest.mark.parametrize(
    ("before", "size", "after"),
    [
        ([[0, 255]], (1, 4), [[0, 64, 191, 255]]),  # 63.75 and 191.25; beyond the centres the border goes on
        # weights 205 and 1843: 3 x 1843 / 2048 + 8 x 205 / 2048 is 3.5; its quarters are cut to 10 and 3
        ([[3], [8]], (5, 1), [[3], [3], [6], [7], [8]]),
        ([[0], [1]], (1, 1), [[1]]),  # a half goes up
        ([[1, 2], [3, 5]], (2, 2), [[1, 2], [3, 5]]),
    ],
)
def test_pictures_are_resized_as_by_opencv(
    before: list[list[int]], size: tuple[int, int], after: list[list[int]]
) -> None:
    assert torch.equal(geneval.resized(rows_of(*before), size), rows_of(*after))


@pytest.mark.parametrize(
    ("shape", "inside", "whole"),
    [
        ((15, 10), (800, 1200), (800, 1216)),  # 800 / 10 is less than 1333 / 15
        ((20, 10), (667, 1333), (672, 1344)),  # 1333 / 20; half of it, 666.5, goes up
        ((12, 12), (800, 800), (800, 800)),
    ],
)
def test_the_detector_runs_as_published(
    detector: Path,
    monkeypatch: pytest.MonkeyPatch,
    shape: tuple[int, int],
    inside: tuple[int, int],
    whole: tuple[int, int],
) -> None:
    """The picture reaches the model at most 1333 x 800 large, filled up with grey to steps of 32, and its
    masks come back at the picture's own size.
    """
    import transformers

    seen: list[Any] = []
    real = transformers.Mask2FormerModel.forward

    def watched(self: Any, pixels: Tensor, **options: Any) -> Any:
        small = torch.nn.functional.interpolate(
            pixels, scale_factor=0.125
        )  # the tiny model's masks are coarse
        told = real(self, small, **options)
        seen.append((pixels, told))
        return told

    monkeypatch.setattr(transformers.Mask2FormerModel, "forward", watched)
    picture = noise(*shape)
    found = geneval.mask2former(str(detector))(picture, 0.0)
    pixels, told = seen[0]
    assert pixels.shape == (1, 3, *whole)
    grey = (128 - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor([58.395, 57.12, 57.375])
    for filled in (pixels[0, :, inside[0] :], pixels[0, :, :, inside[1] :]):
        assert torch.allclose(filled, grey[:, None, None].expand(filled.shape))
    ours = pixels[0, 1, 0, 0] * 57.12 + 116.28
    assert ours.item() == pytest.approx(float(np.asarray(picture)[0, 0, 1]), abs=0.01)
    masks = told.masks_queries_logits[-1][0]
    large = torch.nn.functional.interpolate(masks[None], whole, mode="bilinear")[
        0, :, : inside[0], : inside[1]
    ]
    from safetensors.torch import load_file

    weights = load_file(detector / "model.safetensors")
    last = told.transformer_decoder_intermediate_states[-1].transpose(0, 1)[0]
    logits = last @ weights["class_predictor.weight"].T + weights["class_predictor.bias"]
    assert logits.shape == (6, 4)
    size = (shape[1], shape[0])
    same(found, slow(logits.double().numpy(), large.double().numpy(), size, 100))
    assert found and found[0].mask.shape == size


def test_colours_are_those_of_the_nearest_sentence(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    letters = [*"abcdefghijklmnopqrstuvwxyz-"]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    ends = {
        "bos_token_id": len(vocabulary) - 2,
        "eos_token_id": len(vocabulary) - 1,
        "vocab_size": len(vocabulary),
    }
    text = {**shape, **ends, "max_position_embeddings": 77}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**shape, "image_size": 16, "patch_size": 4}, projection_dim=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}'
    )
    picture = noise(40, 30)
    things = [replace(thing(box=(4, 2, 20, 18)), mask=torch.rand(30, 40) > 0.3), thing(box=(0, 0, 40, 30))]
    things[1] = replace(things[1], mask=torch.ones(30, 40, dtype=torch.bool))
    told = geneval.clip_colours(str(tmp_path))(picture, "cat", things)

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    grey = np.full((30, 40, 3), 0x99, np.uint8)
    expected = []
    with torch.inference_mode():
        sentences = []
        for colour in geneval.COLOURS:
            said = [
                f"a photo of a {colour} cat",
                f"a photo of a {colour}-colored cat",
                f"a photo of a {colour} object",
            ]
            rows = [
                model.text_projection(model.text_model(**tokenizer(one, return_tensors="pt")).pooler_output)[
                    0
                ]
                for one in said
            ]
            mean = torch.stack([row / row.norm() for row in rows]).mean(0)
            sentences.append(mean / mean.norm())
        for one in things:
            alone = np.where(one.mask.numpy()[..., None], np.asarray(picture), grey)[
                one.box[1] : one.box[3], one.box[0] : one.box[2]
            ]
            wide = {16: 16, 40: 21}[alone.shape[1]]  # 16 x 40 / 30 is 21.3, and of 21 2 are cut off first
            small = Image.fromarray(alone).resize((wide, 16), Image.Resampling.BICUBIC)
            square = small.crop(((wide - 16) // 2, 0, (wide - 16) // 2 + 16, 16))
            cut = geneval._middle(Image.fromarray(alone), 16)
            assert np.array_equal(np.asarray(cut), np.asarray(square))
            pixels = (np.asarray(square) / 255 - geneval.CLIP_MEAN) / geneval.CLIP_STD
            row = model.visual_projection(
                model.vision_model(torch.tensor(pixels).permute(2, 0, 1)[None].float()).pooler_output
            )[0]
            expected.append(
                geneval.COLOURS[int(np.argmax([float(row @ sentence) for sentence in sentences]))]
            )
    assert told == expected


def test_what_is_missing_is_told_and_nothing_is_downloaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hf download"):
        geneval.mask2former(str(tmp_path))


# a run ------------------------------------------------------------------------------------------------------


CAT, RED = {"class": "cat", "count": "1"}, {"class": "dog", "count": 1, "color": "red"}
PROMPTS = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"},
    {
        "tag": "counting",
        "include": [{**CAT, "count": 2}],
        "exclude": [{**CAT, "count": 3}],
        "prompt": "two cats",
    },
    {"tag": "colors", "include": [RED], "prompt": "a red dog"},
    {"tag": "colors", "include": [{"class": "snark", "count": 1}], "prompt": "a snark"},
    {
        "tag": "position",
        "include": [CAT, {"class": "dog", "count": 1, "position": ["above", 0]}],
        "prompt": "a",
    },
    {"tag": "position", "include": [{"class": "dog", "count": 1, "position": ["above", 1]}], "prompt": "a"},
]


def test_a_run(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "object_names.txt").write_text("\n".join(NAMES))
    lines = [json.dumps(row) for row in PROMPTS]
    (data / "evaluation_metadata.jsonl").write_text("\n".join([*lines[:3], "{cut", *lines[3:]]) + "\n")
    looked: list[float] = []

    def things(picture: Image.Image, sure: float) -> list[Thing]:
        """In order: a bench in the second picture; two cats, then one that is not sure enough; a dog."""
        looked.append(sure)
        place = len(looked) - 1
        if place < 4:
            return [thing(0)] if place == 1 else []
        if place < 8:
            return [one for one in (thing(1, 0.99), thing(1, 0.95), thing(1, 0.5)) if one.score > sure]
        return [thing(2)]

    def colours(picture: Image.Image, name: str, some: Sequence[Thing]) -> list[str]:
        return ["red"] if len(looked) < 11 else ["blue"]

    eyes = Eyes(things, colours)
    suite = replace(GENEVAL, score=partial(geneval.score, lambda _: eyes))
    plan = Plan(data=data, folder=tmp_path / "run", options={"num_timesteps": 3}, threads=1)
    verdicts = list(base.run(suite, plan, tiny.bagel, model="tiny"))
    told = json.loads((plan.folder / "summary.json").read_text())
    assert looked == [0.3] * 4 + [0.9] * 4 + [0.3] * 8
    assert told["problems"] == {"broken row": 12} and told["scored"] == 16
    found = {name: value["value"] for name, value in told["values"].items()}
    # 1 of 4, 4 of 4, 2 of 4, 0 of 4 (there is no cat)
    assert (found["single_object"], found["counting"], found["colors"], found["position"]) == (
        0.25,
        1.0,
        0.5,
        0.0,
    )
    assert found["overall"] == 0.4375 and found["pictures"] == 7 / 16 and found["prompts"] == 3 / 4
    assert verdicts[0].reason == "0 of 1 bench"
    folder = plan.folder / "outputs" / "00002"
    assert json.loads((folder / "metadata.jsonl").read_text()) == PROMPTS[2]
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [f"000{i}.png" for i in range(4)]
    pictures = {(folder / "samples" / f"000{i}.png").read_bytes() for i in range(4)}
    assert len(pictures) == 4


def test_summary_of_nothing_in_a_kind_leaves_it_out() -> None:
    told = geneval.summary([Verdict(id="00000-0", group="colors", scores={"right": 1.0})])
    assert told["overall"] == told["colors"] == 1.0 and told["position"] != told["position"]
