"""A sample is a list of segments; one builder packs samples for training and for inference.

Everything a forward needs (token ids, patches, latents, position ids, who owns which token, what sees what,
where the losses are) is derived here from the segments, so what is trained is what is run.

Shapes: T tokens of a pack, U of them owned by the understanding expert, G by the generation expert; V ViT
patches; C channels of a latent token; P values of a ViT patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from openbagel.config import BagelConfig
from openbagel.images import grid_position_ids, patchify
from openbagel.tokens import TextCodec


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids, put between the start and end markers unless bare.

    With loss every id and the end marker are predicted from what stands before them.
    """

    ids: tuple[int, ...]
    loss: bool = False
    bare: bool = False


@dataclass(frozen=True, slots=True)
class VitImage:
    """A picture the model looks at: float[3, H, W] in [-1, 1], sides multiples of the patch. None: dropped
    condition.
    """

    pixels: Tensor | None


@dataclass(frozen=True, slots=True)
class Frame:
    """Latent tokens float[h·w, C] of one picture on a grid (h, w), as the model shall see them (noised or
    clean).
    """

    tokens: Tensor
    grid: tuple[int, int]
    target: Tensor | None = None
    """The velocity float[h·w, C] to be learned, or None."""
    position_step: int = 0
    """Positions from this frame to the next of its group."""


@dataclass(frozen=True, slots=True)
class VaeImage:
    """A picture in the autoencoder's latents, or several frames that form one group, at one time t (0:
    clean).

    hidden: invisible to every other split, as a single noised target is. A group of frames is never hidden:
    later groups see its noisy tokens. No frames: a dropped condition, which still takes its position.
    """

    frames: tuple[Frame, ...]
    t: float = 0.0
    hidden: bool = False

    @classmethod
    def clean(cls, tokens: Tensor, grid: tuple[int, int]) -> "VaeImage":
        return cls((Frame(tokens, grid),))

    @classmethod
    def noised(
        cls, tokens: Tensor, grid: tuple[int, int], t: float, target: Tensor | None = None
    ) -> "VaeImage":
        return cls((Frame(tokens, grid, target),), t, hidden=True)


Segment = Text | VitImage | VaeImage


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one split, in attention order: [start, start + length) of the pack."""

    start: int
    length: int
    causal: bool
    hidden: bool


@dataclass(frozen=True, slots=True, eq=False)
class PackedSequence:
    """A pack. Tokens are stored as [understanding | generation]::

        logical    sample 0: [s a b e][S v v E]      sample 1: [s c e][S g g g E][S h h h E]
        stored     s a b e S v v E s c e S E S E  |  g g g h h h
                   └─ understanding expert ─────┘    └ generation expert

    so an expert's work is one slice. `attention_order` brings stored tokens into sample-by-sample,
    split-by-split order (None: they already are, as when one sample draws or writes); hidden splits come
    last in their sample, so that what a split sees is one run of tokens plus itself.
    """

    num_und: int
    text_ids: Tensor
    """int64[texts]: ids of the text and marker tokens."""
    text_places: Tensor
    """int64[texts]: their places among the stored tokens, all below num_und."""
    patches: Tensor
    """float[V, P]: pixels of the ViT patches."""
    patch_position_ids: Tensor
    """int64[V]: rows of the ViT position tables."""
    patch_counts: tuple[int, ...]
    """Patches of each looked-at picture."""
    patch_places: Tensor
    """int64[V]: their places among the stored tokens, all below num_und."""
    latents: Tensor
    """float[G, C]: latent tokens as the model sees them, stored at num_und …"""
    latent_position_ids: Tensor
    """int64[G]: rows of the latent position table."""
    latent_frames: Tensor
    """int64[G]: the frame of each latent token."""
    times: Tensor
    """float32[frames]: the time t of each frame."""
    position_ids: Tensor
    """int64[T]: rotary positions, stored order."""
    logical: Tensor
    """int64[T]: place of each stored token in the plain concatenation of the samples, markers around their
    picture.
    """
    attention_order: Tensor | None
    spans: tuple[tuple[Span, ...], ...]
    """Per sample, its splits in logical order."""
    sample: Tensor
    """int64[T], as split, order, full and hidden: the facts of the attention rule, stored order."""
    split: Tensor
    order: Tensor
    full: Tensor
    hidden: Tensor
    label_places: Tensor
    """int64[L]: stored places whose next token is predicted."""
    labels: Tensor
    """int64[L]"""
    label_weights: Tensor
    """float32[L]: 1/√(labels of the segment), for the optional re-weighting."""
    target_places: Tensor
    """int64[M]: places among the G latent tokens whose velocity is learned."""
    targets: Tensor
    """float[M, C]"""
    next_positions: tuple[int, ...]
    """Per sample, the rotary position after it."""

    def __len__(self) -> int:
        return len(self.position_ids)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample."""
        return tuple(sum(span.length for span in spans) for spans in self.spans)

    def to(self, device: torch.device | str) -> "PackedSequence":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in moved.items() if isinstance(v, Tensor)})


class Packer:
    """Builds packs for one model; holds nothing that changes.

    marker_loss also teaches when to write and when to draw: the last marker of what came before predicts the
    first marker of each learned segment, and that of the last segment predicts the end of the text.
    """

    def __init__(self, config: BagelConfig, codec: TextCodec, *, marker_loss: bool = False) -> None:
        if marker_loss and codec.end_of_text is None:
            raise ValueError("marker loss needs <|endoftext|> in the vocabulary; add it to the tokenizer")
        self.config = config
        self.codec = codec
        self.marker_loss = marker_loss

    def pack(
        self, samples: Sequence[Sequence[Segment]], starts: Sequence[int] | None = None
    ) -> PackedSequence:
        """Packs samples; starts are their first rotary positions (default 0), as a conversation that goes on
        needs.
        """
        draft = _Draft(self.config, self.codec)
        for index, segments in enumerate(samples):
            draft.add_sample(segments, starts[index] if starts else 0)
            if self.marker_loss:
                draft.learn_markers(segments)
        return draft.finish()


class _Draft:
    """Tokens in logical order, as columns that grow."""

    def __init__(self, config: BagelConfig, codec: TextCodec) -> None:
        self.config, self.codec = config, codec
        self.ids: list[int] = []  # a text id, or one of the two placeholders below
        self.position: list[int] = []
        self.sample: list[int] = []
        self.split: list[int] = []
        self.splits: list[tuple[int, int, bool, bool]] = []  # (first logical token, length, causal, hidden)
        self.first_split: list[int] = []
        self.patches: list[Tensor] = []
        self.patch_ids: list[Tensor] = []
        self.latents: list[Frame] = []
        self.latent_ids: list[Tensor] = []
        self.times: list[float] = []
        self.labels: list[tuple[int, int, float]] = []  # (logical place, id, weight)
        self.next_positions: list[int] = []

    PATCH, LATENT = -1, -2

    def add_sample(self, segments: Sequence[Segment], position: int) -> None:
        self.first_split.append(len(self.splits))
        for segment in segments:
            match segment:
                case Text():
                    position = self._add_text(segment, position)
                case VitImage():
                    position = self._add_vit_image(segment, position)
                case VaeImage():
                    position = self._add_vae_image(segment, position)
        self.next_positions.append(position)

    def learn_markers(self, segments: Sequence[Segment]) -> None:
        """Labels at the ends of the last sample's visible splits: what the model begins next."""
        end_of_text = self.codec.end_of_text
        assert end_of_text is not None
        present = [segment for segment in segments if not _is_empty(segment)]
        before: int | None = None  # the last marker of what came before, while it predicts nothing yet
        learned = False
        for segment, split in zip(present, self.splits[self.first_split[-1] :], strict=True):
            first, length, _, hidden = split
            learned = _is_learned(segment)
            if learned and before is not None:
                self.labels.append((before, self.ids[first], 1.0))
                before = None
            if not hidden:
                before = first + length - 1
        if learned and before is not None:
            self.labels.append((before, end_of_text, 1.0))

    def _add_text(self, text: Text, position: int) -> int:
        ids = list(text.ids) if text.bare else [self.codec.start, *text.ids, self.codec.end]
        if not ids:
            return position
        first = len(self.ids)
        self._add_split(ids, range(position, position + len(ids)), causal=True, hidden=False)
        if text.loss and len(ids) > 1:
            weight = (len(ids) - 1) ** -0.5
            self.labels += [(first + i, label, weight) for i, label in enumerate(ids[1:])]
        return position + len(ids)

    def _add_vit_image(self, image: VitImage, position: int) -> int:
        if image.pixels is None:
            return position + 1
        assert self.config.vit is not None, "this model has no ViT"
        patch = self.config.vit.patch_size
        _, height, width = image.pixels.shape
        grid = (height // patch, width // patch)
        side, stretch = self.config.vit_max_num_patch_per_side, self.config.interpolate_pos
        self.patches.append(patchify(image.pixels, patch))
        self.patch_ids.append(grid_position_ids(grid, side, stretch))
        ids = self._framed(self.PATCH, grid)
        self._add_split(ids, [position] * len(ids), causal=False, hidden=False)
        return position + 1

    def _add_vae_image(self, image: VaeImage, position: int) -> int:
        ids: list[int] = []
        positions: list[int] = []
        for frame in image.frames:
            side, stretch = self.config.max_latent_size, self.config.interpolate_pos
            self.latents.append(frame)
            self.latent_ids.append(grid_position_ids(frame.grid, side, stretch))
            self.times.append(image.t)
            framed = self._framed(self.LATENT, frame.grid)
            ids += framed
            positions += [position] * len(framed)
            position += frame.position_step
        if ids:
            self._add_split(ids, positions, causal=False, hidden=image.hidden)
        return position if image.hidden or _is_learned(image) else position + 1

    def _framed(self, placeholder: int, grid: tuple[int, int]) -> list[int]:
        return [self.codec.vision_start, *[placeholder] * (grid[0] * grid[1]), self.codec.vision_end]

    def _add_split(self, ids: list[int], positions: Sequence[int], *, causal: bool, hidden: bool) -> None:
        self.splits.append((len(self.ids), len(ids), causal, hidden))
        self.ids += ids
        self.position += positions
        self.sample += [len(self.first_split) - 1] * len(ids)
        self.split += [len(self.splits) - 1] * len(ids)

    def finish(self) -> PackedSequence:
        ids = torch.tensor(self.ids, dtype=torch.int64)
        is_gen = ids == self.LATENT
        logical = torch.argsort(is_gen.long(), stable=True)  # stored place -> logical place
        place = torch.argsort(logical)  # logical place -> stored place
        split = torch.tensor(self.split, dtype=torch.int64)[logical]
        causal, hidden = (torch.tensor([s[i] for s in self.splits], dtype=torch.bool) for i in (2, 3))
        attention_order, spans = self._attention_layout(logical, split, hidden)
        num_und = int((~is_gen).sum())
        labels = list(zip(*self.labels, strict=True)) if self.labels else [(), (), ()]
        learned = torch.tensor([f.target is not None for f in self.latents], dtype=torch.bool)
        counts = torch.tensor([len(frame.tokens) for frame in self.latents], dtype=torch.int64)
        frames = torch.arange(len(counts)).repeat_interleave(counts)
        targets = [frame.target for frame in self.latents if frame.target is not None]
        channels = self.config.latent_channels
        patch_values = 3 * (self.config.vit.patch_size if self.config.vit else 0) ** 2
        return PackedSequence(
            num_und=num_und,
            text_ids=ids[ids >= 0],
            text_places=place[ids >= 0],
            patches=torch.cat(self.patches) if self.patches else torch.empty(0, patch_values),
            patch_position_ids=_joined(self.patch_ids),
            patch_counts=tuple(len(p) for p in self.patches),
            patch_places=place[ids == self.PATCH],
            latents=torch.cat([f.tokens for f in self.latents]) if self.latents else torch.empty(0, channels),
            latent_position_ids=_joined(self.latent_ids),
            latent_frames=frames,
            times=torch.tensor(self.times, dtype=torch.float32),
            position_ids=torch.tensor(self.position, dtype=torch.int64)[logical],
            logical=logical,
            attention_order=attention_order,
            spans=spans,
            sample=torch.tensor(self.sample, dtype=torch.int64)[logical],
            split=split,
            order=logical,
            full=~causal[split],
            hidden=hidden[split],
            label_places=place[torch.tensor(labels[0], dtype=torch.int64)],
            labels=torch.tensor(labels[1], dtype=torch.int64),
            label_weights=torch.tensor(labels[2], dtype=torch.float32),
            target_places=learned[frames].nonzero().flatten(),
            targets=torch.cat(targets) if targets else torch.empty(0, channels),
            next_positions=tuple(self.next_positions),
        )

    def _attention_layout(
        self, logical: Tensor, split: Tensor, hidden: Tensor
    ) -> tuple[Tensor | None, tuple[tuple[Span, ...], ...]]:
        """Orders splits sample by sample with the hidden ones last; inside a split tokens keep their stored
        order.
        """
        ranked: list[int] = []
        bounds = [*self.first_split, len(self.splits)]
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):
            ranked += sorted(range(first, last), key=lambda s: bool(hidden[s]))
        rank = torch.empty(len(ranked), dtype=torch.int64)
        rank[torch.tensor(ranked, dtype=torch.int64)] = torch.arange(len(ranked))
        order = torch.argsort(rank[split], stable=True)
        starts, start = {}, 0
        for s in ranked:
            starts[s] = start
            start += self.splits[s][1]
        spans = tuple(
            tuple(Span(starts[s], *self.splits[s][1:]) for s in range(first, last))
            for first, last in zip(bounds[:-1], bounds[1:], strict=True)
        )
        identity = bool((order == torch.arange(len(order))).all())
        return (None if identity else order), spans


def _is_empty(segment: Segment) -> bool:
    """Whether it makes no split: a dropped condition, or a bare text without ids."""
    match segment:
        case Text():
            return segment.bare and not segment.ids
        case VitImage():
            return segment.pixels is None
        case VaeImage():
            return not segment.frames


def _is_learned(segment: Segment) -> bool:
    match segment:
        case Text():
            return segment.loss
        case VitImage():
            return False
        case VaeImage():
            return any(frame.target is not None for frame in segment.frames)


def _joined(ids: list[Tensor]) -> Tensor:
    return torch.cat(ids) if ids else torch.empty(0, dtype=torch.int64)
