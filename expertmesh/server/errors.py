"""What a client is told when a call cannot be answered, in the form of the API whose path was asked."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from expertmesh.errors import InputError
from expertmesh.request import SamplingParams
from expertmesh.server.events import JsonAnswer
from expertmesh.server.identity import new_id, request_id
from expertmesh.server.worker import EngineStopped

ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_OPENAI_TYPES = {429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error. headers: of the response, such as Retry-After."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers
        self.request_id = new_id()

    @classmethod
    def of(cls, error: Exception) -> "ApiError":
        """The form for any exception; what nobody expected is not explained to strangers."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, RequestValidationError):
            return _of_validation(error)
        if isinstance(error, InputError):
            return cls(400, str(error), param_of(error))
        if isinstance(error, EngineStopped):
            return cls(error.status, str(error), code=error.code, headers=error.headers)
        return cls(500, "internal error; the server's log says more")

    def about(self, scope: Scope) -> "ApiError":
        """The same, of the request with this scope."""
        self.request_id = request_id(scope)
        return self

    def openai(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        told = {"message": str(self), "type": _OPENAI_TYPES.get(self.status, kind)}
        return {"error": {**told, "param": self.param, "code": self.code}}

    def anthropic(self) -> dict[str, Any]:
        kind = "api_error" if self.status >= 500 else "invalid_request_error"
        error = {"type": _ANTHROPIC_TYPES.get(self.status, kind), "message": str(self)}
        return {"type": "error", "error": error, "request_id": self.request_id}

    def response(self, path: str) -> Response:
        """For a request of this path."""
        told = self.anthropic() if is_anthropic(path) else self.openai()
        return JsonAnswer(told, self.status, dict(self.headers or {}))


def is_anthropic(path: str) -> bool:
    """Whether it belongs to Anthropic's API."""
    return path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/")


def param_of(error: InputError) -> str | None:
    """The sampling parameter that the error is about: messages begin with its name."""
    word = str(error).partition(" ")[0].rstrip(":")
    known = {*SamplingParams.__dataclass_fields__, "tools", "tool_choice", "messages", "input"}
    return word if word in known else None


def add_handlers(app: FastAPI) -> None:
    """Let the application answer every error in the form of its API."""

    async def answer(request: Request, error: Exception) -> Response:
        path = request.url.path
        if isinstance(error, HTTPException):  # an unknown path, or a known one with another method
            message = f"{error.detail}: {request.method} {path}"
            if error.status_code == 400:  # what is JSON, but too much of it: nesting, digits
                message = f"the body cannot be read as JSON: {str(error.__cause__ or error.detail)[:200]}"
            error = ApiError(error.status_code, message, headers=error.headers)
        return ApiError.of(error).about(request.scope).response(path)

    for kind in (ApiError, InputError, EngineStopped, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _of_validation(error: RequestValidationError) -> ApiError:
    # Where a field may be of several types, each has an error; the one that went deepest says most.
    first = max(error.errors(), key=lambda e: (e["type"] == "refused", len(e["loc"])))
    context = first.get("ctx") or {}
    if first["type"] == "json_invalid":
        what = context["error"].removesuffix(" at")
        return ApiError(400, f"the body is not valid JSON: {what} at character {first['loc'][1]}")
    if first["type"] == "refused":
        return ApiError(400, first["msg"], context["param"])
    place = _place(first["loc"][1:], error.body, first["type"] == "missing")
    if not place:
        return ApiError(400, "the body must be a JSON object, sent with Content-Type: application/json")
    return ApiError(400, f"{'.'.join(place)}: {first['msg']}", place[0])


def _place(location: Sequence[str | int], body: Any, missing: bool) -> list[str]:
    """The path of a field in the body; a location names also which of several types was tried."""
    place = []
    for part in location:
        inside = isinstance(part, int) and isinstance(body, list) and part < len(body)
        if inside or (isinstance(body, dict) and part in body):
            place.append(str(part))
            body = body[part]
    return [*place, str(location[-1])] if missing and location else place
