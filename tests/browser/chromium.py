"""A headless Chromium on the DevTools protocol: start it, open a page, hear what it complains of, look at it.

The client speaks WebSocket (RFC 6455) with the standard library alone; it needs text frames, pings and fragments, no more.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.patience import PATIENCE

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-extensions", "--disable-dev-shm-usage", "--mute-audio",
    "--no-default-browser-check", "--hide-scrollbars", "--remote-debugging-port=0", "--proxy-server=127.0.0.1:9",
)  # fmt: skip
"""The proxy is a port where nothing listens: a page that asks for the network fails and is heard."""


def find_chromium(install: bool = False) -> str | None:
    """The path of a Chromium: one on PATH or, if ``install`` and this user may, Debian's, installed now."""
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found or not install or shutil.which("apt-get") is None or os.geteuid() != 0:
        return found
    get = ["apt-get", "install", "-y", "--no-install-recommends", "chromium"]
    for command in (get, ["apt-get", "update"], get):
        done = subprocess.run(
            command, capture_output=True, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, check=False
        )
        if command is get and done.returncode == 0:
            return shutil.which("chromium")
    return None


class WebSocket:
    """A client connection to ``ws://host:port/path``."""

    def __init__(self, url: str, timeout: float) -> None:
        host, path = url.removeprefix("ws://").split("/", 1)
        name, port = host.rsplit(":", 1)
        self._socket = socket.create_connection((name, int(port)), timeout)
        key = base64.b64encode(os.urandom(16)).decode()
        lines = [f"GET /{path} HTTP/1.1", f"Host: {host}", "Upgrade: websocket", "Connection: Upgrade"]
        lines += [f"Sec-WebSocket-Key: {key}", "Sec-WebSocket-Version: 13", "", ""]
        self._socket.sendall("\r\n".join(lines).encode())
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += self._read(1)
        if b" 101 " not in head.split(b"\r\n", 1)[0]:
            raise ConnectionError(f"the browser refused the connection: {head!r}")

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise ConnectionError("the browser closed the connection")
            data += part
        return bytes(data)

    def send(self, text: str, opcode: int = 1) -> None:
        """Send one frame, masked as clients must."""
        payload, mask = text.encode(), os.urandom(4)
        if len(payload) < 126:
            head = struct.pack("!BB", 0x80 | opcode, 0x80 | len(payload))
        elif len(payload) < 1 << 16:
            head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, len(payload))
        else:
            head = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, len(payload))
        self._socket.sendall(head + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload)))

    def receive(self, timeout: float) -> str:
        """The next message; :class:`TimeoutError` where none comes."""
        self._socket.settimeout(timeout)
        message = bytearray()
        while True:
            first, second = self._read(2)
            size = second & 0x7F
            if size >= 126:
                size = int.from_bytes(self._read(2 if size == 126 else 8))
            payload, opcode = self._read(size), first & 0x0F
            if opcode == 8:
                raise ConnectionError("the browser closed the connection")
            if opcode == 9:
                self.send(payload.decode("latin-1"), opcode=10)
            if opcode in (0, 1):
                message += payload
                if first & 0x80:
                    return message.decode()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


class Page:
    """One tab. ``complaints`` collects console errors, exceptions, policy violations and requests that leave the machine."""

    def __init__(self, websocket: str) -> None:
        self._socket = WebSocket(websocket, 60)
        self._number = 0
        self.complaints: list[str] = []
        self.events: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self.call(f"{domain}.enable")
        self.call("Page.bringToFront")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        self._number += 1
        number = self._number
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.receive(60))
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                result: dict[str, Any] = message["result"]
                return result
            self._hear(message)

    def _hear(self, message: dict[str, Any]) -> None:
        method, what = message.get("method", ""), message.get("params", {})
        self.events.append(method)
        if method == "Runtime.consoleAPICalled" and what["type"] in ("error", "warning", "assert"):
            self.complaints.append(f"console {what['type']}: {[arg.get('value') for arg in what['args']]}")
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(f"exception: {what['exceptionDetails']}")
        elif method == "Log.entryAdded" and what["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"log {what['entry']['level']}: {what['entry']['text']}")
        elif method == "Audits.issueAdded" and what["issue"]["code"] == "ContentSecurityPolicyIssue":
            self.complaints.append(f"policy: {what['issue']['details']}")
        elif method == "Network.requestWillBeSent":
            url = what["request"]["url"]
            if not url.startswith(("file:", "data:", "blob:", "about:")):
                self.complaints.append(f"request: {url}")
        elif method == "Page.javascriptDialogOpening":
            self.complaints.append(f"dialog: {what['message']}")
            # Not `call`: the answer of the call that is under way may come first, and must not be lost.
            self._number += 1
            accept = {"id": self._number, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
            self._socket.send(json.dumps(accept))

    def open(self, file: Path) -> None:
        """Open a file and wait until it has loaded."""
        self.events.clear()
        self.call("Page.navigate", url=file.resolve().as_uri())
        self.wait("document.readyState === 'complete' && location.protocol === 'file:'")

    def wait(self, condition: str, seconds: float = 30) -> None:
        """Wait until an expression is true in the page."""
        end = time.monotonic() + seconds
        while not self.value(condition):
            if time.monotonic() > end:
                raise TimeoutError(f"never true in the page: {condition}")
            time.sleep(0.05)

    def point(self, element: str, condition: str, seconds: float = 30) -> None:
        """Move the pointer to the middle of an element until an expression is true. The element is looked for anew each time: a
        page that is still being laid out moves it away."""
        end = time.monotonic() + seconds
        while True:
            self.value(f"{element}.scrollIntoView({{behavior: 'instant', block: 'center'}})")
            box = f"(({{left, top, width, height}}) => [left + width / 2, top + height / 2])({element}.getBoundingClientRect())"
            x, y = self.value(box)
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
            with contextlib.suppress(TimeoutError):
                self.wait(condition, 1)
                return
            if time.monotonic() > end:
                raise TimeoutError(f"never true in the page with the pointer at {x:.0f}, {y:.0f}: {condition}")

    def value(self, expression: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def look(self, *, width: int, height: int, dark: bool = False, phone: bool = False, print_: bool = False) -> None:
        """Set the size of the view and the preferred colours."""
        scale = 2 if phone else 1
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media="print" if print_ else "", features=features)

    def screenshot(self, file: Path, *, full: bool = True) -> None:
        """Save a picture of the page."""
        result = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=full)
        file.write_bytes(base64.b64decode(result["data"]))

    def pdf(self) -> bytes:
        """The page as it prints."""
        return base64.b64decode(self.call("Page.printToPDF", printBackground=False, preferCSSPageSize=True)["data"])

    def key(self, name: str, code: int) -> None:
        """Press and release a key."""
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)

    def close(self) -> None:
        """Close the tab."""
        self.call("Page.close")
        self._socket.close()


class Browser:
    """A running Chromium with a profile of its own, gone with everything it wrote when the block ends."""

    def __init__(self, program: str) -> None:
        self.program = program

    def __enter__(self) -> Self:
        self._profile = tempfile.TemporaryDirectory(prefix="browser-", ignore_cleanup_errors=True)
        command = [self.program, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        port = Path(self._profile.name) / "DevToolsActivePort"
        end = time.monotonic() + PATIENCE
        while not (port.is_file() and port.read_text().count("\n")):
            if self._process.poll() is not None or time.monotonic() > end:
                self.__exit__(None, None, None)
                raise RuntimeError(f"{self.program} did not start (exit code {self._process.poll()})")
            time.sleep(0.05)
        self._home = f"http://127.0.0.1:{port.read_text().splitlines()[0]}"
        return self

    def page(self) -> Page:
        """A new tab."""
        request = urllib.request.Request(f"{self._home}/json/new?about:blank", method="PUT")
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=PATIENCE) as answer:
            return Page(json.load(answer)["webSocketDebuggerUrl"])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
        self._profile.cleanup()
