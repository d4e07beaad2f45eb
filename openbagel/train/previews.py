"""Pictures and answers from fixed prompts while a model trains."""

import re
from dataclasses import dataclass
from pathlib import Path

from openbagel.checks import spared
from openbagel.inference.pipeline import Bagel
from openbagel.picture_files import open_picture, save_picture
from openbagel.weights import Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Preview:
    """What is shown every so many steps (0: never). questions: (picture file, question); an empty file name
    asks without a picture. Prompt number i is drawn with seed + i."""

    every: int = 0
    prompts: tuple[str, ...] = ()
    questions: tuple[tuple[str, str], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.every < 0 or (self.every and not (self.prompts or self.questions)):
            raise ValueError(f"preview.every {self.every} needs prompts or questions; 0 is no previews")


class Previews:
    """Draws and asks with the live model. Its weights, gradients and modes stay as they are, and no global
    generator is used.

    checkpoint holds the model that trains. folder None draws without writing: for the other ranks of a
    sharded model, which must run the same forwards. Pictures are opened here, so that nothing fails for
    their sake in the middle of a run: ValueError.
    """

    def __init__(self, checkpoint: Checkpoint, preview: Preview, *, folder: Path | None) -> None:
        self.preview, self.folder, self.bagel = preview, folder, Bagel(checkpoint)
        if preview.prompts and checkpoint.autoencoder is None:
            raise ValueError("preview.prompts: this model has no autoencoder to draw with; leave them out")
        if any(file for file, _ in preview.questions) and checkpoint.config.vit is None:
            raise ValueError("preview.questions: this model has no ViT to look with; leave the pictures out")
        self.pictures = [[open_picture(Path(file))] if file else [] for file, _ in preview.questions]

    def due(self, step: int) -> bool:
        """Whether previews are wanted after so many steps."""
        return self.preview.every > 0 and step % self.preview.every == 0

    def draw(self, step: int) -> Path | None:
        """Writes previews/step-0000200/ with a PNG a prompt and answers.txt; returns that folder."""
        target = self.folder and self.folder / "previews" / f"step-{step:07d}"
        seed, said = self.preview.seed, []
        for number, prompt in enumerate(self.preview.prompts):
            picture = self.bagel.generate(prompt, seed=seed + number)  # a batch would need more memory
            name = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:48]
            with spared("previews are not written"):
                if target:
                    save_picture(picture, target / f"{number + 1}-{name}.png")
        for shown, (file, question) in zip(self.pictures, self.preview.questions, strict=True):
            said.append(f"{file}\nQ: {question}\nA: {self.bagel.ask(shown, question, seed=seed)}\n".lstrip())
        with spared("previews are not written"):
            if target and said:
                target.mkdir(parents=True, exist_ok=True)
                (target / "answers.txt").write_text("\n".join(said), "utf-8")
        return target
