"""Verbs that use a model: draw, answer, edit, film, and a sheet of all."""

import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from openbagel.checks import retold
from openbagel.demo import sheet
from openbagel.inference.events import Event, Preview, Text, Thought
from openbagel.picture_files import clip_writer, read_frames
from openbagel.verbs.options import (
    ModelOptions,
    SamplingOptions,
    check_apart,
    keep,
    numbered,
    option,
    progress,
    size_of,
)


@dataclass(frozen=True, kw_only=True)
class Generate(ModelOptions, SamplingOptions):
    """draw pictures from prompts"""

    prompt: str | None = option(positional=True, help="what to draw", nargs="?")
    prompts: Path | None = option("a text file with one prompt a line, instead of PROMPT")
    output: Path = option("a PNG file, or a folder for several pictures", Path("out.png"), short="-o")
    num: int = option("pictures of each prompt, with seeds SEED, SEED+1, …", 1)
    size: tuple[int, int] | None = option("of the picture in pixels", metavar="WIDTHxHEIGHT", type=size_of)

    def run(self) -> None:
        prompts = [prompt for prompt in self._prompts() for _ in range(self.num)]
        paths = numbered(self.output, len(prompts))
        bagel = self.load()
        sampling = self.over(bagel.config.settings.draw)
        with progress(len(prompts) * (sampling.num_timesteps - 1)) as bar:
            drawer = bagel.using(sampling, listen=lambda event: bar.update(isinstance(event, Preview)))
            for i, path in enumerate(paths):  # one by one: memory for one, and what is drawn is kept
                drawn = drawer.generate(prompts[i], size=self.size, seed=self.seed + i, think=self.think)
                keep(drawn, path)

    def _prompts(self) -> list[str]:
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("give either a PROMPT or --prompts FILE")
        if self.num < 1:
            raise ValueError(f"--num {self.num} must be at least 1")
        if self.prompts is None:
            return [self.prompt or ""]
        with retold(f"{self.prompts} is no text in UTF-8 ({{error}})", UnicodeDecodeError):
            lines = [line.strip() for line in self.prompts.read_text("utf-8-sig").splitlines()]
        if not any(lines):
            raise ValueError(f"{self.prompts} holds no prompt; write one a line")
        return [line for line in lines if line]


@dataclass(frozen=True, kw_only=True)
class Ask(ModelOptions, SamplingOptions):
    """answer a question about pictures, or about none"""

    parts: list[str] = option(
        positional=True, help="picture files, then the question", nargs="+", metavar="IMAGE… QUESTION"
    )

    def run(self) -> None:
        *images, question = self.parts
        if Path(question).suffix.lower() in Image.registered_extensions() and Path(question).is_file():
            raise ValueError(f"{question} is a picture; the question comes last")
        bagel = self.load()
        speaker = bagel.using(self.over(bagel.config.settings.ask), listen=Speaker())
        speaker.ask(images, question, seed=self.seed, think=self.think)
        print()


@dataclass(frozen=True, kw_only=True)
class Edit(ModelOptions, SamplingOptions):
    """change pictures as an instruction says"""

    parts: list[str] = option(
        positional=True, help="picture files, then the instruction", nargs="+", metavar="IMAGE… INSTRUCTION"
    )
    output: Path = option("a PNG file", Path("out.png"), short="-o")
    size: tuple[int, int] | None = option("of the picture in pixels", metavar="WIDTHxHEIGHT", type=size_of)

    def run(self) -> None:
        *images, instruction = self.parts
        if not images:
            raise ValueError("nothing to edit: give at least one picture file before the instruction")
        (path,) = numbered(self.output, given=images)
        bagel = self.load()
        sampling = self.over(bagel.config.settings.edit)
        with progress(sampling.num_timesteps - 1) as bar:
            editor = bagel.using(sampling, listen=lambda event: bar.update(isinstance(event, Preview)))
            picture = editor.edit(images, instruction, size=self.size, seed=self.seed, think=self.think)
        keep(picture, path)


@dataclass(frozen=True, kw_only=True)
class Video(ModelOptions, SamplingOptions):
    """continue a clip, or film a prompt"""

    frames: list[str] | None = option(
        positional=True, help="the clip's first frames: picture, GIF or video files", nargs="*"
    )
    prompt: str | None = option("what happens in the clip")
    num_frames: int = option("frames to draw", 10)
    fps: float = option("frames a second of the file", 4.0)
    include_given: bool = option("put the given frames before the drawn ones", False)
    output: Path = option("a GIF or MP4 file", Path("out.gif"), short="-o")
    size: tuple[int, int] | None = option("of the frames in pixels", metavar="WIDTHxHEIGHT", type=size_of)

    def run(self) -> None:
        if self.think:
            raise ValueError("--think has no effect on clips; leave it out")
        if not (self.frames or self.prompt):
            raise ValueError("nothing to film: give FRAMES, --prompt TEXT, or both")
        check_apart([self.output], self.frames or [])
        write = clip_writer(self.output, self.fps)
        given = [frame for path in self.frames or [] for frame in read_frames(Path(path))]
        bagel = self.load()
        settings = bagel.config.settings
        sampling = self.over(settings.filming(shown=bool(given), told=bool(self.prompt)))
        groups = -(-self.num_frames // settings.video_group)
        with progress(groups * (sampling.num_timesteps - 1)) as bar:
            camera = bagel.using(sampling, listen=lambda event: bar.update(isinstance(event, Preview)))
            drawn = camera.continue_video(
                given, self.num_frames, prompt=self.prompt, size=self.size, seed=self.seed
            )
        shown = [frame.resize(drawn[0].size) for frame in given] if self.include_given else []
        write([*shown, *drawn])
        print(self.output)


@dataclass(frozen=True, kw_only=True)
class Demo(ModelOptions):
    """draw, answer, edit, think, and all else that the model learned, on one sheet"""

    output: Path = option("the PNG file; a clip is put beside it", Path("demo/sheet.png"), short="-o")

    def run(self) -> None:
        (path,) = numbered(self.output)
        picture, clip = sheet(self.load(), report=lambda line: print(line, flush=True))
        keep(picture, path)
        if clip:
            beside = path.with_name("clip.gif")
            clip_writer(beside, fps=4.0)(clip)
            print(beside)


class Speaker:
    """Prints an answer as it comes; thoughts go to the error stream, on lines of their own."""

    thinking = False

    def __call__(self, event: Event) -> None:
        if isinstance(event, Text | Thought):
            if self.thinking and isinstance(event, Text):
                print(file=sys.stderr)
            self.thinking = isinstance(event, Thought)
            print(event.text, end="", file=sys.stderr if self.thinking else sys.stdout, flush=True)
