"""A small data set from the toy world in the official hierarchy, with a mixture that trains nano on it::

t2i/  editing/{seedxedit_multi, parquet_info}/  vlm/{images/, llava_ov_si.jsonl}   like the official one
text/  interleaved/  web/  video/  reasoning/                                      as the paper describes
example.yaml                                                                       the mixture of all
"""

from dataclasses import dataclass
from pathlib import Path

from openbagel.data.convert import check_vacant, write_folder, write_jsonl, write_parquet, write_parquet_info
from openbagel.data.tasks import Row
from openbagel.picture_files import png
from openbagel.world.exercise import Draws, Example, Said, Shown, Writes, views
from openbagel.world.language import caption, layout
from openbagel.world.render import render_picture
from openbagel.world.rows import page, row, stored
from openbagel.world.scene import Colour, Ground, Scene, Shape, Size, Thing, World, nano_world
from openbagel.world.tasks import TASKS, example

ASSETS = Path(__file__).parents[1] / "assets"
MIXTURE, *RECIPES = (ASSETS / f"{name}.yaml" for name in ("example", "finetune", "lora"))
FEET = [Thing(Shape.SQUARE, Colour.RED, Size.SMALL, x, 0.75) for x in (0.25, 0.75)]
ZORP = Scene(Ground.BLACK, (Thing(Shape.CIRCLE, Colour.GREEN, Size.LARGE, 0.5, 0.3125), *FEET))
"""What the recipe for adapters teaches as "a zorp"."""


def write_example(folder: str | Path, *, rows: int = 48, seed: int = 0) -> Path:
    """Writes `rows` rows of each task into an empty folder; gives the path of the mixture, example.yaml.

    The same arguments write the same bytes. Nothing held out in the world occurs. ValueError when the folder
    holds a file.
    """
    if rows < 2:
        raise ValueError(f"rows {rows} must be at least 2, one for each file")
    folder, teller = Path(folder), _Teller(nano_world(), seed)
    check_vacant(folder)
    kinds = {
        "t2i": teller.drawing,
        "editing/seedxedit_multi": teller.edit,
        "interleaved": teller.seen,
        "web": teller.web,
        "video": lambda index: teller.row(index, "film_"),
        "reasoning": lambda index: teller.row(index, "think_draw", "think_edit", "draw_", thinks=True),
    }
    for name, kind in kinds.items():
        made = (stored(kind(index)) for index in range(rows))
        write_parquet(folder / name, made, file_rows=-(-rows // 2), group_rows=8)
    edits = folder / "editing"
    write_parquet_info(edits / "parquet_info" / "seedxedit_multi.json", edits / "seedxedit_multi")
    talks = (teller.row(index, "ask_", "think_ask", thinks=index % 2 == 1) for index in range(rows))
    write_jsonl(folder / "vlm", (stored(talk) for talk in talks), "llava_ov_si.jsonl")
    write_jsonl(folder / "text", (teller.row(index, "tell_text") for index in range(rows)), "text.jsonl")
    zorp = png(render_picture(ZORP, teller.world.side))
    write_folder(folder / "concept", [{"image": zorp, "caption": "a zorp"}])
    for asset in (MIXTURE, *RECIPES):
        (folder / asset.name).write_text(asset.read_text("utf-8").replace("DATA", str(folder)), "utf-8")
    return folder / MIXTURE.name


@dataclass(frozen=True, slots=True)
class _Teller:
    """Makes the rows of each data set; row `index` is the same whatever else is made."""

    world: World
    seed: int

    def made(self, index: int, *starts: str) -> Example:
        """The starts take turns, and so do the kinds that begin so."""
        turn, start = divmod(index, len(starts))
        kinds = [kind for kind in TASKS if kind.startswith(starts[start])]
        return example(self.world, self.seed, index, kinds[turn % len(kinds)])

    def row(self, index: int, *starts: str, thinks: bool = False) -> Row:
        return row(self.made(index, *starts), self.world.side, thinks)[1]

    def drawing(self, index: int) -> Row:
        """With three captions."""
        made = self.made(index, "draw_")
        (scene,) = _drawn(made)
        found = row(made, self.world.side)[1]
        found["captions"] |= {"caption": caption(scene), "layout": layout(scene)}
        return found

    def edit(self, index: int) -> Row:
        """Every second time in turns; each instruction is said in two ways."""
        found = page(self.made(index, "edit_", "edit_turns").steps, self.world.side)
        steps = [[words, f"please {words}"] for words in found["texts"] if words is not None]
        return {"image_list": [p for p in found["images"] if p is not None], "instruction_list": steps}

    def seen(self, index: int) -> Row:
        """Two pictures, a question with its answer after each."""
        steps: list[Shown | Writes] = []
        for turn in range(2):
            made = self.made(2 * index + turn, "ask_colour", "ask_count", "ask_shape").steps
            words = " ".join(step.words for step in made if isinstance(step, Said | Writes))
            steps += [*(step for step in made if isinstance(step, Shown)), Writes(words)]
        found = page(steps, self.world.side)
        return {"texts": found["texts"], "images": found["images"]}

    def web(self, index: int) -> Row:
        """A story or a walk; every third time two prompts, each followed by its picture with a caption."""
        if index % 3:
            return page(self.made(index - index // 3 - 1, "tell_story", "walk_").steps, self.world.side)
        made = [self.made(2 * index + turn, "draw_") for turn in range(2)]
        captions = [words for one in made for words in (None, *map(caption, _drawn(one)))]
        return {**page(made[0].steps + made[1].steps, self.world.side), "captions": captions}


def _drawn(made: Example) -> list[Scene]:
    drawn = views([step for step in made.steps if isinstance(step, Draws)])
    return [view for view in drawn if isinstance(view, Scene)]
