"""How a model is served, as plain data: the process of the engine hands it to the one that speaks HTTP."""

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    """folder, names: of the model, and what clients may call it. keys: SHA-256 digests of the keys that clients may
    show; none: anybody may ask. tls_cert, tls_key: files in PEM form; without them HTTP is plain.

    max_queue: choices that may wait while as many run as can; None: worked out from that. max_body: bytes of a
    request's body. request_timeout: seconds that a request may take in all, None for any time. grace: seconds in which
    answers have to end when the server is told to stop. linger: seconds for which a server whose engine has failed
    stays to say so, before it ends. traces: URL of a collector that is told of requests (`tracing`), None for nobody.
    """

    folder: str
    names: tuple[str, ...]
    keys: tuple[bytes, ...] = ()
    tls_cert: str | None = None
    tls_key: str | None = None
    max_queue: int | None = None
    max_body: int = 16 << 20
    request_timeout: float | None = None
    grace: float = 30.0
    linger: float = 60.0
    traces: str | None = None

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def of(plain: dict[str, Any]) -> "Settings":
        return Settings(**plain | {name: tuple(plain[name]) for name in ("names", "keys")})


def digests(keys: Iterable[str]) -> tuple[bytes, ...]:
    """What is kept of keys."""
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)
