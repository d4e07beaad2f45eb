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
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from openbagel.checks import check_choice, nearest, retold
from openbagel.config import (
    FLUX_VAE,
    BagelConfig,
    Experts,
    LLMConfig,
    VAEConfig,
    ViTConfig,
    bagel_7b,
    from_json,
    to_json,
)
from openbagel.files import PICKLES, check_tensor_file, read_json, write_json
from openbagel.images import sincos_table
from openbagel.model.bagel import BagelModel
from openbagel.model.vae import AutoEncoder
from openbagel.quantize import (
    FOREIGN,
    LAYERS,
    Precision,
    packed_names,
    precision_of,
    quantize,
    require_plain,
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
LISTED = 20
"""Tensors that an error names of each kind; it counts them all."""
PLAIN = (torch.float32, torch.bfloat16, torch.float16)
SCALES = ("scale", "scales", "scale_inv", "scale_weight", ".SCB", "absmax", "qzeros")
VIT = "vit_model.vision_model."
POSITIONS = f"{VIT}embeddings.position_embedding.weight"
GENERATION_PARTS = ("_moe_gen.", "vae2llm.", "llm2vae.", "time_embedder.", "latent_pos_embed.")
QWEN = {"model_type": ("qwen2",), "hidden_act": ("silu",), "use_sliding_window": (False,)}
QWEN |= {"rope_scaling": (None,)}
"""Values of a Qwen2 configuration that are supported; where it is silent it means the first."""
PREPROCESSOR = {
    "image_processor_type": "SiglipImageProcessor",
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}
"""preprocessor_config.json, which vLLM wants; openbagel itself never reads it."""
ELSEWHERE = ("llm", "vit", "vae", "settings")
TOP_LEVEL = tuple(f.name for f in dataclasses.fields(BagelConfig) if f.name not in ELSEWHERE)
"""Fields of a model that stand at the top of config.json; its parts have objects of their own there."""
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
    """The tensors of one or several safetensors files, by name, opened lazily. Errors name them `where`."""

    precision: Precision | None = None
    """Of the linears that `openbagel.quantize` packed."""

    def __init__(self, paths: list[Path], where: str | None = None) -> None:
        self.handles: dict[str, Any] = {}
        self.where = where or " with ".join(map(str, paths))
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
        raise ValueError(f"no such model folder: {folder}; give nano, a folder, or owner/name of the Hub")
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
    if (folder / "checkpoints").is_dir() or any(folder.glob("rank-*.safetensors")):
        raise ValueError(f"{folder} is of a training run; openbagel convert {folder} OUT makes a model of it")
    raise ValueError(f"{folder} holds no weights: expected one of {', '.join((*MODEL_FILES, INDEX_FILE))}")


def _shard_files(folder: Path) -> list[Path]:
    index = read_json(folder / INDEX_FILE).get("weight_map")
    shards = sorted({str(name) for name in index.values()}) if isinstance(index, dict) else []
    strange = [shard for shard in shards if Path(shard).name != shard]
    if strange or not shards:
        raise ValueError(f"{folder / INDEX_FILE} names no files of its own folder: {strange or index!r}")
    return [folder / shard for shard in shards]


def open_weights(place: Path) -> TensorFiles:
    """The transformer's tensors in a folder or file of any format."""
    from openbagel import dfloat11, gguf_files

    if dfloat11.is_packed(place):
        return dfloat11.PackedFiles(place)
    paths = weight_files(place)
    if paths[0].suffix == ".gguf":
        return gguf_files.GGUFFile(paths[0])
    files, folder = TensorFiles(paths, str(place)), place if place.is_dir() else place.parent
    config = folder / "config.json"
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
    files = open_weights(weights or folder)
    config = read_config(folder, files.shapes(), settings or {})
    if understanding_only:
        config = config.understanding_only()
    unused = GENERATION_PARTS if understanding_only else ()
    codec = TextCodec.load(folder)
    if (largest := max(codec.tokenizer.get_vocab().values())) >= config.llm.vocab_size:
        raise ValueError(f"{folder}: its tokenizer has id {largest}, its model {config.llm.vocab_size} ids")
    both = files, open_autoencoder(folder)
    return build(config, both, codec, dtype=dtype, device=device, unused=unused)


DTYPES = ("float32", "bfloat16", "float16")


def default_device(asked: torch.device | str | None = None) -> torch.device:
    """The one asked for, else CUDA if there is a card, else the CPU. ValueError for one that is not here."""
    with retold(f"there is no device {asked} here; ask `openbagel doctor`", RuntimeError, AssertionError):
        torch.empty(0, device=asked or "cpu")
    return torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))


def default_dtype(device: torch.device | str, asked: torch.dtype | str | None = None) -> torch.dtype:
    """The one asked for, perhaps by name; else bfloat16 on CUDA cards that compute in it, else float32."""
    if isinstance(asked, torch.dtype):
        return asked
    if asked is not None:
        check_choice("dtype", asked, DTYPES)
        return getattr(torch, asked)
    fast = torch.device(device).type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def build(
    config: BagelConfig,
    files: tuple[TensorFiles, TensorFiles],
    codec: TextCodec,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    unused: tuple[str, ...] = (),
) -> Checkpoint:
    """The model and the autoencoder (None without tensors), filled from a file each. On the device "meta" the
    transformer alone stays without memory. unused are pieces of the names of tensors that may stay on disk.
    """
    model_files, vae_files = files
    with torch.device("meta"):
        model = BagelModel(config)
        autoencoder = AutoEncoder(config.vae) if config.vae and vae_files.handles else None
    if model_files.precision is not None:
        quantize(model, model_files.precision)
    fill(model, model_files, dtype=dtype, device=device, unused=unused)
    if autoencoder is not None:
        fill(autoencoder, vae_files, dtype=dtype, device="cpu" if str(device) == "meta" else device)
    return Checkpoint(config, model.eval(), autoencoder and autoencoder.eval(), codec)


def fill(
    module: nn.Module,
    files: TensorFiles,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    unused: tuple[str, ...] = (),
) -> None:
    """Gives a module on the meta device its tensors, one by one. Position tables of another grid than the
    module's are computed.
    """
    wanted, stored = shapes_of(module), files.shapes()
    computed = {name for name in MAY_BE_MISSING if name in wanted and stored.get(name) != wanted[name]}
    left = {name for name in stored if name.endswith(MAY_BE_LEFT_OVER) or any(p in name for p in unused)}
    stored = {name: shape for name, shape in stored.items() if name not in computed | left}
    if faults := misfits(stored, {name: shape for name, shape in wanted.items() if name not in computed}):
        foreign = FOREIGN if any(name.endswith(SCALES) for name in stored.keys() - wanted.keys()) else ""
        raise ValueError(f"{files.where} does not fit its configuration; {faults}{foreign}")
    files.keep_packed(module, device, dtype)
    packed, state = packed_names(module), {}
    for name, parameter in module.named_parameters():
        tensor = position_table(wanted[name]) if name in computed else files[name]
        if tensor.dtype not in ([parameter.dtype] if name in packed else PLAIN):
            raise ValueError(f"{files.where}: {name} is stored as {tensor.dtype}{FOREIGN}")
        state[name] = tensor.to(device=device, dtype=None if name in packed else dtype)
    module.load_state_dict(state, strict=False, assign=True)


def shapes_of(module: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def model_shapes(config: BagelConfig) -> Shapes:
    with torch.device("meta"):
        return shapes_of(BagelModel(config))


def position_table(shape: tuple[int, ...]) -> Tensor:
    """One of MAY_BE_MISSING, in float32."""
    return sincos_table(math.isqrt(shape[0]), shape[1])


def misfits(stored: Shapes, wanted: Shapes) -> str:
    """Counts and names what is missing, unexpected or misshapen; nothing where all fits."""
    faults = {
        "missing": [name for name in wanted if name not in stored],
        "unexpected": [name for name in stored if name not in wanted],
        "misshapen": [
            f"{name} {stored[name]}, expected {shape}"
            for name, shape in wanted.items()
            if stored.get(name, shape) != shape
        ],
    }
    return "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:LISTED])}{' …' * (len(names) > LISTED)}"
        for kind, names in faults.items()
        if names
    )


def read_config(folder: Path, shapes: Shapes, settings: Mapping[str, Any]) -> BagelConfig:
    """Every per-model fact: config.json (overridden by settings), the two part files, tensor shapes, the 7B's
    values. ValueError for what makes no sense, before anything is built.
    """
    for key in settings:
        if key not in (*TOP_LEVEL, "openbagel"):
            raise ValueError(f"settings: unknown key {key!r}{nearest(key, TOP_LEVEL)}")
    path = folder / "config.json"
    stored = {**(read_json(path) if path.is_file() else {}), **settings}
    errors = AttributeError, KeyError, IndexError, TypeError, ZeroDivisionError
    with retold(f"{folder}: its configuration and its tensors make no sense ({{error}})", *errors):
        tree = _config_tree(folder, stored, shapes)
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
    told, stored = config.llm.num_hidden_layers, _count(shapes, LAYERS)
    if told > stored:
        raise ValueError(f"{where}: num_hidden_layers={told} does not fit the {stored} stored layers")


def _config_tree(folder: Path, stored: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    tables = {"max_latent_size": MAY_BE_MISSING[0], "vit_max_num_patch_per_side": POSITIONS}
    facts: dict[str, Any] = {k: round(shapes[n][0] ** 0.5) for k, n in tables.items() if n in shapes}
    variants = {Experts.MOT: "self_attn.q_proj_moe_gen", Experts.MOE: "mlp_moe_gen.gate_proj"}
    found = (kind for kind, leaf in variants.items() if f"{LAYERS}0.{leaf}.weight" in shapes)
    facts["layer_module"] = next(found, Experts.DENSE).value
    facts["llm"] = llm_fields_of(_part(folder, stored, "llm_config"), shapes, f"{folder}: llm_config")
    facts["vit"] = facts["vae"] = None
    if "connector.fc1.weight" in shapes:
        facts["vit"] = _vit_fields(_part(folder, stored, "vit_config"), shapes)
    if "vae2llm.weight" in shapes:
        facts["vae"] = vae = vae_fields_of(stored.get("vae_config", {}), open_autoencoder(folder).shapes())
        facts["latent_patch_size"] = round((shapes["vae2llm.weight"][1] / vae["z_channels"]) ** 0.5)
    return to_json(bagel_7b()) | facts | _own_facts(stored)


def _own_facts(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json of ours says beside its parts."""
    own = {"settings": stored["openbagel"]} if "openbagel" in stored else {}
    return own | {key: stored[key] for key in TOP_LEVEL if key in stored}


def _count(shapes: Shapes, stem: str) -> int:
    """Of the numbered modules after a stem."""
    return len({name.removeprefix(stem).partition(".")[0] for name in shapes if name.startswith(stem)})


def _part(folder: Path, stored: dict[str, Any], name: str) -> dict[str, Any]:
    """A part's fields: from config.json, else from its own file."""
    with retold(f"{folder} has neither {name}.json nor {name!r} in its config.json", OSError):
        return stored[name] if name in stored else read_json(folder / f"{name}.json")


def llm_fields_of(fields: dict[str, Any], shapes: Shapes, where: str) -> dict[str, Any]:
    require_values(fields, QWEN, where)
    return _fields(LLMConfig, fields) | {"qk_norm": f"{LAYERS}0.self_attn.q_norm.weight" in shapes}


def require_values(fields: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """ValueError for others than the supported values of a foreign configuration."""
    for key, values in supported.items():
        if fields.get(key, values[0]) not in values:
            valid = " or ".join(map(repr, values))
            raise ValueError(f"{where}: {key}={fields[key]!r} is not supported, only {valid}")


def _fields(kind: type, stored: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: stored[f.name] for f in dataclasses.fields(kind) if f.name in stored}


def _vit_fields(fields: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    """The stored layer count may or may not include the layer that BAGEL drops; the tensors decide."""
    layers, stored = _count(shapes, f"{VIT}encoder.layers."), fields.get("num_hidden_layers")
    if stored not in (layers, layers + 1):
        raise ValueError(f"vit_config: num_hidden_layers={stored} does not fit the {layers} stored layers")
    return _fields(ViTConfig, fields) | {"num_hidden_layers": layers + 1}


def vae_fields_of(fields: dict[str, Any], shapes: Shapes) -> dict[str, Any]:
    seen = {}
    if shapes:
        ch, levels = shapes["encoder.conv_in.weight"][0], range(_count(shapes, "encoder.down."))
        seen = {
            "ch": ch,
            "ch_mult": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] // ch for i in levels],
            "num_res_blocks": _count(shapes, "encoder.down.0.block."),
            "z_channels": shapes["decoder.conv_in.weight"][1],
        }
    return to_json(FLUX_VAE) | seen | _fields(VAEConfig, fields)


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
    return from_json(BagelConfig, tree | _own_facts(stored), "config.json")


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
    state = {n: on_cpu(t, None if n in packed else dtype) for n, t in model.state_dict().items()}
    if shard_bytes is None:
        return save_tensors(folder / MODEL_FILES[0], state)
    split = split_torch_state_dict_into_shards(state, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        save_tensors(folder / file, {name: state[name] for name in names})
    write_json(folder / INDEX_FILE, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


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
    require_plain(checkpoint.model)
    (folder / vae_file).parent.mkdir(parents=True, exist_ok=True)
    config = config_json(checkpoint.config) | dict(more or {})
    parts = {"config": config} | {name: config.get(name) for name in ("llm_config", "vit_config")}
    if vit := parts["vit_config"]:
        size = {"height": vit["image_size"], "width": vit["image_size"]}
        parts["preprocessor_config"] = PREPROCESSOR | {"size": size}
    for name, part in parts.items():
        if part:
            write_json(folder / f"{name}.json", part)
    checkpoint.codec.save(folder)
    if checkpoint.autoencoder is not None:
        state = checkpoint.autoencoder.state_dict()
        save_tensors(folder / vae_file, {name: on_cpu(tensor, dtype) for name, tensor in state.items()})


def on_cpu(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """As it can be written; dtype None keeps its own."""
    return tensor.detach().to("cpu", dtype).contiguous()


def save_tensors(path: Path, tensors: dict[str, Tensor], told: dict[str, str] | None = None) -> None:
    """Writes a safetensors file with the mode that `open` gives files; the library's are for one user. told:
    what its header says besides.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, told or {"format": "pt"})
    path.chmod(mode)


def config_in(folder: Path) -> BagelConfig:
    """From a folder's configuration and tensor headers alone."""
    return read_config(folder, open_weights(folder).shapes(), {})


def describe(folder: Path) -> dict[str, Any]:
    """What a folder, or the folder of a weight file, holds: from configuration and tensor headers alone."""
    files = open_weights(folder)
    config = read_config(folder.parent if folder.is_file() else folder, files.shapes(), {})
    dtypes = sorted(files.dtypes())
    return {"dtypes": dtypes, "quantization": files.precision, "config": config_json(config)}
