"""What a training step costs: the package's choices against the reference's, on the same weights.

    python -m benchmarks.train --tokens 2048 7168 --width 256 --layers 4

                 tokens              experts                          attention            activations
    ours         [und | gen], once   two slices                       split by split       kept
    reference    as they come        a gather and a scatter for       a dense mask per     every layer's
    -style                           every operation of a layer       sample, every pack   computed again

Reference-style is this package's own model driven with the reference's choices; it is spared that the
reference repeats keys and values for every query head. Losses and gradients must agree before anything is
timed. CPU time of one thread, the runs taking turns; random weights, the 7B's proportions. The mix `released`
is what the reference's released code trains on; `paper` adds what only the paper trains on.
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from benchmarks.clock import milliseconds, table
from benchmarks.counters import VIEWS, operations
from benchmarks.model import random_config
from benchmarks.packing import LENGTHS, fill, planned
from openbagel.attention import SplitAttention, rotary_tables, rotate
from openbagel.config import BagelConfig, ViTConfig, bagel_7b
from openbagel.data.packing import Packing, PackingMethod
from openbagel.model.bagel import BagelModel
from openbagel.model.transformer import Block, Expert
from openbagel.sequence import PackedSequence, Packer, Segment, Span, Text, VaeImage, VitImage
from openbagel.tokens import TextCodec
from openbagel.train.optim import EMA, AdamW, Optimizer
from openbagel.train.parallel import LAYERS, clip_gradients

HEAD_WIDTH, QUERIES_PER_KEY = 64, 4
PARTS = ("pack", "mask", "forward", "backward", "optimiser")
LEARNED = ("mask", "forward", "backward")
"""What the gain is measured on; packing and the optimiser are the same on both sides."""
TOLERANCE = 1e-5
T2I = (1.0, (70, "target"))
EDIT = (1.0, ("clean", "shown", 25, "target"))
VLM = (1.0, ("shown", 20, 80))
WEB = (0.5, (120, 40, "target", "clean", "shown") * 4)
MIXES = {"released": (T2I, T2I, EDIT, VLM), "paper": (T2I, T2I, EDIT, VLM, WEB)}
"""Samples of a pack: the sides of their pictures as a share of whole ones, then texts (by their length;
learned where they end a sample), pictures to draw, clean latents and pictures looked at. Lengths are medians
of benchmarks/packing.py.
"""


# the model and its packs ------------------------------------------------------------------------------------


def config_of(vocab_size: int, width: int, layers: int) -> BagelConfig:
    """The 7B made narrower: the same shares of MLP, keys and ViT."""
    big, small = bagel_7b(), random_config(vocab_size, width, layers)
    assert big.vit and small.vae
    heads = max(1, width // HEAD_WIDTH)
    llm = replace(
        small.llm,
        intermediate_size=8 * round(width * big.llm.intermediate_size / big.llm.hidden_size / 8),
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // QUERIES_PER_KEY),
    )
    vit_width = 16 * max(1, round(width * big.vit.hidden_size / big.llm.hidden_size / 16))
    vit = ViTConfig(
        hidden_size=vit_width,
        intermediate_size=8 * round(vit_width * big.vit.intermediate_size / big.vit.hidden_size / 8),
        num_hidden_layers=layers + 1,
        num_attention_heads=max(1, vit_width // 72),
        patch_size=big.vit.patch_size,
    )
    side = big.vit_max_num_patch_per_side
    return replace(small, llm=llm, vit=vit, vit_max_num_patch_per_side=side)


def samples(config: BagelConfig, tokens: int, mix: str = "released") -> list[list[Segment]]:
    """The mix with the largest pictures that fit into so many tokens."""
    sides = range(1, config.max_latent_size + 1)
    side = max([side for side in sides if size(config, side, mix) <= tokens], default=1)
    segment = partial(_segment, config, torch.Generator().manual_seed(tokens))
    return [
        [segment(round(scale * side), part, loss=i + 1 == len(parts)) for i, part in enumerate(parts)]
        for scale, parts in MIXES[mix]
    ]


def size(config: BagelConfig, side: int, mix: str) -> int:
    """Tokens of a mix whose whole pictures are side x side latent tokens."""
    lengths = [
        part + 2 if isinstance(part, int) else _grid(round(scale * side), part)[0] ** 2 + 2
        for scale, parts in MIXES[mix]
        for part in parts
    ]
    return sum(lengths)


def _grid(side: int, kind: str) -> tuple[int, int]:
    """Latent tokens, or ViT patches for what is looked at."""
    count = max(1, round(side * 70 / 64) if kind == "shown" else side)
    return count, count


def _segment(
    config: BagelConfig, generator: torch.Generator, side: int, part: int | str, *, loss: bool
) -> Segment:
    if isinstance(part, int):
        return Text(tuple(i % 200 for i in range(part)), loss)
    grid = _grid(side, part)
    if part == "shown":
        assert config.vit
        pixels = [count * config.vit.patch_size for count in grid]
        return VitImage(torch.rand(3, *pixels, generator=generator) * 2 - 1)
    clean, target = torch.randn(2, grid[0] * grid[1], config.latent_channels, generator=generator)
    if part == "clean":
        return VaeImage.clean(clean, grid)
    return VaeImage.noised(clean, grid, float(torch.rand((), generator=generator)), target=target)


# the reference's choices ------------------------------------------------------------------------------------


def dense_mask(spans: Sequence[Span]) -> Tensor:
    """bool[n, n]: what each token of a sample sees, in the sample's order, filled split by split."""
    total = sum(span.length for span in spans)
    mask = torch.zeros(total, total, dtype=torch.bool)
    start = 0
    for span in spans:
        stop = start + span.length
        mask[start:stop, :stop] = True
        if span.causal:
            mask[start:stop, start:stop].tril_()
        start = stop
    start = 0
    for span in spans:
        start += span.length
        if span.hidden:
            mask[start:, start - span.length : start] = False
    return mask


def both(modules: Sequence[Callable[[Tensor], Tensor]], places: Sequence[Tensor], x: Tensor) -> Tensor:
    """One operation of a layer: each expert's tokens are gathered, and what comes out is scattered."""
    parts = [module(x[rows]) for module, rows in zip(modules, places, strict=True)]
    out = parts[0].new_zeros(len(x), *parts[0].shape[1:])
    for rows, part in zip(places, parts, strict=True):
        out[rows] = part
    return out


def gathering_block(
    block: Block, x_TD: Tensor, places: Sequence[Tensor], attend: Callable[..., Tensor]
) -> Tensor:
    """A layer on tokens in any order; places are those of each expert's tokens."""
    und, gen = block.experts

    def each(function: Callable[[Expert], Any], x: Tensor) -> Tensor:
        return both((function(und), function(gen)), places, x)

    normed = each(lambda e: e.input_norm, x_TD)
    q, k, v = (
        each(proj, normed).unflatten(-1, (-1, block.head_dim))
        for proj in (lambda e: e.q_proj, lambda e: e.k_proj, lambda e: e.v_proj)
    )
    if und.q_norm:
        q, k = each(lambda e: e.q_norm, q), each(lambda e: e.k_norm, k)
    x_TD = x_TD + each(lambda e: e.o_proj, attend(q, k, v).flatten(1))
    return x_TD + each(lambda e: e.feed_forward, x_TD)


def masked_attention(
    rotary: tuple[Tensor, Tensor], masks: Sequence[Tensor], q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Samples one by one, each under its dense mask; float[T, N, H]."""
    q, k = rotate(q, *rotary), rotate(k, *rotary)
    lengths = [len(mask) for mask in masks]
    split = (t.transpose(0, 1)[None].split(lengths, dim=2) for t in (q, k, v))
    samples = zip(*split, masks, strict=True)
    outputs = [F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True) for q, k, v, mask in samples]
    return torch.cat(outputs, dim=2)[0].transpose(0, 1)


class ReferenceStyle:
    """A copy of a model that makes the reference's choices."""

    def __init__(self, model: BagelModel, recompute: bool = True) -> None:
        self.model, self.recompute = copy.deepcopy(model), recompute
        self.masks: list[Tensor] = []
        self.model.__dict__["forward"] = self._forward
        for module in self.model.modules():
            if recompute and isinstance(module, LAYERS) and not isinstance(module, Block):
                module.__dict__["forward"] = partial(self._run, module.forward)

    def mask(self, pack: PackedSequence) -> None:
        self.masks = [dense_mask(spans) for spans in pack.spans]

    def _run(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if not self.recompute:
            return function(*arguments)
        out = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(out, Tensor)
        return out

    def _forward(self, pack: PackedSequence, **_: Any) -> Tensor:
        """What `BagelModel.forward` returns, computed on tokens in their logical order."""
        order, llm = torch.argsort(pack.logical), self.model.config.llm
        rotary = rotary_tables(pack.position_ids[order], llm.head_dim, llm.rope_theta)
        attend = partial(masked_attention, rotary, self.masks)
        places = [rows.nonzero().flatten() for rows in (order < pack.num_und, order >= pack.num_und)]
        x_TD = self.model.embed(pack)[order]
        for block in self.model.language_model.model.layers:
            x_TD = self._run(partial(gathering_block, block), x_TD, places, attend)  # pyright: ignore
        return x_TD[pack.logical]


# runs -------------------------------------------------------------------------------------------------------


class Run:
    """A model in training. style None: the package's own choices."""

    def __init__(self, name: str, model: BagelModel, style: ReferenceStyle | None = None) -> None:
        self.name, self.style = name, style
        self.model = style.model if style else copy.deepcopy(model)
        self.optimizer = Optimizer(self.model, AdamW())
        self.ema = EMA(self.model, 0.9999, warmup=False)

    def mask(self, pack: PackedSequence) -> None:
        if self.style:
            self.style.mask(pack)

    def loss(self, pack: PackedSequence) -> Tensor:
        ce, mse = self.model.losses(pack)
        return ce.mean() + mse.mean()

    def backward(self, pack: PackedSequence) -> None:
        self.loss(pack).backward()

    def step(self, packer: Packer, batch: Sequence[Sequence[Segment]]) -> dict[str, float]:
        """One step's CPU seconds by part."""
        times = [time.process_time()]

        def done() -> None:
            times.append(time.process_time())

        pack = packer.pack(batch)
        done()
        self.mask(pack)
        done()
        loss = self.loss(pack)
        done()
        loss.backward()
        done()
        clip_gradients(list(self.optimizer.parameters.values()), 1.0)
        self.optimizer.step(1e-5)
        self.ema.update(self.model, 1)
        self.optimizer.clear()
        done()
        return {part: end - start for part, start, end in zip(PARTS, times, times[1:], strict=False)}


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """A packer and runs on the same weights: ours, reference-style, and that without its recomputation."""

    packer: Packer
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, width: int, layers: int) -> "Bench":
        codec = TextCodec.train(["a red circle above a blue square"], 300)
        config = config_of(len(codec), width, layers)
        model = BagelModel(config)
        model.initialise(torch.Generator().manual_seed(0))
        torch.nn.init.normal_(model.llm2vae.weight, std=0.05, generator=torch.Generator().manual_seed(1))
        runs = (
            Run("ours", model),
            Run("reference-style", model, ReferenceStyle(model)),
            Run("reference-style, nothing recomputed", model, ReferenceStyle(model, recompute=False)),
        )
        return cls(Packer(config, codec), runs)

    def samples(self, tokens: int, mix: str = "released") -> list[list[Segment]]:
        return samples(self.packer.config, tokens, mix)

    def pack(self, tokens: int, mix: str = "released") -> PackedSequence:
        return self.packer.pack(self.samples(tokens, mix))


def differences(bench: Bench, pack: PackedSequence) -> tuple[float, float]:
    """How far the runs' losses (every label's, every latent token's) and gradients lie apart, as norms
    relative to the first run's; the most of all runs.
    """
    losses, gradients = [], []
    for run in bench.runs:
        run.mask(pack)
        ce, mse = run.model.losses(pack)
        (ce.mean() + mse.mean()).backward()
        losses.append(torch.cat([ce.detach(), mse.detach().flatten()]))
        gradients.append(torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None]))
        run.optimizer.clear()
    off = (max(float((x - all[0]).norm() / all[0].norm()) for x in all) for all in (losses, gradients))
    return next(off), next(off)


def timed(bench: Bench, batch: Sequence[Sequence[Segment]], rounds: int) -> list[list[dict[str, float]]]:
    """The parts' seconds of each run's steps; the runs take turns, and a first round does not count."""
    rows = [[run.step(bench.packer, batch) for run in bench.runs] for _ in range(rounds + 1)]
    return [list(steps) for steps in zip(*rows[1:], strict=True)]


def spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def step_table(bench: Bench, tokens: int, mix: str, rounds: int) -> str:
    batch = bench.samples(tokens, mix)
    pack = bench.packer.pack(batch)
    loss_off, gradient_off = differences(bench, pack)
    assert max(loss_off, gradient_off) < TOLERANCE, f"losses {loss_off} and gradients {gradient_off} apart"
    steps = timed(bench, batch, rounds)
    rows: list[list[object]] = []
    for run, own in zip(bench.runs, steps, strict=True):
        gains = [
            [
                _seconds(other, parts) / _seconds(mine, parts)
                for mine, other in zip(steps[0], own, strict=True)
            ]
            for parts in (LEARNED, PARTS)
        ]
        times = [1e3 * median(step[part] for step in own) for part in PARTS]
        rate = f"{len(pack) / median(_seconds(step, PARTS) for step in own):.0f}"
        rows.append([run.name, *times, rate, *map(spread, gains)])
    headers = ["run", *(f"{part} ms" for part in PARTS), "tokens/s", "ours is faster by", "in the whole step"]
    title = f"A step of {len(pack)} tokens of the mix {mix}; the median of {rounds} rounds (least to most)"
    masks = [dense_mask(spans) for spans in pack.spans]
    share = sum(mask.numel() for mask in masks) / sum(int(mask.sum()) for mask in masks)
    notes = [
        f"Dense masks hold {share:.2f} times the pairs that see each other.",
        f"Losses are {loss_off:.1e} apart, gradients {gradient_off:.1e}.",
    ]
    return "\n".join([table(title, headers, rows), "", *notes])


def _seconds(step: dict[str, float], parts: Sequence[str]) -> float:
    return sum(step[part] for part in parts)


# counts -----------------------------------------------------------------------------------------------------


def layer_operations(tokens: int) -> dict[str, int]:
    """Non-view operations of one more layer (of decoder and ViT each), forward and backward, of each run."""
    counts: dict[str, list[int]] = {}
    for layers in (1, 2):
        bench = Bench.of(64, layers)
        pack = bench.pack(tokens)
        for run in bench.runs:
            run.mask(pack)
            counted = operations(partial(run.backward, pack))
            counts.setdefault(run.name, []).append(counted.work.total())
    return {name: more - few for name, (few, more) in counts.items()}


class Masks(TorchDispatchMode):
    """Counts the bytes of all boolean tensors that are made below it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not (func.is_view or str(func) in VIEWS or func._schema.is_mutable):
            made = [t for t in tree_iter(out) if isinstance(t, Tensor) and t.dtype == torch.bool]
            self.bytes += sum(t.nbytes for t in made)
        return out


def mask_bytes(run: Run, pack: PackedSequence) -> int:
    """Bytes of the masks of one pack and one forward."""
    with torch.no_grad(), Masks() as masks:
        run.mask(pack)
        run.loss(pack)
    return masks.bytes


def mask_table(lengths: Sequence[int], repeats: int) -> str:
    bench = Bench.of(64, 1)
    llm, (ours, theirs, _) = bench.packer.config.llm, bench.runs
    rows = []
    for tokens in lengths:
        pack = bench.pack(tokens)
        rotary = rotary_tables(pack.position_ids, llm.head_dim, llm.rope_theta)
        times = milliseconds([partial(SplitAttention, pack, rotary), partial(theirs.mask, pack)], repeats)
        counts = (mask_bytes(run, pack) / len(pack) for run in (ours, theirs))
        rows.append([len(pack), *times, *counts])
    headers = ["tokens", "ms, ours", "ms, dense", "bytes a token, ours", "bytes a token, dense"]
    return table("What a pack's masks cost, one layer", headers, rows)


def fill_table() -> str:
    rows = []
    for method in PackingMethod:
        packing = Packing(method=method)
        rows.append([method.value, f"{fill(planned(packing, 2), packing):.1%}"])
    return table(f"Fill of packs of {Packing().max_num_tokens} tokens", ["packing", "fill"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 7168], help="most of a pack")
    parser.add_argument("--mix", nargs="+", choices=MIXES, default=list(MIXES))
    parser.add_argument("--width", type=int, default=256, help="hidden size, a multiple of 64")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--masks", type=int, nargs="*", default=[1024, 2048, 4096, 8192, 16384])
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    bench = Bench.of(options.width, options.layers)
    for mix in options.mix:
        for tokens in options.tokens:
            print(step_table(bench, tokens, mix, options.rounds), flush=True)
    counted = layer_operations(min(options.tokens)).items()
    print(table("Operations of one more layer, forward and backward", ["run", "operations"], list(counted)))
    print(mask_table(options.masks, options.rounds))
    if LENGTHS.is_file():
        print(fill_table())


if __name__ == "__main__":
    main()
