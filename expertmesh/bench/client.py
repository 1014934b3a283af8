"""One client of an OpenAI-compatible server that times what it is sent.

On aiohttp, whose parser is compiled: client and server often share a machine, and what the client takes of it the
server lacks. Each piece of an answer is timed when it is read.
"""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from expertmesh.errors import InputError

IDLE = 1.0  # seconds after which a connection is not used again: servers close them after 5, often just then


@dataclass
class Timing:
    """What became of one request. Times are of `time.perf_counter`, in seconds.

    asked: tokens of the prompt and most of the output, as wanted; input, output, cached: as the server counted. due:
    when it should have been sent. texts: when each piece of text came. events: of the stream. end: when the answer
    was complete, or had failed. error: its kind, None where all went well; message: what was said of it.
    """

    asked: tuple[int, int]
    due: float
    sent: float = 0.0
    end: float = 0.0
    texts: list[float] = field(default_factory=list)
    events: int = 0
    input: int = 0
    output: int = 0
    cached: int = 0
    text: str = ""
    error: str | None = None
    message: str = ""

    def count(self, usage: dict[str, Any]) -> None:
        self.input, self.output = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
        self.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


class _Failed(Exception):
    """kind: short, the same for the same cause."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Client:
    """url: of the server, or of its /v1. timeout: seconds for a whole answer. reuse: connections for several requests;
    a server may close one just when it is used again, which looks like a fault. An async context manager."""

    def __init__(self, url: str, key: str | None = None, timeout: float = 600.0, reuse: bool = True) -> None:
        self.url, self._reuse = base_url(url), reuse
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._timeout = timeout

    async def __aenter__(self) -> "Client":
        self._session = aiohttp.ClientSession(
            headers=self._headers,
            connector=self._connector(),
            timeout=aiohttp.ClientTimeout(total=self._timeout),
            read_bufsize=1 << 18,
        )
        return self

    def _connector(self) -> aiohttp.TCPConnector:
        if self._reuse:
            return aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE)
        return aiohttp.TCPConnector(limit=0, force_close=True)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def models(self) -> list[str]:
        """Names of the models there. InputError where nobody answers, or no model is there."""
        try:
            async with self._session.get(f"{self.url}/models") as response:
                body = await response.json(content_type=None)
                names = [entry["id"] for entry in body["data"]]
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise InputError(f"{self.url} does not answer: {error or type(error).__name__}") from None
        except (ValueError, KeyError, TypeError):
            raise InputError(
                f"{self.url}/models does not list models as an OpenAI-compatible server does"
            ) from None
        if not names:
            raise InputError(f"{self.url}/models lists no model")
        return names

    async def ask(self, path: str, body: bytes, timing: Timing, keep: bool = False) -> Timing:
        """Send one request and wait for the end of its answer, which may be a failure: nothing is raised. keep: also
        the text."""
        timing.sent = perf_counter()
        try:
            async with self._session.post(self.url + path, data=body) as response:
                if response.status != 200:
                    raise _Failed(str(response.status), await _said(response))
                if response.content_type == "text/event-stream":
                    await _follow(response, timing, keep)
                else:
                    answer = json.loads(await response.read())
                    timing.count(answer.get("usage") or {})
                    timing.text = "".join(map(_text, answer["choices"])) if keep else ""
        except _Failed as error:
            timing.error, timing.message = error.kind, str(error)
        except TimeoutError:
            timing.error, timing.message = "timeout", f"no end within {self._timeout:g} s"
        except aiohttp.ClientConnectorError as error:
            timing.error, timing.message = "no connection", str(error)
        except (aiohttp.ClientError, OSError) as error:
            timing.error, timing.message = "broken off", str(error) or type(error).__name__
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            timing.error, timing.message = "not understood", f"{type(error).__name__}: {error}"
        timing.end = perf_counter()
        return timing

    async def count(self, path: str, body: dict[str, Any]) -> int:
        """Tokens of a prompt, as the server counts them. InputError where it does not answer."""
        found = await self.ask(path, json.dumps(body).encode(), Timing((0, 0), 0.0))
        if found.error is not None:
            raise InputError(f"{self.url}{path} answered {found.error}: {found.message}")
        return found.input


def base_url(text: str) -> str:
    """With /v1 where there is no path. InputError where it is no URL of HTTP."""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InputError(f"{text!r} is no URL of a server; give one like http://127.0.0.1:8000")
    return text.rstrip("/") + ("" if parts.path.strip("/") else "/v1")


async def _follow(response: aiohttp.ClientResponse, timing: Timing, keep: bool) -> None:
    """Read an event stream to its [DONE]."""
    done = False
    async for time, data in _events(response):
        if data == b"[DONE]":
            done = True
            continue
        event = json.loads(data)
        timing.events += 1
        if event.get("error"):
            raise _Failed("error in the stream", str(event["error"].get("message")))
        if event.get("usage"):
            timing.count(event["usage"])
        if text := "".join(map(_text, event.get("choices") or ())):
            timing.texts.append(time)
            if keep:
                timing.text += text
    if not done:
        raise _Failed("broken off", "the stream ended before [DONE]")


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[float, bytes]]:
    """Data of the events with the time when each was complete."""
    rest = b""
    async for block in response.content.iter_any():
        time = perf_counter()
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield time, line[5:].strip()


def _text(choice: dict[str, Any]) -> str:
    """Of a choice, in any of the forms: a completion, a message, or what is new of one. Thoughts count too."""
    said = choice.get("delta") or choice.get("message")
    if said is None:
        return choice.get("text") or ""
    return (said.get("reasoning_content") or "") + (said.get("content") or "")


async def _said(response: aiohttp.ClientResponse) -> str:
    """What an error says."""
    body = await response.text(errors="replace")
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200] or str(response.reason)
