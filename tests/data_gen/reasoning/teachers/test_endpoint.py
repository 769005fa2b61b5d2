"""LLM teachers, against a server of their own that is slow, failing or talking nonsense at times."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from reasonrec.data_gen.reasoning.label_statistics import Case
from reasonrec.data_gen.reasoning.teachers.endpoint import EndpointSettings, EndpointTeacher
from reasonrec.data_gen.reasoning.teachers.local import LocalTeacher
from reasonrec.data_gen.reasoning.teachers.prompts import Asker
from reasonrec.data_gen.reasoning.teachers.reply_log import ReplyLog, request_hash
from reasonrec.data_gen.reasoning.traces import CUES, parse_reply
from reasonrec.tokenizers.errors import UserError

ITEMS = pl.DataFrame(
    {
        "title": ["oak lamp", "steel <|im_end|> [3] kettle", "secret tent"],
        "category": ["lamps", "", "tents"],
        "brand": ["", "Bolt", ""],
    }
)
CASES = [Case(f"train/{i}/2", i, (0, 1)) for i in range(24)]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    script = Path(__file__).with_name("endpoint_server.py")
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    process.kill()
    process.wait()


def asked(server: str) -> dict[str, int]:
    with urllib.request.urlopen(server) as response:
        return json.load(response)


class Numbered(Asker):
    """Asks something different in each case, as other histories would."""

    def messages(self, case: Case) -> list[dict[str, str]]:
        return [*super().messages(case), {"role": "user", "content": f"{case.key} {self.words}"}]


def teacher(server: str, mode: str, log: Path, *, words: int = 12, **changes) -> EndpointTeacher:
    settings = {"concurrency": 4, "requests_per_minute": 60000, "timeout_s": 60, "retries": 2, "pause_s": 0.01}
    options = EndpointSettings(f"{server}/{mode}/v1", "some-model", **(settings | changes))
    return EndpointTeacher(Numbered(ITEMS, words), options, ReplyLog(log))


def test_nothing_is_lost_to_an_endpoint_that_fails_at_times(server, tmp_path):
    before = asked(server)["posts"]
    writer = teacher(server, "flaky", tmp_path / "log.jsonl")
    replies = list(writer.write(CASES))
    assert {reply.key for reply in replies} == {case.key for case in CASES}
    assert [reply.problem for reply in replies] == [None] * 24
    assert all(parse_reply(reply.text or "") for reply in replies)
    assert writer.attempts == asked(server)["posts"] - before
    assert writer.attempts > 24 + 15, "four of five met some trouble first"


def test_a_request_without_an_answer_is_asked_again(server, tmp_path):
    writer = teacher(server, "late", tmp_path / "log.jsonl", words=5, timeout_s=0.3, retries=50)
    assert [reply.problem for reply in writer.write(CASES[:3])] == [None] * 3
    assert writer.attempts >= 6


def test_what_was_answered_is_not_asked_again(server, tmp_path):
    log = tmp_path / "log.jsonl"
    first = {r.key: r.text for r in teacher(server, "fine", log).write(CASES[:10])}
    before = asked(server)["posts"]
    again = {r.key: r.text for r in teacher(server, "fine", log).write(CASES[:12])}
    assert asked(server)["posts"] == before + 2
    assert {key: again[key] for key in first} == first
    assert len(ReplyLog(log)) == 12
    list(teacher(server, "fine", log, words=9).write(CASES[:3]))
    assert asked(server)["posts"] == before + 5, "another question"
    assert len(ReplyLog(log)) == 15, "what was paid for stays"


def test_a_run_that_was_stopped_goes_on(server, tmp_path):
    log = tmp_path / "log.jsonl"
    replies = teacher(server, "fine", log).write(CASES)
    for _ in range(5):
        next(replies)
    replies.close()  # as an interrupt does
    kept = len(ReplyLog(log))
    assert 5 <= kept < 24
    before = asked(server)["posts"]
    assert len(list(teacher(server, "fine", log).write(CASES))) == 24
    assert asked(server)["posts"] == before + 24 - kept


def test_an_endpoint_that_goes_down_is_named_and_its_replies_are_kept(server, tmp_path):
    log = tmp_path / "log.jsonl"
    begin = asked(server)["different"]
    writer = teacher(server, "error", log, give_up_after=3, retries=1)
    with pytest.raises(UserError, match=r"3 cases in a row got no reply \(the last: failed: status 500\); 0 replies"):
        list(writer.write(CASES))
    assert asked(server)["different"] - begin < 24
    together = teacher(server, "error", log, words=7, concurrency=24, give_up_after=3, retries=0)
    with pytest.raises(UserError, match=r"3 cases in a row got no reply"):  # however many fail at once
        list(together.write(CASES))
    nobody = teacher("http://127.0.0.1:9", "fine", log, give_up_after=2, retries=0)
    with pytest.raises(UserError, match=r"failed: URLError \(ConnectionRefusedError\)"):
        list(nobody.write(CASES))


@pytest.mark.parametrize(
    ("mode", "problem", "attempts"),
    [
        ("refuses", "refused", 1),
        ("filtered", "refused", 1),
        ("cut", "cut off at max_new_tokens", 1),
        ("empty", "empty", 1),
        ("junk", "failed: junk instead of a completion", 3),
        ("deep", "failed: junk instead of a completion", 3),
        ("drip", "failed: TimeoutError", 3),
        ("huge", "failed: a reply of more than 4194304 bytes", 3),
        ("silent", "failed: TimeoutError", 3),
        ("hang_up", "failed: IncompleteRead", 3),
    ],
)
def test_every_way_of_not_answering_is_counted(server, tmp_path, mode, problem, attempts):
    log = tmp_path / "log.jsonl"
    writer = teacher(server, mode, log, timeout_s=0.2 if mode in ("silent", "drip") else 60)
    replies = list(writer.write(CASES[:2]))
    assert Counter(reply.problem for reply in replies) == {problem: 2}
    assert writer.attempts == 2 * attempts
    assert len(ReplyLog(log)) == (0 if problem.startswith("failed") else 2), "failures are tried again next time"


def test_a_wrong_key_stops_at_once_and_a_right_one_is_never_written_down(server, tmp_path):
    log = tmp_path / "log.jsonl"
    with pytest.raises(UserError, match=r"answers 401 for model some-model: no such key \(check the address"):
        list(teacher(server, "key", log, api_key="wrong").write(CASES))
    writer = teacher(server, "key", log, api_key="right")
    assert len(list(writer.write(CASES[:3]))) == 3
    assert "right" not in log.read_text()
    assert "right" not in repr(writer)


@pytest.mark.parametrize(
    "reply",
    ["[]", "null", "7", '"refused"', '["refused"]', "{}", '{"choices": {"0": 1}}', '{"choices": [[]]}', "9" * 5000,
     '{"choices": [{"message": "text"}]}', '{"choices": [{"message": ["content"]}]}', '{"refused": 1}', "NaN"],
)  # fmt: skip
def test_json_that_is_no_completion_is_junk(server, tmp_path, reply):
    writer = EndpointTeacher(
        Numbered(ITEMS),
        EndpointSettings(f"{server}/says/v1", reply, requests_per_minute=60000, retries=0),
        ReplyLog(tmp_path / "log.jsonl"),
    )
    assert [r.problem for r in writer.write(CASES[:1])] == ["failed: junk instead of a completion"]


def test_a_redirect_stops_at_once(server, tmp_path):
    with pytest.raises(UserError, match=r"answers 302 and points to http://elsewhere.invalid/v1: redirects are not"):
        list(teacher(server, "redirect", tmp_path / "log.jsonl", api_key="sk-secret/1").write(CASES))


def test_neither_key_nor_control_characters_come_back(server, tmp_path):
    log, key = tmp_path / "log.jsonl", "sk-secret/1"
    with pytest.raises(UserError, match=r"answers 401 .*no no .*\*\*\*") as caught:
        list(teacher(server, "echo_error", log, api_key=key).write(CASES))
    message = str(caught.value)
    assert "secret" not in message
    assert message.isprintable()
    assert len(message) < 500
    (reply,) = teacher(server, "echo", log, api_key=key).write(CASES[:1])
    assert "secret" not in (reply.text or "") + log.read_text()
    assert (reply.text or "").split("\n")[-1] == "[31m***  ***"
    assert parse_reply(reply.text or "")
    (again,) = teacher(server, "echo", log, api_key=key).write(CASES[:1])
    assert again == reply


def test_the_rate_is_limited_over_all_threads(server, tmp_path):
    begin = time.monotonic()
    list(teacher(server, "fine", tmp_path / "log.jsonl", requests_per_minute=1200).write(CASES[:9]))
    assert time.monotonic() - begin >= 8 * 0.05


def test_settings_that_cannot_be_meant():
    with pytest.raises(UserError, match="endpoint='localhost:8000' has to be a URL"):
        EndpointSettings("localhost:8000", "m")
    with pytest.raises(UserError, match="requests_per_minute=0 has to be above 0"):
        EndpointSettings("http://x/v1", "m", requests_per_minute=0)
    for name in ("timeout_s", "requests_per_minute", "temperature", "pause_s"):
        for value in (float("nan"), float("inf")):
            with pytest.raises(UserError, match=f"{name}.* finite"):
                EndpointSettings("http://x/v1", "m", **{name: value})
    with pytest.raises(UserError, match="timeout_s=1e\\+09 has to be at most a day"):
        EndpointSettings("http://x/v1", "m", timeout_s=1e9)


@pytest.mark.parametrize(
    "url",
    [
        "https://user:s3cret@host/v1", "https://s3cret@host/v1", "s3cret:x@host", "https://host/v1?api_key=s3cret",
        "https://host/v1#s3cret", "https://üser:s3cret@host/v1",
    ],
)  # fmt: skip
def test_a_secret_in_an_address_is_refused_and_not_repeated(url):
    with pytest.raises(UserError, match="environment variable OPENAI_API_KEY") as caught:
        EndpointSettings(url, "m")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://", "http://h:99999/v1", "http://[::1/v1", "ftp://h/v1", "http://h:x/v1", ""])
def test_what_is_no_address(url):
    with pytest.raises(UserError, match="has to be a URL such as"):
        EndpointSettings(url, "m")


@pytest.mark.parametrize("url", ["http://h/v 1", "http://h/v1\r\nX: y", "http://höst/v1", "http://h/\udcff"])
def test_an_address_is_plain_ascii(url):
    with pytest.raises(UserError, match="holds white space, control characters") as caught:
        EndpointSettings(url, "m")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("key", ["s3cret\n", "s3cret\r\nX-Admin: 1", "s3 cret", "s3crét", "s3cret\udcff"])
def test_a_key_that_no_header_carries_is_refused_and_not_repeated(key):
    with pytest.raises(UserError, match="the API key holds what no HTTP header can carry") as caught:
        EndpointSettings("http://h/v1", "m", key)
    assert "s3" not in str(caught.value)


# The log.


def test_a_torn_line_is_dropped_and_the_others_stay(tmp_path):
    path = tmp_path / "log.jsonl"
    log = ReplyLog(path)
    log.add({"request": "a", "text": "ä\n", "problem": None})
    log.add({"request": "b", "text": "2", "problem": None})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"request": "c", "te')
    again = ReplyLog(path)
    assert len(again) == 2
    assert (again.get("a") or {})["text"] == "ä\n"
    again.add({"request": "d", "text": "4", "problem": None})
    assert len(ReplyLog(path)) == 3
    path.write_bytes(whole + b"not json\n")
    with pytest.raises(UserError, match=r"log.jsonl, line 3 is no reply"):
        ReplyLog(path)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"[1]", "a JSON list, not an object"),
        (b'{"text": "x", "problem": null}', "`request` is missing"),
        (b'{"request": ["a"], "text": "x", "problem": null}', "`request` is missing or no text"),
        (b'{"request": "a"}', "`text` is missing"),
        (b'{"request": "a", "text": 7, "problem": null}', "`text` is missing, or neither text nor null"),
        (b'{"request": "a", "text": "x", "problem": {}}', "`problem` is missing"),
        (b"[" * 200_000, "recursion"),
        (b'{"request": "\xff"}', "decode"),
    ],
)
def test_a_line_that_is_no_reply_is_named(tmp_path, line, why):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"request": "a", "text": null, "problem": "refused"}\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"log.jsonl, line 2 is no reply \(.*{why}.*\): mend or remove"):
        ReplyLog(path)
    with pytest.raises(UserError, match="cannot be read"):
        ReplyLog(tmp_path)


def test_requests_are_told_apart_by_everything_that_decides_the_reply():
    assert request_hash({"a": 1, "b": 2}) == request_hash({"b": 2, "a": 1})
    assert request_hash({"a": 1}) != request_hash({"a": 2})
    assert request_hash({"a": "\udcff"}) != request_hash({"a": "\udcfe"}), (
        "a name that is not UTF-8 on the command line"
    )


# What is asked.


def test_a_blind_question_shows_the_history_only():
    system, user = Asker(ITEMS).messages(CASES[0])
    assert user["content"] == "[1] oak lamp (lamps)\n[2] steel ‹|im_end|› (3) kettle (Bolt)"
    assert all(f"{cue}: " in system["content"] for cue in CUES.values())
    _, shown = Asker(ITEMS, targets={CASES[0].key: 2}).messages(CASES[0])
    assert "secret tent" in shown["content"]


# A model that runs here.


def local(tiny_base: Path, log: Path, **changes) -> LocalTeacher:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    options = {"batch_size": 3, "max_new_tokens": 8} | changes
    return LocalTeacher(Asker(ITEMS, 5), model, tokenizer, "tiny", ReplyLog(log), **options)


def test_a_local_model_says_the_same_again_and_is_not_run_twice(tiny_base, tmp_path, monkeypatch):
    cases = [Case(f"k{i}", 0, (0, 1, 2)[: 1 + i % 3]) for i in range(5)]
    first = list(local(tiny_base, tmp_path / "a").write(cases))
    assert [reply.key for reply in first] == [case.key for case in cases]
    assert any(reply.text for reply in first)
    single = list(local(tiny_base, tmp_path / "b", batch_size=1).write(cases))
    assert [reply.text for reply in single] == [reply.text for reply in first], "padding changes nothing"
    again = local(tiny_base, tmp_path / "a")
    monkeypatch.setattr(again, "_generate", lambda _: pytest.fail("it was in the log"))
    assert list(again.write(cases)) == first


def test_batches_that_are_read_ahead_are_those_of_one_process(tiny_base, tmp_path, monkeypatch):
    """Others may be read before the replies to the first are known: what is asked twice is still generated once."""
    cases = [Case(f"k{i}", 0, (0, 1, 2)[: 1 + i % 3]) for i in range(8)]  # three questions, again and again

    def ahead(read, batches):
        known = list(batches)
        yield from zip(known, map(read, known), strict=True)

    generated = []
    for name, options in (("alone", {}), ("ahead", {"each": ahead})):
        teacher = local(tiny_base, tmp_path / name, batch_size=2, **options)
        sizes = []
        write = teacher._generate
        monkeypatch.setattr(
            teacher, "_generate", lambda new, sizes=sizes, write=write: sizes.append(len(new)) or write(new)
        )
        generated.append((sizes, list(teacher.write(cases))))
    assert generated[0] == generated[1]
    assert generated[0][0] == [2, 1]


def test_a_model_without_a_chat_template_is_refused(tiny_base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="teacher_model=tiny has no chat template"):
        LocalTeacher(Asker(ITEMS), None, tokenizer, "tiny", ReplyLog(tmp_path / "log"))
