"""The verbs of `Bagel`: what they return, report and refuse."""

import io
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from openbagel import Bagel, Guidance
from openbagel.config import Sampling, adjusted, from_json, to_json
from openbagel.hub import find_model
from openbagel.inference import events
from openbagel.inference.pipeline import Answer
from openbagel.weights import save_checkpoint
from tests import tiny


@pytest.fixture
def bagel() -> Bagel:
    return tiny.bagel()


def photo(width: int = 16, height: int = 12, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3))
    return Image.fromarray(values.astype(np.uint8))


def listening(bagel: Bagel) -> tuple[Bagel, list[events.Event]]:
    heard: list[events.Event] = []
    return bagel.using(listen=heard.append), heard


def kinds(heard: list[events.Event]) -> list[str]:
    """Names of the events in order, repetitions once."""
    names = [type(event).__name__ for event in heard]
    return [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]


# drawing ----------------------------------------------------------------------------------------------------


def test_generate_draws_a_picture_of_the_default_size(bagel: Bagel) -> None:
    picture = bagel.generate("a red circle", seed=3)
    assert (picture.height, picture.width) == tiny.config().settings.size
    assert picture.info["seed"] == 3
    assert picture.info["thought"] is None
    settings = from_json(Sampling, json.loads(picture.info["settings"]), "info")
    assert settings == tiny.config().settings.draw


def test_seed_decides(bagel: Bagel) -> None:
    torch.manual_seed(1)
    first = bagel.generate("a red circle", seed=0)
    torch.manual_seed(2)
    again, other = bagel.generate("a red circle", seed=0), bagel.generate("a red circle", seed=1)
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


def test_a_list_of_prompts_gives_a_list(bagel: Bagel) -> None:
    prompts = ["a red circle", "a much longer prompt about a blue square", "circles"]
    pictures = bagel.generate(prompts, seed=5)
    assert [picture.info["seed"] for picture in pictures] == [5, 6, 7]
    for i, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        alone = np.asarray(bagel.generate(prompt, seed=5 + i)).astype(int)
        assert np.abs(alone - np.asarray(picture)).max() <= 1


def test_guidance_replaces_the_models_own(bagel: Bagel) -> None:
    own, other = bagel.generate("a", seed=0), bagel.generate("a", seed=0, guidance=Guidance(text=1.0))
    assert own.tobytes() != other.tobytes()
    assert json.loads(other.info["settings"])["guidance"]["text"] == 1.0


@pytest.mark.parametrize("guidance", [3.0, {"text": 3}, {}], ids=str)
def test_guidance_is_a_guidance(bagel: Bagel, guidance: Any) -> None:
    with pytest.raises(ValueError, match=r"is no Guidance; write Guidance\(text=3.0\)"):
        bagel.edit(photo(), "a", guidance=guidance)


@pytest.mark.parametrize("seed", [None, 1.0, "1", -1, 2**63], ids=repr)
def test_impossible_seeds_are_refused(bagel: Bagel, seed: Any) -> None:
    for verb in (bagel.generate, lambda text, seed: bagel.ask([], text, seed=seed)):
        with pytest.raises(ValueError, match="seed .* must be a whole number and lie in"):
            verb("a", seed=seed)


def test_seeds_of_numpy(bagel: Bagel) -> None:
    picture = bagel.edit(photo(), "a", seed=np.int64(3))  # pyright: ignore
    assert picture.tobytes() == bagel.edit(photo(), "a", seed=3).tobytes()
    assert type(picture.info["seed"]) is int
    assert [one.info["seed"] for one in bagel.generate(["a", "b"], seed=np.uint8(255))] == [255, 256]


@pytest.mark.parametrize("size", [(8, 8), (16, 4), (4, 32)])
def test_sizes_are_height_by_width(bagel: Bagel, size: tuple[int, int]) -> None:
    assert bagel.generate("a", size=size).size == (size[1], size[0])


@pytest.mark.parametrize("size", [(0, 8), (8, 10), (36, 8), (-4, 8)])
def test_impossible_sizes_are_refused(bagel: Bagel, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{size[1]}x{size[0]} .*multiples of 4, from 4 to 32"):
        bagel.generate("a", size=size)


@pytest.mark.parametrize("size", [0, 64, "64x64", (), (64,), (8.0, 8.0), (8, 8, 8)], ids=str)
def test_a_size_is_a_pair(bagel: Bagel, size: Any) -> None:
    with pytest.raises(ValueError, match=r"must be \(height, width\) in pixels"):
        bagel.generate("a", size=size)


def test_edit_keeps_the_size_of_the_last_picture(bagel: Bagel, tmp_path: Path) -> None:
    path = tmp_path / "second.png"
    photo(20, 8).save(path)
    assert bagel.edit(photo(), "make it blue").size == (16, 12)
    assert bagel.edit([photo(), path], "mix them").size == (20, 8)
    assert bagel.edit(str(path), "larger", size=(24, 24)).size == (24, 24)


def test_edit_sees_its_picture_and_its_instruction(bagel: Bagel) -> None:
    calm = Guidance(text=2.0, image=1.5, interval=(0.0, 1.0), renorm_min=1.0)
    base = bagel.edit(photo(), "make it blue", guidance=calm).tobytes()
    assert bagel.edit(photo(seed=1), "make it blue", guidance=calm).tobytes() != base
    assert bagel.edit(photo(), "make it red", guidance=calm).tobytes() != base
    assert bagel.edit(photo(), "make it blue", guidance=calm).tobytes() == base


def test_thinking_goes_into_the_picture_and_its_info(bagel: Bagel) -> None:
    thinking, heard = listening(bagel)
    picture = thinking.generate("a red circle", think=True)
    assert kinds(heard) == ["Thought", "Preview", "Picture", "Done"]
    assert picture.tobytes() != bagel.generate("a red circle").tobytes()


def test_a_thought_without_tags_is_kept_too(bagel: Bagel) -> None:
    thinking, heard = listening(bagel)
    picture = thinking.generate("a red circle", think=True)
    streamed = "".join(event.text for event in heard if isinstance(event, events.Thought))
    assert streamed
    assert picture.info["thought"] == streamed.strip()


def test_previews_count_the_steps(bagel: Bagel) -> None:
    watched, heard = listening(bagel)
    picture = watched.generate("a red circle")
    previews = [event for event in heard if isinstance(event, events.Preview)]
    assert [(event.step, event.steps) for event in previews] == [(1, 3), (2, 3), (3, 3)]
    assert all(event.latents.shape == (6, tiny.config().latent_channels) for event in previews)
    assert previews[0].grid == (2, 3)
    assert bagel.decode(previews[-1].latents, (2, 3)).tobytes() == picture.tobytes()
    finished = [event for event in heard if isinstance(event, events.Picture)]
    assert [event.picture for event in finished] == [picture]
    assert kinds(heard) == ["Preview", "Picture", "Done"]


def test_a_listener_cancels_by_raising(bagel: Bagel) -> None:
    class Enough(Exception):
        pass

    def listen(event: events.Event) -> None:
        if isinstance(event, events.Preview) and event.step == 2:
            raise Enough

    before = bagel.engine.passes
    with pytest.raises(Enough):
        bagel.using(listen=listen).generate("a red circle")
    assert bagel.engine.passes - before == 1 + 2 * 2
    assert bagel.generate("a", seed=1).tobytes() == tiny.bagel().generate("a", seed=1).tobytes()


def test_without_autoencoder_nothing_is_drawn() -> None:
    config = tiny.config().understanding_only()
    blind = Bagel(replace(tiny.checkpoint(), autoencoder=None, config=config))
    with pytest.raises(ValueError, match="this model cannot draw: its autoencoder"):
        blind.generate("a red circle")


# writing ----------------------------------------------------------------------------------------------------


def test_ask_answers_in_words(bagel: Bagel, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    photo().save(path)
    answer = bagel.ask(photo(), "how many circles are there?")
    assert isinstance(answer, Answer)
    assert answer.thought is None
    assert bagel.ask(path, "how many circles are there?") == answer
    assert bagel.ask([str(path)], "how many circles are there?") == answer
    for given in (path.read_bytes(), io.BytesIO(path.read_bytes()), map(Image.open, [path])):
        assert bagel.ask(given, "how many circles are there?") == answer
    assert bagel.ask([], "how many circles are there?") != answer


def test_answers_depend_on_what_is_seen(bagel: Bagel) -> None:
    answers = {bagel.ask([photo(seed=i), photo(8, 8, seed=i + 1)], "how many?") for i in range(4)}
    assert len(answers) > 1


@pytest.mark.parametrize("think", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_pieces_make_the_answer(bagel: Bagel, think: bool, temperature: float) -> None:
    sampling = replace(tiny.SAMPLING, temperature=temperature, max_tokens=20)
    for seed in range(3):
        asked, heard = listening(bagel.using(sampling))
        answer = asked.ask(photo(), "how many?", seed=seed, think=think)
        text = "".join(event.text for event in heard if isinstance(event, events.Text | events.Thought))
        assert text == answer
        assert isinstance(heard[-1], events.Done)


def test_temperature_draws_by_seed(bagel: Bagel) -> None:
    warm = bagel.using(replace(tiny.SAMPLING, temperature=3.0))
    answers = [warm.ask([], "how many?", seed=seed) for seed in (0, 0, 1)]
    assert answers[0] == answers[1] != answers[2]


def test_budget_bounds_the_answer(bagel: Bagel) -> None:
    short = bagel.using(replace(tiny.SAMPLING, max_tokens=2))
    before = short.engine.passes
    short.ask([], "how many?")
    assert short.engine.passes - before <= 1 + 2 + 1  # prompt, two tokens, end


def test_using_leaves_the_original_alone(bagel: Bagel) -> None:
    other, _ = listening(bagel.using(replace(tiny.SAMPLING, num_timesteps=9)))
    assert other.config.settings.draw.num_timesteps == 9
    assert bagel.config == tiny.config()
    assert other.model is bagel.model
    assert other.listen is not bagel.listen


# chatting ---------------------------------------------------------------------------------------------------


def test_chat_answers_in_words_or_pictures(bagel: Bagel) -> None:
    parts = ["look:", photo(), "how many?"]
    (answer,) = bagel.chat(parts, reply="text")
    assert isinstance(answer, Answer)
    (picture,) = bagel.chat(parts, reply="image")
    assert isinstance(picture, Image.Image)
    assert picture.size == (16, 12)
    (alone,) = bagel.chat(["a red circle"], reply="image", size=(8, 8), seed=2)
    assert isinstance(alone, Image.Image)
    assert alone.tobytes() == bagel.generate("a red circle", size=(8, 8), seed=2).tobytes()


@pytest.mark.parametrize("part", ["how many circles?", photo()], ids=["text", "picture"])
def test_one_part_is_a_conversation(bagel: Bagel, part: Any) -> None:
    assert bagel.chat(part, reply="text") == bagel.chat([part], reply="text")


def test_only_models_that_learned_it_decide(bagel: Bagel) -> None:
    with pytest.raises(ValueError, match='was not trained to decide .*pass reply="text" or reply="image"'):
        bagel.chat(["draw a circle"])


def test_nothing_said_is_refused(bagel: Bagel) -> None:
    with pytest.raises(ValueError):
        bagel.chat([], reply="text")


def test_unknown_replies_are_refused(bagel: Bagel) -> None:
    with pytest.raises(ValueError, match='"picture" is none of'):
        bagel.chat(["a red circle"], reply="picture")  # pyright: ignore[reportArgumentType]


def test_two_turns_see_more_than_one(bagel: Bagel) -> None:
    rng = random.Random(0)
    first = bagel.chat(["a red circle", "how many?"], reply="text")
    assert first == bagel.chat(["a red circle", "how many?"], reply="text")
    others = [bagel.chat([f"{rng.random()}", "how many?"], reply="text") for _ in range(3)]
    assert any(other != first for other in others)


def test_models_can_be_pickled(bagel: Bagel) -> None:
    torch.save(bagel, file := io.BytesIO())
    again = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert again.generate("a", seed=1).tobytes() == bagel.generate("a", seed=1).tobytes()


# loading ----------------------------------------------------------------------------------------------------


def test_load_from_a_folder(tmp_path: Path, bagel: Bagel) -> None:
    save_checkpoint(tmp_path, tiny.checkpoint())
    loaded = Bagel.load(tmp_path, device="cpu")
    assert loaded.generate("a red circle").tobytes() == bagel.generate("a red circle").tobytes()
    half = Bagel.load(str(tmp_path), device="cpu", dtype="bfloat16")
    with pytest.raises(ValueError, match="dtype 'bf16' is none of float32, bfloat16, float16"):
        Bagel.load(str(tmp_path), device="cpu", dtype="bf16")
    assert half.generate("a red circle").size == (12, 8)
    assert isinstance(half.ask(photo(), "how many?"), Answer)


def test_unknown_load_options_name_the_nearest() -> None:
    with pytest.raises(ValueError, match="'quantise'.*did you mean 'quantize'"):
        Bagel.load("nano", quantise="int8")  # pyright: ignore[reportCallIssue]


def test_load_understanding_only(tmp_path: Path, bagel: Bagel) -> None:
    save_checkpoint(tmp_path, tiny.checkpoint())
    loaded = Bagel.load(tmp_path, device="cpu", understanding_only=True)
    assert loaded.ask(photo(), "how many?") == bagel.ask(photo(), "how many?")


def test_find_model(tmp_path: Path) -> None:
    assert find_model("nano").name == "nano"
    assert find_model(tmp_path) == tmp_path
    for path in ("./a/b", "/a", "~/b", "a/b/c", "alone"):
        assert find_model(path) == Path(path)


def test_unknown_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="somebody/nothing is neither a folder nor a model"):
        Bagel.load("somebody/nothing")


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": -1},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"timestep_shift": 0.0},
        {"eta": 1.5},
        {"eta": 0.5, "taylorseer": True},
    ],
    ids=lambda wrong: str(wrong),
)
def test_impossible_sampling_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        Sampling(**wrong)


def test_forecasts_go_without_new_noise() -> None:
    own = Sampling(eta=1.0)
    assert adjusted(own, {"taylorseer": True}) == Sampling(taylorseer=True)
    with pytest.raises(ValueError, match="set eta to 0"):
        adjusted(own, {"taylorseer": True, "eta": 0.5})


def test_sampling_survives_json() -> None:
    sampling = replace(tiny.SAMPLING, top_p=0.5, taylorseer=True)
    assert from_json(Sampling, json.loads(json.dumps(to_json(sampling))), "x") == sampling
