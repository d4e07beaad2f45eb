"""Fetching pictures: only what is allowed, only from public addresses, and nothing told about the inside."""

import asyncio
import datetime
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from openbagel.serve import fetch as module
from openbagel.serve.fetch import fetch, public
from openbagel.serve.gate import Gate
from openbagel.serve.limits import ServerLimits

NAME = "pictures.example"
ALLOWED = ServerLimits(url_hosts=(NAME, "bücher.example", "PORT.example:8443"))
PUBLIC = "93.184.215.14"

INSIDE = [
    *(
        "127.0.0.1",
        "127.1.2.3",
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "10.255.255.255",
        "172.16.0.1",
        "172.31.9.9",
    ),
    *("192.168.0.1", "192.168.255.254", "169.254.169.254", "169.254.1.1", "100.64.0.1", "100.100.100.200"),
    *(
        "192.0.0.192",
        "192.0.2.1",
        "198.18.0.1",
        "198.51.100.7",
        "203.0.113.9",
        "192.88.99.1",
        "168.63.129.16",
    ),
    *("224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"),
    *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "100::1"),
    *("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::ffff:7f00:1", "::127.0.0.1"),
    *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2002:a9fe:a9fe::1"),
    *("2001::1", "2001:0:7f00:1::", "2001:db8::1", "2001:10::1", "3fff::1", "5f00::1", "::ffff:0:127.0.0.1"),
]
OUTSIDE = [PUBLIC, "8.8.8.8", "1.1.1.1", "::ffff:8.8.8.8", "2606:4700::1111", "2a00:1450:4001:81b::200e"]


def ssrf_urls() -> list[str]:
    """What is sent to make a server talk to its own network."""
    addresses = [f"[{one}]" if ":" in one else one for one in INSIDE if "%" not in one]
    addresses += [
        *(
            "localhost",
            "LOCALHOST",
            "localhost.",
            "localtest.me",
            "127.0.0.1.nip.io",
            "metadata.google.internal",
        ),
        *(
            "2130706433",
            "0x7f000001",
            "0x7f.0.0.1",
            "017700000001",
            "0177.0.0.1",
            "127.1",
            "127.0.1",
            "0",
            "0x0",
        ),
        *("2852039166", "0xa9fea9fe", "0251.0376.0251.0376", "169.254.43518", "[::ffff:a9fe:a9fe]"),
        *(
            "⑯⑨。②⑤④。⑯⑨。②⑤④",
            "127。0。0。1",
            "①②⑦.⓪.⓪.①",
            "ⓛocalhost",
            "xn--",
            "[fe80::1%25eth0]",
            "[::1",
            "::1",
        ),
    ]
    forms = ("https://{}/a.png", "http://{}/a.png", "https://{}:8000/", "https://user:pw@{}/latest/meta-data")
    tricks = [
        *(f"https://{NAME}@127.0.0.1/", f"https://127.0.0.1@{NAME}@10.0.0.1/", f"https://{NAME}:443@[::1]/"),
        *(f"https://{NAME}:80@{NAME}/", f"https://me@{NAME}/", f"https://{NAME}\\@127.0.0.1/"),
        *(f"https://127.0.0.1\\@{NAME}/", f"https://127.0.0.1#@{NAME}/", f"https://127.0.0.1?@{NAME}/"),
        *(f"https://{NAME}.127.0.0.1.nip.io/", f"https://{NAME}.evil.example/", f"https://evil{NAME}/"),
        *(f"https://{NAME}%2eevil.example/", f"https://{NAME}%00.evil.example/", f"https://{NAME}\0.evil/"),
        *(f"https://{NAME}:22/", f"https://{NAME}:8443/", f"https://{NAME}:0/", f"https://{NAME}:99999/"),
        *(f"https://{NAME}:-1/", f"https://{NAME}:443:80/", f"https://{NAME}./", f"https://{NAME}../"),
        *(
            f"https://sub.{NAME}/",
            f"https://{NAME} .evil/",
            f"https://\n{NAME}/",
            f"https://{NAME}\r\nHost: a/",
        ),
        *("https://port.example/", "https://port.example:443/", "https://xn--bcher-kva.evil.example/"),
        *(
            "https://",
            "https:",
            "https:///",
            "https:////",
            "https://@/",
            "https://:443/",
            "https://?/",
            "https://[]/",
        ),
        *(f"http://{NAME}/", f"ftp://{NAME}/", f"gopher://{NAME}:70/_x", f"dict://{NAME}/", f"ws://{NAME}/"),
        *("file:///etc/passwd", "file://localhost/etc/passwd", "FILE:/etc/passwd", "ldap://127.0.0.1/"),
        *(
            f"//{NAME}/a",
            f"https:\\\\{NAME}/",
            f" https://{NAME}/",
            f"hTTps:/{NAME}/",
            f"url:https://{NAME}/",
        ),
        *("https://" + "a" * 70_000, "https://" + "a." * 5000, "https://127.0.0.1/" + "a" * 70_000, "\ud800"),
        *(
            "jar:https://127.0.0.1!/",
            "https://127.0.0.1:6379/%0d%0aFLUSHALL",
            "https://[::1]:2375/containers",
        ),
    ]
    return [form.format(address) for address in addresses for form in forms] + tricks


@pytest.mark.parametrize("limits", [ServerLimits(), ALLOWED], ids=["default", "allow-list"])
def test_ssrf_urls_reach_nothing(limits: ServerLimits, watched: list[tuple[str, Any]]) -> None:
    """No name is looked up and no connection made, wherever the URL is given."""

    async def case() -> None:
        gate = Gate(limits)
        watched.clear()
        for url in ssrf_urls():
            for way in (lambda url: fetch(url, limits), gate.open_source):
                with pytest.raises(ValueError) as caught:
                    await way(url)
                assert len(str(caught.value)) < 200
                assert "\n" not in str(caught.value)
        assert [event for event in watched if event[0] != "open"] == []

    assert len(ssrf_urls()) >= 300
    asyncio.run(case())


def test_public_addresses() -> None:
    assert [one for one in INSIDE if public(one)] == []
    assert [one for one in OUTSIDE if not public(one)] == []


# a server that answers as it is told -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate for NAME, signed by itself, in one file."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, NAME)])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    made = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(), now - day, now + day
    )
    signed = made.add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), False).sign(
        key, hashes.SHA256()
    )
    kind = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    pem = serialization.Encoding.PEM
    path.write_bytes(key.private_bytes(pem, *kind) + signed.public_bytes(pem))
    return path


class Listener:
    """A TLS server on loopback that counts what reaches it."""

    def __init__(self, answer: bytes, pause: float = 0.0, endless: bytes = b"") -> None:
        self.answer, self.pause, self.endless = answer, pause, endless
        self.port = 0
        self.names: list[str | None] = []
        self.requests: list[bytes] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(self.answer)
            await asyncio.sleep(self.pause)
            while self.endless:
                writer.write(self.endless)
                await writer.drain()
        except (OSError, EOFError):
            pass
        finally:
            writer.close()

    @asynccontextmanager
    async def listening(self, certificate: Path) -> AsyncIterator["Listener"]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        context.sni_callback = lambda _, name, __: self.names.append(name)
        server = await asyncio.start_server(self, "127.0.0.1", 0, ssl=context)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """Answers to the next look-ups, the last one for ever."""
    answers: list[list[str]] = []

    async def resolve(host: str, port: int) -> list[str]:
        return answers.pop(0) if len(answers) > 1 else answers[0]

    monkeypatch.setattr(module, "resolve", resolve)
    yield answers


@pytest.fixture
def trusting(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate counts, and loopback as public."""
    context = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(module, "_trusted", lambda: context)
    monkeypatch.setattr(module, "public", lambda address: address == "127.0.0.1")


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Coroutine[Any, Any, Any]], Any]:
    return asyncio.run if request.param == "asyncio" else pytest.importorskip("uvloop").run


def answer(body: bytes, status: str = "200 OK", *lines: str) -> bytes:
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *lines, "", ""])
    return head.encode() + body


@pytest.mark.parametrize("inside", INSIDE)
def test_names_that_lead_inside_are_not_connected_to(
    inside: str, resolved: list[list[str]], watched: list[tuple[str, Any]]
) -> None:
    async def case() -> None:
        for found in ([inside], [PUBLIC, inside], [inside, PUBLIC], []):
            resolved[:] = [found]
            with pytest.raises(ValueError, match="does not lead to a public host") as caught:
                await fetch(f"https://{NAME}/a.png", ALLOWED)
            assert inside not in str(caught.value)
        assert [event for event in watched if event[0].startswith("socket")] == []

    asyncio.run(case())


@pytest.mark.usefixtures("trusting")
def test_a_picture_is_fetched_from_the_address_that_was_judged(
    run: Callable[..., Any], certificate: Path, resolved: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")

    async def case() -> None:
        async with Listener(answer(b"a picture")).listening(certificate) as server:
            resolved[:] = [["127.0.0.1"], ["10.0.0.1"]]  # the second look-up would lead elsewhere
            limits = ServerLimits(url_hosts=(f"Pictures.Example:{server.port}",))
            url = f"HTTPS://PICTURES.example:{server.port}/a%20b.png?c=d&e=%2f#f"
            assert await fetch(url, limits) == b"a picture"
            assert len(resolved) == 1
            assert server.names == [NAME]
            (request,) = server.requests
            assert request.startswith(b"GET /a%20b.png?c=d&e=%2f HTTP/1.1\r\n")
            assert b"\r\nhost: %s:%d\r\n" % (NAME.encode(), server.port) in request.lower()
            assert b"gzip" not in request.lower()
            with pytest.raises(ValueError, match="does not lead to a public host"):
                await fetch(url, limits)
            assert len(server.requests) == 1

    run(case())


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize(
    ("server", "limits", "words"),
    [
        (Listener(answer(b"", "302 Found", "Location: https://127.0.0.1/")), {}, "answers 302"),
        (Listener(answer(b"", "301 Moved", f"Location: https://{NAME}/b")), {}, "answers 301"),
        (Listener(answer(b"no", "404 Not Found")), {}, "answers 404"),
        (Listener(answer(b"1", "206 Partial Content")), {}, "answers 206"),
        (Listener(answer(b"12345678901")), {"url_bytes": 10}, "holds more than 10 bytes"),
        (Listener(b"HTTP/1.1 200 OK\r\n\r\n", endless=bytes(9999)), {"url_bytes": 10**6}, "holds more than"),
        (Listener(answer(b"late"), pause=3.0), {"url_seconds": 0.5}, None),
        (Listener(b"", pause=30.0), {"url_seconds": 0.5}, "cannot be read"),
        (Listener(b"HTTP/1.1 200 OK\r\nA: " + b"a" * 300_000), {}, "cannot be read"),
        (Listener(b"no HTTP at all\r\n\r\n"), {}, "cannot be read"),
        (Listener(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nshort"), {}, "cannot be read"),
    ],
)
def test_answers_that_are_refused(
    server: Listener, limits: dict[str, Any], words: str | None, certificate: Path, resolved: list[list[str]]
) -> None:
    resolved[:] = [["127.0.0.1"]]

    async def case() -> None:
        async with server.listening(certificate):
            fetched = fetch(
                f"https://{NAME}:{server.port}/", ServerLimits(url_hosts=(f"{NAME}:{server.port}",), **limits)
            )
            if words is None:  # the body is there before the line is closed
                assert await fetched == b"late"
                return
            with pytest.raises(ValueError, match=words) as caught:
                await fetched
            assert "127.0.0.1" not in str(caught.value)
            assert len(server.requests) == 1

    asyncio.run(case())


def test_certificates_are_checked_for_the_name(
    certificate: Path, resolved: list[list[str]], trusting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved[:] = [["127.0.0.1"]]

    async def case(host: str) -> None:
        async with Listener(answer(b"a picture")).listening(certificate) as server:
            with pytest.raises(ValueError, match="cannot be read"):
                await fetch(
                    f"https://{host}:{server.port}/", ServerLimits(url_hosts=(f"{host}:{server.port}",))
                )
            assert server.requests == []

    asyncio.run(case("other.example"))
    context = httpx.create_ssl_context(trust_env=False)
    monkeypatch.setattr(module, "_trusted", lambda: context)
    asyncio.run(case(NAME))


def test_lookups_that_fail_or_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fails(host: str, port: int) -> list[str]:
        raise socket.gaierror(-2, "Name or service not known at 10.0.0.53")

    async def hangs(host: str, port: int) -> list[str]:
        await asyncio.sleep(60)
        return [PUBLIC]

    limits = ServerLimits(url_hosts=(NAME,), url_seconds=0.05)
    for resolve in (fails, hangs):
        monkeypatch.setattr(module, "resolve", resolve)
        with pytest.raises(ValueError, match=r"^the picture's URL cannot be read; send the picture itself$"):
            asyncio.run(fetch(f"https://{NAME}/", limits))


def test_a_server_does_not_start_with_hosts_that_are_none() -> None:
    with pytest.raises(ValueError, match="url_hosts .*write hosts such as example.com"):
        Gate(ServerLimits(url_hosts=("0177.0.0.1",)))
