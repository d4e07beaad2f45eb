"""Judges: models behind OpenAI-shaped endpoints that score what was made; all that they said is on record.

A reply is kept in a file named for what was asked, so that asking the same again makes no call.
"""

import base64
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPException
from pathlib import Path
from threading import Lock, get_ident
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from PIL import Image

from openbagel.checks import check_least
from openbagel.config import from_json, to_json
from openbagel.files import read_json, write_json
from openbagel.picture_files import png

T = TypeVar("T", bound=Hashable)
Shown = Sequence[Image.Image | str]
"""Pictures, and texts between them."""
Tokens = tuple[int, int]
RETRIED = {408, 409, 429, 500, 502, 503, 504}


class Absent(ValueError):
    """A judge that does not answer, for whatever reason: the run has to stop, and may go on later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Who judges. key_variable: the environment variable that holds the key, if one is needed.

    votes: how often each question is put; most of the readable replies decide. per_minute: calls at most.
    price: money for a million tokens (in, out); no call is made once most_cost is spent. max_tokens: of a
    reply; the most that a benchmark's own script allows.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    votes: int = 1
    temperature: float = 0.0
    max_tokens: int = 4096
    per_minute: float = 600.0
    price: tuple[float, float] = (0.0, 0.0)
    most_cost: float = 1e9
    attempts: int = 6
    timeout: float = 120.0

    def __post_init__(self) -> None:
        check_least(self, votes=1, max_tokens=1, attempts=1)
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"judge {self.url!r} is no URL; write for example http://localhost:8000/v1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What a judge said, when, to which question (its SHA-256), and what it cost in tokens (in, out)."""

    text: str
    judge: str
    date: str
    question: str
    tokens: Tokens = (0, 0)


@dataclass(slots=True)
class Judge:
    """Puts questions to an endpoint, from several threads if need be; replies are kept in `cache`."""

    endpoint: Endpoint
    cache: Path
    wait: Callable[[float], object] = time.sleep
    calls: int = 0
    cost: float = 0.0
    _lock: Lock = field(default_factory=Lock)
    _next: float = 0.0

    def ask(self, question: str, pictures: Shown = (), *, vote: int = 0, system: str = "") -> Reply:
        """One reply; system: what goes before the question as a system's message. `Absent` when the endpoint
        refuses, stays away or the money is spent.
        """
        shown = [one if isinstance(one, str) else png(one.convert("RGB")) for one in pictures]
        endpoint, labels = self.endpoint, [one for one in shown if isinstance(one, str)]
        whole = "\n".join([*([system] if system else []), question, *labels])
        told = [endpoint.model, endpoint.temperature, endpoint.max_tokens, vote, whole]
        digest = hashlib.sha256(json.dumps(told).encode())
        for one in shown:
            digest.update(hashlib.sha256(one.encode() if isinstance(one, str) else one).digest())
        path = self.cache / f"{digest.hexdigest()}.json"
        if path.is_file():
            return from_json(Reply, read_json(path), str(path))
        said, tokens = self._called(system, [question, *shown], vote)
        asked = hashlib.sha256(whole.encode()).hexdigest()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        reply = Reply(text=said, judge=self.endpoint.model, date=now, question=asked, tokens=tokens)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{get_ident()}")
        write_json(part, to_json(reply))
        part.replace(path)
        return reply

    def decide(
        self, question: str, pictures: Shown, parse: Callable[[str], T | None], system: str = ""
    ) -> tuple[T | None, list[Reply]]:
        """What most of the votes say, the first of those that say it breaking ties, and all replies; None
        where `parse` can read none of them.
        """
        votes = range(self.endpoint.votes)
        replies = [self.ask(question, pictures, vote=vote, system=system) for vote in votes]
        read = [value for value in (parse(reply.text) for reply in replies) if value is not None]
        return (Counter(read).most_common(1)[0][0] if read else None), replies

    def _called(self, system: str, parts: list[str | bytes], vote: int) -> tuple[str, Tokens]:
        content: list[dict[str, Any]] = []
        for part in parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
                continue
            url = "data:image/png;base64," + base64.b64encode(part).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        before = [{"role": "system", "content": system}] if system else []
        body = {
            "model": self.endpoint.model,
            "messages": [*before, {"role": "user", "content": content}],
            "temperature": self.endpoint.temperature,
            "max_tokens": self.endpoint.max_tokens,
            "seed": vote,
        }
        key = os.environ.get(self.endpoint.key_variable)
        headers = {"Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        answer = self._posted(f"{self.endpoint.url.rstrip('/')}/chat/completions", body, headers)
        try:
            usage = answer.get("usage") or {}
            tokens = int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
            text = str(answer["choices"][0]["message"]["content"] or "")
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise Absent(f"the judge's answer has another shape than OpenAI's ({error})") from None
        with self._lock:
            price = self.endpoint.price
            self.cost += sum(count * each / 1e6 for count, each in zip(tokens, price, strict=True))
        return text, tokens

    def _posted(self, url: str, body: dict[str, Any], headers: dict[str, str]) -> Any:
        """The JSON that comes back; what may pass is tried again, ever later."""
        problem = ""
        for attempt in range(self.endpoint.attempts):
            self._take_turn()
            pause = 2.0**attempt
            request = Request(url, json.dumps(body).encode(), headers)
            try:
                with urlopen(request, timeout=self.endpoint.timeout) as response:
                    return json.load(response)
            except HTTPError as error:
                problem = f"{error.code} {error.read(200).decode('utf-8', 'replace')}"
                if error.code not in RETRIED:
                    break
                asked = error.headers.get("retry-after", "")
                pause = float(asked) if asked.isdecimal() else pause
            except (OSError, HTTPException, ValueError) as error:
                problem = str(error) or type(error).__name__
            if attempt + 1 < self.endpoint.attempts:
                self.wait(min(pause, 60.0))
        raise Absent(f"the judge at {self.endpoint.url} does not answer: {problem}; run again to go on")

    def _take_turn(self) -> None:
        """Waits until a call may be made."""
        with self._lock:
            if self.cost >= self.endpoint.most_cost:
                spent = f"{self.cost:.2f} of {self.endpoint.most_cost:.2f}"
                raise Absent(f"the judge's budget is spent ({spent}); raise it and run again to go on")
            now = time.monotonic()
            pause = max(0.0, self._next - now)
            self._next = max(now, self._next) + 60.0 / self.endpoint.per_minute
            self.calls += 1
        if pause:
            self.wait(pause)
