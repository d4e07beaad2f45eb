"""The words: articles, plurals, places, relations, captions."""

from dataclasses import replace

import pytest

from openbagel.world.language import (
    NUMBERS,
    Phrase,
    caption,
    enumerate_words,
    layout,
    place_name,
    placed,
    places,
)
from openbagel.world.scene import Colour, Ground, Look, Relation, Scene, Shape, Size, Thing

CIRCLE = Thing(Shape.CIRCLE, Colour.RED, Size.LARGE, 0.2, 0.2)
SQUARE = Thing(Shape.SQUARE, Colour.BLUE, Size.SMALL, 0.8, 0.85)


def test_phrases() -> None:
    assert Phrase.of(CIRCLE).indefinite() == "a large red circle"
    assert Phrase.of(CIRCLE, with_size=False).definite() == "the red circle"
    assert Phrase(colour=Colour.ORANGE).indefinite() == "an orange object"
    assert Phrase(Shape.CROSS, Colour.RED, count=3).indefinite() == "three red crosses"
    assert Phrase(Shape.SQUARE).noun(plural=True) == "squares"
    assert Phrase().noun(plural=True) == "objects"


def test_phrases_match_what_they_mention() -> None:
    assert Phrase().matches(CIRCLE) and Phrase.of(CIRCLE).matches(CIRCLE)
    assert Phrase(Shape.CIRCLE).matches(CIRCLE) and not Phrase(Shape.CROSS).matches(CIRCLE)
    assert Phrase(colour=Colour.RED).matches(CIRCLE) and not Phrase(colour=Colour.BLUE).matches(CIRCLE)
    assert Phrase(size=Size.LARGE).matches(CIRCLE) and not Phrase(size=Size.SMALL).matches(CIRCLE)


def test_phrases_may_name_a_place() -> None:
    phrase = placed(CIRCLE)
    assert phrase.indefinite() == "a large red circle at the top left" and phrase.matches(CIRCLE)
    assert not phrase.matches(replace(CIRCLE, x=0.6)) and phrase.matches(replace(CIRCLE, x=0.4))
    assert phrase.matches(Look(Shape.CIRCLE, Colour.RED, Size.LARGE)), "a look has no place"
    assert Phrase(Shape.STAR, count=2, place="top").indefinite() == "two stars at the top"


def test_places_reach_a_little_over_their_cells() -> None:
    for x, near in ((0.3, True), (0.41, True), (0.42, False), (0.0, True), (-0.01, True)):
        assert ("left" in places(replace(CIRCLE, x=x, y=0.5))) == near
    assert "centre" in places(replace(CIRCLE, x=0.3, y=0.3))


def test_there_is_a_word_for_every_number_of_corners() -> None:
    assert max(shape.corners for shape in Shape) < len(NUMBERS)


def test_enumeration() -> None:
    assert enumerate_words(["x", "y", "z"], "or") == "x, y or z"
    assert [enumerate_words(list(words)) for words in ("", "x", "xy", "xyz")] == [
        "",
        "x",
        "x and y",
        "x, y and z",
    ]


@pytest.mark.parametrize(
    ("x", "y", "name"),
    [
        (0.1, 0.1, "top left"),
        (0.5, 0.1, "top"),
        (0.9, 0.1, "top right"),
        (0.1, 0.5, "left"),
        (0.5, 0.5, "centre"),
        (0.9, 0.5, "right"),
        (0.1, 0.9, "bottom left"),
        (0.5, 0.9, "bottom"),
        (1.0, 1.0, "bottom right"),
    ],
)
def test_places(x: float, y: float, name: str) -> None:
    assert place_name(x, y) == name


def test_relations_hold_only_where_they_are_clear() -> None:
    assert [r for r in Relation if r.holds(CIRCLE, SQUARE)] == [Relation.LEFT, Relation.ABOVE]
    assert [r for r in Relation if r.holds(SQUARE, CIRCLE)] == [Relation.RIGHT, Relation.BELOW]
    near = Thing(Shape.CROSS, Colour.RED, Size.SMALL, 0.35, 0.32)
    assert [r for r in Relation if r.holds(CIRCLE, near)] == []
    assert [r for r in Relation if r.holds(CIRCLE, near, margin=0.1)] == [Relation.LEFT, Relation.ABOVE]
    assert all(relation.opposite.opposite is relation for relation in Relation)


def test_captions_and_layouts_read_from_left_to_right() -> None:
    scene = Scene(Ground.WHITE, (SQUARE, CIRCLE))
    assert caption(scene) == "a large red circle and a small blue square on a white ground"
    assert layout(scene) == (
        "a large red circle at the top left and a small blue square at the bottom right on a white ground"
    )
    twice = Scene(Ground.GREY, (SQUARE, CIRCLE, Thing(Shape.SQUARE, Colour.BLUE, Size.SMALL, 0.5, 0.1)))
    assert caption(twice) == "a large red circle and two small blue squares on a grey ground"
