"""A teacher behind an OpenAI-compatible endpoint: a provider's, or vLLM, llama.cpp, Ollama on one's own machine.

Requests go out side by side at a limited rate and are repeated with growing pauses when the endpoint is down, slow or
busy. Every reply is written to a log at once, so a run that was stopped, by whatever, goes on where it was.
"""

from __future__ import annotations

import json
import math
import random
import re
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic
from urllib.parse import quote, urlsplit

from reasonrec.data_gen.clean import drop_controls
from reasonrec.data_gen.reasoning.teachers.bounded_http import Answer, Client, Unanswered
from reasonrec.data_gen.reasoning.teachers.prompts import Asks, Messages, QuestionT
from reasonrec.data_gen.reasoning.teachers.reply_log import ReplyLog, request_hash
from reasonrec.data_gen.reasoning.traces import Reply
from reasonrec.tokenizers.errors import UserError
from reasonrec.tokenizers.terminal import one_line

_AGAIN = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
_HOPELESS = {401, 402, 403, 404, 405, 407}  # no other request would fare better
_LONGEST_PAUSE = 60.0
_LONGEST_TIMEOUT = 86_400.0
_PLACEHOLDER = 4  # longest word that a server which asks for any key is given: no secret, and part of many words


class _Retry(Exception):
    """What may go well another time."""

    def __init__(self, why: str, pause: float = 0.0) -> None:
        super().__init__(why)
        self.why, self.pause = why, pause


@dataclass(frozen=True)
class EndpointSettings:
    """How to reach an endpoint and how hard to press it.

    Attributes:
        url: Base URL up to and including `/v1`.
        model: Name of the model there.
        api_key: Sent as bearer token, if any, to this address alone; never stored or shown.
        concurrency: Requests under way at a time.
        requests_per_minute: Limit over all of them.
        timeout_s: Patience with one request, from the connection to the last byte, however slowly bytes arrive.
        max_reply_bytes: Longest reply, headers included; a longer one is a failure like any other.
        retries: Further attempts after the first.
        pause_s: Pause before the second attempt; it doubles with each further one.
        give_up_after: Cases in a row without any reply after which the endpoint counts as down.
        temperature: Sampling temperature.
        max_new_tokens: Longest reply.
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    concurrency: int = 8
    requests_per_minute: float = 600.0
    timeout_s: float = 60.0
    retries: int = 5
    pause_s: float = 1.0
    give_up_after: int = 10
    temperature: float = 0.7
    max_new_tokens: int = 300
    max_reply_bytes: int = 4 << 20

    def __post_init__(self) -> None:
        check_address(self.url)
        if self.api_key and not re.fullmatch("[!-~]+", self.api_key):
            raise UserError(
                "the API key holds what no HTTP header can carry (a line break, a space, a letter beyond ASCII): set "
                "its environment variable (api_key_env names it) to the key alone"
            )
        above = "concurrency requests_per_minute timeout_s pause_s give_up_after max_new_tokens max_reply_bytes"
        for name in above.split():
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name}={getattr(self, name)} has to be above 0, and finite")
        if self.timeout_s > _LONGEST_TIMEOUT:
            raise UserError(f"timeout_s={self.timeout_s:g} has to be at most a day, {_LONGEST_TIMEOUT:g}")
        if self.retries < 0 or not (0 <= self.temperature < math.inf):
            raise UserError("retries and temperature have to be at least 0, and finite")

    def without_key(self, text: str) -> str:
        """A text from the endpoint without what a terminal obeys, and without the key, however it is spelt."""
        text, key = drop_controls(text), self.api_key or ""
        if len(key) > _PLACEHOLDER:
            for spelling in (key, key.replace("/", r"\/"), quote(key, safe="")):
                text = text.replace(spelling, "***")
        return text


def check_address(url: str) -> None:
    """Check the base URL of an endpoint, which goes into messages, reports and manifests.

    Raises:
        UserError: If it is no plain HTTP address, or could hold a secret; what could be one is not repeated.
    """
    rule = "write the address up to /v1, such as http://localhost:8000/v1"
    if re.search("[@?#]", url):
        raise UserError(
            "endpoint holds an @, a ? or a #, and so perhaps a user, a password or a key, which would be written into "
            f"reports: {rule}, and put the key into the environment variable OPENAI_API_KEY, or into the one that "
            "api_key_env names"
        )
    if not re.fullmatch("[!-~]*", url):
        raise UserError(f"endpoint={url!a} holds white space, control characters or letters beyond ASCII: {rule}")
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # the port, or brackets
        good = False
    if not good:
        raise UserError(f"endpoint={url!r} has to be a URL such as http://localhost:8000/v1")


class _Pace:
    """Lets callers through at a limited rate, whichever thread they are in."""

    def __init__(self, per_minute: float) -> None:
        self._gap, self._next, self._lock = 60.0 / per_minute, 0.0, threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        with self._lock:
            now = time.monotonic()
            at = max(now, self._next)
            self._next = at + self._gap
        stop.wait(min(at - now, threading.TIMEOUT_MAX))


@dataclass
class EndpointTeacher(Generic[QuestionT]):
    """Asks an endpoint.

    Args:
        asker: Makes the messages.
        settings: How to reach the endpoint.
        log: Where replies are kept.
        hindsight: Whether the messages show what was chosen.
    """

    asker: Asks[QuestionT]
    settings: EndpointSettings
    log: ReplyLog
    hindsight: bool = False
    attempts: int = field(default=0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _client: Client = field(init=False, repr=False)

    def __post_init__(self) -> None:
        url = self.settings.url.rstrip("/") + "/chat/completions"
        self._client = Client(url, self.settings.timeout_s, self.settings.max_reply_bytes)

    @property
    def name(self) -> str:
        """Name in reports."""
        return f"{self.settings.model} at {self.settings.url}"

    def write(self, cases: Iterable[QuestionT]) -> Iterator[Reply]:
        """Ask for every case that the log does not answer yet; replies come in the order of arrival.

        Raises:
            UserError: If the endpoint refuses everything (key, address, model), points elsewhere, or stays down; what
                came before that is in the log.
        """
        pace, stop, silent = _Pace(self.settings.requests_per_minute), threading.Event(), 0
        todo = iter(cases)
        with ThreadPoolExecutor(self.settings.concurrency) as pool:

            def more(n: int) -> set[Future[Reply]]:
                return {pool.submit(self._answer, case, pace, stop) for case in islice(todo, n)}

            pending = more(2 * self.settings.concurrency)
            try:
                while pending:
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    for future in done:
                        reply = future.result()
                        silent = silent + 1 if (reply.problem or "").startswith("failed") else 0
                        yield reply
                        if silent >= self.settings.give_up_after:  # at once, however many came in together
                            raise UserError(
                                f"endpoint={self.settings.url}: {silent} cases in a row got no reply (the last: "
                                f"{reply.problem}); {len(self.log)} replies are kept in {self.log.path}: run the same "
                                "command again when it answers"
                            )
                    pending |= more(len(done))
            finally:
                stop.set()  # sleepers wake up and give up
                for future in pending:
                    future.cancel()

    def _request(self, messages: Messages) -> dict[str, Any]:
        return {
            "model": self.settings.model,
            "messages": messages,
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_new_tokens,
        }

    def _answer(self, case: QuestionT, pace: _Pace, stop: threading.Event) -> Reply:
        body = self._request(self.asker.messages(case))
        key = request_hash({**body, "url": self.settings.url, "case": case.key})
        entry = self.log.get(key)
        if entry is None:
            text, problem = self._persist(body, pace, stop)
            if problem is not None and problem.startswith("failed"):
                return Reply(case.key, problem=problem)  # not logged: another run tries again
            entry = {"request": key, "case": case.key, "text": text, "problem": problem}
            self.log.add(entry)
        return Reply(case.key, entry["text"], entry["problem"])

    def _persist(self, body: dict[str, Any], pace: _Pace, stop: threading.Event) -> tuple[str | None, str | None]:
        """Text or problem, after as many attempts as it takes."""
        why = "failed: stopped"
        for attempt in range(self.settings.retries + 1):
            if stop.is_set():
                return None, "failed: stopped"
            pace.wait(stop)
            with self._lock:
                self.attempts += 1
            try:
                text, problem = self._ask(body)
                return (None if text is None else self.settings.without_key(text)), problem
            except _Retry as error:
                why = error.why
                if attempt < self.settings.retries:
                    # Drawn, so that requests which failed together do not come back together.
                    pause = self.settings.pause_s * 2 ** min(attempt, 16) * random.uniform(0.5, 1.0)
                    stop.wait(min(max(pause, error.pause), _LONGEST_PAUSE))
        return None, why

    def _ask(self, body: dict[str, Any]) -> tuple[str | None, str | None]:
        """Text or problem of one attempt.

        Raises:
            _Retry: If another attempt may fare better.
            UserError: If none will.
        """
        headers = {"Content-Type": "application/json"}
        if self.settings.api_key:
            headers["Authorization"] = f"Bearer {self.settings.api_key}"
        try:
            answer = self._client.post(json.dumps(body).encode(), headers)
        except Unanswered as error:
            raise _Retry(f"failed: {error}") from error
        if 200 <= answer.status < 300:
            return _read(answer.body)
        if 300 <= answer.status < 400 or answer.status in _HOPELESS:
            raise UserError(self._hopeless(answer))
        if answer.status in _AGAIN or not 400 <= answer.status < 500:
            raise _Retry(f"failed: status {answer.status}", _seconds(answer.retry_after))
        return None, "refused"

    def _hopeless(self, answer: Answer) -> str:
        where = f"endpoint={self.settings.url} answers {answer.status}"
        if 300 <= answer.status < 400:
            target = re.sub("//[^/]*@", "//", re.split("[?#]", answer.location)[0])
            shown = one_line(self.settings.without_key(target), 120) or "nowhere"
            return (
                f"{where} and points to {shown}: redirects are not followed, for they would take the key and the "
                "prompts along; if you trust that address, name it up to /v1 as `endpoint`"
            )
        # The whole text first: a key that a cut goes through would not be recognised.
        detail = one_line(self.settings.without_key(answer.body.decode("utf-8", "replace")), 200)
        model = one_line(self.settings.model, 100)
        return f"{where} for model {model}: {detail} (check the address up to /v1, the model's name and the key)"


def _seconds(value: str | None) -> float:
    try:
        return max(0.0, float(value or 0))
    except ValueError:  # a date
        return 0.0


def _read(raw: bytes) -> tuple[str | None, str | None]:
    """Text or problem of a response.

    Raises:
        _Retry: If it is no chat completion at all.
    """
    try:
        response = json.loads(raw)
        choice = response["choices"][0]
        message = choice["message"]
        text = message.get("content")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _Retry("failed: junk instead of a completion") from error
    if message.get("refusal") or choice.get("finish_reason") == "content_filter":
        return None, "refused"
    if choice.get("finish_reason") == "length":
        return None, "cut off at max_new_tokens"
    if not isinstance(text, str) or not text.strip():
        return None, "empty"
    return text, None
