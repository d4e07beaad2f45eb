"""A real server in a thread, for tests with real clients."""

import socket
import time
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from threading import Thread

from openbagel.serve.api import Server, create_app
from openbagel.serve.service import Service


@contextmanager
def running(service: Service, keys: Collection[str] = ()) -> Iterator[str]:
    """The address of a server that ends, with its service, when the block does."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = Server(create_app(service, keys=keys), service, "127.0.0.1", port)
    thread = Thread(target=one.run, daemon=True)
    thread.start()
    while not one.started:
        assert thread.is_alive()
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        one.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
