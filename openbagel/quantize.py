"""Linears in 8 and 4 bits, packed from outside after loading, one at a time.

    int8   a float32 scale a row             every device
    fp8    e4m3, a float32 scale a row       every device but MPS
    nf4    a float32 scale for 64 weights    every device, by bitsandbytes (the official app's mode 2)
    int4   in groups of 128 inputs           CUDA from Ampere on, by torchao

The linears of the decoder's layers are packed, both experts: 13 of the 7B's 14.7 billion parameters. What
is sensitive keeps full precision: norms, embeddings, head, ViT and connector, time and latent projections.
A packed linear holds plain tensors, so it moves, is streamed, saved and read as any module.

int8 and fp8 are torchao's numbers, bit for bit, but not its tensors: those overflow in float16 (they multiply
by 127 before they scale), take 3 to 7 times as long for a small linear, and would need the extra.
"""

import logging
import warnings
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openbagel.checks import check_choice, extra

LAYERS = "language_model.model.layers."
BLOCK = 64
"""Weights that share a scale in nf4."""
GROUP = 128
"""Inputs that share a scale in int4."""


class Precision(StrEnum):
    INT8 = "int8"
    FP8 = "fp8"
    NF4 = "nf4"
    INT4 = "int4"


FP8_MOST = torch.finfo(torch.float8_e4m3fn).max
PARTS = ("weight", "scale")
FOREIGN = (
    "; such weights, packed by another tool, are not read: take the original ones and pack them "
    "(--quantize, or `openbagel convert --to int8`)"
)


class PackedLinear(nn.Linear):
    """A linear whose weight is packed in two parameters, `weight` and `scale`.

    Computes in the dtype of its input. Only its input (and its bias) get gradients.
    """

    def __init__(self, linear: nn.Linear, precision: Precision, device: torch.device | str | None) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        weight = linear.weight.detach()
        packed = _pack(weight.to(device or weight.device), precision)
        self.precision, self.shape = precision, weight.shape
        self.weight, self.scale = (nn.Parameter(part, requires_grad=False) for part in packed)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        match self.precision:
            case Precision.INT8 | Precision.FP8:
                return self._scaled(x)
            case Precision.NF4:
                return self._nf4(x)
            case Precision.INT4:
                from torchao.quantization import Int4TilePackedTo4dTensor

                weight = Int4TilePackedTo4dTensor(self.weight, self.scale, [1, GROUP], self.shape)
                return F.linear(x, weight, self.bias)

    def _scaled(self, x: Tensor) -> Tensor:
        weight, scale = self.weight, self.scale
        if self.precision is Precision.FP8 and x.device.type == "cpu":  # 14 times as quick as torch's cast
            bits = weight.view(torch.int8).to(torch.int16) << 7  # as float16 has them, the exponent 8 less
            weight, scale = (bits & ~(1 << 14)).view(torch.float16), scale * 256
        weight, scale = weight.to(x.dtype), scale.to(x.dtype)
        if x.dtype == torch.float16:  # unscaled products would overflow
            return F.linear(x, weight * scale, self.bias)
        y = F.linear(x, weight) * scale.squeeze(1)
        return y if self.bias is None else y + self.bias

    def _nf4(self, x: Tensor) -> Tensor:
        from bitsandbytes import matmul_4bit  # pyright: ignore[reportPrivateImportUsage]
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = QuantState(self.scale, shape=self.shape, blocksize=BLOCK, quant_type="nf4", dtype=x.dtype)
        if self.in_features % BLOCK == 0:
            return matmul_4bit(x, self.weight, state, bias=self.bias)
        # bitsandbytes 0.50 misreads blocks that go over the end of a row on CPUs: make it one row
        state.shape = torch.Size((1, self.shape.numel()))
        return F.linear(x, dequantize_4bit(self.weight, state).view(self.shape), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Moves what is packed, but never casts it."""
        packed = self.weight, self.scale

        def moved(tensor: Tensor) -> Tensor:
            kept = any(tensor is part for part in packed)
            return fn(tensor.view(torch.uint8)).view(tensor.dtype) if kept else fn(tensor)

        return super()._apply(moved, recurse)


def _pack(weight: Tensor, precision: Precision) -> tuple[Tensor, Tensor]:
    """Weights and scales as they are stored; of a weight on the meta device their shapes and types."""
    match precision:
        case Precision.INT8:
            scale = _row_scales(weight, 127.5)
            return (weight.float() * (1 / scale)).round_().clamp_(-128, 127).to(torch.int8), scale
        case Precision.FP8:
            scale = _row_scales(weight, FP8_MOST)
            return (weight.float() / scale).clamp_(-FP8_MOST, FP8_MOST).to(torch.float8_e4m3fn), scale
        case Precision.NF4:
            quantize_4bit = _library("bitsandbytes", precision).functional.quantize_4bit
            packed, state = quantize_4bit(weight.float().contiguous(), blocksize=BLOCK, quant_type="nf4")
            return packed, state.absmax
        case Precision.INT4:
            kind = _library("torchao.quantization", precision).Int4TilePackedTo4dTensor
            if weight.is_meta:
                rows, tiles = -(-weight.shape[0] // 8), -(-weight.shape[1] // 1024) * 8
                packed = weight.new_empty(rows, tiles, 32, 4, dtype=torch.int32)
                return packed, weight.new_empty(tiles * 128 // GROUP, rows * 8, 2, dtype=torch.bfloat16)
            packed = kind.from_hp(weight.bfloat16(), [1, GROUP])
            return packed.qdata, packed.scale_and_zero


def _row_scales(weight: Tensor, most: float) -> Tensor:
    largest = torch.linalg.vector_norm(weight, torch.inf, dim=1, keepdim=True, dtype=torch.float32)
    return (largest / most).clamp(min=torch.finfo(torch.float32).eps)


def _library(module: str, precision: Precision) -> Any:
    """An extra's module. What it says at import about kernels that it did not find is kept back."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        return extra(module, "quant", f"precision {precision}")
    finally:
        logging.disable(level)


def quantize(
    model: nn.Module,
    precision: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> int:
    """Packs the linears of the decoder's layers and brings all else to a device and dtype, one tensor at a
    time; returns how many are packed. The model stays where it is without a device.

    ValueError for precisions that there are not, that the device cannot have, or on top of another one.
    """
    check_choice("precision", precision, Precision)
    kind = Precision(precision)
    if (before := precision_of(model)) is not None:
        raise ValueError(f"the weights are {before} already; take the original ones to get {kind}")
    require_plain(model)
    linears = (name for name, one in model.named_modules() if isinstance(one, nn.Linear))
    names, whole = [name for name in linears if name.startswith(LAYERS)], []
    check_device(kind, device or model.get_parameter(f"{names[0]}.weight").device)
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if kind is Precision.INT4 and linear.in_features % GROUP:
            whole.append(f"{name} ({linear.in_features})")
        else:
            model.set_submodule(name, PackedLinear(linear, kind, device))
    if whole:
        told = f"{len(whole)} of {len(names)} linears keep their weights: int4 packs groups of {GROUP} inputs"
        warnings.warn(f"{told}, unlike {whole[0]} has", stacklevel=2)
    model.to(device=device, dtype=dtype)
    return len(names) - len(whole)


def require_weights(model: nn.Module) -> None:
    """ValueError when linears have none between two forwards, because CUDA decodes them from DFloat11."""
    if any(name.endswith(".encoded_exponent") for name, _ in model.named_buffers()):
        remedy = "load it with device='cpu', or unpack it with `openbagel convert … --to bfloat16`"
        raise ValueError(f"the model's weights are packed (DFloat11); {remedy}")


def require_plain(model: nn.Module) -> None:
    """ValueError when one is bound, which has no place in a checkpoint, or when there are no weights."""
    require_weights(model)
    if any(".lora." in name for name, _ in model.named_parameters()):
        raise ValueError("an adapter is bound to the model; merge or remove it first (openbagel.lora)")


def check_device(precision: Precision | None, device: torch.device | str) -> None:
    """ValueError, naming what to take instead, for a precision that a device cannot have."""
    device = torch.device(device)
    if precision is Precision.FP8 and device.type == "mps":
        raise ValueError("fp8 weights cannot be on mps, which has no such numbers; use int8 or nf4")
    if precision is not Precision.INT4 or device.type == "meta":
        return
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        needed = "a CUDA card of the Ampere generation or later"
        raise ValueError(f"int4 needs {needed}, not {device}; use nf4 or int8")


def precision_of(model: nn.Module) -> Precision | None:
    """That of its packed linears, None without any."""
    return next((one.precision for one in model.modules() if isinstance(one, PackedLinear)), None)


def packed_names(model: nn.Module) -> set[str]:
    """Of the parameters that hold packed weights and their scales."""
    packed = [name for name, one in model.named_modules() if isinstance(one, PackedLinear)]
    return {f"{name}.{leaf}" for name in packed for leaf in PARTS}


def stored_precision(entries: Mapping[str, Any], where: str) -> Precision | None:
    """What a config.json says of its weights, None of plain ones. ValueError for what other tools packed."""
    if "quantization_config" in entries:
        raise ValueError(f"{where}: quantization_config{FOREIGN}")
    if "quantization" not in entries:
        return None
    precision = entries["quantization"]
    precision = precision.get("precision") if isinstance(precision, dict) else precision
    check_choice(f"{where}: quantization", precision, Precision)
    return Precision(precision)
