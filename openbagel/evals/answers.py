"""How the understanding benchmarks read an answer: by rules; nothing that a model writes is evaluated.

None stands for an answer that cannot be read; it counts as wrong, and it is counted apart.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from openbagel.evals.questions import FACTS

Truth = Mapping[str, Any]
MARKS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""Words of MMMU's rule after which an open answer may come."""
NUMBERS = re.compile(
    r"-?\b\d{1,3}(?:,\d{3})+\b|-?\d+(?:\.\d+)?e[+-]?\d+|-?(?:\d*\.\d+|\d+\b)(?!e[+-]?\d|[,\d])"
)
WORDS = "none zero one two three four five six seven eight nine ten"
DIGITS: dict[str, str] = dict(zip(WORDS.split(), "0 0 1 2 3 4 5 6 7 8 9 10".split(), strict=True))
ARTICLES = ("a", "an", "the")
WHOLE = FACTS["_shared"]["contractions"].split()
CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in WHOLE for i, x in enumerate(word) if x == "'"}
"""Of VQA's rule, with what people write when they leave an apostrophe out."""


# yes or no, a letter ----------------------------------------------------------------------------------------


def yes_or_no(text: str, truth: Truth) -> float | None:
    """MME's rule: what says yes, true or 是, or no, false, 不是 or 否, within the first four letters."""
    text = text.lower().replace("\n", "")
    for word, plain in (("不是", "no"), ("是", "yes"), ("否", "no"), ("true", "yes"), ("false", "no")):
        text = text.replace(word, plain)
    start = re.sub("[\u4e00-\u9fa5]", "", text)[:4]
    said = next((word for word in ("yes", "no") if word in start), None)
    return None if said is None else float(said == truth["answer"])


def denied(text: str, truth: Truth) -> float:
    """POPE's rule: no where the first sentence (of what is called the answer, after steps) has the word no or
    not, else yes.
    """
    text = final(text) if truth["steps"] else text
    words = text.split(".")[0].replace(",", "").split(" ")
    said = "yes" if {"No", "no", "not"}.isdisjoint(words) else "no"
    return float(said == truth["answer"])


def final(text: str) -> str:
    """What a reply that was asked to go step by step calls its answer, else all of it."""
    found = re.search(r"(?:final answer|answer):\s*(.*)", text, re.IGNORECASE)
    return (found[1] if found else text).strip()


def letter(text: str, options: Mapping[str, str]) -> str | None:
    """The option whose letter a reply begins with, else the first whose words stand in it."""
    if (text := text.strip())[:1] in options:
        return text[0]
    held = [key for key, option in options.items() if option and option in text]
    return held[0] if held and len(text) > 1 else None


def chosen(text: str, options: Mapping[str, str]) -> str | None:
    """MMMU's rule for long replies: the last letter in brackets, else the last that stands alone, else, in
    more than five words, the option whose words come last. It draws no letter where there is none.
    """
    for mark in ",.!?;:'":
        text = text.strip(mark)
    text = f" {text} "
    forms = [(text, {key: f"({key})" for key in options}), (text, {key: f" {key} " for key in options})]
    if len(text.split()) > 5:
        forms.append((text.lower(), {key: option.lower() for key, option in options.items()}))
    for where, looked in forms:
        places = {key: where.rfind(form) for key, form in looked.items()}
        if places and max(places.values()) >= 0:
            return max(places, key=lambda key: places[key])
    return None


# open answers -----------------------------------------------------------------------------------------------


def open_match(text: str, answers: Sequence[str]) -> float:
    """MMMU's rule: a claim holds a right text, or is or holds a right number, rounded to two decimals. Claims
    are the shortest tails of lines after words that announce a result, else the whole reply.
    """
    lines = text.strip().strip(".").lower().split("\n")
    tails = []
    for number, line in enumerate(lines, 1):
        marks = (*MARKS, "=") if number == len(lines) else MARKS
        shortest = ""
        for tail in (line.rpartition(mark)[2].strip() for mark in marks if mark in line):
            shortest = tail if not shortest or len(tail) < len(shortest) else shortest
        tails += [shortest] if shortest not in (*",.:!?;'", "") else []
    tails = tails or ["\n".join(lines)]
    claims = {form for tail in tails for said in (tail, *NUMBERS.findall(tail)) for form in _forms(said)}
    texts = [claim for claim in claims if isinstance(claim, str)]
    for right in (form for answer in answers for form in _forms(answer)):
        if any(right in text for text in texts) if isinstance(right, str) else right in claims:
            return 1.0
    return 0.0


def _forms(text: str) -> list[str | float]:
    """A number, or a text in lower case; a single letter counts only at a word's end."""
    text = text.strip().lower()
    with suppress(ValueError, OverflowError):
        return [round(float(text.replace(",", "")), 2)]
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def agreement(text: str, answers: Sequence[str]) -> float:
    """VQA's soft accuracy: over the people asked, each left out in turn, a third for each other who said the
    same, at most 1.
    """
    said, others = plain(text), [plain(answer) for answer in answers]
    same = others.count(said)
    return sum(min(1.0, (same - (other == said)) / 3) for other in others) / len(others) if same else 0.0


def plain(text: str) -> str:
    """VQA's form of an answer: lower case, number words as digits, no articles, no punctuation but the
    apostrophe, which is put where it was left out of a contraction.
    """
    text = re.sub("[,?]", "", text.lower()).replace("'s", " 's")
    text = whole = re.sub(r"\s", " ", text).strip()
    for mark in ';/[]"{}()=+\\_-><@`!':
        text = text.replace(mark, "" if f"{mark} " in whole or f" {mark}" in whole else " ")
    words = [DIGITS.get(word, word) for word in re.sub(r"\.(?!\d)", "", text).split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


# MathVista --------------------------------------------------------------------------------------------------


def as_it_is(reply: str, problem: Truth) -> str | None:
    """A reply that is an answer already: one of the choices, or a number of the kind that is asked for."""
    if problem["question_type"] == "multi_choice" and reply in (problem["choices"] or ()):
        return reply
    kind = {"integer": int, "float": float}.get(problem["answer_type"])
    with suppress(ValueError):
        return str(kind(reply)) if kind else None
    return None


def normalised(answer: str, problem: Truth) -> str | None:
    """An extracted answer in the form that is asked for: the choice that it names or is nearest to in letters
    changed, or a number rounded; None where it is none.
    """
    if problem["question_type"] == "multi_choice":
        choices, named = problem["choices"], re.search(r"\(([a-zA-Z])\)", answer)
        answer = named[1].upper() if named else answer.strip()
        place = ord(answer) - ord("A") if len(answer) == 1 else -1
        if 0 <= place < len(choices):
            return choices[place]
        return min(choices, key=lambda choice: _changes(answer, choice))
    with suppress(ValueError, OverflowError):
        match problem["answer_type"]:
            case "integer":
                return str(int(float(answer)))
            case "float":
                return str(round(float(answer), int(problem["precision"] or 0)))
            case _:
                return answer
    return None


def _changes(one: str, other: str) -> int:
    """How many letters differ (Levenshtein's distance)."""
    row = list(range(len(other) + 1))
    for place, x in enumerate(one, 1):
        fresh = [place]
        for j, y in enumerate(other):
            fresh.append(min(row[j] + (x != y), row[j + 1] + 1, fresh[j] + 1))
        row = fresh
    return row[-1]
