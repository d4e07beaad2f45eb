"""The judge: reads a picture back into a scene, and says whether a picture shows what it was to show.

Analysis by synthesis: the objects that explain the picture's patches of colour are rendered again, and what
the picture shows beyond them decides whether it is clean.

Shape suffixes: K found objects, V views, S shifts, H and W pixels.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from openbagel.world.exercise import Spec
from openbagel.world.language import Phrase
from openbagel.world.patches import PURE, Patch, dilate, find_patches, fit, place_of
from openbagel.world.render import coverage, render
from openbagel.world.scene import GROUND_RGB, Ground, Scene, Thing, View, World, turn_between

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


def judge(spec: Spec, picture: Tensor | Image.Image, world: World) -> Judgement:
    """Judge a square picture, float[3, side, side] in [0, 1] or PIL, by what it must show."""
    if spec.view is not None:
        reason = _unlike(_pixels(picture), spec.view, spec.wrong)
        shown = spec.view if isinstance(spec.view, Scene) and not reason else None
        return Judgement(not reason, reason, shown)
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
    turned = turn_between(want.shape, want.rotation, thing.rotation)
    return Phrase.of(want).matches(thing) and moved <= KEPT_TOLERANCE and turned <= KEPT_TURN


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
    ground_rgb, ground, distance = _ground(pixels_3HW, world)
    if distance > PURE:
        return Parsed(None, "the ground has no known colour")
    patches = find_patches(pixels_3HW, ground_rgb, ground=ground, world=world)
    if len(patches) > _MAX_FOUND:
        return Parsed(None, f"the picture has more than {_MAX_FOUND} coloured patches")
    patches, things = fit(patches, world) if patches else ([], [])
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


def _ground(pixels_3HW: Tensor, world: World) -> tuple[Tensor, Ground, float]:
    """The ground's measured colour (the border's median), the ground of the nearest colour, and how near."""
    border = torch.cat(
        [pixels_3HW[:, 0], pixels_3HW[:, -1], pixels_3HW[:, :, 0], pixels_3HW[:, :, -1]], dim=1
    )
    rgb = border.median(dim=1).values
    palette = torch.tensor([GROUND_RGB[ground] for ground in world.grounds]) / 255
    distance, index = (palette - rgb).norm(dim=1).min(dim=0)
    return rgb, world.grounds[int(index)], float(distance)


def _misfit(
    pixels_3HW: Tensor, ground_rgb: Tensor, *, patches: Sequence[Patch], things: Sequence[Thing]
) -> Misfit:
    """Compare a picture with the rendering of `things`, in the colours that were measured in it."""
    side = pixels_3HW.shape[1]
    drawn_3HW = ground_rgb[:, None, None].expand(3, side, side)
    covered_KHW = coverage(things, side)
    outline_KHW = _near_outline(covered_KHW)
    contrast_HW = torch.zeros(side, side)
    for patch, covered_HW in zip(patches, covered_KHW, strict=True):
        drawn_3HW = torch.lerp(drawn_3HW, patch.measured_rgb[:, None, None], covered_HW)
        contrast_HW = contrast_HW.maximum(patch.region_HW * (patch.measured_rgb - ground_rgb).norm())
    error_3HW = pixels_3HW - drawn_3HW
    share_HW = error_3HW.square().sum(dim=0).sqrt() / contrast_HW.where(contrast_HW > 0, _LOWEST_CONTRAST)
    patch_error = F.avg_pool2d(share_HW[None], 5, stride=1).max()
    outline = blur = 0.0
    hidden_HW = torch.zeros(side, side)
    for k in reversed(range(len(things))):
        covered_HW, seen_HW = covered_KHW[k], 1 - dilate(hidden_HW)
        rows, columns = covered_HW.diff(dim=0)[:, :-1], covered_HW.diff(dim=1)[:-1]
        length = (torch.hypot(rows, columns) * seen_HW[:-1, :-1]).sum()
        leak_HW = (patches[k].alpha_HW - covered_HW) * outline_KHW[k] * seen_HW
        outline = max(outline, float(leak_HW.abs().sum() / length))
        blur = max(blur, float((leak_HW * (0.5 - covered_HW).sign()).sum() / length))
        hidden_HW = hidden_HW.maximum(covered_HW)
    flat = error_3HW[:, ~outline_KHW.any(dim=0)]
    noise = float(flat.square().mean().sqrt()) if flat.numel() else 0.0
    return Misfit(noise, float(patch_error), outline, blur)


def _near_outline(covered_KHW: Tensor) -> Tensor:
    """The pixels within three of an outline."""
    return dilate(covered_KHW, reach=3) + dilate(-covered_KHW, reach=3) > 0.01


# exact views and clips -------------------------------------------------------------------------------------


def _unlike(pixels_3HW: Tensor, view: View, wrong: Sequence[View]) -> str:
    """Why a picture does not show `view`, or "" if it does: as a whole shifted by up to `_SHIFT` pixels, and
    by one more in places.
    """
    if not pixels_3HW.isfinite().all():
        return "the picture has values that are not finite"
    pixels_3HW, side = pixels_3HW.clamp(0, 1), pixels_3HW.shape[1]
    inner_3HW = pixels_3HW[:, _SHIFT:-_SHIFT, _SHIFT:-_SHIFT]
    views_V3HW, inner = render([view, *wrong], side), side - 2 * _SHIFT
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
    flat = (inner_3HW - drawn_3HW)[:, ~_near_outline(drawn_3HW).any(dim=0)]
    return Misfit(
        noise=float(flat.square().mean().sqrt()) if flat.numel() else 0.0,
        patch=float(F.avg_pool2d(share_SHW, 5, stride=1).amin(dim=0).max()),
        outline=0.0,
        blur=0.0 if _sharpness(inner_3HW) >= _SHARP * _sharpness(drawn_3HW) else math.inf,
    ).complaint()


def _sharpness(pixels_3HW: Tensor) -> float:
    """Squared differences of neighbours: less when the same edges are spread over more pixels."""
    return float(pixels_3HW.diff(dim=1).square().sum() + pixels_3HW.diff(dim=2).square().sum())


def locate(
    picture: Tensor | Image.Image, things: Sequence[Thing], world: World
) -> list[tuple[float, float] | None]:
    """Where the centre of each of some objects of different colours is in a square picture, whatever their
    rotation, or None for one that is lost: not there, hidden for the most part, or not recognisable.
    """
    pixels_3HW = _pixels(picture).clamp(0, 1).nan_to_num()
    ground_rgb, ground, _ = _ground(pixels_3HW, world)
    patches = find_patches(pixels_3HW, ground_rgb, ground=ground, world=world)
    return [place_of(thing, patches) for thing in things]
