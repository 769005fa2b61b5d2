"""A real server in its own process: it answers, batches, notices who hangs up, ends quietly, and refuses early."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from reasonrec.recipes import serve
from reasonrec.recipes.recommender import Recommender
from reasonrec.recipes.serve import ServeConfig, is_loopback, listen
from reasonrec.tokenizers.errors import UserError

RECIPES = Path(__file__).parents[2] / "recipes"
HTTP = httpx.Client(timeout=120)  # a busy machine is no failure


class Server:
    """`recipes/serve.py` on a free port."""

    def __init__(self, model: Path, *flags: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(RECIPES / "serve.py"), "--model", str(model), "--port", "0", *flags],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "ACCELERATE_USE_CPU": "1", **environment},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.said: list[str] = []
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith("serving "):
                self.url = line.split(" on ")[1].split(" ")[0]
                return
        raise AssertionError("".join(self.said))

    def stop(self, how: int = signal.SIGTERM) -> tuple[int, str]:
        """The exit status, and what else was said."""
        self.process.send_signal(how)
        rest, _ = self.process.communicate(timeout=120)
        return self.process.returncode, rest


@pytest.fixture
def server_of(adapter: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(*flags: str, **environment: str) -> Server:
        servers.append(Server(adapter, *flags, **environment))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


@pytest.mark.slow
def test_a_later_catalogue_is_picked_up_and_nobody_notices(
    server_of: Callable[..., Server], adapter: Path, later_version: Callable[..., Path], tmp_path: Path
) -> None:
    own = Recommender.from_pretrained(adapter, dtype="fp32", device="cpu").policy.catalogue
    folder = later_version(own, tmp_path / "catalogue", new=1)
    server = server_of("--catalogue", str(folder))
    history = [*own.item_ids[:2], "new-2"]

    def ask() -> dict[str, Any]:
        answer = HTTP.post(f"{server.url}/v1/recommend", json={"history": history, "k": 4})
        assert answer.status_code == 200, answer.text
        return answer.json()["results"][0]

    def items() -> int:
        return int(HTTP.get(f"{server.url}/v1/models").json()["data"][0]["items"])

    def search() -> list[str]:
        answer = HTTP.get(f"{server.url}/v1/items/search", params={"q": "new item"})
        return [item["id"] for item in answer.json()["items"]]

    assert items() == own.n_items + 1
    assert ask()["unknown"] == 1
    assert search() == ["new-0"]
    later_version(own, folder, new=4, retired=[0])
    while items() == own.n_items + 1:  # nobody is refused meanwhile
        ask()
    assert items() == own.n_items + 4
    assert ask()["unknown"] == 0
    assert search() == [f"new-{n}" for n in range(4)]
    # What is no later version changes nothing, and the log says why.
    later_version(replace(own, items=own.items.reverse()), folder, new=5)
    for line in iter(server.process.stdout.readline, ""):  # type: ignore[union-attr]
        if "the catalogue stays as it was" in line:
            assert "numbers the items in another order" in line
            break
    assert items() == own.n_items + 4
    assert ask()["unknown"] == 0
    status, _ = server.stop()
    assert status == 0


@pytest.mark.slow
def test_many_clients_at_once(server_of: Callable[..., Server], adapter: Path) -> None:
    server = server_of("--max_batch", "8", "--precision", "fp32")
    recommender = Recommender.from_pretrained(adapter, dtype="fp32", device="cpu")
    ids = recommender.policy.catalogue.item_ids

    def ask(first: int) -> list[str]:
        answer = HTTP.post(f"{server.url}/v1/recommend", json={"history": ids[first : first + 3], "k": 4})
        return [item["id"] for item in answer.json()["results"][0]["items"]]

    with ThreadPoolExecutor(16) as clients:
        found = list(clients.map(ask, range(32)))
    alone = recommender.recommend([ids[first : first + 3] for first in range(32)], k=4)
    assert found == [[item.id for item in row] for row in alone]
    assert HTTP.get(f"{server.url}/health").json() == {"status": "ok"}
    status, rest = server.stop()
    assert status == 0, rest
    assert rest == "stopped\n"


def test_who_sends_far_too_much_is_told(server_of: Callable[..., Server]) -> None:
    server = server_of("--max_body", "1000")
    host, port = server.url.removeprefix("http://").split(":")
    chunk = b"x" * 1_000_000
    for length, part in (
        (b"Content-Length: 30000000", chunk),
        (b"Transfer-Encoding: chunked", b"f4240\r\n%s\r\n" % chunk),
    ):
        with socket.create_connection((host, int(port)), timeout=120) as client:
            client.sendall(b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\n" + length + b"\r\n\r\n")
            for _ in range(30):  # more than the two kernels hold: a server that answers and closes would reset it
                client.sendall(part)
            answer = b""
            while not answer.endswith(b"}"):
                answer += client.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"the body is longer than 1000 bytes" in answer
    assert HTTP.post(f"{server.url}/v1/recommend", json={"history": ["0-0-0"], "k": 2}).status_code == 200


@pytest.mark.slow
def test_who_hangs_up_gives_the_slot_back(server_of: Callable[..., Server], adapter: Path) -> None:
    server = server_of("--unproven", "true", "--max_chain", "100", "--capacity", "1")
    given = {"history": ["0-0-0"], "k": 2, "mode": "reasoning", "stream": True}
    with HTTP.stream("POST", f"{server.url}/v1/recommend", json=given) as answer:
        assert next(answer.iter_lines()) == "event: thought"
    # The only slot is taken until the server notices; then somebody else is answered, long before 100 tokens.
    refused = 0
    while (second := HTTP.post(f"{server.url}/v1/recommend", json={"history": ["0-0-1"], "k": 2})).status_code == 429:
        assert second.headers["retry-after"] == "1"
        refused += 1
    assert second.status_code == 200
    assert "reasonrec_users_open 0.0" in HTTP.get(f"{server.url}/metrics").text
    status, rest = server.stop(signal.SIGINT)
    assert (status, rest) == (0, "stopped\n")


@pytest.mark.slow
def test_it_finishes_what_was_asked_before_the_signal(server_of: Callable[..., Server]) -> None:
    server = server_of("--unproven", "true", "--max_chain", "30")
    given = {"history": ["0-0-0"], "k": 2, "mode": "reasoning", "stream": True}
    with HTTP.stream("POST", f"{server.url}/v1/recommend", json=given) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: thought"
        server.process.send_signal(signal.SIGTERM)
        text = list(lines)
    assert "event: result" in text
    assert len(json.loads(text[text.index("event: result") + 1].removeprefix("data: "))["items"]) == 2
    assert server.process.wait(timeout=120) == 0


@pytest.mark.slow
def test_a_token_lets_others_in(server_of: Callable[..., Server]) -> None:
    server = server_of("--host", "0.0.0.0", REASONREC_TOKEN="sesame")
    assert "sesame" not in "".join(server.said)
    local = server.url.replace("0.0.0.0", "127.0.0.1")
    assert HTTP.get(f"{local}/v1/models").status_code == 401
    assert HTTP.get(f"{local}/v1/models", headers={"authorization": "Bearer sesame"}).status_code == 200


@pytest.mark.slow
def test_the_example_client(server_of: Callable[..., Server], adapter: Path) -> None:
    server = server_of("--unproven", "true", "--max_chain", "4", "--precision", "fp32")
    example = RECIPES.parent / "examples" / "serve_client.py"
    words = [sys.executable, str(example), server.url, "0-0-0", "0-0-1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    direct, thinking = done.stdout.split("\nwith a chain of thought:\n")
    recommender = Recommender.from_pretrained(adapter, dtype="fp32", device="cpu")
    best = recommender.recommend(["0-0-0", "0-0-1"], k=5)
    assert [line.split("  ")[2] for line in direct.splitlines()] == [item.title for item in best]
    explained = recommender.explain(["0-0-0", "0-0-1"], k=5, unproven=True, max_chain=4)
    assert thinking.splitlines()[-6:] == [
        explained.thoughts[0], *(f"     {item.title}" for item in explained.recommendations)
    ]  # fmt: skip


def test_what_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REASONREC_TOKEN", raising=False)
    with pytest.raises(UserError, match=r"host=0\.0\.0\.0 can be reached from other machines: .*REASONREC_TOKEN"):
        ServeConfig(model="m", host="0.0.0.0")
    monkeypatch.setenv("REASONREC_TOKEN", "sesame")
    assert ServeConfig(model="m", host="0.0.0.0").hosts == []
    assert "localhost" in ServeConfig(model="m").hosts
    assert ServeConfig(model="m", allowed_hosts=["Shop.Example"]).hosts == ["shop.example"]
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"serving needs fastapi.*pip install 'reasonrec\[serve\]'"):
        ServeConfig(model="m")


@pytest.mark.parametrize(
    ("host", "only_here"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("example.org", False), ("192.168.0.4", False)],
)  # fmt: skip
def test_loopback(host: str, only_here: bool) -> None:
    assert is_loopback(host) is only_here


def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port={port} cannot be listened on .*choose another --port"):
            listen("127.0.0.1", port)
    with pytest.raises(UserError, match="cannot be listened on"):
        listen("no.such.host.invalid", 0)


def test_listening_begins_at_once() -> None:
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname(), timeout=5):
        pass
