"""A small data set from the toy world in the official hierarchy, with a mixture that trains nano on it::

t2i/  editing/{seedxedit_multi, parquet_info}/  vlm/{images/, llava_ov_si.jsonl}   like the official one
text/  interleaved/  web/  video/  reasoning/                                      as the paper describes
example.yaml                                                                       the mixture of all
"""

import io
import random
from dataclasses import dataclass, replace
from pathlib import Path

from openbagel.data.convert import check_vacant, write_folder, write_jsonl, write_parquet, write_parquet_info
from openbagel.data.tasks import Row
from openbagel.world.language import Phrase, caption, layout
from openbagel.world.render import render_picture
from openbagel.world.scene import Colour, Ground, Scene, Shape, Size, Thing, World, nano_world
from openbagel.world.tasks import TASKS, Example, example

ASSETS = Path(__file__).parents[1] / "assets"
MIXTURE, *RECIPES = (ASSETS / f"{name}.yaml" for name in ("example", "finetune", "lora"))
FEET = [Thing(Shape.SQUARE, Colour.RED, Size.SMALL, x, 0.75) for x in (0.25, 0.75)]
ZORP = Scene(Ground.BLACK, (Thing(Shape.CIRCLE, Colour.GREEN, Size.LARGE, 0.5, 0.3125), *FEET))
"""What the recipe for adapters teaches as "a zorp"."""
FRAMES, STEP = 4, 1 / 16
"""Pictures of a clip, and how far its object moves from one to the next: it stays inside the picture."""


def write_example(folder: str | Path, *, rows: int = 48, seed: int = 0) -> Path:
    """Writes `rows` rows of each kind into an empty folder; gives the path of the mixture, example.yaml.

    The same arguments write the same bytes. No held-out pair of the world occurs. ValueError when the folder
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
        "web": teller.page,
        "video": teller.clip,
        "reasoning": teller.reasoning,
    }
    for name, kind in kinds.items():
        write_parquet(folder / name, map(kind, range(rows)), file_rows=-(-rows // 2), group_rows=8)
    edits = folder / "editing"
    write_parquet_info(edits / "parquet_info" / "seedxedit_multi.json", edits / "seedxedit_multi")
    write_jsonl(folder / "vlm", map(teller.conversation, range(rows)), "llava_ov_si.jsonl")
    write_jsonl(folder / "text", map(teller.document, range(rows)), "text.jsonl")
    write_folder(folder / "concept", [{"image": teller.png(ZORP), "caption": "a zorp"}])
    for asset in (MIXTURE, *RECIPES):
        (folder / asset.name).write_text(asset.read_text("utf-8").replace("DATA", str(folder)), "utf-8")
    return folder / MIXTURE.name


@dataclass(frozen=True, slots=True)
class _Teller:
    """Makes the rows of each kind; row `index` is the same whatever else is made."""

    world: World
    seed: int

    def drawing(self, index: int) -> Row:
        made, (scene,) = self._made("draw", index)
        captions = {"prompt": made.prompt, "caption": caption(scene), "layout": layout(scene)}
        return {"image": self.png(scene), "captions": captions}

    def edit(self, index: int) -> Row:
        """One step; where the last of several objects may go too, every second time two."""
        made, scenes = self._made("edit", index)
        steps, things = [made.prompt], scenes[-1].things
        names = [Phrase.of(thing, with_size=False).definite() for thing in things]
        if index % 2 and len(names) > 1 and names.count(names[-1]) == 1:
            scenes.append(replace(scenes[-1], things=things[:-1]))
            steps.append(f"remove {names[-1]}")
        alternatives = [[step, f"please {step}"] for step in steps]
        return {"image_list": [*map(self.png, scenes)], "instruction_list": alternatives}

    def conversation(self, index: int) -> Row:
        """A question about a picture; every second time its description too."""
        made, (scene,) = self._made("ask", index)
        turns = [("human", f"<image>\n{made.prompt}"), ("gpt", made.answer)]
        turns += [("human", "describe the picture."), ("gpt", caption(scene))] * (index % 2)
        said = [{"from": who, "value": value} for who, value in turns]
        return {"image": self.png(scene), "conversations": said}

    def document(self, index: int) -> Row:
        _, scenes = self._made("edit", index)
        return {"text": " ".join(f"{layout(scene)}." for scene in scenes)}

    def seen(self, index: int) -> Row:
        """Two pictures, a question with its answer after each."""
        made = [self._made("ask", 2 * index + turn) for turn in range(2)]
        texts = [words for one, _ in made for words in (None, f"{one.prompt} {one.answer}")]
        return {"texts": texts, "images": [p for _, (scene,) in made for p in (self.png(scene), None)]}

    def page(self, index: int) -> Row:
        """Two prompts, each followed by its picture, which has a caption."""
        made = [self._made("draw", 2 * index + turn) for turn in range(2)]
        return {
            "texts": [words for one, _ in made for words in (one.prompt, None)],
            "images": [picture for _, (scene,) in made for picture in (None, self.png(scene))],
            "captions": [words for _, (scene,) in made for words in (None, caption(scene))],
        }

    def clip(self, index: int) -> Row:
        """One object that moves away from the border it is nearest to."""
        rng = random.Random(f"{self.seed}/clip/{index}")
        scene = self.world.sample_scene(rng, 1)
        (thing,) = scene.things
        axis = rng.choice("xy")
        start = getattr(thing, axis)
        way, word = (STEP, {"x": "right", "y": "down"}) if start < 0.5 else (-STEP, {"x": "left", "y": "up"})
        moved = [replace(thing, **{axis: start + way * turn}) for turn in range(FRAMES)]
        frames = [self.png(replace(scene, things=(one,))) for one in moved]
        change = f"{Phrase.of(thing, with_size=False).definite()} moves {word[axis]}"
        return {"frames": frames, "captions": [change] * (FRAMES - 1), "caption": caption(scene)}

    def reasoning(self, index: int) -> Row:
        """A plan before a drawing, then one before an edit, in turns."""
        made, scenes = self._made("edit" if index % 2 else "draw", index, think=True)
        pictures = [*map(self.png, scenes)]
        if index % 2:
            return {"image_list": pictures, "instruction": made.prompt, "thought": made.thought}
        return {"image": pictures[0], "captions": {"prompt": made.prompt}, "thought": made.thought}

    def _made(self, verb: str, index: int, think: bool = False) -> tuple[Example, list[Scene]]:
        """An example with its scenes, the target last."""
        kinds = [kind for kind in TASKS if kind.startswith(verb)]
        made = example(self.world, self.seed, index, kinds[index % len(kinds)], think=think)
        return made, [*made.pictures, *([made.target] if made.target else [])]

    def png(self, scene: Scene) -> bytes:
        buffer = io.BytesIO()
        render_picture(scene, self.world.side).save(buffer, "PNG")
        return buffer.getvalue()
