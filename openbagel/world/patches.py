"""Patches of colour in a picture, and the objects that explain them best.

Solid patches of a known colour are found; each is compared with the shapes, sizes and rotations rendered in
its place. A patch that another one may hide is also compared where nothing hides it, in all places.

Shape suffixes: X any number, K patches, C candidates for them, M templates, Q pairs of colours, P pixels of a
list, H and W pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from openbagel.world.render import coverage
from openbagel.world.scene import Colour, Ground, Shape, Thing, World

Place = tuple[float, float]
"""x and y of a centre, in fractions of the side."""
PURE = 0.16
"""Pixels closer than this to a palette colour (Euclidean, RGB in [0, 1]) belong to it."""
_GROW = 4
"""An object's pixels reach this far beyond its pure ones; the softness of its edge lies in between."""
_CONTACT = 2
"""Pixels so near to the pure ones of two patches may be a mixture of their colours."""
_COVERED = 0.05
_GAIN = 3.0
"""An object is partly hidden if leaving its neighbours' pixels out makes its error this much less."""
_SAME_AREA = math.log(1.35)
_FINALISTS = 6
_LEAST_SHOWN = 0.4
_WORST_ERROR = 0.35
_EVERYWHERE = torch.ones(())


@dataclass(frozen=True, slots=True)
class Patches:
    """Found objects of unknown shapes: their colours, as named and as measured, the pixels that may be
    theirs, and how opaque they are.
    """

    colours: list[Colour]
    rgb_K3: Tensor
    region_KHW: Tensor
    alpha_KHW: Tensor

    def take(self, numbers: Sequence[int]) -> "Patches":
        some = torch.tensor(numbers, dtype=torch.long)
        colours = [self.colours[k] for k in numbers]
        return Patches(colours, self.rgb_K3[some], self.region_KHW[some], self.alpha_KHW[some])


def find_patches(pixels_3HW: Tensor, ground_rgb: Tensor, *, ground: Ground, world: World) -> Patches:
    """The connected patches of the world's colours that are large enough to be an object."""
    palette = torch.tensor([paint.rgb for paint in (ground, *world.colours)]) / 255
    squared_HW, colour_HW = (pixels_3HW[None] - palette[:, :, None, None]).square().sum(dim=1).min(dim=0)
    colour_HW = torch.where(squared_HW < PURE**2, colour_HW, -1).float()
    solid_HW = (colour_HW > 0) & (dilate(colour_HW) == -dilate(-colour_HW))
    if not solid_HW.any():
        nothing = torch.empty(0, *solid_HW.shape)
        return Patches([], torch.empty(0, 3), nothing, nothing)
    labels_XHW = _components(colour_HW == colour_HW[solid_HW].unique()[:, None, None])
    pure_HW = (labels_XHW * torch.isin(labels_XHW, labels_XHW[:, solid_HW])).sum(dim=0)
    labels_HW = pure_HW
    for _ in range(_GROW):
        labels_HW = torch.where(labels_HW > 0, labels_HW, dilate(labels_HW))
    label_K11 = labels_HW.unique()[1:, None, None]
    region_KHW = labels_HW == label_K11
    inside = [region_HW & solid_HW for region_HW in region_KHW]
    rgb_K3 = torch.stack([pixels_3HW[:, inside_HW].median(dim=1).values for inside_HW in inside])
    colours = [world.colours[int(colour_HW[inside_HW][0]) - 1] for inside_HW in inside]
    towards_K3 = (rgb_K3 - ground_rgb) / (rgb_K3 - ground_rgb).square().sum(dim=1, keepdim=True)
    alpha_KHW = torch.einsum("chw,kc->khw", pixels_3HW - ground_rgb[:, None, None], towards_K3) * region_KHW
    patches = Patches(colours, rgb_K3, region_KHW, alpha_KHW)
    large_K = alpha_KHW.sum(dim=(1, 2)) > templates(world, len(pixels_3HW[0])).area_M.min() / 4
    patches, pure_KHW = patches.take(large_K.nonzero()[:, 0].tolist()), (pure_HW == label_K11)[large_K]
    return _unmixed(patches, pure_KHW, pixels_3HW, ground_rgb) if world.overlap else patches


def _unmixed(patches: Patches, pure_KHW: Tensor, pixels_3HW: Tensor, ground_rgb: Tensor) -> Patches:
    """The patches with the pixels between two of them explained as a mixture of two colours near them."""
    near_KHW = dilate(pure_KHW.float(), reach=_CONTACT) > 0
    contact_HW = near_KHW.sum(dim=0) > 1
    if not contact_HW.any():
        return patches
    colours_X3 = torch.cat([ground_rgb[None], patches.rgb_K3])
    near_XP = F.pad(near_KHW[:, contact_HW], (0, 0, 1, 0), value=True)
    first, second = torch.combinations(torch.arange(len(colours_X3))).unbind(1)
    step_Q3 = colours_X3[first] - colours_X3[second]
    from_second_QP3 = pixels_3HW[:, contact_HW].mT - colours_X3[second][:, None]
    share_QP = (from_second_QP3 * step_Q3[:, None]).sum(dim=2) / step_Q3.square().sum(dim=1, keepdim=True)
    share_QP = share_QP.nan_to_num().clamp(0, 1)
    error_QP = (from_second_QP3 - share_QP[:, :, None] * step_Q3[:, None]).square().sum(dim=2)
    best_P = error_QP.masked_fill(~(near_XP[first] & near_XP[second]), math.inf).argmin(dim=0)
    share_P = share_QP.gather(0, best_P[None])[0]
    number_K1 = torch.arange(1, len(colours_X3))[:, None]
    is_first_KP, is_second_KP = first[best_P] == number_K1, second[best_P] == number_K1
    alpha_KHW = patches.alpha_KHW.clone()
    alpha_KHW[:, contact_HW] = is_first_KP * share_P + is_second_KP * (1 - share_P)
    region_KHW = torch.where(contact_HW, near_KHW, patches.region_KHW)
    return replace(patches, region_KHW=region_KHW, alpha_KHW=alpha_KHW)


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


# templates -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Templates:
    """Objects in the middle of a picture: their areas in pixels, their centres of mass, and the Fourier
    transforms of their coverage and its square.
    """

    things: list[Thing]
    area_M: Tensor
    centre_M2: Tensor
    covered_MHW: Tensor
    squared_MHW: Tensor

    @classmethod
    def of(cls, things: list[Thing], side: int) -> "Templates":
        covered_MHW = coverage(things, side)
        transforms = torch.fft.rfft2(covered_MHW), torch.fft.rfft2(covered_MHW.square())
        return cls(things, *_area_and_centre(covered_MHW), *transforms)


@lru_cache(maxsize=8)
def templates(world: World, side: int) -> Templates:
    """Every shape, size and rotation of a world."""
    things = [
        Thing(shape, Colour.RED, size, 0.5, 0.5, turn)
        for shape in world.shapes
        for size in world.sizes
        for turn in world.turns(shape)
    ]
    return Templates.of(things, side)


def _area_and_centre(alpha_XHW: Tensor) -> tuple[Tensor, Tensor]:
    """float[X] in pixels, and the centres of mass float[X, 2], x and y in fractions of the side."""
    grid = (torch.arange(alpha_XHW.shape[1]) + 0.5) / alpha_XHW.shape[1]
    area_X = alpha_XHW.sum(dim=(1, 2))
    return area_X, torch.stack([alpha_XHW.sum(dim=d) @ grid / area_X for d in (1, 2)], dim=1)


def outline_of(covered_XHW: Tensor) -> Tensor:
    """How much outline there is between each pixel and the next ones: float[X, H - 1, W - 1]."""
    return torch.hypot(covered_XHW.diff(dim=1)[:, :, :-1], covered_XHW.diff(dim=2)[:, :-1])


# fitting ---------------------------------------------------------------------------------------------------


def fit(patches: Patches, world: World) -> tuple[Patches, list[Thing]]:
    """For each patch the object that explains it best, where it explains it best; the lowest first."""
    alpha_KHW, known = patches.alpha_KHW, templates(world, patches.alpha_KHW.shape[1])
    things = _fit_whole(patches, known)
    if not world.overlap:
        return patches, things
    covered_KHW = (alpha_KHW >= _COVERED).int()
    seen_KHW = (covered_KHW.sum(dim=0) == covered_KHW).float()
    around_KHW = dilate(alpha_KHW, reach=_CONTACT)
    gains, parts = [0.0] * len(things), list(things)
    for k, error in enumerate(_errors(things, alpha_KHW).tolist()):
        if (around_KHW[k] * (1 - seen_KHW[k])).max() > _COVERED:
            part, least = search(alpha_KHW[k], seen_KHW[k], known)
            gains[k], parts[k] = error - least, replace(part, colour=patches.colours[k])
    order = sorted(range(len(things)), key=lambda k: -gains[k])
    for rank, k in enumerate(order):
        above_HW = alpha_KHW[order[rank + 1 :]].sum(dim=0)
        if gains[k] > _GAIN and (around_KHW[k] * above_HW).max() > _COVERED:
            things[k] = parts[k]
    return patches.take(order), [things[k] for k in order]


def _fit_whole(patches: Patches, known: Templates) -> list[Thing]:
    """The best of the templates of about each patch's area (at least the nearest), put where its centre of
    mass is.
    """
    area_K, centre_K2 = _area_and_centre(patches.alpha_KHW)

    def put(k: int, m: int) -> Thing:
        x, y = (centre_K2[k] - known.centre_M2[m] + 0.5).tolist()
        return replace(known.things[m], colour=patches.colours[k], x=x, y=y)

    ratio_KM = (known.area_M / area_K[:, None]).log().abs()
    near_KM = (ratio_KM < _SAME_AREA) | (ratio_KM == ratio_KM.amin(dim=1, keepdim=True))
    tried = near_KM.nonzero()
    errors_KM = torch.full(near_KM.shape, math.inf)
    errors_KM[near_KM] = _errors([put(*one) for one in tried.tolist()], patches.alpha_KHW[tried[:, 0]])
    best = [put(k, m) for k, m in enumerate(errors_KM.argmin(dim=1).tolist())]
    return _refine(best, patches.alpha_KHW)


def _errors(things: Sequence[Thing], alpha_CHW: Tensor, seen_HW: Tensor = _EVERYWHERE) -> Tensor:
    """Squared error of each rendered object against its patch, where it can be seen: float[C], in pixels."""
    return ((coverage(things, alpha_CHW.shape[-1]) - alpha_CHW).square() * seen_HW).sum(dim=(1, 2))


def _refine(things: Sequence[Thing], alpha_CHW: Tensor, seen_HW: Tensor = _EVERYWHERE) -> list[Thing]:
    """Move every object by one Gauss-Newton step (at most one pixel) towards what its patch shows."""
    side = alpha_CHW.shape[1]
    step = 0.5 / side
    shifts = [(0.0, 0.0), (step, 0.0), (-step, 0.0), (0.0, step), (0.0, -step)]
    moved = [replace(t, x=t.x + dx, y=t.y + dy) for dx, dy in shifts for t in things]
    covered_XHW = coverage(moved, side) * seen_HW
    here, right, left, down, up = covered_XHW.flatten(1).reshape(5, len(things), -1)
    slopes_CS2 = torch.stack([right - left, down - up], dim=2) / (2 * step)
    error_CS1 = ((alpha_CHW * seen_HW).flatten(1) - here)[:, :, None]
    normal = slopes_CS2.mT @ slopes_CS2 + 1e-3 * torch.eye(2)
    shift_C2 = torch.linalg.solve(normal, slopes_CS2.mT @ error_CS1)[:, :, 0].clamp(-1 / side, 1 / side)
    shifted = zip(things, shift_C2.tolist(), strict=True)
    return [replace(t, x=round(t.x + dx, 4), y=round(t.y + dy, 4)) for t, (dx, dy) in shifted]


def search(alpha_HW: Tensor, seen_HW: Tensor, known: Templates) -> tuple[Thing, float]:
    """The template and its place that explain `alpha_HW` best where `seen_HW` is 1, with the squared error
    there. All places are tried at once: a correlation is a product of Fourier transforms.
    """
    side = alpha_HW.shape[0]
    seen, both = torch.fft.rfft2(seen_HW), torch.fft.rfft2(seen_HW * alpha_HW)
    product_MHW = seen * known.squared_MHW.conj() - 2 * both * known.covered_MHW.conj()
    errors_M, place_M = torch.fft.irfft2(product_MHW, s=alpha_HW.shape).flatten(1).min(dim=1)
    things = []
    for m in errors_M.topk(min(_FINALISTS, len(errors_M)), largest=False).indices.tolist():
        down, right = divmod(int(place_M[m]), side)
        x, y = ((shift + side // 2) % side / side for shift in (right, down))
        things.append(replace(known.things[m], x=x, y=y))
    for _ in range(2):
        things = _refine(things, alpha_HW.expand(len(things), -1, -1), seen_HW)
    error, best = _errors(things, alpha_HW, seen_HW).min(dim=0)
    return things[int(best)], float(error)


def place_of(thing: Thing, patches: Patches) -> Place | None:
    """Where the patches of its colour show an object, at any rotation; None if they show something else."""
    own_K = torch.tensor([colour == thing.colour for colour in patches.colours], dtype=torch.bool)
    if not own_K.any():
        return None
    alpha_HW = patches.alpha_KHW[own_K].sum(dim=0)
    seen_HW = (patches.alpha_KHW[~own_K] < _COVERED).all(dim=0).float()
    turned = [replace(thing, x=0.5, y=0.5, rotation=turn) for turn in _turns_around(thing)]
    found, error = search(alpha_HW, seen_HW, Templates.of(turned, len(alpha_HW)))
    covered_1HW = coverage([found], len(alpha_HW))
    shown = float((covered_1HW * seen_HW).sum() / covered_1HW.sum())
    wrong = error >= _WORST_ERROR * float(outline_of(covered_1HW).sum())
    return None if wrong or shown <= _LEAST_SHOWN else (found.x, found.y)


def _turns_around(thing: Thing) -> list[float]:
    """Rotations that give all looks of an object, the nearest to its own: the centre of a triangle of three
    equal sides is not the middle of its box, so that equal looks may have different centres.
    """
    looks = 3 if thing.shape == Shape.TRIANGLE else thing.shape.symmetry
    if not looks:
        return [thing.rotation]
    half = max(4, 12 // looks)
    return [thing.rotation + math.pi / looks * step / half for step in range(-half, half + 1)]
