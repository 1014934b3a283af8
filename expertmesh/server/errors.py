"""Errors in OpenAI's form."""

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from expertmesh.errors import InputError
from expertmesh.request import SamplingParams
from expertmesh.server.worker import EngineStopped


class ApiError(Exception):
    """What a client is told when a call cannot be answered."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @classmethod
    def of(cls, error: Exception) -> "ApiError":
        """The form for any exception; what nobody expected is not explained to strangers."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, RequestValidationError):
            return _of_validation(error)
        if isinstance(error, InputError):
            word = str(error).partition(" ")[0]  # messages about a sampling parameter begin with its name
            return cls(400, str(error), word if word in SamplingParams.__dataclass_fields__ else None)
        if isinstance(error, EngineStopped):
            return cls(500, str(error), code="engine_stopped")
        return cls(500, "internal error; the server's log says more")

    @property
    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def add_handlers(app: FastAPI) -> None:
    """Let the application answer every error in this form."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):  # an unknown path, or a known one with another method
            message = f"{error.detail}: {request.method} {request.url.path}"
            return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)
        told = ApiError.of(error)
        return JSONResponse(told.body, told.status)

    for kind in (ApiError, InputError, EngineStopped, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _of_validation(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    place, context = [str(part) for part in first["loc"][1:]], first.get("ctx") or {}
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {context['error']} at character {place[0]}")
    if first["type"] == "refused":
        return ApiError(400, first["msg"], context["param"])
    if not place:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    return ApiError(400, f"{'.'.join(place)}: {first['msg']}", place[0])
