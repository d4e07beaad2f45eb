"""openbagel as a model of lmms-eval, which finds it by the entry point `openbagel` of `lmms_eval.models`.

    python -m lmms_eval --model openbagel --model_args pretrained=ByteDance-Seed/BAGEL-7B-MoT --tasks mme

It answers questions about pictures, greedily unless a task says otherwise.
"""
# pyright: reportMissingImports=false

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from openbagel.config import adjusted
from openbagel.evals.base import AS_THEY_ARE
from openbagel.evals.understanding import LOOKS
from openbagel.inference.engine import Request
from openbagel.inference.pipeline import Answer, Bagel


def manifest() -> ModelManifest:
    """What lmms-eval registers."""
    return ModelManifest(model_id="openbagel", simple_class_path=f"{__name__}.OpenBagel")


class OpenBagel(lmms):
    """pretrained: as `Bagel.load` takes it. Pictures reach the ViT as in the reference's evaluation where the
    model's patches are as large.
    """

    def __init__(
        self,
        pretrained: str = "nano",
        *,
        device: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        quantize: str | None = None,
        think: bool = False,
    ) -> None:
        super().__init__()
        bagel = Bagel.load(pretrained, device=device, quantize=quantize)
        settings = bagel.config.settings
        if settings.vit_limits.stride == LOOKS.stride:
            settings = replace(settings, vit_limits=LOOKS, vae_limits=AS_THEY_ARE)
        self.bagel, self.think = bagel.with_settings(settings), think
        self.batch = int(batch_size) if str(batch_size).isdecimal() else max_batch_size or 8

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests, each cut where the task's stop words begin."""
        said: list[str] = []
        for first in range(0, len(requests), self.batch):
            some = [request.args for request in requests[first : first + self.batch]]
            answers = self.bagel.engine.drive_all([self._asked(args) for args in some])
            for (text, told, *_), answer in zip(some, answers, strict=True):
                stops = told.get("until") or ()
                for stop in filter(str.strip, [stops] if isinstance(stops, str) else stops):
                    answer = str(answer).partition(stop)[0]
                said.append(str(answer))
                self.cache_hook.add_partial("generate_until", (text, told), said[-1])
        return said

    def _asked(self, args: tuple[Any, ...]) -> Request[Answer]:
        text, told, shown, place, task, split = args
        pictures = shown(self.task_dict[task][split][place]) or []
        if odd := [type(one).__name__ for one in pictures if not isinstance(one, Image.Image)]:
            raise ValueError(f"{task} shows {odd[0]}; openbagel answers about pictures, choose such a task")
        options = {"max_tokens": told.get("max_new_tokens"), "temperature": 0.0}
        if told.get("do_sample") or told.get("temperature"):
            options |= {"temperature": told.get("temperature") or 1.0, "top_p": told.get("top_p")}
        bagel = self.bagel.using(adjusted(self.bagel.config.settings.ask, options))
        return bagel.write_request([*pictures, text], seed=0, think=self.think)

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        raise ValueError("openbagel writes answers; choose the form of the task that asks for generate_until")

    generate_until_multi_round = loglikelihood
