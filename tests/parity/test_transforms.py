"""Sizes after resizing and position ids of patches."""

from pathlib import Path

from openbagel.images import ImageLimits, grid_position_ids
from tests.parity.cases import read_json


def test_sizes(golden: Path) -> None:
    cases = read_json(golden / "transforms.json")["resize"]
    wrong = [
        case
        for case in cases
        if ImageLimits(*(case[name] for name in ("max_size", "min_size", "stride", "max_pixels"))).fit(
            case["width"], case["height"], case["img_num"]
        )
        != (case["new_width"], case["new_height"])
    ]
    assert cases
    assert wrong == []


def test_position_ids(golden: Path) -> None:
    cases = read_json(golden / "transforms.json")["position_ids"]
    wrong = [
        (case["h"], case["w"], mode)
        for case in cases
        for mode, stretch in (("extrapolate", False), ("interpolate", True))
        if grid_position_ids(
            (case["h"] // case["patch"], case["w"] // case["patch"]), case["side"], stretch
        ).tolist()
        != case[mode]
    ]
    assert cases
    assert wrong == []
