"""The exceptions that the command line turns into one line and an exit code."""

from __future__ import annotations


class MoebenchError(Exception):
    """Base class of every error that moebench raises on purpose.

    The message is one line: what was wrong, what was expected, what to try. The command line prints it without a
    traceback and exits with `exit_code`.
    """

    exit_code = 1


class UsageError(MoebenchError):
    """The user asked for something that cannot be done: exit code 2, nothing is written."""

    exit_code = 2


class RunError(MoebenchError):
    """A run that was asked for correctly failed while it worked: exit code 1."""

    exit_code = 1


class FailedTraining(RunError):
    """Training came to nothing, and the same steps would again: the loss is no number, or the model learnt nothing."""


class InWorkError(RunError):
    """Another process is at work on what was asked for, or has just finished it.

    Attributes:
        run_id: its run.
        host: the machine that it runs on.
    """

    def __init__(self, run_id: str, host: str) -> None:
        super().__init__(f"run {run_id} on {host} is at work on the same; wait, or end it with `moebench runs cancel`")
        self.run_id, self.host = run_id, host


class GoneError(RunError):
    """The database or the cluster is gone, or the run was cancelled: what is left to do must not be tried either."""


class Notice(UserWarning):
    """What a user should know of work that goes on all the same; the command line says it in one line."""


def first_line(error: BaseException) -> str:
    """The error of a library in one line, for use inside a message of ours."""
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
