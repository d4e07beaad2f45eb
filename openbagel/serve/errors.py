"""Whatever goes wrong, told in OpenAI's shape: `{"error": {message, type, code, param}}`."""

import json
import logging
import uuid
from collections.abc import Mapping
from concurrent.futures import CancelledError
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from openbagel.inference.scheduler import Full
from openbagel.serve.service import is_out_of_memory

log = logging.getLogger(__name__)

KNOWN = {Full: (429, "queue_full"), TimeoutError: (504, "timeout"), CancelledError: (503, "closing")}
KNOWN |= {ClientDisconnect: (499, "gone"), MemoryError: (503, "out_of_memory"), ValueError: (400, None)}
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def told(error: BaseException) -> tuple[int, dict[str, Any]]:
    """The status and the body of an error; one that nobody foresaw is logged under an opaque id."""
    message, param = " ".join(str(error).split()), None
    if isinstance(error, HTTPException):
        status, code, message = error.status_code, None, error.detail
    elif isinstance(error, RequestValidationError | ValidationError):
        first: Any = error.errors()[0]
        of_body = isinstance(error, RequestValidationError)  # their places begin with "body"
        place = ".".join(map(str, first["loc"][of_body:] or first["loc"]))
        if of_body and isinstance(first["input"], bytes):
            first["msg"] = "send it with content-type: application/json"
        place = "" if first["type"] == "json_invalid" else place
        param = first.get("ctx", {}).get("name", place)
        status, code, message = 422, first["type"], f"{place}: {first['msg']}".removeprefix(": ")
    else:
        found = MemoryError() if is_out_of_memory(error) else error
        status, code = next((KNOWN[kind] for kind in KNOWN if isinstance(found, kind)), (500, "internal"))
        if status == 503:
            message = "the server is closing" if code == "closing" else "the request needs too much memory"
    if status == 500:
        name = uuid.uuid4().hex
        log.error("request failed, id %s", name, exc_info=error)
        message = f"something went wrong; the server's log tells more under {name}"
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return status, {"error": {"message": message, "type": kind, "code": code, "param": param}}


def answer(error: BaseException) -> Response:
    status, tree = told(error)
    more = {"Retry-After": str(error.retry_after)} if isinstance(error, Full) else {}
    return as_json(tree, status, {**(getattr(error, "headers", None) or {}), **more})


def as_json(tree: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A value as JSON in ASCII, so that no text of a client, however broken, breaks the answer."""
    return Response(json.dumps(tree), status, headers, "application/json")
