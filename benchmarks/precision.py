"""What each precision costs and keeps, on nano: sizes, errors against float32, times, scores in its toy
world.

python -m benchmarks.precision --samples 20
python -m benchmarks.precision --samples 200 --device cuda

Every row is a folder that `openbagel convert --to` writes and `Bagel.load` reads. Packed ones compute in
float32, on CUDA in bfloat16. An error is that of velocities or logits over the packs: the norm of the
difference over the norm, and the largest difference over the largest number. Times are over float32's of the
same run.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.clock import milliseconds
from openbagel import Bagel, cli
from openbagel.evals.base import mean
from openbagel.evals.world import SEED, Plan, evaluate
from openbagel.flow import interpolate
from openbagel.images import to_pixels
from openbagel.inference.image import draw_noise
from openbagel.inference.pipeline import seeded
from openbagel.sequence import PackedSequence, Segment, Text, VaeImage
from openbagel.verbs.models import FORMATS
from openbagel.world.exercise import Draws, Said, Shown, Writes
from openbagel.world.render import render_picture
from openbagel.world.samples import world_named
from openbagel.world.tasks import example

KINDS = ("draw_one", "ask_shape", "edit_recolour")
TIMES = (0.2, 0.5, 0.8, 0.95)
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
HEADERS = ("precision", "on disk", "in memory", "velocity error", "largest", "logit error", "largest")
HEADERS += ("a picture", "an answer", *KINDS)


def segments(bagel: Bagel, kind: str, number: int, t: float) -> list[Segment]:
    """One exercise as the model is fed it, its last picture noised to time t."""
    world, segments = world_named("nano"), list[Segment]()
    steps = example(world, SEED, number, kind).without_thought().steps
    for step in steps:
        if isinstance(step, Said | Writes):
            segments.append(Text(bagel.codec.encode(step.words)))
            continue
        assert isinstance(step, Shown | Draws)
        picture = render_picture(step.view, world.side)
        clean = bagel.encode(to_pixels(picture), seeded(number)).frames[0]
        if step is steps[0]:
            segments += bagel.pictures.condition([clean.tokens], clean.grid, [picture])
        else:
            noise = draw_noise(clean.grid, bagel.config.latent_channels, seeded(number))
            segments.append(VaeImage.noised(interpolate(clean.tokens, noise, t), clean.grid, t))
    return segments


@torch.inference_mode()
def outputs(bagel: Bagel, packs: list[PackedSequence]) -> tuple[Tensor, Tensor]:
    """Velocities of all latent tokens and logits of all understanding tokens, in float32."""
    hidden = [(bagel.model(pack), pack.num_und) for pack in packs]
    velocity = torch.cat([bagel.model.velocity(h[n:]).float().flatten() for h, n in hidden])
    return velocity, torch.cat([bagel.model.logits(h[:n]).float().flatten() for h, n in hidden])


def errors(found: Tensor, right: Tensor) -> list[str]:
    off, norms = found - right, (torch.Tensor.norm, lambda x: x.abs().max())
    return [f"{(norm(off) / norm(right)).item():.1e}" for norm in norms]


def score(bagel: Bagel, samples: int) -> list[str]:
    verdicts = list(evaluate(bagel, Plan(kinds=KINDS, samples=samples)))
    return [f"{mean(verdicts, 'right', kind):.0%}" for kind in KINDS]


def load_all(folder: Path, names: list[str], device: str) -> Iterator[tuple[str, Bagel, int]]:
    """Each precision that can be written here, with the size of its transformer in bytes."""
    for name in names:
        place = folder / name
        if cli.main(["convert", "nano", str(place), "--to", name]):
            continue
        files = [path for path in place.iterdir() if path.suffix in (".safetensors", ".gguf")]
        size = sum(path.stat().st_size for path in files if not path.name.startswith("ae."))
        dtype = DTYPES.get(name, torch.bfloat16 if device.startswith("cuda") else torch.float32)
        yield name, Bagel.load(place, device=device, dtype=dtype), size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=20, help="exercises of each kind, 0 for none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--packs", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=list(FORMATS), choices=FORMATS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = ["float32", *(name for name in options.only if name != "float32")]
    with tempfile.TemporaryDirectory(prefix="openbagel-") as folder:
        loaded = list(load_all(Path(folder), names, options.device))
        bagels = [bagel for _, bagel, _ in loaded]
        told = [
            [segments(bagels[0], kind, number, TIMES[number % len(TIMES)]) for kind in KINDS]
            for number in range(options.packs)
        ]
        packs = [bagels[0].engine.packer.pack(samples).to(options.device) for samples in told]
        right = outputs(bagels[0], packs)
        picture = bagels[0].generate("a red circle")
        drawing = milliseconds([lambda b=b: b.generate("a red circle") for b in bagels], options.repeats)
        asking = milliseconds(
            [lambda b=b: b.ask(picture, "what shape is the red object?") for b in bagels], 5
        )
        print("| " + " | ".join(HEADERS) + " |\n|---" + "|---:" * (len(HEADERS) - 1) + "|")
        for (name, bagel, size), draws, asks in zip(loaded, drawing, asking, strict=True):
            held = sum(parameter.nbytes for parameter in bagel.model.parameters())
            found = outputs(bagel, packs)
            cells = [name, f"{size / 1e6:.1f} MB", f"{held / 1e6:.1f} MB"]
            cells += [*errors(found[0], right[0]), *errors(found[1], right[1])]
            cells += [f"{draws / drawing[0]:.2f}", f"{asks / asking[0]:.2f}"]
            cells += score(bagel, options.samples) if options.samples else ["-"] * len(KINDS)
            print("| " + " | ".join(cells) + " |", flush=True)
        print(f"\nfloat32: {drawing[0]:.0f} ms a picture, {asking[0]:.0f} ms an answer")


if __name__ == "__main__":
    main()
