"""The page in a real browser: by keyboard and by mouse, on a phone, in the dark, with titles that attack it.

The browser is the machine's own (Debian: `apt-get install chromium`); `CHROMIUM` names another. Pictures are kept in
`runs/page/`.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import uvicorn
from playwright.sync_api import Browser, Page, expect

from reasonrec.recipes.recommender import Recommender
from reasonrec.recipes.serve import listen
from reasonrec.recipes.serving.app import build_app
from reasonrec.recipes.serving.engine import Engine, EngineSettings
from reasonrec.recipes.serving.metrics import Metrics
from reasonrec.recipes.serving.service import Limits, Service

PICTURES = Path(__file__).parents[3] / "runs" / "page"
EVIL = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>‮evil"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def url(adapter: Path) -> Iterator[str]:
    """A served recommender, two titles of which are hostile and endless."""
    recommender = Recommender.from_pretrained(adapter, dtype="fp32", device="cpu")
    catalogue = recommender.policy.catalogue
    titles = [EVIL, "word" * 300, *catalogue.titles[2:]]
    renamed = replace(catalogue, items=catalogue.items.with_columns(pl.Series("title", titles)))
    recommender.policy.catalogue = renamed
    engine = Engine(recommender, EngineSettings(unproven=True, max_chain=12))
    server = uvicorn.Server(
        uvicorn.Config(build_app(Service(engine, "tiny", Limits()), Metrics()), log_level="warning")
    )
    listening = listen("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(60)


@pytest.fixture
def open_page(browser: Browser, url: str) -> Iterator[Callable[..., Page]]:
    """A function that opens the page; afterwards nothing may have failed or come from elsewhere."""
    problems: list[str] = []
    contexts = []

    def begin(**options: Any) -> Page:
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
        page.on("request", lambda sent: problems.append(sent.url) if not sent.url.startswith(url) else None)
        page.goto(url)
        expect(page.locator("#about")).to_contain_text("tiny: 48 items")
        return page

    yield begin
    for context in contexts:
        context.close()
    assert problems == []


def pick(page: Page, words: str) -> None:
    page.get_by_label("Search items").fill(words)
    expect(page.get_by_role("option").first).to_be_visible()
    page.get_by_label("Search items").press("Enter")


def test_from_a_search_to_a_list_and_a_thought(open_page: Callable[..., Page]) -> None:
    page = open_page(viewport={"width": 1280, "height": 800})
    page.keyboard.press("Tab")
    expect(page.get_by_label("Search items")).to_be_focused()
    pick(page, "lamp")
    pick(page, "1-0-2")
    expect(page.locator("#history li")).to_have_count(2)
    expect(page.locator("#direct li")).to_have_count(10)
    expect(page.locator("#direct-time")).to_contain_text("ms")
    page.get_by_role("button", name="Think").press("Enter")
    expect(page.locator("#reason li")).to_have_count(10)
    expect(page.locator("#thought")).not_to_be_empty()
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / "page.png")
    page.get_by_role("button", name="remove").first.press("Enter")
    expect(page.locator("#history li")).to_have_count(1)
    expect(page.locator("#reason li")).to_have_count(0)
    page.get_by_label("Items", exact=True).fill("3")
    page.get_by_label("Items", exact=True).press("Tab")
    expect(page.locator("#direct li")).to_have_count(3)


def test_the_arrow_keys_choose(open_page: Callable[..., Page]) -> None:
    page = open_page()
    query = page.get_by_label("Search items")
    query.fill("a")
    options = page.get_by_role("option")
    expect(options.nth(0)).to_have_attribute("aria-selected", "true")
    query.press("ArrowDown")
    expect(options.nth(1)).to_have_attribute("aria-selected", "true")
    chosen = options.nth(1).text_content()
    query.press("Enter")
    expect(page.locator("#history li").first).to_contain_text(str(chosen)[:40])
    query.fill("a")
    expect(options.first).to_be_visible()
    query.press("Escape")
    expect(options).to_have_count(0)


def test_titles_are_text(open_page: Callable[..., Page]) -> None:
    page = open_page()
    pick(page, "onerror")
    expect(page.locator("#history li")).to_contain_text("<img src=x onerror")
    page.get_by_label("nothing they had").uncheck()
    page.get_by_label("Items", exact=True).fill("48")
    page.get_by_label("Items", exact=True).press("Tab")
    expect(page.locator("#direct li")).to_have_count(48)
    assert page.locator("#direct img, #direct script, #history img").count() == 0
    assert page.title() == "reasonrec"
    expect(page.locator("#history li")).to_contain_text("\\u{202e}evil")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(open_page: Callable[..., Page], scheme: str) -> None:
    page = open_page(viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True)
    pick(page, "wordword")
    expect(page.locator("#direct li")).to_have_count(10)
    wide = page.evaluate("document.documentElement.scrollWidth")
    assert wide <= 390, "nothing sticks out, not even a word of 1,200 letters"
    background = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(","))) < 384) == (scheme == "dark")
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"phone-{scheme}.png", full_page=True)
