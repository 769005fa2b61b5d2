"""A request goes to one address and takes so much time and so many bytes, whatever the other side does."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from reasonrec.data_gen.reasoning.teachers.bounded_http import Client, Unanswered

OK = b"HTTP/1.1 200 OK\r\n"
Serve = Callable[..., str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server that sends the same bytes to everybody, then perhaps one more byte now and then, for ever."""
    listeners, over, requests = [], threading.Event(), []

    def talk(listener: socket.socket, first: bytes, drip: bytes) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with contextlib.suppress(OSError), connection:
                    requests.append(connection.recv(65536))
                    connection.sendall(first)
                    while drip and not over.wait(0.01):
                        connection.sendall(drip)
                    connection.shutdown(socket.SHUT_WR)
                    connection.recv(65536)  # until the other side has read it

    def start(first: bytes, drip: bytes = b"") -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        threading.Thread(target=talk, args=(listener, first, drip), daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"

    start.requests = requests  # type: ignore[attr-defined]
    yield start
    over.set()
    for listener in listeners:
        listener.close()


@pytest.mark.parametrize(
    ("first", "why"),
    [
        (OK + b"Content-Length: 4294967296\r\n\r\n", "a reply of more than 1000 bytes"),
        (OK + b"\r\n" + b"x" * 2000, "a reply of more than 1000 bytes"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 500, "a reply of more than 1000 bytes"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n" + b"x" * 2000, "more than 1000 bytes"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 100, "a reply of more than 1000 bytes"),
        (OK + b"X: y\r\n" * 300, "a reply of more than 1000 bytes"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nxx", "ValueError|IncompleteRead"),
        (OK + b"Content-Length: 9\r\n\r\nxx", "IncompleteRead"),
        (b"220 smtp.example ESMTP\r\n", "BadStatusLine"),
        (b"", "RemoteDisconnected"),
    ],
)
def test_a_reply_that_is_too_long_or_none(serve: Serve, first: bytes, why: str) -> None:
    with pytest.raises(Unanswered, match=f"^({why})|{why}$"):
        Client(serve(first), 60, 1000).post(b"{}", {})


@pytest.mark.parametrize(
    ("first", "drip"),
    [
        (b"HTTP/1.1 ", b"2"),
        (OK, b"X"),
        (OK + b"\r\n{", b" "),
        (b"HTTP/1.1 401 No\r\n\r\n{", b" "),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    ],
)
def test_the_time_is_that_of_the_whole_request(serve: Serve, first: bytes, drip: bytes) -> None:
    with pytest.raises(Unanswered, match="TimeoutError"):
        Client(serve(first, drip), 0.3, 1 << 20).post(b"{}", {})


def test_what_fits_arrives_whole(serve: Serve) -> None:
    assert Client(serve(OK + b"\r\n" + b"x" * 900), 60, 1000).post(b"{}", {}).body == b"x" * 900
    limited = Client(serve(b"HTTP/1.1 429 Slow\r\nRetry-After: 7\r\nContent-Length: 2\r\n\r\nno"), 60, 1000)
    answer = limited.post(b"{}", {})
    assert (answer.status, answer.body, answer.retry_after) == (429, b"no", "7")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_an_answer_and_not_followed(serve: Serve, status: int) -> None:
    elsewhere = serve(OK + b"\r\n")
    url = serve(f"HTTP/1.1 {status} Moved\r\nLocation: {elsewhere}\r\nContent-Length: 0\r\n\r\n".encode())
    answer = Client(url, 60, 1000).post(b"{}", {"Authorization": "Bearer key"})
    assert (answer.status, answer.location) == (status, elsewhere)
    assert len(serve.requests) == 1  # type: ignore[attr-defined]


def test_a_proxy_is_asked_for_others_and_not_for_this_machine(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", serve(OK + b"\r\nfrom the proxy").removesuffix("/v1"))
    direct = serve(OK + b"\r\ndirect")
    assert Client(direct, 60, 1000).post(b"{}", {}).body == b"direct"
    assert Client(direct.replace("127.0.0.1", "localhost"), 60, 1000).post(b"{}", {}).body == b"direct"
    assert Client("http://teacher.invalid/v1", 60, 1000).post(b"{}", {}).body == b"from the proxy"
