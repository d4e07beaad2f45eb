"""What the tests of the server share."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest

WATCHED = {"open", "socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen"}
_events: list[tuple[str, Any]] | None = None


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _events is not None and event in WATCHED:
        _events.append((event, args[1] if event.startswith("socket.connect") else args))


@pytest.fixture
def watched() -> Iterator[list[tuple[str, Any]]]:
    """Every file opened, name looked up, connection made and program started by this process, as Python's
    own audit events tell it.
    """
    global _events
    sys.addaudithook(_hook)  # for ever: there is no way to remove one
    _events = []
    yield _events
    _events = None
