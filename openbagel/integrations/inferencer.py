"""The reference's `InterleaveInferencer` on top of `Bagel`, so that its notebooks and scripts run.

    inferencer = InterleaveInferencer.from_pretrained("ByteDance-Seed/BAGEL-7B-MoT")

stands in for the cells that build the model, the autoencoder, the transforms and the tokenizer. Source of the
names and defaults: `inferencer.py` of ByteDance-Seed/Bagel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from openbagel.checks import check_choice
from openbagel.config import Sampling, adjusted
from openbagel.inference.pipeline import Bagel
from openbagel.tokens import MARKERS

OPTIONS: dict[str, tuple[str, Any]] = {
    "think": ("", False),
    "understanding_output": ("", False),
    "max_think_token_n": ("", 1000),
    "do_sample": ("", False),
    "text_temperature": ("", 0.3),
    "cfg_text_scale": ("text_guidance", 3.0),
    "cfg_img_scale": ("image_guidance", 1.5),
    "cfg_interval": ("guidance_interval", (0.4, 1.0)),
    "timestep_shift": ("timestep_shift", 3.0),
    "num_timesteps": ("num_timesteps", 50),
    "cfg_renorm_min": ("renorm_min", 0.0),
    "cfg_renorm_type": ("renorm", "global"),
    "image_shapes": ("", None),
    "enable_taylorseer": ("taylorseer", False),
    "seed": ("", 0),
}
"""The reference's names in its order: what openbagel calls the same, and the default. image_shapes (height,
width) None is the model's own size, 1024x1024 of the 7B. seed is new: the reference takes its noise from the
global generators.
"""


@dataclass(frozen=True, slots=True)
class InterleaveInferencer:
    """Calls of the reference, answered by a `Bagel`."""

    bagel: Bagel

    @classmethod
    def from_pretrained(cls, model: str | Path, **options: Any) -> "InterleaveInferencer":
        """The options are those of `Bagel.load`."""
        return cls(Bagel.load(model, **options))

    def __call__(
        self, image: Image.Image | None = None, text: str | None = None, **options: Any
    ) -> dict[str, str | Image.Image | None]:
        """The picture under "image" (None: none was drawn), the answer or the thought under "text"."""
        made = self.interleave_inference([part for part in (image, text) if part is not None], **options)
        kinds = {"text" if isinstance(part, str) else "image": part for part in made}
        return {"image": None, "text": None} | kinds

    def interleave_inference(
        self, input_lists: Sequence[str | Image.Image], *args: Any, **options: Any
    ) -> list[str | Image.Image]:
        """[answer], [picture] or, with think, [thought, picture]. args are options in the reference's order.

        Answers hold their think tags, the thought of a picture is what stands between them. Pictures given
        decide the size, the last one of several. ValueError for unknown options.
        """
        for name in options:
            check_choice("option", name, OPTIONS)
        defaults = {name: default for name, (_, default) in OPTIONS.items()}
        how = defaults | dict(zip(OPTIONS, args, strict=False)) | options
        tokens = how["max_think_token_n"] - 1  # the reference counts the start marker
        asked = {ours: how[name] for name, (ours, _) in OPTIONS.items() if ours}
        asked |= {"temperature": how["text_temperature"] if how["do_sample"] else 0.0, "max_tokens": tokens}
        asked |= {"max_think_tokens": 0 if how["understanding_output"] else tokens}
        bagel = self.bagel.using(adjusted(Sampling(), asked))
        shows = any(not isinstance(part, str) for part in input_lists)
        size = None if shows or how["image_shapes"] is None else tuple(how["image_shapes"])
        reply: Literal["text", "image"] = "text" if how["understanding_output"] else "image"
        (made,) = bagel.chat(input_lists, reply=reply, size=size, seed=how["seed"], think=how["think"])
        if isinstance(made, str):
            return [bagel.codec.decode(made.ids).removesuffix(MARKERS[1])]
        return [made.info["thought"], made] if how["think"] else [made]
