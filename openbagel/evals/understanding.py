"""Understanding: published questions about pictures, asked and read as the reference does.

    row ─▶ pictures, then one text ─▶ reply ─▶ a rule or a judge ─▶ right, from 0 to 1 ─▶ means, in percent

A picture reaches the ViT within the reference's limits. Where a server judges, a file is written in the form
that it takes.
"""

import ast
import base64
import csv
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from openbagel.checks import retold
from openbagel.data.sources import ParquetSource
from openbagel.evals import answers, questions
from openbagel.evals.base import Desk, Made, Sample, Suite, Verdict, mean
from openbagel.evals.judges import Reply
from openbagel.evals.questions import FACTS, average, filled, means, rows, samples_of, unpacked
from openbagel.evals.sheet import write_sheet
from openbagel.images import ImageLimits
from openbagel.inference.text import split_thought
from openbagel.tokens import THINK_BEFORE_ANSWERING

Read = Callable[[Path], Iterable[Any]]
"""A file's rows; of one that is read when it is called, what that raises is the row's problem."""
Score = Callable[[Sample, Made, Desk], Verdict]

LOOKS = ImageLimits(max_size=980, min_size=378, stride=14, max_pixels=2_007_040)
WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of a published file below `data`, at its place; the suite's facts, and the texts they name."""

    data: Path
    path: Path
    at: int
    row: Any
    facts: Mapping[str, Any]
    texts: Mapping[str, str]


def _suite(name: str, read: Read, ask: Callable[[Entry], Sample], score: Score, **more: Any) -> Suite:
    """A benchmark whose files `data` in benchmarks.yaml describes."""
    facts = FACTS[name]["data"]

    def entries(data: Path, texts: Mapping[str, str]) -> Iterator[tuple[str, Entry]]:
        for path in sorted(data.glob(facts["files"][0])):
            with retold(f"{path} cannot be read ({{error}}); get a complete copy", csv.Error, UnicodeError):
                for at, row in enumerate(read(path)):
                    yield f"{path.parent.name}/{path.stem}/{at}", Entry(data, path, at, row, facts, texts)

    def sample(entry: Entry) -> Sample:
        return ask(replace(entry, row=entry.row()) if callable(entry.row) else entry)

    def samples(data: Path) -> Iterator[Sample]:
        for pattern in facts["files"]:
            if not any(data.glob(pattern)):
                raise ValueError(f"there is no {data / pattern}")
        named = facts.get("texts", {}).items()
        texts = {text: questions.instructions(data / file, text)[text] for file, text in named}
        return samples_of(entries(data, texts), sample)

    score = _elsewhere if facts.get("hidden") else score
    more = {"summary": _means, "reply": "text", "looks": LOOKS, **more}
    return questions.suite(name, samples, score, **more)


# rows, pictures ---------------------------------------------------------------------------------------------


def _lines(path: Path) -> list[str]:
    return path.read_text("utf-8").strip().split("\n")


def _table(path: Path) -> Iterator[dict[str, str]]:
    csv.field_size_limit(2**30)  # a field may be a picture
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")


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
    """A score by rule."""

    def score(sample: Sample, made: Made, desk: Desk) -> Verdict:
        return _verdict(sample, rule(made.text, sample.truth), **sample.truth.get("also", {}))

    return score


def _elsewhere(sample: Sample, made: Made, desk: Desk) -> Verdict:
    return Verdict(id=sample.id, group=sample.group, reason="the benchmark's server judges")


def _said(text: str, truth: answers.Truth) -> str | None:
    """The option that a reply names, after a thought by MMMU's rule for long replies. A thought without an
    end names none.
    """
    if truth.get("cot"):
        return answers.chosen(split_thought(text)[1].strip(), truth["options"])
    return answers.letter(text, truth["options"])


def _by_letter(text: str, truth: answers.Truth) -> float | None:
    said = _said(text, truth)
    return None if said is None else float(said in truth["answer"])


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
    told = {"all": mean(verdicts, "right"), "unread": mean(verdicts, "unread")}
    able = sorted({name for verdict in verdicts for name in verdict.scores} - {"right", "unread"})
    groups = means(verdicts, "right")
    told |= {name: mean(verdicts, name) for name in able} | (groups if len(groups) > 1 else {})
    whole = {together: _together(verdicts)} if together else {}
    return whole | {name: 100 * value for name, value in told.items()}


# files for servers and scorers ------------------------------------------------------------------------------


def _handed_in(entry: Callable[[Sample, Made], Any], collect: Callable[[Iterable[Any]], Any]) -> Any:
    """Writes an entry for each sample that could be asked, collected in a list or by keys."""

    def write(pairs: Sequence[tuple[Sample, Made]], folder: Path) -> Path:
        told = collect(entry(sample, made) for sample, made in pairs if sample.truth)
        (path := folder / "submission.json").write_text(json.dumps(told, indent=1), "utf-8")
        return path

    return write


def _answered(sample: Sample, made: Made) -> tuple[str, str]:
    """A sample's reply: of a choice the letter, where one can be read."""
    said = _said(made.text, sample.truth) if sample.truth.get("options") else None
    return sample.id, said or made.text


BY_ID = _handed_in(_answered, dict)

# MME, POPE: yes or no ---------------------------------------------------------------------------------------

MME_KINDS = {
    "perception": "existence count position color posters celebrity scene landmark artwork OCR".split(),
    "cognition": "commonsense_reasoning numerical_calculation text_translation code_reasoning".split(),
}


def _mme(entry: Entry) -> Sample:
    """A picture's questions: each a line with a tab before its answer. Both files stand in the category's
    folder, or in its folders questions_answers_YN and images.
    """
    question, _, answer = entry.row.strip().rpartition("\t")
    path, kind = entry.path, entry.path.relative_to(entry.data).parts[0]
    truth = {"answer": ("yes", "no")[("yes", "no").index(answer.lower())]}
    folder = path.parent if path.parent.name == kind else entry.data / kind / "images"
    shown = [file for end in (".png", ".jpg") if (file := folder / f"{path.stem}{end}").is_file()]
    parts = ((shown or [folder / f"{path.stem}.jpg"])[0], f"{question} {WORD}")
    return Sample(id=f"{kind}/{path.stem}/{entry.at}", parts=parts, group=kind, truth=truth)


def _mme_sums(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Of each category accuracy and accuracy+ (both questions about a picture right), in percent, added; sums
    of categories only where none lacks.
    """
    told = {kind: 100 * mean(some, "right") + _together(some) for kind, some in _groups(verdicts).items()}
    whole = {name: sum(told[kind] for kind in some) for name, some in MME_KINDS.items() if {*some} <= {*told}}
    total = {"total": sum(whole.values())} if len(whole) == len(MME_KINDS) else {}
    return {**total, **whole, "unread": 100 * mean(verdicts, "unread"), **told}


MME = _suite("mme", _lines, _mme, _ruled(answers.yes_or_no), summary=_mme_sums, unit=_unit)


def _pope(entry: Entry) -> Sample:
    asked, kind = json.loads(entry.row), entry.path.stem.removeprefix("coco_pope_")
    steps = entry.texts.get("COT_INSTRUCTION")
    label = float(("no", "yes").index(asked["label"]))
    truth = {"answer": asked["label"], "also": {"label": label}, "steps": bool(steps)}
    text = filled(steps, question=asked["text"]) if steps else f"{asked['text']}\n{WORD}"
    parts = (entry.data / "val2014" / asked["image"], text)
    return Sample(id=f"{kind}/{entry.at}", parts=parts, group=kind, truth=truth)


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
    return {"f1": average(value for name, value in told.items() if name.endswith("f1")), **told}


POPE, POPE_COT = (
    _suite(name, _lines, _pope, _ruled(answers.denied), summary=_pope_rates) for name in ("pope", "pope-cot")
)

# MMBench, MMVP: a letter ------------------------------------------------------------------------------------

TURN = 1_000_000
"""Between the indexes of a question and of the same with its options in another order."""


def _mmbench(entry: Entry) -> Sample:
    row = entry.row
    index, options = int(row["index"]), {key: row[key] for key in "ABCDE" if row.get(key)}
    if row.get("answer") not in options and not entry.facts.get("hidden"):
        raise ValueError(f"answer {row.get('answer')!r} is none of {[*options]}")
    instruction = "请直接回答选项字母。" if "_cn_" in entry.path.stem else LETTER
    asked = [row.get("hint"), row["question"], _choices(options), instruction]
    return Sample(
        id=f"{index % TURN}/{index}",
        parts=(unpacked(entry.data, base64.b64decode(row["image"])), "\n".join(filter(None, asked))),
        group=row.get("category") or "",
        truth={"answer": row.get("answer"), "options": options, "row": row},
    )


def _mmbench_file(pairs: Sequence[tuple[Sample, Made]], folder: Path) -> Path:
    """The table that the server takes; a reply that names no option goes as it is, for its judge to read."""
    columns = ["index", "question", *"ABCD"]
    table = [[*columns, "prediction"]]
    for sample, made in pairs:
        if row := sample.truth.get("row"):
            table.append([*(row.get(name) or "" for name in columns), _answered(sample, made)[1]])
    return write_sheet(folder / "submission.xlsx", table)


_CIRCULAR = {"summary": partial(_means, together="circular"), "unit": _unit, "submission": _mmbench_file}
MMBENCH = tuple(
    _suite(name, _table, _mmbench, _ruled(_by_letter), **_CIRCULAR)
    for name in FACTS
    if name.startswith("mmbench")
)


def _mmvp(entry: Entry) -> Sample:
    row = entry.row
    index = int(row.get("Index") or row["lndex"])  # published with either spelling
    first, _, second = row["Options"].replace("(a)", "").partition("(b)")
    options = {"A": first.strip(), "B": second.strip()}
    text = "\n".join([row["Question"], _choices(options), LETTER])
    truth = {"answer": row["Correct Answer"].strip(" ()").upper(), "options": options}
    parts = (entry.data / "MMVP Images" / f"{index}.jpg", text)
    return Sample(id=f"{(index + 1) // 2}/{index}", parts=parts, truth=truth)


_PAIRS = {"summary": partial(_means, together="pairs"), "unit": _unit}
MMVP = _suite("mmvp", _table, _mmvp, _ruled(_by_letter), **_PAIRS)

# MMMU -------------------------------------------------------------------------------------------------------


def _mmmu(entry: Entry) -> Sample:
    """Pictures come first, the first one doubled, as the reference has it; `<image 1>` stays in the text."""
    row, cot = entry.row, entry.facts.get("cot", False)
    options = dict(zip("ABCDEFGHIJKLM", (text.strip() for text in _listed(row["options"])), strict=False))
    question, told = row["question"].strip(), LETTER if options else WORD
    if options:
        listed = _choices(options)
        question = f"Question: {question} Options: {listed} " if cot else f"{question}\n{listed}"
    before = THINK_BEFORE_ANSWERING.replace("\n", "") + "." if cot else ""
    shown = [(n, row[f"image_{n}"]) for n in range(1, 8)]
    parts = [unpacked(entry.data, picture["bytes"], double=n == 1) for n, picture in shown if picture]
    right = _listed(row["answer"]) if row["answer"].startswith("[") and not options else [row["answer"]]
    truth = {"answer": right, "options": options, "cot": cot}
    parts = (*parts, f"{before}{question}\n{told}")
    return Sample(id=row["id"], parts=parts, group=entry.path.parent.name, truth=truth)


def _listed(text: str) -> list[str]:
    with retold(f"{text!r} is no list", SyntaxError, RecursionError, MemoryError):
        return [str(one) for one in ast.literal_eval(text)]


def _mmmu_right(text: str, truth: answers.Truth) -> float | None:
    if truth["options"]:
        return _by_letter(text, truth)
    text = split_thought(text)[1] if truth["cot"] else text
    return answers.open_match(text, truth["answer"]) if text.strip() else None


def _mmmu_means(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Over all samples alike; over those of each of the six disciplines; over those of each subject."""
    told = _means(verdicts)
    for name, subjects in FACTS["_shared"]["mmmu_domains"].items():
        told[name] = 100 * mean([v for v in verdicts if v.group in subjects], "right")
    return told


MMMU, MMMU_COT, MMMU_TEST = (
    _suite(name, _parquet, _mmmu, _ruled(_mmmu_right), summary=_mmmu_means, submission=BY_ID)
    for name in ("mmmu", "mmmu-cot", "mmmu-test")
)

# MM-Vet, MathVista: with a judge ----------------------------------------------------------------------------


def _mmvet(entry: Entry) -> Sample:
    id, asked = entry.row
    answer = asked["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    truth = {"answer": asked["answer"], "able": [*asked["capability"]]}
    truth["judged"] = f"{entry.texts['prompt']}\n{asked['question']} | {answer} | "
    # the reference puts a space behind the question
    parts = (entry.data / "images" / asked["imagename"], f"{asked['question']} ")
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


MMVET = _suite("mm-vet", rows, _mmvet, _mmvet_score, submission=BY_ID)


def _mathvista(entry: Entry) -> Sample:
    """Both ways of asking leave the taking out of an answer to the judge, by the published query."""
    picture, row = unpacked(entry.data, entry.row.pop("decoded_image")["bytes"]), entry.row
    query, steps = row["query"], entry.texts.get("COT_INSTRUCTION")
    demo = entry.texts.get("demo_prompt", "").strip()
    truth = {"row": row, "answer": row["answer"], "judged": f"{demo}\n\n{query}\n\n"}
    parts = (picture, filled(steps, question=query) if steps else query)
    return Sample(id=row["pid"], parts=parts, group=row["metadata"]["task"], truth=truth)


def _mathvista_score(sample: Sample, made: Made, desk: Desk) -> Verdict:
    """What is an answer already is taken; a judge finds it in anything longer."""
    assert desk.judge is not None
    truth, replies = sample.truth, list[Reply]()
    found = answers.as_it_is(made.text, truth["row"])
    if found is None and made.text:
        question = f"{truth['judged']}{made.text}\n\nExtracted answer: "
        found, replies = desk.judge.decide(question, (), lambda reply: reply.strip() or None)
        if found is None:
            return _unread(sample, replies)
    said = found and answers.normalised(found, truth["row"])
    right = float(said == truth["answer"]) if said else None
    skills = dict.fromkeys(truth["row"]["metadata"].get("skills", ()), right or 0.0)
    return _verdict(sample, right, replies, **skills)


def _mathvista_entry(sample: Sample, made: Made) -> tuple[str, Any]:
    return sample.id, {**sample.truth["row"], "response": made.text}


_RESULTS = _handed_in(_mathvista_entry, dict)
"""As the authors' scripts leave and read them."""
MATHVISTA, MATHVISTA_COT, MATHVISTA_TEST = (
    _suite(name, _parquet, _mathvista, _mathvista_score, judged=judged, submission=_RESULTS)
    for name, judged in {"mathvista": True, "mathvista-cot": True, "mathvista-test": False}.items()
)

# VQA --------------------------------------------------------------------------------------------------------


def _people(path: Path) -> Iterator[Callable[[], Any]]:
    """Questions with their places and their answers, which VQA publishes in a file of their own."""
    tree, known = dict(rows(path)), {}
    beside = path.with_name(path.name.replace("OpenEnded_", "").replace("questions", "annotations"))
    if beside != path and beside.is_file():
        known = {row["question_id"]: {"answers": row["answers"]} for row in dict(rows(beside))["annotations"]}
    asked = tree.get("questions") or tree.get("data") or tree
    for at, row in asked.items() if isinstance(asked, dict) else enumerate(asked):
        yield lambda at=at, row=row: {"question_id": at, **row, **known.get(row.get("question_id"), {})}


def _vqa(entry: Entry) -> Sample:
    row, facts = entry.row, entry.facts
    said = [row.get("answer")] if facts.get("hidden") else row.get("answers") or [row["answer"]]
    named = "image" if "image" in row else "question_id"  # VizWiz goes by the picture
    right = [one["answer"] if isinstance(one, dict) else one for one in said]
    truth = {"answer": right, "named": {named: row[named]}}
    text = " ".join(filter(None, [row["question"], facts.get("told"), WORD]))
    parts = (entry.data / facts["picture"].format(**row), text)
    return Sample(id=str(row["question_id"]), parts=parts, truth=truth)


def _soft(text: str, truth: answers.Truth) -> float:
    """Where one answer is published, whether it is that; else how many people gave it."""
    if len(truth["answer"]) == 1:
        return float(text.strip().rstrip(".").lower() == truth["answer"][0].lower())
    return answers.agreement(text, truth["answer"])


def _vqa_entry(sample: Sample, made: Made) -> dict[str, Any]:
    return {**sample.truth["named"], "answer": made.text}


VQA = tuple(
    _suite(name, _people, _vqa, _ruled(_soft), submission=_handed_in(_vqa_entry, list))
    for name, facts in FACTS.items()
    if "picture" in facts.get("data", ())
)
SUITES = (
    *(MME, POPE, POPE_COT, *MMBENCH, MMVP, MMMU, MMMU_COT, MMMU_TEST, MMVET),
    *(MATHVISTA, MATHVISTA_COT, MATHVISTA_TEST, *VQA),
)
