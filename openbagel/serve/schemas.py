"""Bodies of the HTTP interface: OpenAI's fields, and extras named as vLLM-Omni names them, at the top level
or inside `extra_body`. None stands for the model's own default.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from openbagel.checks import nearest
from openbagel.flow import Renorm

Count = Annotated[int, Field(ge=1)]
Scale = Annotated[float, Field(ge=0, le=100)]
RENAMED = {"guidance_scale": "text_guidance", "image_guidance_scale": "image_guidance"}
SAMPLED = {*RENAMED, "guidance_interval", "renorm", "renorm_min", "timestep_shift", "eta"}
SAMPLED |= {"taylorseer", "negative_prompt", "temperature", "top_p", "top_k"}
"""The fields that are options of `openbagel.config.adjusted`, two of them under another name."""


def _short(kind: Any, full: Callable[[str], Any]) -> BeforeValidator:
    """Lets a text stand for what it is in full. (Errors of a union would tell of texts where none is.)"""
    return BeforeValidator(lambda a: full(a) if isinstance(a, str) else a, json_schema_input_type=kind | str)


class Options(BaseModel):
    """What every request may ask for. seed: of the first reply, the next ones count up; None draws one."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    IGNORED: ClassVar[str] = ""
    """OpenAI's fields that have no effect here."""
    budget = property(lambda self: None)
    """Tokens of an answer, its thought included; of the thought alone before a picture."""

    model: str | None = None
    n: Count | None = None
    stream: bool | None = None
    seed: int | None = Field(None, ge=0, lt=2**62)
    size: str | None = Field(None, pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$")
    height: Count | None = None
    width: Count | None = None
    reasoning: bool | None = None
    negative_prompt: str | None = None
    num_inference_steps: Count | None = None
    guidance_scale: Scale | None = None
    image_guidance_scale: Scale | None = None
    guidance_interval: tuple[float, float] | None = None
    renorm: Renorm | None = None
    renorm_min: float | None = None
    timestep_shift: float | None = Field(None, gt=0, le=100)
    eta: float | None = Field(None, ge=0, le=1)
    taylorseer: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def flat(cls, data: Any) -> Any:
        """What is nested in `extra_body` stands beside the rest, and wins as in OpenAI's client."""
        inner = data.get("extra_body") if isinstance(data, dict) else None
        return {**data, **inner, "extra_body": None} if isinstance(inner, dict) else data

    @model_validator(mode="after")
    def known(self) -> Self:
        fields = [*type(self).model_fields, *self.IGNORED.split(), "extra_body"]
        for name in {*(self.model_extra or ())}.difference(fields):
            told = {"name": name, "hint": nearest(name, fields)}
            raise PydanticCustomError("unknown_parameter", "unknown field '{name}'{hint}", told)
        return self

    @property
    def ignored(self) -> str:
        return ",".join(sorted({*self.IGNORED.split()} & {*(self.model_extra or ())}))

    @property
    def think(self) -> bool:
        return bool(self.reasoning)

    @property
    def shape(self) -> tuple[int, int] | None:
        """(height, width) as asked, or None."""
        if self.size and self.size != "auto":
            width, height = self.size.split("x")
            return int(height), int(width)
        if (self.height is None) != (self.width is None):
            raise ValueError("give both height and width, or neither")
        return (self.height, self.width) if self.height and self.width else None

    @property
    def sampling(self) -> dict[str, Any]:
        """Options of `openbagel.config.adjusted`; those that were not asked for are None."""
        asked = {RENAMED.get(name, name): getattr(self, name, None) for name in SAMPLED}
        return asked | {"num_timesteps": self.num_inference_steps and self.num_inference_steps + 1}


class Link(BaseModel):
    url: str
    detail: str | None = None


class Part(BaseModel):
    """A text, or a picture: its URL, or an object with `url`."""

    type: Literal["text", "image_url"]
    text: str = ""
    image_url: Annotated[Link, _short(Link, lambda url: {"url": url})] = Link(url="")

    @property
    def shows(self) -> bool:
        return self.type == "image_url"


Said = Annotated[list[Part], _short(list[Part], lambda text: [{"type": "text", "text": text}])]


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Said | None = None


class Chat(Options):
    """Body of `/v1/chat/completions`."""

    IGNORED = """audio frequency_penalty function_call functions logit_bias logprobs metadata moderation
    parallel_tool_calls prediction presence_penalty prompt_cache_key prompt_cache_options verbosity store
    prompt_cache_retention response_format safety_identifier service_tier tool_choice tools top_logprobs user
    web_search_options"""
    messages: list[Message] = Field(min_length=1)
    modalities: list[Literal["text", "image"]] | None = Field(None, min_length=1)
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool | None] | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[Literal["enable_thinking"], bool | None] | None = None

    @property
    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if stop]

    @property
    def budget(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def think(self) -> bool:
        asked = (self.chat_template_kwargs or {}).get("enable_thinking", self.reasoning)
        return (self.reasoning_effort or "none") != "none" if asked is None else asked


class Draw(Options):
    """Body of `/v1/images/generations`."""

    IGNORED = """complexity frame_count frame_duration_ms input_fidelity markup moderation quality
    safety_identifier style svg user"""
    prompt: str = Field(min_length=1)
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100)
    background: Literal["opaque", "auto", "transparent"] | None = None
    partial_images: int | None = Field(None, ge=0, le=3)


class Edit(Draw):
    """The fields of `/v1/images/edits`, which come as multipart/form-data."""

    image: list[bytes | str] = Field(min_length=1)
    mask: bytes | None = None
