"""What goes wrong, in OpenAI's error shape: a status, a sentence, and no file of the server."""

import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from course_lib.serving.async_llm import EngineError
from course_lib.serving.lifecycle import DrainingError


class ErrorDetails(BaseModel):
    """What an `openai` client shows of a failed request."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    """Body of every answer that is not a success."""

    error: ErrorDetails


#: For the OpenAPI document: every path may answer so.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request cannot be served.", "model": ErrorReply},
    "5XX": {"description": "The server cannot serve it now.", "model": ErrorReply},
}

_PLACE = re.compile(r"[A-Za-z0-9_]{1,64}")


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        details = {"message": message, "type": kind, "param": param, "code": code}
        self.body = {"error": details}

    def response(self) -> Response:
        """For a request whose answer has not begun."""
        return JSONResponse(self.body, self.status, self.headers)


def as_api_error(error: Exception) -> ApiError:
    """Any error that the engine or FastAPI raises for a request."""
    match error:
        case ApiError():
            return error
        case DrainingError():
            return ApiError(
                503, str(error), kind="overloaded_error", code="draining",
                headers={"Retry-After": str(error.retry_after_s)},
            )  # fmt: skip
        case EngineError():
            return ApiError(
                503, str(error), kind="server_error", code="engine_error",
                headers={"Retry-After": "1"},
            )  # fmt: skip
        case RequestValidationError():
            return _of_validation(error.errors())
        case HTTPException():
            message = str(error.detail)
            if error.status_code == 400:  # FastAPI's, for a body that Python cannot read as JSON
                message = "the body cannot be read as JSON in UTF-8"
            return ApiError(error.status_code, message, headers=dict(error.headers or {}))
    return ApiError(500, "the server failed on this request", kind="server_error")


def _of_validation(errors: Sequence[dict[str, Any]]) -> ApiError:
    """The first thing that is wrong with a body, and where."""
    first = errors[0]
    if first["type"] == "json_invalid":
        what = first.get("ctx", {}).get("error", "it cannot be parsed")
        return ApiError(400, f"the body is not valid JSON: {what} at character {first['loc'][-1]}")
    place = _place(first)
    # A field of several types has an error for each of them.
    messages = [str(e["msg"]).removeprefix("Value error, ") for e in errors if _place(e) == place]
    message = "; or ".join(dict.fromkeys(messages))[:1000]
    return ApiError(400, f"{place or 'the body'}: {message}", param=place or None)


def _place(error: dict[str, Any]) -> str:
    """Names and numbers on the way to the error, without pydantic's names of types."""
    place = ".".join(
        str(part) for part in error["loc"] if part != "body" and _PLACE.fullmatch(str(part))
    )
    return place[:200]


async def _respond(_: Request, error: Exception) -> Response:
    return as_api_error(error).response()


def add_error_handlers(app: FastAPI) -> None:
    """Answer whatever is raised in a handler in OpenAI's shape."""
    for kind in (ApiError, DrainingError, EngineError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _respond)
