"""The real `openai` package, unchanged, against a real server with the model that ships."""

import base64
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image, ImageChops

from openbagel.flow import Renorm
from openbagel.inference.pipeline import Bagel
from openbagel.serve.limits import ServerLimits
from openbagel.serve.service import Service
from tests.serve.live import running

STEPS = 3
QUICK: dict[str, Any] = {"num_inference_steps": STEPS, "seed": 5}


@dataclass(frozen=True)
class Server:
    url: str
    bagel: Bagel
    client: openai.OpenAI


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Requests take turns (batch=1), so that each is bit-equal to its solo run."""
    bagel = Bagel.load("nano")
    with running(Service(bagel, ServerLimits(batch=1, running=4))) as url:
        yield Server(url, bagel, openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0))


def quick(bagel: Bagel, **guidance: Any) -> Bagel:
    settings = bagel.config.settings
    verbs = {
        verb: replace(own, num_timesteps=STEPS + 1, guidance=replace(own.guidance, **guidance))
        for verb, own in {"draw": settings.draw, "edit": settings.edit}.items()
    }
    return bagel.with_settings(replace(settings, **verbs))


def decoded(code: str | None) -> Image.Image:
    assert code
    picture = Image.open(io.BytesIO(base64.b64decode(code.partition(",")[2] or code)))
    picture.load()
    return picture


def png(picture: Image.Image, form: str = "png") -> bytes:
    file = io.BytesIO()
    picture.save(file, form)
    return file.getvalue()


def data_url(picture: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and a.tobytes() == b.convert(a.mode).tobytes()


def said(picture: Image.Image, text: str) -> Any:
    return [
        {"type": "text", "text": text},
        {"type": "image_url", "image_url": {"url": data_url(picture), "detail": None}},
    ]


@pytest.fixture(scope="module")
def circle(server: Server) -> Image.Image:
    return server.bagel.generate("a red circle", seed=0)


def test_models(server: Server):
    assert [model.id for model in server.client.models.list()] == ["nano"]
    assert server.client.models.retrieve("nano").owned_by == "openbagel"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("gpt-5")


def test_a_generated_picture_is_that_of_the_library(server: Server):
    reply = server.client.images.generate(prompt="a red circle", model="nano", extra_body=QUICK)
    expected = quick(server.bagel).generate("a red circle", seed=5)
    assert reply.data and same(decoded(reply.data[0].b64_json), expected)
    assert (reply.size, reply.output_format, reply.background) == ("64x64", "png", "opaque")
    assert reply.usage and reply.usage.output_tokens == 16 and reply.usage.total_tokens > 16
    assert decoded(reply.data[0].b64_json).info == {}


def test_options_reach_the_sampling(server: Server):
    told = {"guidance_scale": 2.5, "guidance_interval": [0.1, 0.9], "renorm": "channel", "renorm_min": 0.2}
    reply = server.client.images.generate(prompt="a red circle", extra_body=QUICK | {"extra_body": told})
    guidance = {"text": 2.5, "interval": (0.1, 0.9), "renorm": Renorm.CHANNEL, "renorm_min": 0.2}
    assert reply.data
    expected = quick(server.bagel, **guidance).generate("a red circle", seed=5)
    assert same(decoded(reply.data[0].b64_json), expected)


def test_several_pictures_count_seeds_up(server: Server):
    reply = server.client.images.generate(
        prompt="a red circle",
        n=2,
        size="32x48",
        output_format="jpeg",
        output_compression=80,
        extra_body=QUICK,
    )
    assert reply.data and [one.seed for one in reply.data] == [5, 6]  # pyright: ignore
    pictures = [decoded(one.b64_json) for one in reply.data]
    assert [(one.format, one.size) for one in pictures] == [("JPEG", (32, 48))] * 2
    assert not same(*pictures)


def test_negative_prompt_and_seed_change_the_picture(server: Server):
    def drawn(**extra: Any) -> Image.Image:
        reply = server.client.images.generate(prompt="a red circle", extra_body=QUICK | extra)
        assert reply.data
        return decoded(reply.data[0].b64_json)

    assert same(drawn(), drawn(width=64, height=64))
    assert not same(drawn(), drawn(negative_prompt="a blue square"))
    assert not same(drawn(), drawn(seed=6))


def test_a_streamed_picture_comes_with_drafts(server: Server):
    stream = server.client.images.generate(
        prompt="a red circle", stream=True, partial_images=2, extra_body=QUICK
    )
    *drafts, last = list(stream)
    assert [event.type for event in drafts] == ["image_generation.partial_image"] * 2
    assert [event.partial_image_index for event in drafts] == [0, 1]  # pyright: ignore
    assert last.type == "image_generation.completed" and last.usage.output_tokens == 16
    expected = quick(server.bagel).generate("a red circle", seed=5)
    assert same(decoded(last.b64_json), expected) and not same(decoded(drafts[0].b64_json), expected)


def test_an_edit(server: Server, circle: Image.Image):
    reply = server.client.images.edit(
        image=("c.png", png(circle)), prompt="make the circle blue", extra_body=QUICK
    )
    expected = quick(server.bagel).edit(circle, "make the circle blue", seed=5)
    assert reply.data and same(decoded(reply.data[0].b64_json), expected)
    assert reply.usage and reply.usage.input_tokens_details.image_tokens == 32


def test_an_edit_of_three_pictures(server: Server, circle: Image.Image):
    three = [circle, circle.rotate(90), circle.rotate(180)]
    reply = server.client.images.edit(
        image=[(f"{i}.png", png(one)) for i, one in enumerate(three)], prompt="blue", extra_body=QUICK
    )
    expected = quick(server.bagel).edit(three, "blue", seed=5)
    assert reply.data and same(decoded(reply.data[0].b64_json), expected)


def test_outside_the_mask_nothing_changes(server: Server, circle: Image.Image):
    mask = Image.new("RGBA", circle.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    stream = server.client.images.edit(
        image=png(circle), mask=png(mask), prompt="blue", stream=True, partial_images=1, extra_body=QUICK
    )
    events = list(stream)
    assert [event.type for event in events] == ["image_edit.partial_image", "image_edit.completed"]
    free = quick(server.bagel).edit(circle, "blue", seed=5)
    for event in events:
        drawn = decoded(event.b64_json)
        assert same(drawn.crop((32, 0, 64, 64)), circle.crop((32, 0, 64, 64)))
    assert same(drawn.crop((0, 0, 32, 64)), free.crop((0, 0, 32, 64)))
    with pytest.raises(openai.BadRequestError, match="equal in size"):
        server.client.images.edit(image=png(circle), mask=png(mask.resize((8, 8))), prompt="blue")
    for form in ("jpeg", "webp"):
        with pytest.raises(openai.BadRequestError, match="mask must be a PNG with transparency"):
            server.client.images.edit(image=png(circle), mask=png(circle, form), prompt="blue")


def test_chat_answers_about_a_picture(server: Server, circle: Image.Image):
    question = "what colour is the circle?"
    reply = server.client.chat.completions.create(
        model="nano", messages=[{"role": "user", "content": said(circle, question)}]
    )
    expected = server.bagel.ask(circle, question)
    assert reply.choices[0].message.content == expected
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage and reply.usage.completion_tokens == len(expected.ids)


def test_chat_streams_with_usage(server: Server, circle: Image.Image):
    question = "what colour is the circle?"
    chunks = list(
        server.client.chat.completions.create(
            model="nano",
            messages=[{"role": "user", "content": said(circle, question)}],
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == server.bagel.ask(circle, question)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage and chunks[-1].usage.total_tokens > 0 and not chunks[-1].choices


def test_chat_limits_and_stops(server: Server):
    def asked(**options: Any) -> Any:
        messages: Any = [{"role": "user", "content": "how many circles are there?"}]
        return server.client.chat.completions.create(model="nano", messages=messages, **options)

    whole = asked(temperature=1.0, top_p=0.9, seed=3, max_completion_tokens=8, n=2)
    assert [choice.seed for choice in whole.choices] == [3, 4]
    alone = asked(temperature=1.0, top_p=0.9, seed=4, max_completion_tokens=8)
    assert alone.choices[0].message.content == whole.choices[1].message.content
    short = asked(max_tokens=1)
    assert short.choices[0].finish_reason == "length" and short.usage.completion_tokens == 1
    text = asked(max_tokens=8).choices[0].message.content
    middle = text[1:3]
    cut = asked(max_tokens=8, stop=[middle, "never"])
    assert cut.choices[0].message.content == text[: text.index(middle)]
    pieces = [c.choices[0].delta.content or "" for c in asked(max_tokens=8, stop=middle, stream=True)]
    assert "".join(pieces) == text[: text.index(middle)]


def test_chat_thinks(server: Server):
    def asked(**options: Any) -> Any:
        messages: Any = [{"role": "user", "content": "a red circle"}]
        options = {"modalities": ["image"], **options}
        return server.client.chat.completions.create(model="nano", messages=messages, **options)

    expected = quick(server.bagel).generate("a red circle", seed=5, think=True)
    reply = asked(extra_body=QUICK, reasoning_effort="low").choices[0].message
    assert reply.reasoning_content == expected.info["thought"]
    assert same(decoded(reply.content[0]["image_url"]["url"]), expected)
    stream = asked(extra_body=QUICK | {"chat_template_kwargs": {"enable_thinking": True}}, stream=True)
    thought = "".join(getattr(c.choices[0].delta, "reasoning_content", None) or "" for c in stream)
    assert thought.strip() == expected.info["thought"]
    drawn = server.client.images.generate(prompt="a red circle", extra_body=QUICK | {"reasoning": True})
    assert drawn.data and drawn.data[0].revised_prompt == expected.info["thought"]


def test_a_thinking_answer_keeps_its_spaces(server: Server, circle: Image.Image):
    """Where its first letter, held back as the beginning of a stop word, is an article."""
    expected = server.bagel.ask(circle, "describe the picture", think=True)
    reply = server.client.chat.completions.create(
        model="nano",
        messages=[{"role": "user", "content": said(circle, "describe the picture")}],
        stop="at",
        reasoning_effort="low",
    )
    assert expected.startswith("a ") and reply.choices[0].message.content == expected


def test_chat_in_turns_with_pictures_of_the_assistant(server: Server, circle: Image.Image):
    history: Any = [
        {"role": "user", "content": "draw a red circle"},
        {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": data_url(circle)}}]},
        {"role": "user", "content": "what colour is the circle?"},
    ]
    reply = server.client.chat.completions.create(model="nano", messages=history)
    parts = ["draw a red circle", circle, "what colour is the circle?"]
    assert reply.choices[0].message.content == server.bagel.chat(parts, reply="text")[0]


def test_chat_decides_by_itself(server: Server):
    reply = server.client.chat.completions.create(
        model="nano",
        messages=[{"role": "user", "content": "draw a red circle and say what it is"}],
        modalities=["text", "image"],  # pyright: ignore
        extra_body=QUICK | {"num_inference_steps": 1},
    )
    content: Any = reply.choices[0].message.content
    kinds = {part["type"] for part in content} if isinstance(content, list) else {"text"}
    assert kinds and kinds <= {"text", "image_url"}


@pytest.mark.parametrize("mode", ["text2img", "img2img", "img2text", "text2text"])
def test_the_fields_of_the_client_of_vllm_omni(server: Server, circle: Image.Image, mode: str):
    """As `examples/online_serving/bagel/openai_chat_client.py` of vLLM-Omni sends them."""
    content: list[Any] = [{"type": "text", "text": "<|im_start|>make the circle blue<|im_end|>"}]
    if mode.startswith("img"):
        content.append({"type": "image_url", "image_url": {"url": data_url(circle)}})
    payload: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
    payload |= {"modalities": ["image" if mode.endswith("img") else "text"], "height": 64, "width": 64}
    payload |= {"num_inference_steps": STEPS, "seed": 42, "negative_prompt": "a square"}
    reply = httpx.post(server.url + "/v1/chat/completions", json=payload, timeout=60)
    assert reply.status_code == 200, reply.text
    content = reply.json()["choices"][0]["message"]["content"]
    if mode.endswith("text"):
        shown = [circle] if mode == "img2text" else []
        assert content == server.bagel.ask(shown, "make the circle blue")
    else:
        assert decoded(content[0]["image_url"]["url"]).size == (64, 64)


def test_errors_are_those_of_the_package(server: Server):
    images = server.client.images
    with pytest.raises(openai.UnprocessableEntityError, match="did you mean 'num_inference_steps'") as wrong:
        images.generate(prompt="x", extra_body={"num_inference_step": 3})
    assert (wrong.value.param, wrong.value.type) == ("num_inference_step", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="b64_json"):
        images.generate(prompt="x", response_format="url")
    with pytest.raises(openai.BadRequestError, match="multiples of 16"):
        images.generate(prompt="x", size="65x64", stream=True)
    with pytest.raises(openai.NotFoundError, match="'nano'"):
        images.generate(prompt="x", model="dall-e-3")
    raw = images.with_raw_response.generate(prompt="x", quality="high", user="me", extra_body=QUICK)
    assert raw.headers["x-openbagel-ignored"] == "quality,user"


def test_many_at_once_are_as_alone(server: Server):
    """50 requests, half of them texts: those that take turns are equal to the bit."""
    body = {"prompt": "a red circle", "num_inference_steps": 1, "size": "32x32"}
    ask = {"messages": [{"role": "user", "content": "how many circles are there?"}], "temperature": 1}

    def post(seed: int) -> Any:
        path, told = ("images/generations", body) if seed % 2 else ("chat/completions", ask)
        reply = httpx.post(f"{server.url}/v1/{path}", json={**told, "seed": seed}, timeout=120)
        tree = reply.json()
        return tree["data"][0]["b64_json"] if seed % 2 else tree["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(post, range(50)))
    settings = server.bagel.config.settings
    drawer = server.bagel.using(replace(settings.draw, num_timesteps=2))
    asker = server.bagel.using(replace(settings.ask, temperature=1))
    for seed, got in enumerate(together):
        if seed % 2:
            assert same(decoded(got), drawer.generate("a red circle", size=(32, 32), seed=seed)), seed
        else:
            assert got == asker.ask([], "how many circles are there?", seed=seed), seed


def test_many_in_one_pack_are_nearly_as_alone(server: Server):
    body = {"prompt": "a red circle", "num_inference_steps": STEPS, "size": "32x32"}
    question = "how many circles are there?"
    with running(Service(server.bagel, ServerLimits(batch=16))) as url, ThreadPoolExecutor(12) as pool:

        def post(seed: int) -> Any:
            told = (
                {**body, "seed": seed} if seed % 2 else {"messages": [{"role": "user", "content": question}]}
            )
            path = "images/generations" if seed % 2 else "chat/completions"
            return httpx.post(f"{url}/v1/{path}", json=told, timeout=120).json()

        together = list(pool.map(post, range(12)))
        counts = httpx.get(url + "/metrics").text
    for seed, got in enumerate(together):
        if seed % 2:
            expected = quick(server.bagel).generate("a red circle", size=(32, 32), seed=seed)
            difference = ImageChops.difference(decoded(got["data"][0]["b64_json"]), expected)
            assert np.asarray(difference).max() <= 2
        else:
            assert got["choices"][0]["message"]["content"] == server.bagel.ask([], question)
    numbers = dict(
        line.split() for line in counts.splitlines() if line.startswith("openbagel_") and "{" not in line
    )
    assert float(numbers["openbagel_forwards_total"]) > float(numbers["openbagel_packs_total"])
