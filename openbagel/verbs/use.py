"""Verbs that use a model: draw, answer, edit, film, and a sheet of all."""

import sys
from dataclasses import dataclass
from pathlib import Path

from openbagel.demo import sheet
from openbagel.inference.events import Event, Preview, Text, Thought
from openbagel.picture_files import clip_writer, read_frames
from openbagel.verbs.options import ModelOptions, SamplingOptions, keep, numbered, option, progress, size_of


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
            pictures = drawer.generate(prompts, size=self.size, seed=self.seed, think=self.think)
        for picture, path in zip(pictures, paths, strict=True):
            keep(picture, path)

    def _prompts(self) -> list[str]:
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("give either a PROMPT or --prompts FILE")
        if self.num < 1:
            raise ValueError(f"--num {self.num} must be at least 1")
        if self.prompts is None:
            return [self.prompt or ""]
        lines = [line.strip() for line in self.prompts.read_text("utf-8").splitlines()]
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
        bagel = self.load()
        speaker = bagel.using(self.over(bagel.config.settings.ask), listen=speak)
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
            raise ValueError("give at least one picture file before the instruction")
        bagel = self.load()
        sampling = self.over(bagel.config.settings.edit)
        with progress(sampling.num_timesteps - 1) as bar:
            editor = bagel.using(sampling, listen=lambda event: bar.update(isinstance(event, Preview)))
            picture = editor.edit(images, instruction, size=self.size, seed=self.seed, think=self.think)
        keep(picture, self.output)


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
        write = clip_writer(self.output, self.fps)
        given = [frame for path in self.frames or [] for frame in read_frames(Path(path))]
        bagel = self.load()
        settings = bagel.config.settings
        sampling = self.over(settings.edit if given and self.prompt else settings.draw)
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
        picture, clip = sheet(self.load(), report=lambda line: print(line, flush=True))
        keep(picture, self.output)
        if clip:
            beside = self.output.with_name("clip.gif")
            clip_writer(beside, fps=4.0)(clip)
            print(beside)


def speak(event: Event) -> None:
    """Prints an answer as it comes; thoughts go to the error stream."""
    if isinstance(event, Text):
        print(event.text, end="", flush=True)
    elif isinstance(event, Thought):
        print(event.text, end="\n", file=sys.stderr, flush=True)
