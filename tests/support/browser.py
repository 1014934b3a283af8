"""A headless Chromium, driven by the DevTools protocol: enough to open a page, type, look, and hear what it complains
of."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 30.0  # seconds until something that is waited for is a failure
KEYS = {
    "Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
    "ArrowDown": 40,
}  # fmt: skip
COMPLAINTS = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")


def needed(names: tuple[str, ...], package: str) -> str:
    """Path of a program. Where it is missing the test is skipped, but in CI, where it must not be."""
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        say = pytest.fail if os.environ.get("CI") else pytest.skip
        say(f"this test needs {package}: apt-get install {package}")
    return found


class Page:
    """One tab. complaints: what it wrote into its console, and what it was forbidden."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._ids = socket, itertools.count(1)
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log"):
            self.tell(f"{domain}.enable")

    def tell(self, method: str, **params: Any) -> Any:
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(timeout=PATIENCE))
            if message.get("method") in COMPLAINTS:
                self.complaints.append(json.dumps(message["params"])[:500])
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def js(self, expression: str) -> Any:
        """What an expression is in the page; promises are waited for."""
        result = self.tell("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def open(self, url: str, width: int = 1500, height: int = 1000, theme: str = "light") -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.tell("Emulation.setDeviceMetricsOverride", **size)
        features = [
            {"name": "prefers-color-scheme", "value": theme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.tell("Emulation.setEmulatedMedia", features=features)
        self.tell("Page.navigate", url=url)

    def until(self, expression: str, good: Callable[[Any], bool] = bool) -> Any:
        """Wait until the expression is good, and return it."""
        end = time.monotonic() + PATIENCE
        while not good(found := self.js(f"document.readyState === 'complete' && ({expression})")):
            assert time.monotonic() < end, f"{expression} is still {found!r}; {self.complaints}"
            time.sleep(0.05)
        return found

    def text(self, selector: str) -> str:
        found = self.js(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")
        assert isinstance(found, str)
        return found

    def press(self, key: str) -> None:
        code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        if key == "Enter":
            code["text"] = "\r"
        self.tell("Input.dispatchKeyEvent", type="keyDown", **code)
        self.tell("Input.dispatchKeyEvent", type="keyUp", **code)

    def write(self, text: str) -> None:
        """Into what has the focus."""
        self.tell("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        self.js(f"document.querySelector({json.dumps(selector)}).click()")

    def picture(self) -> bytes:
        return base64.b64decode(self.tell("Page.captureScreenshot", format="png")["data"])


@contextmanager
def chromium(profile: Path) -> Iterator[Callable[[], Page]]:
    """What opens tabs. Leaving ends the browser."""
    program = needed(NAMES, "chromium")
    command = [
        program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            with ExitStack() as tabs:
                yield lambda: tabs.enter_context(_tab(_port(profile)))
        finally:
            process.terminate()


def _port(profile: Path) -> int:
    """The browser writes it down when it listens."""
    end, file = time.monotonic() + PATIENCE, profile / "DevToolsActivePort"
    while not file.exists() or "\n" not in (text := file.read_text()):
        assert time.monotonic() < end, "the browser does not listen"
        time.sleep(0.05)
    return int(text.split("\n")[0])


@contextmanager
def _tab(port: int) -> Iterator[Page]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        address = json.load(answer)["webSocketDebuggerUrl"]
    with connect(address, max_size=None, ping_interval=None) as socket:
        yield Page(socket)
