"""Pages in Chromium: what they complain of or ask for, and waiting where a policy forbids Playwright's own way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_ARGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
PATIENCE = 20.0


@contextmanager
def launched() -> Iterator[Any]:
    """A running Chromium; skips the test that asks for it where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=str(CHROMIUM), args=CHROMIUM_ARGS)
        yield running
        running.close()


def watched(page: Any, problems: list[str]) -> None:
    """Notes all that a page complains about or asks a network for."""
    page.on("console", lambda message: problems.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("dialog", lambda dialog: problems.append("dialog"))
    page.on("request", lambda request: problems.extend([request.url][: not local(request.url)]))


def local(url: str) -> bool:
    """Whether what is behind an address is on the disk or in the page itself."""
    return url.startswith(("file:///", "data:", "blob:null/", "blob:file:"))


def opened(browser: Any, file: Path, **context: Any) -> tuple[Any, list[str]]:
    """A page in a window of its own, and all that it complains about or asks a network for."""
    problems: list[str] = []
    page = browser.new_context(**context).new_page()
    watched(page, problems)
    page.goto(file.as_uri())
    return page, problems


def until(page: Any, expression: str, arg: Any = None) -> None:
    """Waits until an expression, or a function of `arg`, is true in a page.

    Raises:
        TimeoutError: it does not become true.
    """
    end = time.monotonic() + PATIENCE
    while not page.evaluate(expression, arg):
        if time.monotonic() > end:
            raise TimeoutError(f"never true: {expression}")
        page.wait_for_timeout(20)
