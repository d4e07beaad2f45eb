"""Trains a ViT to see the toy world, in place of SigLIP's pre-training.

From a patch's features a linear head tells whether an object's centre lies there, which object it is, where
exactly, and what the ground is.

Shapes: V patches of all pictures, D width of the ViT.
"""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openbagel.images import grid_position_ids, patchify
from openbagel.model.bagel import BagelModel
from openbagel.train.trainer import Loop, Place, Training
from openbagel.world.render import render
from openbagel.world.scene import Scene, World


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionTraining:
    """How it is trained; seed of the head and of the pictures is that of `train`."""

    train: Training
    samples: int = 64


class Seeing(nn.Module):
    """A ViT and the head that is thrown away afterwards."""

    def __init__(self, model: BagelModel, world: World) -> None:
        super().__init__()
        assert model.config.vit
        self.vit = model.vit_model
        facts = (world.shapes, world.colours, world.sizes, world.grounds)
        self.widths = [1, 2, *map(len, facts)]
        self.head = nn.Linear(model.config.vit.hidden_size, sum(self.widths))

    def forward(self, patches: Tensor, ids: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, ...]:
        """For each patch: whether there is a centre (a logit), where, shape, colour, size, ground."""
        return self.head(self.vit(patches, ids, counts)).split(self.widths, dim=-1)


@dataclass(frozen=True, slots=True, eq=False)
class Pictures:
    """A batch of patches with what they show; `things` are rows (patch, shape, colour, size) of objects."""

    patches: Tensor
    ids: Tensor
    counts: tuple[int, ...]
    things: Tensor
    places: Tensor
    """float[objects, 2]: each centre in its patch, from 0 to 1."""
    grounds: Tensor


class VisionTrainer(Loop):
    model: Seeing

    def __init__(self, model: BagelModel, world: World, recipe: VisionTraining, place: Place) -> None:
        assert model.config.vit
        with torch.random.fork_rng():
            torch.manual_seed(recipe.train.seed)
            seeing = Seeing(model, world)
        super().__init__(seeing.to(place.ranks.device), recipe.train, place)
        self.world, self.recipe, self.config = world, recipe, model.config
        self.grid = world.side // model.config.vit.patch_size

    @property
    def weights(self) -> dict[str, float]:
        return {"found": 4.0, "placed": 10.0, "named": 1.0, "ground": 0.3}

    def batches(self) -> list[Pictures]:
        return [self.pictures(self.step)]

    def counts(self, batch: Pictures) -> dict[str, float]:
        patches, things = len(batch.patches), len(batch.things)
        seen = {"tokens": patches, "room": patches, "samples": len(batch.counts), "flops": 0}
        return {"found": patches, "placed": things, "named": things, "ground": patches, **seen}

    def sums(self, batch: Pictures) -> dict[str, Tensor]:
        found, placed, *named, ground = self.model(batch.patches, batch.ids, batch.counts)
        at, *truth = batch.things.unbind(1)
        centres = torch.zeros_like(found).index_fill(0, at, 1.0)
        names = [F.cross_entropy(n[at], t, reduction="sum") for n, t in zip(named, truth, strict=True)]
        return {
            "found": F.binary_cross_entropy_with_logits(found, centres, reduction="sum"),
            "placed": (placed[at].sigmoid() - batch.places).square().sum(),
            "named": torch.stack(names).sum(),
            "ground": F.cross_entropy(ground, batch.grounds, reduction="sum"),
        }

    def pictures(self, step: int) -> Pictures:
        """A function of the seed and the step alone."""
        rng = random.Random(f"vision/{self.training.seed}/{step}")
        scenes = self.world.sample_scenes(rng, self.recipe.samples)
        device = self.ranks.device
        things, places = self._truth(scenes)
        grounds = torch.tensor([self.world.grounds.index(scene.ground) for scene in scenes])
        images = render(scenes, self.world.side, device) * 2 - 1
        assert self.config.vit
        ids = grid_position_ids((self.grid, self.grid), self.config.vit_max_num_patch_per_side, False)
        return Pictures(
            patches=torch.cat([patchify(image, self.config.vit.patch_size) for image in images]),
            ids=ids.repeat(len(scenes)).to(device),
            counts=(self.grid**2,) * len(scenes),
            things=torch.tensor(things, dtype=torch.int64, device=device),
            places=torch.tensor(places, device=device),
            grounds=grounds.repeat_interleave(self.grid**2).to(device),
        )

    def _truth(self, scenes: list[Scene]) -> tuple[list[list[int]], list[list[float]]]:
        """Of two centres in one patch the upper object's counts."""
        world, things, places = self.world, {}, {}
        for number, scene in enumerate(scenes):
            for thing in scene.things:
                column, row = (min(int(c * self.grid), self.grid - 1) for c in (thing.x, thing.y))
                patch = (number * self.grid + row) * self.grid + column
                names = (world.shapes.index(thing.shape), world.colours.index(thing.colour))
                things[patch] = [patch, *names, world.sizes.index(thing.size)]
                places[patch] = [thing.x * self.grid - column, thing.y * self.grid - row]
        return list(things.values()), list(places.values())
