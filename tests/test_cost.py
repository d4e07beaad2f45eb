"""What a forward may cost: operations, bytes, passes, synchronisations; all counted, nothing timed."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.counters import (
    OneByOne,
    Operations,
    drawn,
    fork_bytes,
    layer_operations,
    listened,
    operations,
    pass_table,
    separated,
    step_bytes,
    token_bytes,
)
from benchmarks.model import Rig
from openbagel.flow import OFFICIAL_APP, Guidance

LAYER_OPERATIONS = 90
"""Non-view operations of a layer in a pass; the reference takes 140."""
EDIT = Guidance(text=4.0, image=2.0, interval=(0.0, 1.0))
CONTEXTS = (64, 512, 2048)
KERNEL_TILE = 512
"""Keys that one block of the CPU attention kernel handles; its buffer grows up to there, and no further."""


@pytest.fixture(scope="module")
def rig() -> Rig:
    return Rig.of(64, 2)


def test_operations_of_a_layer() -> None:
    one, two = layer_operations(branches=1), layer_operations(branches=2)
    assert one <= LAYER_OPERATIONS
    assert two < 2 * one  # two branches in one pack


def test_passes_of_drawings_and_edits() -> None:
    counted = [(interval, passes, every) for _, interval, passes, every in pass_table(Rig.of(64, 1))]
    app, plain, edit = counted[:2], counted[2:4], counted[4:]
    assert app == [("[0.4, 1.0]", 90, 131), ("[0.0, 1.0]", 98, 147)]
    assert plain == [("[0.4, 1.0]", 90, 90), ("[0.0, 1.0]", 98, 98)]
    assert edit == [("[0.4, 1.0]", 131, 131), ("[0.0, 1.0]", 147, 147)]


def test_a_shared_branch_equals_its_own_pass(rig: Rig) -> None:
    """Bit for bit, where every pass runs alone; the packed drawing agrees up to rounding."""
    alone = replace(rig, engine=OneByOne(rig.engine.model, rig.engine.packer))
    prompt = [rig.text(9)]
    shared, passes = drawn(alone, listened(rig, prompt), OFFICIAL_APP, num_timesteps=8)
    apart, more_passes = drawn(alone, separated(listened(rig, prompt)), OFFICIAL_APP, num_timesteps=8)
    packed, _ = drawn(rig, listened(rig, prompt), OFFICIAL_APP, num_timesteps=8)
    assert passes < more_passes
    assert torch.equal(shared, apart)
    assert torch.allclose(shared, packed, rtol=1e-4, atol=1e-5)


def test_bytes_do_not_grow_with_the_context(rig: Rig) -> None:
    assert [fork_bytes(rig, length) for length in CONTEXTS] == [0, 0, 0]
    for counted in (token_bytes, step_bytes):
        short, tile, long = (counted(rig, length) for length in CONTEXTS)
        assert long == tile
        assert 0 < short <= tile <= 1.25 * short  # the kernel's own buffer, see KERNEL_TILE


def test_a_timestep_is_embedded_once_a_frame(rig: Rig) -> None:
    """Once a step, with one row for each branch's frame, whatever the number of its tokens."""
    calls: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor]) -> None:
        calls.append(len(inputs[0]))

    handle = rig.engine.model.time_embedder.register_forward_pre_hook(count)
    _, passes = drawn(rig, listened(rig, [rig.text(9)]), OFFICIAL_APP, num_timesteps=8, side=4)
    handle.remove()
    assert len(calls) == 7
    assert sum(calls) == passes


def test_the_model_never_asks_for_a_value(rig: Rig) -> None:
    """No operation of a denoising forward makes the host wait; the pack is built before, on the CPU."""
    contexts = rig.context(20), rig.context(12)
    counted = Operations()
    hooks = [
        rig.engine.model.register_forward_pre_hook(lambda *_: counted.__enter__() and None),
        rig.engine.model.register_forward_hook(lambda *_: counted.__exit__(None, None, None)),
    ]
    rig.denoise_once(4, *contexts)
    for hook in hooks:
        hook.remove()
    assert counted.work.total() > 100
    assert counted.syncs == []
    assert operations(lambda: torch.ones(2).sum().item()).syncs  # the counter sees them


def test_drawing_and_writing_need_no_values() -> None:
    """On the meta device nothing can be read back, so what ends there never waited for the device."""
    meta = Rig.of(64, 2, device="meta")
    latents, passes = drawn(
        meta, listened(meta, meta.shown(2), [meta.text(9)]), EDIT, num_timesteps=4, side=4
    )
    assert (latents.device.type, latents.shape, passes) == ("meta", (16, meta.config.latent_channels), 9)
    context, other = meta.context(20), meta.context(12)
    meta.write(context, other)
    assert (len(context), len(other)) == (21, 13)
