"""The model class for lmms-eval: with the real package where it is installed, else with a stand-in of what
the class uses of its interface (0.7.3).
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from openbagel import Bagel
from openbagel.evals.understanding import LOOKS
from tests import tiny

RED, BLUE = (Image.new("RGB", (12, 8), colour) for colour in ("red", "blue"))
DOCS = [{"shown": [RED]}, {"shown": [BLUE, RED]}, {"shown": []}, {"shown": ["clip.mp4"]}]


@dataclass
class Asked:
    """As lmms-eval's Instance: what its simple models read of a request."""

    args: tuple[Any, ...]


def asked(text: str, place: int, **options: Any) -> Asked:
    return Asked((text, options, lambda doc: doc["shown"], place, "task", "test"))


class Hook:
    def __init__(self) -> None:
        self.kept: list[Any] = []

    def add_partial(self, *told: Any) -> None:
        self.kept.append(told)


def stand_in() -> dict[str, ModuleType]:
    class lmms:  # noqa: N801
        def __init__(self) -> None:
            self.cache_hook, self.task_dict = Hook(), {}

    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None

    names = (
        "lmms_eval",
        "lmms_eval.api",
        "lmms_eval.api.model",
        "lmms_eval.models",
        "lmms_eval.models.registry_v2",
    )
    modules = {name: ModuleType(name) for name in names}
    vars(modules["lmms_eval.api.model"])["lmms"] = lmms
    vars(modules["lmms_eval.models.registry_v2"])["ModelManifest"] = ModelManifest
    return modules


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    if importlib.util.find_spec("lmms_eval") is None:
        for name, module in stand_in().items():
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "openbagel.integrations.lmms_eval", raising=False)
    adapter = importlib.import_module("openbagel.integrations.lmms_eval")
    monkeypatch.setattr(Bagel, "load", lambda name, **options: tiny.bagel())

    def made(**options: Any) -> Any:
        found = adapter.manifest()
        module, _, name = found.simple_class_path.rpartition(".")
        assert (found.model_id, module) == ("openbagel", adapter.__name__)
        one = getattr(adapter, name)("tiny", device="cpu", **options)
        one.task_dict, one.cache_hook = {"task": {"test": DOCS}}, Hook()
        return one

    yield made
    sys.modules.pop("openbagel.integrations.lmms_eval", None)


def alone(text: str, shown: list[Image.Image], **options: Any) -> str:
    return tiny.bagel().using(replace(tiny.SAMPLING, **options)).ask(shown, text)


@pytest.mark.parametrize("batch", [1, 2, "auto"])
def test_answers_are_those_of_the_model(model: Callable[..., Any], batch: int | str) -> None:
    requests = [asked("what?", 0, max_new_tokens=6), asked("and?", 1), asked("hello", 2, max_new_tokens=3)]
    one = model(batch_size=batch, max_batch_size=3)
    told = one.generate_until(requests)
    assert told == [
        alone("what?", [RED], max_tokens=6), alone("and?", [BLUE, RED]), alone("hello", [], max_tokens=3)
    ]  # fmt: skip
    assert one.cache_hook.kept[0] == ("generate_until", ("what?", {"max_new_tokens": 6}), told[0])


def test_options_of_a_task(model: Callable[..., Any]) -> None:
    whole = alone("what?", [RED])
    stop = whole[3]
    cut, kept, drawn = model().generate_until(
        [
            asked("what?", 0, until=[stop, "\n\n"]),
            asked("what?", 0, until="\n\n", temperature=0),
            asked("what?", 0, do_sample=True, temperature=5.0),
        ]
    )
    assert cut == whole[: whole.index(stop)] and kept == whole != drawn
    assert drawn == alone("what?", [RED], temperature=5.0)
    (thought,) = model(think=True).generate_until([asked("what?", 0)])
    assert thought == tiny.bagel().ask(RED, "what?", think=True)


def test_pictures_have_the_published_limits_where_patches_do(
    model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert model().bagel.config.settings == tiny.bagel().config.settings
    limits = replace(tiny.LIMITS, stride=LOOKS.stride, min_size=LOOKS.stride)
    monkeypatch.setattr(Bagel, "load", lambda name, **options: tiny.bagel(vit_limits=limits))
    assert model().bagel.config.settings.vit_limits == LOOKS


def test_what_it_cannot_do_is_refused(model: Callable[..., Any]) -> None:
    one = model()
    with pytest.raises(ValueError, match="task shows str; openbagel answers about pictures"):
        one.generate_until([asked("what?", 3)])
    for refused in (one.loglikelihood, one.generate_until_multi_round):
        with pytest.raises(ValueError, match="choose the form of the task that asks for generate_until"):
            refused([])
