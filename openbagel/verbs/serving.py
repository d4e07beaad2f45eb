"""Verbs that serve a model to others."""

import gc
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openbagel.checks import extra
from openbagel.config import from_json
from openbagel.verbs.options import ModelOptions, option, setting_of

if TYPE_CHECKING:
    from openbagel.serve.limits import ServerLimits
    from openbagel.serve.service import Service


def serviced(options: ModelOptions, limits: "ServerLimits", port: int) -> "Service":
    """The model behind a scheduler; clients call it by the id or the folder's name. ValueError, before it is
    loaded, where it is to listen on what is no port.
    """
    from openbagel.serve.service import Service

    if not 0 <= port < 2**16:
        raise ValueError(f"port {port} is none; give one between 0 and {2**16 - 1}")
    name = os.path.basename(os.path.abspath(options.model)) if os.path.isdir(options.model) else options.model
    return Service(options.load(), limits, name=name)


@dataclass(frozen=True, kw_only=True)
class Serve(ModelOptions):
    """answer OpenAI's clients over HTTP, with a web page at /ui"""

    host: str = option("the address to listen on", "127.0.0.1")
    port: int = option("0 takes a free one", 8000)
    api_key: list[str] | None = option(
        "a key that clients must send; may be repeated; also OPENBAGEL_API_KEY", action="append"
    )
    insecure: bool = option("listen on a public address without a key", False)
    no_ui: bool = option("leave out the web page", False)
    limits: list[tuple[str, Any]] | None = option(
        "fields of ServerLimits, as /v1/limits shows them", nargs="+", type=setting_of, metavar="KEY=VALUE"
    )

    def run(self) -> None:
        extra("fastapi", "serve", "serving")
        from openbagel.serve import api
        from openbagel.serve.limits import ServerLimits

        keys = self.api_key or os.environ.get("OPENBAGEL_API_KEY", "").split()
        api.check_public(self.host, keys, self.insecure)
        limits = from_json(ServerLimits, dict(self.limits or ()), "--limits")
        service = serviced(self, limits, self.port)
        app = api.create_app(service, keys=keys, page=not self.no_ui)
        gc.freeze()  # what is loaded stays: looking through it for garbage would halt every request for 0.2 s
        api.Server(app, service, self.host, self.port).run()


@dataclass(frozen=True, kw_only=True)
class Ui(ModelOptions):
    """open a web page: chat, draw, edit, ask, film"""

    model: str = option("as everywhere; the official name works too", "nano", aliases=("--model_path",))
    server_name: str = option("the address to listen on", "127.0.0.1", aliases=("--server_name",))
    server_port: int = option("its port", 7860, aliases=("--server_port",))
    share: bool = option("a public link through Gradio's servers, behind a password", False)
    password: str | None = option("asked for, with any name; made where others can reach the page")

    def run(self) -> None:
        extra("gradio", "ui", "the web page")
        from openbagel.serve import web
        from openbagel.serve.limits import ServerLimits

        service = serviced(self, ServerLimits(), self.server_port)
        where = {"server_name": self.server_name, "server_port": self.server_port, "share": self.share}
        blocks, password = web.launch(service, password=self.password, **where)
        print(blocks.share_url or blocks.local_url, f"password: {password}" * bool(password), flush=True)
        blocks.block_thread()
