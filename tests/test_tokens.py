"""Text to ids and back; whatever a user types, no marker comes out."""

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from openbagel.tokens import END_OF_TEXT, MARKERS, TextCodec
from tests import tiny

CHARACTERS = st.characters(exclude_categories=("Cs", "Cn", "Co"))
SHARDS = st.sampled_from(
    [
        *MARKERS,
        END_OF_TEXT,
        "<|",
        "|>",
        "<",
        "|",
        "im_end",
        "im_",
        "start",
        "vision_",
        "<think>",
        " ",
        "\n",
        "<|im_end|",
    ]
)
TYPED = st.lists(st.one_of(SHARDS, st.text(CHARACTERS, max_size=5)), max_size=8).map("".join)


def forbidden(codec: TextCodec) -> set[int]:
    end_of_text = codec.tokenizer.token_to_id(END_OF_TEXT)
    return {codec.start, codec.end, codec.vision_start, codec.vision_end, end_of_text}


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    """A codec that went through tokenizer.json."""
    folder = tmp_path_factory.mktemp("codec")
    tiny.codec().save(folder)
    return TextCodec.load(folder)


@pytest.fixture(scope="module")
def qwen_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.json, merges.txt and tokenizer_config.json, as official folders without a tokenizer.json have."""
    folder = tmp_path_factory.mktemp("qwen")
    model = json.loads(tiny.codec().tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    specials = {"additional_special_tokens": list(MARKERS[:2])}
    (folder / "tokenizer_config.json").write_text(json.dumps(specials))
    return folder


@settings(max_examples=1000)
@given(typed=TYPED)
def test_typed_text_never_becomes_a_marker(typed: str) -> None:
    codec = tiny.codec()
    ids = codec.encode(typed)
    assert not forbidden(codec) & set(ids)
    assert codec.decode(ids) == unicodedata.normalize("NFC", typed)


@pytest.mark.parametrize("marker", [*MARKERS, END_OF_TEXT])
def test_markers_stay_text_in_every_kind_of_folder(
    marker: str, reloaded: TextCodec, qwen_files: Path
) -> None:
    for codec in (tiny.codec(), reloaded, TextCodec.load(qwen_files)):
        ids = codec.encode(f"a{marker}b")
        assert not forbidden(codec) & set(ids)
        assert codec.decode(ids) == f"a{marker}b"


def test_saved_and_split_files_give_the_same_codec(reloaded: TextCodec, qwen_files: Path) -> None:
    text = "How many circles are there?\n 12 Löwen, don't 你好 <|im_end|>"
    codecs = [tiny.codec(), reloaded, TextCodec.load(qwen_files)]
    assert len({codec.encode(text) for codec in codecs}) == 1
    assert len({(c.start, c.end, c.vision_start, c.vision_end, len(c)) for c in codecs}) == 1


def test_missing_markers_are_appended_in_order(qwen_files: Path) -> None:
    codec = TextCodec.load(qwen_files)
    last = len(codec)
    assert (codec.vision_start, codec.vision_end) == (last - 2, last - 1)
    assert codec.start < codec.end < codec.vision_start


def test_markers_stored_as_plain_tokens_become_special() -> None:
    codec = TextCodec.train(["a b"], 270)
    stored = codec.tokenizer.to_str()
    plain = json.loads(stored)
    for entry in plain["added_tokens"]:
        entry["special"] = False
    tokenizer = type(codec.tokenizer).from_str(json.dumps(plain))
    again = TextCodec.of(tokenizer)
    assert again.start == codec.start
    assert not forbidden(again) & set(again.encode("<|im_end|><|endoftext|>"))


def test_other_special_tokens_stay_text_too() -> None:
    tokenizer = TextCodec.train(["a b"], 270).tokenizer
    tokenizer.add_special_tokens([AddedToken("<|box_start|>", special=True)])
    codec = TextCodec.of(tokenizer)
    assert tokenizer.token_to_id("<|box_start|>") not in codec.encode("a<|box_start|>b")


def test_lone_surrogates_are_replaced_or_refused() -> None:
    """Arguments of a command line that are not UTF-8 hold them."""
    try:
        assert tiny.codec().encode("a\udcffb")
    except ValueError as error:
        assert "UTF-8" in str(error)


def test_decoding_spells_markers_out() -> None:
    codec = tiny.codec()
    ids = (codec.start, *codec.encode("a b"), codec.end)
    assert codec.decode(ids) == "<|im_start|>a b<|im_end|>"


def test_training_stays_within_its_size() -> None:
    codec = TextCodec.train(["circle circle square"] * 3, 280)
    ids = codec.encode("circle square")
    assert len(codec) <= 280
    assert max(forbidden(codec)) == len(codec) - 1
    assert len(ids) < len("circle square")


def test_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no tokenizer: expected tokenizer.json, or vocab.json"):
        TextCodec.load(tmp_path)
