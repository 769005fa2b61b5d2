"""What every request passes before it is read: whose it is, to which host it was sent, and how long it is."""

from __future__ import annotations

import hmac
import json
from collections.abc import Collection

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OPEN_PATHS = ("/", "/health")  # and the page's own files: they hold nothing of the model


async def refuse(send: Send, status: int, detail: str, *headers: tuple[bytes, bytes]) -> None:
    """Answer with a reason and nothing else."""
    body = json.dumps({"detail": detail}).encode()
    sent = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": sent})
    await send({"type": "http.response.body", "body": body})


class Guard:
    """Refuses requests of strangers, for other hosts, and those that are too long.

    A page of another site can make a browser talk to this machine: by a name that it lets point here. Hence the check
    of the host's name where there is no token.

    Args:
        app: What is guarded.
        token: What `Authorization: Bearer …` has to hold, if anything.
        hosts: Names under which the server may be reached; any if there are none.
        max_body: Longest body in bytes.
    """

    def __init__(self, app: ASGIApp, *, token: str | None, hosts: Collection[str], max_body: int) -> None:
        self._app, self._hosts, self._max_body = app, frozenset(hosts), max_body
        self._token = None if token is None else token.encode()
        self._too_long = f"the body is longer than {max_body} bytes"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._hosts and _name(headers.get(b"host", b"").decode("latin-1")) not in self._hosts:
            await refuse(send, 400, "this server is not known by that name: start it with --allowed_hosts")
            return
        if self._token is not None and not (scope["path"] in OPEN_PATHS or scope["path"].startswith("/page/")):
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            # Compared in constant time: how long it takes says nothing of how much is right.
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._token):
                await refuse(send, 401, "a bearer token is needed", (b"www-authenticate", b"Bearer"))
                return
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body:
            # The connection stays open: one that closes on a client who is still sending is reset, answer and all.
            await refuse(send, 413, self._too_long)
            return
        await self._app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        """Count what comes in, for bodies without a declared length."""
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_body:
                raise HTTPException(413, self._too_long)
            return message

        return counted


def _name(host: str) -> str:
    """A host without its port."""
    if host.startswith("["):
        return host[: host.find("]") + 1].lower()
    return host.partition(":")[0].lower()
