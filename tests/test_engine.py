"""Requests that share one model: alone, in turns, packed, cancelled; guidance branches and TaylorSeer."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from openbagel.config import Sampling
from openbagel.flow import OFFICIAL_APP, Guidance
from openbagel.inference import events
from openbagel.inference.accelerate import TaylorSeer
from openbagel.inference.context import Context
from openbagel.inference.engine import Engine, Forward, Read, Request, Result, Row, advance, in_pieces
from openbagel.inference.image import Branches, denoise, draw_noise
from openbagel.inference.text import write
from openbagel.sequence import Segment, Text, VaeImage
from tests import tiny

T = TypeVar("T")
GRID = (2, 3)
CHANNELS = tiny.config().latent_channels
PROMPT: list[Segment] = [Text((5, 6, 7))]
PICTURE: list[Segment] = [VaeImage.clean(torch.ones(4, CHANNELS), (2, 2))]
FAST = tiny.SAMPLING


@pytest.fixture
def engine() -> Engine:
    return Engine(tiny.model(), tiny.packer())


def draw(
    *parts: list[Segment], sampling: Sampling = FAST, grid: tuple[int, int] = GRID, seed: int = 0
) -> Request[Tensor]:
    noise = draw_noise(grid, CHANNELS, torch.Generator().manual_seed(seed))
    branches = Branches.of(Context(tiny.config().llm))
    yield from branches.hear(parts)
    return (yield from denoise(branches, noise, grid, sampling, torch.Generator().manual_seed(seed)))


def say(*parts: list[Segment], temperature: float = 0.0) -> Request[tuple[int, ...]]:
    context = Context(tiny.config().llm)
    yield Forward((Row(context, tuple(s for part in parts for s in part), keep=True),))
    sampling, generator = replace(FAST, temperature=temperature), torch.Generator().manual_seed(3)
    return (yield from write(context, tiny.codec(), sampling=sampling, max_tokens=8, generator=generator))


def in_turns(engine: Engine, requests: list[Request[Any]]) -> list[Any]:
    """Each request makes one step on the same model, then the next one does."""
    answers: dict[int, Any] = {}
    inbox: dict[int, tuple[Result, ...] | None] = dict.fromkeys(range(len(requests)))
    while inbox:
        for number, results in list(inbox.items()):
            try:
                inbox[number] = engine.step([advance(requests[number], results)])[0]
            except StopIteration as stop:
                answers[number] = stop.value
                del inbox[number]
    return [answers[number] for number in range(len(requests))]


def row_by_row(engine: Engine, request: Request[T]) -> T:
    """Every branch in a forward of its own, so that sharing one leaves the others' rounding alone."""
    results: tuple[Result, ...] | None = None
    while True:
        try:
            forward = advance(request, results)
        except StopIteration as stop:
            return stop.value
        results = tuple(result for row in forward.rows for result in engine.step([Forward((row,))])[0])


def close(ours: Tensor, expected: Tensor) -> bool:
    return bool(torch.linalg.vector_norm(ours - expected) <= 1e-4 * torch.linalg.vector_norm(expected))


def mixed_requests() -> list[Request[Any]]:
    seer = replace(FAST, num_timesteps=14, taylorseer=True)
    return [
        draw(PROMPT, sampling=seer),
        say(PICTURE, PROMPT),
        draw(PICTURE, PROMPT, sampling=replace(FAST, guidance=Guidance(text=3.0, image=2.0)), grid=(1, 4)),
        draw(PROMPT, sampling=replace(FAST, num_timesteps=9), seed=1),
        say(PROMPT, temperature=1.5),
        draw(PROMPT, PROMPT, sampling=replace(seer, num_timesteps=12), grid=(3, 1), seed=2),
        draw(PICTURE, PROMPT, sampling=replace(FAST, eta=0.7), seed=3),
    ]


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_taking_turns_changes_no_bit(engine: Engine) -> None:
    alone = [engine.drive(request) for request in mixed_requests()]
    together = in_turns(engine, mixed_requests())
    assert all(equal(a, b) for a, b in zip(alone, together, strict=True))


def test_packing_together_changes_rounding_only(engine: Engine) -> None:
    alone = [engine.drive(request) for request in mixed_requests()]
    together = engine.drive_all(mixed_requests())
    for a, b in zip(alone, together, strict=True):
        assert close(b, a) if isinstance(a, Tensor) else a == b


def test_noise_on_the_way_is_the_generators(engine: Engine) -> None:
    """From one noise: the seed decides, the first step's velocity is the same, and the last adds no noise."""
    stochastic = replace(FAST, eta=1.0)
    first, again, other = (engine.drive(draw(PROMPT, sampling=stochastic, seed=seed)) for seed in (4, 4, 5))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    two = replace(FAST, num_timesteps=2)
    ways = [engine.drive(draw(PROMPT, sampling=replace(two, eta=eta))) for eta in (0.0, 1.0)]
    torch.testing.assert_close(*ways)


def test_long_texts_are_taken_in_piece_by_piece(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same past as in one pass; pictures are not cut, and what is read comes after the last piece."""
    codec, ids = tiny.codec(), tuple(range(5, 16))
    marked = (codec.start, *ids, codec.end)
    once, again = (Branches.of(Context(tiny.config().llm)) for _ in range(2))
    expected = engine.drive(once.hear([PICTURE, [Text(ids)]], Read.LOGITS))
    monkeypatch.setattr("openbagel.inference.engine.PIECE", 4)
    pieces: list[Segment] = [*in_pieces(marked)]
    assert [len(piece.ids) for piece in in_pieces(marked)] == [4, 4, 4, 1]
    request, sizes, results = again.hear([PICTURE, pieces], Read.LOGITS), list[int](), None
    with pytest.raises(StopIteration) as end:
        while True:
            forward = advance(request, results)
            assert not forward.is_light or forward.size == 2
            sizes.append(forward.size)
            (results,) = engine.step([forward])
    output = end.value.value
    assert sizes == [4, *(2 * len(piece.ids) for piece in in_pieces(marked))]  # cond and image hear texts
    assert output is not None and expected is not None and close(output, expected)
    for one, other in ((once.cond, again.cond), (once.text, again.text), (once.image, again.image)):
        assert (len(one), one.position) == (len(other), other.position)


def test_results_come_in_the_order_of_rows(engine: Engine) -> None:
    contexts = [Context(tiny.config().llm) for _ in range(3)]
    noised = VaeImage.noised(torch.ones(6, CHANNELS), GRID, 0.5)
    rows = [
        Row(contexts[0], (noised,), read=Read.VELOCITY),
        Row(contexts[1], (Text((5, 6)),), read=Read.LOGITS),
        Row(contexts[2], (Text((7,)),), keep=True),
    ]
    first, second = engine.step([Forward(tuple(rows[:2])), Forward((rows[2],))])
    velocity, logits = first
    assert velocity.output is not None and logits.output is not None
    assert velocity.output.shape == (6, CHANNELS)
    assert logits.output.shape == (len(tiny.codec()),)
    assert second[0].output is None
    assert [len(context) for context in contexts] == [0, 0, 3]


def test_hidden_splits_are_never_kept(engine: Engine) -> None:
    noised = VaeImage.noised(torch.ones(6, CHANNELS), GRID, 0.5)
    kept, plain = (Context(tiny.config().llm) for _ in range(2))
    engine.step([Forward((Row(kept, (*PROMPT, noised, *PROMPT), keep=True),))])
    engine.step([Forward((Row(plain, (*PROMPT, *PROMPT), keep=True),))])
    assert (len(kept), kept.position) == (len(plain), plain.position) == (10, 10)
    ours, expected = (
        engine.step([Forward((Row(c, (Text((9,)),), read=Read.LOGITS),))])[0][0].output for c in (kept, plain)
    )
    assert ours is not None and expected is not None
    assert close(ours, expected)


def test_closing_a_request_cancels_it(engine: Engine) -> None:
    stream = engine.stream(draw(PROMPT))
    assert isinstance(next(stream), events.Preview)
    passes = engine.passes
    assert isinstance(stream, Iterator)
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert next(stream, None) is None
    assert engine.passes == passes


def test_a_cancelled_request_disturbs_nobody(engine: Engine) -> None:
    context = Context(tiny.config().llm)
    engine.step([Forward((Row(context, tuple(PROMPT), keep=True),))])
    twin = context.fork()
    writing = write(
        twin, tiny.codec(), sampling=FAST, max_tokens=5, generator=torch.Generator(), thinking=False
    )
    engine.step([advance(writing, None)])
    writing.close()
    read = Forward((Row(context, (Text((9,), bare=True),), read=Read.LOGITS),))
    fresh = Context(tiny.config().llm)
    engine.step([Forward((Row(fresh, tuple(PROMPT), keep=True),))])
    expected = Forward((replace(read.rows[0], context=fresh),))
    ours, theirs = (engine.step([forward])[0][0].output for forward in (read, expected))
    assert ours is not None and theirs is not None
    assert torch.equal(ours, theirs)


def test_events_carry_the_number_of_their_request(engine: Engine) -> None:
    heard: list[tuple[int, int]] = []
    requests = [draw(PROMPT), draw(PROMPT, sampling=replace(FAST, num_timesteps=3))]
    engine.drive_all(
        requests, lambda n, e: heard.append((n, e.step)) if isinstance(e, events.Preview) else None
    )
    assert sorted(heard) == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]


# guidance branches ------------------------------------------------------------------------------------------


def guided(
    engine: Engine, parts: list[list[Segment]], sampling: Sampling, share: bool = True
) -> tuple[Tensor, int]:
    """The latents and the passes that denoising took; share=False makes every branch a stranger."""
    branches = Branches.of(Context(tiny.config().llm))
    row_by_row(engine, branches.hear(parts))
    if not share:
        branches.cond.lineage, branches.text.lineage, branches.image.lineage = "c", "t", "i"
    before = engine.passes
    noise = draw_noise(GRID, CHANNELS, torch.Generator().manual_seed(0))
    latents = row_by_row(engine, denoise(branches, noise, GRID, sampling, torch.Generator()))
    return latents, engine.passes - before


@pytest.mark.parametrize("taylorseer", [False, True])
def test_official_app_takes_90_passes_instead_of_131(engine: Engine, taylorseer: bool) -> None:
    sampling = Sampling(guidance=OFFICIAL_APP, num_timesteps=50, taylorseer=taylorseer)
    latents, passes = guided(engine, [PROMPT], sampling)
    strangers, more_passes = guided(engine, [PROMPT], sampling, share=False)
    assert torch.equal(latents, strangers)
    assert passes < more_passes
    if not taylorseer:
        assert (passes, more_passes) == (90, 131)


def test_three_different_branches_are_all_computed(engine: Engine) -> None:
    sampling = replace(FAST, guidance=Guidance(text=4.0, image=2.0, interval=(0.0, 1.0)))
    latents, passes = guided(engine, [PICTURE, PROMPT], sampling)
    strangers, _ = guided(engine, [PICTURE, PROMPT], sampling, share=False)
    assert torch.equal(latents, strangers)
    assert passes == 3 * 3


@pytest.mark.parametrize(
    ("parts", "guidance", "message"),
    [
        ([PROMPT, PICTURE], Guidance(text=4.0, interval=(0.0, 1.0)), "text guidance has no effect"),
        ([PICTURE, PROMPT], Guidance(text=1.0, image=2.0), "image guidance has no effect"),
    ],
    ids=["picture last", "image alone"],
)
def test_guidance_without_effect_warns_and_costs_nothing(
    engine: Engine, parts: list[list[Segment]], guidance: Guidance, message: str
) -> None:
    with pytest.warns(UserWarning, match=message):
        latents, passes = guided(engine, parts, replace(FAST, guidance=guidance))
    plain, _ = guided(engine, parts, replace(FAST, guidance=Guidance(text=1.0)))
    assert passes == FAST.num_timesteps - 1
    assert close(latents, plain)


def test_branches_see_what_they_should(engine: Engine) -> None:
    """cond: all; text: all but the last text, all of it after a picture; image: the texts alone."""
    other: list[Segment] = [Text((9, 9, 9))]
    branches = Branches.of(Context(tiny.config().llm))
    row_by_row(engine, branches.hear([PROMPT, PICTURE, other, other]))
    text, picture = 5, 6
    assert len(branches.cond) == 3 * text + picture
    assert len(branches.text) == 2 * text + picture
    assert len(branches.image) == 3 * text
    assert (branches.cond.position, branches.image.position) == (3 * text + 1, 3 * text)
    row_by_row(engine, branches.hear([PICTURE]))
    assert branches.text.lineage == branches.cond.lineage
    assert (len(branches.cond), len(branches.image)) == (3 * text + 2 * picture, 3 * text)


# TaylorSeer -------------------------------------------------------------------------------------------------


def test_taylorseer_follows_its_formula() -> None:
    """Full at n = 0-4, 7, 10, …; finite differences from n = 4 on, up to order 6; Taylor sums between."""
    generator = torch.Generator().manual_seed(0)
    seer, factors, last = TaylorSeer(), [], 0
    for n in range(30):
        truth = torch.randn(3, 4, generator=generator)
        forecast = seer.forecast()
        if n <= 4 or n % 3 == 1:
            assert forecast is None, n
            seer.record(truth)
            fresh = [truth]
            for old in factors[:6] if n > 3 else []:
                fresh.append((fresh[-1] - old) / (n - last))
            factors, last = fresh, n
        else:
            assert forecast is not None, n
            expected = sum(f * (n - last) ** i / math.factorial(i) for i, f in enumerate(factors))
            torch.testing.assert_close(forecast, expected)
    assert len(factors) == 7


def test_taylorseer_runs_the_stack_for_full_steps_alone(engine: Engine) -> None:
    sampling = replace(FAST, num_timesteps=24, guidance=Guidance(text=1.0), taylorseer=True)
    _, passes = guided(engine, [PROMPT], sampling)
    assert passes == len([n for n in range(23) if n <= 4 or n % 3 == 1])


def test_taylorseer_counts_each_branch_by_itself(engine: Engine) -> None:
    """A branch that guidance leaves out of some steps does not age in them."""
    late = Guidance(text=4.0, interval=(0.0, 0.6))
    sampling = replace(FAST, num_timesteps=24, timestep_shift=1.0, guidance=late, taylorseer=True)
    _, passes = guided(engine, [PROMPT], sampling)
    guided_steps = sum(late.acts_at(1 - i / 23) for i in range(23))
    full = [len([n for n in range(steps) if n <= 4 or n % 3 == 1]) for steps in (23, guided_steps)]
    assert passes == sum(full)


@pytest.mark.parametrize("broken", ["forward", "logits"])
def test_a_step_that_fails_may_be_made_again(engine: Engine, broken: str, monkeypatch: Any) -> None:
    alone = engine.drive(say(PROMPT, PICTURE, [Text((5, 6))]))
    request, results, failures = say(PROMPT, PICTURE, [Text((5, 6))]), None, 0
    while True:
        try:
            forward = advance(request, results)
        except StopIteration as stop:
            assert stop.value == alone and failures > 3
            return
        with monkeypatch.context() as patch:

            def fail(*_: Any, **__: Any) -> None:
                raise torch.OutOfMemoryError("no memory")

            patch.setattr(engine.model, broken, fail)
            try:
                (results,) = engine.step([forward])
                continue
            except torch.OutOfMemoryError:
                failures += 1
        (results,) = engine.step([forward])


def test_light_forwards_are_tokens_of_texts(engine: Engine) -> None:
    sizes: dict[bool, set[int]] = {True: set(), False: set()}
    for request in (say(PROMPT, PICTURE), draw(PROMPT, sampling=replace(FAST, guidance=Guidance(text=4.0)))):
        results = None
        with contextlib.suppress(StopIteration):
            while True:
                forward = advance(request, results)
                sizes[forward.is_light].add(forward.size)
                (results,) = engine.step([forward])
    assert sizes[True] <= {1, 2} and {7, 6 * 2} <= sizes[False]


def test_a_negative_prompt_takes_the_place_of_no_text() -> None:
    """The text branch of "draw a, not b" is the prompt's branch of "draw b"."""
    bagel, first = tiny.bagel(), []
    guided = replace(tiny.SAMPLING, guidance=Guidance(text=4.0, interval=(0.0, 1.0)))
    for sampling, prompt in ((replace(guided, negative_prompt="b"), "a"), (guided, "b")):
        parts = {"size": None, "seed": 0, "think": False, "sampling": sampling}
        request = bagel.draw_request([prompt], **parts)
        results = None
        while (forward := advance(request, results)).rows[0].read is not Read.VELOCITY:
            (results,) = bagel.engine.step([forward])
        first.append([result.output for result in bagel.engine.step([forward])[0]])
    (not_b, cond_a), (nothing, cond_b) = first
    assert close(not_b, cond_b) and not close(not_b, nothing) and not close(not_b, cond_a)
