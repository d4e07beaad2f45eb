"""BAGEL for Hugging Face transformers. Importing this module registers it, as model type `bagel`.

A conversation in ids has no roles, as the model was trained: every text and picture stands between its
markers, and a lone start marker asks for an answer::

    <|vision_start|> <|vision_end|>   <|im_start|> What is it? <|im_end|>   <|im_start|>
    the first picture                 a text                                add_generation_prompt

Pictures travel beside the ids as they are, `pixel_values` int16[pictures, H, W, 3] with -1 where others are
larger: the model resizes them itself, otherwise for looking than for editing. All that is computed is
computed by `BagelModel` and by the requests of `Bagel`.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.image_utils import load_image
from transformers.modeling_outputs import CausalLMOutput

from openbagel import weights
from openbagel.checks import check_choice
from openbagel.config import Sampling, adjusted
from openbagel.data.samples import Pixels, Role, Sample, SampleId
from openbagel.hub import find_model
from openbagel.images import to_pixels
from openbagel.inference.pipeline import Bagel
from openbagel.inference.text import split_thought
from openbagel.integrations.conversation import CHAT_TEMPLATE, Rendered, escaped, read
from openbagel.model.bagel import BagelModel, PositionTable
from openbagel.model.vae import AutoEncoder
from openbagel.picture_files import open_picture
from openbagel.placement import place
from openbagel.quantize import precision_of
from openbagel.sequence import Text
from openbagel.tokens import END_OF_TEXT, MARKERS, THINK_BEFORE_ANSWERING, THINK_BEFORE_DRAWING, TextCodec
from openbagel.train.latents import LatentEncoder

PAD_PICTURE = "<|image_pad|>"
"""What vLLM wants between a picture's markers; left out of the ids where the vocabulary lacks it."""
TOLD_ANYWAY = ("eos_token_id", "pad_token_id", "use_cache", "transformers_version", "_from_model_config")
"""Options of `generate` that say what is so: an answer ends with <|im_end|>, the past is cached."""
SENSITIVE = ["time_embedder", "latent_pos_embed", "vae2llm", "llm2vae", "connector", "vit_model"]
SENSITIVE += [r".*(norm\w*|lm_head)"]
"""Modules, as patterns, that quantisation leaves alone unless its configuration lists others."""
REMOTE = ("http://", "https://", "data:")
NO_LABEL, BLANK = -100, -1


class BagelConfig(hf.PreTrainedConfig):
    """config.json as it is: `llm_config`, `vit_config`, `vae_config` and the facts beside them."""

    model_type = "bagel"

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> hf.Qwen2Config:
        return hf.Qwen2Config(**self.__dict__.get("llm_config", {}))


class BagelProcessor(hf.ProcessorMixin):
    """Conversations to ids and pictures, and back. No marker in the ids comes from what a user typed."""

    def __init__(self, tokenizer: hf.PreTrainedTokenizerFast, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # calls of the other change its state
        self.codec, pad = TextCodec.of(own), own.token_to_id(PAD_PICTURE)
        self.slot = [self.codec.vision_start, *([] if pad is None else [pad]), self.codec.vision_end]

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls, pretrained_model_name_or_path: Any, **options: Any
    ) -> "BagelProcessor":
        folder = _located(pretrained_model_name_or_path, options)
        codec, saved, end = TextCodec.load(folder), folder / "chat_template.jinja", MARKERS[1]
        special = {"eos_token": end, "pad_token": end if codec.end_of_text is None else END_OF_TEXT}
        tokenizer = hf.PreTrainedTokenizerFast(
            tokenizer_object=codec.tokenizer, split_special_tokens=True, padding_side="left", **special
        )
        is_ours = (folder / "processor_config.json").is_file() and saved.is_file()
        return cls(tokenizer, options.get("chat_template") or (saved.read_text("utf-8") if is_ours else None))

    def apply_chat_template(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, conversation: Any, chat_template: Any = None, **options: Any
    ) -> Any:
        """A conversation, or several, as `Rendered` text; with tokenize as ids, with return_dict as inputs.

        `enable_thinking=True` asks for a thought first (with `generation_mode="image"`: before a picture).
        """
        several = isinstance(conversation[0], (list, tuple))
        chats, images = zip(*map(escaped, conversation if several else [conversation]), strict=True)
        tokenize, return_dict = options.pop("tokenize", False), options.pop("return_dict", False)
        more = {"return_tensors": options.pop("return_tensors", None)}
        more |= options.pop("processor_kwargs", None) or {}
        prompts = super().apply_chat_template(list(chats), chat_template, **options)
        rendered = [Rendered(prompt) for prompt in prompts]
        if not tokenize:
            return rendered if several else rendered[0]
        inputs = self(images, rendered, **more)
        return inputs if return_dict else inputs["input_ids"]

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, images: Any = None, text: Any = "", *, rendered: bool = False, **options: Any
    ) -> hf.BatchFeature:
        """ids (padded on the left), attention mask and pictures of one conversation or of several.

        A string that `apply_chat_template` made keeps its markers (rendered: also one that lost its type on
        the way); any other is one message. `<|image_n|>` in a message is picture n, as long as it is not
        shown yet; a message that names none follows its pictures. images: pictures, paths or addresses; for
        several texts one entry for each.
        """
        tensors = options.pop("return_tensors", None)
        for name, value in options.items():
            if value is not None and name not in ("padding", "padding_side", "add_special_tokens"):
                raise ValueError(f"{name}={value!r} is not supported; give text and images")
        texts, groups = ([text], [images]) if isinstance(text, str) else (text, images or [None] * len(text))
        if len(texts) != len(groups):
            raise ValueError(f"{len(groups)} entries of images for {len(texts)} texts; give a list for each")
        pairs = zip(texts, map(_opened, groups), strict=True)
        rows = [self._encode(Rendered(one) if rendered else one, shown) for one, shown in pairs]
        ids = {"input_ids": [ids for ids, _ in rows]}
        padded = self.tokenizer.pad(ids, padding_side="left", return_tensors=tensors)
        pictures = [one for _, shown in rows for one in shown]
        return hf.BatchFeature({**padded, **({"pixel_values": _stacked(pictures)} if pictures else {})})

    def _encode(self, text: str, images: list[Image.Image]) -> tuple[list[int], list[Image.Image]]:
        """The ids of one conversation, and its pictures in the order in which they are shown."""
        ids, parts = list[int](), read(text, len(images))
        for part in parts:
            if isinstance(part, str):
                ids += [self.codec.start, *self.codec.encode(part), self.codec.end]
            else:
                ids += [self.codec.start] if part is None else self.slot
        return ids, [images[part] for part in parts if isinstance(part, int)]

    @staticmethod
    def decode_image(pixels: Tensor) -> Image.Image:
        """The picture of one output of `generate(generation_mode="image")`, its blank rows left or cut."""
        inside = pixels[..., 0] > BLANK
        return Image.fromarray(pixels[inside.any(1)][:, inside.any(0)].to("cpu", torch.uint8).numpy())

    def post_process_multimodal_output(
        self, generated_outputs: Any, *args: Any, generation_mode: str | None = None, **options: Any
    ) -> list[Any]:
        """Texts, or the pictures of `generation_mode="image"`."""
        if generation_mode == "image":
            return [self.decode_image(pixels) for pixels in generated_outputs]
        return super().post_process_multimodal_output(generated_outputs, *args, **options)

    def parse_response(self, response: Any, *args: Any, **options: Any) -> dict[str, str]:
        """A message with `content`, and with `reasoning_content` where the model thought first."""
        text = response if isinstance(response, str) else self.decode(response, skip_special_tokens=True)
        thought, answer = split_thought(text)
        return {"role": "assistant", "content": answer} | ({"reasoning_content": thought} if thought else {})


class BagelForConditionalGeneration(hf.PreTrainedModel, hf.GenerationMixin):
    """`BagelModel` and its autoencoder behind transformers' interface, under the official tensor names."""

    config_class = BagelConfig
    input_modalities: Any = ("image", "text")
    output_modalities: Any = ("text", "image")
    _no_split_modules = ["Block", "VisionModel", "AutoEncoder"]
    accepts_loss_kwargs = False
    codec: TextCodec | None = None

    def __init__(self, config: BagelConfig) -> None:
        super().__init__(config)
        core = BagelModel(weights.config_of(vars(config)))
        self.__dict__["_core"] = core  # no child: its children are this module's own, under their names
        for name, child in core.named_children():
            self.add_module(name, child)
        self.autoencoder = AutoEncoder(core.config.vae) if core.config.vae else None
        self.post_init()
        for table in core.children():
            if isinstance(table, PositionTable):
                table.reset_parameters()

    @property
    def core(self) -> BagelModel:
        """The model underneath, with the children that this module has now: wrappers replace some."""
        core: BagelModel = self.__dict__["_core"]
        core._modules.update({name: self._modules[name] for name in core._modules})
        return core

    @property
    def bagel(self) -> Bagel:
        """The same weights with the verbs of openbagel."""
        return Bagel(self._checkpoint())

    def _checkpoint(self) -> weights.Checkpoint:
        if self.codec is None:
            raise ValueError("this model has no tokenizer: load it with from_pretrained, or set its `codec`")
        return weights.Checkpoint(self.core.config, self.core, self.autoencoder, self.codec)

    def get_input_embeddings(self) -> nn.Module:
        return self.core.language_model.model.embed_tokens

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """Loads plain weights in any layout of `Bagel.load`, as strictly; the options are transformers' own.

        On CUDA device_map "auto" is planned as `Bagel.load(device="auto")` does it.
        """
        checkpoint = weights.load_checkpoint(_located(pretrained_model_name_or_path, options))
        if (precision := precision_of(checkpoint.model)) is not None:
            raise ValueError(f"{precision} weights are for Bagel.load; transformers packs plain ones itself")
        state = dict(checkpoint.model.state_dict())
        if checkpoint.autoencoder is not None:
            state |= checkpoint.autoencoder.state_dict(prefix="autoencoder.")
        options |= {"config": BagelConfig(**weights.config_json(checkpoint.config)), "state_dict": state}
        options["quantization_config"] = quantization = copy.copy(options.get("quantization_config"))
        for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
            if getattr(quantization, name, ()) is None:
                setattr(quantization, name, SENSITIVE)
        spread = options.get("device_map") == "auto" and torch.cuda.is_available() and quantization is None
        limits = options.pop("max_memory", None) if spread else None
        options |= {"device_map": "cpu"} if spread else {}
        loaded: Any = super().from_pretrained(None, *args, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.codec = checkpoint.codec
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        if spread:
            place(model._checkpoint(), "auto", model.dtype, max_memory=limits)
        return loaded

    def save_pretrained(self, save_directory: str | Path, *args: Any, **options: Any) -> None:
        """Writes a folder that `Bagel.load` and the official code read as well, with the tokenizer."""
        if getattr(self, "hf_quantizer", None) is not None:
            raise ValueError("quantised weights are not saved here; `openbagel convert --to` writes them")
        if (first := Path(save_directory, weights.MODEL_FILES[0])).exists():
            raise ValueError(f"{first} would be read instead of what is saved; choose another folder")
        state = options.pop("state_dict", None) or self.state_dict()
        official = {name: tensor for name, tensor in state.items() if not name.startswith("autoencoder.")}
        super().save_pretrained(save_directory, *args, state_dict=official, **options)
        if options.get("is_main_process", True):
            dtype = {"dtype": str(self.dtype).removeprefix("torch.")}
            weights.save_all_but_transformer(first.parent, self._checkpoint(), more=dtype)

    @torch.no_grad()
    def generate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: Any = None, *, generation_mode: str = "text", **options: Any
    ) -> Tensor:
        """int64[B, length + new]: the ids and what the model writes after them, padded on the right.

        `generation_mode="image"`: int16[B, length + H, W, 3] with decoded pixels in 0 … 255; the first
        `length` rows, and what other pictures of the batch need more, are -1. Options are those of the verbs
        of `Bagel` (seed, size, think, num_timesteps, text_guidance, …; sample i has seed + i) and
        max_new_tokens, do_sample, temperature, top_p, top_k; each begins as the model's own. Where a picture
        is drawn max_new_tokens bounds the thought. Anything else is an error.
        """
        check_choice("generation_mode", generation_mode, self.output_modalities)
        drawing, bagel = generation_mode == "image", self.bagel
        ids, mask = options.pop("input_ids", inputs), options.pop("attention_mask", None)
        pictures = iter(options.pop("pixel_values", ()))
        told = (options.pop("generation_config", None) or self.generation_config).to_diff_dict()
        asked = {name: value for name, value in told.items() if value is not False} | options
        asked = {name: asked[name] for name in asked if name not in TOLD_ANYWAY}
        size, think, seed = asked.pop("size", None), asked.pop("think", False), asked.pop("seed", 0)
        requests: list[Any] = []
        for number, row in enumerate(_rows(ids, mask)):
            spans = _spans(row, bagel.codec, pictures)
            parts = [shown or bagel.codec.decode(said[1:-1]) for said, shown, _ in spans if len(said) > 1]
            prompted = bool(parts) and parts[0] in (THINK_BEFORE_ANSWERING, THINK_BEFORE_DRAWING)
            parts = parts[prompted:]
            draws = "draw" if all(isinstance(part, str) for part in parts) else "edit"
            own = getattr(bagel.config.settings, draws if drawing else "ask")
            sampling = _sampling(own, asked, drawing)
            how = {"seed": seed + number, "think": think or prompted}
            if drawing:
                requests.append(bagel.draw_request(parts, size=size, sampling=sampling, **how))
            else:
                requests.append(bagel.using(sampling).write_request(parts, **how))
        made: list[Any] = bagel.engine.drive_all(requests)
        if drawing:
            return _stacked(made, ids.shape[1]).to(ids.device)
        new, pad = [ids.new_tensor(one.ids) for one in made], bagel.codec.end_of_text or bagel.codec.end
        return torch.cat([ids, pad_sequence(new, batch_first=True, padding_value=pad)], dim=1)

    def forward(  # noqa: PLR0913
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        seed: int | Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """With labels the loss of training, mean cross-entropy plus mean squared velocity error; else logits
        float32[B, length, vocabulary], zero where padding and pictures stand.

        labels: ids to be learned, -100 elsewhere. A picture with a label at one of its places is to be drawn:
        its time and noise come from the seed, which should differ from step to step.
        """
        bagel, pictures = self.bagel, iter(() if pixel_values is None else pixel_values)
        targets = torch.full_like(input_ids, NO_LABEL) if labels is None else labels
        rows = zip(_rows(input_ids, attention_mask), _rows(targets, attention_mask), strict=True)
        learned = [_learned(bagel, list(_spans(row, bagel.codec, pictures)), wanted) for row, wanted in rows]
        samples = [Sample(SampleId("transformers", 0, i), parts) for i, (parts, _) in enumerate(learned)]
        if seed is None and any(isinstance(part, Pixels) for sample in samples for part in sample.parts):
            raise ValueError("a picture is learned: pass seed=…, another one at each step, for its noise")
        encoder = LatentEncoder(self.autoencoder, bagel.config, int(seed or 0))
        pack = bagel.engine.packer.pack(encoder.segments(samples)).to(input_ids.device)
        if labels is not None:
            kept = [one for _, counts in learned for one in counts]
            keep = torch.tensor(kept, dtype=torch.bool, device=pack.labels.device)
            fields = {name: getattr(pack, name)[keep] for name in ("label_places", "labels", "label_weights")}
            losses = self.core.losses(replace(pack, **fields))
            return CausalLMOutput(loss=torch.stack([one.mean() for one in losses if one.numel()]).sum())
        in_order = pack.text_places[pack.logical[pack.text_places].argsort()]
        logits = self.core.logits(self.core(pack)[in_order]).float()
        told = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        pad = bagel.codec.tokenizer.token_to_id(PAD_PICTURE)
        everywhere = logits.new_zeros(*input_ids.shape, logits.shape[1])
        everywhere[(told > 0) & (input_ids != (BLANK if pad is None else pad))] = logits
        return CausalLMOutput(logits=everywhere)


Span = tuple[list[int], Image.Image | None, int]
"""A text or a picture of a conversation: its ids with the markers, the picture, and where it starts."""


def _spans(ids: list[int], codec: TextCodec, pictures: Iterator[Tensor]) -> Iterator[Span]:
    """A conversation's texts and pictures; the last may be a lone start marker."""
    ends = {codec.start: codec.end, codec.vision_start: codec.vision_end}
    first = 0
    while first < len(ids):
        end = ends.get(ids[first], BLANK)
        stop = ids.index(end, first) + 1 if end in ids[first:] else len(ids)
        if ids[stop - 1] != end and ids[first:] != [codec.start]:
            raise ValueError("input_ids are no texts and pictures between markers; the processor makes such")
        pixels = next(pictures, None) if end == codec.vision_end else None
        if end == codec.vision_end and pixels is None:
            raise ValueError("input_ids show more pictures than pixel_values holds")
        yield ids[first:stop], None if pixels is None else BagelProcessor.decode_image(pixels), first
        first = stop


def _learned(bagel: Bagel, spans: list[Span], labels: list[int]) -> tuple[tuple[Any, ...], list[bool]]:
    """The parts of a training sample, and which labels of its learned texts count."""
    labelled = [label != NO_LABEL for label in labels]
    learns = [any(labelled[first : first + len(ids)]) for ids, _, first in spans]
    drawing = any(one and shown for one, (_, shown, _) in zip(learns, spans, strict=True))
    parts: list[Any] = []
    kept: list[bool] = []
    for learned, (ids, shown, first) in zip(learns, spans, strict=True):
        if shown is None:
            alone = len(ids) == 1
            parts.append(Text(tuple(ids) if alone else tuple(ids[1:-1]), loss=learned, bare=alone))
            kept += labelled[first + 1 : first + len(ids)] if learned else []
            continue
        picture = bagel.config.settings.vae_limits.resize(shown)
        role = Role.TARGET if learned else Role.CONDITION
        parts += [Pixels((to_pixels(picture),), role)] if drawing else []
        parts += [] if learned else [bagel.pictures.look(picture)]
    return tuple(parts), kept


def _located(model: str | Path, options: dict[str, Any]) -> Path:
    """The folder of a model, of the revision that the options name."""
    revision = options.pop("revision", None)
    pinned = revision not in (None, "main") and not Path(model).exists()
    return find_model(f"{model}@{revision}" if pinned else model)


def _opened(images: Any) -> list[Image.Image]:
    """The pictures of one text, from pictures, paths and addresses."""
    several = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
    return [open_picture(load_image(one) if str(one).startswith(REMOTE) else one) for one in several]


def _stacked(pictures: list[Image.Image], above: int = 0) -> Tensor:
    """int16[pictures, above + H, W, 3]: 0 … 255, and -1 where a picture is not."""
    width, height = (max(sides) for sides in zip(*(picture.size for picture in pictures), strict=True))
    out = torch.full((len(pictures), above + height, width, 3), BLANK, dtype=torch.int16)
    for row, picture in zip(out, pictures, strict=True):
        row[above : above + picture.height, : picture.width] = torch.from_numpy(np.array(picture)).short()
    return out


def _rows(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """Each conversation without padding."""
    return [row.tolist() if mask is None else row[mask[i] > 0].tolist() for i, row in enumerate(ids)]


def _sampling(own: Sampling, options: Mapping[str, Any], drawing: bool) -> Sampling:
    """A model's own sampling with the options of transformers and of openbagel."""
    asked = dict(options)
    tokens, sample = asked.pop("max_new_tokens", None), asked.pop("do_sample", None)
    if tokens is not None:
        asked |= {"max_think_tokens": tokens} if drawing else {"max_tokens": tokens, "max_think_tokens": 0}
    if sample is False or (sample and asked.get("temperature") is None):
        asked["temperature"] = 1.0 if sample else 0.0
    return adjusted(own, asked)


hf.AutoConfig.register("bagel", BagelConfig)
hf.AutoProcessor.register(BagelConfig, BagelProcessor)
for _auto in ("", "ForCausalLM", "ForImageTextToText", "ForMultimodalLM"):
    getattr(hf, f"AutoModel{_auto}").register(BagelConfig, BagelForConditionalGeneration)
