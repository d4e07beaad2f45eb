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
from openbagel.evals import base, understanding
from openbagel.evals.base import Made, Part, Plan, Sample, Suite, Verdict
from openbagel.evals.judges import Endpoint, Judge
from openbagel.images import ImageLimits
from tests import tiny
from tests.evals.judge_server import judge_server

SUITES = understanding.SUITES
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


STEPS = 'Think first, then say "Final answer: ..".\n\nQuestion:\n\n{question}'


def test_pope_step_by_step_reads_what_is_called_the_answer(data: Path) -> None:
    write(data / "val2014" / "a.jpg", png())
    rows = [{"question_id": n, "image": "a.jpg", "text": "A dog?", "label": "no"} for n in range(4)]
    write(data / "coco" / "coco_pope_random.json", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="evaluate_pope.py cannot be read.*pope-cot needs"):
        list(understanding.POPE_COT.samples(data))
    write(data / "evaluate_pope.py", f"import gone\nCOT_INSTRUCTION = ({STEPS!r})\n")
    assert asked(understanding.POPE_COT, data)["random/0"] == STEPS.replace("{question}", "A dog?")
    said = [
        "There is no cat. Final answer: yes",  # wrong, though its first sentence has a no
        "I see fur.\nFINAL ANSWER:  No. It is a bear.",
        "Answer: not a dog",
        "A cat. It is no dog",  # nothing is called the answer, and the first sentence denies nothing
    ]
    values, problems, _ = run(understanding.POPE_COT, data, lambda one: said[int(one.id[-1])])
    assert values["random accuracy"] == 50 and not problems


# MMBench, MMVP ----------------------------------------------------------------------------------------------


def mmbench(path: Path, known: bool) -> None:
    """Question 7 in two orders, question 8 with a hint and no more than two options, and two broken rows."""
    shown = base64.b64encode(png()).decode()
    names = ["index", "question", "hint", *"ABCD", *["answer"] * known, "category", "image", "source"]
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


@pytest.mark.parametrize(
    ("language", "end"),
    [
        ("cn", "请直接回答选项字母。"),
        ("en", "Answer with the option's letter from the given choices directly."),
    ],
)
def test_mmbench_test_is_judged_by_its_server(data: Path, language: str, end: str) -> None:
    suite = BY_NAME[f"mmbench-test-{language}"]
    mmbench(data / f"mmbench_test_{language}_20231003.tsv", known=False)
    assert str(asked(suite, data)["8/8"]).endswith(f"B. 2\n{end}")
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
        hidden = [{**row, "id": row["id"].replace("validation", "test"), "answer": "?"} for row in rows]
        parquet(data / subject / "test-00000-of-00002.parquet", hidden[:2])
        parquet(data / subject / "test-00001-of-00002.parquet", hidden[2:])


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
    disciplines = {"Art and Design": 50, "Science": 50}
    assert values == {"all": 50, "unread": 25, "Art": 50, "Math": 50, **disciplines}
    handed = json.loads((data.parent / "run" / "submission.json").read_text())
    assert handed == {**said, "validation_Art_2": "(B)"}  # the reference reads no letter in it either


def test_mmmu_over_all_samples_and_over_those_of_each_discipline() -> None:
    """Not over subjects: one of two right in Art, three of three in Music, none of five in Math."""

    def verdicts(group: str, *right: float) -> list[Verdict]:
        known = [{"right": x, "unread": 0.0} for x in right]
        return [Verdict(id=f"{group}{i}", group=group, scores=one) for i, one in enumerate(known)]

    some = [*verdicts("Art", 1, 0), *verdicts("Music", 1, 1, 1), *verdicts("Math", 0, 0, 0, 0, 0)]
    told = understanding.MMMU.summary(some)
    assert (told["all"], told["Art and Design"], told["Science"], told["Art"]) == (40, 80, 0, 50)
    assert told["Business"] != told["Business"]  # not asked
    domains = understanding.FACTS["_shared"]["mmmu_domains"]
    assert len(domains) == 6 and len({name for names in domains.values() for name in names}) == 30


def test_mmmu_test_is_judged_by_its_server(data: Path) -> None:
    mmmu(data)
    said = {"test_Art_1": "B. dog's", "test_Art_2": "a cat", "test_Math_1": "6000", "test_Math_2": ""}
    values, problems, verdicts = run(understanding.MMMU_TEST, data, lambda sample: said[sample.id])
    assert problems == {"broken row": 2} and not [value for value in values.values() if value == value]
    assert "server judges" in verdicts[0].reason
    handed = json.loads((data.parent / "run" / "submission.json").read_text())
    assert handed == {"test_Art_1": "B", "test_Art_2": "A", "test_Math_1": "6000", "test_Math_2": ""}


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
    assert (values["all"], values["unread"], values["Art"], values["Math"]) == (50, 25, 50, 50)
    assert "no answer in it" in {v.id: v for v in verdicts}["validation_Art_2"].reason


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
            "metadata": {"task": "geometry" if pid < 4 else "charts", "skills": ["algebra"] * (pid < 3)},
            **more,
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
    parquet(data / "data" / "test-00000-of-00002-0.parquet", [{**row, "answer": ""} for row in rows])
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
    assert values == {"all": 80, "unread": 20, "charts": 50, "geometry": 100, "algebra": 100}
    with pytest.raises(ValueError, match="mathvista needs a judge"):
        run(understanding.MATHVISTA, data, lambda sample: "")


def test_mathvista_step_by_step_is_asked_otherwise_and_read_alike(data: Path) -> None:
    mathvista(data)
    write(data / "evaluate_mathvista.py", f"COT_INSTRUCTION = {STEPS!r}\n")
    plain, steps = (
        {s.id: s for s in suite.samples(data) if not s.problem}
        for suite in (understanding.MATHVISTA, understanding.MATHVISTA_COT)
    )
    assert plain.keys() == steps.keys() and plain["1"].truth == steps["1"].truth
    assert steps["1"].parts[-1] == STEPS.replace("{question}", "Hint: integer\nQuestion: 1")


def test_mathvista_test_is_judged_by_its_authors(data: Path) -> None:
    mathvista(data)
    values, problems, verdicts = run(understanding.MATHVISTA_TEST, data, lambda sample: f"it is {sample.id}")
    assert problems == {"broken row": 1} and not [value for value in values.values() if value == value]
    assert "server judges" in verdicts[0].reason
    handed = json.loads((data.parent / "run" / "submission.json").read_text())
    assert handed.keys() == {*"123456"} and handed["2"]["response"] == "it is 2"
    assert handed["2"]["choices"] == ["145°", "35°"] and handed["2"]["metadata"]["task"] == "geometry"


# VQA --------------------------------------------------------------------------------------------------------


def test_vqa_layouts(data: Path) -> None:
    ten = [{"answer": "2"}] * 2 + [{"answer": "two dogs"}] * 8
    named = {"v2_": "COCO_val2014_000000000042.jpg", "": "COCO_val2014_000000000042.jpg"}
    for prefix, name in named.items():
        rows = [{"question_id": 420 + n, "image_id": 42 + n, "question": "How many?"} for n in (0, 1)]
        path = data / f"{prefix}OpenEnded_mscoco_val2014_questions.json"
        write(path, json.dumps({"questions": [*rows, {"question_id": 7}, 8]}))
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
    for suite in (BY_NAME[name] for name in worth):
        told = asked(suite, data)
        before = "When the provided information is insufficient, respond with 'Unanswerable'. "
        assert str(told[ids[suite.name]]).endswith(f"? {before if suite.name == 'vizwiz' else ''}{word}")
        values, problems, _ = run(suite, data, lambda sample, name=suite.name: said[name])
        # of ten people two said "2": 2 x 1/3 and 8 x 2/3 make 0.6
        assert values == {"all": pytest.approx(worth[suite.name]), "unread": 0}
        broken = {"broken picture": 1, "broken row": 2} if suite.name in ("vqav2", "okvqa") else {}
        assert problems == broken
        (data.parent / "run").rename(data.parent / suite.name)


def test_vqa_tests_are_judged_by_servers(data: Path) -> None:
    for split in ("test-dev2015", "test2015"):
        rows = [{"question_id": 420 + n, "image_id": 42 + n, "question": "How many?"} for n in (0, 1)]
        path = data / f"v2_OpenEnded_mscoco_{split}_questions.json"
        write(path, json.dumps({"questions": [*rows, {"question_id": 7}]}))
    write(data / "test2015" / "COCO_test2015_000000000042.jpg", png())
    write(data / "test.json", json.dumps([{"image": "VizWiz_test_0.jpg", "question": "What?"}]))
    write(data / "test" / "VizWiz_test_0.jpg", png())
    handed = {}
    for name in ("vqav2-test-dev", "vqav2-test", "vizwiz-test"):
        values, problems, verdicts = run(BY_NAME[name], data, lambda sample: "Two dogs.")
        assert not [value for value in values.values() if value == value]
        assert "server judges" in verdicts[0].reason
        broken = {} if name.startswith("vizwiz") else {"broken picture": 1, "broken row": 1}
        assert problems == broken
        handed[name] = json.loads((data.parent / "run" / "submission.json").read_text())
        (data.parent / "run").rename(data.parent / name)
    # one entry for each question that has a number, as visualqa.org wants it; VizWiz goes by the picture
    both = [{"question_id": 420, "answer": "Two dogs."}, {"question_id": 421, "answer": ""}]
    assert handed["vqav2-test-dev"] == handed["vqav2-test"] == both
    assert handed["vizwiz-test"] == [{"image": "VizWiz_test_0.jpg", "answer": "Two dogs."}]


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
    assert limits["pope"] == 100 and limits["pope-cot"] == 1000 and limits["mathvista-cot"] == 4096
    assert limits["mme"] == 20 and limits["mmbench-dev-cn"] == limits["mmvp"] == 100 and limits["mmmu"] == 10
    assert (limits["mmmu-cot"], limits["mm-vet"], limits["mathvista"]) == (16384, 1000, 4096)
    ours = {suite.name: suite.published.get("BAGEL 7B MoT") for suite in SUITES}
    assert ours["mme"] == {"perception": 1687, "total": 2388} and ours["mmmu-cot"] == {"all": 55.3}
    assert ours["mmbench-dev-en"] == {"circular": 85.0} and ours["mmbench-test-en"] is None
    assert [ours[name] for name in ("mmmu", "mmmu-test", "pope", "mathvista-test")] == [None] * 4
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


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)
def test_every_suite_can_think_first(suite: Suite, tmp_path: Path) -> None:
    """What may be thought is what the reference lets chains of thought take; answers stay as short."""
    plan = Plan(data=tmp_path, folder=tmp_path, think=True)
    ask = base.preset(tiny.bagel(), suite, plan).config.settings.ask
    longest = {"mmmu": 16384, "mmmu-test": 16384, "mmmu-cot": 0, "mm-vet": 4096}
    usual = 4096 if suite.name.startswith("mathvista") else 1000
    assert ask.max_think_tokens == longest.get(suite.name, usual)
    assert (ask.max_tokens, ask.temperature) == (suite.options["max_tokens"], 0.0)


def test_a_thought_is_kept_apart(data: Path, tmp_path: Path) -> None:
    mme(data, ["count"])
    suite = replace(understanding.MME, looks=None)
    options = {"max_tokens": 3, "max_think_tokens": 4}
    plan = Plan(data=data, folder=tmp_path / "run", limit=2, think=True, options=options)
    assert len(list(base.run(suite, plan, tiny.bagel, model="tiny"))) == 2
    told = json.loads((plan.folder / "run.json").read_text())
    assert told["think"] and told["options"] == {"max_tokens": 3, "max_think_tokens": 4, "temperature": 0.0}
