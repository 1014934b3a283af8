"""`expertmesh serve`: the OpenAI API over HTTP."""

import argparse
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from expertmesh.commands.arguments import add_model
from expertmesh.config import demo_model, name_of_model
from expertmesh.config.engine import parse_size
from expertmesh.errors import InputError
from expertmesh.launch.interfaces import is_loopback
from expertmesh.server.run import FrontEnded, Server, check_tls, listen, share_memory, url_of
from expertmesh.server.settings import Settings, digests

KEY = "EXPERTMESH_API_KEY"
# OpenTelemetry's variables: where spans go, those for traces alone first.
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    address = parser.add_argument_group("address")
    address.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    address.add_argument("--port", type=int, default=8000, help="default: 8000; 0 takes a free one")
    address.add_argument(
        "--name", action="append", metavar="NAME",
        help="the model's name in the API (default: its folder's); repeatable, for further names",
    )  # fmt: skip
    security = parser.add_argument_group("security")
    security.add_argument(
        "--api-key", action="append", default=[], metavar="KEY",
        help=f"clients must show it; repeatable, and {KEY} is one more. Other users of this machine can read a command "
        "line: a file is better",
    )  # fmt: skip
    security.add_argument("--api-key-file", metavar="FILE", help="a key in each line; # begins a comment")
    security.add_argument("--tls-cert", metavar="FILE", help="certificate, for https")
    security.add_argument("--tls-key", metavar="FILE", help="its private key")
    limits = parser.add_argument_group("limits (of a request's tokens: --max-context)")
    limits.add_argument(
        "--max-queue", type=int, metavar="INT",
        help="choices that wait at most, beyond those that run; more get status 429 (default: 16 for each that can "
        "run, at least 1024)",
    )  # fmt: skip
    limits.add_argument(
        "--max-body", default="16MiB", metavar="SIZE", help="of a request's body (default: 16MiB)"
    )
    limits.add_argument(
        "--request-timeout", type=float, metavar="SECONDS", help="that a request may take (default: any time)"
    )
    end = parser.add_argument_group("end")
    end.add_argument(
        "--grace", type=float, default=30.0, metavar="SECONDS",
        help="that requests have to end in after SIGTERM or Ctrl-C (default: 30)",
    )  # fmt: skip
    end.add_argument(
        "--linger", type=float, default=60.0, metavar="SECONDS",
        help="for which a server whose engine has failed says so, before it ends with status 1 (default: 60; inf: "
        "until it is told to)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    share_memory()
    settings = settings_of(args, os.environ)
    listener = listen(args.host, args.port)
    url = url_of(listener, settings)
    if not settings.keys and not is_local(args.host):
        print(
            f"expertmesh: {args.host} can be reached from other machines, and no --api-key is asked for: whoever "
            "reaches it can use it",
            file=sys.stderr,
        )
    try:
        with Server(settings, listener) as server:
            return _serve(args, server, url)
    except FrontEnded as error:
        print(f"expertmesh: {error}", file=sys.stderr)
        return 1
    return 0  # it was told to end before it could serve


def _serve(args: argparse.Namespace, server: Server, url: str) -> int:
    # With torch, which takes its time: the other process answers by now.
    from expertmesh.commands.loading import describe_served, load_llm
    from expertmesh.engine.telemetry import Telemetry
    from expertmesh.server.pump import Pump

    settings = server.settings
    with load_llm(args, server.loading, quiet=True) as llm:
        pump = Pump(llm.engine, server.send, settings.grace, settings.linger, Telemetry(llm.engine))
        server.attach(pump.put)
        about = describe_served(llm, settings.max_queue) | {"address": url}
        print("\n".join(f"{name:10} {value}" for name, value in about.items()), file=sys.stderr)

        def opened() -> None:
            print(f"serving {settings.names[0]} at {url}", file=sys.stderr, flush=True)

        if pump.run(about, opened):
            return 0
        if not pump.failed:
            raise server.front_ended()
        return 1


def settings_of(args: argparse.Namespace, environment: Mapping[str, str]) -> Settings:
    """InputError where an option is wrong, before anything is loaded."""
    check_tls(args.tls_cert, args.tls_key)
    if args.max_queue is not None and args.max_queue < 0:
        raise InputError(f"--max-queue is {args.max_queue}, but must be at least 0")
    for name in ("grace", "linger", "request_timeout"):
        value = getattr(args, name)
        least = 0.001 if name == "request_timeout" else 0
        if value is not None and (math.isnan(value) or value < least):
            raise InputError(
                f"--{name.replace('_', '-')} is {value:g}, but must be at least {least:g} seconds"
            )
    folder = Path(args.model) if args.model is not None else demo_model()
    return Settings(
        folder=str(folder),
        names=tuple(args.name or [name_of_model(folder)]),
        keys=digests(keys_of(args, environment)),
        tls_cert=args.tls_cert,
        tls_key=args.tls_key,
        max_queue=args.max_queue,
        max_body=parse_size("--max-body", args.max_body),
        request_timeout=args.request_timeout,
        grace=args.grace,
        linger=args.linger,
        traces=traces_of(environment),
    )


def keys_of(args: argparse.Namespace, environment: Mapping[str, str]) -> list[str]:
    """All keys that are given. InputError where one could not be shown in a header, or a file has none."""
    keys = list(args.api_key)
    if environment.get(KEY):
        keys.append(environment[KEY])
    if args.api_key_file is not None:
        try:
            lines = Path(args.api_key_file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text in UTF-8"
            raise InputError(f"--api-key-file {args.api_key_file}: {reason}") from None
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise InputError(f"--api-key-file {args.api_key_file}: there is no key in it, one in each line")
        keys += found
    if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise InputError("an API key must be of printable ASCII characters without spaces, and not empty")
    return keys


def traces_of(environment: Mapping[str, str]) -> str | None:
    """URL of the collector that OpenTelemetry's variables name; None where they name none, or turn it off. InputError
    where it cannot be spoken to."""
    name = next((name for name in ENDPOINTS if environment.get(name)), None)
    disabled = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if name is None or disabled or environment.get("OTEL_TRACES_EXPORTER", "otlp") not in ("", "otlp"):
        return None
    protocol = next((environment[name] for name in PROTOCOLS if environment.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        raise InputError(
            f"traces are sent by http/protobuf, not {protocol}: set {PROTOCOLS[0]}=http/protobuf, and {ENDPOINTS[0]} "
            "to the collector's address for that, which is port 4318 by custom"
        )
    try:
        parts = urlsplit(environment[name])
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise InputError(f"{name} must be a URL such as http://localhost:4318, not {environment[name]!r}")
    try:
        import expertmesh.server.tracing  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{name} asks for traces, which need packages of OpenTelemetry: pip install 'expertmesh[otel]', or unset "
            f"it ({error})"
        ) from None
    return environment[name] if name == ENDPOINTS[0] else environment[name].rstrip("/") + "/v1/traces"


def is_local(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    return host in ("localhost", "::1") or (host.count(".") == 3 and is_loopback(host))
