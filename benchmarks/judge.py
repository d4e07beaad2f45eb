"""How often the judge of the toy world is right, and how often it refuses a wrong picture.

    python -m benchmarks.judge --world full --scenes 10000 --damaged 1000 --model nano

Every picture is judged by the strictest demand: all objects of the scene, each as and where it is, no others.
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from openbagel.hub import find_model
from openbagel.weights import load_checkpoint
from openbagel.world.exercise import Spec
from openbagel.world.judge import judge, unmet
from openbagel.world.render import render
from openbagel.world.scene import WORLDS, Look, Scene, Thing, World

Redraw = Callable[[Tensor], Tensor]
"""Pictures to pictures, float[B, 3, side, side] in [0, 1]: an autoencoder, or a stand-in for one."""
BATCH = 64


def strict_spec(scene: Scene) -> Spec:
    return Spec(ground=scene.ground, kept=scene.things)


def free_world(name: str = "nano") -> World:
    """A world with its objects anywhere: the judge is not to rely on where they lie between pixels."""
    return replace(WORLDS[name](), cells=10_000)


def sample_scenes(world: World, count: int, *, seed: int) -> list[Scene]:
    """Scenes of one object up to the world's most, one in five with a held-out pair."""
    rng = random.Random(seed)
    return [
        world.sample_scene(rng, 1 + i % world.max_things, held_out=bool(world.held_out) and i % 5 == 0)
        for i in range(count)
    ]


# pictures of another scene ---------------------------------------------------------------------------------


def exchange(scene: Scene, old: Thing, new: Thing) -> Scene:
    return replace(scene, things=tuple(new if thing is old else thing for thing in scene.things))


def wrong_colour(scene: Scene, world: World, rng: random.Random) -> Scene:
    old = rng.choice(scene.things)
    return exchange(
        scene, old, replace(old, colour=rng.choice([c for c in world.colours if c != old.colour]))
    )


def wrong_shape(scene: Scene, world: World, rng: random.Random) -> Scene:
    old = rng.choice(scene.things)
    return exchange(scene, old, replace(old, shape=rng.choice([s for s in world.shapes if s != old.shape])))


def wrong_size(scene: Scene, world: World, rng: random.Random) -> Scene:
    old = rng.choice(scene.things)
    return exchange(scene, old, replace(old, size=rng.choice([s for s in world.sizes if s != old.size])))


def wrong_ground(scene: Scene, world: World, rng: random.Random) -> Scene:
    return replace(scene, ground=rng.choice([ground for ground in world.grounds if ground != scene.ground]))


def wrong_place(scene: Scene, world: World, rng: random.Random) -> Scene:
    """The same objects elsewhere."""
    looks = [Look(thing.shape, thing.colour, thing.size) for thing in scene.things]
    while True:
        moved = world.place(rng, looks, ground=scene.ground)
        if unmet(strict_spec(scene), moved):
            return moved


def extra_object(scene: Scene, world: World, rng: random.Random) -> Scene:
    """One more object; where there is no room for it, the others make room."""
    extra = world.sample_look(rng, count=len(scene.things) + 1)
    thing = world.find_place(rng, extra, scene.things)
    if thing is not None:
        return replace(scene, things=(*scene.things, thing))
    looks = [Look(thing.shape, thing.colour, thing.size) for thing in scene.things]
    return world.place(rng, [*looks, extra], ground=scene.ground)


def missing_object(scene: Scene, world: World, rng: random.Random) -> Scene:
    gone = rng.choice(scene.things)
    return replace(scene, things=tuple(thing for thing in scene.things if thing is not gone))


OTHER_SCENES = {
    "wrong colour": wrong_colour,
    "wrong shape": wrong_shape,
    "wrong size": wrong_size,
    "wrong ground": wrong_ground,
    "wrong place": wrong_place,
    "extra object": extra_object,
    "missing object": missing_object,
}


# pictures of the scene, spoilt -----------------------------------------------------------------------------


def half_drawn(pictures: Tensor, scenes: Sequence[Scene], rng: random.Random) -> Tensor:
    """One half (left, right, upper or lower) of one object in each picture is not there."""
    spoilt = pictures.clone()
    grid = (torch.arange(pictures.shape[-1]) + 0.5) / pictures.shape[-1]
    for picture, scene in zip(spoilt, scenes, strict=True):
        thing = rng.choice(scene.things)
        width, height = thing.half_box()
        dx, dy = (grid - thing.x)[None], (grid - thing.y)[:, None]
        box = (dx.abs() < width + 0.01) & (dy.abs() < height + 0.01)
        half = rng.choice((dx < 0, dx > 0, dy < 0, dy > 0))
        picture[:, box & half] = torch.tensor(scene.ground.rgb)[:, None] / 255
    return spoilt


def blur(pictures: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur; sigma in pixels."""
    reach = int(4 * sigma + 1)
    kernel = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    padded = F.pad(pictures, (reach,) * 4, mode="replicate").flatten(0, 1)[:, None]
    blurred = F.conv2d(F.conv2d(padded, kernel.reshape(1, 1, 1, -1)), kernel.reshape(1, 1, -1, 1))
    return blurred.reshape(pictures.shape)


def add_noise(pictures: Tensor, sigma: float, rng: random.Random) -> Tensor:
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    return (pictures + sigma * torch.randn(pictures.shape, generator=generator)).clamp(0, 1)


SPOILT = ("half drawn", "blur, 1.5 pixels", "noise, 0.1")
DAMAGES = (*OTHER_SCENES, *SPOILT)


def damaged(
    kind: str, scenes: Sequence[Scene], *, world: World, rng: random.Random, redraw: Redraw
) -> Tensor:
    """Redrawn pictures float[B, 3, side, side] of scenes, each with one damage of a kind from `DAMAGES`."""
    if kind in OTHER_SCENES:
        return redraw(render([OTHER_SCENES[kind](scene, world, rng) for scene in scenes], world.side))
    pictures = redraw(render(scenes, world.side))
    if kind == "half drawn":
        return half_drawn(pictures, scenes, rng)
    return blur(pictures, 1.5) if kind.startswith("blur") else add_noise(pictures, 0.1, rng)


def soften(pictures: Tensor) -> Tensor:
    """What a small autoencoder does: softer edges, colours a little off, shifts of half a pixel, noise."""
    generator = torch.Generator().manual_seed(0)
    shift = torch.rand(len(pictures), 2, generator=generator) - 0.5
    place = torch.eye(2, 3).repeat(len(pictures), 1, 1)
    place[:, :, 2] = shift * 2 / pictures.shape[-1]
    grid = F.affine_grid(place, list(pictures.shape), align_corners=False)
    moved = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    tint = 0.03 * (2 * torch.rand(len(pictures), 3, 1, 1, generator=generator) - 1)
    return add_noise(blur(moved, 0.5) + tint, 0.02, random.Random(0))


# the table -------------------------------------------------------------------------------------------------


def share_accepted(world: World, scenes: Sequence[Scene], draw: Callable[[Sequence[Scene]], Tensor]) -> float:
    """Share of the scenes whose pictures, drawn by `draw`, the judge finds right."""
    accepted = 0
    for start in range(0, len(scenes), BATCH):
        some = scenes[start : start + BATCH]
        verdicts = [
            judge(strict_spec(s), picture, world) for s, picture in zip(some, draw(some), strict=True)
        ]
        accepted += sum(verdict.ok for verdict in verdicts)
    return accepted / len(scenes)


def autoencoded(model: str) -> Redraw:
    """Pictures encoded and decoded by a model's autoencoder, the posterior sampled."""
    autoencoder = load_checkpoint(find_model(model), dtype=torch.float32).autoencoder
    assert autoencoder is not None
    generator = torch.Generator().manual_seed(0)

    def redraw(pictures: Tensor) -> Tensor:
        with torch.no_grad():
            moments = autoencoder.moments(pictures * 2 - 1)
            noise = torch.randn(moments.chunk(2, dim=1)[0].shape, generator=generator)
            return (autoencoder.decode(autoencoder.latents(moments, noise)) + 1) / 2

    return redraw


def measure(
    world: World, scenes: Sequence[Scene], *, redraw: Redraw, damage: int, seed: int
) -> dict[str, float]:
    """The share of redrawn pictures that is accepted, and of `damage` damaged ones that is refused."""
    accepted = share_accepted(world, scenes, lambda some: redraw(render(some, world.side)))
    shares = {"right, accepted": accepted}
    for kind in DAMAGES:
        rng = random.Random(f"{seed}/{kind}")
        draw = partial(damaged, kind, world=world, rng=rng, redraw=redraw)
        shares[f"{kind}, refused"] = 1 - share_accepted(world, scenes[:damage], draw)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", choices=WORLDS, default="nano")
    parser.add_argument("--scenes", type=int, default=10_000, help="pictures that are right")
    parser.add_argument("--damaged", type=int, default=1_000, help="pictures of each kind of damage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--model", help="also judge pictures after this model's autoencoder (nano, or a folder)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    world = free_world(options.world)
    scenes = sample_scenes(world, options.scenes, seed=options.seed)
    redraws: dict[str, Redraw] = {"as rendered": lambda pictures: pictures, "softened": soften}
    if options.model:
        redraws["after the autoencoder"] = autoencoded(options.model)
    start = time.process_time()
    columns = [
        measure(world, scenes, redraw=redraw, damage=options.damaged, seed=options.seed)
        for redraw in redraws.values()
    ]
    seconds = time.process_time() - start
    print("| pictures | " + " | ".join(redraws) + " |\n|---|" + "---|" * len(redraws))
    for row in columns[0]:
        print(f"| {row} | " + " | ".join(f"{column[row]:.2%}" for column in columns) + " |")
    judged = len(redraws) * (len(scenes) + len(DAMAGES) * options.damaged)
    print(f"\n{options.scenes} right, {options.damaged} of each damage; {judged / seconds:.0f} a CPU second")


if __name__ == "__main__":
    main()
