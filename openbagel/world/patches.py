"""Patches of colour in a picture, and the objects that explain them best.

Solid patches of a known colour are found; each is compared with the shapes, sizes and rotations rendered in
its place. A patch that another one may hide is also compared where nothing hides it, in all places.

Shape suffixes: X any number, K patches, C candidates for them, M templates, Q pairs of colours, P pixels of a
list, H and W pixels.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from openbagel.world.render import coverage
from openbagel.world.scene import (
    COLOUR_RGB,
    GROUND_RGB,
    SYMMETRY,
    Colour,
    Ground,
    Look,
    Shape,
    Size,
    Thing,
    World,
)

PURE = 0.16
"""Pixels closer than this to a palette colour (Euclidean, RGB in [0, 1]) belong to it."""
_GROW = 4
"""An object's pixels reach this far beyond its pure ones; the softness of its edge lies in between."""
_CONTACT = 2
"""Pixels so near to the pure ones of two patches may be a mixture of their colours."""
_COVERED = 0.05
_GAIN = 3.0
"""An object is partly hidden if leaving its neighbours' pixels out makes its error this much less."""
_FINALISTS = 6
_LEAST_SHOWN = 0.4
_WORST_ERROR = 0.35


@dataclass(frozen=True, slots=True)
class Patch:
    """A found object of unknown shape: its colour, the pixels that may be its, and how opaque they are."""

    colour: Colour
    measured_rgb: Tensor
    region_HW: Tensor
    alpha_HW: Tensor


def find_patches(pixels_3HW: Tensor, ground_rgb: Tensor, *, ground: Ground, world: World) -> list[Patch]:
    """The connected patches of the world's colours that are large enough to be an object."""
    side = pixels_3HW.shape[1]
    palette = torch.tensor([GROUND_RGB[ground], *(COLOUR_RGB[colour] for colour in world.colours)]) / 255
    squared_HW, colour_HW = (pixels_3HW[None] - palette[:, :, None, None]).square().sum(dim=1).min(dim=0)
    colour_HW = torch.where(squared_HW < PURE**2, colour_HW, -1).float()
    solid_HW = (colour_HW > 0) & (dilate(colour_HW) == -dilate(-colour_HW))
    if not solid_HW.any():
        return []
    present = colour_HW[solid_HW].unique()
    labels_XHW = _components(colour_HW == present[:, None, None])
    pure_HW = (labels_XHW * torch.isin(labels_XHW, labels_XHW[:, solid_HW])).sum(dim=0)
    labels_HW = pure_HW
    for _ in range(_GROW):
        labels_HW = torch.where(labels_HW > 0, labels_HW, dilate(labels_HW))
    smallest = min(_template(shape, size, 0.0, side)[0] for shape in world.shapes for size in world.sizes)
    patches, kept = [], []
    for label in labels_HW.unique().tolist()[1:]:
        region_HW = labels_HW == label
        inside_HW = region_HW & solid_HW
        colour = world.colours[int(colour_HW[inside_HW][0]) - 1]
        rgb = pixels_3HW[:, inside_HW].median(dim=1).values
        towards = (rgb - ground_rgb) / (rgb - ground_rgb).square().sum()
        alpha_HW = torch.einsum("chw,c->hw", pixels_3HW - ground_rgb[:, None, None], towards) * region_HW
        if alpha_HW.sum() > smallest / 4:
            patches.append(Patch(colour, rgb, region_HW, alpha_HW))
            kept.append(pure_HW == label)
    if world.overlap and len(patches) > 1:
        return _unmixed(patches, torch.stack(kept), pixels_3HW=pixels_3HW, ground_rgb=ground_rgb)
    return patches


def _unmixed(
    patches: Sequence[Patch], pure_KHW: Tensor, *, pixels_3HW: Tensor, ground_rgb: Tensor
) -> list[Patch]:
    """The patches with the pixels between two of them explained as a mixture of two colours near them."""
    near_KHW = dilate(pure_KHW.float(), reach=_CONTACT) > 0
    contact_HW = near_KHW.sum(dim=0) > 1
    if not contact_HW.any():
        return list(patches)
    colours_X3 = torch.stack([ground_rgb, *(patch.measured_rgb for patch in patches)])
    near_XP = torch.cat([torch.ones(1, int(contact_HW.sum()), dtype=torch.bool), near_KHW[:, contact_HW]])
    first, second = torch.combinations(torch.arange(len(colours_X3))).unbind(1)
    step_Q3 = colours_X3[first] - colours_X3[second]
    from_second_QP3 = pixels_3HW[:, contact_HW].mT - colours_X3[second][:, None]
    share_QP = (from_second_QP3 * step_Q3[:, None]).sum(dim=2) / step_Q3.square().sum(dim=1, keepdim=True)
    share_QP = share_QP.nan_to_num().clamp(0, 1)
    error_QP = (from_second_QP3 - share_QP[:, :, None] * step_Q3[:, None]).square().sum(dim=2)
    best_P = error_QP.masked_fill(~(near_XP[first] & near_XP[second]), math.inf).argmin(dim=0)
    share_P = share_QP.gather(0, best_P[None])[0]
    result = []
    for k, patch in enumerate(patches, start=1):
        alpha_HW = patch.alpha_HW.clone()
        alpha_HW[contact_HW] = torch.where(
            first[best_P] == k, share_P, torch.where(second[best_P] == k, 1 - share_P, 0.0)
        )
        region_HW = torch.where(contact_HW, near_KHW[k - 1], patch.region_HW)
        result.append(replace(patch, region_HW=region_HW, alpha_HW=alpha_HW))
    return result


def dilate(values_XHW: Tensor, *, reach: int = 1) -> Tensor:
    """The largest value up to `reach` pixels away from each pixel, in a square."""
    size = values_XHW.shape
    planes = values_XHW.reshape(-1, 1, *size[-2:])
    return F.max_pool2d(planes, 2 * reach + 1, stride=1, padding=reach).reshape(size)


def _components(mask_XHW: Tensor) -> Tensor:
    """A different positive number for each 8-connected component of each mask, 0 outside: float[X, H, W]."""
    numbers = torch.arange(1, mask_XHW.numel() + 1, dtype=torch.float32).reshape(mask_XHW.shape)
    labels_XHW = numbers * mask_XHW
    while True:
        spread = dilate(dilate(labels_XHW) * mask_XHW) * mask_XHW
        if torch.equal(spread, labels_XHW):
            return labels_XHW
        labels_XHW = spread


@lru_cache(maxsize=4096)
def _template(shape: Shape, size: Size, rotation: float, side: int) -> tuple[float, float, float]:
    """The area in pixels of a shape as drawn, and where its centre of mass lies from its centre."""
    covered_HW = coverage([Thing(shape, Colour.RED, size, 0.5, 0.5, rotation)], side)[0]
    x, y = _centre_of_mass(covered_HW)
    return float(covered_HW.sum()), x - 0.5, y - 0.5


def _centre_of_mass(alpha_HW: Tensor) -> tuple[float, float]:
    """x and y in fractions of the side."""
    grid = (torch.arange(alpha_HW.shape[0]) + 0.5) / alpha_HW.shape[0]
    x, y = (alpha_HW.sum(dim=0) * grid).sum(), (alpha_HW.sum(dim=1) * grid).sum()
    return float(x / alpha_HW.sum()), float(y / alpha_HW.sum())


def fit(patches: Sequence[Patch], world: World) -> tuple[list[Patch], list[Thing]]:
    """For each patch the object that explains it best, where it explains it best; the lowest first."""
    alpha_KHW = torch.stack([patch.alpha_HW for patch in patches])
    things = _fit_whole(patches, alpha_KHW, world)
    if not world.overlap:
        return list(patches), things
    seen_KHW = torch.stack([_free_of_others(alpha_KHW, k) for k in range(len(patches))])
    whole = _errors(things, alpha_KHW, torch.ones(()))
    gains = [0.0] * len(patches)
    parts = list(things)
    for k, patch in enumerate(patches):
        if (dilate(alpha_KHW[k], reach=_CONTACT) * (1 - seen_KHW[k])).max() > _COVERED:
            parts[k], error = search(alpha_KHW[k], seen_KHW[k], templates(world, alpha_KHW.shape[1]))
            parts[k] = replace(parts[k], colour=patch.colour)
            gains[k] = float(whole[k]) - error
    order = sorted(range(len(patches)), key=lambda k: -gains[k])
    found = []
    for rank, k in enumerate(order):
        above = sum((alpha_KHW[j] for j in order[rank + 1 :]), torch.zeros(()))
        touched = bool((dilate(alpha_KHW[k], reach=_CONTACT) * above).max() > _COVERED)
        found.append(parts[k] if touched and gains[k] > _GAIN else things[k])
    return [patches[k] for k in order], found


def _free_of_others(alpha_KHW: Tensor, k: int) -> Tensor:
    """1 where no patch but `k` is seen, else 0."""
    others = torch.cat([alpha_KHW[:k], alpha_KHW[k + 1 :]])
    return (others < _COVERED).all(dim=0).float()


def _fit_whole(patches: Sequence[Patch], alpha_KHW: Tensor, world: World) -> list[Thing]:
    candidates: list[Thing] = []
    owners: list[int] = []
    for k, patch in enumerate(patches):
        some = _candidates(patch, world)
        candidates += some
        owners += [k] * len(some)
    errors = _errors(candidates, alpha_KHW[owners], torch.ones(())).tolist()
    best: dict[int, int] = {}
    for c, k in enumerate(owners):
        if k not in best or errors[c] < errors[best[k]]:
            best[k] = c
    return _refine([candidates[c] for c in best.values()], alpha_KHW)


def _errors(things: Sequence[Thing], alpha_CHW: Tensor, seen_HW: Tensor) -> Tensor:
    """Squared error of each rendered object against its patch, where it can be seen: float[C], in pixels."""
    return ((coverage(things, alpha_CHW.shape[-1]) - alpha_CHW).square() * seen_HW).sum(dim=(1, 2))


def _candidates(patch: Patch, world: World) -> list[Thing]:
    """Every shape and size of about the patch's area (at least the nearest), with the same centre of mass."""
    side = patch.alpha_HW.shape[0]
    area = float(patch.alpha_HW.sum())
    x, y = _centre_of_mass(patch.alpha_HW)
    ranked: list[tuple[float, Thing]] = []
    for shape, size in itertools.product(world.shapes, world.sizes):
        for turn in world.turns(shape):
            full, mass_x, mass_y = _template(shape, size, turn, side)
            thing = Look(shape, patch.colour, size).at(x - mass_x, y - mass_y, rotation=turn)
            ranked.append((max(area / full, full / area), thing))
    ranked.sort(key=lambda pair: pair[0])
    return [thing for rank, (ratio, thing) in enumerate(ranked) if ratio < 1.35 or rank == 0]


def _refine(things: Sequence[Thing], alpha_KHW: Tensor, seen_HW: Tensor | None = None) -> list[Thing]:
    """Move every object by one Gauss-Newton step (at most one pixel) towards what its patch shows."""
    side = alpha_KHW.shape[1]
    step = 0.5 / side
    shifts = [(0.0, 0.0), (step, 0.0), (-step, 0.0), (0.0, step), (0.0, -step)]
    moved = [replace(t, x=t.x + dx, y=t.y + dy) for dx, dy in shifts for t in things]
    covered_CHW = coverage(moved, side)
    if seen_HW is not None:
        covered_CHW, alpha_KHW = covered_CHW * seen_HW, alpha_KHW * seen_HW
    here, right, left, down, up = covered_CHW.flatten(1).reshape(5, len(things), -1)
    slopes_KS2 = torch.stack([right - left, down - up], dim=2) / (2 * step)
    error_KS = alpha_KHW.flatten(1) - here
    normal = slopes_KS2.mT @ slopes_KS2 + 1e-3 * torch.eye(2)
    shift_K2 = torch.linalg.solve(normal, (slopes_KS2.mT @ error_KS[:, :, None]))[:, :, 0]
    shifts_K2 = shift_K2.clamp(-1 / side, 1 / side).tolist()
    return [
        replace(t, x=round(t.x + dx, 4), y=round(t.y + dy, 4))
        for t, (dx, dy) in zip(things, shifts_K2, strict=True)
    ]


# partly hidden objects -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Templates:
    """Objects in the middle of a picture, and the Fourier transforms of their coverage and its square."""

    things: tuple[Thing, ...]
    covered_MHW: Tensor
    squared_MHW: Tensor

    @classmethod
    def of(cls, things: Sequence[Thing], side: int) -> "Templates":
        covered_MHW = coverage(things, side)
        return cls(tuple(things), torch.fft.rfft2(covered_MHW), torch.fft.rfft2(covered_MHW.square()))


@lru_cache(maxsize=8)
def templates(world: World, side: int) -> Templates:
    """Every shape, size and rotation of a world."""
    return Templates.of(
        [
            Thing(shape, Colour.RED, size, 0.5, 0.5, turn)
            for shape, size in itertools.product(world.shapes, world.sizes)
            for turn in world.turns(shape)
        ],
        side,
    )


def search(alpha_HW: Tensor, seen_HW: Tensor, known: Templates) -> tuple[Thing, float]:
    """The template and its place that explain `alpha_HW` best where `seen_HW` is 1, with the squared error
    there. All places are tried at once: a correlation is a product of Fourier transforms.
    """
    side = alpha_HW.shape[0]
    seen, both = torch.fft.rfft2(seen_HW), torch.fft.rfft2(seen_HW * alpha_HW)
    product_MHW = seen * known.squared_MHW.conj() - 2 * both * known.covered_MHW.conj()
    errors_M, place_M = torch.fft.irfft2(product_MHW, s=alpha_HW.shape).flatten(1).min(dim=1)
    finalists = errors_M.topk(min(_FINALISTS, len(errors_M)), largest=False).indices.tolist()
    things = []
    for m in finalists:
        down, right = divmod(int(place_M[m]), side)
        x, y = ((shift + side // 2) % side / side for shift in (right, down))
        things.append(replace(known.things[m], x=x, y=y))
    for _ in range(2):
        things = _refine(things, alpha_HW.expand(len(things), -1, -1), seen_HW)
    errors = _errors(things, alpha_HW, seen_HW)
    best = int(errors.argmin())
    return things[best], float(errors[best])


def place_of(thing: Thing, patches: Sequence[Patch]) -> tuple[float, float] | None:
    """Where the patches of its colour show an object, at any rotation; None if they show something else."""
    own = [patch.alpha_HW for patch in patches if patch.colour == thing.colour]
    if not own:
        return None
    alpha_HW, side = torch.stack(own).sum(dim=0), own[0].shape[0]
    others = [patch.alpha_HW for patch in patches if patch.colour != thing.colour]
    seen_HW = (torch.stack(others) < _COVERED).all(dim=0).float() if others else torch.ones(side, side)
    turned = [replace(thing, x=0.5, y=0.5, rotation=turn) for turn in _turns_around(thing)]
    found, error = search(alpha_HW, seen_HW, Templates.of(turned, side))
    covered_HW = coverage([found], side)[0]
    shown = float((covered_HW * seen_HW).sum() / covered_HW.sum())
    outline = float(torch.hypot(covered_HW.diff(dim=0)[:, :-1], covered_HW.diff(dim=1)[:-1]).sum())
    return (found.x, found.y) if shown > _LEAST_SHOWN and error < _WORST_ERROR * outline else None


def _turns_around(thing: Thing) -> list[float]:
    """Rotations that give all looks of an object, the nearest to its own: the centre of a triangle of three
    equal sides is not the middle of its box, so that equal looks may have different centres.
    """
    looks = 3 if thing.shape == Shape.TRIANGLE else SYMMETRY[thing.shape]
    if not looks:
        return [thing.rotation]
    half = max(4, 12 // looks)
    return [thing.rotation + math.pi / looks * step / half for step in range(-half, half + 1)]
