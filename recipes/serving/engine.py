"""One model for many callers: users who ask at the same time are ranked in one batch, by one thread.

The thread takes whoever waits when it is done with the batch before, and waits up to `wait` seconds for more only
where a batch is not full. A search is a handful of model calls, so nobody joins one that has begun. Chains are a
hundred, and between two of their steps a batch of users who do not think is answered: they are late by one step.

Every user takes one of `capacity` slots, from the moment they ask until they are answered or hang up; who finds none
is told to come back (`Full`), so no queue grows. Lists without a chain are remembered: who asks the same again is
answered at once, and takes no slot.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from reasonrec.data_gen.histories import UserHistory
from reasonrec.recipes.rankers.reasoning import Reasoner
from reasonrec.recipes.recommending.answered import Answered, Mode, Recommendation, answer
from reasonrec.recipes.serving.remembered import Question, Remembered

if TYPE_CHECKING:
    from reasonrec.recipes.recommender import Recommender

logger = logging.getLogger("reasonrec.serve")


class Full(Exception):
    """All slots are taken."""


class Closed(Exception):
    """The engine is shutting down."""


@dataclass(frozen=True)
class Reply:
    """What one user is told.

    Attributes:
        items: Recommendations, best first.
        thoughts: Chains as text, if the model thought.
        note: Why it did not, if it was asked to.
        seconds: Time from asking to here.
    """

    items: list[Recommendation]
    thoughts: list[str]
    note: str
    seconds: float


@dataclass(eq=False)
class Ask:
    """One user's question.

    Attributes:
        history: What the user had.
        deliver: Called once, from the engine's thread, with the reply or what went wrong.
        k: Items to return.
        mode: Items at once, or behind a chain.
        repeats: Whether what the user had may appear; as the data set says if None.
        exclude: Item numbers that must not appear.
        thought: Called from the engine's thread with the chain so far, again and again while it is written.
    """

    history: UserHistory
    deliver: Callable[[Reply | Exception], None]
    k: int = 10
    mode: Mode = "direct"
    repeats: bool | None = None
    exclude: Sequence[int] = ()
    thought: Callable[[str], None] | None = None
    asked: float = field(default_factory=time.monotonic)
    running: bool = False
    gone: bool = False

    @property
    def kind(self) -> tuple[Mode, bool | None]:
        """Who can share a batch."""
        return self.mode, self.repeats

    @cached_property
    def question(self) -> Question:
        """All that decides on the items at once, but how many."""
        excluded = np.unique(np.asarray(self.exclude, dtype=np.int64)).tobytes()
        return self.history.shown.tobytes(), self.history.masked.tobytes(), self.repeats, excluded


@dataclass(frozen=True)
class EngineSettings:
    """How an engine works.

    Attributes:
        max_batch: Users in one batch.
        wait: Seconds that a batch waits for more users.
        capacity: Users that wait or are answered at a time.
        num_beams: Width of the search.
        max_chain: Longest chain in tokens.
        unproven: Think even where it was not shown to help.
        remember: Bytes of lists that are kept for who asks the same again.
    """

    max_batch: int = 16
    wait: float = 0.005
    capacity: int = 128
    num_beams: int = 50
    max_chain: int = 128
    unproven: bool = False
    remember: int = 64_000_000


class Engine:
    """Answers from one thread.

    Args:
        recommender: Who recommends.
        settings: How.
        measured: Told each batch: users, seconds.
    """

    def __init__(
        self,
        recommender: Recommender,
        settings: EngineSettings,
        measured: Callable[[int, float], None] = lambda users, seconds: None,
    ) -> None:
        self.settings, self._measured = settings, measured
        self.take(recommender)
        self._waiting: deque[Ask] = deque()
        self._changed = threading.Condition()
        self._running = 0
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="reasonrec-engine", daemon=True)
        self._thread.start()

    def take(self, recommender: Recommender) -> None:
        """Let another one recommend, from the next batch on, and forget the lists of the one before.

        Args:
            recommender: It numbers the same items alike.
        """
        self._serving = recommender, Remembered(self.settings.remember)

    @property
    def recommender(self) -> Recommender:
        """Who recommends."""
        return self._serving[0]

    @property
    def remembered(self) -> Remembered:
        """The lists that were made before."""
        return self._serving[1]

    @property
    def open(self) -> int:
        """Slots that are taken."""
        return len(self._waiting) + self._running

    @property
    def alive(self) -> bool:
        """Whether it answers."""
        return self._thread.is_alive()

    def submit(self, asks: Sequence[Ask]) -> None:
        """Let users ask: all of them, or none.

        Raises:
            Full: If there are fewer slots.
            Closed: If the engine is shutting down.
        """
        recommender, remembered = self._serving
        known = [remembered.get(ask.question, ask.k) if ask.mode == "direct" else None for ask in asks]
        unknown = [ask for ask, found in zip(asks, known, strict=True) if found is None]
        with self._changed:
            if self._closing or not self._thread.is_alive():
                raise Closed
            if self.open + len(unknown) > self.settings.capacity:
                raise Full
            self._waiting.extend(unknown)
            self._changed.notify()
        for ask, found in zip(asks, known, strict=True):
            if found is not None:
                items, scores = found
                (listed,) = Answered(items[None], scores[None]).lists(recommender.policy.catalogue)
                ask.deliver(Reply(listed, [], "", time.monotonic() - ask.asked))

    def leave(self, asks: Sequence[Ask]) -> None:
        """Users hang up: their slots are free, and chains that are being written for them end at the next step."""
        with self._changed:
            for ask in asks:
                self._running -= ask.running
                ask.running, ask.gone = False, True
            self._waiting = deque(ask for ask in self._waiting if not ask.gone)

    def close(self, timeout: float = 30.0) -> None:
        """Answer who waits, and stop.

        Args:
            timeout: Seconds to wait for that.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    def _serve(self) -> None:
        while not self._closing or self._waiting:
            self._answer(self._next())

    def _next(self) -> list[Ask]:
        """The next batch, by who waits longest; empty if they all hung up, or it is time to stop."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._waiting) or self._closing)
            if self._waiting:
                until = self._waiting[0].asked + self.settings.wait
                self._changed.wait_for(
                    lambda: len(self._waiting) >= self.settings.max_batch or self._closing,
                    timeout=max(0.0, until - time.monotonic()),
                )
            return self._take()

    def _take(self, mode: Mode | None = None) -> list[Ask]:
        """Those who can be answered together with the first of a mode (or of any); the lock is held."""
        first = next((ask for ask in self._waiting if mode in (None, ask.mode)), None)
        if first is None:
            return []
        batch = [ask for ask in self._waiting if ask.kind == first.kind][: self.settings.max_batch]
        taken = set(map(id, batch))
        self._waiting = deque(ask for ask in self._waiting if id(ask) not in taken)
        for ask in batch:
            ask.running = True
        self._running += len(batch)
        return batch

    def _answer(self, batch: list[Ask]) -> None:
        if not batch:
            return
        recommender, remembered = self._serving  # another may take its place meanwhile
        began, settings, first = time.monotonic(), self.settings, batch[0]
        chains = _Chains(self, batch, Reasoner(recommender).readable)
        try:
            found = answer(
                recommender,
                [ask.history for ask in batch],
                k=max(ask.k for ask in batch),  # the list of fewer items is the beginning of this one
                mode=first.mode,
                num_beams=settings.num_beams,
                repeats=first.repeats,
                exclude=[np.asarray(ask.exclude, dtype=np.int64) for ask in batch],
                batch_size=settings.max_batch,
                max_chain=settings.max_chain,
                unproven=settings.unproven,
                stream=chains,
            )
        except Exception as error:  # whatever it is, those who wait have to be told, and the next batch be answered
            logger.exception("a batch of %d users failed", len(batch))
            self._free(batch)
            for ask in batch:
                ask.deliver(error)
            return
        now = time.monotonic()
        self._free(batch)
        self._measured(len(batch), now - began)
        lists = found.lists(recommender.policy.catalogue)
        thoughts = found.thoughts or [[] for _ in batch]
        if first.mode == "direct":
            for ask, items, scores in zip(batch, found.items, found.scores, strict=True):
                remembered.put(ask.question, items, scores)
        for ask, listed, own in zip(batch, lists, thoughts, strict=True):
            if not ask.gone:
                ask.deliver(Reply(listed[: ask.k], own, found.note, now - ask.asked))

    def _free(self, batch: list[Ask]) -> None:
        with self._changed:
            for ask in batch:
                self._running -= ask.running
                ask.running = False

    def let_pass(self) -> None:
        """Answer those who do not think, between two steps of those who do."""
        with self._changed:
            batch = self._take("direct")
        self._answer(batch)


class _Chains:
    """Follows the chains of a batch: hands on what is written, and ends those that nobody waits for."""

    def __init__(self, engine: Engine, batch: Sequence[Ask], readable: Callable[[Sequence[int]], str]) -> None:
        self._engine, self._batch, self._readable = engine, batch, readable
        self._written: list[list[int]] = [[] for _ in batch]

    def __call__(self, users: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        for user, (token,) in zip(users.tolist(), tokens[:, :1].tolist(), strict=True):
            ask = self._batch[user]
            if token >= 0 and not ask.gone:
                self._written[user].append(token)
                if ask.thought is not None:
                    ask.thought(self._readable(self._written[user]))
        self._engine.let_pass()
        return np.array([self._batch[user].gone for user in users.tolist()])
