"""The judge: reads a picture back into a scene, and says whether a picture shows what it was to show.

Analysis by synthesis: the objects that explain the picture's patches of colour are rendered again, and what
the picture shows beyond them decides whether it is clean.

Shape suffixes: K found objects, V views, S shifts, H and W pixels.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from openbagel.world.exercise import Spec
from openbagel.world.language import Phrase, reading_order
from openbagel.world.patches import PURE, Patches, Place, dilate, find_patches, fit, outline_of, place_of
from openbagel.world.render import coverage, render
from openbagel.world.scene import Ground, Scene, Thing, View, World, turn_between

Picture = Tensor | Image.Image
"""A square one: float[3, side, side] in [0, 1], or PIL."""
KEPT_TOLERANCE = 0.08
"""How far, in fractions of the side, an object that has to stay may move."""
KEPT_TURN = 0.3
"""How far, in radians, it may be turned."""
RELATION_MARGIN = 0.1
"""How far centres must differ for a relation to hold: half of what prompts take for clear."""

_LOWEST_CONTRAST = 0.4
_MAX_FOUND = 24
_SHIFT = 2
_SHARP = 0.45
_NOT_FINITE = "the picture has values that are not finite"


_BOUNDS = {
    "patch": (0.4, "something in the picture is no known object"),
    "outline": (0.82, "an object is misshapen"),
    "blur": (0.66, "an object is blurred"),
    "noise": (0.055, "the picture is noisy"),
}
"""How far a picture may be from the rendering of its scene, where all are 0.

`patch` is the worst mean error over 5 × 5 pixels, as a share of the contrast there. `outline` is by how many
pixels the worst object's outline is displaced on average. `blur` is the worst object's leak over its outline
in pixels, which is 0.8 σ for a Gaussian blur. `noise` is the RMS error of a channel where the picture should
be flat.
"""


@dataclass(frozen=True, slots=True)
class Reading:
    """The scene that a picture shows, if it shows one cleanly, and the reason why it is not right, if so."""

    scene: Scene | None
    reason: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason


def judge(spec: Spec, picture: Picture, world: World) -> Reading:
    """Judge a square picture, float[3, side, side] in [0, 1] or PIL, by what it must show."""
    if spec.view is not None:
        return Reading(None, _unlike(_pixels(picture), spec.view, spec.wrong))
    read = parse(picture, world)
    return Reading(read.scene, unmet(spec, read.scene)) if read.scene else read


def unmet(spec: Spec, scene: Scene) -> str:
    """What of `spec` a scene does not fulfil, in words; "" if it fulfils everything."""
    if spec.ground not in (None, scene.ground):
        return f"the ground is {scene.ground} instead of {spec.ground}"
    if len(scene.things) != spec.total:
        return f"there are {len(scene.things)} objects instead of {spec.total}"
    wanted = [*spec.kept, *(phrase for phrase in spec.objects for _ in range(phrase.count))]
    for want in wanted:
        if not any(_fits(want, thing) for thing in scene.things):
            name, place = (want, "") if isinstance(want, Phrase) else (Phrase.of(want), " in its place")
            return f"there is not {name.indefinite()}{place}"
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
    turned = turn_between(want.shape, want.rotation, thing.rotation)
    return want.look == thing.look and moved <= KEPT_TOLERANCE and turned <= KEPT_TURN


def _related(spec: Spec, things: Sequence[Thing]) -> bool:
    """Whether the relations hold for things in the order of the spec's objects, repeated by their counts."""
    starts = list(itertools.accumulate((phrase.count for phrase in spec.objects), initial=0))
    pairs = ((relation, things[starts[a]], things[starts[b]]) for a, relation, b in spec.relations)
    return all(relation.holds(a, b, margin=RELATION_MARGIN) for relation, a, b in pairs)


def parse(picture: Picture, world: World) -> Reading:
    """The scene of a square picture, float[3, side, side] in [0, 1] or PIL; objects from left to right.

    Raises ValueError for a tensor of another shape.
    """
    pixels_3HW = _pixels(picture)
    if not pixels_3HW.isfinite().all():
        return Reading(None, _NOT_FINITE)
    ground, ground_rgb, distance = _ground(pixels_3HW, world)
    if distance > PURE:
        return Reading(None, "the ground has no known colour")
    patches = find_patches(pixels_3HW, ground_rgb, ground=ground, world=world)
    if len(patches.colours) > _MAX_FOUND:
        return Reading(None, f"the picture has more than {_MAX_FOUND} coloured patches")
    patches, things = fit(patches, world) if patches.colours else (patches, [])
    complaint = _complaint(_misfit(pixels_3HW, ground_rgb, patches, things))
    return Reading(None if complaint else Scene(ground, tuple(reading_order(things))), complaint)


def _pixels(picture: Picture) -> Tensor:
    if isinstance(picture, Image.Image):
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 255
    if picture.ndim != 3 or picture.shape[0] != 3 or picture.shape[1] != picture.shape[2]:
        raise ValueError(f"the judge takes square pictures float[3, side, side], not {list(picture.shape)}")
    return picture.detach().to("cpu", torch.float32).clamp(0, 1)


def _ground(pixels_3HW: Tensor, world: World) -> tuple[Ground, Tensor, float]:
    """The ground of the colour that is nearest to the border's median, that median, and how near it is."""
    border = torch.cat([pixels_3HW[:, 0], pixels_3HW[:, -1], pixels_3HW[:, :, 0], pixels_3HW[:, :, -1]], 1)
    rgb = border.median(dim=1).values
    palette = torch.tensor([ground.rgb for ground in world.grounds]) / 255
    distance, index = (palette - rgb).norm(dim=1).min(dim=0)
    return world.grounds[int(index)], rgb, float(distance)


def _misfit(pixels_3HW: Tensor, ground_3: Tensor, patches: Patches, things: list[Thing]) -> dict[str, float]:
    """Compare a picture with the rendering of `things`, in the colours that were measured in it."""
    side = pixels_3HW.shape[1]
    drawn_3HW, contrast_HW = ground_3[:, None, None].expand(3, side, side), torch.zeros(side, side)
    covered_KHW, region_KHW = coverage(things, side), patches.region_KHW
    for rgb, covered_HW, region_HW in zip(patches.rgb_K3, covered_KHW, region_KHW, strict=True):
        drawn_3HW = torch.lerp(drawn_3HW, rgb[:, None, None], covered_HW)
        contrast_HW = contrast_HW.maximum(region_HW * (rgb - ground_3).norm())
    share_HW = (pixels_3HW - drawn_3HW).norm(dim=0) / contrast_HW.where(contrast_HW > 0, _LOWEST_CONTRAST)
    edge_KHW = _near_outline(covered_KHW)
    hidden_KHW = F.pad(covered_KHW, (0, 0, 0, 0, 0, 1))[1:].flip(0).cummax(dim=0).values.flip(0)
    seen_KHW = 1 - dilate(hidden_KHW)
    length_K = (outline_of(covered_KHW) * seen_KHW[:, :-1, :-1]).sum(dim=(1, 2))
    leak_KHW = (patches.alpha_KHW - covered_KHW) * edge_KHW * seen_KHW
    outline, blur = (
        max([0.0, *(error_KHW.sum(dim=(1, 2)) / length_K).tolist()])
        for error_KHW in (leak_KHW.abs(), leak_KHW * (0.5 - covered_KHW).sign())
    )
    patch = float(F.avg_pool2d(share_HW[None], 5, stride=1).max())
    noise = _noise(pixels_3HW - drawn_3HW, edge_KHW)
    return {"patch": patch, "outline": outline, "blur": blur, "noise": noise}


def _complaint(misfit: Mapping[str, float]) -> str:
    """What is wrong with the picture, or "" for a clean one."""
    for name, found in misfit.items():
        most, wrong = _BOUNDS[name]
        if found > most:
            return f"{wrong} ({name} {found:.3f})"
    return ""


def _near_outline(covered_XHW: Tensor) -> Tensor:
    """The pixels within three of an outline."""
    return dilate(covered_XHW, reach=3) + dilate(-covered_XHW, reach=3) > 0.01


def _noise(error_3HW: Tensor, edge_XHW: Tensor) -> float:
    """The RMS error of a channel away from edges."""
    flat = error_3HW[:, ~edge_XHW.any(dim=0)]
    return float(flat.square().mean().sqrt()) if flat.numel() else 0.0


# exact views and clips -------------------------------------------------------------------------------------


def _unlike(pixels_3HW: Tensor, view: View, wrong: Sequence[View]) -> str:
    """Why a picture does not show `view`, or "" if it does: as a whole shifted by up to `_SHIFT` pixels, and
    by one more in places.
    """
    if not pixels_3HW.isfinite().all():
        return _NOT_FINITE
    inner_3HW = pixels_3HW[:, _SHIFT:-_SHIFT, _SHIFT:-_SHIFT]
    inner, views_V3HW = inner_3HW.shape[1], render([view, *wrong], pixels_3HW.shape[1])
    shifted_V3SSHW = views_V3HW.unfold(2, inner, 1).unfold(3, inner, 1)
    errors_VX = (shifted_V3SSHW - inner_3HW[:, None, None]).square().mean(dim=(1, 4, 5)).flatten(1)
    if (errors_VX[1:].amin(dim=1) < errors_VX[0].min()).any():
        return "the picture is nearer to another view"
    down, right = divmod(int(errors_VX[0].argmin()), 2 * _SHIFT + 1)
    drawn_3HW = shifted_V3SSHW[0, :, down, right]
    contrast_HW = (dilate(drawn_3HW, reach=2) + dilate(-drawn_3HW, reach=2)).norm(dim=0)
    around_3SSHW = shifted_V3SSHW[0, :, max(0, down - 1) : down + 2, max(0, right - 1) : right + 2]
    share_SHW = (around_3SSHW - inner_3HW[:, None, None]).norm(dim=0).flatten(0, 1)
    share_SHW = share_SHW / contrast_HW.clamp(min=_LOWEST_CONTRAST)
    patch = float(F.avg_pool2d(share_SHW, 5, stride=1).amin(dim=0).max())
    blur = 0.0 if _sharpness(inner_3HW) >= _SHARP * _sharpness(drawn_3HW) else math.inf
    noise = _noise(inner_3HW - drawn_3HW, _near_outline(drawn_3HW))
    return _complaint({"patch": patch, "blur": blur, "noise": noise})


def _sharpness(pixels_3HW: Tensor) -> float:
    """Squared differences of neighbours: less when the same edges are spread over more pixels."""
    return float(pixels_3HW.diff(dim=1).square().sum() + pixels_3HW.diff(dim=2).square().sum())


def locate(picture: Picture, things: Sequence[Thing], world: World) -> list[Place | None]:
    """Where the centre of each of some objects of different colours is in a square picture, whatever their
    rotation, or None for one that is lost: not there, hidden for the most part, or not recognisable.
    """
    pixels_3HW = _pixels(picture).nan_to_num()
    ground, ground_rgb, _ = _ground(pixels_3HW, world)
    patches = find_patches(pixels_3HW, ground_rgb, ground=ground, world=world)
    return [place_of(thing, patches) for thing in things]
