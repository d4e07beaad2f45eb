"""A judge behind a real socket: OpenAI's shape, and by turns failing, slow, talkative or in another shape."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Say = Callable[[dict[str, Any], int], tuple[int, Any]]
"""From a request's body and how many came before it: a status and a text, or any other JSON."""


@contextmanager
def judge_server(say: Say) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The URL, and the requests that arrive."""
    asked: list[dict[str, Any]] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(asked)
                asked.append({**body, "path": self.path, "key": self.headers.get("Authorization")})
            status, said = say(body, number)
            usage = {"prompt_tokens": 1000, "completion_tokens": 10}
            shaped = {"choices": [{"message": {"content": said}}], "usage": usage}
            payload = json.dumps(shaped if isinstance(said, str) else said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
