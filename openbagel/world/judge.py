"""The judge: reads a picture back into a scene, and says whether a picture shows what it was to show.

Analysis by synthesis. Solid patches of a known colour are found, each is compared with the shapes and sizes
rendered in its place, and the scene is rendered again: what the picture shows beyond it decides whether it is
clean.

Shape suffixes: X any number, K found objects, C candidates for them, H and W pixels.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from openbagel.world.language import Phrase
from openbagel.world.render import coverage
from openbagel.world.scene import (
    COLOUR_RGB,
    GROUND_RGB,
    Colour,
    Ground,
    Look,
    Scene,
    Shape,
    Size,
    Thing,
    World,
)
from openbagel.world.tasks import Spec

KEPT_TOLERANCE = 0.08
"""How far, in fractions of the side, an object that has to stay may move."""
RELATION_MARGIN = 0.1
"""How far centres must differ for a relation to hold: half of what prompts take for clear."""

_PURE = 0.16
"""Pixels closer than this to a palette colour (Euclidean, RGB in [0, 1]) belong to it."""
_GROW = 4
"""An object's pixels reach this far beyond its pure ones; the softness of its edge lies in between."""
_LOWEST_CONTRAST = 0.4
_MAX_FOUND = 24


@dataclass(frozen=True, slots=True)
class Misfit:
    """How far a picture is from the rendering of its scene; all are 0 for a perfect picture.

    `noise` is the RMS error of a channel where the picture should be flat. `patch` is the worst mean error
    over 5 × 5 pixels, as a share of the contrast there. `outline` is by how many pixels the worst object's
    outline is displaced on average. `blur` is the worst object's leak over its outline in pixels, which is
    0.8 σ for a Gaussian blur.
    """

    noise: float
    patch: float
    outline: float
    blur: float

    def complaint(self) -> str:
        """What is wrong with the picture, or "" for a clean one."""
        if self.patch > _WORST.patch:
            return f"something in the picture is no known object (patch {self.patch:.2f})"
        if self.outline > _WORST.outline:
            return f"an object is misshapen (outline {self.outline:.2f})"
        if self.blur > _WORST.blur:
            return f"an object is blurred (blur {self.blur:.2f})"
        if self.noise > _WORST.noise:
            return f"the picture is noisy (noise {self.noise:.3f})"
        return ""


_WORST = Misfit(noise=0.055, patch=0.4, outline=0.82, blur=0.66)


@dataclass(frozen=True, slots=True)
class Parsed:
    """The scene that a picture shows, or None and the reason why it shows none cleanly."""

    scene: Scene | None
    reason: str = ""
    misfit: Misfit | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """Whether a picture is right, the reason if not, and the scene it shows if it shows one."""

    ok: bool
    reason: str
    scene: Scene | None


@dataclass(frozen=True, slots=True)
class _Patch:
    """A found object of unknown shape: its colour, the pixels that may be its, and how opaque they are."""

    colour: Colour
    measured_rgb: Tensor
    region_HW: Tensor
    alpha_HW: Tensor


def judge(spec: Spec, picture: Tensor | Image.Image, world: World) -> Judgement:
    """Judge a square picture, float[3, side, side] in [0, 1] or PIL, by what it must show."""
    parsed = parse(picture, world)
    if parsed.scene is None:
        return Judgement(False, parsed.reason, None)
    reason = unmet(spec, parsed.scene)
    return Judgement(not reason, reason, parsed.scene)


def unmet(spec: Spec, scene: Scene) -> str:
    """What of `spec` a scene does not fulfil, in words; "" if it fulfils everything."""
    if spec.ground not in (None, scene.ground):
        return f"the ground is {scene.ground} instead of {spec.ground}"
    if len(scene.things) != spec.total:
        return f"there are {len(scene.things)} objects instead of {spec.total}"
    wanted: list[Phrase | Thing] = [*spec.kept]
    for phrase in spec.objects:
        wanted += [phrase] * phrase.count
    for want in wanted:
        if not any(_fits(want, thing) for thing in scene.things):
            name = want.indefinite() if isinstance(want, Phrase) else Phrase.of(want).indefinite()
            return f"there is not {name}" + ("" if isinstance(want, Phrase) else " in its place")
    matched = False
    for order in itertools.permutations(scene.things):
        if all(map(_fits, wanted, order)):
            matched = True
            if _related(spec, order[len(spec.kept) :]):
                return ""
    return "the objects are not where they should be" if matched else "the objects are not the wanted ones"


def _fits(want: Phrase | Thing, thing: Thing) -> bool:
    if isinstance(want, Phrase):
        return want.matches(thing)
    moved = max(abs(want.x - thing.x), abs(want.y - thing.y))
    return Phrase.of(want).matches(thing) and moved <= KEPT_TOLERANCE


def _related(spec: Spec, things: Sequence[Thing]) -> bool:
    """Whether the relations hold for things in the order of the spec's objects, repeated by their counts."""
    starts = list(itertools.accumulate((phrase.count for phrase in spec.objects), initial=0))
    return all(
        relation.holds(things[starts[a]], things[starts[b]], margin=RELATION_MARGIN)
        for a, relation, b in spec.relations
    )


def parse(picture: Tensor | Image.Image, world: World) -> Parsed:
    """The scene of a square picture, float[3, side, side] in [0, 1] or PIL; objects from left to right.

    Raises ValueError for a tensor of another shape.
    """
    pixels_3HW = _pixels(picture)
    if not pixels_3HW.isfinite().all():
        return Parsed(None, "the picture has values that are not finite")
    pixels_3HW = pixels_3HW.clamp(0, 1)
    border = torch.cat(
        [pixels_3HW[:, 0], pixels_3HW[:, -1], pixels_3HW[:, :, 0], pixels_3HW[:, :, -1]], dim=1
    )
    ground_rgb = border.median(dim=1).values
    ground, distance = _nearest_ground(ground_rgb, world)
    if distance > _PURE:
        return Parsed(None, "the ground has no known colour")
    patches = _find_patches(pixels_3HW, ground_rgb, ground=ground, world=world)
    if len(patches) > _MAX_FOUND:
        return Parsed(None, f"the picture has more than {_MAX_FOUND} coloured patches")
    things = _fit(patches, world) if patches else []
    misfit = _misfit(pixels_3HW, ground_rgb, patches=patches, things=things)
    complaint = misfit.complaint()
    scene = Scene(ground, tuple(sorted(things, key=lambda thing: (thing.x, thing.y))))
    return Parsed(None if complaint else scene, complaint, misfit)


def _pixels(picture: Tensor | Image.Image) -> Tensor:
    if isinstance(picture, Image.Image):
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 255
    if picture.ndim != 3 or picture.shape[0] != 3 or picture.shape[1] != picture.shape[2]:
        raise ValueError(f"the judge takes square pictures float[3, side, side], not {list(picture.shape)}")
    return picture.detach().to("cpu", torch.float32)


def _nearest_ground(rgb: Tensor, world: World) -> tuple[Ground, float]:
    palette = torch.tensor([GROUND_RGB[ground] for ground in world.grounds]) / 255
    distance, index = (palette - rgb).norm(dim=1).min(dim=0)
    return world.grounds[int(index)], float(distance)


def _find_patches(pixels_3HW: Tensor, ground_rgb: Tensor, *, ground: Ground, world: World) -> list[_Patch]:
    """The connected patches of the world's colours that are large enough to be an object."""
    side = pixels_3HW.shape[1]
    palette = torch.tensor([GROUND_RGB[ground], *(COLOUR_RGB[colour] for colour in world.colours)]) / 255
    squared_HW, colour_HW = (pixels_3HW[None] - palette[:, :, None, None]).square().sum(dim=1).min(dim=0)
    colour_HW = torch.where(squared_HW < _PURE**2, colour_HW, -1).float()
    solid_HW = (colour_HW > 0) & (_dilate(colour_HW) == -_dilate(-colour_HW))
    if not solid_HW.any():
        return []
    present = colour_HW[solid_HW].unique()
    labels_XHW = _components(colour_HW == present[:, None, None])
    labels_HW = (labels_XHW * torch.isin(labels_XHW, labels_XHW[:, solid_HW])).sum(dim=0)
    smallest = min(_template(shape, size, side).area for shape in world.shapes for size in world.sizes)
    for _ in range(_GROW):
        labels_HW = torch.where(labels_HW > 0, labels_HW, _dilate(labels_HW))
    patches = []
    for label in labels_HW.unique().tolist()[1:]:
        region_HW = labels_HW == label
        inside_HW = region_HW & solid_HW
        colour = world.colours[int(colour_HW[inside_HW][0]) - 1]
        rgb = pixels_3HW[:, inside_HW].median(dim=1).values
        towards = (rgb - ground_rgb) / (rgb - ground_rgb).square().sum()
        alpha_HW = torch.einsum("chw,c->hw", pixels_3HW - ground_rgb[:, None, None], towards) * region_HW
        if alpha_HW.sum() > smallest / 4:
            patches.append(_Patch(colour, rgb, region_HW, alpha_HW))
    return patches


def _dilate(values_XHW: Tensor, *, reach: int = 1) -> Tensor:
    """The largest value up to `reach` pixels away from each pixel, in a square."""
    size = values_XHW.shape
    planes = values_XHW.reshape(1, -1, *size[-2:])
    return F.max_pool2d(planes, 2 * reach + 1, stride=1, padding=reach).reshape(size)


def _components(mask_XHW: Tensor) -> Tensor:
    """A different positive number for each 8-connected component of each mask, 0 outside: float[X, H, W]."""
    numbers = torch.arange(1, mask_XHW.numel() + 1, dtype=torch.float32).reshape(mask_XHW.shape)
    labels_XHW = numbers * mask_XHW
    while True:
        spread = _dilate(_dilate(labels_XHW) * mask_XHW) * mask_XHW
        if torch.equal(spread, labels_XHW):
            return labels_XHW
        labels_XHW = spread


@dataclass(frozen=True, slots=True)
class _Template:
    """A shape of one size as drawn: its area in pixels and where its centre of mass lies from its centre."""

    area: float
    mass_x: float
    mass_y: float


@lru_cache(maxsize=4096)
def _template(shape: Shape, size: Size, side: int) -> _Template:
    covered_HW = coverage([Thing(shape, Colour.RED, size, 0.5, 0.5)], side)[0]
    x, y = _centre_of_mass(covered_HW)
    return _Template(float(covered_HW.sum()), x - 0.5, y - 0.5)


def _centre_of_mass(alpha_HW: Tensor) -> tuple[float, float]:
    """x and y in fractions of the side."""
    grid = (torch.arange(alpha_HW.shape[0]) + 0.5) / alpha_HW.shape[0]
    x, y = (alpha_HW.sum(dim=0) * grid).sum(), (alpha_HW.sum(dim=1) * grid).sum()
    return float(x / alpha_HW.sum()), float(y / alpha_HW.sum())


def _fit(patches: Sequence[_Patch], world: World) -> list[Thing]:
    """For each patch the object that explains it best, where it explains it best."""
    candidates: list[Thing] = []
    owners: list[int] = []
    for k, patch in enumerate(patches):
        some = _candidates(patch, world)
        candidates += some
        owners += [k] * len(some)
    alpha_CHW = torch.stack([patches[k].alpha_HW for k in owners])
    errors = (coverage(candidates, alpha_CHW.shape[1]) - alpha_CHW).square().sum(dim=(1, 2)).tolist()
    best: dict[int, int] = {}
    for c, k in enumerate(owners):
        if k not in best or errors[c] < errors[best[k]]:
            best[k] = c
    return _refine([candidates[c] for c in best.values()], torch.stack([patch.alpha_HW for patch in patches]))


def _candidates(patch: _Patch, world: World) -> list[Thing]:
    """Every shape and size of about the patch's area (at least the nearest), with the same centre of mass."""
    side = patch.alpha_HW.shape[0]
    area = float(patch.alpha_HW.sum())
    x, y = _centre_of_mass(patch.alpha_HW)
    ranked: list[tuple[float, Thing]] = []
    for shape, size in itertools.product(world.shapes, world.sizes):
        template = _template(shape, size, side)
        ratio = max(area / template.area, template.area / area)
        thing = Look(shape, patch.colour, size).at(x - template.mass_x, y - template.mass_y)
        ranked.append((ratio, thing))
    ranked.sort(key=lambda pair: pair[0])
    return [thing for rank, (ratio, thing) in enumerate(ranked) if ratio < 1.35 or rank == 0]


def _refine(things: Sequence[Thing], alpha_KHW: Tensor) -> list[Thing]:
    """Move every object by one Gauss-Newton step (at most one pixel) towards what its patch shows."""
    side = alpha_KHW.shape[1]
    step = 0.5 / side
    shifts = [(0.0, 0.0), (step, 0.0), (-step, 0.0), (0.0, step), (0.0, -step)]
    moved = [Look(t.shape, t.colour, t.size).at(t.x + dx, t.y + dy) for dx, dy in shifts for t in things]
    here, right, left, down, up = coverage(moved, side).flatten(1).reshape(5, len(things), -1)
    slopes_KS2 = torch.stack([right - left, down - up], dim=2) / (2 * step)
    error_KS = alpha_KHW.flatten(1) - here
    normal = slopes_KS2.mT @ slopes_KS2 + 1e-3 * torch.eye(2)
    shift_K2 = torch.linalg.solve(normal, (slopes_KS2.mT @ error_KS[:, :, None]))[:, :, 0]
    shifts_K2 = shift_K2.clamp(-1 / side, 1 / side).tolist()
    return [
        Look(t.shape, t.colour, t.size).at(round(t.x + dx, 4), round(t.y + dy, 4))
        for t, (dx, dy) in zip(things, shifts_K2, strict=True)
    ]


def _misfit(
    pixels_3HW: Tensor, ground_rgb: Tensor, *, patches: Sequence[_Patch], things: Sequence[Thing]
) -> Misfit:
    """Compare a picture with the rendering of `things`, in the colours that were measured in it."""
    side = pixels_3HW.shape[1]
    drawn_3HW = ground_rgb[:, None, None].expand(3, side, side)
    covered_KHW = coverage(things, side)
    contrast_HW = torch.full((side, side), _LOWEST_CONTRAST)
    for patch, covered_HW in zip(patches, covered_KHW, strict=True):
        drawn_3HW = torch.lerp(drawn_3HW, patch.measured_rgb[:, None, None], covered_HW)
        contrast_HW[patch.region_HW] = float((patch.measured_rgb - ground_rgb).norm())
    error_3HW = pixels_3HW - drawn_3HW
    share_HW = error_3HW.square().sum(dim=0).sqrt() / contrast_HW
    patch_error = F.avg_pool2d(share_HW[None], 5, stride=1).max()
    outline = blur = 0.0
    for patch, covered_HW in zip(patches, covered_KHW, strict=True):
        rows, columns = covered_HW.diff(dim=0)[:, :-1], covered_HW.diff(dim=1)[:-1]
        length = torch.hypot(rows, columns).sum()
        leak_HW = (patch.alpha_HW - covered_HW) * _near_outline(covered_HW)
        outline = max(outline, float(leak_HW.abs().sum() / length))
        blur = max(blur, float((leak_HW * (0.5 - covered_HW).sign()).sum() / length))
    flat = error_3HW[:, ~_near_outline(covered_KHW.sum(dim=0))]
    noise = float(flat.square().mean().sqrt()) if flat.numel() else 0.0
    return Misfit(noise, float(patch_error), outline, blur)


def _near_outline(covered_HW: Tensor) -> Tensor:
    """The pixels within three of an outline."""
    return _dilate(covered_HW, reach=3) + _dilate(-covered_HW, reach=3) > 0.01
