"""The HTTP interface: paths, and what they take and give."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles

from reasonrec.recipes.serving import wire
from reasonrec.recipes.serving.metrics import Counted, Metrics
from reasonrec.recipes.serving.service import Service

# The page runs its own files and nothing else, whatever stands in a title.
PAGE_HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": wire.Problem} for status in (400, 401, 413, 422, 429, 503, 504)
}


def build_app(service: Service, metrics: Metrics) -> FastAPI:
    """The interface to a service, which it closes when it ends.

    Args:
        service: What answers.
        metrics: What is counted.
    """
    engine = service.engine
    index = (files("reasonrec.recipes.serving") / "page" / "index.html").read_text(encoding="utf-8")
    metrics.follow(engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    # The usual pages of documentation load scripts from elsewhere; the schema itself is at /openapi.json.
    app = FastAPI(title="reasonrec", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Counted, metrics=metrics)

    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> JSONResponse:
        # Without what was sent: that may be long, and no JSON.
        found = [{"loc": list(e["loc"]), "msg": e["msg"]} for e in error.errors()[:10]]
        return JSONResponse({"detail": json.loads(json.dumps(found, default=str))}, status_code=422)

    @app.post("/v1/recommend", response_model=wire.RecommendResponse, responses=PROBLEMS)
    async def recommend(request: wire.RecommendRequest, http: Request) -> Any:
        """Recommend items to one user, or to several."""
        pending = service.submit(request)
        if request.stream:
            headers = {"cache-control": "no-store"}
            return StreamingResponse(service.events(pending), media_type="text/event-stream", headers=headers)
        results = await service.results(pending, hung_up(http))
        return wire.RecommendResponse(model=service.name, mode=request.mode, results=results)

    @app.post("/v1/chat/completions", responses=PROBLEMS)
    async def chat(request: wire.ChatRequest, http: Request) -> wire.ChatResponse:
        """Recommend `n` items, in the shape of OpenAI's chat completions."""
        history = [word for part in request.messages[-1].content.split(",") if (word := part.strip())]
        try:
            asked = wire.RecommendRequest(history=history, k=request.n)
        except ValueError:
            raise HTTPException(422, "the last message has to hold raw item ids, joined by commas") from None
        (result,) = await service.results(service.submit(asked), hung_up(http))
        return wire.ChatResponse.of(result.items, f"chatcmpl-{uuid.uuid4().hex}", service.name, len(history))

    @app.get("/v1/items/search", responses=PROBLEMS)
    def items(q: str = Query(max_length=200), limit: int = Query(default=20, ge=1, le=100)) -> wire.SearchResponse:
        """Items whose title or id holds some words, what is chosen most often first."""
        return wire.SearchResponse(items=[service.item(number) for number in service.search(q, limit)])

    @app.get("/v1/models")
    async def models() -> wire.Models:
        """What is served."""
        return wire.Models(data=[service.model()])

    @app.get("/health", responses={503: {"model": wire.Problem}})
    async def health() -> dict[str, str]:
        """Whether the server answers."""
        if not engine.alive:
            raise HTTPException(503, "the engine has stopped: see the log")
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    def prometheus() -> Response:
        """Counters for Prometheus."""
        return Response(metrics.text(), media_type=metrics.media_type)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(index, media_type="text/html", headers=PAGE_HEADERS)

    app.mount("/page", StaticFiles(packages=[("reasonrec.recipes.serving", "page")]), name="page")
    return app


async def hung_up(http: Request) -> None:
    """Wait until the client of a request, whose body has been read, hangs up."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
