"""Streamed and spread models give bit for bit what a model whole on one device gives, and take less."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from openbagel import Bagel, cli
from openbagel.config import bagel_7b
from openbagel.inference.context import Context
from openbagel.inference.engine import Engine, Forward, Read, Row
from openbagel.lora import Adapter, bind, save_adapter
from openbagel.memory import Usage, Work, rehearse, weights_of
from openbagel.model.bagel import BagelModel
from openbagel.placement import Placement, Plan, Ring, devices_here, place, plan
from openbagel.sequence import PackedSequence, Packer, Text, VaeImage, VitImage
from openbagel.weights import Checkpoint, load_checkpoint, save_checkpoint
from tests import tiny

MODES: dict[str, dict[str, Any]] = {
    "blocks": {"device": "cpu", "offload": "blocks"},
    "sequential": {"device": "cpu", "offload": "sequential"},
    "auto": {"device": "auto"},
    "some blocks": {"max_memory": {"cpu": "24MB"}},
}
GB = 10**9
USAGE = Usage(kv_cache=GB // 2, activations=2 * GB, autoencoder=5 * GB // 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano's weights in bfloat16, so that streaming to float32 casts on the way, and an adapter for them."""
    path = tmp_path_factory.mktemp("placed")
    nano = Bagel.load("nano", device="cpu", dtype=torch.float32)
    checkpoint = Checkpoint(nano.config, nano.model, nano.autoencoder, nano.codec)
    save_checkpoint(path / "model", checkpoint, dtype=torch.bfloat16)
    bind(nano.model, Adapter(rank=2), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in nano.model.named_parameters():
            if ".lora." in name:
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    save_adapter(nano.model, path / "adapter")
    return path


def outcome(bagel: Bagel) -> tuple[bytes, bytes, str]:
    """Of a drawing, of an edit that shows and encodes a picture, and of a question, with thoughts."""
    short = replace(bagel.config.settings.edit, num_timesteps=3, max_tokens=4, max_think_tokens=4)
    bagel = bagel.using(short)
    picture = bagel.generate("a red circle", seed=1, think=True)
    edited = bagel.edit(Image.new("RGB", (64, 64), "green"), "make it blue", seed=2)
    return picture.tobytes(), edited.tobytes(), str(bagel.ask(edited, "how many circles?"))


@cache
def plain(folder: Path, **options: Any) -> tuple[bytes, bytes, str]:
    bagel = Bagel.load(folder / "model", device="cpu", dtype=torch.float32, **options)
    assert bagel.placement is None
    return outcome(bagel)


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_bit_equal(folder: Path, mode: str) -> None:
    placed = Bagel.load(folder / "model", dtype=torch.float32, **MODES[mode])
    assert outcome(placed) == plain(folder)
    assert placed.placement is not None
    streamed = {"blocks": 6, "some blocks": range(1, 6), "auto": 0}.get(mode)
    if isinstance(streamed, int):
        assert sum(len(ring.slots) > 1 for ring in placed.placement.rings) == bool(streamed)
    elif streamed is not None:
        assert len(placed.placement.rings[0].slots) in streamed


@pytest.mark.parametrize("mode", ["blocks", "sequential"])
def test_packed_and_adapted_models_stream(folder: Path, mode: str) -> None:
    options: dict[str, Any] = {"quantize": "int8", "lora": str(folder / "adapter")}
    placed = Bagel.load(folder / "model", dtype=torch.float32, **options, **MODES[mode])
    assert outcome(placed) == plain(folder, **options) != plain(folder)


def test_the_command_line_places(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", str(folder / "model"), "--max-tokens", "3"]
    whole = tmp_path / "whole.png"
    Image.new("RGB", (64, 64), "red").save(whole)
    said = []
    for extra in ([], ["--offload", "blocks"], ["--understanding-only"], ["--max-memory", "cpu=14MB"]):
        assert cli.main(["ask", str(whole), "what is it?", *model, *extra]) == 0
        said.append(capsys.readouterr().out)
    assert len(set(said)) == 1
    assert cli.main(["ask", "what?", *model, "--offload", "blocks", "--max-memory", "cpu=14MB"]) == 2
    assert "exclude each other" in capsys.readouterr().err


@pytest.mark.parametrize("offload", ["blocks", "sequential"])
def test_threads_share_a_streamed_model(folder: Path, offload: str) -> None:
    """They take turns, a forward that fails lets go of its turn."""
    placed = Bagel.load(folder / "model", device="cpu", dtype=torch.float32, offload=offload)
    layer = placed.model.language_model.model.layers[2]
    handle = layer.mlp.register_forward_pre_hook(lambda *_: 1 / 0)  # pyright: ignore
    with ThreadPoolExecutor(1) as pool, pytest.raises(ZeroDivisionError):
        pool.submit(outcome, placed).result()
    handle.remove()
    with ThreadPoolExecutor(3) as pool:
        assert set(pool.map(outcome, [placed] * 3)) == {plain(folder)}


# streaming --------------------------------------------------------------------------------------------------


@pytest.fixture
def streamed(folder: Path) -> Iterator[tuple[BagelModel, Placement]]:
    checkpoint = load_checkpoint(folder / "model")
    placement = place(checkpoint, "cpu", torch.float32, offload="blocks")
    yield checkpoint.model, placement
    placement.remove()


def test_one_block_at_a_time_is_there(streamed: tuple[BagelModel, Placement]) -> None:
    """Afterwards all tensors are the file's again."""
    model, _ = streamed
    layers = list(model.language_model.model.layers)
    there: list[list[int]] = []

    def look(module: nn.Module, given: Any) -> None:
        cast_ones = ({p.dtype for p in one.parameters()} == {torch.float32} for one in layers)
        there.append([index for index, here in enumerate(cast_ones) if here])

    for layer in layers:
        layer.register_forward_pre_hook(look)
    draw(model)
    assert there == [[i] for i in range(6)]
    assert {p.dtype for layer in layers for p in layer.parameters()} == {torch.bfloat16}


def draw(model: BagelModel, *, read: bool = False) -> None:
    checkpoint = load_checkpoint("openbagel/assets/nano", device="meta")
    engine = Engine(model, Packer(model.config, checkpoint.codec))
    tokens = torch.zeros(4, model.config.latent_channels)
    segment = Text((1, 2, 3)) if read else VaeImage.noised(tokens, (2, 2), 0.5)
    engine.step([Forward((Row(Context(model.config.llm), (segment,)),))])


def test_text_leaves_the_generation_expert_at_home(
    streamed: tuple[BagelModel, Placement], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    copy = Ring._copy
    monkeypatch.setattr(Ring, "_copy", lambda ring, i: (asked.append(ring.gen), copy(ring, i))[1])
    model, placement = streamed
    placement.remove()
    placement.spread(Plan(("cpu",), ("cpu",) * 6, frozenset(range(6))))
    draw(model, read=True)
    assert asked == [False] * 6
    draw(model)
    assert asked[6:] == [True] * 6


def test_a_failed_forward_leaves_nothing_behind(streamed: tuple[BagelModel, Placement]) -> None:
    model, _ = streamed
    layer = model.language_model.model.layers[3]
    handle = layer.mlp.register_forward_pre_hook(lambda *_: 1 / 0)  # pyright: ignore
    with pytest.raises(ZeroDivisionError):
        draw(model)
    handle.remove()
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    draw(model)


class Side:
    """A stream that notes what it is told; stands in for CUDA's, which no test here can run."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes = name, notes
        self.count = 0

    def record_event(self) -> str:
        self.count += 1
        return f"{self.name}{self.count}"

    def wait_event(self, event: str) -> None:
        self.notes.append(f"{self.name} waits for {event}")


def test_streams_wait_for_each_other(
    streamed: tuple[BagelModel, Placement], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computing waits for a block's copy, the copy for the block before the last one to be gone."""
    notes: list[str] = []
    main, ring = Side("main", notes), streamed[1].rings[0]
    ring.side = cast(Any, Side("side", notes))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    draw(streamed[0])
    assert [note for note in notes if note.startswith("main")] == [
        f"main waits for side{i}" for i in range(1, 7)
    ]
    assert list(ring.coming) == [(0, True)]  # for the next step
    assert [note for note in notes if note.startswith("side")] == [
        f"side waits for main{i}" for i in range(1, 6)
    ]


@pytest.mark.parametrize("offload", ["blocks", "sequential"])
def test_removing_takes_all_hooks_away(folder: Path, offload: str) -> None:
    checkpoint = load_checkpoint(folder / "model", dtype=torch.float32)
    before = {
        name: p.data_ptr() for name, p in checkpoint.model.language_model.model.layers.named_parameters()
    }
    placement = place(checkpoint, "cpu", torch.float32, offload=offload)
    draw(checkpoint.model)
    placement.remove()
    modules = [*checkpoint.model.modules(), *(checkpoint.autoencoder or nn.Module()).modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    after = checkpoint.model.language_model.model.layers.named_parameters()
    assert {name: p.data_ptr() for name, p in after} == before
    draw(checkpoint.model)


SCRIPT = """
import json, sys, threading, time, torch
from openbagel import Bagel
from openbagel.inference.context import Context
from openbagel.inference.engine import Forward, Row
from openbagel.sequence import Text

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

torch.set_num_threads(1)

def run(folder, offload=None):
    bagel = Bagel.load(folder, device="cpu", dtype=torch.float32, offload=offload)
    bagel.engine.step([Forward((Row(Context(bagel.config.llm), (Text((1, 2, 3)),), keep=True),))])

def taken(offload):
    before, seen, done = anonymous(), [], threading.Event()
    def watch():
        while not done.wait(0.001):
            seen.append(anonymous() - before)
    thread = threading.Thread(target=watch)
    thread.start()
    run(sys.argv[2], offload)
    done.set()
    thread.join()
    return max(seen)

run(sys.argv[1])
print(json.dumps({"blocks": taken("blocks"), "": taken(None)}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_streaming_takes_little_memory(tmp_path: Path) -> None:
    """Of weights cast to float32 from a bfloat16 file: all, or what lies beside the blocks and one."""
    llm = replace(tiny.config().llm, hidden_size=256, intermediate_size=2048, num_hidden_layers=16)
    config = replace(tiny.config(), llm=llm)
    model = BagelModel(config)
    save_checkpoint(tmp_path / "small", tiny.checkpoint())
    save_checkpoint(tmp_path / "large", Checkpoint(config, model, None, tiny.codec()), dtype=torch.bfloat16)
    command = [sys.executable, "-c", SCRIPT, *(str(tmp_path / name) for name in ("small", "large"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout)
    told = weights_of(config, "float32")
    whole = told.whole - told.visitors[1]
    assert whole > 1e8
    assert taken[""] == pytest.approx(whole, rel=0.10)
    assert taken["blocks"] < 1.25 * (told.resident + told.block) + told.visitors[0] < 0.3 * whole


# plans ------------------------------------------------------------------------------------------------------


def planned(precision: str, **memory: int) -> Plan:
    return plan(bagel_7b(), precision, {name: size * GB for name, size in memory.items()}, USAGE)


def test_plans_for_7b() -> None:
    """2x16 GB, 24+12 GB, 80 GB, and one card with host memory."""
    one = planned("bfloat16", a=80)
    assert one == Plan(("a",), ("a",) * 28)
    even = planned("int8", a=16, b=16)
    assert not even.streamed
    assert (even.blocks.count("a"), even.blocks.count("b")) == (11, 17)
    assert even.blocks == ("a",) * 11 + ("b",) * 17  # each device's blocks are neighbours
    uneven = planned("int8", a=24, b=12)
    assert uneven.blocks.count("a") > uneven.blocks.count("b") > 0
    tight = planned("bfloat16", a=16, b=16, cpu=64)
    assert 0 < len(tight.streamed) < 8
    assert {tight.blocks[i] for i in tight.streamed} == {"a"}
    small = planned("bfloat16", a=12, cpu=64)
    assert 15 < len(small.streamed) < 28
    gaps = {b - a for a, b in zip(sorted(small.streamed), sorted(small.streamed)[1:], strict=False)}
    assert gaps == {1, 2}  # spread evenly, so that a copy has more than one block's time


@pytest.mark.parametrize(
    "memory", [{"a": 16, "b": 16}, {"a": 24, "b": 12}, {"a": 30}, {"a": 12, "b": 8, "c": 8}]
)
@pytest.mark.parametrize("precision", ["bfloat16", "int8", "nf4"])
def test_plans_keep_their_promise(memory: dict[str, int], precision: str) -> None:
    """No device holds more than it has, whatever the plan."""
    found, told = planned(precision, **memory), weights_of(bagel_7b(), precision)
    cache = USAGE.kv_cache // told.count
    for name, size in memory.items():
        mine = [i for i, place in enumerate(found.blocks) if place == name]
        resident = [i for i in mine if i not in found.streamed]
        held = len(resident) * told.block + len(mine) * cache
        if name == "a":
            beside = told.resident + (2 * told.block if found.streamed else sum(told.visitors))
            held += beside + max(USAGE.activations, 0 if found.streamed else USAGE.autoencoder)
        else:
            held += USAGE.activations
        assert held <= size * GB


def test_what_does_not_fit_says_how_much_is_missing() -> None:
    with pytest.raises(ValueError, match=r"bfloat16 does not fit a: 4\.0 GB; [\d.]+ GB are missing; ask for"):
        planned("bfloat16", a=4)
    with pytest.raises(
        ValueError, match=r"does not fit a: 12\.0 GB, cpu: 10\.0 GB; [\d.]+ GB .*quantize='int8'"
    ):
        planned("bfloat16", a=12, cpu=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "block"}, "offload 'block' is none of blocks, sequential; did you mean 'blocks'"),
        ({"offload": "blocks", "max_memory": {"cpu": "1GB"}}, "exclude each other"),
        ({"max_memory": {7: "24GB"}}, "there is no device cuda:7 here, only .*cpu"),
        ({"max_memory": {"cpu": "much"}}, "'much' is no size of memory"),
        ({"max_memory": {"cpu": "2MB"}}, r"does not fit cpu: 2\.0 MB; .* are missing"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bagel.load("nano", dtype=torch.float32, **options)


def test_devices_here() -> None:
    assert devices_here()["cpu"] > 10**8
    assert devices_here({"cpu": 5}) == {"cpu": 5}


# several devices --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [("lazy:0", "lazy:1"), ("lazy:1", "lazy:1")])
def test_tensors_meet_on_the_device_of_their_layer(blocks: tuple[str, ...]) -> None:
    """Fake devices compute nothing, but refuse operands of different ones, as real ones do."""
    config, codec = tiny.config(), tiny.codec()
    tokens = torch.zeros(6, config.latent_channels)
    said = (Text((1, 2, 3)), VitImage(torch.zeros(3, 8, 8)), VaeImage.clean(tokens, (2, 3)))
    drawing = (VaeImage.noised(tokens, (2, 3), 0.5),)
    packs = [tiny.packer().pack([segments] * 2, [start] * 2) for segments, start in ((said, 0), (drawing, 9))]
    with FakeTensorMode() as mode:
        checkpoint = Checkpoint(config, BagelModel(config), None, codec)
        Placement(checkpoint, torch.float32).spread(Plan(("lazy:0", "lazy:1"), blocks))
        given = iter([faked(pack, mode) for pack in packs])
        packer = cast(Packer, SimpleNamespace(pack=lambda *_: next(given)))
        engine = Engine(checkpoint.model, packer)
        assert engine.device == torch.device("lazy:0")
        contexts = [Context(config.llm), Context(config.llm)]
        engine.step([Forward(tuple(Row(c, said, keep=True) for c in contexts))])
        twin = contexts[0].fork()
        (result, _) = engine.step(
            [Forward(tuple(Row(c, drawing, read=Read.VELOCITY) for c in (contexts[0], twin)))]
        )[0]
        assert result.output is not None
        assert result.output.device == torch.device("lazy:0")
        storage = contexts[0]._storage
        assert storage is not None
        assert [str(layer.device) for layer in storage.layers if layer is not None] == list(blocks)


def faked(pack: PackedSequence, mode: FakeTensorMode) -> PackedSequence:
    values = {f.name: getattr(pack, f.name) for f in fields(pack)}
    return replace(pack, **{k: mode.from_tensor(v) for k, v in values.items() if isinstance(v, Tensor)})


def test_plans_hold_what_requests_take() -> None:
    """The room that is left is that of the largest request at the model's own size."""
    config = tiny.config()
    usage = rehearse(config, Work("edit", config.settings.size), torch.float32)
    told = weights_of(config, "float32")
    peak = told.peak("device", usage)
    assert not plan(config, "float32", {"cpu": peak + told.count * 64}, usage).streamed
    assert plan(config, "float32", {"cpu": peak - told.block // 2}, usage).streamed
