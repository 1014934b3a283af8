"""What the server says of itself."""

from typing import Any

import httpx
import pytest

from tests.server.conftest import NAME

GENERATE = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")


@pytest.fixture
def document(script_url: str) -> Any:
    return httpx.get(f"{script_url}/openapi.json").json()


def test_every_route_has_its_answers(document: Any) -> None:
    paths = document["paths"]
    assert {*GENERATE, "/v1/models", "/v1/messages/count_tokens", "/tokenize", "/detokenize"} < paths.keys()
    for path in GENERATE:
        (operation,) = paths[path].values()
        answers = operation["responses"]
        assert {"200", "400", "401", "404", "408", "413", "429", "500", "503", "504"} == answers.keys()
        assert answers["200"]["content"].keys() == {"application/json", "text/event-stream"}
        assert operation["requestBody"]["required"]
        error = answers["429"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert error == ("AnthropicError" if "messages" in path else "Error")


def test_it_names_the_model_and_nothing_that_is_not_there(document: Any) -> None:
    schemas = document["components"]["schemas"]
    assert schemas["ChatRequest"]["properties"]["model"]["enum"] == [NAME]
    assert "HTTPValidationError" not in schemas
    assert "422" not in str(document["paths"])


def test_no_page_comes_from_elsewhere(script_url: str) -> None:
    for path in ("/docs", "/redoc"):
        assert httpx.get(script_url + path).status_code == 404
