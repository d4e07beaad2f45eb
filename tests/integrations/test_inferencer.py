"""The reference's inferencer on top of `Bagel`: its names and defaults, and equal results bit for bit."""

from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from openbagel.config import Sampling
from openbagel.flow import Guidance, Renorm
from openbagel.inference.pipeline import Bagel
from openbagel.integrations import inferencer as shim
from openbagel.integrations.inferencer import InterleaveInferencer
from tests import tiny

PHOTO = Image.radial_gradient("L").resize((20, 12)).convert("RGB")
QUICK: dict[str, Any] = {"num_timesteps": 3}


@pytest.fixture
def bagel() -> Bagel:
    return tiny.bagel()


def same(one: Any, other: Image.Image) -> bool:
    return isinstance(one, Image.Image) and (one.size, one.tobytes()) == (other.size, other.tobytes())


def seen_sampling(monkeypatch: pytest.MonkeyPatch, bagel: Bagel, **options: Any) -> Sampling:
    seen: list[Sampling] = []
    monkeypatch.setattr(Bagel, "using", lambda self, sampling: seen.append(sampling) or self)
    monkeypatch.setattr(Bagel, "chat", lambda self, parts, **_: [Image.new("RGB", (4, 4))])
    InterleaveInferencer(bagel)(text="a cat", **options)
    return seen[0]


def test_defaults_are_the_references(monkeypatch: pytest.MonkeyPatch, bagel: Bagel) -> None:
    reference = Sampling(
        max_tokens=999,
        max_think_tokens=999,
        guidance=Guidance(3.0, 1.5, (0.4, 1.0), Renorm.GLOBAL, 0.0),
        num_timesteps=50,
        timestep_shift=3.0,
    )
    assert seen_sampling(monkeypatch, bagel) == reference


def test_every_name_of_the_reference_arrives(monkeypatch: pytest.MonkeyPatch, bagel: Bagel) -> None:
    asked = {
        "max_think_token_n": 9,
        "do_sample": True,
        "text_temperature": 0.5,
        "cfg_text_scale": 4.0,
        "cfg_img_scale": 2.0,
        "cfg_interval": [0.0, 1.0],
        "timestep_shift": 2.0,
        "num_timesteps": 7,
        "cfg_renorm_min": 0.25,
        "cfg_renorm_type": "text_channel",
        "enable_taylorseer": True,
    }
    expected = Sampling(
        max_tokens=8,
        max_think_tokens=8,
        temperature=0.5,
        guidance=Guidance(4.0, 2.0, (0.0, 1.0), Renorm.TEXT_CHANNEL, 0.25),
        num_timesteps=7,
        timestep_shift=2.0,
        taylorseer=True,
    )
    assert seen_sampling(monkeypatch, bagel, **asked) == expected


def test_drawing_is_that_of_generate(bagel: Bagel) -> None:
    made = InterleaveInferencer(bagel)(text="a red circle", image_shapes=(12, 8), seed=3, **QUICK)
    like = replace(Sampling(), num_timesteps=3, guidance=Guidance(3.0, 1.5))
    own = bagel.using(like).generate("a red circle", size=(12, 8), seed=3)
    assert made["text"] is None
    assert same(made["image"], own)


def test_editing_is_that_of_edit_and_keeps_the_pictures_size(bagel: Bagel) -> None:
    options = {"cfg_text_scale": 4.0, "cfg_img_scale": 2.0, "cfg_renorm_type": "text_channel", **QUICK}
    made = InterleaveInferencer(bagel)(image=PHOTO, text="make it red", image_shapes=(8, 8), **options)
    like = replace(Sampling(), num_timesteps=3, guidance=Guidance(4.0, 2.0, renorm=Renorm.TEXT_CHANNEL))
    assert same(made["image"], bagel.using(like).edit(PHOTO, "make it red"))
    assert made["image"] is not None and not isinstance(made["image"], str) and made["image"].size == (20, 12)


def test_understanding_is_that_of_ask(bagel: Bagel) -> None:
    options: dict[str, Any] = {"understanding_output": True, "max_think_token_n": 6}
    made = InterleaveInferencer(bagel)(image=PHOTO, text="how many?", **options)
    like = replace(Sampling(), max_tokens=5, max_think_tokens=0)
    assert made == {"image": None, "text": str(bagel.using(like).ask(PHOTO, "how many?"))}
    sampled = InterleaveInferencer(bagel)(text="how many?", do_sample=True, seed=5, **options)
    warm = replace(like, temperature=0.3)
    assert sampled["text"] == str(bagel.using(warm).ask([], "how many?", seed=5))


def test_thinking_tells_the_thought(bagel: Bagel) -> None:
    inferencer = InterleaveInferencer(bagel)
    made = inferencer(text="a red circle", think=True, max_think_token_n=6, image_shapes=(8, 8), **QUICK)
    like = replace(Sampling(), max_tokens=5, max_think_tokens=5, num_timesteps=3, guidance=Guidance(3.0, 1.5))
    own = bagel.using(like).generate("a red circle", size=(8, 8), think=True)
    assert made["text"] == own.info["thought"]
    assert same(made["image"], own)
    told = inferencer(text="why?", think=True, understanding_output=True, max_think_token_n=6)["text"]
    answer = bagel.using(replace(like, max_think_tokens=0)).ask([], "why?", think=True)
    assert isinstance(told, str) and told == bagel.codec.decode(answer.ids).removesuffix("<|im_end|>")


def test_interleaved_inputs_and_options_by_place(bagel: Bagel) -> None:
    inferencer = InterleaveInferencer(bagel)
    (text,) = inferencer.interleave_inference([PHOTO, "what", PHOTO, "and this?"], False, True, 5)
    like = replace(Sampling(), max_tokens=4, max_think_tokens=0)
    assert [text] == bagel.using(like).chat([PHOTO, "what", PHOTO, "and this?"], reply="text")


def test_mistakes_are_told(bagel: Bagel) -> None:
    inferencer = InterleaveInferencer(bagel)
    with pytest.raises(ValueError, match="did you mean 'cfg_text_scale'"):
        inferencer(text="a cat", cfg_txt_scale=4.0)
    with pytest.raises(ValueError, match="renorm 'local' is none of global, channel, text_channel"):
        inferencer(text="a cat", cfg_renorm_type="local")
    with pytest.raises(ValueError, match="nothing was said or shown"):
        inferencer()


def test_one_line_stands_for_the_cells_that_build_the_model() -> None:
    inferencer = InterleaveInferencer.from_pretrained("nano", device="cpu")
    own = Bagel.load("nano", device="cpu")
    made = inferencer(text="a red circle", cfg_img_scale=1.0, num_timesteps=5)
    like = replace(Sampling(), num_timesteps=5, guidance=Guidance(3.0))
    assert same(made["image"], own.using(like).generate("a red circle"))
    assert list(shim.OPTIONS)[:2] == ["think", "understanding_output"]
