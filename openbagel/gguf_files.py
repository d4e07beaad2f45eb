"""GGUF files through the `gguf` package: the transformer under its official names, linears in blocks.

Read is every type that the package dequantises; written are Q8_0, Q5_1, Q4_0 and BF16, for the linears of
the language model's layers. All else (norms, biases, embeddings, heads, projections, time embedder, ViT)
keeps its values. The package's own reader trusts a file (a false count makes it loop for ever), so the header
is read here, with every number held against the file's size.
"""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from openbagel import weights
from openbagel.checks import check_choice, extra, retold
from openbagel.quantize import LAYERS

KINDS = ("q8_0", "q5_1", "q4_0", "bf16")
ALIGNMENT = 32
"""Of tensors, where `general.alignment` says nothing."""
UINT32, STRING, ARRAY = 4, 8, 9
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, UINT32: 4, 5: 4, 6: 4, 7: 1, STRING: 0, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type, without what follows a string's length."""
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GGUFFile(weights.TensorFiles):
    """The tensors of a file, memory-mapped; quantised ones come out in float32. ValueError for a file that is
    damaged, or has a type that the package cannot dequantise.
    """

    def __init__(self, path: Path) -> None:
        super().__init__([], str(path))
        self.gguf, self.at = extra("gguf", "gguf", "a GGUF file"), 0
        message = f"{path} is no sound GGUF file ({{error}}); download it again"
        with retold(message, OSError, OverflowError, struct.error, ValueError):
            self.data = np.memmap(path, mode="c")
            magic, version, count, entries = self._take("<4sIQQ")
            if magic != b"GGUF" or version not in (2, 3):
                raise ValueError(f"it begins with {magic} and version {version}")
            facts = dict(self._entry() for _ in range(self._fitting(entries, 13)))
            infos = [self._info() for _ in range(self._fitting(count, 32))]
            self._place(infos, facts.get(b"general.alignment") or ALIGNMENT)

    def _take(self, form: str) -> tuple[Any, ...]:
        self.at += (size := struct.calcsize(form))
        return struct.unpack_from(form, memoryview(self.data), self.at - size)  # pyright: ignore[reportArgumentType]

    def _fitting(self, count: int, size: int) -> int:
        """A count of things of at least `size` bytes each, if the rest of the file can hold them."""
        if count * size > len(self.data) - self.at:
            raise ValueError(f"byte {self.at} announces {count} items, more than follow")
        return count

    def _string(self) -> bytes:
        return self._take(f"{self._fitting(self._take('<Q')[0], 1)}s")[0]

    def _entry(self) -> tuple[bytes, int | None]:
        """A fact about the model; only whole numbers are read, all else is passed over."""
        key, (kind,), count = self._string(), self._take("<I"), 1
        if kind == UINT32:
            return key, self._take("<I")[0]
        if kind == ARRAY:
            kind, count = self._take("<IQ")
        if kind not in SIZES:
            raise ValueError(f"{key} is of the unknown type {kind}")
        for _ in range(self._fitting(count, 8) if kind == STRING else 0):
            self._string()
        self.at += self._fitting(count, SIZES[kind]) * SIZES[kind]
        return key, None

    def _info(self) -> tuple[str, tuple[int, ...], Any, int]:
        name = self._string().decode()
        (dims,) = self._take("<I")
        shape = self._take(f"<{self._fitting(dims, 8)}Q")[::-1]
        kind, offset = self._take("<IQ")
        return name, shape, self.gguf.GGMLQuantizationType(kind), offset

    def _place(self, infos: list[tuple[str, tuple[int, ...], Any, int]], alignment: int) -> None:
        """Finds each tensor's bytes, which start where the header ends."""
        base = -(-self.at // alignment) * alignment
        for name, shape, kind, offset in infos:
            block, size = self.gguf.GGML_QUANT_SIZES[kind]
            end = base + offset + math.prod(shape) // block * size
            known = kind.name in PLAIN or hasattr(self.gguf.quants, kind.name)
            whole = shape and not (shape[-1] % block or alignment % 8 or offset % alignment)
            if not (known and whole and end <= len(self.data)) or name in self.handles:
                raise ValueError(f"{name}, {kind.name} {shape} at byte {offset}, cannot be read")
            self.handles[name] = shape, kind, slice(base + offset, end)

    def shapes(self) -> weights.Shapes:
        return {name: shape for name, (shape, _, _) in self.handles.items()}

    def dtypes(self) -> set[str]:
        return {kind.name for _, kind, _ in self.handles.values()}

    def __getitem__(self, name: str) -> Tensor:
        shape, kind, place = self.handles[name]
        raw = np.asarray(self.data[place])
        if kind.name in PLAIN:
            return torch.from_numpy(raw).view(PLAIN[kind.name]).view(shape)
        return torch.from_numpy(self.gguf.quants.dequantize(raw.reshape(*shape[:-1], -1), kind))


def write_gguf(folder: Path, checkpoint: weights.Checkpoint, kind: str) -> None:
    """Writes a folder with `model-<kind>.gguf`; kind is one of KINDS. Linears whose rows are no whole number
    of blocks keep their values.
    """
    check_choice("GGUF kind", kind, KINDS)
    gguf = extra("gguf", "gguf", "a GGUF file")
    state, types = checkpoint.model.state_dict(), {}
    weights.save_all_but_transformer(folder, checkpoint)
    writer = gguf.GGUFWriter(folder / f"model-{kind}.gguf", "bagel")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    names = {dtype: name for name, dtype in PLAIN.items()}
    for name, tensor in state.items():
        quant = gguf.GGMLQuantizationType[kind.upper()]
        linear = name.startswith(LAYERS) and tensor.dim() == 2
        fits = linear and tensor.shape[1] % gguf.GGML_QUANT_SIZES[quant][0] == 0
        types[name] = quant if fits else gguf.GGMLQuantizationType[names[tensor.dtype]]
        block, size = gguf.GGML_QUANT_SIZES[types[name]]
        nbytes = tensor.numel() // block * size
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=types[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in state.items():
        values = weights.on_cpu(tensor, torch.float32).numpy()
        writer.write_tensor_data(gguf.quants.quantize(values, types[name]))
    writer.close()
