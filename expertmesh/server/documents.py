"""What the server says of itself: the answers of its routes, for /openapi.json."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI

# What the statuses mean that routes may answer with.
_ERRORS = {
    400: "The request cannot be answered as it is; the message says why.",
    401: "No key, or a wrong one.",
    404: "No such model.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    429: "Too much is waiting; try again after the time in Retry-After.",
    500: "The engine has failed, or the server has a fault.",
    503: "The server is starting or stopping.",
    504: "It took longer than a request may take.",
}

# One event of a stream. Events are named by their type in all APIs but OpenAI's completions, whose last one is [DONE].
_EVENT = {
    "type": "object",
    "properties": {
        "event": {"type": "string"},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
    "required": ["data"],
}


def answers(answer: Any, error: Any, *errors: int, stream: bool = False) -> dict[int | str, dict[str, Any]]:
    """Responses of a route that gives an answer, or one of these errors or those that every route may give. stream:
    it can come as server-sent events too."""
    content: dict[str, Any] = {"text/event-stream": {"schema": _EVENT}} if stream else {}
    found: dict[int | str, dict[str, Any]] = {
        200: {"model": answer, "content": content, "description": "The answer."}
    }
    for status in sorted({401, 408, 413, 429, 500, 503, 504, *errors}):
        found[status] = {"model": error, "description": _ERRORS[status]}
    return found


def describe(app: FastAPI, names: Sequence[str]) -> None:
    """Let the document of the application hold only what it answers: bodies that do not fit get 400 here, not 422, and
    models have these names."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        schemas = document["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for schema in schemas.values():
            named = schema.get("properties", {}).get("model", {})
            for form in (named, *named.get("anyOf", ())):
                if form.get("type") == "string":
                    form["enum"] = list(names)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
