"""An endpoint for tests, as bad as the first part of its path says: python endpoint_server.py prints its port."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOOD = "Evidence: chosen often [1]\nTaste: plain things\nWants: something new\nNext: more of it\nKeep: [1]"
# What the first attempts of each request meet, by its number: all of it passes.
TROUBLE = ("fine", "error", "busy", "junk", "hang up")
seen: Counter[str] = Counter()
lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    """Answers chat completions."""

    def do_POST(self) -> None:
        """One request."""
        body = self.body = self.rfile.read(int(self.headers["Content-Length"]))
        mode = self.path.split("/")[1]
        with lock:
            seen["posts"] += 1
            seen[mode] += 1
            times = seen[body.decode()] = seen[body.decode()] + 1
            if times == 1:
                seen["different"] += 1
            number = seen["different"]
        if mode == "flaky":
            mode = TROUBLE[number % len(TROUBLE)] if times == 1 else "fine"
        if mode == "late":
            mode = "silent" if times == 1 else "fine"
        if mode == "dies":
            mode = "fine" if number <= 5 else "error"
        if mode == "key":
            mode = "fine" if self.headers.get("Authorization") == "Bearer right" else "unauthorised"
        getattr(self, mode.replace(" ", "_"))()

    def do_GET(self) -> None:
        """What was asked so far."""
        self._send(200, json.dumps({"posts": seen["posts"], "different": seen["different"]}).encode())

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _choice(self, reason: str = "stop", **message: object) -> None:
        choice = {"message": {"role": "assistant", **message}, "finish_reason": reason}
        self._send(200, json.dumps({"choices": [choice]}).encode())

    def fine(self) -> None:
        self._choice(content=GOOD)

    def error(self) -> None:
        self._send(500, b"oops")

    def busy(self) -> None:
        self._send(429, b"wait", Retry_After="0.05")

    def silent(self) -> None:
        self.rfile.read(1)  # until the other side has had enough, however long that takes
        self.close_connection = True

    def junk(self) -> None:
        self._send(200, b"<html>It works!</html>")

    def hang_up(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "999")
        self.end_headers()
        self.wfile.write(b'{"choices": ')

    def refuses(self) -> None:
        self._choice(content=None, refusal="I would rather not.")

    def filtered(self) -> None:
        self._send(400, b"content policy")

    def cut(self) -> None:
        self._choice("length", content=GOOD[:30])

    def empty(self) -> None:
        self._choice(content="  ")

    def redirect(self) -> None:
        self._send(302, b"", Location="http://user:word@elsewhere.invalid/v1?key=\x1b[2Jx")

    def drip(self) -> None:
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):  # until the other side has had enough
            while True:
                self.wfile.write(b" ")
                time.sleep(0.01)

    def huge(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(4 << 30))
        self.end_headers()

    def says(self) -> None:
        """The JSON that is the model's name."""
        self._send(200, json.loads(self.body)["model"].encode())

    def deep(self) -> None:
        self._send(200, b'{"choices":' * 200_000)

    def echo(self) -> None:
        key = self.headers["Authorization"].removeprefix("Bearer ")
        self._choice(content=f"{GOOD}\n\x1b[31m{key[:3]}\x00{key[3:]}\x9b \ud800 {key}")

    def echo_error(self) -> None:
        key = self.headers["Authorization"].removeprefix("Bearer ")
        slashed = key.replace("/", "\\/")
        self._send(401, f"\x1b[2J{'no ' * 30}\n{slashed} {key[:3]}\x00{key[3:]} {key * 99}".encode())

    def unauthorised(self) -> None:
        self._send(401, b"no such key")

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
