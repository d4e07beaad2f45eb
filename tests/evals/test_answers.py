"""How answers are read: every rule on replies whose reading is known."""

import pytest

from openbagel.evals import answers

OPTIONS = {"A": "cat", "B": "Big Dog"}


@pytest.mark.parametrize(
    ("text", "right"),
    [("Yes", 1.0), ("yes, it is", 1.0), ("是", 1.0), ("不是", 0.0), ("否", 0.0), ("True", 1.0), ("\nno", 0.0),
     ("It is, yes", None), ("", None)],
)  # fmt: skip
def test_yes_or_no(text: str, right: float | None) -> None:
    assert answers.yes_or_no(text, {"answer": "yes"}) == right


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A", "A"),
        (" B) dog", "B"),
        ("the dog", "B"),
        ("Cat or", None),
        ("x", None),
        ("", None),
        ("Apple", "A"),
    ],
)
def test_letters(text: str, said: str | None) -> None:
    assert answers.letter(text, {"A": "cat", "B": "dog"}) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [("(A) or rather (B)", "B"), ("A is out, so B .", "B"), ("Answer: A.", "A"), ("big dog", None),
     ("what we see here is a big dog", "B"), ("a cat, no, in truth a Big Dog", "B"), ("", None)],
)  # fmt: skip
def test_long_choices(text: str, said: str | None) -> None:
    assert answers.chosen(text, OPTIONS) == said


@pytest.mark.parametrize(
    ("text", "right", "truth"),
    [
        ("It is 1,200 in all", ["1200.0"], 1.0),
        ("x = 3.14159", ["3.14"], 1.0),
        ("5, 6", ["5"], 0.0),  # a number before a comma is a part of something
        ("1.5e3", ["1500"], 1.0),
        ("the answer is fish", ["f"], 0.0),  # a letter alone
        ("the answer is vitamin f", ["f"], 1.0),
        ("First no.\nThe result is a Red circle.", ["red circle"], 1.0),
        ("a red circle", ["blue"], 0.0),
    ],
)
def test_open_answers(text: str, right: list[str], truth: float) -> None:
    assert answers.open_match(text, right) == truth


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [("(B) 35", "multi_choice", "35°"), ("C", "multi_choice", "35°"), ("145 degrees", "multi_choice", "145°"),
     ("14.9", "integer", "14"), ("x", "integer", None), ("1e999", "integer", None), ("2", "float", "2.0")],
)  # fmt: skip
def test_answers_take_the_form_asked_for(answer: str, kind: str, said: str | None) -> None:
    problem = {"question_type": kind, "answer_type": kind, "choices": ["145°", "35°"], "precision": 2.0}
    assert answers.normalised(answer, problem) == said


@pytest.mark.parametrize(
    ("text", "plain"),
    [("The cat's", "cat 's"), ("two", "2"), ("Don't know.", "don't know"), ("dont know", "don't know"),
     ("ice-cream", "ice cream"), ("1.5", "1.5"), ("10,000", "10000"), ("a; b", "b"), ("were", "were"),
     ("We're", "we're"), ("couldnt've", "couldn't've"), ("None of them", "0 of them")],
)  # fmt: skip
def test_plain_answers(text: str, plain: str) -> None:
    assert answers.plain(text) == plain
