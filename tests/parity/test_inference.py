"""The golden generations, through the requests that users run, with the noise that the reference drew."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from openbagel.images import normalised
from openbagel.inference import events, pipeline
from openbagel.inference.context import Context
from openbagel.inference.engine import Forward, Request, Row
from openbagel.inference.pipeline import Bagel
from openbagel.inference.text import write
from openbagel.sequence import Packer, Text, VitImage
from openbagel.tokens import THINK_BEFORE_ANSWERING, THINK_BEFORE_DRAWING, TextCodec
from tests.parity import cases
from tests.parity.cases import Case, relative_error


@pytest.fixture
def bagel(golden: Path) -> Bagel:
    return cases.inference_model(golden)


def inputs(case: Case) -> list[pipeline.Part]:
    return [
        part if isinstance(part, str) else Image.fromarray(case.golden[part["image"]].numpy())
        for part in case.facts["inputs"]
    ]


def play_noise(monkeypatch: pytest.MonkeyPatch, noises: Iterator[torch.Tensor]) -> None:
    """Random draws come from the golden folder, in the order in which a request makes them."""

    def randn(*shape: int, generator: torch.Generator) -> torch.Tensor:
        noise = next(noises)
        assert noise.shape == shape
        return noise.clone()

    monkeypatch.setattr(torch, "randn", randn)


def record_writing(monkeypatch: pytest.MonkeyPatch, case: Case) -> list[list[int]]:
    """The ids of every text that the model writes, from the start marker on.

    A thought goes back into the context as the reference re-tokenises it.
    """
    written: list[list[int]] = []
    thoughts = iter(case.facts["thought_ids"])

    def recorded(context: Context, codec: TextCodec, **options: object) -> Request[tuple[int, ...]]:
        thought = next(thoughts, None)
        ids = yield from write(context if thought is None else context.fork(), codec, **options)
        if thought is not None:
            yield Forward((Row(context, (Text(tuple(thought)),), keep=True),))
        written.append([codec.start, *ids])
        return ids

    monkeypatch.setattr(pipeline, "write", recorded)
    return written


@pytest.mark.filterwarnings("ignore:.*guidance has no effect")
def test_drawing(drawing: Case, bagel: Bagel, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = inputs(drawing)
    (noise,), (latent,), (image,) = map(drawing.numbered, ("noise", "latent", "image"))
    noises = iter([*drawing.numbered("vae_eps"), noise])
    play_noise(monkeypatch, noises)
    written = record_writing(monkeypatch, drawing)
    heard: list[events.Event] = []
    # the reference takes the size of the last input picture, and the option only where there is none
    size = drawing.size if all(isinstance(part, str) for part in parts) else None
    request = bagel.draw_request(
        parts, size=size, seed=0, think=drawing.options["think"], sampling=drawing.sampling
    )
    picture = bagel.engine.drive(request, heard.append)
    assert next(noises, None) is None, "a golden noise was left over"
    assert written == drawing.facts["token_ids"]
    assert [bagel.codec.decode(ids[1:]) for ids in written] == drawing.facts["texts"]
    last = [event for event in heard if isinstance(event, events.Preview)][-1]
    assert relative_error(last.latents, latent) <= 1e-5
    difference = np.abs(np.asarray(picture).astype(int) - image.numpy().astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3


def test_writing(writing: Case, bagel: Bagel, monkeypatch: pytest.MonkeyPatch) -> None:
    written = record_writing(monkeypatch, writing)
    asked = bagel.using(writing.sampling)
    request = asked.write_request(inputs(writing), seed=0, think=writing.options["think"])
    heard: list[events.Event] = []
    bagel.engine.drive(request, heard.append)
    assert written == writing.facts["token_ids"]
    streamed = "".join(e.text for e in heard if isinstance(e, events.Text | events.Thought))
    assert [streamed] == writing.facts["texts"]


def test_markers_and_think_prompts(bagel: Bagel, golden: Path) -> None:
    facts = cases.read_json(golden / "inference.json")
    assert cases.special_tokens(bagel.codec) == facts["special_tokens"]
    prompts = facts["think_prompt_ids"]
    assert list(bagel.codec.encode(THINK_BEFORE_DRAWING)) == prompts["generation"]
    assert list(bagel.codec.encode(THINK_BEFORE_ANSWERING)) == prompts["understanding"]


@torch.inference_mode()
def test_autoencoder(bagel: Bagel, golden: Path) -> None:
    tensors, autoencoder = cases.read_tensors(golden / "inference.safetensors"), bagel.autoencoder
    assert autoencoder is not None
    moments = autoencoder.moments(normalised(tensors["vae.image"])[None])
    assert relative_error(moments, tensors["vae.moments"]) <= 1e-5
    assert relative_error(autoencoder.decode(tensors["vae.z"]), tensors["vae.decoded"]) <= 1e-5


@torch.inference_mode()
def test_vision_encoder(bagel: Bagel, golden: Path) -> None:
    tensors = cases.read_tensors(golden / "inference.safetensors")
    pictures = [VitImage(normalised(picture)) for picture in cases.numbered(tensors, "vit.image")]
    pack = Packer(bagel.config, bagel.codec).pack([pictures])
    features = bagel.model.vit_model(pack.patches, pack.patch_position_ids, pack.patch_counts)
    assert relative_error(features, tensors["vit.features"]) <= 1e-5
    assert relative_error(bagel.model.look(pack), tensors["vit.connected"]) <= 1e-5


@torch.inference_mode()
def test_timestep_embedding(bagel: Bagel, golden: Path) -> None:
    tensors = cases.read_tensors(golden / "inference.safetensors")
    assert relative_error(bagel.model.time_embedder(tensors["time.t"]), tensors["time.embedding"]) <= 1e-5
