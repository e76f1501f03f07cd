"""Around the code of users: their models, their files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout

from moebench.errors import RunError


@contextmanager
def users_code() -> Iterator[None]:
    """What a user's model prints must not mix with the results, and its sys.exit must not pass for ours."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except SystemExit as error:
        raise RunError(f"the code of the model called sys.exit({error.code!r})") from error
