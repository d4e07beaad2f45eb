"""The official checkpoint folder, read strictly and written back.

    ema.safetensors | model.safetensors | model.safetensors.index.json + shards | *.gguf
                                       the transformer and the ViT
    ae.safetensors                     the autoencoder
    config.json                        every per-model fact (vLLM's shape plus an `openbagel` part); may be
                                       old or absent
    llm_config.json, vit_config.json   the Qwen2 and SigLIP fields
    tokenizer.json | vocab.json + merges.txt + tokenizer_config.json

What no file states is read from tensor shapes, then takes the 7B's values. Tensors are memory-mapped: weights
that already have the wanted dtype take no memory of their own.
"""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from openbagel.checks import nearest, retold
from openbagel.config import (
    FLUX_VAE,
    BagelConfig,
    Experts,
    LLMConfig,
    VAEConfig,
    ViTConfig,
    bagel_7b,
    from_json,
    official_settings,
    to_json,
)
from openbagel.files import PICKLES, check_tensor_file, read_json
from openbagel.model.bagel import BagelModel
from openbagel.model.vae import AutoEncoder
from openbagel.quantize import (
    LAYERS,
    PARTS,
    PackedLinear,
    Precision,
    packed_names,
    precision_of,
    quantize,
    require_no_adapter,
    stored_precision,
)
from openbagel.tokens import TextCodec

MODEL_FILES = ("ema.safetensors", "model.safetensors")
INDEX_FILE = "model.safetensors.index.json"
VAE_FILE = "ae.safetensors"
MAY_BE_MISSING = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")
"""Computable: the sin-cos tables, which trainers leave out to change the grid."""
MAY_BE_LEFT_OVER = (".rotary_emb.inv_freq",)
"""Computable: buffers that old transformers versions stored."""
MOST = {"num_hidden_layers": 1000, "max_latent_size": 256, "vit_max_num_patch_per_side": 256}
MOST |= dict.fromkeys(("latent_patch_size", "num_res_blocks", "ch_mult"), 64)
"""What no model has more of, so that nothing absurd is built; 2^20 of everything else."""
LISTED = 40
"""Tensors that an error names of each kind; it counts them all."""
PLAIN = (torch.float32, torch.bfloat16, torch.float16)
SCALES = ("scale", "scales", "scale_inv", "scale_weight", ".SCB", "absmax", "qzeros")
FOREIGN = (
    "; such weights, packed by another tool, are not read: take the original ones and pack them "
    "(--quantize, or `openbagel convert --to int8`)"
)
GENERATION_PARTS = ("_moe_gen.", "vae2llm.", "llm2vae.", "time_embedder.", "latent_pos_embed.")
FIXED_LLM_FIELDS = {"hidden_act": "silu", "use_sliding_window": False, "rope_scaling": None}
PREPROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
"""preprocessor_config.json, which vLLM wants; openbagel itself never reads it."""
TOP_LEVEL = (
    "layer_module",
    "latent_patch_size",
    "max_latent_size",
    "vit_max_num_patch_per_side",
    "connector_act",
    "interpolate_pos",
)
Shapes = dict[str, tuple[int, ...]]
"""Of tensors, by name."""


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A loaded folder. autoencoder is None where the folder has none, or where drawing was left out."""

    config: BagelConfig
    model: BagelModel
    autoencoder: AutoEncoder | None
    codec: TextCodec


class TensorFiles:
    """The tensors of one or several safetensors files, by name, opened lazily."""

    precision: Precision | None = None
    """Of the linears that `openbagel.quantize` packed."""

    def __init__(self, paths: list[Path]) -> None:
        self.handles: dict[str, Any] = {}
        for path in paths:
            message = f"{path} is no complete safetensors file ({{error}}); download it again"
            with retold(message, SafetensorError, OSError):
                check_tensor_file(path)
                handle = safe_open(path, "pt")
            if twice := self.handles.keys() & handle.keys():
                raise ValueError(f"{path} holds {min(twice)}, which another shard holds too")
            self.handles.update(dict.fromkeys(handle.keys(), handle))

    def shapes(self) -> Shapes:
        return {name: tuple(handle.get_slice(name).get_shape()) for name, handle in self.handles.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.handles[name].get_tensor(name)

    def dtypes(self) -> set[str]:
        """As stored."""
        return {str(handle.get_slice(name).get_dtype()) for name, handle in self.handles.items()}

    def keep_packed(self, module: nn.Module, device: torch.device | str, dtype: torch.dtype | None) -> None:
        """Where packed weights can be computed with: gives them to the module instead of parameters."""


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the transformer; averaged weights are preferred to the last ones, and both to a
    GGUF file. A file is its own.
    """
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise ValueError(f"no such model folder: {folder}")
    for name in MODEL_FILES:
        if (folder / name).is_file():
            return [folder / name]
    if (folder / INDEX_FILE).is_file():
        return _shard_files(folder)
    if ggufs := sorted(folder.glob("*.gguf")):
        if len(ggufs) > 1:
            raise ValueError(f"{folder} holds {', '.join(p.name for p in ggufs)}; give the path of one")
        return ggufs
    for pickle in (path for path in sorted(folder.iterdir()) if path.suffix in PICKLES):
        check_tensor_file(pickle)
    raise ValueError(f"{folder} holds no weights: expected one of {', '.join((*MODEL_FILES, INDEX_FILE))}")


def _shard_files(folder: Path) -> list[Path]:
    index = read_json(folder / INDEX_FILE).get("weight_map")
    shards = sorted({str(name) for name in index.values()}) if isinstance(index, dict) else []
    strange = [shard for shard in shards if Path(shard).name != shard]
    if strange or not shards:
        raise ValueError(f"{folder / INDEX_FILE} names no files of its own folder: {strange or index!r}")
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise ValueError(
            f"{folder} lacks the shards {', '.join(missing)} that {INDEX_FILE} lists; download them"
        )
    return [folder / shard for shard in shards]


def open_weights(place: Path) -> TensorFiles:
    """The transformer's tensors in a folder or file of any format."""
    from openbagel import dfloat11, gguf_files

    if dfloat11.is_packed(place):
        return dfloat11.PackedFiles(place)
    paths = weight_files(place)
    if paths[0].suffix == ".gguf":
        return gguf_files.GGUFFile(paths[0])
    files, config = TensorFiles(paths), (place if place.is_dir() else place.parent) / "config.json"
    files.precision = stored_precision(read_json(config), str(config)) if config.is_file() else None
    return files


def open_autoencoder(folder: Path) -> TensorFiles:
    """The autoencoder's tensors, none where the folder has none."""
    places = (folder / VAE_FILE, folder / "vae" / VAE_FILE)
    return TensorFiles([path for path in places if path.is_file()][:1])


def load_checkpoint(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    understanding_only: bool = False,
    settings: Mapping[str, Any] | None = None,
    weights: Path | None = None,
) -> Checkpoint:
    """Loads a folder, or the folder of a weight file with the weights of that file. dtype None keeps the
    stored one (GGUF's quantised ones: float32); settings override top-level entries of config.json.

    Raises ValueError listing every missing, unexpected or misshapen tensor. understanding_only leaves the
    generation expert and the autoencoder on disk, device "meta" every tensor of the transformer. weights is
    the file or folder that holds the transformer, if not the same folder in the usual order.
    """
    folder = Path(folder)
    if folder.is_file():
        folder, weights = folder.parent, weights or folder
    files, vae_files = open_weights(weights or folder), open_autoencoder(folder)
    shapes = files.shapes()
    config = read_config(folder, shapes, vae_files.shapes(), settings or {})
    if understanding_only:
        config = config.understanding_only()
        shapes = {
            name: shape for name, shape in shapes.items() if not any(p in name for p in GENERATION_PARTS)
        }
    where = str(folder), str(folder / VAE_FILE)
    model, autoencoder = build(config, (files, shapes), vae_files, dtype=dtype, device=device, where=where)
    codec = TextCodec.load(folder)
    if (largest := max(codec.tokenizer.get_vocab().values())) >= config.llm.vocab_size:
        raise ValueError(f"{folder}: its tokenizer has id {largest}, its model {config.llm.vocab_size} ids")
    return Checkpoint(config, model, autoencoder, codec)


def default_device() -> torch.device:
    """CUDA if there is a card, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 on CUDA cards that compute in it, else float32."""
    fast = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def build(
    config: BagelConfig,
    stored: tuple[TensorFiles, Shapes],
    vae_files: TensorFiles,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    where: tuple[str, str],
) -> tuple[BagelModel, AutoEncoder | None]:
    """The model and the autoencoder (None without files), filled; `where` names the two in errors. On the
    device "meta" the transformer alone stays without memory.
    """
    with torch.device("meta"):
        model = BagelModel(config)
        autoencoder = AutoEncoder(config.vae) if config.vae and vae_files.handles else None
    if stored[0].precision is not None:
        quantize(model, stored[0].precision)
    fill(model, *stored, dtype=dtype, device=device, where=where[0])
    if autoencoder is not None:
        place = "cpu" if str(device) == "meta" else device
        fill(autoencoder, vae_files, vae_files.shapes(), dtype=dtype, device=place, where=where[1])
    return model.eval(), autoencoder and autoencoder.eval()


def fill(
    module: nn.Module,
    files: TensorFiles,
    shapes: Shapes,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    where: str,
) -> None:
    """Gives a module on the meta device its tensors, one by one."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    computed = {name for name in MAY_BE_MISSING if name in wanted and shapes.get(name) != wanted[name]}
    shapes = {name: shape for name, shape in shapes.items() if name not in computed}  # of another grid
    missing = [name for name in wanted if name not in shapes and name not in MAY_BE_MISSING]
    unexpected = [name for name in shapes if name not in wanted and not name.endswith(MAY_BE_LEFT_OVER)]
    misshapen = [
        f"{name} {shapes[name]}, expected {shape}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    faults = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    if any(faults.values()):
        listed = "; ".join(
            f"{len(names)} {kind}: {_listed(names)}" for kind, names in faults.items() if names
        )
        foreign = FOREIGN if any(name.endswith(SCALES) for name in unexpected) else ""
        raise ValueError(f"{where} does not fit its configuration; {listed}{foreign}")
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    files.keep_packed(module, device, dtype)
    for owner_name, owner in module.named_modules():
        for leaf, parameter in list(owner._parameters.items()):
            if parameter is None:
                continue
            name = f"{owner_name}.{leaf}" if owner_name else leaf
            if name in shapes:
                tensor, packed = files[name], isinstance(owner, PackedLinear) and leaf in PARTS
                if tensor.dtype not in ([parameter.dtype] if packed else PLAIN):
                    raise ValueError(f"{where}: {name} is stored as {tensor.dtype}{FOREIGN}")
                tensor = tensor.to(device=device, dtype=None if packed else dtype)
                owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=name not in frozen)
            else:
                owner._parameters[leaf] = nn.Parameter(
                    torch.empty(wanted[name], dtype=dtype, device=device), False
                )
                owner.reset_parameters()  # pyright: ignore[reportCallIssue]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (" …" if len(names) > LISTED else "")


def read_config(folder: Path, shapes: Shapes, vae_shapes: Shapes, settings: Mapping[str, Any]) -> BagelConfig:
    """Every per-model fact: config.json (overridden by settings), the two part files, tensor shapes, the 7B's
    values. ValueError for what makes no sense, before anything is built.
    """
    for key in settings:
        if key not in (*TOP_LEVEL, "openbagel"):
            raise ValueError(f"settings: unknown key {key!r}{nearest(key, TOP_LEVEL)}")
    path = folder / "config.json"
    stored = {**(read_json(path) if path.is_file() else {}), **settings}
    try:
        tree = _config_tree(folder, stored, shapes, vae_shapes)
    except (AttributeError, KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{folder}: its configuration and its tensors make no sense ({error!r})") from None
    config = from_json(BagelConfig, tree, str(folder))
    _check_plausible(config, shapes, str(folder))
    return config


def _check_plausible(config: BagelConfig, shapes: Shapes, where: str) -> None:
    for part in filter(None, (config, config.llm, config.vit, config.vae)):
        for name, value in ((f.name, getattr(part, f.name)) for f in dataclasses.fields(part)):
            numbers = value if isinstance(value, tuple) else (value,)
            most = MOST.get(name, 2**20)
            if len(numbers) > 16 or any(type(n) is int and not 1 <= n <= most for n in numbers):
                raise ValueError(f"{where}: {name}={str(value)[:60]} is not possible")
    for part in filter(None, (config.llm, config.vit)):
        heads = part.num_attention_heads
        if part.hidden_size % heads or heads % getattr(part, "num_key_value_heads", heads):
            raise ValueError(
                f"{where}: {heads} heads fit neither hidden_size nor the key-value heads of {part}"
            )
    stored = len({name.split(".")[3] for name in shapes if name.startswith(LAYERS)})
    if config.llm.num_hidden_layers > stored:
        told = config.llm.num_hidden_layers
        raise ValueError(f"{where}: num_hidden_layers={told} does not fit the {stored} stored layers")


def _config_tree(folder: Path, stored: dict[str, Any], shapes: Shapes, vae_shapes: Shapes) -> dict[str, Any]:
    known = {**_facts_of_shapes(shapes), **{key: stored[key] for key in TOP_LEVEL if key in stored}}
    own = stored.get("openbagel")
    tree = {
        "llm": llm_fields_of(_part(folder, stored, "llm_config"), shapes),
        "vit": _vit_fields(_part(folder, stored, "vit_config"), shapes)
        if "connector.fc1.weight" in shapes
        else None,
        "vae": vae_fields_of(stored.get("vae_config", {}), vae_shapes)
        if "vae2llm.weight" in shapes
        else None,
        "settings": own if own is not None else to_json(official_settings()),
        **known,
    }
    if tree["vae"]:
        tree.setdefault(
            "latent_patch_size", round((shapes["vae2llm.weight"][1] / tree["vae"]["z_channels"]) ** 0.5)
        )
    fallback = to_json(bagel_7b())
    return {**{key: fallback[key] for key in TOP_LEVEL}, **tree}


def _facts_of_shapes(shapes: Shapes) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    layer = f"{LAYERS}0."
    if layer + "self_attn.q_proj_moe_gen.weight" in shapes:
        facts["layer_module"] = Experts.MOT.value
    elif layer + "mlp_moe_gen.gate_proj.weight" in shapes:
        facts["layer_module"] = Experts.MOE.value
    else:
        facts["layer_module"] = Experts.DENSE.value
    tables = {
        "max_latent_size": "latent_pos_embed.pos_embed",
        "vit_max_num_patch_per_side": "vit_model.vision_model.embeddings.position_embedding.weight",
    }
    return facts | {key: round(shapes[name][0] ** 0.5) for key, name in tables.items() if name in shapes}


def _part(folder: Path, stored: dict[str, Any], name: str) -> dict[str, Any]:
    """A part's fields: from config.json, else from its own file."""
    if name in stored:
        return stored[name]
    path = folder / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"{folder} has neither {path.name} nor {name!r} in its config.json")
    return read_json(path)


def llm_fields_of(fields: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    for key, value in FIXED_LLM_FIELDS.items():
        if fields.get(key, value) != value:
            raise ValueError(f"llm_config: {key}={fields[key]!r} is not supported, only {value!r}")
    names = [f.name for f in dataclasses.fields(LLMConfig) if f.name in fields]
    qk_norm = f"{LAYERS}0.self_attn.q_norm.weight" in shapes
    return {name: fields[name] for name in names} | {"qk_norm": qk_norm}


def _vit_fields(fields: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """The stored layer count may or may not include the layer that BAGEL drops; the tensors decide."""
    layers = {
        name.split(".layers.")[1].split(".")[0]
        for name in shapes
        if name.startswith("vit_model.") and ".layers." in name
    }
    stored = fields.get("num_hidden_layers")
    if stored not in (len(layers), len(layers) + 1):
        raise ValueError(
            f"vit_config: num_hidden_layers={stored} does not fit the {len(layers)} stored layers"
        )
    names = [f.name for f in dataclasses.fields(ViTConfig) if f.name in fields]
    return {name: fields[name] for name in names} | {"num_hidden_layers": len(layers) + 1}


def vae_fields_of(fields: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(VAEConfig)}
    known = {key: value for key, value in fields.items() if key in names}
    if not shapes:
        return to_json(FLUX_VAE) | known
    ch = shapes["encoder.conv_in.weight"][0]
    levels = sum(
        name.endswith("block.0.conv1.weight") and name.startswith("encoder.down.") for name in shapes
    )
    blocks = sum(
        name.startswith("encoder.down.0.block.") and name.endswith(".conv1.weight") for name in shapes
    )
    seen = {
        "ch": ch,
        "ch_mult": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] // ch for i in range(levels)],
        "num_res_blocks": blocks,
        "z_channels": shapes["decoder.conv_in.weight"][1],
    }
    return to_json(FLUX_VAE) | seen | known


def config_json(config: BagelConfig) -> dict[str, Any]:
    """config.json in the shape that vLLM reads, with the `openbagel` part."""
    qwen = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    vae = config.vae and to_json(config.vae) | {"downsample": config.vae.downsample}
    siglip = {"model_type": "siglip_vision_model", "num_channels": 3, "vision_use_head": False}
    if config.vit:
        side = config.vit_max_num_patch_per_side * config.vit.patch_size
        siglip |= to_json(config.vit) | {"image_size": side}
    parts = {"llm_config": qwen | to_json(config.llm), "vit_config": config.vit and siglip, "vae_config": vae}
    tree = to_json(config)
    return {
        "model_type": "bagel",
        "architectures": ["BagelForConditionalGeneration"],
        "visual_gen": config.vae is not None,
        "visual_und": config.vit is not None,
        **{key: tree[key] for key in TOP_LEVEL},
        **{name: part for name, part in parts.items() if part},
        "openbagel": tree["settings"],
    }


def config_of(stored: Mapping[str, Any]) -> BagelConfig:
    """The inverse of `config_json`, for a model without tensors; what is absent is the 7B's."""
    tree = to_json(bagel_7b())
    for part in ("llm", "vit", "vae") if "llm_config" in stored else ():
        fields = stored.get(f"{part}_config")
        tree[part] = fields and {key: fields.get(key, value) for key, value in tree[part].items()}
    tree |= {key: stored[key] for key in TOP_LEVEL if key in stored}
    tree["settings"] = stored.get("openbagel", tree["settings"])
    return from_json(BagelConfig, tree, "config.json")


def save_checkpoint(
    folder: str | Path,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int | None = None,
) -> None:
    """Writes the official folder; dtype None keeps each tensor's, and packed ones stay as they are.
    shard_bytes splits the transformer into shards. ValueError when an adapter is bound: its tensors have no
    place there.
    """
    folder, model = Path(folder), checkpoint.model
    precision, packed = precision_of(model), packed_names(model)
    more = {"quantization": {"precision": precision}} if precision else None
    save_all_but_transformer(folder, checkpoint, dtype=dtype, more=more)
    state = {n: _plain(tensor, None if n in packed else dtype) for n, tensor in model.state_dict().items()}
    if shard_bytes is None:
        save_file(state, folder / MODEL_FILES[0], {"format": "pt"})
    else:
        _save_shards(folder, state, shard_bytes)


def save_all_but_transformer(
    folder: Path,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    vae_file: str = VAE_FILE,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Writes configuration (with more entries in config.json), tokenizer and autoencoder.

    ValueError when the model's tensors are not those of a checkpoint: an adapter is bound, or they are
    packed.
    """
    require_no_adapter(checkpoint.model)
    if any(name.endswith(".encoded_exponent") for name, _ in checkpoint.model.named_buffers()):
        raise ValueError("the model's weights are packed (DFloat11); load it with device='cpu' to write it")
    (folder / vae_file).parent.mkdir(parents=True, exist_ok=True)
    config = config_json(checkpoint.config) | dict(more or {})
    parts = {"config": config} | {name: config.get(name) for name in ("llm_config", "vit_config")}
    if vit := parts["vit_config"]:
        size = {"height": vit["image_size"], "width": vit["image_size"]}
        parts["preprocessor_config"] = PREPROCESSOR | {"size": size}
    for name, part in parts.items():
        if part:
            (folder / f"{name}.json").write_text(json.dumps(part, indent=2) + "\n", "utf-8")
    checkpoint.codec.save(folder)
    if checkpoint.autoencoder is not None:
        vae_state = {
            name: _plain(tensor, dtype) for name, tensor in checkpoint.autoencoder.state_dict().items()
        }
        save_file(vae_state, folder / vae_file, {"format": "pt"})


def _plain(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to("cpu", dtype).contiguous()


def _save_shards(folder: Path, state: dict[str, Tensor], shard_bytes: int) -> None:
    shards = list(_shards(state, shard_bytes))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, {"format": "pt"})
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    total = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _shards(state: dict[str, Tensor], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if shard and sum(t.nbytes for t in shard.values()) + tensor.nbytes > shard_bytes:
            yield shard
            shard = {}
        shard[name] = tensor
    if shard:
        yield shard


def config_in(folder: Path) -> BagelConfig:
    """From a folder's configuration and tensor headers alone."""
    return read_config(folder, open_weights(folder).shapes(), open_autoencoder(folder).shapes(), {})


def describe(folder: Path) -> dict[str, Any]:
    """What a folder, or the folder of a weight file, holds: from configuration and tensor headers alone."""
    files, folder = open_weights(folder), folder.parent if folder.is_file() else folder
    vae_files = open_autoencoder(folder)
    shapes, vae_shapes = files.shapes(), vae_files.shapes()
    config = read_config(folder, shapes, vae_shapes, {})
    if files.precision is not None:  # what is packed has other shapes
        with torch.device("meta"):
            shapes = {name: tuple(tensor.shape) for name, tensor in BagelModel(config).state_dict().items()}
    parts: Counter[str] = Counter()
    for name, shape in shapes.items():
        draws, looks = any(part in name for part in GENERATION_PARTS), name.startswith(("vit_", "connector."))
        side = "generation expert" if draws else "vit and connector" if looks else "understanding expert"
        parts[side] += math.prod(shape)
    parts["autoencoder"] = sum(map(math.prod, vae_shapes.values()))
    return {
        "folder": str(folder),
        "parameters": dict(parts) | {"all": parts.total()},
        "dtypes": sorted(files.dtypes()),
        "quantization": files.precision,
        "config": config_json(config),
    }
