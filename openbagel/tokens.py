"""Text to ids and back: the checkpoint's tokenizer, the four markers and the think prompts."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from openbagel.files import MOST_BYTES, read_json

MARKERS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
END_OF_TEXT = "<|endoftext|>"

THINK_BEFORE_DRAWING = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. "
    "<think> planning process here </think> image here"
)
THINK_BEFORE_ANSWERING = (
    "You should first think about the reasoning process in the mind and then provide the user with the "
    "answer. \nThe reasoning process is enclosed within <think> </think> tags, i.e. "
    "<think> reasoning process here </think> answer here"
)

_SPLIT = (  # Qwen2's pre-tokenizer: contractions, words, single digits, punctuation, white space
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class TextCodec:
    """A tokenizer and the ids of its markers. `encode` never yields a marker, whatever the text contains."""

    tokenizer: Tokenizer
    start: int
    end: int
    vision_start: int
    vision_end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "TextCodec":
        """Wraps a tokenizer; markers that it lacks are appended after its last id, in MARKERS' order."""
        present = tokenizer.get_vocab(with_added_tokens=True)
        tokenizer.add_special_tokens(
            [AddedToken(m, special=True) for m in (END_OF_TEXT, *MARKERS) if m in present]
        )
        tokenizer.add_special_tokens([AddedToken(m, special=True) for m in MARKERS if m not in present])
        tokenizer.encode_special_tokens = True  # "<|im_end|>" typed by a user stays plain text
        ids = tokenizer.get_vocab(with_added_tokens=True)
        return cls(tokenizer, *(ids[marker] for marker in MARKERS))

    @classmethod
    def load(cls, folder: str | Path) -> "TextCodec":
        """Reads `tokenizer.json`, or Qwen2's `vocab.json` and `merges.txt` with `tokenizer_config.json`.

        ValueError for none, and for a broken one.
        """
        folder = Path(folder)
        whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
        if not (whole.is_file() or (vocab.is_file() and merges.is_file())):
            raise ValueError(
                f"{folder} holds no tokenizer: expected tokenizer.json, or vocab.json and merges.txt"
            )
        if max(path.stat().st_size for path in (whole, vocab, merges) if path.is_file()) > MOST_BYTES:
            raise ValueError(f"the tokenizer of {folder} is larger than {MOST_BYTES} bytes")
        try:
            return cls.of(Tokenizer.from_file(str(whole)) if whole.is_file() else _qwen2(folder))
        except Exception as error:  # the library raises no kind of its own
            raise ValueError(f"the tokenizer of {folder} is broken ({error})") from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "TextCodec":
        """A byte-level BPE of exactly the merges that the texts support, at most vocab_size ids with the
        markers.
        """
        tokenizer = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(MARKERS) - 1,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
        return cls.of(tokenizer)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, and the tokenizer_config.json that other libraries want beside it."""
        self.tokenizer.save(str(Path(folder) / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": MARKERS[1]}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config) + "\n", "utf-8")

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled tokenizer forgets that special tokens are encoded as plain text; `of` says it again."""
        return TextCodec.of, (self.tokenizer,)

    @property
    def end_of_text(self) -> int | None:
        """The id of `<|endoftext|>`, which ends a conversation; None if the vocabulary has none."""
        return self.tokenizer.token_to_id(END_OF_TEXT)

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> tuple[int, ...]:
        valid = text.encode("utf-8", "replace").decode()  # a command line's stray bytes become question marks
        return tuple(self.tokenizer.encode(valid, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; markers among them are spelled out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


def _qwen2(folder: Path) -> Tokenizer:
    tokenizer = _byte_level(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    settings = folder / "tokenizer_config.json"
    stored = read_json(settings) if settings.is_file() else {}
    entries = sorted(stored.get("added_tokens_decoder", {}).items(), key=lambda entry: int(entry[0]))
    added = [entry["content"] for _, entry in entries]
    specials = added or [END_OF_TEXT, *stored.get("additional_special_tokens", [])]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in specials])
    return tokenizer


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
