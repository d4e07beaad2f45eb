"""Memory is foretold without weights, and measured here: by what the CPU allocator hands out."""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.model import Rig
from openbagel import cli
from openbagel.config import BagelConfig, bagel_7b
from openbagel.inference.pipeline import Bagel
from openbagel.memory import (
    Living,
    Task,
    Work,
    autoencoder_peak,
    bytes_of,
    fit,
    parameters_of,
    rehearse,
    request,
    weights_of,
)
from openbagel.model.bagel import BagelModel
from openbagel.model.vae import AutoEncoder
from openbagel.quantize import quantize
from openbagel.weights import config_in
from tests import tiny

WIDTHS = (64, 128, 256)
TASKS: tuple[Task, ...] = ("ask", "draw", "edit")
SIZE = (160, 224)


@pytest.fixture(scope="module")
def rigs() -> dict[int, Rig]:
    return {width: Rig.of(width, 3) for width in WIDTHS}


def measured(run: Callable[[], Any]) -> tuple[int, int]:
    """Bytes at the most, and at the end while the run's value lives, kernels' own buffers included."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    recorded = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    now = most = 0
    for event in recorded:
        now += event["args"]["Bytes"]
        most = max(most, now)
    assert kept is not None
    return most, now


# weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "fp8", "nf4"])
def test_weights(rigs: dict[int, Rig], width: int, precision: str) -> None:
    config = rigs[width].config
    model = BagelModel(config).to(torch.float32 if precision == "float32" else torch.bfloat16)
    assert config.vae
    plain = sum(p.nbytes for p in AutoEncoder(config.vae).parameters()) // (1 + (precision != "float32"))
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")
    if precision not in ("float32", "bfloat16"):
        quantize(model, precision)
    told = weights_of(config, precision)
    assert told.whole == pytest.approx(sum(p.nbytes for p in model.parameters()) + plain, rel=0.01)
    block = model.language_model.model.layers[1]
    assert told.block == pytest.approx(sum(p.nbytes for p in block.parameters()), rel=0.01)


def test_what_dfloat11_packs_takes_seven_tenths() -> None:
    whole, packed = (weights_of(bagel_7b(), precision) for precision in ("bfloat16", "dfloat11"))
    folder = packed.whole - packed.parts["a decoded block"]
    assert folder / whole.whole == pytest.approx(0.70, abs=0.01)
    assert packed.parts["a decoded block"] == pytest.approx(whole.block, rel=0.001)


def test_understanding_only_is_8_billion_parameters() -> None:
    whole, small = bagel_7b(), bagel_7b().understanding_only()
    counts = [weights_of(config, "float32").whole / 4e9 for config in (whole, small)]
    assert counts == pytest.approx([14.607 + 0.084, 8.0527], abs=5e-4)


@pytest.mark.parametrize("config", [bagel_7b(), tiny.config()], ids=["7b", "tiny"])
def test_the_generation_expert_is_what_understanding_leaves_out(config: BagelConfig) -> None:
    whole, small = parameters_of(config), parameters_of(config.understanding_only())
    assert whole["all"] == sum(count for part, count in whole.items() if part != "all")
    drawing = {part: count for part, count in whole.items() if part in ("generation expert", "autoencoder")}
    assert whole["all"] - small["all"] == sum(drawing.values()) > 0
    assert {part: whole[part] for part in whole.keys() - drawing.keys() - {"all"}} == {
        part: small[part] for part in small.keys() - {"autoencoder", "all"}
    }


# requests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("task", TASKS)
def test_requests(rigs: dict[int, Rig], width: int, task: Task) -> None:
    """KV cache and activations, each within 2 %."""
    rig, work = rigs[width], Work(task, SIZE, text=40, answer=80)
    told = rehearse(rig.config, work, torch.float32)
    most, kept = measured(lambda: rig.engine.drive(request(rig.config, work, "cpu")))
    assert told.kv_cache == pytest.approx(kept, rel=0.02)
    assert told.kv_cache + told.activations == pytest.approx(most, rel=0.02)


def test_other_requests(rigs: dict[int, Rig]) -> None:
    """Several at once, several pictures, long texts, and 16 bits."""
    rig = rigs[128]
    half = replace(rig, engine=Rig.of(128, 3, dtype=torch.bfloat16).engine)
    cases = (
        (rig, Work("draw", (64, 64), batch=3), torch.float32),
        (rig, Work("edit", (96, 64), pictures=3), torch.float32),
        (rig, Work("ask", (64, 64), text=700, answer=900, batch=2), torch.float32),
        (half, Work("edit", (128, 128)), torch.bfloat16),
    )
    for one, work, dtype in cases:
        told = rehearse(one.config, work, dtype)
        drives = [request(one.config, work, "cpu") for _ in range(work.batch)]
        most, kept = measured(lambda one=one, drives=drives: one.engine.drive_all(drives))
        assert told.kv_cache == pytest.approx(kept, rel=0.02), work
        assert told.kv_cache + told.activations == pytest.approx(most, rel=0.05), work


@pytest.mark.parametrize(
    ("channels", "task", "size", "tiled"),
    [(16, "edit", (256, 192), False), (32, "draw", (128, 128), False), (64, "edit", (96, 128), False)]
    + [(16, "draw", (768, 512), True)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autoencoder(
    rigs: dict[int, Rig], channels: int, task: Task, size: tuple[int, int], tiled: bool, dtype: torch.dtype
) -> None:
    config = rigs[64].config
    assert config.vae
    vae = replace(config.vae, ch=channels)
    config, autoencoder = replace(config, vae=vae), AutoEncoder(vae).to(dtype).eval()

    @torch.inference_mode()
    def run() -> torch.Tensor:
        latents = torch.zeros(1, 8, size[0] // 8, size[1] // 8, dtype=dtype)
        picture = autoencoder.decode(latents, tiled=tiled)
        return autoencoder.encode(torch.zeros_like(picture), latents) if task == "edit" else picture

    told = autoencoder_peak(config, Work(task, size, tiled_vae=tiled), dtype)
    assert told == pytest.approx(measured(run)[0], rel=0.10)


def test_the_verbs_of_nano() -> None:
    """What the verbs themselves take, pixels and all, from the shipped weights."""
    bagel = Bagel.load("nano", device="cpu", dtype=torch.float32)
    sampling = replace(bagel.config.settings.edit, num_timesteps=3, max_tokens=8)
    bagel = bagel.using(sampling)
    picture = bagel.generate("a red circle")
    runs: dict[Task, Callable[[], Any]] = {
        "draw": lambda: bagel.generate("a red circle"),
        "edit": lambda: bagel.edit(picture, "make it blue"),
        "ask": lambda: bagel.ask(picture, "how many circles?"),
    }
    for task, run in runs.items():
        words = {"draw": "a red circle", "edit": "make it blue", "ask": "how many circles?"}[task]
        work = Work(task, (64, 64), text=len(bagel.codec.encode(words)) + 2, answer=8)
        told = rehearse(bagel.config, work, torch.float32)
        peak = told.kv_cache + max(told.activations, told.autoencoder)
        assert peak == pytest.approx(measured(run)[0], rel=0.10), task


def test_living_sees_births_and_deaths() -> None:
    with Living() as living:
        a = torch.empty(1000, device="meta")
        view = a[10:].view(2, -1)
        assert living.now == 4000
        b = view + 1
        assert (living.now, living.most) == (7960, 7960)
        del a, view
        assert (living.now, living.most) == (3960, 7960)
        del b
    assert living.now == 0


# what fits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "options"),
    [
        ("1GB", None),
        ("5GB", "--offload sequential"),
        ("8GB", "--offload blocks"),
        ("12GB", "--offload blocks"),
        ("16GB", "--quantize nf4"),
        ("24GB", "--quantize int8"),
        ("48GB", ""),
        ("80GB", ""),
    ],
)
def test_advice_for_7b(memory: str, options: str | None) -> None:
    *_, last = fit(bagel_7b(), "FOLDER", bytes_of(memory), (1024, 1024))
    if options is None:
        assert last.startswith("nothing fits")
    else:
        assert last == f"best that fits: openbagel edit --model FOLDER {options}".rstrip()


def test_info_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "nano", "--fit", "17MB", "--size", "64x64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:38].strip(): line[38:].split() for line in lines}
    assert rows["weights (MB)"][:2] == ["bfloat16", "dfloat11"]
    assert float(rows["all"][0]) == pytest.approx(weights_of(nano_config(), "bfloat16").whole / 1e6, abs=0.01)
    assert rows["--quantize int8"][2].endswith("*")
    assert not rows["bfloat16"][-1].endswith("*")
    assert lines[-1].startswith("best that fits: openbagel edit --model nano --quantize int8")
    assert cli.main(["info", "bagel_7b"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"]["all"] == pytest.approx(14.691e9, abs=1e6)
    assert cli.main(["info", "nano", "--fit", "lots"]) == 2
    assert "'lots' is no size of memory; write for example 24GB" in capsys.readouterr().err


def nano_config() -> BagelConfig:
    from openbagel.hub import find_model

    return config_in(find_model("nano"))


def test_sizes_of_memory() -> None:
    assert [bytes_of(text) for text in ("24GB", "1.5 gb", "16GiB", "800MB", 12)] == [
        24 * 10**9,
        15 * 10**8,
        16 * 2**30,
        8 * 10**8,
        12,
    ]
    for text in ("24 giga", "-3GB", "", "24"):
        with pytest.raises(ValueError, match="no size of memory"):
            bytes_of(text)
