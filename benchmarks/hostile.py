"""What strangers send to a server: malformed bodies, URLs that lead inside, paths of files."""

import base64
import json
import random
from collections.abc import Callable, Iterator, Sequence

from tests.serve.hostile_pictures import malformed

CHAT, DRAWINGS, EDITS = "/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"
QUESTION = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "temperature": 0}
DRAWING = {"prompt": "x", "num_inference_steps": 3, "size": "8x8"}


def bodies(count: int, seed: int = 0) -> Iterator[tuple[str, dict[str, str], bytes]]:
    """(path, headers, body), half of them with malformed pictures."""
    pictures = malformed(seed)
    as_json = {"content-type": "application/json"}
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        if number % 2 == 0:
            data = next(pictures)[1]
            if rng.random() < 0.5:
                yield EDITS, *form([("prompt", b"x"), ("num_inference_steps", b"1"), ("image", data)])
            else:
                url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
                parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "x"}]
                yield CHAT, as_json, json.dumps({"messages": [{"role": "user", "content": parts}]}).encode()
            continue
        path = rng.choice((CHAT, DRAWINGS, EDITS))
        right = json.dumps(DRAWING if path == DRAWINGS else QUESTION).encode()
        headers, body = form([("prompt", b"x"), ("image", b"GIF89a")]) if path == EDITS else (as_json, right)
        yield path, *damaged(rng, headers, body)


def form(fields: Sequence[tuple[str, bytes]]) -> tuple[dict[str, str], bytes]:
    edge, body = "an-edge-between-parts", b""
    for name, value in fields:
        file = '; filename="a.png"' if name == "image" else ""
        head = f'--{edge}\r\ncontent-disposition: form-data; name="{name}"{file}\r\n\r\n'
        body += head.encode() + value + b"\r\n"
    return {"content-type": f"multipart/form-data; boundary={edge}"}, body + f"--{edge}--\r\n".encode()


DEPTH = 100_000
DAMAGES: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    lambda rng, body: body[: rng.randrange(len(body))],
    lambda rng, body: bytes(byte ^ (rng.random() < 0.03) << rng.randrange(8) for byte in body),
    lambda rng, body: rng.randbytes(rng.randrange(3000)),
    lambda rng, body: body * rng.randrange(2, 5),
    lambda rng, body: (b"[" if rng.random() < 0.5 else b'{"a":') * rng.randrange(1, DEPTH),
    lambda rng, body: body.replace(b'"x"', rng.choice((b"1e999", b"NaN", b"-Infinity", b"9" * 6000))),
    lambda rng, body: body.replace(b"x", rng.choice((b"\xff\xfe", b"\\ud800", b"\0", b"\\u0000"))),
    lambda rng, body: b"\xef\xbb\xbf" + body.decode().encode(rng.choice(("utf-16", "utf-32", "utf-7"))),
    lambda rng, body: body.replace(b":", b": " + b" " * rng.randrange(10_000)),
    lambda rng, body: body.replace(b"3", rng.choice((b"true", b"-1", b"0.5", b'"3"', b"1e18", b"[]"))),
    lambda rng, body: body.replace(b"name=", rng.choice((b"name*=utf-8''", b"=", b'name="\xff";'))),
    lambda rng, body: body.replace(b"an-edge", b"another-edge", rng.randrange(1, 3)),
)  # fmt: skip
KINDS = ("", "text/plain", "application/json; charset=klingon", "multipart/form-data", "application/xml")


def damaged(rng: random.Random, headers: dict[str, str], body: bytes) -> tuple[dict[str, str], bytes]:
    if rng.random() < 0.15:
        return {"content-type": rng.choice(KINDS)}, body
    return headers, rng.choice(DAMAGES)(rng, body)


INSIDE = (
    "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "017700000001", "localhost", "LOCALHOST.",
    "0.0.0.0", "0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "192.0.0.192",
    "198.18.0.1", "224.0.0.1", "255.255.255.255", "[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]",
    "[fe80::1]", "[fc00::1]", "[fd00:ec2::254]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[::127.0.0.1]",
)  # fmt: skip


def urls(count: int, port: int) -> list[str]:
    """Places that a server may not be led to, in many spellings."""
    forms = (
        "http://{}:{port}/", "https://{}:{port}/", "https://{}/latest/meta-data/", "HTTPS://{}:{port}/a.png",
        "https://example.com@{}:{port}/", "https://{}:{port}#@example.com/", "ftp://{}/a.png", "//{}:{port}/",
        "https://{}:{port}\\@example.com/", "gopher://{}:{port}/_", "https:{}:{port}", " https://{}:{port}/",
    )  # fmt: skip
    made = [form.format(host, port=port) for form in forms for host in INSIDE]
    made += [f"https://{'a' * length}.example.com/" for length in (63, 64, 255, 10_000)]
    made += ["file:///etc/passwd", "data:text/html,x", "data:image/png;base64,!!!", "https://", "https://["]
    random.Random(0).shuffle(made)
    return (made * (count // len(made) + 1))[:count]


TARGETS = (
    "/{}", "//{}", "/v1/{}", "/v1/models/{}", "/docs/{}", "/ui/{}", "/ui/gradio_api/file={}", "/ui/file={}",
)  # fmt: skip
SPELLED: tuple[Callable[[str], str], ...] = (
    lambda one: one,
    lambda one: one.replace("/", "%2f"),
    lambda one: one.replace(".", "%2e").replace("/", "%2F"),
    lambda one: one.replace("../", "..%5c"),
    lambda one: one.replace("../", "....//"),
    lambda one: one + "%00.png",
)
SOURCES = (
    "{}",
    "file://{}",
    "file:{}",
    "https:{}",
    "data:{}",
    "data:image/png;base64,{}",
    "\\\\localhost\\{}",
)


def targets(files: Sequence[str]) -> list[str]:
    """Targets of requests that would read these files."""
    found = [target.format(spell(one)) for target in TARGETS for one in files for spell in SPELLED]
    random.Random(0).shuffle(found)
    return found


def sources(files: Sequence[str]) -> list[str]:
    """What would read these files if a picture's source were opened."""
    return [source.format(one) for one in files for source in SOURCES]
