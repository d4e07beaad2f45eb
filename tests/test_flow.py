"""Schedule, interpolation, Euler steps and guidance against their formulas."""

import math

import pytest
import torch
from torch import Tensor

from openbagel.flow import (
    OFFICIAL_APP,
    Guidance,
    Renorm,
    euler,
    guide,
    interpolate,
    renoised,
    schedule,
    shifted,
    velocity_target,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


COND, TEXT, IMAGE = (draw(5, 8, seed=i) for i in range(3))


def test_schedule_counts_points() -> None:
    times = schedule(50, 3.0)
    assert len(times) == 50
    assert (times[0], times[-1]) == (1.0, 0.0)
    assert times == sorted(times, reverse=True)
    expected = [3 * t / (1 + 2 * t) for t in (1 - i / 49 for i in range(50))]
    assert times == pytest.approx(expected, abs=1e-6)


def test_schedule_is_float32() -> None:
    assert schedule(50, 3.0) == torch.tensor(schedule(50, 3.0), dtype=torch.float32).tolist()


@pytest.mark.parametrize("points", [1, 0, -3])
def test_schedule_needs_two_points(points: int) -> None:
    with pytest.raises(ValueError, match=f"num_timesteps {points} must be at least 2"):
        schedule(points, 3.0)


def test_shift_of_one_changes_nothing() -> None:
    t = torch.linspace(0, 1, 11)
    torch.testing.assert_close(shifted(t, 1.0), t)
    assert (shifted(t, 4.0)[1:-1] > t[1:-1]).all()


@pytest.mark.parametrize("points", [2, 7, 50])
def test_true_velocity_leads_from_noise_to_the_picture(points: int) -> None:
    x0, noise = draw(4, 8, seed=3), draw(4, 8, seed=4)
    times = schedule(points, 3.0)
    x = interpolate(x0, noise, times[0])
    torch.testing.assert_close(x, noise)
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        torch.testing.assert_close(x, interpolate(x0, noise, t), rtol=1e-4, atol=1e-5)
        x = euler(x, velocity_target(x0, noise), t, t_next)
    torch.testing.assert_close(x, x0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_new_noise_takes_the_place_of_old(eta: float) -> None:
    x0, noise, fresh = draw(4, 8, seed=3), draw(4, 8, seed=4), draw(4, 8, seed=5)
    x, velocity = interpolate(x0, noise, 0.9), velocity_target(x0, noise)
    mixed = (1 - eta**2) ** 0.5 * noise + eta * fresh
    step = renoised(x, velocity, (0.9, 0.6), fresh, eta)
    torch.testing.assert_close(step, interpolate(x0, mixed, 0.6), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(renoised(x, velocity, (0.9, 0.0), fresh, eta), x0, rtol=1e-4, atol=1e-5)
    if not eta:
        torch.testing.assert_close(step, euler(x, velocity, 0.9, 0.6))


def test_interval_is_open_below_and_tested_in_float32() -> None:
    low = torch.tensor(0.4).item()
    guidance = Guidance(interval=(0.4, 0.9))
    assert low > 0.4
    assert not guidance.acts_at(low)
    assert guidance.acts_at(torch.nextafter(torch.tensor(0.4), torch.tensor(1.0)).item())
    assert guidance.acts_at(torch.tensor(0.9).item())
    assert not guidance.acts_at(0.95)
    assert not Guidance(text=1.0).acts_at(0.5)


def test_official_schedule_guides_41_of_49_steps() -> None:
    assert sum(OFFICIAL_APP.acts_at(t) for t in schedule(50, 3.0)[:-1]) == 41


def test_image_guidance_needs_text_guidance() -> None:
    assert Guidance(text=2.0, image=1.5).uses_image
    assert not Guidance(text=1.0, image=1.5).uses_image
    assert not Guidance(text=2.0, image=1.0).uses_image


def ratio(dims: tuple[int, ...], velocity: Tensor) -> Tensor:
    return COND.norm(dim=dims, keepdim=True) / velocity.norm(dim=dims, keepdim=True)


@pytest.mark.parametrize("renorm_min", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("renorm", "dims"), [(Renorm.GLOBAL, (0, 1)), (Renorm.CHANNEL, (1,))])
def test_renorm_of_the_whole(renorm: Renorm, dims: tuple[int, ...], renorm_min: float) -> None:
    guidance = Guidance(text=4.0, image=2.0, renorm=renorm, renorm_min=renorm_min)
    assert Guidance(text=4.0, image=2.0, renorm=renorm.value, renorm_min=renorm_min) == guidance
    assert Guidance(renorm=renorm.value).renorm is renorm
    velocity = IMAGE + 2 * ((TEXT + 4 * (COND - TEXT)) - IMAGE)
    expected = velocity * ratio(dims, velocity).clamp(renorm_min, 1)
    torch.testing.assert_close(guide(guidance, COND, TEXT, IMAGE), expected)


def test_text_channel_renorm_comes_before_image_guidance() -> None:
    guidance = Guidance(text=4.0, image=2.0, renorm=Renorm.TEXT_CHANNEL)
    by_text = TEXT + 4 * (COND - TEXT)
    by_text = by_text * ratio((1,), by_text).clamp(0, 1)
    torch.testing.assert_close(guide(guidance, COND, TEXT, IMAGE), IMAGE + 2 * (by_text - IMAGE))
    torch.testing.assert_close(guide(guidance, COND, TEXT, None), by_text)


@pytest.mark.parametrize("renorm", Renorm)
def test_renorm_never_lengthens(renorm: Renorm) -> None:
    shorter = COND * 0.1
    guidance = Guidance(text=2.0, renorm=renorm)
    torch.testing.assert_close(guide(guidance, COND, COND + shorter, None), COND - shorter)


@pytest.mark.parametrize("renorm", Renorm)
def test_equal_branches_change_nothing(renorm: Renorm) -> None:
    torch.testing.assert_close(guide(Guidance(text=4.0, renorm=renorm), COND, COND, None), COND)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": (0.5, 0.4)}, "interval"),
        ({"interval": (-0.1, 1.0)}, "interval"),
        ({"renorm_min": 1.5}, "renorm_min 1.5"),
        ({"renorm": "chanel"}, "renorm 'chanel' is none of .*; did you mean 'channel'"),
        ({"renorm": None}, "renorm None is none of global, channel, text_channel"),
        ({"text": math.nan}, "finite, not text nan and image 1.0"),
        ({"image": math.inf}, "finite, not text 4.0 and image inf"),
    ],
)
def test_impossible_guidance_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Guidance(**options)
