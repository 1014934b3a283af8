"""Errors in the form of the API whose path was asked."""

import json
from typing import Any

import pytest

from expertmesh import InputError
from expertmesh.server.errors import ApiError
from expertmesh.server.worker import EngineStopped


@pytest.mark.parametrize(
    ("status", "openai", "anthropic"),
    [
        (400, "invalid_request_error", "invalid_request_error"),
        (401, "invalid_request_error", "authentication_error"),
        (404, "invalid_request_error", "not_found_error"),
        (405, "invalid_request_error", "invalid_request_error"),
        (413, "invalid_request_error", "request_too_large"),
        (429, "rate_limit_error", "rate_limit_error"),
        (500, "server_error", "api_error"),
        (503, "server_error", "overloaded_error"),
    ],
)
def test_forms(status: int, openai: str, anthropic: str) -> None:
    error = ApiError(status, "no", "field", "code", {"Retry-After": "3"})
    plain, other = error.response("/v1/chat/completions"), error.response("/v1/messages/count_tokens")
    told: Any = json.loads(bytes(plain.body))
    assert told == {"error": {"message": "no", "type": openai, "param": "field", "code": "code"}}
    told = json.loads(bytes(other.body))
    assert (told["type"], told["error"]) == ("error", {"type": anthropic, "message": "no"})
    for response in (plain, other):
        assert (response.status_code, response.headers["retry-after"]) == (status, "3")
        assert response.headers["content-type"] == "application/json"
    assert "error" in json.loads(bytes(error.response("/v1/messagesx").body))


def test_what_nobody_expected_is_not_explained() -> None:
    error = ApiError.of(ValueError("secret"))
    assert (error.status, "secret" in str(error)) == (500, False)
    assert ApiError.of(EngineStopped("it failed")).code == "engine_stopped"
    assert ApiError.of(InputError("top_p is 2, but must be a number from 0 to 1")).param == "top_p"
    assert ApiError.of(InputError("the prompt is empty")).param is None
