"""Understanding: published questions about pictures, asked and read as the reference does.

    row ─▶ pictures, then one text ─▶ reply ─▶ a rule or a judge ─▶ right, from 0 to 1 ─▶ means, in percent

A picture reaches the ViT within the reference's limits. `max_tokens` is one less than its limits, which count
the start marker. Where a server judges, a file is written in the form that it takes.
"""

import ast
import base64
import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from openbagel.checks import retold
from openbagel.config import read_yaml
from openbagel.data.sources import ParquetSource
from openbagel.evals import answers
from openbagel.evals.base import Desk, Made, Sample, Suite, Summary, Verdict, mean
from openbagel.evals.judges import Reply
from openbagel.evals.questions import instructions, rows, samples_of, unpacked
from openbagel.evals.sheet import write_sheet
from openbagel.images import ImageLimits
from openbagel.inference.text import split_thought
from openbagel.tokens import THINK_BEFORE_ANSWERING

Row = dict[str, Any]
Read = Callable[[Path], Iterable[Callable[[], Any]]]
"""A file's rows, each read when it is called: what that raises is the row's problem."""
Ask = Callable[[Path, Path, Any], Sample]
"""A sample of the data's folder, the file and the row."""
Score = Callable[[Sample, Made, Desk], Verdict]

LOOKS = ImageLimits(max_size=980, min_size=378, stride=14, max_pixels=2_007_040)
WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
FACTS = read_yaml(
    Path(__file__).parents[1] / "assets" / "understanding.yaml", "facts", "install the package anew"
)


def _suite(name: str, read: Read, ask: Ask, score: Score, summary: Summary) -> Suite:
    """A benchmark, with the facts of understanding.yaml."""
    facts = FACTS["suites"][name]
    columns, needs = facts.get("columns", {}), f"{', '.join(facts['files'])} from {facts['where']}"
    values = {
        model: {key: float(row[column]) for key, column in columns.items() if column in row}
        for model, row in FACTS["published"].items()
    }

    def found(data: Path) -> Iterator[tuple[str, Any]]:
        there = {pattern: sorted(data.glob(pattern)) for pattern in facts["files"]}
        for pattern in (pattern for pattern, paths in there.items() if not paths):
            raise ValueError(f"there is no {data / pattern}; {name} needs {needs}")
        for path in next(iter(there.values())):
            with retold(f"{path} cannot be read ({{error}}); get a complete copy", csv.Error, UnicodeError):
                for at, row in enumerate(read(path)):
                    yield f"{path.parent.name}/{path.stem}/{at}", (path, row)

    return Suite(
        name=name,
        about=facts["about"],
        needs=needs,
        samples=lambda data: samples_of(found(data), lambda place: ask(data, place[0], place[1]())),
        score=score,
        summary=summary,
        options={"max_tokens": facts["limit"] - 1, "temperature": 0.0},
        looks=LOOKS,
        published={model: row for model, row in values.items() if row},
    )


# rows, pictures ---------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[Callable[[], Any]]:
    for at, line in enumerate(path.read_text("utf-8").strip().split("\n")):
        yield partial(tuple, (at, line))


def _table(path: Path) -> Iterator[Callable[[], Any]]:
    csv.field_size_limit(2**30)  # a field may be a picture
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","):
            yield partial(dict, row)


def _parquet(path: Path) -> Iterator[Callable[[], Any]]:
    source = ParquetSource([path])
    return (partial(source.row, at) for at in range(source.starts[-1]))


def _choices(options: dict[str, str]) -> str:
    return "\n".join(f"{key}. {option}" for key, option in options.items())


# scores -----------------------------------------------------------------------------------------------------


def _verdict(sample: Sample, right: float | None, replies: Sequence[Reply] = (), **more: float) -> Verdict:
    """right None: the model's reply holds no answer."""
    scores = {"right": right or 0.0, "unread": float(right is None), **more}
    reason = f"{'no answer in it; ' if right is None else ''}right is {sample.truth['answer']!r}"
    return Verdict(id=sample.id, group=sample.group, scores=scores, reason=reason, replies=tuple(replies))


def _ruled(rule: Callable[[str, answers.Truth], float | None]) -> Score:
    """A score by rule; without an answer to compare with there is none: a server judges."""

    def score(sample: Sample, made: Made, desk: Desk) -> Verdict:
        if sample.truth["answer"] is None:
            return Verdict(id=sample.id, group=sample.group, reason="the benchmark's server judges")
        return _verdict(sample, rule(made.text, sample.truth), **sample.truth.get("also", {}))

    return score


def _unread(sample: Sample, replies: Sequence[Reply]) -> Verdict:
    problem = "unreadable reply: the judge names no answer"
    return Verdict(id=sample.id, group=sample.group, problem=problem, replies=tuple(replies))


def _unit(verdict: Verdict) -> str:
    """What counts together: the id before its last slash."""
    return verdict.id.rpartition("/")[0]


def _together(verdicts: Sequence[Verdict]) -> float:
    """The share of units that are all right, in percent; each counts as often as it was drawn."""
    units: dict[str, dict[str, float]] = {}
    for verdict in verdicts:
        units.setdefault(_unit(verdict), {})[verdict.id] = verdict.scores["right"]
    drawn = [units[_unit(verdict)] for verdict in verdicts]
    right = sum(1 / len(unit) for unit in drawn if all(unit.values()))
    return 100 * right / sum(1 / len(unit) for unit in drawn) if drawn else math.nan


def _groups(verdicts: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    return {name: [v for v in verdicts if v.group == name] for name in sorted({v.group for v in verdicts})}


def _means(verdicts: Sequence[Verdict], together: str = "") -> dict[str, float]:
    """In percent: units by the name of together, all, replies without an answer, abilities, groups."""
    told = {together: _together(verdicts)} if together else {}
    told |= {"all": 100 * mean(verdicts, "right"), "unread": 100 * mean(verdicts, "unread")}
    able = sorted({name for verdict in verdicts for name in verdict.scores} - {"right", "unread"})
    groups = _groups(verdicts)
    told |= {name: 100 * mean(verdicts, name) for name in able}
    return told | {name: 100 * mean(some, "right") for name, some in groups.items() if len(groups) > 1}


# MME, POPE: yes or no ---------------------------------------------------------------------------------------

MME_KINDS = {
    "perception": "existence count position color posters celebrity scene landmark artwork OCR".split(),
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning".split(),
}


def _mme(data: Path, path: Path, row: tuple[int, str]) -> Sample:
    """A picture's questions: each a line with a tab before its answer. Both files stand in the category's
    folder, or in its folders questions_answers_YN and images.
    """
    question, _, answer = row[1].strip().rpartition("\t")
    kind = path.relative_to(data).parts[0]
    truth = {"answer": ("yes", "no")[("yes", "no").index(answer.lower())]}
    folder = path.parent if path.parent.name == kind else data / kind / "images"
    shown = [file for end in (".png", ".jpg") if (file := folder / f"{path.stem}{end}").is_file()]
    parts = ((shown or [folder / f"{path.stem}.jpg"])[0], f"{question} {WORD}")
    return Sample(id=f"{kind}/{path.stem}/{row[0]}", parts=parts, group=kind, truth=truth)


def _mme_sums(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Of each category accuracy and accuracy+ (both questions about a picture right), in percent, added; sums
    of categories only where none lacks.
    """
    told = {kind: 100 * mean(some, "right") + _together(some) for kind, some in _groups(verdicts).items()}
    whole = {name: sum(told[kind] for kind in some) for name, some in MME_KINDS.items() if {*some} <= {*told}}
    total = {"total": sum(whole.values())} if len(whole) == len(MME_KINDS) else {}
    return {**total, **whole, "unread": 100 * mean(verdicts, "unread"), **told}


MME = replace(_suite("mme", _lines, _mme, _ruled(answers.yes_or_no), _mme_sums), unit=_unit)


def _pope(data: Path, path: Path, row: tuple[int, str]) -> Sample:
    asked, kind = json.loads(row[1]), path.stem.removeprefix("coco_pope_")
    truth = {"answer": asked["label"], "also": {"label": float(("no", "yes").index(asked["label"]))}}
    parts = (data / "val2014" / asked["image"], f"{asked['text']}\n{WORD}")
    return Sample(id=f"{kind}/{row[0]}", parts=parts, group=kind, truth=truth)


def _pope_rates(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Of each set, in percent: accuracy, precision and recall of yes, their F1, and the share of yes; and the
    mean of the F1.
    """
    told: dict[str, float] = {}
    for kind, some in _groups(verdicts).items():
        yes = [v.scores["label"] for v in some if v.scores["right"] == v.scores["label"]]
        hits, truly = sum(yes), sum(v.scores["label"] for v in some)
        told[f"{kind} accuracy"] = 100 * mean(some, "right")
        told[f"{kind} precision"] = 100 * hits / max(len(yes), 1)
        told[f"{kind} recall"] = 100 * hits / max(truly, 1)
        told[f"{kind} f1"] = 200 * hits / max(len(yes) + truly, 1)
        told[f"{kind} yes"] = 100 * len(yes) / len(some)
    f1 = [value for name, value in told.items() if name.endswith("f1")]
    return {"f1": sum(f1) / len(f1) if f1 else math.nan, **told}


POPE = _suite("pope", _lines, _pope, _ruled(answers.denied), _pope_rates)

# MMBench, MMVP: a letter ------------------------------------------------------------------------------------

TURN = 1_000_000
"""Between the indexes of a question and of the same with its options in another order."""


def _mmbench(data: Path, path: Path, row: Row) -> Sample:
    index, options = int(row["index"]), {key: row[key] for key in "ABCDE" if row.get(key)}
    answer = row["answer"] if "_dev" in path.stem else None
    if answer not in (*options, None):
        raise ValueError(f"answer {answer!r} is none of {[*options]}")
    instruction = "请直接回答选项字母。" if "_cn_" in path.stem else LETTER
    asked = [row.get("hint"), row["question"], _choices(options), instruction]
    return Sample(
        id=f"{index % TURN}/{index}",
        parts=(unpacked(data, base64.b64decode(row["image"])), "\n".join(filter(None, asked))),
        group=row.get("category") or "",
        truth={"answer": answer, "options": options, "row": row},
    )


def _by_letter(text: str, truth: answers.Truth) -> float | None:
    said = answers.letter(text, truth["options"])
    return None if said is None else float(said == truth["answer"])


def _mmbench_file(pairs: Sequence[tuple[Sample, Made]], folder: Path) -> Path:
    """The table that the server takes; a reply that names no option goes as it is, for its judge to read."""
    table: list[tuple[str, ...]] = [("index", "question", *"ABCD", "prediction")]
    for truth, text in ((sample.truth, made.text) for sample, made in pairs if sample.truth):
        said = answers.letter(text, truth["options"]) or text
        table.append((*(truth["row"][name] or "" for name in table[0][:-1]), said))
    return write_sheet(folder / "submission.xlsx", table)


_SHARES = partial(_means, together="circular")
MMBENCH = tuple(
    replace(_suite(name, _table, _mmbench, _ruled(_by_letter), _SHARES), unit=_unit, submission=_mmbench_file)
    for name in FACTS["suites"]
    if name.startswith("mmbench")
)


def _mmvp(data: Path, path: Path, row: Row) -> Sample:
    index = int(row.get("Index") or row["lndex"])  # published with either spelling
    first, _, second = row["Options"].replace("(a)", "").partition("(b)")
    options = {"A": first.strip(), "B": second.strip()}
    text = "\n".join([row["Question"], _choices(options), LETTER])
    truth = {"answer": row["Correct Answer"].strip(" ()").upper(), "options": options}
    parts = (data / "MMVP Images" / f"{index}.jpg", text)
    return Sample(id=f"{(index + 1) // 2}/{index}", parts=parts, truth=truth)


_PAIRS = partial(_means, together="pairs")
MMVP = replace(_suite("mmvp", _table, _mmvp, _ruled(_by_letter), _PAIRS), unit=_unit)

# MMMU -------------------------------------------------------------------------------------------------------


def _mmmu(data: Path, path: Path, row: Row, *, cot: bool) -> Sample:
    """Pictures come first, the first one doubled, as the reference has it; `<image 1>` stays in the text."""
    options = dict(zip("ABCDEFGHIJKLM", (text.strip() for text in _listed(row["options"])), strict=False))
    question, told = row["question"].strip(), LETTER if options else WORD
    if options:
        listed = _choices(options)
        question = f"Question: {question} Options: {listed} " if cot else f"{question}\n{listed}"
    before = THINK_BEFORE_ANSWERING.replace("\n", "") + "." if cot else ""
    shown = [(n, row[f"image_{n}"]) for n in range(1, 8)]
    parts = [unpacked(data, picture["bytes"], double=n == 1) for n, picture in shown if picture]
    right = _listed(row["answer"]) if row["answer"].startswith("[") and not options else [row["answer"]]
    truth = {"answer": right, "options": options, "cot": cot}
    parts = (*parts, f"{before}{question}\n{told}")
    return Sample(id=row["id"], parts=parts, group=path.parent.name, truth=truth)


def _listed(text: str) -> list[str]:
    with retold(f"{text!r} is no list", SyntaxError, RecursionError, MemoryError):
        return [str(one) for one in ast.literal_eval(text)]


def _mmmu_right(text: str, truth: answers.Truth) -> float | None:
    """A thought without an end is no answer."""
    text = (split_thought(text)[1] if truth["cot"] else text).strip()
    if not text or not truth["options"]:
        return answers.open_match(text, truth["answer"]) if text else None
    said = (answers.chosen if truth["cot"] else answers.letter)(text, truth["options"])
    return None if said is None else float(said in truth["answer"])


MMMU = _suite("mmmu", _parquet, partial(_mmmu, cot=False), _ruled(_mmmu_right), _means)
MMMU_COT = _suite("mmmu-cot", _parquet, partial(_mmmu, cot=True), _ruled(_mmmu_right), _means)

# MM-Vet, MathVista: with a judge ----------------------------------------------------------------------------


def _entries(path: Path) -> Iterator[Callable[[], Any]]:
    return (partial(tuple, entry) for entry in rows(path))


def _mmvet(data: Path, path: Path, row: tuple[str, Row]) -> Sample:
    id, asked = row
    prompt = instructions(data / "mm-vet_evaluator.py")["prompt"]
    answer = asked["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    truth = {"answer": asked["answer"], "able": [*asked["capability"]]}
    truth["judged"] = f"{prompt}\n{asked['question']} | {answer} | "
    parts = (data / "images" / asked["imagename"], f"{asked['question']} ")  # the space is the reference's
    return Sample(id=id, parts=parts, truth=truth)


def _mmvet_score(sample: Sample, made: Made, desk: Desk) -> Verdict:
    """The grade that a judge gives: its first word, a number from 0 to 1."""
    if desk.judge is None:
        return Verdict(id=sample.id, reason="no judge; submission.json is for the benchmark's own")

    def graded(reply: str) -> float | None:
        word = re.match(r"\s*(0(?:\.\d+)?|1(?:\.0+)?)(?!\S)", reply)
        return float(word[1]) if word else None

    grade, replies = desk.judge.decide(f"{sample.truth['judged']}{made.text} | ", (), graded)
    if grade is None:
        return _unread(sample, replies)
    return _verdict(sample, grade, replies, **dict.fromkeys(sample.truth["able"], grade))


def _mmvet_file(pairs: Sequence[tuple[Sample, Made]], folder: Path) -> Path:
    (path := folder / "submission.json").write_text(
        json.dumps({s.id: made.text for s, made in pairs}), "utf-8"
    )
    return path


MMVET = replace(_suite("mm-vet", _entries, _mmvet, _mmvet_score, _means), submission=_mmvet_file)


def _mathvista(data: Path, path: Path, row: Row) -> Sample:
    demo = instructions(data / "prompts" / "ext_ans.py")["demo_prompt"]
    picture = unpacked(data, row.pop("decoded_image")["bytes"])
    truth = {**row, "judged": f"{demo.strip()}\n\n{row['query']}\n\n"}
    return Sample(id=row["pid"], parts=(picture, row["query"]), group=row["metadata"]["task"], truth=truth)


def _mathvista_score(sample: Sample, made: Made, desk: Desk) -> Verdict:
    """What is an answer already is taken; a judge finds it in anything longer."""
    assert desk.judge is not None
    replies: list[Reply] = []
    found = answers.as_it_is(made.text, sample.truth)
    if found is None and made.text:
        question = f"{sample.truth['judged']}{made.text}\n\nExtracted answer: "
        found, replies = desk.judge.decide(question, (), lambda reply: reply.strip() or None)
        if found is None:
            return _unread(sample, replies)
    said = found and answers.normalised(found, sample.truth)
    return _verdict(sample, float(said == sample.truth["answer"]) if said else None, replies)


MATHVISTA = replace(_suite("mathvista", _parquet, _mathvista, _mathvista_score, _means), judged=True)

# VQA --------------------------------------------------------------------------------------------------------


def _people(path: Path) -> Iterator[Callable[[], Any]]:
    """Questions with their places and their answers, which VQA publishes in a file of their own."""
    tree, known = dict(rows(path)), {}
    if "OpenEnded" in path.name:
        beside = path.with_name(path.name.replace("OpenEnded_", "").replace("questions", "annotations"))
        known = {row["question_id"]: {"answers": row["answers"]} for row in dict(rows(beside))["annotations"]}
    asked = tree.get("questions") or tree.get("data") or tree
    for at, row in asked.items() if isinstance(asked, dict) else enumerate(asked):
        yield lambda at=at, row=row: {"question_id": at, **row, **known.get(row.get("question_id"), {})}


def _vqa(data: Path, path: Path, row: Row, *, name: str) -> Sample:
    facts, said = FACTS["suites"][name], row.get("answers") or [row["answer"]]
    truth = {"answer": [one["answer"] if isinstance(one, dict) else one for one in said]}
    text = " ".join(filter(None, [row["question"], facts.get("told"), WORD]))
    parts = (data / facts["picture"].format(**row), text)
    return Sample(id=str(row["question_id"]), parts=parts, truth=truth)


def _soft(text: str, truth: answers.Truth) -> float:
    """Where one answer is published, whether it is that; else how many people gave it."""
    if len(truth["answer"]) == 1:
        return float(text.strip().rstrip(".").lower() == truth["answer"][0].lower())
    return answers.agreement(text, truth["answer"])


VQA = tuple(
    _suite(name, _people, partial(_vqa, name=name), _ruled(_soft), _means)
    for name, facts in FACTS["suites"].items()
    if "picture" in facts
)
