"""What a request gets that was refused or failed, in OpenAI's shape."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from ..errors import LessExportError, UsageError, one_line
from ..runtime.engine import QueueFullError, StoppedError
from ..runtime.structured import StructuredUnavailableError
from .options import RETRY_SECONDS
from .replies import error_body, origin
from .sessions import BusySessionError, NoSuchSessionError
from .views import NoSuchViewError

_LOG = logging.getLogger(__name__)
#: Statuses, kinds and codes of errors; the first that fits.
_ERRORS: tuple[tuple[type[Exception], int, str, str | None], ...] = (
    (QueueFullError, 429, "rate_limit_error", "queue_full"),
    (StoppedError, 503, "server_error", "stopping"),
    (NoSuchSessionError, 404, "invalid_request_error", "session_not_found"),
    (NoSuchViewError, 404, "invalid_request_error", "view_not_found"),
    (BusySessionError, 409, "invalid_request_error", "session_busy"),
    (TimeoutError, 504, "timeout", None),
    (StructuredUnavailableError, 501, "invalid_request_error", "structured_output_unavailable"),
    (UsageError, 400, "invalid_request_error", None),
    (Exception, 500, "server_error", None),
)


def _body_of(error: Exception) -> dict[str, Any]:
    _, _, kind, code = next(e for e in _ERRORS if isinstance(error, e[0]))
    if isinstance(error, TimeoutError):
        return error_body("the request took longer than this server allows (--timeout): ask for less", kind, code)
    # Errors that are not ours may name anything: files, other requests.
    return error_body(str(error) if isinstance(error, LessExportError) else "internal error", kind, code)


async def failed(_: HttpRequest, error: Exception) -> Response:
    return refusal(error)


def refusal(error: Exception) -> JSONResponse:
    """The reply to a request that was refused or failed; what is not the client's fault is logged."""
    status = next(e[1] for e in _ERRORS if isinstance(error, e[0]))
    if status == 500:
        _LOG.error("a request failed: %s", one_line(error) if isinstance(error, LessExportError) else origin(error))
    headers = {"Retry-After": str(RETRY_SECONDS)} if status == 429 else None
    return JSONResponse(_body_of(error), status, headers)


async def invalid(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = ".".join(str(x) for x in first["loc"] if x != "body")
    message = f"{place}: {first['msg']}" if place else first["msg"]
    return JSONResponse(error_body(one_line(message), "invalid_request_error", None, place or None), 400)


async def http_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail: Any = error.detail
    body = detail if isinstance(detail, dict) else error_body(str(detail).lower(), "invalid_request_error")
    return JSONResponse(body, error.status_code, error.headers)
