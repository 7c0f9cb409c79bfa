"""A headless Chromium, spoken to in its own protocol; for tests of pages that we write."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
START_SECONDS = 30


def chromium() -> str | None:
    """Returns the path of a Chromium, None if there is none; $CHROMIUM names another."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """An open page.

    Attributes:
      complaints: what the console and the network said that is no plain log line.
      requests: addresses that the page asked for.
    """

    def __init__(self, address: str):
        import websocket

        self._socket = websocket.create_connection(address, suppress_origin=True, timeout=30)
        self._count = 0
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Returns the answer to a call; events that come before it are noted."""
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv())
            self._note(message)
            if message.get("id") == self._count:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    def wait_for(self, event: str) -> None:
        """Returns when `event` comes."""
        while True:
            message = json.loads(self._socket.recv())
            self._note(message)
            if message.get("method") == event:
                return

    def _note(self, message: dict[str, Any]) -> None:
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.complaints.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])

    def open(self, path: Path, scheme: str = "light", width: int = 1200, height: int = 900) -> None:
        """Opens a file; `scheme` is the colour scheme that the reader prefers."""
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.send(f"{domain}.enable")
        self.send(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )
        self.size(width, height)
        self.send("Page.navigate", url=path.resolve().as_uri())
        self.wait_for("Page.loadEventFired")

    def size(self, width: int, height: int, scale: float = 1) -> None:
        """Sets the size of the window, in CSS pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )

    def evaluate(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def press(self, key: str, code: int = 0) -> None:
        """Presses and releases a key, as DOM names it; `code` is its Windows key code."""
        for kind in ("keyDown", "keyUp"):
            self.send(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code
            )

    def screenshot(self, path: Path, whole: bool = False) -> None:
        """Writes a PNG of the window, or of the whole page."""
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def open_browser() -> Iterator[Page]:
    """Yields an empty page of a browser that ends with the block."""
    program = chromium()
    assert program
    with tempfile.TemporaryDirectory() as profile:
        command = [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank",
        ]  # fmt: skip
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            port = _port(browser)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json", timeout=10) as answer:
                pages = [each for each in json.load(answer) if each["type"] == "page"]
            yield Page(pages[0]["webSocketDebuggerUrl"])
        finally:
            browser.kill()
            browser.wait()


def _port(browser: subprocess.Popen) -> int:
    """Returns the port that the browser says it listens on."""
    said = []
    for line in browser.stderr:
        said.append(line.decode(errors="replace"))
        if "DevTools listening on" in said[-1]:
            return int(said[-1].split("127.0.0.1:")[1].split("/")[0])
    raise RuntimeError(f"the browser did not start: {''.join(said)[-2000:]}")
