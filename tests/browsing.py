"""Waiting inside a page whose policy forbids the evaluation of strings, which Playwright's own waiting needs."""

from __future__ import annotations

import time
from typing import Any

PATIENCE = 20.0


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
