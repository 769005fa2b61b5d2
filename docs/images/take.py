"""Take the picture of the page that the README shows, from a running server.

reasonrec serve --model runs/example/published
python docs/images/take.py http://127.0.0.1:8000 docs/images/page.png "basic helmet" "classic bike lock" "bottle cage"

Needs Chromium on the machine (`CHROMIUM` names it).
"""

from __future__ import annotations

import os
import shutil
import sys

from playwright.sync_api import expect, sync_playwright


def main() -> None:
    """Search, add to the history, take the picture."""
    url, out, *searches = sys.argv[1:]
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1120, "height": 560})
        page.goto(url)
        for words in searches:
            page.get_by_label("Search items").fill(words)
            expect(page.get_by_role("option").first).to_be_visible(timeout=60_000)
            page.get_by_label("Search items").press("Enter")
        page.get_by_label("Items", exact=True).fill("7")
        page.get_by_label("Items", exact=True).press("Tab")
        expect(page.locator("#direct li")).to_have_count(7, timeout=60_000)
        page.screenshot(path=out)
        browser.close()


if __name__ == "__main__":
    main()
