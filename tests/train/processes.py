"""Real processes that talk over gloo, forked from a server that has imported the slow modules once."""

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from openbagel.train.parallel import Ranks

LIMIT_S = 60
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch", "tests.tiny", "tests.train.processes", "openbagel.train.checkpoint", "torch._dynamo"]
)


def run_ranks(number: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What function(ranks, *arguments) returns on each rank; AssertionError with their tracebacks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(number)]
    started = []
    for rank, (_, end) in enumerate(pipes):
        where = {"RANK": rank, "WORLD_SIZE": number, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        environment = {key: str(value) for key, value in where.items()} | {"MASTER_PORT": str(port)}
        started.append(CONTEXT.Process(target=_run, args=(environment, end, function, arguments)))
        started[-1].start()
        end.close()
    results = []
    deadline = time.monotonic() + LIMIT_S
    for process, (end, _) in zip(started, pipes, strict=True):
        try:
            answers = end.poll(max(deadline - time.monotonic(), 0.1))
            results.append(end.recv() if answers else (False, f"no answer within {LIMIT_S} s"))
        except EOFError:
            results.append((False, f"ended with {process.exitcode}"))
    for process in started:
        process.join(max(deadline - time.monotonic(), 0.1))
        process.kill()
    failures = [value for passed, value in results if not passed]
    assert not failures, "\n".join(failures)
    return [value for _, value in results]


def _run(
    environment: dict[str, str], end: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    try:
        ranks = Ranks("cpu", timeout_s=30)
        end.send((True, function(ranks, *arguments)))
        ranks.close()
    except BaseException:  # noqa: BLE001  the parent shows it
        end.send((False, f"rank {environment['RANK']}: {traceback.format_exc()}"))
        sys.exit(1)
