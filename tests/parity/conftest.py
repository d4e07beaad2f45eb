"""Where the golden numbers are, and one test per batch and case that is found there."""

import os
from pathlib import Path

import pytest

from tests.parity import cases

GOLDEN = Path(os.environ.get("OPENBAGEL_GOLDEN_DIR") or Path(__file__).parent / "golden").resolve()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Fills in `batch`, `batch_with_autoencoder`, `drawing` and `writing` by what the folder holds."""
    if not list(GOLDEN.glob("training-*.json")) or not (GOLDEN / "inference.json").is_file():
        raise pytest.UsageError(f"{GOLDEN} holds no golden numbers; see OPENBAGEL_GOLDEN_DIR")
    batches = cases.training_names(GOLDEN)
    found = {
        "batch": batches,
        "batch_with_autoencoder": [name for name in batches if cases.has_autoencoder(GOLDEN, name)],
        "drawing": cases.case_names(GOLDEN, drawing=True),
        "writing": cases.case_names(GOLDEN, drawing=False),
    }
    for fixture, names in found.items():
        if fixture in metafunc.fixturenames:
            assert names, f"{GOLDEN} holds nothing for the tests of {fixture}"
            metafunc.parametrize(fixture, names, indirect=True)


@pytest.fixture
def golden() -> Path:
    return GOLDEN


@pytest.fixture
def batch(request: pytest.FixtureRequest) -> cases.Batch:
    return cases.training_batch(GOLDEN, request.param)


@pytest.fixture
def batch_with_autoencoder(request: pytest.FixtureRequest) -> cases.Batch:
    return cases.training_batch(GOLDEN, request.param)


@pytest.fixture
def drawing(request: pytest.FixtureRequest) -> cases.Case:
    return cases.inference_case(GOLDEN, request.param)


@pytest.fixture
def writing(request: pytest.FixtureRequest) -> cases.Case:
    return cases.inference_case(GOLDEN, request.param)
