"""Draws the figures of how-it-works.md from the package's own objects.

    python -m docs.figures docs/figures

What a figure shows is read from packs, masks, hooks, schedules and contexts; only the layout is decided here.
"""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from docs import canvas
from docs.canvas import WIDTH, Canvas, Point
from docs.subjects import (
    INSTRUCTION,
    PROMPT,
    Spy,
    edit_segments,
    spied_bagel,
    tiny_codec,
    tiny_config,
    tokens_through_modules,
    toy_picture,
    video_segments,
)
from openbagel.attention import visible
from openbagel.config import Sampling
from openbagel.flow import Guidance, Renorm, guide, interpolate, schedule
from openbagel.images import to_picture, to_pixels
from openbagel.inference.context import Context
from openbagel.inference.engine import Forward, Read
from openbagel.sequence import PackedSequence, Packer, Segment, Text, VaeImage, VitImage
from openbagel.tokens import THINK_BEFORE_DRAWING, TextCodec

# one packed sequence ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """How the tokens of a split look."""

    name: str
    colour: str
    sign: str


def kind_of(segment: Segment) -> Kind:
    match segment:
        case Text():
            return Kind("text", canvas.TEXT, "")
        case VitImage():
            return Kind("ViT patches", canvas.VIT, "p")
        case VaeImage(hidden=True):
            return Kind("noised latents", canvas.NOISED, "x")
        case VaeImage(t=0.0):
            return Kind("clean latents", canvas.CLEAN, "z")
    return Kind(
        f"{len(segment.frames)} frame{'s' * (len(segment.frames) > 1)}, t = {segment.t}", canvas.FRAME, "f"
    )


def token_faces(pack: PackedSequence, kinds: Sequence[Kind], codec: TextCodec) -> list[tuple[str, str]]:
    """(sign, colour) of every stored token."""
    faces = [(kinds[split].sign, kinds[split].colour) for split in pack.split.tolist()]
    signs = {codec.start: "s", codec.end: "e", codec.vision_start: "[", codec.vision_end: "]"}
    for place, token in zip(pack.text_places.tolist(), pack.text_ids.tolist(), strict=True):
        marker = signs.get(token)
        faces[place] = (marker, canvas.MARKER) if marker else (codec.decode([token]).strip(), faces[place][1])
    return faces


CELL, LEFT, GAP, UPPER, LOWER = 31.0, 92.0, 9.0, 62.0, 208.0
"""Of the figure of one sequence: a token's side, the first token, the gap between splits, the two rows."""


def logical_x(place: int, split: int) -> float:
    return LEFT + CELL * place + GAP * split


def stored_x(place: int, pack: PackedSequence) -> float:
    return LEFT + CELL * place + 3 * GAP * (place >= pack.num_und)


def draw_sequence(path: Path) -> None:
    codec = tiny_codec()
    config = tiny_config(codec)
    segments = edit_segments(config, codec)
    pack = Packer(config, codec).pack([segments])
    kinds = [kind_of(segment) for segment in segments]
    sheet = Canvas(348)
    draw_owners(sheet, pack)
    for place, face in enumerate(token_faces(pack, kinds, codec)):
        draw_token(sheet, pack, place, face)
    first = 0
    for split, (span, kind) in enumerate(zip(pack.spans[0], kinds, strict=True)):
        start, end = logical_x(first, split), logical_x(first + span.length, split) - 2
        sheet.bracket((start, UPPER - 9), end, fill=kind.colour)
        rule = ("causal" if span.causal else "full") + (", hidden" if span.hidden else "")
        sheet.text(((start + end) / 2, UPPER - 39), kind.name, bold=True, fill=kind.colour)
        sheet.text(((start + end) / 2, UPPER - 22), rule, size=12, fill=canvas.GREY)
        first += span.length
    rows = ("tokens", UPPER), ("stored", LOWER)
    for (name, y), below in zip(rows, ("position id", "place"), strict=True):
        sheet.text((LEFT - 18, y + CELL / 2), name, size=12, anchor="rm", fill=canvas.GREY)
        sheet.text((LEFT - 18, y + CELL + 12), below, size=12, anchor="rm", fill=canvas.GREY)
    names = ("z: clean latents", "p: ViT patches", "words", "x: noised latents")
    markers = (canvas.MARKER, "markers: s, e around text, [ ] around pictures")
    colours = [kind.colour for kind in kinds]
    sheet.legend((LEFT, 332), [markers, *zip(colours, names, strict=True)])
    sheet.save(path)


def draw_owners(sheet: Canvas, pack: PackedSequence) -> None:
    """The two experts' slices of the stored tokens."""
    owners = (
        ("understanding expert", f"x[:{pack.num_und}]", (0, pack.num_und), canvas.UND, canvas.UND_INK),
        ("generation expert", f"x[{pack.num_und}:]", (pack.num_und, len(pack)), canvas.GEN, canvas.GEN_INK),
    )
    for name, part, (first, stop), colour, ink in owners:
        start = stored_x(first, pack)
        width = CELL * (stop - first)
        sheet.box((start - 7, LOWER - 12), (width + 13, 104), fill=colour, radius=6)
        sheet.text((start + width / 2, LOWER + 62), name, bold=True, fill=ink)
        sheet.text((start + width / 2, LOWER + 79), part, size=12, fill=ink)


def draw_token(sheet: Canvas, pack: PackedSequence, place: int, face: tuple[str, str]) -> None:
    """A token where it is said and where it is stored, and the way between."""
    sign, colour = face
    x0 = logical_x(int(pack.logical[place]), int(pack.split[place])) + CELL / 2 - 1
    x1 = stored_x(place, pack) + CELL / 2 - 1
    y0, y1 = UPPER + CELL + 24, LOWER - 3
    ramp = [i / 24 for i in range(25)]
    curve = [(x0 + (x1 - x0) * (3 * s * s - 2 * s**3), y0 + (y1 - y0) * s) for s in ramp]
    sheet.line(curve, fill=colour, width=1.1)
    numbers = int(pack.position_ids[place]), place
    for x, y, number in zip((x0, x1), (UPPER, LOWER), numbers, strict=True):
        sheet.box((x - CELL / 2 + 1, y), (CELL - 2, CELL), fill=colour, radius=3)
        sheet.text((x, y + CELL / 2), sign, size=10.5 if len(sign) > 1 else 13, fill=canvas.PAPER)
        sheet.text((x, y + CELL + 12), str(number), size=11.5, fill=canvas.GREY)


# the mask ---------------------------------------------------------------------------------------------------


def draw_mask(path: Path) -> None:
    codec = tiny_codec()
    config = tiny_config(codec)
    sheet = Canvas(446)
    panels = (
        ("An edit: picture, instruction, noised target", [edit_segments(config, codec)], 96.0),
        ("Two samples: frame groups; a story that goes on", video_segments(config, codec), 556.0),
    )
    for title, samples, left in panels:
        pack = Packer(config, codec).pack(samples)
        kinds = [kind_of(segment) for segments in samples for segment in segments]
        mask_panel(sheet, (left, 62), (title, pack, kinds))
    words = "row: a token that looks    column: a token that may be seen    colour: the split of the seen one"
    sheet.text((WIDTH / 2, 428), words, size=12, fill=canvas.GREY)
    sheet.save(path)


def mask_panel(sheet: Canvas, at: Point, shown: tuple[str, PackedSequence, list[Kind]]) -> None:
    title, pack, kinds = shown
    left, top = at
    side = 336.0
    cell = side / len(pack)
    stored = torch.argsort(pack.logical)
    seen = visible(pack, stored[:, None], stored[None, :])
    split = pack.split[stored].tolist()
    sheet.text((left - 10, top - 40), title, bold=True, anchor="lm")
    for q in range(len(pack)):
        for k in range(len(pack)):
            fill = kinds[split[k]].colour if seen[q, k] else canvas.PALE
            sheet.box((left + cell * k, top + cell * q), (cell - 1, cell - 1), fill=fill, radius=0)
    for index, kind in enumerate(kinds):
        first, count = split.index(index), split.count(index)
        sheet.box((left + cell * first, top - 12), (cell * count - 2, 6), fill=kind.colour, radius=2)
        sheet.box((left - 12, top + cell * first), (6, cell * count - 2), fill=kind.colour, radius=2)
        sheet.text(
            (left - 18, top + cell * (first + count / 2)), kind.name, size=11.5, anchor="rm", fill=kind.colour
        )
    for tokens in pack.lengths[:-1]:
        edge = cell * tokens - 0.5
        sheet.line([(left - 12, top + edge), (left + side, top + edge)], fill=canvas.INK)
        sheet.line([(left + edge, top - 12), (left + edge, top + side)], fill=canvas.INK)


# experts ----------------------------------------------------------------------------------------------------


BLOCK_ROWS = (
    ("input_layernorm",),
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.q_norm", "self_attn.k_norm"),
    ("attention",),
    ("self_attn.o_proj",),
    ("post_attention_layernorm",),
    ("mlp",),
)
ENTRIES = {
    "": ("language_model.model.embed_tokens", "vit_model", "connector"),
    "_moe_gen": ("vae2llm", "time_embedder", "latent_pos_embed"),
}
EXITS = {
    "": ("language_model.model.norm", "language_model.lm_head"),
    "_moe_gen": ("language_model.model.norm_moe_gen", "llm2vae"),
}


def draw_experts(path: Path) -> None:
    codec = tiny_codec()
    config = tiny_config(codec)
    pack = Packer(config, codec).pack([edit_segments(config, codec)])
    passed = tokens_through_modules(pack, config)
    sheet = Canvas(610)
    sides = (
        ("", f"understanding expert: x[:{pack.num_und}]", 24.0, canvas.UND, canvas.UND_INK),
        ("_moe_gen", f"generation expert: x[{pack.num_und}:]", 462.0, canvas.GEN, canvas.GEN_INK),
    )
    for suffix, title, left, colour, ink in sides:
        sheet.box((left, 34), (414, 556), fill=colour, radius=8)
        sheet.text((left + 207, 20), title, bold=True, fill=ink)
        module_row(sheet, (left, 48), ENTRIES[suffix], passed, ink)
        for row, names in enumerate(BLOCK_ROWS):
            if names != ("attention",):
                full = [f"language_model.model.layers.0.{name}{suffix}" for name in names]
                module_row(sheet, (left, 134 + 52 * row), full, passed, ink)
        module_row(sheet, (left, 530), EXITS[suffix], passed, ink)
        joints = [(174 + 52 * row, 184 + 52 * row) for row in range(len(BLOCK_ROWS) - 1)]
        for start, end in ((90, 132), *joints, (488, 528)):
            sheet.arrow((left + 207, start), (left + 207, end), fill=ink, width=1.6, head=6)
    words = ["one attention over all tokens", f"{len(pack)} tokens: rotary positions, mask, cache"]
    sheet.labelled((40, 134 + 52 * BLOCK_ROWS.index(("attention",))), (820, 40), words, fill=canvas.INK)
    sheet.box((12, 110), (876, 396), line=canvas.GREY, radius=8, width=1.2)
    sheet.box((390, 99), (120, 22), fill=canvas.PAPER, line=canvas.GREY, radius=8, width=1.2)
    sheet.text((450, 110), "one block of many", size=11.5, fill=canvas.GREY)
    sheet.save(path)


def module_row(sheet: Canvas, at: Point, names: Sequence[str], passed: Counter[str], ink: str) -> None:
    """Boxes side by side, as wide as an expert's column: a module's own name, and the tokens through it."""
    left, y = at
    width = (382 - 8 * (len(names) - 1)) / len(names)
    for index, name in enumerate(names):
        assert passed[name], name
        unit = "frames" if name == "time_embedder" else "tokens"
        words = [name.split(".")[-1], f"{passed[name]} {unit}"]
        sheet.labelled((left + 16 + index * (width + 8), y), (width, 40), words, fill=ink)


# flow -------------------------------------------------------------------------------------------------------


SHIFTS = ((3.0, canvas.NOISED), (1.0, canvas.TEXT))


def draw_flow(path: Path) -> None:
    sheet = Canvas(470)
    x0 = to_pixels(toy_picture(48))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    times = (1.0, 0.8, 0.6, 0.4, 0.2, 0.0)
    side = 118.0
    for index, t in enumerate(times):
        left = 44 + index * 140.0
        sheet.picture((left, 16), side, to_picture(interpolate(x0, noise, t)))
        sheet.text((left + side / 2, 149), f"t = {t}", size=12.5, fill=canvas.GREY)
        if t:
            sheet.arrow((left + side + 4, 75), (left + side + 18, 75), width=1.6)
    chart(sheet, (78.0, 190.0), (520.0, 230.0))
    chart_legend(sheet, (628.0, 198.0))
    sheet.save(path)


def chart(sheet: Canvas, at: Point, size: Point) -> None:
    """Times against steps for two shifts, with the guided interval."""
    (left, top), (width, height) = at, size
    guidance, points = Guidance(), Sampling().num_timesteps

    def place(step: float, t: float) -> Point:
        return left + width * step / (points - 1), top + height * (1 - t)

    low, high = guidance.interval
    sheet.box(place(0, high), (width, height * (high - low)), fill=canvas.UND, radius=0)
    sheet.text(
        (left + width - 8, place(0, high)[1] + 14),
        f"guided: {low} < t <= {high:.0f}",
        size=12,
        anchor="rm",
        fill=canvas.UND_INK,
    )
    for t in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        sheet.text((left - 10, place(0, t)[1]), f"{t}", size=11.5, anchor="rm", fill=canvas.GREY)
        sheet.line([place(0, t), place(points - 1, t)], fill=canvas.FAINT, width=0.6)
    for step in range(0, points, 7):
        sheet.text((place(step, 0)[0], top + height + 14), str(step), size=11.5, fill=canvas.GREY)
    sheet.text((left + width / 2, top + height + 34), "step", size=12, fill=canvas.GREY)
    sheet.text((left - 48, top + height / 2), "t", size=13, fill=canvas.GREY)
    for shift, colour in SHIFTS:
        times = schedule(points, shift)
        sheet.line([place(step, t) for step, t in enumerate(times)], fill=colour, width=1.2)
        for step, t in enumerate(times[:-1]):
            fill = colour if guidance.acts_at(t) else canvas.PAPER
            sheet.circle(place(step, t), 3, fill=fill, line=colour, width=1.1)


def chart_legend(sheet: Canvas, at: Point) -> None:
    """What the chart's colours are, and the three formulas of flow."""
    guidance, points = Guidance(), Sampling().num_timesteps
    for row, (shift, colour) in enumerate(SHIFTS):
        x, y = at[0], at[1] + 72 * row
        times = schedule(points, shift)[:-1]
        guided = sum(guidance.acts_at(t) for t in times)
        sheet.circle((x + 6, y), 5, fill=colour)
        sheet.text((x + 22, y), f"shift {shift:.0f}", anchor="lm", bold=True, fill=colour)
        lines = (f"{points} points, {len(times)} steps", f"{guided} guided + {len(times) - guided} plain")
        for line, words in enumerate(lines):
            sheet.text((x + 22, y + 20 + 17 * line), words, size=12, anchor="lm", fill=canvas.GREY)
    formulas = (
        "x(t) = (1 - t) · picture + t · noise",
        "velocity = noise - picture",
        "step: x - velocity · (t - t next)",
    )
    for row, words in enumerate(formulas):
        sheet.text((at[0], at[1] + 158 + 22 * row), words, size=12.5, anchor="lm")


# guidance ---------------------------------------------------------------------------------------------------


BRANCH_COLOURS = {"cond": canvas.INK, "text": canvas.TEXT, "image": canvas.VIT}


def draw_guidance(path: Path) -> None:
    cond, text, image = (torch.tensor([pair]) for pair in ((1.2, 0.75), (1.1, 0.2), (0.35, 0.8)))
    steps = Guidance(text=2.2, image=1.5, renorm=Renorm.GLOBAL)
    free = replace(steps, renorm_min=1.0)
    sheet = Canvas(400)
    by_text = guide(free, cond, text, None)
    first = VectorPanel(sheet, 24, {"cond": cond, "text": text})
    first.paint("text guidance", [by_text], guide(steps, cond, text, None))
    second = VectorPanel(sheet, 474, {"cond": cond, "text": text, "image": image})
    both = guide(free, cond, text, image)
    second.paint("text and image guidance", [by_text, both], guide(steps, cond, text, image))
    words = (f"text + {steps.text} · (cond - text)", f"image + {steps.image} · (text guided - image)")
    for left, line in zip((24, 474), words, strict=True):
        sheet.text((left, 364), line, size=12.5, anchor="lm")
        sheet.text(
            (left, 384), "then scaled back to the length of cond", size=12, anchor="lm", fill=canvas.GREY
        )
    sheet.save(path)


@dataclass(frozen=True, slots=True)
class VectorPanel:
    """Velocities of one token with two channels, as arrows."""

    sheet: Canvas
    left: float
    branches: dict[str, Tensor]

    def place(self, v: Tensor) -> Point:
        x, y = v.flatten().tolist()
        return self.left + 14 + 158 * x, 324 - 158 * y

    def paint(self, title: str, guided: list[Tensor], used: Tensor) -> None:
        """guided: what the branches are combined to, one scale after the other; used: after scaling back."""
        sheet, place, origin = self.sheet, self.place, self.place(torch.zeros(2))
        sheet.text((self.left, 20), title, bold=True, anchor="lm", size=14)
        length = torch.linalg.vector_norm(self.branches["cond"])
        angles = torch.linspace(-0.06, 1.63, 60)
        arc = [place(length * torch.stack([angle.cos(), angle.sin()])) for angle in angles]
        sheet.line(arc, fill=canvas.FAINT, width=1.2)
        above = (arc[-1][0], arc[-1][1] - 12)
        sheet.text(above, "length of cond", size=11.5, anchor="lm", fill=canvas.GREY)
        for start, end in zip(list(self.branches.values())[1:], guided, strict=True):
            sheet.line([place(start), place(end)], width=1, dash=3)
        sheet.line([origin, place(guided[-1])], fill=canvas.NOISED, width=1, dash=2)
        for name, v in self.branches.items():
            (x, y), colour = place(v), BRANCH_COLOURS[name]
            sheet.arrow(origin, (x, y), fill=colour, width=2)
            at, anchor = ((x - 7, y - 6), "rm") if name == "image" else ((x + 9, y + 9), "lm")
            sheet.text(at, name, size=12.5, anchor=anchor, fill=colour, bold=True)
        for v, words in zip(guided, ("text guided", "text and image guided"), strict=False):
            x, y = place(v)
            sheet.circle((x, y), 4, fill=canvas.PAPER, line=canvas.NOISED, width=1.6)
            sheet.text((x - 10, y - 9), words, size=12, anchor="rm", fill=canvas.NOISED)
        x, y = place(used)
        sheet.arrow(origin, (x, y), fill=canvas.NOISED, width=2.8, head=11)
        sheet.text((x - 12, y - 1), "used", size=12.5, anchor="rm", fill=canvas.NOISED, bold=True)


# contexts and requests --------------------------------------------------------------------------------------


def segment_face(segment: Segment, codec: TextCodec) -> tuple[str, str]:
    """(what it is, its colour) of a segment that a context has taken in."""
    match segment:
        case Text(bare=True):
            return "thought", canvas.UND_INK
        case Text(ids=ids) if codec.decode(ids) == THINK_BEFORE_DRAWING:
            return "system text", canvas.MARKER
        case Text(ids=ids):
            return codec.decode(ids), canvas.TEXT
    kind = kind_of(segment)
    return f"picture: {kind.name}", kind.colour


def draw_contexts(path: Path) -> None:
    sheet = Canvas(400)
    bagel, spy = spied_bagel()
    bagel.edit(toy_picture(32), INSTRUCTION)
    branch_table(sheet, 14, "an edit", spy)
    bagel, spy = spied_bagel()
    bagel.generate(PROMPT, think=True)
    branch_table(sheet, 212, "a drawing that is thought about first", spy)
    sheet.save(path)


SLOT = 184.0


def branch_table(sheet: Canvas, top: float, title: str, spy: Spy) -> None:
    """The contexts of the last step that was guided twice: a row a branch, a column for what one may hold."""
    (forward,) = spy.steps[-1]
    names = ("image", "text", "cond")
    contexts: dict[str, Context] = dict(zip(names, (row.context for row in forward.rows), strict=True))
    codec = spy.packer.codec
    held = {
        name: list(
            dict.fromkeys(segment_face(segment, codec) for segment in spy.taken[contexts[name].lineage])
        )
        for name in ("cond", "text", "image")
    }
    sheet.text((24, top + 10), title, bold=True, anchor="lm", size=14)
    for row, (name, faces) in enumerate(held.items()):
        y = top + 32 + 46 * row
        sheet.text((96, y + 18), name, bold=True, anchor="rm", fill=BRANCH_COLOURS[name])
        for column, (words, colour) in enumerate(held["cond"]):
            at, size = (112 + SLOT * column, y), (SLOT - 8, 36.0)
            if (words, colour) in faces:
                sheet.labelled(at, size, [words], fill=colour)
            else:
                corners = [at, (at[0] + size[0], y), (at[0] + size[0], y + 36), (at[0], y + 36), at]
                sheet.line(corners, fill=canvas.FAINT, dash=3)
        sheet.labelled((112 + SLOT * len(held["cond"]), y), (96.0, 36.0), ["x(t)"], fill=canvas.NOISED)
        context = contexts[name]
        note = 112 + SLOT * len(held["cond"]) + 108
        sheet.text((note, y + 10), f"{len(context)} tokens", size=12, anchor="lm", fill=canvas.GREY)
        sheet.text(
            (note, y + 26), f"x(t) at position {context.position}", size=12, anchor="lm", fill=canvas.GREY
        )


LANES = {"ask": 38.0, "generate": 96.0, "Engine.step": 154.0}


def draw_requests(path: Path) -> None:
    bagel, spy = spied_bagel()
    sampling = replace(bagel.config.settings.draw, num_timesteps=7, guidance=Guidance(text=4.0))
    write = bagel.write_request([toy_picture(32), "a circle"], seed=0, think=False)
    draw = bagel.draw_request([PROMPT], size=None, seed=0, think=False, sampling=sampling)
    spy.drive_all([write, draw])
    asking = spy.steps[0][0].rows[0].context
    sheet = Canvas(240)
    left, width = 118.0, 772.0 / len(spy.steps)
    for name, y in LANES.items():
        sheet.text((left - 14, y + 22), name, bold=True, anchor="rm")
    for step, forwards in enumerate(spy.steps):
        at, total = left + width * step, 0
        sheet.box((at - 2, 4), (width - 2, 198), fill=canvas.PALE, radius=6)
        sheet.text((at + width / 2 - 3, 20), f"step {step + 1}", size=11.5, fill=canvas.GREY)
        for forward in forwards:
            lane = "ask" if forward.rows[0].context is asking else "generate"
            total += draw_rows(sheet, (at + 2, LANES[lane]), (width - 10, 44.0), forward, spy)
        sheet.labelled(
            (at + 2, LANES["Engine.step"]), (width - 10, 44), [str(total), "tokens"], fill=canvas.INK
        )
    names = ("reads", "reads and asks for the next token", "denoises, one row for each distinct context")
    colours = (canvas.MARKER, canvas.TEXT, canvas.NOISED)
    sheet.legend((left, 224), list(zip(colours, names, strict=True)))
    sheet.save(path)


def draw_rows(sheet: Canvas, at: Point, size: Point, forward: Forward, spy: Spy) -> int:
    """The rows of one request's forward, one above the other; the number of their tokens."""
    colours = {Read.NOTHING: canvas.MARKER, Read.LOGITS: canvas.TEXT, Read.VELOCITY: canvas.NOISED}
    height = (size[1] - 4 * (len(forward.rows) - 1)) / len(forward.rows)
    branches = ("text", "cond")[-len(forward.rows) :]
    total = 0
    for index, row in enumerate(forward.rows):
        count = len(spy.packer.pack([row.segments]))
        y = at[1] + index * (height + 4)
        words = f"{count} token{'s' * (count > 1)}"
        if row.read is Read.VELOCITY:
            words = f"{branches[index]}: {words}"
        sheet.box((at[0], y), (size[0], height), fill=colours[row.read])
        sheet.text((at[0] + size[0] / 2, y + height / 2), words, size=11, fill=canvas.PAPER, bold=True)
        total += count
    return total


FIGURES: dict[str, Callable[[Path], None]] = {
    "sequence.png": draw_sequence,
    "mask.png": draw_mask,
    "experts.png": draw_experts,
    "flow.png": draw_flow,
    "guidance.png": draw_guidance,
    "contexts.png": draw_contexts,
    "requests.png": draw_requests,
}


def draw_all(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        draw(folder / name)


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]))
