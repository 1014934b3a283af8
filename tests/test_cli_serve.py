"""What `expertmesh serve` takes from OpenTelemetry's variables."""

import sys

import pytest

from expertmesh import InputError
from expertmesh.cli import main
from expertmesh.commands.serve import traces_of

BASE, TRACES = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
URL = "http://here:4318"


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({}, None),
        ({BASE: ""}, None),
        ({BASE: URL}, f"{URL}/v1/traces"),
        ({BASE: f"{URL}/"}, f"{URL}/v1/traces"),
        ({BASE: "https://[::1]/otlp"}, "https://[::1]/otlp/v1/traces"),
        ({TRACES: f"{URL}/own"}, f"{URL}/own"),
        ({BASE: URL, TRACES: "http://there/"}, "http://there/"),
        ({BASE: URL, "OTEL_SDK_DISABLED": "True"}, None),
        ({BASE: URL, "OTEL_TRACES_EXPORTER": "none"}, None),
        ({BASE: URL, "OTEL_TRACES_EXPORTER": "otlp"}, f"{URL}/v1/traces"),
        ({BASE: URL, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, f"{URL}/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, None),
    ],
)
def test_where_traces_go(environment: dict[str, str], url: str | None) -> None:
    assert traces_of(environment) == url


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({BASE: "here:4318"}, f"{BASE} must be a URL"),
        ({TRACES: "http://"}, f"{TRACES} must be a URL"),
        ({BASE: "http://here:port"}, "must be a URL such as http://localhost:4318, not 'http://here:port'"),
        ({BASE: URL, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "http/protobuf, not grpc"),
        ({BASE: URL, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"}, "http/protobuf, not http/json"),
    ],
)
def test_where_they_cannot_go(environment: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        traces_of(environment)


def test_without_the_extra_there_is_one_error_at_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "expertmesh.server.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert traces_of({}) is None
    monkeypatch.setenv(BASE, URL)
    code = main(["serve", "nowhere", "--port", "0"])
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"expertmesh: {BASE} asks for traces") and "pip install 'expertmesh[otel]'" in err
