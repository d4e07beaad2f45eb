"""What a server allows: one object with safe defaults, shown by `/v1/limits`."""

from dataclasses import dataclass, fields

from PIL import Image

from openbagel.checks import check_choice, check_least


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Caps of one server; bytes, pixels, seconds and tokens as named.

    picture_*: of every picture that is sent, judged before it is decoded. url_hosts: hosts that pictures may
    be fetched from, none by default. queue: requests that wait, key_queue: of one key. running: requests that
    share the model at a time, each with its own contexts; batch: forwards of different requests that share a
    pass, 1 lets them take turns, bit-equal to their solo runs. n: replies to a request, lowered to the places
    of a key in the queue. tokens: of a reply. texts, text_tokens: characters and tokens of all texts that are
    sent; they go through the model in one pass, which everybody waits for.
    """

    body_bytes: int = 32 * 2**20
    body_seconds: float = 30.0
    body_files: int = 16
    body_fields: int = 64
    pictures: int = 16
    picture_formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP")
    picture_pixels: int = 4096 * 4096
    picture_side: int = 8192
    decoders: int = 2
    decode_seconds: float = 5.0
    decode_bytes: int = 2**30
    url_hosts: tuple[str, ...] = ()
    url_bytes: int = 20_000_000
    url_seconds: float = 10.0
    queue: int = 64
    key_queue: int = 32
    running: int = 16
    batch: int = 16
    queue_seconds: float = 120.0
    request_seconds: float = 300.0
    n: int = 4
    steps: int = 200
    output_pixels: int = 3 * 2**19
    tokens: int = 4096
    texts: int = 2**15
    text_tokens: int = 8192

    def check(self, **asked: int | None) -> None:
        """ValueError where more of something is asked for than its limit."""
        for name, value in asked.items():
            if (value or 0) > (most := getattr(self, name)):
                raise ValueError(f"{value} {name} are above this server's limit of {most:,} {name}")

    def __post_init__(self) -> None:
        check_least(self, queue=1, key_queue=1, running=1, batch=1, decoders=1, n=1, steps=1, tokens=1)
        check_least(self, **{one.name: 0 for one in fields(self) if isinstance(one.default, int | float)})
        Image.init()
        for name in self.picture_formats:
            check_choice("picture format", name.upper(), Image.OPEN)
        object.__setattr__(self, "n", min(self.n, self.queue, self.key_queue))
