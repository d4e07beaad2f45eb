"""The configuration tree of a model, its presets, and strict JSON in and out.

`config.json` has the shape that vLLM reads (`llm_config`, `vit_config`, `vae_config`) and an `openbagel` part
with the facts that nothing else records: picture limits, default sampling per task, whether the model decides
by itself to draw.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, TypeVar

import yaml

from openbagel.checks import check_choice, check_least, nearest, retold
from openbagel.flow import Guidance, Renorm
from openbagel.images import ImageLimits

T = TypeVar("T")


class Experts(StrEnum):
    """Which weights of a block exist twice: none, the feed-forward, or all of them (`layer_module` of the
    reference).
    """

    DENSE = "Qwen2DecoderLayer"
    MOE = "Qwen2MoEDecoderLayer"
    MOT = "Qwen2MoTDecoderLayer"


class Activation(StrEnum):
    """Of the connector; every released model uses this one."""

    GELU_TANH = "gelu_pytorch_tanh"


@dataclass(frozen=True, slots=True, kw_only=True)
class LLMConfig:
    """The Qwen2.5 decoder; names as in its Hugging Face config."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    qk_norm: bool

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def block_weights(self) -> int:
        """Matrix entries that one token meets in a block; the same for both experts."""
        attention = 2 * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        return self.hidden_size * (attention + 3 * self.intermediate_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class ViTConfig:
    """The SigLIP encoder; names as in its Hugging Face config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    """As stored in `vit_config.json`: one more than BAGEL builds and stores."""
    num_attention_heads: int
    patch_size: int

    @property
    def num_used_layers(self) -> int:
        return self.num_hidden_layers - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class VAEConfig:
    """The FLUX autoencoder; each level but the last halves the picture."""

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    groups: int
    scale: float
    shift: float

    def __post_init__(self) -> None:
        if self.ch % self.groups:
            told = f"{self.ch} channels cannot be normalised in {self.groups} groups"
            raise ValueError(f"vae_config: {told}; write the model's own in its config.json")

    @property
    def downsample(self) -> int:
        return 2 ** (len(self.ch_mult) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Everything a caller may choose about one request. Lengths in tokens; temperature 0 is greedy.

    num_timesteps counts schedule points, so num_timesteps - 1 steps run. eta is how much of the noise every
    step draws anew: 0 is Euler's way, as published; 1 keeps none, so that later steps can mend what earlier
    ones got wrong. taylorseer forecasts two of three steps after the first five (approximate, about twice as
    fast).
    """

    max_tokens: int = 512
    max_think_tokens: int = 1024
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    guidance: Guidance = field(default_factory=Guidance)
    num_timesteps: int = 50
    timestep_shift: float = 3.0
    eta: float = 0.0
    taylorseer: bool = False
    tiled_vae: bool = False
    """Encode and decode large pictures in overlapping tiles: bounded memory, approximate."""
    negative_prompt: str = ""
    """What a picture should not show: text guidance leads away from it, in place of from no text."""

    def __post_init__(self) -> None:
        check_least(self, max_tokens=1, max_think_tokens=0, temperature=0, top_k=0, num_timesteps=2)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must lie in (0, 1]")
        if not 0 < self.timestep_shift < math.inf:
            raise ValueError(f"timestep_shift {self.timestep_shift} must be finite and above 0")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta {self.eta} must lie in [0, 1]: the share of the noise that is drawn anew")
        if self.eta and self.taylorseer:
            raise ValueError("taylorseer forecasts a smooth way, and new noise leaves none: set eta to 0")


GUIDANCE_OPTIONS = {
    "text_guidance": "text",
    "image_guidance": "image",
    "guidance_interval": "interval",
    "renorm": "renorm",
    "renorm_min": "renorm_min",
}
"""What the fields of `Guidance` are called beside those of `Sampling`."""


def adjusted(sampling: Sampling, options: Mapping[str, Any]) -> Sampling:
    """A sampling with what was asked for; None leaves a value as it is, but that taylorseer takes eta 0.
    ValueError for unknown names.
    """
    fields = [f.name for f in dataclasses.fields(Sampling) if f.name != "guidance"]
    asked = {name: value for name, value in options.items() if value is not None}
    for name in asked:
        check_choice("option", name, [*fields, *GUIDANCE_OPTIONS])
    if asked.get("taylorseer"):
        asked = {"eta": 0.0, **asked}
    guidance = {field: asked.pop(name) for name, field in GUIDANCE_OPTIONS.items() if name in asked}
    if "interval" in guidance:
        guidance["interval"] = tuple(guidance["interval"])
    return replace(sampling, guidance=replace(sampling.guidance, **guidance), **asked)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """Per-model facts that are no architecture. size is (height, width) in pixels, the default of a new
    picture.
    """

    size: tuple[int, int]
    vae_limits: ImageLimits
    vit_limits: ImageLimits
    draw: Sampling
    edit: Sampling
    ask: Sampling
    draws_by_itself: bool
    """Whether it was trained on markers, so that it knows when to write and when to draw."""
    film: Sampling | None = None
    video_group: int = 4
    """Frames of a clip that are drawn together, at one time and in full attention."""
    video_window: int | None = None
    """So many last frames are what the next ones are drawn after; None: all before them."""
    world: str | None = None
    """The toy world it was trained on, if any."""

    def __post_init__(self) -> None:
        check_least(self, video_group=1, video_window=1)

    def filming(self, *, shown: bool, told: bool) -> Sampling:
        """Of clips with or without frames and a text; where the model has none: of drawings and edits."""
        return self.film or (self.edit if shown and told else self.draw)


@dataclass(frozen=True, slots=True, kw_only=True)
class BagelConfig:
    """One model. vit is None without picture understanding, vae is None without drawing."""

    llm: LLMConfig
    vit: ViTConfig | None
    vae: VAEConfig | None
    layer_module: Experts
    latent_patch_size: int
    max_latent_size: int
    vit_max_num_patch_per_side: int
    connector_act: Activation
    interpolate_pos: bool
    settings: ModelSettings

    @property
    def latent_stride(self) -> int:
        """Pixels of a latent token's side."""
        return self.latent_patch_size * (self.vae.downsample if self.vae else 1)

    @property
    def latent_channels(self) -> int:
        """Channels of a latent token."""
        return self.latent_patch_size**2 * (self.vae.z_channels if self.vae else 0)

    def understanding_only(self) -> "BagelConfig":
        """The same model without the generation expert and the autoencoder."""
        return replace(self, vae=None, layer_module=Experts.DENSE)


QWEN_7B = LLMConfig(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    qk_norm=True,
)
SIGLIP = ViTConfig(
    hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, patch_size=14
)
FLUX_VAE = VAEConfig(
    ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=16, groups=32, scale=0.3611, shift=0.1159
)


def official_settings() -> ModelSettings:
    """Limits and sampling of the official app and notebook."""
    return ModelSettings(
        size=(1024, 1024),
        vae_limits=ImageLimits(max_size=1024, min_size=512, stride=16),
        vit_limits=ImageLimits(max_size=980, min_size=224, stride=14),
        draw=Sampling(guidance=Guidance(text=4.0, image=1.0)),
        edit=Sampling(
            guidance=Guidance(text=4.0, image=2.0, interval=(0.0, 1.0), renorm=Renorm.TEXT_CHANNEL)
        ),
        ask=Sampling(),
        draws_by_itself=False,
    )


def bagel_7b() -> BagelConfig:
    """`ByteDance-Seed/BAGEL-7B-MoT`: 14.607 B parameters."""
    return BagelConfig(
        llm=QWEN_7B,
        vit=SIGLIP,
        vae=FLUX_VAE,
        layer_module=Experts.MOT,
        latent_patch_size=2,
        max_latent_size=64,
        vit_max_num_patch_per_side=70,
        connector_act=Activation.GELU_TANH,
        interpolate_pos=False,
        settings=official_settings(),
    )


def bagel_1_5b() -> BagelConfig:
    """The ablation model of the paper, on Qwen2.5-1.5B."""
    llm = replace(QWEN_7B, vocab_size=151936, hidden_size=1536, intermediate_size=8960)
    llm = replace(llm, num_attention_heads=12, num_key_value_heads=2)
    return replace(bagel_7b(), llm=llm)


def bagel_0_5b() -> BagelConfig:
    """The default base of the official training script, Qwen2.5-0.5B."""
    larger = bagel_1_5b()
    llm = replace(larger.llm, hidden_size=896, intermediate_size=4864)
    return replace(larger, llm=replace(llm, num_hidden_layers=24, num_attention_heads=14))


def nano(vocab_size: int) -> BagelConfig:
    """The model that ships with the package: 64x64 pictures of 16 latent and 16 ViT tokens."""
    limits = ImageLimits(max_size=128, min_size=32, stride=16)
    always = Guidance(2.5, interval=(0.0, 1.0))
    drawn = Sampling(max_think_tokens=96, num_timesteps=49, timestep_shift=4.0, eta=1.0, guidance=always)
    filmed = replace(drawn, num_timesteps=25, guidance=replace(always, text=3.0, image=2.0))
    edited = replace(drawn, num_timesteps=25, timestep_shift=3.0, guidance=replace(always, text=1.5))
    asked = Sampling(max_tokens=64, max_think_tokens=96)
    settings = replace(official_settings(), draw=drawn, edit=edited, ask=asked, film=filmed)
    settings = replace(settings, video_group=1, video_window=3)
    llm = replace(QWEN_7B, vocab_size=vocab_size, hidden_size=256, intermediate_size=480, rope_theta=1e4)
    return replace(
        bagel_7b(),
        llm=replace(llm, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2),
        vit=ViTConfig(
            hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, patch_size=16
        ),
        vae=replace(FLUX_VAE, ch=16, num_res_blocks=1, z_channels=8, groups=8, scale=1.0, shift=0.0),
        max_latent_size=8,
        vit_max_num_patch_per_side=8,
        settings=replace(settings, size=(64, 64), vae_limits=limits, vit_limits=limits),
    )


def to_json(value: Any) -> Any:
    """A dataclass tree as JSON values; enums by value, tuples as lists."""
    return json.loads(json.dumps(value, default=dataclasses.asdict))


def from_json(cls: type[T], data: Any, where: str) -> T:
    """Builds a dataclass from JSON values, its fields' types deciding.

    Raises ValueError naming `where` and the key for unknown keys (with the nearest valid one), missing ones
    and values of another type.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, got {data!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    for key in data:
        if key not in fields:
            raise ValueError(f"{where}: unknown key {key!r}{nearest(key, fields)}")
    for name, f in fields.items():
        if name not in data and f.default is f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: missing key {name!r}")
    hints = typing.get_type_hints(cls)
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):  # of several kinds that of the value, else the first
        fitting = [one for one in inner if (typing.get_origin(one) or one) is type(value)]
        return _convert([*fitting, *inner][0], value, where)
    if dataclasses.is_dataclass(kind):
        return from_json(typing.cast(type, kind), value, where)
    if origin is tuple and isinstance(value, list):
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) == len(value):
            return tuple(_convert(kind, value[i], f"{where}[{i}]") for i, kind in enumerate(kinds))
    if origin is dict and isinstance(value, dict):
        return {str(key): _convert(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    return _convert_leaf(kind, value, where)


def _convert_leaf(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, type) and issubclass(kind, Enum):
        check_choice(f"{where}:", value, [member.value for member in kind])
        return kind(value)
    if kind is float and type(value) in (int, str):  # YAML takes 1e-4 for a text, it wants 1.0e-4
        with suppress(ValueError):
            if math.isfinite(number := float(value)):
                return number
    if not (isinstance(kind, type) and type(value) is kind):
        raise ValueError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {value!r}")
    return value


def read_yaml(path: str | Path, what: str, remedy: str) -> dict[str, Any]:
    """The mapping in a YAML or JSON file; ValueError says that `what` cannot be read, or is none."""
    message = f"{what} {path} cannot be read: {{error}}"
    with retold(message, OSError, UnicodeDecodeError, yaml.YAMLError):
        tree = yaml.safe_load(Path(path).read_text("utf-8"))
    if not isinstance(tree, dict):
        raise ValueError(f"{what} {path} is no mapping but {type(tree).__name__}; {remedy}")
    return tree
