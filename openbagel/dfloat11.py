"""DFloat11 folders as the `dfloat11` package (0.5.0) defines them: bfloat16 weights, lossless, in 70 % of the
bytes. The exponents of several weights are Huffman-coded, their signs and mantissas lie beside them.

    config.json              dfloat11_config: threads_per_block, bytes_per_thread, and pattern_dict: regular
                             expressions for modules, each with the parts whose weights they hold one after
                             another (none: the module's own)
    *.safetensors            plain tensors under their own names, and of each such module the buffers
      sign_mantissa          uint8[N]: the sign bit and seven mantissa bits of each weight
      encoded_exponent       uint8[B]: codes of at most 32 bits one after another, first bit highest
      luts                   uint8[K + 1, 256]: by a byte of a code the exponent, or from 240 on 256 minus the
                             number of the table for its next byte; the last row: each exponent's code length
      gaps                   5 bits for each 8 bytes, a chunk: where in it the first code starts
      output_positions       uint32, stored as bytes: the number of the first code of each 512 chunks, and N
      split_positions        int64: where every packed weight but the first starts
    vae/ae.safetensors       the autoencoder, in a place where the package does not look

A chunk can be decoded without those before it: by a thread of a GPU each, or many side by side here.
"""

import heapq
import math
import re
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from openbagel import weights
from openbagel.checks import retold
from openbagel.files import read_json

CONFIG = "dfloat11_config"
LEAVES, SPLITS = ("luts", "encoded_exponent", "sign_mantissa", "output_positions", "gaps"), "split_positions"
BITS, THREADS = 64, 512
"""Of a chunk, the only size that the package's kernel knows, and chunks of a block."""
POINTERS = 240
"""LUT values from here on are tables, so exponents from here on (beyond 1e34, infinite, NaN) have no code."""
LONGEST, TABLES = 32, 17
"""Bits of a code, which may reach 31 bits beyond its chunk, and tables that can be pointed at."""
MOST = (48 * 1024 - 4 * THREADS - 4) // 2
"""Weights of a block: the kernel collects them in the memory that its threads share."""
OWNER = r"language_model\.(lm_head|model\.embed_tokens)|(language_model\.model|vit_model\..*)\.layers\.\d+"
"""Modules whose linears are packed together, or that are packed themselves."""
PATTERN = re.compile(r"(\w|\\?\.|(\\d|\[0-9])\+(?=\\\.|$))+")
"""What is taken of patterns for modules: names with open numbers. Others could take for ever to match."""
LOOKUP, AT_ONCE = 16, 8
"""The decoder looks LOOKUP bits up at once and takes at most AT_ONCE codes from them."""
ROW, LANES, PIECE = 16, 2**14, 2**21
"""It decodes LANES rows of ROW chunks side by side; the encoder codes PIECE weights at once."""

Arrays = tuple[np.ndarray, ...]


def is_packed(place: Path) -> bool:
    path = place / "config.json"
    return path.is_file() and CONFIG in read_json(path)


class PackedFiles(weights.TensorFiles):
    """The tensors of a folder; packed ones are decoded to bfloat16, module by module. Their shapes are the
    model's, for the buffers hold none. ValueError for settings and buffers that do not fit each other.
    """

    def __init__(self, folder: Path) -> None:
        paths = [path for path in sorted(folder.glob("*.safetensors")) if path.name != weights.VAE_FILE]
        super().__init__(paths, str(folder))
        settings = read_json(folder / "config.json")[CONFIG]
        owners = [name.rpartition(".")[0] for name in self.handles if name.endswith(".encoded_exponent")]
        self.opened: tuple[str, Tensor] = "", torch.empty(0)
        self.packs: dict[str, tuple[str, slice]] = {}
        message = f"{folder} is not as dfloat11 0.5.0 packs ({{error}}): {settings}"
        with retold(message, AssertionError, AttributeError, KeyError, TypeError, ValueError):
            (self.threads,), chunk = settings["threads_per_block"], settings["bytes_per_thread"]
            for owner in owners:
                edges = [0, *self._raw(owner, SPLITS).long().tolist(), len(self._raw(owner, "sign_mantissa"))]
                names = _packed_by(owner, settings["pattern_dict"])
                places = ((owner, slice(*ends)) for ends in pairwise(edges))
                self.packs |= zip(names, places, strict=True)
                assert edges == sorted(edges)
            assert chunk * 8 == BITS and self.threads in range(ROW, 1025, ROW)
        buffers = {f"{owner}.{leaf}" for owner in owners for leaf in (*LEAVES, SPLITS)}
        sizes = {name: place.stop - place.start for name, (_, place) in self.packs.items()}
        self.found = {name: shape for name, shape in super().shapes().items() if name not in buffers}
        self.found |= {name: (1, size) for name, size in sizes.items()}
        wanted = weights.model_shapes(weights.read_config(folder, self.found, {}))
        self.found |= {name: shape for name, shape in wanted.items() if math.prod(shape) == sizes.get(name)}

    def shapes(self) -> weights.Shapes:
        return self.found

    def dtypes(self) -> set[str]:
        return super().dtypes() - {"U8", "I64"} | {"DF11"}

    def _raw(self, owner: str, leaf: str) -> Tensor:
        return super().__getitem__(f"{owner}.{leaf}")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.packs:
            return super().__getitem__(name)
        owner, place = self.packs[name]
        if self.opened[0] != owner:
            faults = IndexError, KeyError, TypeError, ValueError
            with retold(f"{owner} is damaged ({{error}}); download it again", *faults):
                self.opened = owner, decode({leaf: self._raw(owner, leaf) for leaf in LEAVES}, self.threads)
        return self.opened[1][place].view(self.found[name]).clone()

    def keep_packed(self, module: nn.Module, device: torch.device | str, dtype: torch.dtype | None) -> None:
        """On CUDA, in bfloat16 and with the `dfloat11` package: its hooks decode a module's weights before
        each forward, into one place that all modules share.
        """
        same = torch.device(device).type == "cuda" and dtype in (None, torch.bfloat16)
        if not (same and find_spec("dfloat11")):
            return
        from dfloat11.dfloat11 import get_hook  # pyright: ignore[reportMissingImports]

        there = dict(module.named_modules())
        for owner in dict(self.packs.values()):
            names = [name.removesuffix(".weight") for name, (of, _) in self.packs.items() if of == owner]
            linears = [there.get(name, nn.Module()) for name in names]
            if not all("weight" in linear._parameters for linear in linears):
                continue  # only a part is wanted, which is decoded once
            for linear in linears:
                del linear._parameters["weight"]
            for leaf in LEAVES:
                there[owner].register_buffer(leaf, self._raw(owner, leaf).to(device))
            firsts = self._raw(owner, "output_positions").numpy().view(np.uint32)
            there[owner].__dict__.update(
                shared_mem_size=4 * self.threads + 4 + 2 * int(np.diff(firsts).max()),
                split_positions=self._raw(owner, SPLITS).tolist(),
                weight_injection_modules=linears,
            )
            there[owner].register_forward_pre_hook(get_hook((self.threads,), BITS // 8))


def _packed_by(owner: str, patterns: dict[str, list[str]]) -> list[str]:
    """The weights that a module packs, none if no pattern is for it."""
    for pattern, parts in patterns.items():
        if not PATTERN.fullmatch(pattern):
            raise ValueError(f"{pattern!r} is no name with open numbers")
        if re.fullmatch(pattern, owner):
            return [f"{owner}.{part}.weight" for part in parts] or [f"{owner}.weight"]
    return []


def write_dfloat11(folder: Path, checkpoint: weights.Checkpoint) -> None:
    """Writes a folder that this module and the `dfloat11` package load: the transformer in bfloat16, the
    linears of its layers, the embeddings and the head packed where their values allow.
    """
    owners = {n: module for n, module in checkpoint.model.named_modules() if re.fullmatch(OWNER, n)}
    patterns: dict[str, list[str]] = {}
    for owner, module in owners.items():
        parts = [name for name, part in module.named_modules() if name and isinstance(part, nn.Linear)]
        patterns[re.sub(r"\d+$", r"\\d+", re.escape(owner))] = parts
    own = {"version": "0.5.0", "threads_per_block": [THREADS], "bytes_per_thread": BITS // 8}
    more = {CONFIG: own | {"pattern_dict": patterns}}
    weights.save_all_but_transformer(folder, checkpoint, vae_file=f"vae/{weights.VAE_FILE}", more=more)
    state = checkpoint.model.state_dict()
    for owner in owners:
        names = _packed_by(owner, patterns)
        flat = [weights.on_cpu(state[name], torch.bfloat16).flatten() for name in names]
        if buffers := encode(torch.cat(flat)):
            buffers[SPLITS] = torch.tensor([len(part) for part in flat]).cumsum(0)[:-1]
            stored = {f"{owner}.{leaf}": tensor for leaf, tensor in buffers.items()}
            weights.save_tensors(folder / f"{owner.replace('.', '_')}.safetensors", stored)
            state = {name: tensor for name, tensor in state.items() if name not in names}
    plain = {name: weights.on_cpu(tensor, torch.bfloat16) for name, tensor in state.items()}
    weights.save_tensors(folder / weights.MODEL_FILES[1], plain)


def encode(values: Tensor) -> dict[str, Tensor] | None:
    """The buffers for bfloat16[N], without split_positions; None when an exponent has no code, or when codes
    are so short that the kernel cannot read them.
    """
    raw = values.view(torch.int16).numpy().view(np.uint16)
    exponents = (raw >> 7).astype(np.uint8)
    counts = np.bincount(exponents, minlength=256)
    if not len(raw) or counts[POINTERS:].any():
        return None
    lengths, bits, luts = _code(counts)
    used = np.arange(bits.shape[1]) < lengths[:, None]
    blocks = -(-int(counts @ lengths) // (BITS * THREADS))
    gaps, positions = np.zeros(blocks * THREADS, np.uint8), np.full(blocks + 1, len(raw), np.uint32)
    encoded, rest, end, chunk = [], np.zeros(0, np.uint8), 0, -1
    for first in range(0, len(raw), PIECE):
        piece = exponents[first : first + PIECE]
        ends = np.cumsum(lengths[piece]) + end
        starts = ends - lengths[piece]
        opens = np.flatnonzero(np.diff(starts // BITS, prepend=chunk))
        chunks = starts[opens] // BITS
        gaps[chunks] = starts[opens] % BITS
        positions[chunks[chunks % THREADS == 0] // THREADS] = first + opens[chunks % THREADS == 0]
        rest = np.concatenate([rest, bits[piece][used[piece]]])
        encoded.append(np.packbits(rest[: len(rest) // 8 * 8]))
        rest, end, chunk = rest[len(rest) // 8 * 8 :], ends[-1], starts[-1] // BITS
    if np.diff(positions).max() > MOST:
        return None
    coded = np.concatenate([*encoded, np.packbits(rest)])
    others = (raw >> 8 & 128 | raw & 127).astype(np.uint8)
    gaps = np.packbits(gaps[:, None] >> np.arange(4, -1, -1, dtype=np.uint8) & 1)
    buffers = luts, coded, others, positions.view(np.uint8), gaps
    return dict(zip(LEAVES, map(torch.from_numpy, buffers), strict=True))


def _code(counts: np.ndarray) -> Arrays:
    """A Huffman code of the exponents that occur: int64[256] lengths, uint8[256, longest] bits, and the LUTs.
    Counts are flattened until no code is too long and the tables are few enough to point at.
    """
    lengths, bits, code = np.zeros(256, np.int64), np.zeros((256, LONGEST), np.uint8), 0
    heap = [(int(counts[symbol]), int(symbol), [symbol]) for symbol in np.flatnonzero(counts)]
    lengths[heap[0][2]] = len(heap) == 1
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, order, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
        lengths[left + right] += 1
        heapq.heappush(heap, (a + b, order, left + right))
    if lengths.max() > LONGEST:
        return _code((counts + 1) // 2)
    tables = {b"": np.full(256, counts.argmax(), np.uint8)}
    for symbol in sorted(np.flatnonzero(lengths), key=lambda s: lengths[s]):
        level, path = (lengths[symbol] - 1) // 8, code.to_bytes(5)[1:]
        bits[symbol] = np.unpackbits(np.frombuffer(path, np.uint8))
        for depth in range(1, level + 1):
            if path[:depth] not in tables:
                tables[path[: depth - 1]][path[depth - 1]] = max(256 - len(tables), 0)
                tables[path[:depth]] = tables[b""].copy()
        tables[path[:level]][path[level] :][: 1 << 8 * level + 8 - lengths[symbol]] = symbol
        code += 1 << LONGEST - int(lengths[symbol])
    if len(tables) > TABLES:
        return _code((counts + 1) // 2)
    return lengths, bits[:, : lengths.max()], np.stack([*tables.values(), lengths.astype(np.uint8)])


def decode(buffers: dict[str, Tensor], threads: int = THREADS) -> Tensor:
    """The bfloat16[N] of one module's buffers. ValueError, mostly, when they do not fit each other."""
    stored, encoded, others, positions, gaps = (buffers[leaf].numpy() for leaf in LEAVES)
    luts, step, size = np.zeros((TABLES + 1, 256), np.uint8), ROW * BITS, len(encoded) * 8
    luts[: len(stored) - 1], luts[-1] = stored[:-1], stored[-1].clip(1, LONGEST)
    gaps = np.unpackbits(gaps)[: -(-size // step) * ROW * 5].reshape(-1, ROW, 5)[:, 0]
    lanes = np.arange(-(-size // step)) * step
    starts, ends = lanes + gaps @ np.array([16, 8, 4, 2, 1], np.uint8), np.minimum(lanes + step, size)
    lookup, counts, done = _lookup(luts), [np.zeros(1, np.int64)], 0
    out = np.empty(len(others), np.uint16)
    for lane in range(0, len(lanes), LANES):
        here, bit = slice(lane, lane + LANES), lane * step
        part = encoded[bit // 8 : (bit + LANES * step) // 8 + BITS]
        exponents, count = _decoded(part, luts, lookup, (starts[here] - bit, ends[here] - bit))
        rest = others[done : done + len(exponents)].astype(np.uint16)
        rest = rest & 127 | (rest & 128) << 8
        out[done : done + len(rest)] = exponents[: len(rest)].astype(np.uint16) << 7 | rest
        counts.append(count)
        done += len(exponents)
    firsts = np.cumsum(np.concatenate(counts))[: -1 : threads // ROW]
    if done < len(out) or not np.array_equal(firsts, positions.view(np.uint32)[: len(firsts)]):
        raise ValueError("its codes are not as many as its weights")
    return torch.from_numpy(out.view(np.int16)).view(torch.bfloat16)


def _walk(luts: np.ndarray, words: np.ndarray) -> np.ndarray:
    """The exponents whose codes uint32 words begin with."""
    found = luts[0, words >> 24]
    for shift in (16, 8, 0):
        table = np.where(found < POINTERS, 0, 256 - found.astype(np.int64))
        found = np.where(found < POINTERS, found, luts[table, words >> shift & 255])
    return found


def _lookup(luts: np.ndarray) -> Arrays:
    """By the next LOOKUP bits, then by the exponent of a code that is longer: AT_ONCE exponents and the bits
    where their codes start (255: no code), eight bytes each, and how many bits they take.
    """
    count = 1 << LOOKUP
    words, taken = np.arange(count, dtype=np.uint32) << 32 - LOOKUP, np.zeros(count, np.uint8)
    ones = words | (1 << 32 - LOOKUP) - 1
    symbols = np.zeros((count + 256, AT_ONCE), np.uint8)
    starts = np.full((count + 256, AT_ONCE), 255, np.uint8)
    symbols[count:, 0], starts[count:, 0] = np.arange(256), 0
    for k in range(AT_ONCE):
        symbols[:count, k] = _walk(luts, words << taken)
        length = luts[-1, symbols[:count, k]]
        sure = symbols[:count, k] == _walk(luts, ~(~ones << taken))  # whatever bits come after these
        fits = sure & (length <= LOOKUP - taken)
        starts[:count, k] = np.where(fits, taken, 255)
        taken += length * fits
    return symbols.view(np.uint64)[:, 0], starts.view(np.uint64)[:, 0], np.concatenate([taken, luts[-1]])


def _decoded(encoded: np.ndarray, luts: np.ndarray, lookup: Arrays, bounds: Arrays) -> Arrays:
    """Lanes' exponents one lane after another, and how many each has. Bounds, in bits: where the first code
    of each lane starts, and what its last code starts before.
    """
    words = np.zeros(len(encoded) // 4 + 4, ">u4")
    words.view(np.uint8)[: len(encoded)] = encoded
    words = words[:-1].astype(np.uint64) << 32 | words[1:]
    (symbols, starts, taken), (places, ends), steps = lookup, bounds, []
    while (left := np.clip(ends - places, 0, 254).astype(np.uint8)).any():
        word, shift = words[places >> 5], (places & 31).astype(np.uint64)
        entry = (word >> 64 - LOOKUP - shift & (1 << LOOKUP) - 1).astype(np.int64)
        if len(stuck := np.flatnonzero(taken[entry] == 0)):
            long = _walk(luts, (word[stuck] >> 32 - shift[stuck]).astype(np.uint32))
            entry[stuck] = long.astype(np.int64) + (1 << LOOKUP)
        steps.append((entry, left))
        places = places + taken[entry] * (left > 0)
    entries, lefts = (np.stack(column, 1) for column in zip(*steps, strict=True))
    chosen = starts[entries][:, :, None].view(np.uint8) < lefts[:, :, None]
    return symbols[entries][:, :, None].view(np.uint8)[chosen], chosen.sum((1, 2))
