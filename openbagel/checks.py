"""What many parts ask of a choice, a number or an optional package, in the same words everywhere."""

import difflib
import importlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


def nearest(word: str, choices: Iterable[str], cutoff: float = 0.6) -> str:
    """A hint such as "; did you mean 'seed'?", or nothing where no choice is as close as cutoff."""
    close = difflib.get_close_matches(word, list(choices), 1, cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def check_choice(what: str, word: Any, choices: Iterable[str]) -> None:
    """ValueError, with the nearest one, when a word is none of the choices: words, or an enum of them."""
    if word not in (choices := [str(choice) for choice in choices]):
        raise ValueError(f"{what} {word!r} is none of {', '.join(choices)}{nearest(str(word), choices)}")


def check_least(owner: Any, **least: float) -> None:
    """ValueError when a field, if it has a value, is below its bound."""
    for name, bound in least.items():
        if (value := getattr(owner, name)) is not None and not value >= bound:
            raise ValueError(f"{name} {value} must be at least {bound}")


def extra(module: str, name: str, purpose: str) -> Any:
    """An optional module; ValueError says what needs it, and names the extra that installs it."""
    with retold(f"{purpose} needs {module}: pip install 'openbagel[{name}]'", ImportError):
        return importlib.import_module(module)


@contextmanager
def retold(message: str, *errors: type[Exception], kind: type[ValueError] = ValueError) -> Iterator[None]:
    """Tells errors of these types inside as one of `kind`; "{error}" in the message stands for them."""
    try:
        yield
    except errors as error:
        raise kind(message.replace("{error}", str(error))) from None


@contextmanager
def spared(what: str) -> Iterator[None]:
    """A disk that is full or read-only ends what is done inside and not the run; it is told once."""
    try:
        yield
    except OSError as error:
        _tell_once(f"{what}: {error.strerror or error}")


_tell_once = cache(warnings.warn)
