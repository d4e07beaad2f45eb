"""How full packs are and how equal the work of ranks is, for both methods of packing.

    python -m benchmarks.packing

Plans packs over a stored list of lengths (tests/data/lengths.json) of a mixture like the paper's. Fill is
tokens over max_num_tokens. Imbalance is the costliest rank over the mean of all, less one, averaged over the
steps; a pack costs its linear and attention FLOPs in the 7B model. `--write` makes the list anew.
"""

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from benchmarks.clock import table
from openbagel.config import bagel_7b
from openbagel.data.packing import Packing, PackingMethod, Stream, Supply, pair_cost
from openbagel.data.samples import Draw, Extent, Look, Part, Picture, Role, SampleId, extent
from openbagel.images import ImageLimits
from openbagel.sequence import Text

LENGTHS = Path(__file__).parents[1] / "tests" / "data" / "lengths.json"
ROWS = 400
"""Rows of each dataset in the list."""

# the mixture ------------------------------------------------------------------------------------------------

SMALL = ImageLimits(max_size=512, min_size=256, stride=16)
LARGE = ImageLimits(max_size=1024, min_size=512, stride=16)
SOURCE = ImageLimits(max_size=518, min_size=224, stride=14)
SHOWN = ImageLimits(max_size=980, min_size=378, stride=14, max_pixels=2_007_040)
ASPECTS = (1, 1, 4 / 3, 3 / 2, 16 / 9, 3 / 4, 2 / 3, 9 / 16)


def picture(rng: random.Random) -> Picture:
    """256 to 2048 pixels on its long side, about 900 in the middle."""
    side, aspect = min(2048.0, max(256.0, rng.lognormvariate(6.8, 0.4))), rng.choice(ASPECTS)
    return Picture(b"", (round(side * min(aspect, 1)), round(side / max(aspect, 1))))


def text(rng: random.Random, median: int, spread: float, most: int = 8000) -> Text:
    """Lengths in a log-normal distribution."""
    return Text((0,) * max(1, min(most, round(rng.lognormvariate(math.log(median), spread)))))


def read_and_shown(frame: Picture, limits: ImageLimits) -> list[Part]:
    return [Draw((frame,), limits, Role.CONDITION), Look(frame, SOURCE)]


def target(frame: Picture, limits: ImageLimits) -> Draw:
    return Draw((frame,), limits, Role.TARGET)


def t2i(rng: random.Random) -> list[Part]:
    return [text(rng, 70, 0.8, 1000), target(picture(rng), rng.choice((SMALL, LARGE)))]


def edit(rng: random.Random) -> list[Part]:
    frame = picture(rng)
    return [*read_and_shown(frame, LARGE), text(rng, 25, 0.6), target(frame, LARGE)]


def vlm(rng: random.Random) -> list[Part]:
    turns = [[text(rng, 20, 0.7), text(rng, 80, 1.0)] for _ in range(rng.randint(1, 4))]
    return [Look(picture(rng), SHOWN), *sum(turns, [])]


def texts(rng: random.Random) -> list[Part]:
    return [text(rng, 800, 1.0, 12_000)]


def interleaved(rng: random.Random) -> list[Part]:
    count = rng.choice((1, 2, 2, 3, 4, 5, 6))
    turns = [[text(rng, 120, 0.8), Look(picture(rng), SHOWN, count)] for _ in range(count)]
    return [*sum(turns, []), text(rng, 150, 0.8)]


def video(rng: random.Random) -> list[Part]:
    frame, parts = picture(rng), []
    for index in range(rng.choice((2, 3, 4, 4, 5, 6))):
        if index:
            parts += [text(rng, 25, 0.2, 30), target(frame, SMALL)]
        parts += read_and_shown(frame, SMALL)
    return parts


def web(rng: random.Random) -> list[Part]:
    parts = []
    for _ in range(rng.randint(3, 5)):
        frame = picture(rng)
        parts += [text(rng, 120, 0.7, 300), text(rng, 40, 0.4), target(frame, SMALL)]
        parts += read_and_shown(frame, SMALL)
    return parts


MIXTURE: dict[str, tuple[Callable[[random.Random], list[Part]], float, bool]] = {
    "t2i": (t2i, 0.40, True),
    "edit": (edit, 0.10, False),
    "vlm": (vlm, 0.15, True),
    "text": (texts, 0.05, False),
    "interleaved": (interleaved, 0.10, False),
    "video": (video, 0.12, False),
    "web": (web, 0.08, False),
}
"""Of each dataset: how a row is made, its weight, whether it is mandatory. Close to stage CT of the paper."""


def write_lengths(path: Path) -> None:
    """Writes [tokens, pairs] of every row, a dataset a line."""
    config = bagel_7b()
    lines = []
    for name, (make, weight, is_mandatory) in MIXTURE.items():
        extents = [astuple(extent(make(random.Random(f"{name}/{row}")), config)) for row in range(ROWS)]
        facts = {"weight": weight, "is_mandatory": is_mandatory, "extents": extents}
        lines.append(f"{json.dumps(name)}: {json.dumps(facts)}")
    made = "python -m benchmarks.packing --write: random samples of its mixture, tokens of bagel_7b()"
    rows = ",\n".join(lines)
    path.write_text(f'{{"made by": {json.dumps(made)}, "datasets": {{\n{rows}\n}}}}\n')


# the simulation ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Lengths:
    """A dataset of which only the lengths are known."""

    name: str
    weight: float
    is_mandatory: bool
    extents: Sequence[Extent]
    blocks: Sequence[int]

    def parts(self, row: int, rng: random.Random) -> list[Part]:
        raise NotImplementedError("only its lengths are known")

    def where(self, row: int) -> str:
        return f"{LENGTHS.name}, {self.name}, row {row}"


def stored(path: Path = LENGTHS) -> list[Lengths]:
    datasets = []
    for name, facts in json.loads(path.read_text())["datasets"].items():
        extents = [Extent(*pair) for pair in facts["extents"]]
        datasets.append(Lengths(name, facts["weight"], facts["is_mandatory"], extents, (len(extents),)))
    return datasets


def supply(packing: Packing, seed: int = 0) -> Supply:
    """Streams draw from the stored list."""
    datasets = {lengths.name: lengths for lengths in stored()}

    def measure(id: SampleId) -> Extent:
        return datasets[id.dataset].extents[id.row]

    cost = pair_cost(bagel_7b())
    return Supply(list(datasets.values()), packing, seed=seed, measure=measure, pair_cost=cost)


def planned(packing: Packing, rounds: int) -> list[Extent]:
    """The extents of the packs in their order, `rounds` of each stream."""
    source = supply(packing)
    streams = [Stream(source, index) for index in range(packing.streams)]
    packs = [[sample.extent for sample in stream.next_pack()[0]] for _ in range(rounds) for stream in streams]
    return [Extent(sum(e.tokens for e in pack), sum(e.pairs for e in pack)) for pack in packs]


def fill(packs: Sequence[Extent], packing: Packing) -> float:
    return sum(pack.tokens for pack in packs) / len(packs) / packing.max_num_tokens


def imbalance(packs: Sequence[Extent], ranks: int) -> float:
    """The costliest rank of a step over the mean of all ranks, less one; the mean over the steps."""
    each = pair_cost(bagel_7b())
    costs = [pack.tokens + each * pack.pairs for pack in packs]
    steps = [costs[start : start + ranks] for start in range(0, len(costs), ranks)]
    return sum(max(step) / (sum(step) / ranks) - 1 for step in steps) / len(steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="packs of each of the 128 streams")
    parser.add_argument("--write", action="store_true", help="make the list of lengths anew")
    options = parser.parse_args()
    if options.write:
        write_lengths(LENGTHS)
    ranks, rows = (8, 32, 128), []
    for method in PackingMethod:
        packing = replace(Packing(method=method), streams=max(ranks))
        packs = planned(packing, options.rounds)
        shares = (f"{imbalance(packs, count):.1%}" for count in ranks)
        rows.append([method.value, f"{fill(packs, packing):.1%}", *shares])
    headers = ["method", "fill", *(f"imbalance, {count} ranks" for count in ranks)]
    print(table(f"Packs of up to {Packing().max_num_tokens} tokens", headers, rows))


if __name__ == "__main__":
    main()
