"""The transformers integration: the snippets that users bring, equal results bit for bit, folders, training.

Everything runs in one process on one tiny random checkpoint; importing transformers takes seconds.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from PIL import Image
from torch import Tensor

from openbagel import weights
from openbagel.data.samples import Pixels, Role, Sample, SampleId
from openbagel.images import sincos_table, to_pixels
from openbagel.inference.pipeline import Bagel
from openbagel.lora import load_adapter, merge
from openbagel.sequence import Text
from openbagel.tokens import END_OF_TEXT, MARKERS, THINK_BEFORE_ANSWERING, THINK_BEFORE_DRAWING
from openbagel.train.latents import LatentEncoder
from tests import tiny
from tests.integrations.test_conversation import TYPED

hf = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
ours = pytest.importorskip("openbagel.integrations.transformers")

PHOTO = Image.radial_gradient("L").resize((20, 12)).convert("RGB")
OTHER = Image.linear_gradient("L").resize((8, 16)).convert("RGB")
AUTO = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
START, END, LOOK, LOOKED = MARKERS
SHOWN, CHANGED = ({"type": "image", "image": picture} for picture in (PHOTO, OTHER))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    weights.save_checkpoint(folder, tiny.checkpoint())
    return folder


@pytest.fixture(scope="module")
def bagel(folder: Path) -> Bagel:
    return Bagel.load(folder, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def processor(folder: Path) -> Any:
    return hf.AutoProcessor.from_pretrained(folder)


@pytest.fixture
def no_remote_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("code of a model folder was asked for")

    for module in ("auto_factory", "configuration_auto", "processing_auto"):
        monkeypatch.setattr(f"transformers.models.auto.{module}.get_class_from_dynamic_module", refuse)


def said(content: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content, **more}]


def inputs(processor: Any, content: Any, images: Any = None, **options: Any) -> Any:
    text = processor.apply_chat_template(said(content), add_generation_prompt=True, tokenize=False, **options)
    return processor(text=text, images=images, return_tensors="pt")


def new_text(processor: Any, given: Any, out: Tensor) -> str:
    return processor.decode(out[0][given.input_ids.shape[-1] :], skip_special_tokens=True)


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def same(one: Image.Image, other: Image.Image) -> bool:
    return (one.size, one.tobytes()) == (other.size, other.tobytes())


# the snippets of a how-to that is passed around -------------------------------------------------------------

LOADING = """
import torch
from transformers import AutoProcessor, AutoModelForCausalLM
from PIL import Image

model = AutoModelForCausalLM.from_pretrained(
    model_id,
    torch_dtype=torch.bfloat16,
    trust_remote_code=True,
    device_map="auto",
)

processor = AutoProcessor.from_pretrained(
    model_id,
    trust_remote_code=True,
)
"""
ASKING = """
question = "Describe this image in detail."

raw_image = Image.open(image_path).convert("RGB")
messages = [{"role": "user", "content": f"<|image_1|>\\n{question}"}]

text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

inputs = processor(
    text=text,
    images=raw_image,
    return_tensors="pt",
).to(model.device)

with torch.inference_mode():
    outputs = model.generate(
        **inputs,
        do_sample=True,
        temperature=0.7,
        top_p=0.8,
        max_new_tokens=512,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )

response = processor.decode(outputs[0][inputs.input_ids.shape[-1]:], skip_special_tokens=True)
"""
DRAWING = """
prompt = "A snowy mountain at sunset, photorealistic, 4K, high quality."

messages = [{"role": "user", "content": prompt}]

inputs = processor(
    text=processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
    return_tensors="pt",
).to(model.device)

with torch.inference_mode():
    outputs = model.generate(
        **inputs,
        generation_mode="image",
        do_sample=True,
        temperature=0.7,
        top_p=0.8,
        max_new_tokens=1024,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )

generated_image = processor.decode_image(outputs[0][inputs.input_ids.shape[-1]:])
"""
EDITING = """
edit_instruction = "Add a red scarf to the person and make the sky sunny."

raw_image = Image.open(image_path).convert("RGB")
messages = [{"role": "user", "content": f"<|image_1|>\\n{edit_instruction}"}]

text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = processor(text=text, images=raw_image, return_tensors="pt").to(model.device)

with torch.inference_mode():
    outputs = model.generate(
        **inputs, generation_mode="image", do_sample=True, temperature=0.7, max_new_tokens=1024
    )

edited_image = processor.decode_image(outputs[0][inputs.input_ids.shape[-1]:])
"""


def test_the_snippets_run_and_say_what_openbagel_says(folder: Path, tmp_path: Path) -> None:
    PHOTO.save(tmp_path / "photo.png")
    names: dict[str, Any] = {"model_id": str(folder), "image_path": str(tmp_path / "photo.png")}
    exec(LOADING + ASKING, names)
    bagel = Bagel.load(folder, device="cpu", dtype=torch.bfloat16)
    warm = {"temperature": 0.7, "top_p": 0.8, "max_tokens": 512, "max_think_tokens": 0}
    answer = bagel.using(replace(bagel.config.settings.ask, **warm)).ask(PHOTO, names["question"])
    assert names["outputs"][0][names["inputs"].input_ids.shape[-1] :].tolist() == list(answer.ids)
    for marker in (*MARKERS, END_OF_TEXT):  # a random model writes some
        answer = answer.replace(marker, "")
    assert names["response"] == answer
    exec(DRAWING + EDITING, names)
    assert same(names["generated_image"], bagel.generate(names["prompt"]))
    assert same(names["edited_image"], bagel.edit(PHOTO, names["edit_instruction"]))


# registration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auto", AUTO)
def test_every_auto_class_loads_it_without_remote_code(auto: str, folder: Path, no_remote_code: None) -> None:
    model = getattr(hf, auto).from_pretrained(folder)
    assert type(model) is ours.BagelForConditionalGeneration
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert type(hf.AutoConfig.from_pretrained(folder)) is ours.BagelConfig
    assert type(hf.AutoProcessor.from_pretrained(folder)) is ours.BagelProcessor


def test_a_model_from_a_configuration_alone_has_the_same_shape(folder: Path) -> None:
    model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.from_pretrained(folder))
    assert model.core.config == tiny.config()
    expected = tiny.model().state_dict()
    assert {n: t.shape for n, t in model.core.state_dict().items()} == {
        n: t.shape for n, t in expected.items()
    }
    table = "latent_pos_embed.pos_embed"
    assert torch.equal(model.get_parameter(table), sincos_table(tiny.config().max_latent_size, 64))
    with pytest.raises(ValueError, match="this model has no tokenizer: load it with from_pretrained"):
        model.generate(torch.zeros(1, 1, dtype=torch.int64))


def test_the_text_configuration_is_qwens(model: Any) -> None:
    text = model.config.get_text_config()
    assert (text.model_type, text.hidden_size, text.vocab_size) == ("qwen2", 64, len(tiny.codec()))


# equal to the verbs, bit for bit ----------------------------------------------------------------------------


def test_answers_are_those_of_ask(model: Any, processor: Any, bagel: Bagel) -> None:
    given = inputs(processor, "<|image_1|>\nhow many?", PHOTO)
    assert new_text(processor, given, model.generate(**given)) == bagel.ask(PHOTO, "how many?")
    warm = bagel.using(replace(bagel.config.settings.ask, temperature=1.0, max_tokens=5, top_k=20))
    out = model.generate(**given, do_sample=True, max_new_tokens=5, top_k=20, seed=7)
    assert new_text(processor, given, out) == warm.ask(PHOTO, "how many?", seed=7)
    assert out.shape[1] <= given.input_ids.shape[1] + 5
    several = inputs(processor, [{"type": "image"}, {"type": "image"}, words("?")], [PHOTO, OTHER])
    assert new_text(processor, several, model.generate(**several)) == bagel.ask([PHOTO, OTHER], "?")
    config = hf.GenerationConfig(max_new_tokens=3)
    assert model.generate(**given, generation_config=config).shape[1] <= given.input_ids.shape[1] + 3


def test_pictures_are_those_of_generate_and_edit(model: Any, processor: Any, bagel: Bagel) -> None:
    given = inputs(processor, "a red circle")
    out = model.generate(**given, generation_mode="image", seed=3, size=(12, 8), text_guidance=2.0)
    length = given.input_ids.shape[1]
    assert out.shape == (1, length + 12, 8, 3)
    assert (out[:, :length] == -1).all() and (out[:, length:] >= 0).all()
    guidance = replace(bagel.config.settings.draw.guidance, text=2.0)
    own = bagel.generate("a red circle", seed=3, size=(12, 8), guidance=guidance)
    assert same(processor.decode_image(out[0][length:]), own)
    assert same(processor.decode_image(out[0]), own)
    given = inputs(processor, [{"type": "image"}, words("make it red")], PHOTO)
    out = model.generate(**given, generation_mode="image")
    assert same(processor.decode_image(out[0]), bagel.edit(PHOTO, "make it red"))


def test_thoughts_come_first_where_the_template_asks_for_them(
    model: Any, processor: Any, bagel: Bagel
) -> None:
    given = inputs(processor, "why?", enable_thinking=True)
    spoken = bagel.codec.decode(given.input_ids[0].tolist())
    assert spoken == f"{START}{THINK_BEFORE_ANSWERING}{END}{START}why?{END}{START}"
    answer = bagel.ask([], "why?", think=True)
    text = new_text(processor, given, model.generate(**given))
    message = processor.parse_response(text)
    assert message["content"] == answer and message.get("reasoning_content") == (answer.thought or None)
    assert processor.parse_response("<think> so </think>yes") == {
        "role": "assistant",
        "content": "yes",
        "reasoning_content": "so",
    }
    given = inputs(processor, "a red circle", enable_thinking=True, generation_mode="image")
    assert THINK_BEFORE_DRAWING in bagel.codec.decode(given.input_ids[0].tolist())
    own = bagel.generate("a red circle", think=True)
    assert same(processor.decode_image(model.generate(**given, generation_mode="image")[0]), own)
    plain = inputs(processor, "a red circle")
    asked = model.generate(**plain, generation_mode="image", think=True)
    assert same(processor.decode_image(asked[0]), own)


def test_a_batch_holds_what_each_gets_alone(model: Any, processor: Any, bagel: Bagel) -> None:
    chats = [said("a red circle above a blue square"), said([SHOWN, words("?")])]
    given = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert given.attention_mask.sum(1).tolist() != [given.input_ids.shape[1]] * 2
    out = model.generate(**given)
    texts = processor.post_process_multimodal_output(out[:, given.input_ids.shape[1] :])
    assert texts == [bagel.ask([], chats[0][0]["content"]), bagel.ask(PHOTO, "?")]
    drawn = processor.post_process_multimodal_output(
        model.generate(**given, generation_mode="image"), generation_mode="image"
    )
    expected = [bagel.generate(chats[0][0]["content"]), bagel.edit(PHOTO, "?", seed=1)]
    for one, other in zip(drawn, expected, strict=True):
        assert one.size == other.size
        difference = to_pixels(one) - to_pixels(other)
        assert difference.abs().max() <= 2.5 / 255 * 2  # packed together: other roundings


def test_options_that_mean_nothing_here_are_errors(model: Any, processor: Any) -> None:
    given = inputs(processor, "a red circle")
    with pytest.raises(ValueError, match="option 'num_beams' is none of"):
        model.generate(**given, num_beams=4)
    with pytest.raises(ValueError, match="did you mean 'num_timesteps'"):
        model.generate(**given, generation_mode="image", num_timestep=4)
    with pytest.raises(
        ValueError, match="generation_mode 'images' is none of text, image; did you mean 'image'"
    ):
        model.generate(**given, generation_mode="images")
    with pytest.raises(ValueError, match="input_ids are no texts and pictures between markers"):
        model.generate(torch.tensor([[5, 6, 7]]))
    with pytest.raises(ValueError, match="more pictures than pixel_values holds"):
        model.generate(inputs(processor, "<|image_1|>?", PHOTO).input_ids)
    with pytest.raises(ValueError, match="videos=.* is not supported"):
        processor(text="a", videos=["a.mp4"])
    with pytest.raises(ValueError, match="2 entries of images for 1 texts"):
        processor([PHOTO, OTHER], text=["?"])


# the processor ----------------------------------------------------------------------------------------------


def test_both_message_styles_give_equal_ids_and_pictures(processor: Any, tmp_path: Path) -> None:
    PHOTO.save(tmp_path / "photo.png")
    text = words("What is it?")
    path = str(tmp_path / "photo.png")
    styles = (
        [{"type": "image_url", "image_url": {"url": path}}, text],
        [{"type": "image", "url": path}, text],
        [SHOWN, text],
    )
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    made = [processor.apply_chat_template(said(style), **how) for style in styles]
    made += [inputs(processor, styles[0][1:] and "<|image_1|>\nWhat is it?", PHOTO)]
    made += [processor(images=path, text="What is it?", return_tensors="pt")]
    for one in made[1:]:
        assert torch.equal(one.input_ids, made[0].input_ids)
        assert torch.equal(one.pixel_values, made[0].pixel_values)
    assert processor.apply_chat_template(said(styles[2]), add_generation_prompt=True, tokenize=True) == (
        made[0].input_ids.tolist()
    )


@settings(max_examples=1000)
@given(typed=TYPED)
def test_markers_of_users_stay_text(processor: Any, typed: str) -> None:
    codec = processor.codec
    control = {codec.start, codec.end, codec.vision_start, codec.vision_end, codec.end_of_text}
    for given_ids in (
        inputs(processor, typed).input_ids[0].tolist(),
        inputs(processor, [words(typed)]).input_ids[0].tolist(),
        processor(text=typed).input_ids[0],
    ):
        assert given_ids[:1] + given_ids[-2:] == [codec.start, codec.end, codec.start]
        assert tuple(given_ids[1:-2]) == codec.encode(typed)
        assert control.isdisjoint(given_ids[1:-2])
    assert control.isdisjoint(processor.tokenizer(typed).input_ids)


def test_rendered_text_that_lost_its_type_says_so(processor: Any) -> None:
    text = processor.apply_chat_template(said("a cat"), add_generation_prompt=True)
    lost = json.loads(json.dumps(text))
    assert processor(text=lost, rendered=True) == processor(text=text)
    assert processor(text=lost) != processor(text=text)


def test_processors_come_back_from_disk(processor: Any, tmp_path: Path, no_remote_code: None) -> None:
    changed = ours.BagelProcessor(processor.tokenizer, chat_template=processor.chat_template + " ")
    changed.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bagel"}')
    loaded = hf.AutoProcessor.from_pretrained(tmp_path)
    assert loaded.chat_template == processor.chat_template + " "
    assert loaded(text=f"a {END} cat") == processor(text=f"a {END} cat")
    assert weights.TextCodec.load(tmp_path).encode("a red cat") == processor.codec.encode("a red cat")


# folders ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["50GB", "60KB"], ids=["one file", "shards"])
def test_what_is_saved_loads_everywhere(model: Any, tmp_path: Path, size: str) -> None:
    model.save_pretrained(tmp_path, max_shard_size=size)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored | weights.config_json(tiny.config()) == stored and stored["dtype"] == "float32"
    for name in ("llm_config", "vit_config"):
        assert json.loads((tmp_path / f"{name}.json").read_text()) == stored[name]
    assert bool(list(tmp_path.glob("model-*-of-*"))) == (size == "60KB")
    back = weights.load_checkpoint(tmp_path)
    again = hf.AutoModelForMultimodalLM.from_pretrained(tmp_path)
    for theirs in (back.model.state_dict(), again.core.state_dict()):
        expected = tiny.model().state_dict()
        assert list(theirs) == list(expected)
        assert all(torch.equal(theirs[name], expected[name]) for name in expected)
    assert back.config == tiny.config() and back.autoencoder is not None
    assert all(
        torch.equal(a, b)
        for a, b in zip(back.autoencoder.parameters(), again.autoencoder.parameters(), strict=True)
    )
    hf.AutoTokenizer.from_pretrained(tmp_path)


def test_dtype_and_device_map(folder: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {str(p.device) for p in model.parameters()} == {"cpu"}
    own = Bagel.load(folder, device="cpu", dtype=torch.bfloat16)
    assert same(model.bagel.generate("a cat"), own.generate("a cat"))


def test_device_map_auto_on_cuda_is_planned_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(ours, "place", lambda *args, **options: placed.append((args[1:], options)))
    hf.AutoModelForCausalLM.from_pretrained(folder, device_map="auto", max_memory={0: "1GB"})
    assert placed == [(("auto", torch.float32), {"max_memory": {0: "1GB"}})]


def test_a_revision_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr(ours, "find_model", lambda name: asked.append(str(name)) or folder)
    for options in ({}, {"revision": "main"}, {"revision": "v1"}):
        ours.BagelProcessor.from_pretrained("owner/name", **options)
    ours.BagelProcessor.from_pretrained(folder, revision="v1")
    assert asked == ["owner/name", "owner/name", "owner/name@v1", str(folder)]


def bnb() -> Any:
    pytest.importorskip("bitsandbytes")
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    return hf.BitsAndBytesConfig(load_in_4bit=True, **options)


def torchao() -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return hf.TorchAoConfig(quantization.Int8WeightOnlyConfig())


SENSITIVE = r"^(?!language_model\.model\.layers)|norm"


@pytest.mark.parametrize("make", [bnb, torchao])
def test_quantisation_leaves_the_sensitive_parts_alone(make: Callable[[], Any], tmp_path: Path) -> None:
    """On a model whose sides are multiples of 64, as bitsandbytes wants."""
    llm = replace(tiny.config().llm, intermediate_size=128)
    config = replace(tiny.config(), llm=llm)
    core = tiny.randomised(ours.BagelModel(config))
    weights.save_checkpoint(tmp_path, replace(tiny.checkpoint(), config=config, model=core))
    asked = make()
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=asked, device_map="cpu")
    kept = {name for name, p in model.named_parameters() if type(p) is torch.nn.Parameter}
    linears = {f"{name}.weight" for name, m in core.named_modules() if isinstance(m, torch.nn.Linear)}
    sensitive = {name for name, _ in model.named_parameters() if re.search(SENSITIVE, name)}
    assert sensitive <= kept
    assert linears - kept == linears - sensitive
    skipped = ("llm_int8_skip_modules", "modules_to_not_convert")
    assert [getattr(asked, name) for name in skipped if hasattr(asked, name)] == [None]
    assert model.bagel.generate("a cat").size == (12, 8)
    assert isinstance(model.bagel.ask(PHOTO, "?"), str)
    with pytest.raises(ValueError, match="openbagel convert --to"):
        model.save_pretrained(tmp_path / "saved")


def test_folders_that_do_not_fit_are_named(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"ema\.safetensors would be read instead of what is saved"):
        model.save_pretrained(folder)
    monkeypatch.setattr(ours, "precision_of", lambda model: "int8")
    with pytest.raises(ValueError, match=r"int8 weights are for Bagel\.load"):
        ours.BagelForConditionalGeneration.from_pretrained(folder)


# training ---------------------------------------------------------------------------------------------------


def test_logits_are_the_models(model: Any, processor: Any) -> None:
    given = processor([[PHOTO], []], ["<|image_1|>one", "a red circle above"], return_tensors="pt")
    with torch.no_grad():
        logits = model(**given).logits
    assert logits.shape == (*given.input_ids.shape, len(tiny.codec()))
    assert (logits[given.attention_mask == 0] == 0).all()
    sample = [
        model.bagel.pictures.look(tiny.LIMITS.resize(PHOTO)),
        Text(processor.codec.encode("one"), loss=True),
    ]
    with torch.no_grad():
        losses, _ = tiny.model().losses(tiny.packer().pack([sample]))
    length = int(given.attention_mask[0].sum())
    row, ids = logits[0, -length:], given.input_ids[0, -length:]
    expected = torch.nn.functional.cross_entropy(row[2:-2], ids[3:-1], reduction="none")
    assert torch.allclose(expected, losses, atol=1e-5)


def test_losses_are_those_of_training(model: Any, processor: Any) -> None:
    codec = processor.codec
    chat = [*said("a red circle"), {"role": "assistant", "content": [CHANGED]}]
    how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    given = processor.apply_chat_template(chat, **how)
    labels = torch.where(given.input_ids == codec.vision_start, given.input_ids, -100)
    encoder = LatentEncoder(tiny.checkpoint().autoencoder, tiny.config(), 5)
    pixels = Pixels((to_pixels(tiny.LIMITS.resize(OTHER)),), Role.TARGET)
    sample = Sample(SampleId("transformers", 0, 0), (Text(codec.encode("a red circle")), pixels))
    pack = tiny.packer().pack(encoder.segments([sample]))
    _, mse = tiny.model().losses(pack)
    assert torch.equal(model(**given, labels=labels, seed=5).loss, mse.mean())
    assert not torch.equal(model(**given, labels=labels, seed=6).loss, mse.mean())
    with pytest.raises(ValueError, match="a picture is learned: pass seed"):
        model(**given, labels=labels)


def test_masked_labels_do_not_count(model: Any, processor: Any) -> None:
    codec = processor.codec
    given = processor([[PHOTO], []], ["<|image_1|>one two three", "a red"], return_tensors="pt")
    labels = given.input_ids.masked_fill(given.attention_mask == 0, -100)
    labels[labels >= codec.start] = -100  # no marker
    text = Text(codec.encode("one two three"), loss=True)
    samples = [
        [model.bagel.pictures.look(tiny.LIMITS.resize(PHOTO)), text],
        [Text(codec.encode("a red"), loss=True)],
    ]
    ce, _ = tiny.model().losses(tiny.packer().pack(samples))
    lengths = [len(codec.encode("one two three")), len(codec.encode("a red"))]
    counted = torch.cat([ce[: lengths[0]], ce[lengths[0] + 1 : -1]])
    assert torch.allclose(model(**given, labels=labels).loss, counted.mean(), atol=1e-6)


TARGETS = {
    "und": r".*layers.*(q_proj|v_proj|up_proj)",
    "gen": r".*layers.*(q_proj_moe_gen|mlp_moe_gen\.up_proj)",
    "both": r".*layers.*(q_proj|v_proj|q_proj_moe_gen|up_proj)",
}


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_adapters_of_peft_train_and_load_here(
    targets: str, folder: Path, processor: Any, tmp_path: Path
) -> None:
    base = hf.AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    chat = said([SHOWN, words("make it red"), CHANGED])
    given = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    labels = given.input_ids.clone()
    labels[:, :2] = -100
    learns = [p for p in adapted.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(learns, lr=0.01)
    losses = []
    for _ in range(3):
        loss = adapted(**given, labels=labels, seed=1).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learns)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    adapted.save_pretrained(tmp_path)
    own = Bagel.load(folder, device="cpu", dtype=torch.float32)
    assert load_adapter(own.model, tmp_path) == len(learns) // 2
    given = inputs(processor, "a cat")
    drawn = adapted.generate(**given, generation_mode="image")[0]
    ours_drawn, plain = own.generate("a cat"), tiny.bagel().generate("a cat")
    difference = to_pixels(processor.decode_image(drawn)) - to_pixels(ours_drawn)
    assert difference.abs().max() <= 2.5 / 255 * 2
    assert not same(ours_drawn, plain)
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    merge(own.model)
    stored = weights.load_checkpoint(tmp_path / "merged").model.state_dict()
    assert all(torch.allclose(stored[n], t, atol=1e-6) for n, t in own.model.state_dict().items())


def test_a_replaced_part_takes_effect(folder: Path) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(folder)
    before = model.bagel.generate("a cat")
    model.llm2vae = torch.nn.Linear(64, 16)
    assert model.core.llm2vae is model.llm2vae
    assert not same(model.bagel.generate("a cat"), before)


# the pipeline -----------------------------------------------------------------------------------------------


@pytest.fixture
def pipe(model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """transformers itself asks for torchvision here; nothing of what is tested uses it."""
    monkeypatch.setattr("transformers.pipelines.any_to_any.requires_backends", lambda *backends: None)
    yield hf.pipeline("any-to-any", model=model, processor=processor)


def test_pipeline_any_to_any(pipe: Any, bagel: Bagel) -> None:
    content = [SHOWN, words("how many?")]
    short = bagel.using(replace(bagel.config.settings.ask, max_tokens=6, max_think_tokens=0))
    (told,) = pipe(said(content), return_full_text=False, max_new_tokens=6)
    assert told["generated_text"] == short.ask(PHOTO, "how many?")
    (chatted,) = pipe(said(content), max_new_tokens=6)
    assert chatted["generated_text"][-1] == {"role": "assistant", "content": told["generated_text"]}
    (drawn,) = pipe(text="a red circle", generation_mode="image")
    assert same(drawn["generated_image"], bagel.generate("a red circle"))
    (edited,) = pipe(said(content), generation_mode="image")
    assert same(edited["generated_image"], bagel.edit(PHOTO, "how many?"))
