"""From a request to the engine and back: what may be asked, who waits for it, and what they are told."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException

from reasonrec.data_gen.histories import UserHistory
from reasonrec.recipes.models.verdict import UNMEASURED
from reasonrec.recipes.recommender import Recommender
from reasonrec.recipes.serving.engine import Ask, Closed, Engine, Full, Reply
from reasonrec.recipes.serving.search import ItemSearch
from reasonrec.recipes.serving.wire import FoundItem, Item, Model, RecommendRequest, UserResult
from reasonrec.tokenizers.catalogue import Catalogue
from reasonrec.tokenizers.errors import UserError


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        max_k: Items in a list.
        max_history: Items in a history.
        max_users: Users in a request.
        timeout: Seconds until a request is given up.
    """

    max_k: int = 100
    max_history: int = 1000
    max_users: int = 64
    timeout: float = 30.0


@dataclass(frozen=True)
class Pending:
    """A request that the engine has taken.

    Attributes:
        request: What was asked.
        asks: A question for each user.
        unknown: How many items of each user are not in the catalogue.
        arrived: (number of the user, `Reply`, an exception, or the chain so far) in the order of their arrival.
    """

    request: RecommendRequest
    asks: list[Ask]
    unknown: list[int]
    arrived: asyncio.Queue[tuple[int, Any]]


class Service:
    """Answers requests.

    Args:
        engine: What ranks.
        name: What the model is called.
        limits: What a request may ask for.
    """

    def __init__(self, engine: Engine, name: str, limits: Limits) -> None:
        self.engine, self.name, self.limits = engine, name, limits
        self.search = ItemSearch(self.catalogue)

    @property
    def recommender(self) -> Recommender:
        """Who recommends."""
        return self.engine.recommender

    @property
    def catalogue(self) -> Catalogue:
        """What there is to recommend."""
        return self.recommender.policy.catalogue

    def take(self, recommender: Recommender) -> None:
        """Recommend from a later version of the catalogue from now on; who asked already is answered all the same.

        Args:
            recommender: The same model with that catalogue.
        """
        search = ItemSearch(recommender.policy.catalogue)
        self.engine.take(recommender)
        self.search = search  # what it finds is known by now

    def model(self) -> Model:
        """What is served."""
        verdict, pool = self.recommender.verdict, self.recommender.pool
        thinks = self.engine.settings.unproven or bool(verdict and verdict.offered)
        return Model(
            id=self.name,
            items=self.catalogue.n_items,
            modes=["direct", "reasoning"] if thinks else ["direct"],
            reasoning_note=str(verdict or UNMEASURED),
            experts=list(pool.experts) if pool else [],
            mask_history=self.catalogue.mask_history,
            max_history=self.recommender.setting.max_history,
        )

    def item(self, number: int) -> FoundItem:
        """An item of the catalogue."""
        index = self.catalogue.index
        codes = None if index is None else [code for code in index.codes[number].tolist() if code >= 0]
        return FoundItem(id=self.catalogue.item_ids[number], title=self.catalogue.titles[number], codes=codes)

    def submit(self, request: RecommendRequest) -> Pending:
        """Check a request and hand it to the engine.

        Raises:
            HTTPException: 422 for what may not be asked, 429 if all slots are taken, 503 on shutting down.
        """
        users = self._users(request)
        loop, arrived = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Any]]()
        items = self.recommender.items
        found = [items.find(user) for user in users]
        unknown = [int((numbers < 0).sum()) for numbers in found]
        if request.strict and any(unknown):
            raise HTTPException(422, f"{sum(unknown)} items of the history are not in the catalogue")
        excluded = items.find(request.exclude)

        def deliver_to(user: int) -> Callable[[Any], None]:
            def deliver(reply: Any) -> None:
                with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(arrived.put_nowait, (user, reply))

            return deliver

        asks = [
            Ask(
                UserHistory.of(numbers[numbers >= 0]),
                deliver := deliver_to(user),
                k=request.k,
                mode=request.mode,
                repeats=None if request.mask is None else not request.mask,
                exclude=excluded[excluded >= 0].tolist(),
                thought=deliver if request.stream else None,
            )
            for user, numbers in enumerate(found)
        ]
        try:
            self.engine.submit(asks)
        except Full:
            raise HTTPException(429, "all slots are taken: try again", {"retry-after": "1"}) from None
        except Closed:
            raise HTTPException(503, "the server is shutting down", {"retry-after": "5"}) from None
        return Pending(request, asks, unknown, arrived)

    def _users(self, request: RecommendRequest) -> list[list[str]]:
        """The history of each user of a request.

        Raises:
            HTTPException: 422 for what is beyond the limits.
        """
        given: list[Any] = request.history
        users = given if given and isinstance(given[0], list) else [given]
        for value, most, what in (
            (request.k, min(self.limits.max_k, self.catalogue.n_items), "k"),
            (len(users), min(self.limits.max_users, self.engine.settings.capacity), "users in a request"),
            (max(map(len, users)), self.limits.max_history, "items in a history"),
        ):
            if value > most:
                raise HTTPException(422, f"{what}: {value} is more than this server's {most}")
        if request.stream and len(users) > 1:
            raise HTTPException(422, "stream is for one user at a time")
        return users

    async def results(self, pending: Pending, hung_up: Awaitable[Any]) -> list[UserResult]:
        """Wait for all users; if that takes too long or the client hangs up, their slots are given back.

        Args:
            pending: Their request.
            hung_up: Ends when the client does.

        Raises:
            HTTPException: 422 for what only the model refuses, 504 after the timeout.
        """
        replies: dict[int, Reply] = {}

        async def gather() -> None:
            while len(replies) < len(pending.asks):
                user, reply = await pending.arrived.get()
                if isinstance(reply, Exception):
                    raise reply
                replies[user] = reply

        tasks = [asyncio.ensure_future(gather()), asyncio.ensure_future(hung_up)]
        try:
            await asyncio.wait(tasks, timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise HTTPException(504, self._too_late)
            tasks[0].result()
        except UserError as error:
            raise HTTPException(422, str(error)) from error
        finally:
            self.engine.leave(pending.asks)
            for task in tasks:
                task.cancel()
        return [self._result(pending, user, replies[user]) for user in range(len(pending.asks))]

    async def events(self, pending: Pending) -> AsyncIterator[str]:
        """Server-sent events: the chain so far (`thought`) whenever it grows, then `result` or `error`."""
        until = time.monotonic() + self.limits.timeout
        try:
            while True:
                _, reply = await asyncio.wait_for(pending.arrived.get(), max(0.0, until - time.monotonic()))
                if isinstance(reply, str):
                    yield event("thought", {"text": reply})
                    continue
                if isinstance(reply, Reply):
                    yield event("result", self._result(pending, 0, reply).model_dump())
                else:
                    reason = str(reply) if isinstance(reply, UserError) else "something went wrong: see the log"
                    yield event("error", {"detail": reason})
                return
        except TimeoutError:
            yield event("error", {"detail": self._too_late})
        finally:
            self.engine.leave(pending.asks)

    def _result(self, pending: Pending, user: int, reply: Reply) -> UserResult:
        items = [
            Item(**self.item(self.recommender.items.number(found.id)).model_dump(), score=found.score)
            for found in reply.items
        ]
        return UserResult(
            items=items,
            thoughts=reply.thoughts if pending.request.explain else None,
            note=reply.note,
            unknown=pending.unknown[user],
            milliseconds=round(reply.seconds * 1000, 1),
        )

    @property
    def _too_late(self) -> str:
        return f"no answer within {self.limits.timeout:g} s: ask for less, or later"


def event(name: str, data: dict[str, Any]) -> str:
    """A server-sent event; JSON has no line breaks that could end it."""
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
