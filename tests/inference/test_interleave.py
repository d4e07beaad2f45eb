"""Conversations in which the model decides, edits in turns: what is fed, what is decided, what comes back."""

import copy
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from openbagel.data import tasks
from openbagel.flow import Guidance
from openbagel.inference import events, interleave
from openbagel.inference.pipeline import Answer, Bagel
from openbagel.sequence import Packer, Text
from openbagel.tokens import THINK_BEFORE_DRAWING
from tests import tiny
from tests.inference.feeding import assert_uncached, joined, layout, photo, png, spied, trained_on, visible

WORDS = ("a red circle", "a blue square")
PLAIN = replace(tiny.SAMPLING, guidance=Guidance(text=1.0), num_timesteps=9, timestep_shift=1.0)


def deciding(**changes: Any) -> Bagel:
    return tiny.bagel(draws_by_itself=True, **changes)


def said(words: str) -> Text:
    return Text(tiny.codec().encode(words))


def script(monkeypatch: pytest.MonkeyPatch, *kinds: str) -> None:
    """Decides in the model's place: texts, pictures, then the end."""
    codec = tiny.codec()
    assert codec.end_of_text is not None
    markers = {"text": codec.start, "picture": codec.vision_start, "end": codec.end_of_text}
    decisions = itertools.chain(kinds, itertools.repeat("end"))
    monkeypatch.setattr(interleave, "next_marker", lambda *_: markers[next(decisions)])


# a model that learned it ------------------------------------------------------------------------------------


PICTURES = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]


def story(pictures: list[Image.Image] = PICTURES) -> dict[str, Any]:
    """Said, then to be written and drawn twice; the model ends after the second picture."""
    first, second = map(png, pictures)
    texts = ["two", WORDS[0], None, WORDS[1], None]
    images = [None, None, first, None, second]
    return {"texts": texts, "images": images, "learned": [False, True, True, True, True]}


@pytest.fixture(scope="module")
def taught() -> Bagel:
    """The tiny model after twenty steps on one story, with marker loss."""
    model = copy.deepcopy(tiny.model()).train()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    packer = Packer(tiny.config(), tiny.codec(), marker_loss=True)
    packs = [packer.pack([trained_on(tasks.web_interleaved, story(), epoch)]) for epoch in range(5)]
    for pack in packs * 4:
        ce, mse = model.losses(pack)
        (ce.mean() + mse.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    settings = tiny.config().settings
    settings = replace(settings, draws_by_itself=True, size=(8, 8), draw=PLAIN, edit=PLAIN, ask=PLAIN)
    config = replace(tiny.config(), settings=settings)
    return Bagel(replace(tiny.checkpoint(), model=model.eval(), config=config))


def test_a_taught_model_writes_draws_and_ends(taught: Bagel, monkeypatch: pytest.MonkeyPatch) -> None:
    with spied(taught, monkeypatch) as spy:
        made = taught.chat(["two"])
    pictures = [part for part in made if isinstance(part, Image.Image)]
    assert made == [WORDS[0], pictures[0], WORDS[1], pictures[1]]
    *learned, end = trained_on(tasks.web_interleaved, story(pictures))
    assert isinstance(end, Text)
    assert end.ids == (tiny.codec().end_of_text,)
    assert layout(spy.fed) == layout(visible(learned))


@pytest.mark.parametrize(("budget", "ended"), [(2, False), (40, True)])
def test_answers_hold_all_that_was_written(taught: Bagel, budget: int, ended: bool) -> None:
    """The end marker too, unless the text ran into its budget."""
    first, *_ = taught.using(replace(PLAIN, max_tokens=budget)).chat(["two"], max_parts=1)
    codec = tiny.codec()
    words = codec.encode(WORDS[0])
    assert isinstance(first, Answer)
    assert first.ids == ((*words, codec.end) if ended else words[:budget])


def test_max_parts_ends_it_too(taught: Bagel) -> None:
    assert taught.chat(["two"], max_parts=1) == [WORDS[0]]
    alone, *_ = taught.engine.drive_all(
        [
            taught.interleave_request(["two"], size=None, seed=0, think=False, max_parts=count)
            for count in (3, 2, 1)
        ]
    )
    assert [type(part) for part in alone] == [Answer, Image.Image, Answer]


# any model --------------------------------------------------------------------------------------------------


def test_decisions_know_three_markers_alone() -> None:
    codec = tiny.codec()
    assert codec.end_of_text is not None
    choices = [codec.start, codec.vision_start, codec.end_of_text]
    for best, marker in enumerate(choices):
        logits = torch.full((len(codec),), 9.0)
        logits[choices] = 1.0
        logits[marker] = 2.0
        assert interleave.next_marker(logits, codec) == choices[best]


def test_branches_of_a_drawing_that_follows_its_own_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """text: all but the text just written; image: the texts alone."""
    script(monkeypatch, "text", "picture", "text", "picture", "picture")
    sampling = replace(tiny.SAMPLING, guidance=Guidance(text=3.0, image=2.0, interval=(0.0, 1.0)))
    bagel = deciding(edit=sampling)
    with spied(bagel, monkeypatch) as spy:
        made = bagel.chat([photo(), "a circle"])
    assert [isinstance(part, str) for part in made] == [True, False, True, False, False]
    for number, (fed, forward, velocities) in enumerate(spy.drawings):
        held = joined(fed)
        texts = [segment for segment in held if isinstance(segment, Text)]
        if number < 6:
            assert_uncached(bagel, forward, velocities, texts, held[:-1], held)
        else:
            assert_uncached(bagel, forward, velocities, texts, held)
    assert len(spy.drawings) == 9


def test_events_and_what_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, "picture", "text")
    heard: list[events.Event] = []
    made = deciding().using(listen=heard.append).chat(["a circle"], seed=4, size=(16, 8))
    picture, answer = made
    assert isinstance(picture, Image.Image)
    assert (picture.size, picture.info["seed"]) == ((8, 16), 4)
    assert isinstance(answer, Answer)
    assert "".join(event.text for event in heard if isinstance(event, events.Text)) == answer
    assert [event.picture for event in heard if isinstance(event, events.Picture)] == [picture]
    assert isinstance(heard[-1], events.Done)
    assert sum(isinstance(event, events.Done) for event in heard) == 1


def test_a_picture_drawn_by_decision_is_the_one_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, "picture")
    (decided,) = deciding().chat([photo(), "a circle"], seed=2)
    (asked,) = tiny.bagel().chat([photo(), "a circle"], seed=2, reply="image")
    assert isinstance(decided, Image.Image)
    assert isinstance(asked, Image.Image)
    assert decided.tobytes() == asked.tobytes()


def test_the_model_may_add_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, "end")
    assert deciding().chat(["a circle"]) == []


@pytest.mark.parametrize("answer", ["", "a circle"], ids=["thought alone", "thought and answer"])
def test_thoughts_go_with_the_first_part(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    codec = tiny.codec()

    def planned(context: Any, speech: Any, **_: Any) -> Any:
        ids = codec.encode(f"<think>plan</think>{answer}")
        yield events.Thought("plan")
        return ids, Text((codec.start, *ids, codec.end), bare=True)

    monkeypatch.setattr(interleave, "compose", planned)
    script(monkeypatch, "picture", "end")
    bagel = deciding()
    with spied(bagel, monkeypatch) as spy:
        made = bagel.chat(["a circle"], think=True)
    assert spy.fed[0] == said(THINK_BEFORE_DRAWING)
    *texts, picture = made
    assert isinstance(picture, Image.Image)
    thoughts = [(text, text.thought) for text in texts if isinstance(text, Answer)]
    assert all(codec.decode(text.ids[:-1]) == f"<think>plan</think>{answer}" for text in texts)
    assert thoughts == ([(answer, "plan")] if answer else [])
    assert picture.info["thought"] == (None if answer else "plan")
    # the thought is no instruction that the text guidance may leave out alone
    held, forward, velocities = spy.drawings[0]
    without = joined(held)[: 2 if answer else 1]
    assert_uncached(bagel, forward, velocities, without, joined(held))


def test_with_nothing_heard_a_model_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    script(monkeypatch, "end")
    bagel = deciding()
    request = bagel.interleave_request([], size=None, seed=0, think=False)
    (text,) = bagel.engine.drive(request)
    assert text == bagel.engine.drive(bagel.write_request([], seed=0, think=False))


@pytest.mark.parametrize(
    ("bagel", "parts", "options", "message"),
    [
        (tiny.bagel(), ["a"], {}, "was not trained to decide"),
        (deciding(), [], {}, "nothing was said or shown"),
        (deciding(), ["a"], {"max_parts": 0}, "max_parts 0 must be at least 1"),
        (deciding(), ["a"], {"size": (3, 8)}, "8x3"),
    ],
)
def test_impossible_conversations_are_refused(bagel: Bagel, parts: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bagel.chat(parts, **options)


# edits in turns ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [1, 2])
def test_edits_in_turns_are_fed_as_training_feeds_them(monkeypatch: pytest.MonkeyPatch, turns: int) -> None:
    bagel, parts = tiny.bagel(), [photo(0), "make it blue", photo(1), "make it red"][: 2 * turns]
    with spied(bagel, monkeypatch) as spy:
        (drawn,) = bagel.chat(parts, reply="image")
    assert isinstance(drawn, Image.Image)
    pictures = [part for part in parts if isinstance(part, Image.Image)]
    texts = [[part] for part in parts if isinstance(part, str)]
    row = {"image_list": [png(one) for one in (*pictures, drawn)], "instruction_list": texts}
    held, forward, _ = spy.drawings[0]
    assert layout([*held, *forward.rows[-1].segments]) == layout(visible(trained_on(tasks.unified_edit, row)))


@pytest.mark.parametrize("reply", ["text", "image"])
def test_thinking_in_a_conversation(reply: Any) -> None:
    parts = ["a circle", photo(0), "make it blue", photo(1, (8, 8)), "and now?"]
    bagel = tiny.bagel()
    (made,) = bagel.chat(parts, reply=reply, think=True)
    (plain,) = bagel.chat(parts, reply=reply)
    assert made != plain
    if isinstance(made, Image.Image):
        assert made.size == (8, 8)
        assert isinstance(made.info["thought"], str)
