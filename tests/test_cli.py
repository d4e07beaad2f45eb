"""The command line: its verbs and options are pinned, its errors are one line with exit code 2."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from PIL import Image

from openbagel import cli
from openbagel.config import Sampling
from openbagel.flow import Guidance, Renorm
from openbagel.verbs import use
from openbagel.verbs.options import ModelOptions

MODEL = {"--model", "--device", "--dtype", "--quantize", "--lora", "--offload", "--max-memory"}
MODEL |= {"--understanding-only"}
SAMPLING = {
    "--think",
    "--seed",
    "--max-tokens",
    "--max-think-tokens",
    "--temperature",
    "--top-p",
    "--top-k",
    "--num-timesteps",
    "--timestep-shift",
    "--eta",
    "--taylorseer",
    "--tiled-vae",
    "--negative-prompt",
    "--text-guidance",
    "--image-guidance",
    "--guidance-interval",
    "--renorm",
    "--renorm-min",
}
PINNED = {
    "generate": MODEL | SAMPLING | {"--prompts", "--output", "-o", "--num", "--size"},
    "ask": MODEL | SAMPLING,
    "edit": MODEL | SAMPLING | {"--output", "-o", "--size"},
    "video": MODEL
    | SAMPLING
    | {"--prompt", "--num-frames", "--fps", "--include-given", "--size", "--output", "-o"},
    "serve": MODEL | {"--host", "--port", "--api-key", "--insecure", "--no-ui", "--limits"},
    "ui": MODEL
    | {"--model_path", "--server-name", "--server_name", "--server-port", "--server_port"}
    | {"--share", "--password"},
    "info": {"--fit", "--size"},
    "download": {"--to", "--revision", "--workers"},
    "doctor": set(),
    "demo": MODEL | {"--output", "-o"},
    "eval": MODEL
    | {"--kinds", "--samples", "--world", "--held-out", "--think", "--output", "-o", "--data", "--limit"}
    | {"--settings", "--batch", "--judge", "--judge-model", "--judge-votes", "--judge-price"}
    | {"--judge-budget", "--judge-cache"},
    "eval report": set(),
    "eval curve": {"--output", "-o", "--kinds", "--samples", "--weights", "--device"},
    "train": set(),
    "train plot": {"--output", "-o", "--smoothing"},
    "convert": {"--lora", "--weights", "--to", "--shard-gb"},
    "data doctor": {"--model", "--rows", "--max-num-tokens", "--dataset-info", "--previews", "-o"},
    "data convert": {"--format"},
    "data example": {"--rows", "--seed"},
}
QUICK = ["--num-timesteps", "3"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "new" / "drawn.png"
    assert cli.main(["generate", *QUICK, "a red circle", "-o", str(path), "--seed", "5"]) == 0
    return path


def test_verbs_and_options_are_pinned():
    assert set(cli.VERBS) == set(PINNED)
    for verb, options in PINNED.items():
        actions = cli.parser_for(verb)._actions
        found = {flag for action in actions for flag in action.option_strings} - {"-h", "--help"}
        assert found == options, verb


def test_generate_writes_a_picture_with_its_settings(drawn: Path):
    with Image.open(drawn) as picture:
        assert picture.size == (64, 64)
        assert picture.info["seed"] == "5"
        assert json.loads(picture.info["settings"])["num_timesteps"] == 3


def test_several_pictures_are_numbered(tmp_path: Path):
    assert cli.main(["generate", "a red circle", *QUICK, "--num", "2", "-o", str(tmp_path / "x.png")]) == 0
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue square\n", "utf-8")
    folder = tmp_path / "many"
    assert (
        cli.main(["generate", *QUICK, "--prompts", str(prompts), "-o", str(folder), "--size", "96x64"]) == 0
    )
    assert sorted(p.name for p in tmp_path.glob("x-*.png")) == ["x-1.png", "x-2.png"]
    assert sorted(p.name for p in folder.iterdir()) == ["1.png", "2.png"]
    with Image.open(folder / "1.png") as picture:
        assert picture.size == (96, 64)


def test_seeds_count_up(tmp_path: Path):
    assert cli.main(["generate", "a red circle", *QUICK, "--num", "2", "-o", str(tmp_path / "x.png")]) == 0
    alone = tmp_path / "alone.png"
    assert cli.main(["generate", "a red circle", *QUICK, "--seed", "1", "-o", str(alone)]) == 0
    difference = [
        abs(a - b)
        for a, b in zip(Image.open(tmp_path / "x-2.png").tobytes(), Image.open(alone).tobytes(), strict=True)
    ]
    assert max(difference) <= 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--limits", "que=3"], "did you mean 'queue'?"),
        (["--limits", "queue=many"], "expected int"),
        (["--limits", "queue"], "KEY=VALUE"),
        (["--host", "0.0.0.0"], "--api-key"),
        (["--api-key", ""], "--api-key"),
    ],
)
def test_a_server_that_must_not_start(options: list[str], told: str, capsys: pytest.CaptureFixture[str]):
    with suppress(SystemExit):
        assert cli.main(["serve", *options]) == 2
    errors = capsys.readouterr().err
    assert told in errors and errors.count("\n") == 1


def test_ask_prints_the_answer(drawn: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["ask", str(drawn), "what colour is the circle?", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip()


def test_thoughts_stand_on_one_line_beside_the_answer(drawn: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["ask", str(drawn), "how many circles are there?", "--think"]) == 0
    told = capsys.readouterr()
    assert len(told.err.split()) > 3 and told.err.count("\n") == 1 == told.out.count("\n")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["generate", "x", "-o", "a.doc"], "a.doc cannot be written"),
        (["generate", "x", "-o", "is.png"], "is.png cannot be written"),
        (["generate", "x", "-o", "new/a.mp4"], "a.mp4 cannot be written"),
        (["generate", "x", "-o", "-"], "not written to standard output; name a file"),
        (["edit", "out.png", "x"], "out.png was given and would be overwritten; name another file with -o"),
        (["edit", "many/1.png", "x", "-o", "many"], "1.png was given and would be overwritten"),
        (["edit", "link.png", "x"], "out.png was given and would be overwritten"),
        (["video", "out.gif"], "out.gif was given and would be overwritten"),
        (["video", "--prompt", "x", "-o", "out.png/x.gif"], "out.png"),
    ],
)
def test_no_picture_is_drawn_that_cannot_be_kept(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def load(options: object) -> None:
        raise AssertionError("the output was to be judged first")

    monkeypatch.setattr(ModelOptions, "load", load)
    monkeypatch.chdir(tmp_path)
    for folder in ("is.png", "many"):
        (tmp_path / folder).mkdir()
    for name in ("out.png", "out.gif", "many/1.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    (tmp_path / "link.png").symlink_to("out.png")
    assert cli.main(arguments) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "-").exists()


def test_what_is_drawn_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kept = []

    def keep(picture: Image.Image, path: Path) -> None:
        if kept:
            raise KeyboardInterrupt
        kept.append(path)

    monkeypatch.setattr(use, "keep", keep)
    assert cli.main(["generate", "x", *QUICK, "--num", "900", "-o", str(tmp_path)]) == 130
    assert kept == [tmp_path / "001.png"]


def test_a_reader_that_leaves_is_no_error(tmp_path: Path):
    script = Path(sys.executable).parent / "openbagel"
    line = f"{script} info bagel_7b 2> {tmp_path / 'err'} | head -c 1; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", line], stdout=subprocess.DEVNULL, check=False).returncode in (0, 1)
    assert (tmp_path / "err").read_text() == ""


def test_edit_keeps_the_size(drawn: Path, tmp_path: Path):
    out = tmp_path / "edited.png"
    assert cli.main(["edit", str(drawn), "make the circle blue", *QUICK, "-o", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.size == (64, 64)


def test_info_needs_no_weights(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["info", "nano"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["config"]["architectures"] == ["BagelForConditionalGeneration"]
    assert told["parameters"]["all"] == sum(v for k, v in told["parameters"].items() if k != "all")


def test_options_reach_the_sampling():
    values = vars(
        cli.parser_for("generate").parse_strictly(
            [
                "x",
                "--text-guidance",
                "3",
                "--guidance-interval",
                "0.1",
                "0.9",
                "--renorm",
                "channel",
                "--top-k",
                "5",
            ]
        )
    )
    values |= {"guidance_interval": tuple(values["guidance_interval"]), "renorm": Renorm(values["renorm"])}
    sampling = use.Generate(**values).over(Sampling())
    assert sampling.guidance == Guidance(text=3.0, interval=(0.1, 0.9), renorm=Renorm.CHANNEL)
    assert sampling.top_k == 5 and sampling.num_timesteps == Sampling().num_timesteps


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    (folder / "folder.png").mkdir()
    (folder / "text.png").write_text("no picture", "utf-8")
    Image.effect_noise((64, 64), 50).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:900])
    Image.new("1", (30000, 30000)).save(folder / "bomb.png")
    return folder


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "usage"),
        (["generat", "x"], "did you mean 'generate'"),
        (["generate"], "--prompts FILE"),
        (["generate", "x", "--prompts", "y"], "--prompts FILE"),
        (["generate", "--prompts", "nowhere.txt"], "nowhere.txt"),
        (["generate", "--prompts", "{}/whole.png"], "whole.png is no text in UTF-8"),
        (["ask", "https://a.org/b.png", "x"], "URLs are not fetched"),
        (["ask", "iVBOR" * 1000, "x"], "base64 is not decoded"),
        (["generate", "x", "--num", "0"], "--num 0"),
        (["generate", "x", "--sed", "1"], "did you mean '--seed'"),
        (["generate", "x", "--seed", "one"], "one"),
        (["generate", "x", "--size", "64"], "WIDTHxHEIGHT"),
        (["generate", "x", "--size", "60x64"], "60x64"),
        (["generate", "x", "--size", "6400x64"], "6400x64"),
        (["generate", "x", "--renorm", "local"], "text_channel"),
        (["generate", "x", "--num-timesteps", "1"], "num_timesteps 1"),
        (["generate", "x", "--guidance-interval", "0.9", "0.1"], "0.9"),
        (["generate", "x", "--model", "{}/empty"], "no weights"),
        (["generate", "x", "--model", "{}/nowhere"], "nowhere"),
        (["generate", "x", "--size", "0x64"], "WIDTHxHEIGHT"),
        (["generate", "x", "--device", "gpu"], "no device gpu"),
        (["generate", "x", "--device", "cuda:77"], "no device cuda:77"),
        (["generate", "x", "-o", "{}/drawn.doc"], "drawn.doc"),
        (["generate", "x", "-o", "{}/empty", "--num", "2", "--prompts", "y"], "--prompts FILE"),
        (["edit", "{}/whole.png", "x", "-o", "{}/folder.png"], "folder.png"),
        (["demo", "-o", "{}/whole.png/sheet.png"], "whole.png"),
        (["info", "bagel_7b", "--fit", "24"], "24GB"),
        (["convert", "nano", "{}/whole.png"], "whole.png"),
        (["edit", "remove the circle"], "at least one picture"),
        (["ask", "{}/whole.png"], "the question comes last"),
        (["edit", "{}/nowhere.png", "x"], "nowhere.png"),
        (["ask", "{}/text.png", "x"], "text.png"),
        (["ask", "{}/cut.png", "x"], "truncated"),
        (["ask", "{}/bomb.png", "x"], "pixels"),
        (["eval", "word"], "world"),
        (["eval", "world", "--kinds", "draw_on"], "did you mean 'draw_one'"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_input_is_one_clear_line(
    bad: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
):
    given = [argument.replace("{}", str(bad)) for argument in arguments]
    try:
        code = cli.main(given)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert told in captured.err + captured.out
    assert "Traceback" not in captured.err
    if given and given[0] in cli.VERBS:
        assert len(captured.err.strip().splitlines()) == 1


def test_eval_repeats_to_the_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in "ab":
        kinds = ["--kinds", "ask_colour", "ask_exists", "--samples", "3"]
        assert cli.main(["eval", "world", *kinds, "-o", str(tmp_path / name)]) == 0
        assert (tmp_path / name / "index.html").read_text("utf-8").count("<article ") == 6
    for file in ("run.json", "made-0.jsonl", "verdicts-0.jsonl", "summary.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert "ask_colour" in capsys.readouterr().out
