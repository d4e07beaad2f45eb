"""Positions, places and losses of packs, on examples written out by hand."""

from dataclasses import fields

import pytest
import torch
from tokenizers import Tokenizer, models
from torch import Tensor

from openbagel.sequence import Frame, PackedSequence, Packer, Segment, Text, VaeImage, VitImage
from openbagel.tokens import TextCodec
from tests import tiny

CHANNELS = tiny.config().latent_channels
WORDS = Text((5, 6, 7))


def latent(count: int = 2) -> Tensor:
    return torch.arange(float(count * CHANNELS)).view(count, CHANNELS)


def picture(width: int = 2) -> VitImage:
    """A ViT picture of one row of patches."""
    return VitImage(torch.zeros(3, tiny.VIT.patch_size, width * tiny.VIT.patch_size))


def pack(*segments: Segment) -> PackedSequence:
    return tiny.packer().pack([segments])


def positions(*segments: Segment) -> list[int]:
    """Rotary positions in reading order."""
    p = pack(*segments)
    return tiny.in_order(p, p.position_ids).tolist()


NOISED = VaeImage.noised(latent(), (1, 2), 0.5, target=latent())
CLEAN = VaeImage.clean(latent(), (1, 2))


def frames(*steps: int, learned: bool) -> VaeImage:
    target = latent() if learned else None
    return VaeImage(tuple(Frame(latent(), (1, 2), target, step) for step in steps), 0.5 if learned else 0.0)


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ([WORDS, WORDS], [*range(5), *range(5, 10)]),
        ([Text((5, 6), bare=True), WORDS], [0, 1, 2, 3, 4, 5, 6]),
        ([NOISED, CLEAN, picture(), Text(())], [0] * 4 + [0] * 4 + [1] * 4 + [2, 3]),
        ([WORDS, NOISED, Text(())], [*range(5)] + [5] * 4 + [5, 6]),
        ([picture(), CLEAN, picture(3)], [0] * 4 + [1] * 4 + [2] * 5),
        ([frames(4, 4, 0, learned=True), Text(())], [0] * 4 + [4] * 4 + [8] * 4 + [8, 9]),
        ([frames(2, 0, learned=False), Text(())], [0] * 4 + [2] * 4 + [3, 4]),
        ([VitImage(None), VaeImage(()), Text(())], [2, 3]),
    ],
    ids=["texts", "bare", "target", "noised", "conditions", "learned frames", "clean frames", "dropped"],
)
def test_positions(segments: list[Segment], expected: list[int]) -> None:
    assert positions(*segments) == expected


@pytest.mark.parametrize(
    ("segments", "expected"),
    [([WORDS], 15), ([picture()], 11), ([CLEAN], 11), ([NOISED], 10), ([VitImage(None)], 11), ([], 10)],
)
def test_conversations_go_on(segments: list[Segment], expected: int) -> None:
    p = tiny.packer().pack([segments, [WORDS]], starts=[10, 3])
    assert p.next_positions == (expected, 8)
    assert set(p.position_ids[p.sample == 1].tolist()) == {3, 4, 5, 6, 7}
    assert all(position >= 10 for position in p.position_ids[p.sample == 0].tolist())


def test_markers_belong_to_understanding_and_latents_to_generation() -> None:
    c = tiny.codec()
    p = pack(WORDS, CLEAN, picture())
    logical_ids = [c.start, 5, 6, 7, c.end, c.vision_start, c.vision_end, c.vision_start, c.vision_end]
    assert p.text_ids.tolist() == logical_ids
    assert p.logical[p.text_places].tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 12]
    assert p.logical[p.patch_places].tolist() == [10, 11]
    assert p.logical[p.num_und :].tolist() == [6, 7]
    assert len(p.text_places) + len(p.patch_places) == p.num_und == len(p) - 2


def test_labels_are_the_next_ids() -> None:
    c = tiny.codec()
    p = pack(WORDS, Text((8, 9), loss=True), CLEAN, Text((4,), loss=True))
    assert p.labels.tolist() == [8, 9, c.end, 4, c.end]
    assert p.logical[p.label_places].tolist() == [5, 6, 7, 13, 14]
    torch.testing.assert_close(p.label_weights, torch.tensor([3**-0.5] * 3 + [2**-0.5] * 2))


def test_bare_texts_predict_all_but_their_first_id() -> None:
    p = pack(Text((5, 6, 7), bare=True, loss=True), Text((8,), bare=True, loss=True))
    assert (p.labels.tolist(), p.label_places.tolist()) == ([6, 7], [0, 1])


def test_targets_and_times() -> None:
    p = pack(CLEAN, NOISED, frames(1, 0, learned=True))
    assert p.target_places.tolist() == [2, 3, 4, 5, 6, 7]
    assert torch.equal(p.targets, latent().repeat(3, 1))
    assert p.times.tolist() == [0.0, 0.5, 0.5, 0.5]
    assert p.latent_frames.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_no_losses_without_targets() -> None:
    p = pack(WORDS, CLEAN, picture())
    assert len(p.labels) == len(p.label_places) == len(p.targets) == len(p.target_places) == 0


def test_grids_beyond_the_table_are_refused() -> None:
    side = tiny.config().max_latent_size + 1
    with pytest.raises(ValueError, match=f"1x{side} patches does not fit the 8x8 position table"):
        pack(VaeImage.clean(latent(side), (1, side)))


@pytest.mark.parametrize("segments", [[WORDS], [CLEAN], [NOISED], [picture()], [WORDS, picture(), WORDS]])
def test_inference_over_one_sample_gathers_nothing(segments: list[Segment]) -> None:
    assert pack(*segments).attention_order is None


def test_attention_order_puts_hidden_splits_last() -> None:
    p = pack(WORDS, NOISED, CLEAN, WORDS)
    assert p.attention_order is not None
    hidden = p.hidden[p.attention_order].tolist()
    assert hidden == sorted(hidden)
    assert sum(hidden) == 4
    starts = [span.start for span in p.spans[0]]
    assert starts == [0, 14, 5, 9]


@pytest.mark.parametrize("seed", range(6))
def test_packed_samples_equal_single_ones(seed: int) -> None:
    samples, model = tiny.samples(seed), tiny.model()
    together = tiny.packer().pack(samples)
    with torch.inference_mode():
        hidden = tiny.in_order(together, model(together)).split(list(together.lengths))
        for states, sample in zip(hidden, samples, strict=True):
            if not len(states):
                continue
            alone = tiny.packer().pack([sample])
            torch.testing.assert_close(states, tiny.in_order(alone, model(alone)), rtol=1e-4, atol=1e-4)


def test_to_moves_every_tensor() -> None:
    p = pack(WORDS, NOISED, CLEAN, picture())
    moved = p.to("meta")
    for field in fields(p):
        before, after = getattr(p, field.name), getattr(moved, field.name)
        if isinstance(before, Tensor):
            assert after.is_meta, field.name
            assert (after.shape, after.dtype) == (before.shape, before.dtype)
        else:
            assert after == before


# marker loss ------------------------------------------------------------------------------------------------


def marked(samples: list[list[Segment]]) -> list[list[tuple[str, str]]]:
    """Per sample, the labels that marker loss adds: (marker that predicts, marker predicted)."""
    names = {
        getattr(tiny.codec(), n): n for n in ("start", "end", "vision_start", "vision_end", "end_of_text")
    }
    plain = Packer(tiny.config(), tiny.codec()).pack(samples)
    pack = Packer(tiny.config(), tiny.codec(), marker_loss=True).pack(samples)
    ids = torch.full((len(pack),), -1)
    ids[pack.text_places] = pack.text_ids
    known = set(zip(plain.label_places.tolist(), plain.labels.tolist(), strict=True))
    found: list[list[tuple[str, str]]] = [[] for _ in samples]
    for place, label in zip(pack.label_places.tolist(), pack.labels.tolist(), strict=True):
        if (place, label) not in known:
            found[int(pack.sample[place])].append((names[int(ids[place])], names[label]))
    assert len(pack.labels) == len(plain.labels) + sum(map(len, found))
    return found


def test_marker_loss_needs_an_end_of_text() -> None:
    with pytest.raises(ValueError, match="<|endoftext|>"):
        Packer(tiny.config(), TextCodec.of(Tokenizer(models.BPE())), marker_loss=True)


def test_marker_loss_teaches_when_to_write_to_draw_and_to_end() -> None:
    prompt, answer = Text((5, 6)), Text((7,), loss=True)
    target = VaeImage.noised(torch.zeros(4, 16), (2, 2), 0.5, torch.zeros(4, 16))
    clean, look = VaeImage.clean(torch.zeros(4, 16), (2, 2)), VitImage(torch.zeros(3, 8, 8))
    samples: list[list[Segment]] = [
        [prompt, answer],  # writes, then ends
        [prompt, target, target],  # draws: two noised copies are one decision, which nothing visible follows
        [prompt, answer, target, clean, look, answer],  # thinks, draws, and speaks of what it drew
        [prompt, look],  # nothing is learned
        [
            prompt,
            VaeImage(()),
            VitImage(None),
            Text((), bare=True),
            answer,
        ],  # dropped conditions make no split
    ]
    assert marked(samples) == [
        [("end", "start"), ("end", "end_of_text")],
        [("end", "vision_start")],
        [("end", "start"), ("end", "vision_start"), ("vision_end", "start"), ("end", "end_of_text")],
        [],
        [("end", "start"), ("end", "end_of_text")],
    ]
