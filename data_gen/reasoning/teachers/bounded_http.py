"""HTTP requests to a server that nobody vouches for, bounded in where they go, in time, and in bytes.

Python's client follows redirects with all headers, a key among them, counts its timeout anew with every byte that
arrives, and reads a reply of any size. Here a redirect is an answer like any other, the timeout is that of the whole
request, and the bytes of a reply are counted as they arrive, its headers included.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import socket
import ssl
import time
import urllib.request
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import urlsplit


class Unanswered(Exception):
    """No whole answer came; the text says why in a word or two, and holds nothing that the server sent."""


class _TooLong(Exception):
    """More bytes than allowed."""


@dataclass(frozen=True)
class Answer:
    """What a server said.

    Attributes:
        status: Status code.
        body: The body, whole.
        retry_after: The header of that name.
        location: The header of that name: where a redirect points to.
    """

    status: int
    body: bytes
    retry_after: str = ""
    location: str = ""


@dataclass(frozen=True)
class _Bounds:
    deadline: float  # on the monotonic clock
    max_bytes: int

    def seconds_left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time of the whole request is over")
        return left


class _Reader(io.RawIOBase):
    """Reads a socket within bounds."""

    def __init__(self, raw: io.RawIOBase, sock: socket.socket, bounds: _Bounds) -> None:
        self._raw, self._sock, self._bounds, self._read = raw, sock, bounds, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._bounds.seconds_left())
        number = self._raw.readinto(buffer)
        self._read += number or 0
        if self._read > self._bounds.max_bytes:
            raise _TooLong
        return number

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, bounds: _Bounds, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self.fp = io.BufferedReader(_Reader(self.fp.detach(), sock, bounds))


class _Connection(http.client.HTTPConnection):
    def __init__(self, host: str, *, timeout: float, max_bytes: int, **options: Any) -> None:
        super().__init__(host, timeout=timeout, **options)
        self._bounds = _Bounds(time.monotonic() + timeout, max_bytes)
        self.response_class = partial(_Response, bounds=self._bounds)  # type: ignore[assignment]

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(self._bounds.seconds_left())  # for what is sent


class _SecureConnection(_Connection, http.client.HTTPSConnection):
    pass


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self._max_bytes = max_bytes
        self._tls = ssl.create_default_context()
        self._tls.set_alpn_protocols(["http/1.1"])

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_Connection, max_bytes=self._max_bytes), req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        secure = partial(_SecureConnection, max_bytes=self._max_bytes)
        return self.do_open(secure, req, context=self._tls)


class Client:
    """Posts to one server, from any number of threads.

    The proxies of the environment are used, but never for this machine: what is meant for it, a key included, is
    nobody else's business.

    Args:
        url: What is posted to.
        timeout_s: Seconds for a request, from the connection to the last byte of the reply.
        max_bytes: Bytes of a reply, headers included.
    """

    def __init__(self, url: str, timeout_s: float, max_bytes: int) -> None:
        self._url, self._timeout_s, self._max_bytes = url, timeout_s, max_bytes
        # Built by hand: the usual opener brings handlers for redirects, files and passwords.
        self._opener = urllib.request.OpenerDirector()
        proxies: dict[str, str] | None = {} if _is_here(url) else None
        for handler in (urllib.request.ProxyHandler(proxies), _Handler(max_bytes), urllib.request.UnknownHandler()):
            self._opener.add_handler(handler)

    def post(self, body: bytes, headers: dict[str, str]) -> Answer:
        """Send a request and read the reply, whatever its status.

        Raises:
            Unanswered: If there is no connection, no HTTP, not the whole reply, or if time or bytes ran out.
        """
        request = urllib.request.Request(self._url, body, headers)
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                if (response.length or 0) > self._max_bytes:
                    raise _TooLong
                # A number, because without one a claimed length is allocated before a byte of it is there.
                raw = bytes(response.read(self._max_bytes))
                if response.length:
                    raise http.client.IncompleteRead(b"", response.length)
                found = response.headers
                return Answer(
                    int(response.status), raw, str(found.get("Retry-After", "")), str(found.get("Location", ""))
                )
        except _TooLong:
            raise Unanswered(f"a reply of more than {self._max_bytes} bytes") from None
        except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:
            reason = getattr(error, "reason", None)  # of a connection that could not be made
            inner = f" ({type(reason).__name__})" if isinstance(reason, Exception) else ""
            raise Unanswered(type(error).__name__ + inner) from error


def _is_here(url: str) -> bool:
    """Whether a URL names this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost" or host.endswith(".localhost")
