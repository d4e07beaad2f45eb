"""Benchmarks whose pictures a judge scores: WISE draws; GEdit-Bench, ImgEdit-Bench, KRIS-Bench, RISEBench and
IntelligentBench edit.

Each is what a row of its published file asks of the model and of the judge, what the judge's numbers are
worth, and a summary.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from openbagel.checks import check_choice
from openbagel.data.sources import arrow
from openbagel.evals.base import Made, Sample, Suite, Summary, Verdict, mean
from openbagel.evals.questions import (
    SEED,
    Question,
    Worth,
    average,
    filled,
    instructions,
    judged,
    means,
    named,
    reader,
    rows,
    samples_of,
    suite,
    text_of,
)
from openbagel.picture_files import open_picture, save_picture


def _suite(name: str, samples: Any, worth: Worth, summary: Summary, **more: Any) -> Suite:
    return suite(name, samples, partial(judged, worth=worth), summary, judged=True, **more)


def _sample(name: str, parts: tuple[str | Path, ...], group: str, *questions: Question) -> Sample:
    truth = {"questions": questions}
    return Sample(id=name, parts=parts, group=group, seed=SEED, file=f"{name}.png", truth=truth)


# WISE: consistency, realism and aesthetics, 0 to 2 each -----------------------------------------------------

AREAS = {"cultural": 400, "time": 167, "space": 133, "biology": 100, "physics": 100, "chemistry": 100}
"""With their numbers of prompts, which are the benchmark's weights."""
WISE_SCORES = ("Consistency", "Realism", "Aesthetic Quality")


def wise_samples(data: Path) -> Iterator[Sample]:
    texts = instructions(next(data.glob("gpt_eval*.py"), data / "gpt_eval.py"), "")
    read = named(*WISE_SCORES, low=0, high=2)

    def make(row: Any) -> Sample:
        number, prompt, kind = int(row["prompt_id"]), row["Prompt"], row["Subcategory"]
        area = list(AREAS)[3 + (number - 701) // 100] if number > 700 else "cultural"
        if 400 < number <= 700:
            area = "time" if kind.endswith("time") else "space"
        text = filled(texts[""], Prompt=prompt, Explanation=row["Explanation"])
        question = Question(text, (None,), WISE_SCORES, read, system=texts.get("system", ""))
        return _sample(str(number), (prompt,), area, question)

    return samples_of(rows(data / "final_data.json"), make)


def wise_worth(group: str, said: dict[str, float]) -> dict[str, float]:
    consistency, realism, aesthetics = (said[name] for name in WISE_SCORES)
    return {**said, "WiScore": (0.7 * consistency + 0.2 * realism + 0.1 * aesthetics) / 2}


def wise_summary(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Both overall values: areas alike as the reference has it, and by their weights as the benchmark has."""
    found = means(verdicts, "WiScore", AREAS)
    weighted = average(found[area] for area, count in AREAS.items() for _ in range(count))
    return {**found, "overall": average(found.values()), "overall, weighted": weighted}


WISE = _suite("wise", wise_samples, wise_worth, wise_summary)

# GEdit-Bench: success and quality of an edit, 0 to 10, in English and Chinese -------------------------------

GEDIT_COLUMNS = "key task_type instruction instruction_language Intersection_exist input_image".split()
SUCCESS = ("_context_no_delimit", "_prompts_0shot_two_image_edit_rule", "_prompts_0shot_tie_rule_SC")
QUALITY = ("_context_no_delimit", "_prompts_0shot_rule_PQ")
SHARED = ", intersection"
"""What every compared model answered."""


def gedit_samples(language: str, data: Path) -> Iterator[Sample]:
    """A bare number, or list of them, will do as a reply."""
    texts, listed = instructions(data / "vie_prompts.py", *SUCCESS, *QUALITY), data / "gedit.jsonl"
    success, quality = ("\n".join(texts[part] for part in parts) for parts in (SUCCESS, QUALITY))
    read = named(r"(?:\A\s*(?=[\[\]\d,.\s]+\Z)|\bscore)", low=0, high=10)
    if not listed.is_file():
        _unpack(data, listed)

    def make(row: Any) -> Sample:
        wish, name = row["instruction"], f"fullset/{row['task_type']}/{language}/{row['key']}"
        source, both = data / f"{name}_SRCIMG.png", SHARED * bool(row["Intersection_exist"])
        text = filled(success, instruction=wish)
        first = Question(text, (source, None), (f"SC{both}",), read, matched=True)
        second = Question(quality, (None,), ("PQ",), read)
        return _sample(name, (source, wish), row["task_type"], first, second)

    def own(row: Any) -> bool:
        return not isinstance(row, dict) or row.get("instruction_language") == language

    return samples_of(((at, row) for at, row in rows(listed) if own(row)), make)


def _unpack(data: Path, listed: Path) -> None:
    """Brings the published parquet files into the layout that the benchmark's scorers read, once."""
    lines: list[str] = []
    for path in sorted(data.rglob("*.parquet")):
        for batch in arrow(".parquet").ParquetFile(path).iter_batches(16, columns=GEDIT_COLUMNS):
            for row in batch.to_pylist():
                name = f"fullset/{row['task_type']}/{row['instruction_language']}/{row['key']}_SRCIMG.png"
                with suppress(ValueError, TypeError):  # it will be missed
                    picture = open_picture(row.pop("input_image")["bytes"])
                    if ".." not in Path(name).parts:
                        save_picture(picture, data / name)
                lines.append(json.dumps(row) + "\n")
    if lines:
        listed.write_text("".join(lines), "utf-8")


def gedit_worth(group: str, said: dict[str, float]) -> dict[str, float]:
    """Overall is the geometric mean of the two, sample by sample."""
    success, quality = said.values()
    scores = {"SC": success, "PQ": quality, "O": math.sqrt(success * quality)}
    both = {f"{name}{SHARED}": value for name, value in scores.items()} if f"SC{SHARED}" in said else {}
    return {**scores, **both}


def gedit_summary(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Means over the kinds' means, of the full set and of the intersection; each kind's overall."""
    names = [f"{name}{part}" for part in ("", SHARED) for name in ("SC", "PQ", "O")]
    whole = {name: average(means(verdicts, name).values()) for name in names}
    return {**whole, **means(verdicts, "O")}


def gedit_sources(done: Sequence[tuple[Sample, Made]], folder: Path) -> Path:
    """The scorers also want the pictures that were edited."""
    for sample, made in done:
        if made.file:
            source = Path(sample.parts[0])
            shutil.copyfile(source, (folder / "outputs" / made.file).with_name(source.name))
    return folder / "outputs"


GEDIT_EN, GEDIT_CN = (
    _suite(f"gedit-{x}", partial(gedit_samples, x), gedit_worth, gedit_summary, submission=gedit_sources)
    for x in ("en", "cn")
)

# ImgEdit-Bench: three scores from 1 to 5, of which the first should bound the others ------------------------

IMGEDIT_KINDS = "add adjust extract replace remove background style compose action".split()
IMGEDIT_SCORES = ("first", "second", "third")


def imgedit_samples(data: Path) -> Iterator[Sample]:
    """The judge's numbers are the first three at the ends of lines, after a colon."""
    texts = dict(rows(data / "judge_prompt.json"))
    read = reader(r"[:：][*\s]*(\d+)[*\s.]*$", low=1, high=5, count=3)

    def make(item: Any) -> Sample:
        key, row = item
        source, text = data / row["id"], filled(texts[row["edit_type"]], edit_prompt=row["prompt"])
        question = Question(text, (source, None), IMGEDIT_SCORES, read)
        return _sample(key, (source, row["prompt"]), row["edit_type"], question)

    return samples_of(((key, (key, row)) for key, row in rows(data / "singleturn.json")), make)


def imgedit_worth(group: str, said: dict[str, float]) -> dict[str, float]:
    """The mean as the published scripts take it, and with the bound that judges are told to keep."""
    first, total = said["first"], sum(said.values())
    bounded = sum(min(value, first) for value in said.values())
    return {**said, "score": round(total / 3, 2), "bounded": round(bounded / 3, 2)}


def imgedit_summary(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """overall is over all samples, as the reference has it; most tables show the mean of the kinds."""
    found = means(verdicts, "score", IMGEDIT_KINDS)
    whole = {"overall": mean(verdicts, "score"), "mean of kinds": average(found.values())}
    return {**found, **whole, "overall, bounded": mean(verdicts, "bounded")}


IMGEDIT = _suite("imgedit", imgedit_samples, imgedit_worth, imgedit_summary)

# KRIS-Bench: kinds in seven dimensions, three or four scores from 1 to 5 ------------------------------------

DIMENSIONS = {
    "attribute perception": "count_change color_change size_adjustment part_completion anomaly_correction",
    "spatial perception": "viewpoint_change position_movement",
    "temporal prediction": "temporal_prediction",
    "social science": "humanities practical_knowledge",
    "natural science": "biology chemistry geography medicine mathematics physics",
    "logical reasoning": "abstract_reasoning rule-based_reasoning",
    "instruction decomposition": "multi-element_composition multi-instruction_execution",
}
KNOWLEDGE = {
    "factual": ("attribute perception", "spatial perception", "temporal prediction"),
    "conceptual": ("social science", "natural science"),
    "procedural": ("logical reasoning", "instruction decomposition"),
}
KRIS_KINDS = {kind: dimension for dimension, kinds in DIMENSIONS.items() for kind in kinds.split()}
KRIS_TEXTS = {
    "temporal_prediction": ("prompt_consist_temporal", "prompt_instruction_temporal"),
    "multi-element_composition": ("prompt_consist_multi", "prompt_instruction_multi"),
    "viewpoint_change": ("prompt_consist", "prompt_view_instruction_following"),
}
"""Of the kinds that are asked about in their own words: for consistency, and for the instruction."""
EDITED = "This is the edited image:"
CONSISTENCY, QUALITY_SCORE = ("consistency_score",), ("quality_score",)
FOLLOWS, KNOWS = ("instruction_score",), ("instruction_score", "knowledge_score")


def kris_samples(data: Path) -> Iterator[Sample]:
    texts = instructions(data / "prompts.py", "prompt_consist", "prompt_quality")
    kinds = [kind for kind in KRIS_KINDS if (data / kind).is_dir()] or list(KRIS_KINDS)
    listed = ((kind, rows(data / kind / "annotation.json")) for kind in kinds)
    found = ((f"{kind}/{key}", (kind, key, row)) for kind, some in listed for key, row in some)
    return samples_of(found, partial(_kris_sample, texts, data))


def _kris_sample(texts: Mapping[str, str], data: Path, item: Any) -> Sample:
    kind, key, row = item
    names, wish = row["ori_img"], row["ins_en"]
    sources = tuple(data / kind / name for name in ([names] if isinstance(names, str) else names))
    consistency, instruction = KRIS_TEXTS.get(kind, ("prompt_consist", "prompt_instruction_following"))
    shown: dict[str, Path | None] = {"This is the original image:": sources[0], EDITED: None}
    truth, scores = dict[str, Path | None](), FOLLOWS
    if "science" in KRIS_KINDS[kind] or KRIS_KINDS[kind] == "logical reasoning":
        instruction, scores = "prompt_dual_evaluation", KNOWS
    if kind == "viewpoint_change":
        truth = {"This is the ground truth image:": data / kind / row["gt_img"]}
    elif kind == "temporal_prediction":  # one of four frames is drawn, and shown in its place
        frames: dict[int, Path | None] = {int(path.stem.rpartition("-")[2]): path for path in sources}
        frames[min({1, 2, 3, 4} - frames.keys(), default=5)] = None
        whose = {n: "Reference" if frames[n] else "Generated" for n in sorted(frames)}
        shown = {f"Frame {n} ({who}):": frames[n] for n, who in whose.items()}
    elif len(sources) > 1:
        shown = {f"Reference Image {n}:": p for n, p in enumerate(sources, 1)} | {"Predicted Image:": None}

    def asked(name: str, shown: Mapping[str, Path | None], scores: tuple[str, ...]) -> Question:
        text = filled(texts[name], instruct=wish, explanation=row.get("explain_en", ""))
        parts = tuple(part for labelled in shown.items() for part in labelled)
        return Question(text, parts, scores, named(*scores, low=1, high=5))

    first, second = asked(consistency, shown, CONSISTENCY), asked(instruction, {**shown, **truth}, scores)
    last = asked("prompt_quality", {EDITED: None}, QUALITY_SCORE)
    return _sample(f"{kind}/{key}", (*sources, wish), kind, first, second, last)


def kris_worth(group: str, said: dict[str, float]) -> dict[str, float]:
    """From 0 to 100, and their mean."""
    scores = {name: (value - 1) * 25 for name, value in said.items()}
    return {**scores, "mean": average(scores.values())}


def kris_summary(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Dimensions, kinds of knowledge and overall over all scores, as the reference has it; the benchmark's
    own overall value is the mean over the samples.
    """
    names = (*CONSISTENCY, *QUALITY_SCORE, *KNOWS)
    found: dict[str, list[float]] = {name: [] for name in DIMENSIONS}
    for verdict in verdicts:
        found[KRIS_KINDS[verdict.group]] += [verdict.scores[name] for name in names if name in verdict.scores]
    parts = {**{name: (name,) for name in DIMENSIONS}, **KNOWLEDGE, "overall": tuple(DIMENSIONS)}
    whole = {name: average(value for one in some for value in found[one]) for name, some in parts.items()}
    return {**whole, "overall by samples": mean(verdicts, "mean")}


KRIS = _suite("kris", kris_samples, kris_worth, kris_summary)

# RISEBench: reasoning, consistency and quality from 1 to 5; right is what has all of them at 5 --------------

RISE_AREAS = ("temporal", "causal", "spatial", "logical")


def rise_samples(data: Path) -> Iterator[Sample]:
    texts, found = instructions(data / "utils.py"), list(rows(data / "datav2_total_w_subtask.json"))
    # the published script looks for the column: one row with it changes the question of all
    bare = any("reasoning_wo_ins" in row for _, row in found if isinstance(row, dict))

    def make(row: Any) -> Sample:
        row = {name: value for name, value in row.items() if value is not None}
        wish, area = row["instruction"], row["category"].removesuffix("_reasoning")
        check_choice("category", area, RISE_AREAS)
        truth = row.get("reference_txt" if area == "logical" else "reference", "")
        read, asked = named("Final Score", low=area != "logical", high=5), list[Question]()
        for score, (name, beside) in _rise_asked(area, row, bare).items():
            text = filled(texts[f"prompt_{name}"], instruct=wish, reference=truth)
            shown = (data / beside, None) if beside else (None,)
            asked.append(Question(text, shown, (score,), read, largest=768))
        return _sample(f"{row['category']}/{row['index']}", (data / row["image"], wish), area, *asked)

    return samples_of(found, make)


def _rise_asked(area: str, row: Mapping[str, str], bare: bool) -> dict[str, tuple[str, str]]:
    """By score the instruction, and the picture shown beside what was made, if any. A spatial or logical
    problem with a reference picture is compared with that in place of the original.
    """
    source, hinted = row["image"], "reasoning_img" in row
    if area == "logical" and "reference_txt" in row:
        words, beside = ("logical_cons_ans", "logical_txt", ""), ""
    elif area == "logical":
        words = ("logical_cons", "logical_img_wo_q" if bare else "logical_img", "")
        source = beside = row["reference_img"]
    elif area == "spatial" and "reference_img" in row:
        words = ("spatial_cons", "spatial_ref_img", "spatial_qual")
        source = beside = row["reference_img"]
    else:
        forms = ("spatial_cons", "spatial_ref", "spatial_qual"), ("consist", "reasoning", "generation")
        words, beside = forms[area != "spatial"], source if hinted else ""
        words = (words[0], words[1] + "_w_input" * hinted, words[2])
    first = {} if "consistency_free" in row else {"consistency": (words[0], source)}
    last = {"quality": (words[2], "")} if words[2] else {}
    return {**first, "reasoning": (words[1], beside), **last}


def rise_worth(group: str, said: dict[str, float]) -> dict[str, float]:
    """Scores as percentages. As the published tables have it, consistency weighs in logical problems alone,
    and a picture whose consistency is not judged is never right.
    """
    if group == "logical":  # judged 0 or 1
        said = {name: 4 * min(value, 1.0) + 1 for name, value in said.items()}
    other, weight = ("consistency", 0.3) if group == "logical" else ("quality", 0.2)
    score = (1 - weight) * said["reasoning"] + weight * said.get(other, 1.0)
    if said["reasoning"] == 1:
        score = max(1.0, score / 2)
    right = 100.0 * all(value == 5 for value in said.values())
    accuracy = {"accuracy": right * ("consistency" in said), "accuracy where judged": right}
    return {name: 25 * (value - 1) for name, value in {**said, "percentage": score}.items()} | accuracy


def rise_summary(verdicts: Sequence[Verdict]) -> dict[str, float]:
    found = {**means(verdicts, "accuracy", RISE_AREAS), "overall": mean(verdicts, "accuracy")}
    for area, value in means(verdicts, "percentage", RISE_AREAS).items():
        found[f"{area}, percentage"] = value
    names = ("percentage", "reasoning", "consistency", "quality", "accuracy where judged")
    return {**found, **{name: mean(verdicts, name) for name in names}}


RISE = _suite("rise", rise_samples, rise_worth, rise_summary)

# IntelligentBench: 0 unusable, 1 worse than the reference answer, 2 as good ---------------------------------


def intelligent_samples(data: Path) -> Iterator[Sample]:
    template, read = text_of(data / "judge_prompt.txt"), named("score", low=0, high=2)

    def make(row: Any) -> Sample:
        source, asked = data / row["question_image"], row["question"]
        pictures = (source, data / row["answer_image"], None)
        question = Question(filled(template, question=asked), pictures, ("score",), read)
        return _sample(str(row["id"]), (source, asked), "", question)

    return samples_of(rows(data / "intelligent.jsonl"), make)


INTELLIGENT = _suite(
    "intelligent",
    intelligent_samples,
    lambda group, said: {"score": 50 * said["score"]},
    lambda verdicts: {"score": mean(verdicts, "score")},
)
