"""The understanding benchmarks on hand-made sets in their published layouts: what is asked, how replies are
read, and scores worked out by hand. Replies stand in a run's folder as if a model had written them.
"""

import base64
import csv
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from openbagel import Bagel
from openbagel.config import to_json
from openbagel.evals import answers, base, suites, understanding
from openbagel.evals.base import Made, Part, Plan, Sample, Suite, Verdict
from openbagel.evals.clips import VIDEO_QA
from openbagel.evals.judges import Endpoint, Judge
from openbagel.images import ImageLimits
from tests import tiny
from tests.evals.judge_server import judge_server

SUITES = [suite for suite in suites.SUITES.values() if suite.reply == "text" and suite is not VIDEO_QA]
BY_NAME = {suite.name: suite for suite in SUITES}


def png(colour: int = 0, size: tuple[int, int] = (6, 4)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (colour, 90, 30)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)


def no_model() -> Bagel:
    raise AssertionError("the replies are there")


def run(
    suite: Suite, data: Path, replies: Callable[[Sample], str], judge: Judge | None = None
) -> tuple[dict[str, float], dict[str, int], list[Verdict]]:
    """Values, problems and verdicts of replies made elsewhere."""
    folder = data.parent / "run"
    made = [
        Made(id=one.id, problem=one.problem)
        if one.problem
        else Made(id=one.id, parts=(Part(text=replies(one)),), asked="0")
        for one in suite.samples(data)
    ]
    write(folder / "made-0.jsonl", "".join(json.dumps(to_json(one)) + "\n" for one in made))
    verdicts = list(base.run(suite, Plan(data=data, folder=folder), no_model, model="none", judge=judge))
    told = json.loads((folder / "summary.json").read_text())
    return {name: value["value"] for name, value in told["values"].items()}, told["problems"], verdicts


def asked(suite: Suite, data: Path) -> dict[str, Any]:
    """What is asked by id: the text, or the problem's kind."""
    return {s.id: s.problem.partition(":")[0] or s.parts[-1] for s in suite.samples(data)}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (folder := tmp_path / "data").mkdir()
    return folder


# MME, POPE --------------------------------------------------------------------------------------------------


def mme(data: Path, kinds: Iterable[str]) -> None:
    """Two pictures a category, two questions each; landmark keeps them in two folders."""
    for kind in kinds:
        split = kind == "landmark"
        for stem, end in (("001", "jpg"), ("002", "png")):
            write(data / kind / ("images" if split else "") / f"{stem}.{end}", png())
            told = (("red", "Yes"), ("blue", "No"))
            lines = "".join(f"Is {stem} {x}? Please answer yes or no.\t{y}\n" for x, y in told)
            write(data / kind / ("questions_answers_YN" if split else "") / f"{stem}.txt", lines)


def test_mme_adds_accuracies_of_questions_and_of_pictures(data: Path) -> None:
    kinds = [kind for some in understanding.MME_KINDS.values() for kind in some]
    mme(data, kinds)
    told = asked(understanding.MME, data)
    assert len(told) == 14 * 4
    assert told["landmark/002/1"] == (
        "Is 002 blue? Please answer yes or no. Answer the question using a single word or phrase."
    )
    right = {"0": "Yes.", "1": "no"}

    def replies(sample: Sample) -> str:
        kind, stem, number = sample.id.split("/")
        if kind == "count" and stem == "001":
            return "yes"  # one of two is right: accuracy 75, accuracy+ 50
        if kind == "code_reasoning" and sample.id.endswith("002/1"):
            return "I cannot tell"  # the same, and unreadable
        return right[number]

    values, problems, _ = run(understanding.MME, data, replies)
    assert not problems
    assert values["existence"] == values["landmark"] == 200
    assert values["count"] == values["code_reasoning"] == 75 + 50
    assert (values["perception"], values["cognition"], values["total"]) == (1925, 725, 2650)
    assert values["unread"] == pytest.approx(100 / 56)


def test_mme_counts_what_is_broken(data: Path) -> None:
    mme(data, ["count", "landmark"])
    write(data / "count" / "003.txt", "Is it?\tYes\nno tab\nOr?\tmaybe\n")
    write(data / "count" / "001.jpg", b"no picture")
    values, problems, verdicts = run(understanding.MME, data, lambda sample: sample.truth["answer"])
    assert problems == {"broken row": 2, "broken picture": 3} and len(verdicts) == 11
    assert values == {"unread": 0.0, "count": 200.0, "landmark": 200.0}  # no sums of a part


@pytest.mark.parametrize(
    ("text", "right"),
    [("Yes", 1.0), ("yes, it is", 1.0), ("是", 1.0), ("不是", 0.0), ("否", 0.0), ("True", 1.0), ("\nno", 0.0),
     ("It is, yes", None), ("", None)],
)  # fmt: skip
def test_yes_or_no(text: str, right: float | None) -> None:
    assert answers.yes_or_no(text, {"answer": "yes"}) == right


def test_pope_rates(data: Path) -> None:
    write(data / "val2014" / "a.jpg", png())
    labels = ["yes", "yes", "no", "no"]
    for kind in ("random", "popular", "adversarial"):
        rows = [{"question_id": n, "image": "a.jpg", "text": "Is there a dog?", "label": x}
                for n, x in enumerate(labels)]  # fmt: skip
        lines = [json.dumps(row) for row in rows]
        if kind == "popular":
            lines += [
                "{broken",
                json.dumps({**rows[0], "image": "gone.jpg"}),
                json.dumps({**rows[0], "label": "?"}),
            ]
        write(data / "coco" / f"coco_pope_{kind}.json", "\n".join(lines) + "\n")
    assert asked(understanding.POPE, data)["random/0"] == (
        "Is there a dog?\nAnswer the question using a single word or phrase."
    )
    said = {
        "random": ["Yes", "yes, a dog", "No", "There is not."],
        "popular": ["Yes.", "No, there is a cat", "maybe", "no"],  # what denies nothing is a yes
        "adversarial": ["no", "no", "No", "not here"],
    }

    def replies(sample: Sample) -> str:
        kind, number = sample.id.split("/")
        return said[kind][int(number)]

    values, problems, _ = run(understanding.POPE, data, replies)
    assert problems == {"broken row": 2, "broken picture": 1}
    rates = {kind: [values[f"{kind} {name}"] for name in ("accuracy", "precision", "recall", "f1", "yes")]
             for kind in said}  # fmt: skip
    assert rates == {"random": [100, 100, 100, 100, 50], "popular": [50] * 5, "adversarial": [50, 0, 0, 0, 0]}
    assert values["f1"] == 50


# MMBench, MMVP ----------------------------------------------------------------------------------------------


def mmbench(path: Path, known: bool) -> None:
    """Question 7 in two orders, question 8 with a hint and no more than two options, and two broken rows."""
    shown = base64.b64encode(png()).decode()
    names = [
        "index",
        "question",
        "hint",
        *"ABCD",
        *(["answer"] if known else []),
        "category",
        "image",
        "source",
    ]
    rows = [
        {"index": 7, "question": "What\tis it?", "A": "cat", "B": "dog", "C": "cow", "D": "None",
         "answer": "B"},
        {"index": 1_000_007, "question": "What\tis it?", "A": "dog", "B": "cow", "C": "None", "D": "cat",
         "answer": "A"},
        {"index": 8, "question": "How many?", "hint": "Look < twice", "A": "1", "B": "2", "answer": "A"},
        {"index": 9, "question": "Broken", "A": "1", "answer": "D", "image": shown},
        {"index": 10, "question": "Shown?", "A": "1", "answer": "A", "image": "bm8gcGljdHVyZQ=="},
    ]  # fmt: skip
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, names, delimiter="\t", extrasaction="ignore")
        table.writeheader()
        for row in rows:
            table.writerow({"image": shown, "category": "k1" if row["index"] == 8 else "k2", **row})


def test_mmbench_wants_every_order(data: Path) -> None:
    suite = BY_NAME["mmbench-dev-en"]
    mmbench(data / "mmbench_dev_20230712.tsv", known=True)
    told = asked(suite, data)
    letter = "Answer with the option's letter from the given choices directly."
    assert told["7/7"] == f"What\tis it?\nA. cat\nB. dog\nC. cow\nD. None\n{letter}"
    assert told["8/8"] == f"Look < twice\nHow many?\nA. 1\nB. 2\n{letter}"
    said = {"7/7": "B. dog", "7/1000007": "It is a cow", "8/8": " A\n"}
    values, problems, verdicts = run(suite, data, lambda sample: said[sample.id])
    assert problems == {"broken row": 1, "broken picture": 1}
    assert values == {
        "circular": 50, "all": pytest.approx(200 / 3), "unread": 0, "k1": 100, "k2": 50
    }  # fmt: skip
    assert verdicts[0].reason == "right is 'B'"
    (path,) = {s.parts[0] for s in suite.samples(data) if not s.problem}
    assert isinstance(path, Path) and path.parent == data / ".unpacked" and path.read_bytes() == png()


def test_mmbench_test_is_judged_by_its_server(data: Path) -> None:
    suite = BY_NAME["mmbench-test-cn"]
    mmbench(data / "mmbench_test_cn_20231003.tsv", known=False)
    assert str(asked(suite, data)["8/8"]).endswith("B. 2\n请直接回答选项字母。")
    said = {"7/7": "the dog", "7/1000007": "<neither> & \x01", "8/8": "1 or 2", "9/9": "A"}
    values, problems, verdicts = run(suite, data, lambda sample: said[sample.id])
    assert not [value for value in values.values() if value == value] and problems == {"broken picture": 1}
    assert "server judges" in verdicts[0].reason
    with zipfile.ZipFile(data.parent / "run" / "submission.xlsx") as book:
        sheet = ElementTree.fromstring(book.read("xl/worksheets/sheet1.xml"))
        for name in book.namelist():
            ElementTree.fromstring(book.read(name))
    rows = [["".join(cell.itertext()) for cell in row] for row in sheet[0]]
    assert rows[0] == ["index", "question", "A", "B", "C", "D", "prediction"]
    assert rows[1] == ["7", "What\tis it?", "cat", "dog", "cow", "None", "B"]
    assert [row[-1] for row in rows[1:]] == ["B", "<neither> & ", "A", "A", ""]


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


def test_mmvp_wants_both_of_a_pair(data: Path) -> None:
    lines = ["lndex,Question,Options,Correct Answer"]
    for index in range(1, 7):
        lines.append(f'{index},"Is it open, or not?",(a) Open (b) Closed,{"(a)" if index % 2 else "(b)"}')
        write(data / "MMVP Images" / f"{index}.jpg", png(index))
    write(data / "Questions.csv", "\n".join([*lines, "seven,broken,,", "8,No picture?,(a) x (b) y,(a)"]))
    assert asked(understanding.MMVP, data)["1/2"] == (
        "Is it open, or not?\nA. Open\nB. Closed\n"
        "Answer with the option's letter from the given choices directly."
    )
    said = {"1/1": "A", "1/2": "B", "2/3": "A", "2/4": "A", "3/5": "neither", "3/6": "It is Closed."}
    values, problems, _ = run(understanding.MMVP, data, lambda sample: said[sample.id])
    assert problems == {"broken row": 1, "broken picture": 1}
    assert values["pairs"] == pytest.approx(100 / 3) and values["all"] == pytest.approx(400 / 6)
    assert values["unread"] == pytest.approx(100 / 6)


# MMMU -------------------------------------------------------------------------------------------------------


def mmmu(data: Path) -> None:
    def row(subject: str, n: int, **more: Any) -> dict[str, Any]:
        shown: dict[str, Any] = {f"image_{k}": None for k in range(1, 8)}
        shown["image_1"] = {"bytes": png(n), "path": "1.png"}
        base = {"id": f"validation_{subject}_{n}", "question": "Which <image 1>? ", "answer": "B"}
        return {**base, "options": "['cat', \"dog's\"]", "question_type": "multiple-choice", **shown, **more}

    two = {"bytes": png(77, (5, 5)), "path": "2.png"}
    art = [row("Art", 1, image_2=two), row("Art", 2), row("Art", 3, options="__import__('os')")]
    opened: dict[str, Any] = {"options": "[]", "question_type": "open"}
    mathematics = [
        row("Math", 1, answer="['$6,000', '6000']", **opened),
        row("Math", 2, answer="12.5", **opened),
        row("Math", 3, image_1={"bytes": b"?", "path": ""}),
    ]
    for subject, rows in (("Art", art), ("Math", mathematics)):
        parquet(data / subject / "validation-00000-of-00001.parquet", rows)


def test_mmmu_at_once(data: Path) -> None:
    mmmu(data)
    samples = {s.id: s for s in understanding.MMMU.samples(data) if not s.problem}
    one = samples["validation_Art_1"]
    assert one.parts[-1] == (
        "Which <image 1>?\nA. cat\nB. dog's\nAnswer with the option's letter from the given choices directly."
    )
    assert samples["validation_Math_1"].parts[-1] == (
        "Which <image 1>?\nAnswer the question using a single word or phrase."
    )
    first, second = (Image.open(part) for part in one.parts[:-1] if isinstance(part, Path))
    assert first.size == (12, 8) and second.size == (5, 5)  # the first is doubled
    said = {"validation_Art_1": "B", "validation_Art_2": "(B)", "validation_Math_1": "$6,000",
            "validation_Math_2": "12"}  # fmt: skip
    values, problems, _ = run(understanding.MMMU, data, lambda sample: said[sample.id])
    assert problems == {"broken row": 2}
    assert values == {"all": 50, "unread": 25, "Art": 50, "Math": 50}


def test_mmmu_after_a_thought(data: Path) -> None:
    mmmu(data)
    samples = {s.id: s for s in understanding.MMMU_COT.samples(data) if not s.problem}
    before = (
        "You should first think about the reasoning process in the mind and then provide the user with the "
        "answer. The reasoning process is enclosed within <think> </think> tags, i.e. "
        "<think> reasoning process here </think> answer here."
    )
    assert samples["validation_Art_1"].parts[-1] == (
        f"{before}Question: Which <image 1>? Options: A. cat\nB. dog's \n"
        "Answer with the option's letter from the given choices directly."
    )
    assert samples["validation_Math_1"].parts[-1] == (
        f"{before}Which <image 1>?\nAnswer the question using a single word or phrase."
    )
    said = {
        "validation_Art_1": "<think>(A)? no.</think> The answer is (B).",
        "validation_Art_2": "<think>B, B, and on and on",
        "validation_Math_1": "<think>x</think>So the result is 6000",
        "validation_Math_2": "<think>12.5</think>13",
    }
    values, _, verdicts = run(understanding.MMMU_COT, data, lambda sample: said[sample.id])
    assert values == {"all": 50, "unread": 25, "Art": 50, "Math": 50}
    assert "no answer in it" in {v.id: v for v in verdicts}["validation_Art_2"].reason


OPTIONS = {"A": "cat", "B": "Big Dog"}


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


# MM-Vet, MathVista ------------------------------------------------------------------------------------------


def mmvet(data: Path) -> None:
    rows = {
        "v1_0": ("a.png", "-1<AND>-5", ["ocr", "math"]),
        "v1_1": ("a.png", "a cat", ["rec"]),
        "v1_2": ("gone.png", "a cat", ["rec"]),
    }
    told = {
        id: {"imagename": name, "question": f"q {id}", "answer": answer, "capability": able}
        for id, (name, answer, able) in rows.items()
    }
    write(data / "mm-vet.json", json.dumps({**told, "v1_3": {"imagename": "a.png"}}))
    write(data / "images" / "a.png", png())
    write(data / "mm-vet_evaluator.py", 'import nothing_there\nprompt = """Grade it.\n"""\nprint(1 / 0)\n')


def test_mmvet_is_graded_or_handed_in(data: Path, tmp_path: Path) -> None:
    mmvet(data)
    assert asked(understanding.MMVET, data)["v1_0"] == "q v1_0 "
    values, problems, verdicts = run(understanding.MMVET, data, lambda sample: "x = -1")
    assert problems == {"broken picture": 1, "broken row": 1} and "no judge" in verdicts[0].reason
    handed = json.loads((tmp_path / "run" / "submission.json").read_text())
    assert handed["v1_0"] == "x = -1" and handed["v1_2"] == ""
    (tmp_path / "run").rename(tmp_path / "before")
    with judge_server(lambda body, number: (200, "0.5 of it" if number == 0 else "Surely 1.0")) as (
        url,
        calls,
    ):
        judge = Judge(Endpoint(url=url, model="wise"), tmp_path / "replies")
        values, problems, verdicts = run(understanding.MMVET, data, lambda sample: "x = -1", judge)
        said = calls[0]["messages"][0]["content"][0]["text"]
    assert said in (
        "Grade it.\n\nq v1_0 | -1 <AND> -5 | x = -1 | ",
        "Grade it.\n\nq v1_1 | a cat | x = -1 | ",
    )
    assert problems == {"broken picture": 1, "broken row": 1, "unreadable reply": 1}
    able = {"math": 50, "ocr": 50} if "-5" in said else {"rec": 50}
    assert values == {"all": 50, "unread": 0, **able}


def mathvista(data: Path) -> None:
    def row(pid: int, kind: str, answer: str, **more: Any) -> dict[str, Any]:
        return {
            "pid": str(pid), "question": "?", "image": f"images/{pid}.jpg", "choices": None,
            "precision": None,
            "decoded_image": {"bytes": png(pid), "path": f"{pid}.jpg"}, "answer": answer, "answer_type": kind,
            "question_type": "free_form", "query": f"Hint: {kind}\nQuestion: {pid}",
            "metadata": {"task": "geometry" if pid < 4 else "charts"}, **more,
        }  # fmt: skip

    choice: dict[str, Any] = {"question_type": "multi_choice", "choices": ["145°", "35°"]}
    rows = [
        row(1, "integer", "14"),
        row(2, "text", "145°", **choice),
        row(3, "float", "1.2", precision=1.0),
        row(4, "text", "35°", **choice),
        row(5, "list", "[1, 2]"),
        row(6, "integer", "3"),
        row(7, "integer", "3", decoded_image=None),
    ]
    parquet(data / "data" / "testmini-00000-of-00001-0.parquet", rows)
    write(data / "prompts" / "ext_ans.py", '\ndemo_prompt = """\nTake the answer out.\n"""\n')


def test_mathvista_takes_answers_out_with_a_judge(data: Path, tmp_path: Path) -> None:
    mathvista(data)
    assert asked(understanding.MATHVISTA, data)["1"] == "Hint: integer\nQuestion: 1"
    said = {"1": "14", "2": "It is (A) 145", "3": "so 1.234", "4": "35°", "5": "hm", "6": ""}
    found = {"2": "A", "3": "1.234", "5": ""}

    def reply(body: dict[str, Any], number: int) -> tuple[int, str]:
        text = body["messages"][0]["content"][0]["text"]
        (pid,) = re.findall(r"Question: (\d)", text)
        assert text == (
            f"Take the answer out.\n\nHint: {text.split()[5]}\nQuestion: {pid}\n\n{said[pid]}\n\n"
            "Extracted answer: "
        )
        return 200, found[pid]

    with judge_server(reply) as (url, calls):
        judge = Judge(Endpoint(url=url, model="wise"), tmp_path / "replies")
        values, problems, _ = run(understanding.MATHVISTA, data, lambda sample: said[sample.id], judge)
    assert len(calls) == 3  # 1 and 4 are answers already, 6 is empty
    assert problems == {"unreadable reply": 1, "broken row": 1}
    assert values == {"all": 80, "unread": 20, "charts": 50, "geometry": 100}
    with pytest.raises(ValueError, match="mathvista needs a judge"):
        run(understanding.MATHVISTA, data, lambda sample: "")


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [("(B) 35", "multi_choice", "35°"), ("C", "multi_choice", "35°"), ("145 degrees", "multi_choice", "145°"),
     ("14.9", "integer", "14"), ("x", "integer", None), ("1e999", "integer", None), ("2", "float", "2.0")],
)  # fmt: skip
def test_answers_take_the_form_asked_for(answer: str, kind: str, said: str | None) -> None:
    problem = {"question_type": kind, "answer_type": kind, "choices": ["145°", "35°"], "precision": 2.0}
    assert answers.normalised(answer, problem) == said


# VQA --------------------------------------------------------------------------------------------------------


def test_vqa_layouts(data: Path) -> None:
    ten = [{"answer": "2"}] * 2 + [{"answer": "two dogs"}] * 8
    named = {"v2_": "COCO_val2014_000000000042.jpg", "": "COCO_val2014_000000000042.jpg"}
    for prefix, name in named.items():
        rows = [{"question_id": 420 + n, "image_id": 42 + n, "question": "How many?"} for n in (0, 1)]
        path = data / f"{prefix}OpenEnded_mscoco_val2014_questions.json"
        write(path, json.dumps({"questions": [*rows, {"question_id": 7}]}))
        known = [{"question_id": 420, "answers": ten}, {"question_id": 421, "answers": ten}]
        write(data / f"{prefix}mscoco_val2014_annotations.json", json.dumps({"annotations": known}))
        write(data / "val2014" / name, png())
    row = {"question_id": 5, "image_id": "ab", "question": "Says?", "answers": ["stop"] * 10}
    write(data / "TextVQA_0.5.1_val.json", json.dumps({"data": [row]}))
    write(data / "train_images" / "ab.jpg", png())
    write(data / "val.json", json.dumps([{"image": "v.jpg", "question": "What?", "answers": ten}]))
    write(data / "val" / "v.jpg", png())
    row = {"imageId": "9", "question": "Which?", "answer": "Left"}
    write(data / "testdev_balanced_questions.json", json.dumps({"201": row}))
    write(data / "images" / "9.jpg", png())
    word = "Answer the question using a single word or phrase."
    ids = {"vqav2": "420", "okvqa": "420", "textvqa": "5", "vizwiz": "0", "gqa": "201"}
    said = {"vqav2": "Two.", "okvqa": "2", "textvqa": "stop", "vizwiz": "two", "gqa": "left."}
    worth = {"vqav2": 60, "okvqa": 60, "textvqa": 100, "vizwiz": 60, "gqa": 100}
    for suite in understanding.VQA:
        told = asked(suite, data)
        before = "When the provided information is insufficient, respond with 'Unanswerable'. "
        assert str(told[ids[suite.name]]).endswith(f"? {before if suite.name == 'vizwiz' else ''}{word}")
        values, problems, _ = run(suite, data, lambda sample, name=suite.name: said[name])
        # of ten people two said "2": 2 x 1/3 and 8 x 2/3 make 0.6
        assert values == {"all": pytest.approx(worth[suite.name]), "unread": 0}
        broken = {"broken picture": 1, "broken row": 1} if suite.name in ("vqav2", "okvqa") else {}
        assert problems == broken
        (data.parent / "run").rename(data.parent / suite.name)


@pytest.mark.parametrize(
    ("one", "other"),
    [("The cat's", "cat s"), ("two", "2"), ("Don't know.", "dont know"), ("ice-cream", "ice cream"),
     ("1.5", "1.5"), ("10,000", "10000"), ("a; b", "b")],
)  # fmt: skip
def test_plain_answers(one: str, other: str) -> None:
    assert answers.plain(one) == answers.plain(other)


# all --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_settings_are_the_published_ones(suite: Suite, data: Path) -> None:
    assert suite.looks == ImageLimits(max_size=980, min_size=378, stride=14, max_pixels=2_007_040)
    with pytest.raises(
        ValueError, match=f"there is no {re.escape(str(data))}.*; {suite.name} needs .* from "
    ):
        list(suite.samples(data))
    ours = suite.published.get("BAGEL 7B MoT", {})
    assert all(value == float(value) for value in ours.values())


def test_published_rows_and_limits() -> None:
    limits = {suite.name: suite.options["max_tokens"] + 1 for suite in SUITES}
    assert limits["mme"] == 20 and limits["mmbench-dev-cn"] == limits["mmvp"] == 100 and limits["mmmu"] == 10
    assert (limits["mmmu-cot"], limits["mm-vet"], limits["mathvista"]) == (16384, 1000, 4096)
    ours = {suite.name: suite.published.get("BAGEL 7B MoT") for suite in SUITES}
    assert ours["mme"] == {"perception": 1687, "total": 2388} and ours["mmmu-cot"] == {"all": 55.3}
    assert ours["mmbench-dev-en"] == {"circular": 85.0} and ours["mmbench-test-en"] is None
    assert "Janus-Pro 7B" not in understanding.MMVP.published


def test_a_model_answers(data: Path, tmp_path: Path) -> None:
    """End to end; the tiny model's pictures are too small for the published limits."""
    mme(data, ["count"])
    suite = replace(understanding.MME, looks=None)
    plan = Plan(data=data, folder=tmp_path / "run", limit=3, options={"max_tokens": 3})
    verdicts = list(base.run(suite, plan, tiny.bagel, model="tiny"))
    assert [verdict.id for verdict in verdicts] == ["count/001/0", "count/001/1", "count/002/0"]
    made = base.read_lines(plan.folder.glob("made-*"), Made)
    assert len({one.asked for one in made.values()}) == 3
