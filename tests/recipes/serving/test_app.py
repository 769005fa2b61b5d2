"""The interface: raw ids in, items out, and one line of reason for everything else."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from reasonrec.recipes.recommender import Recommender
from reasonrec.recipes.serving.app import build_app
from reasonrec.recipes.serving.engine import Engine
from reasonrec.recipes.serving.guards import Guard
from reasonrec.recipes.serving.metrics import Metrics
from reasonrec.recipes.serving.service import Limits, Service

Client = Callable[..., TestClient]


@pytest.fixture
def client_of(engine_of: Callable[..., Engine]) -> Client:
    def make(
        limits: Limits | None = None, *, token: str | None = None, max_body: int = 10_000, **settings: Any
    ) -> TestClient:
        engine, metrics = engine_of(**{"wait": 0.0, **settings}), Metrics()
        engine._measured = metrics.batch
        app = build_app(Service(engine, "tiny", limits or Limits()), metrics)
        return TestClient(Guard(app, token=token, hosts=["testserver"], max_body=max_body))

    return make


@pytest.fixture
def client(client_of: Client) -> TestClient:
    return client_of(Limits(max_k=20, max_history=8, max_users=3))


@pytest.fixture(scope="module")
def ids(served: Recommender) -> list[str]:
    return served.policy.catalogue.item_ids


def events(text: str) -> Iterator[tuple[str, Any]]:
    for block in text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        yield name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


def test_one_user_and_several(client: TestClient, served: Recommender, ids: list[str]) -> None:
    body = client.post("/v1/recommend", json={"history": ids[:3], "k": 4}).json()
    assert (body["model"], body["mode"]) == ("tiny", "direct")
    (result,) = body["results"]
    expected = served.recommend(ids[:3], k=4)
    assert [item["id"] for item in result["items"]] == [item.id for item in expected]
    assert [item["title"] for item in result["items"]] == [item.title for item in expected]
    assert [item["score"] for item in result["items"]] == pytest.approx([item.score for item in expected], abs=1e-5)
    codes = served.policy.catalogue.codes.tuples()
    assert [tuple(item["codes"]) for item in result["items"]] == [codes[ids.index(i.id)] for i in expected]
    assert result["unknown"] == 0
    assert result["thoughts"] is None
    several = client.post("/v1/recommend", json={"history": [ids[:3], [], ids[5:6]], "k": 4}).json()["results"]
    assert [item["id"] for item in several[0]["items"]] == [item.id for item in expected]
    assert [len(each["items"]) for each in several] == [4, 4, 4]


def test_what_is_masked(client: TestClient, served: Recommender, ids: list[str]) -> None:
    best = [item.id for item in served.recommend(ids[:3], k=2, repeats=True)]
    given = {"history": best, "k": 20}

    def found(**options: Any) -> set[str]:
        return {i["id"] for i in client.post("/v1/recommend", json=given | options).json()["results"][0]["items"]}

    assert not found(mask=True) & set(best)
    assert not found(mask=False, exclude=best[:1]) & set(best[:1])


def test_unknown_items_are_counted_or_refused(client: TestClient, ids: list[str]) -> None:
    given = {"history": [ids[0], "nobody", "‮<script>"]}
    assert client.post("/v1/recommend", json=given).json()["results"][0]["unknown"] == 2
    refused = client.post("/v1/recommend", json=given | {"strict": True})
    assert refused.status_code == 422
    assert "2 items" in refused.json()["detail"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "required"),
        ({"history": "1,2"}, "list"),
        ({"history": [1, 2]}, "string"),
        ({"history": [["1"], "2"]}, "list"),
        ({"history": ["0"] * 9}, "more than this server's 8"),
        ({"history": [["0"]] * 4}, "more than this server's 3"),
        ({"history": [["0"]] * 2, "stream": True}, "one user"),
        ({"history": ["0"], "k": 0}, "greater than or equal"),
        ({"history": ["0"], "k": 21}, "more than this server's 20"),
        ({"history": ["0"], "k": "5"}, "integer"),
        ({"history": ["0"], "mode": "fast"}, "direct"),
        ({"history": ["0"], "kk": 5}, "not permitted"),
        ({"history": ["x" * 600]}, "at most 512"),
    ],
)
def test_what_is_wrong_is_said(client: TestClient, given: dict[str, Any], reason: str) -> None:
    answer = client.post("/v1/recommend", json=given)
    assert answer.status_code == 422
    assert reason in json.dumps(answer.json()["detail"])


def test_bodies_that_are_none(client: TestClient) -> None:
    for body in (b"", b"{", b'{"history": ["\xff"]}', b"[" * 5000, b'{"history": [NaN]}'):
        answer = client.post("/v1/recommend", content=body, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500, body
    assert client.post("/v1/recommend", content=b"{}", headers={"content-type": "text/plain"}).status_code == 422


def test_long_bodies_are_not_read(client_of: Client) -> None:
    client = client_of(max_body=100)
    declared = client.post("/v1/recommend", json={"history": ["1" * 200]})
    assert declared.status_code == 413

    def chunks() -> Iterator[bytes]:
        for _ in range(30):
            yield b'{"history": ['

    undeclared = client.post("/v1/recommend", content=chunks(), headers={"content-type": "application/json"})
    assert undeclared.status_code == 413
    assert client.post("/v1/recommend", json={"history": ["1"], "k": 1}).status_code == 200


def test_chains_stream(client_of: Client, ids: list[str]) -> None:
    client = client_of(unproven=True, max_chain=5)
    given = {"history": ids[:3], "mode": "reasoning", "k": 3, "explain": True}
    whole = client.post("/v1/recommend", json=given).json()["results"][0]
    answer = client.post("/v1/recommend", json=given | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    *thoughts, (last, result) = events(answer.text)
    assert last == "result"
    assert {name for name, _ in thoughts} == {"thought"}
    assert thoughts[-1][1]["text"] == result["thoughts"][0] == whole["thoughts"][0]
    assert result["items"] == whole["items"]


def test_thinking_that_is_not_offered(client: TestClient, ids: list[str]) -> None:
    given = {"history": ids[:2], "mode": "reasoning", "explain": True}
    result = client.post("/v1/recommend", json=given).json()["results"][0]
    assert "not measured" in result["note"]
    assert result["thoughts"] == []
    (model,) = client.get("/v1/models").json()["data"]
    assert model["modes"] == ["direct"]
    assert model["reasoning_note"] == result["note"].partition(": items at once")[0]


def test_full_late_and_closing(client_of: Client, ids: list[str]) -> None:
    given = {"history": ids[:2], "k": 2}
    busy = client_of(Limits(timeout=0.01), max_batch=99, wait=3600.0, capacity=2)
    late = busy.post("/v1/recommend", json=given)
    assert late.status_code == 504
    assert late.json()["detail"] == "no answer within 0.01 s: ask for less, or later"
    assert dict(events(busy.post("/v1/recommend", json=given | {"stream": True}).text))["error"]
    assert busy.get("/metrics").text.count("reasonrec_users_open 0.0") == 1, "what is given up takes no slot"
    with client_of() as closing:
        assert closing.post("/v1/recommend", json=given).status_code == 200
    assert closing.post("/v1/recommend", json=given).status_code == 503
    assert closing.get("/health").status_code == 503


def test_full(engine_of: Callable[..., Engine], client_of: Client, ids: list[str]) -> None:
    client = client_of(capacity=1)
    refused = client.post("/v1/recommend", json={"history": [ids[:1], ids[1:2]]})
    assert refused.status_code == 422, "more users than there ever are slots"


def test_chat(client: TestClient, served: Recommender, ids: list[str]) -> None:
    messages = [{"role": "system", "content": "hello"}, {"role": "user", "content": f"{ids[0]}, {ids[1]} ,{ids[2]}"}]
    body = client.post("/v1/chat/completions", json={"model": "x", "messages": messages, "n": 3, "top_p": 1}).json()
    expected = served.recommend(ids[:3], k=3)
    assert [choice["message"]["content"] for choice in body["choices"]] == [item.id for item in expected]
    scores = [choice["logprobs"]["content"][0]["logprob"] for choice in body["choices"]]
    assert scores == pytest.approx([item.score for item in expected], abs=1e-5)
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    for wrong in ({"messages": []}, {"messages": messages, "n": 21}, {"messages": messages, "stream": True},
                  {"messages": [{"role": "user", "content": "x" * 600}]}):  # fmt: skip
        assert client.post("/v1/chat/completions", json=wrong).status_code == 422, wrong


def test_search(client: TestClient, served: Recommender, ids: list[str]) -> None:
    titles = served.policy.catalogue.titles
    word = titles[3].split()[-1]
    found = client.get("/v1/items/search", params={"q": word.upper(), "limit": 5}).json()["items"]
    assert found
    assert all(word.lower() in item["title"].lower() for item in found)
    by_id = client.get("/v1/items/search", params={"q": ids[7]}).json()["items"]
    assert by_id[0]["id"] == ids[7]
    assert client.get("/v1/items/search", params={"q": ".*["}).json()["items"] == []
    assert client.get("/v1/items/search", params={"q": "a", "limit": 0}).status_code == 422
    assert client.get("/v1/items/search").status_code == 422


def test_tokens_and_names(client_of: Client) -> None:
    client = client_of(token="sesame")
    for header in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "sesame"},
        {"authorization": "Basic sesame"},
    ):
        answer = client.get("/v1/models", headers=header)
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
    assert client.get("/v1/models", headers={"authorization": "bearer sesame"}).status_code == 200
    assert client.get("/health").status_code == 200, "whoever watches the server needs none"
    assert client.get("/metrics").status_code == 401
    assert client.get("/").status_code == client.get("/page/page.js").status_code == 200
    rebound = client.get("/health", headers={"host": "evil.example"})
    assert rebound.status_code == 400


def test_metrics_and_schema(client: TestClient, ids: list[str]) -> None:
    client.post("/v1/recommend", json={"history": ids[:2]})
    client.post("/v1/recommend", json={})
    client.get("/nowhere/../secret")
    text = client.get("/metrics").text
    assert 'reasonrec_requests_total{path="/v1/recommend",status="200"} 1.0' in text
    assert 'reasonrec_requests_total{path="/v1/recommend",status="422"} 1.0' in text
    assert 'reasonrec_requests_total{path="other",status="404"} 1.0' in text, "no path of a stranger's becomes a label"
    assert "reasonrec_batch_users_count 1.0" in text
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        "/v1/recommend", "/v1/chat/completions", "/v1/items/search", "/v1/models", "/health", "/metrics",
    }  # fmt: skip


def test_the_page_runs_its_own_files_only(client: TestClient) -> None:
    answer = client.get("/")
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert "http" not in answer.text.replace("http-equiv", ""), "nothing comes from elsewhere"
    assert client.get("/page/../app.py").status_code == 404
    assert client.get("/page/%2e%2e/app.py").status_code == 404
