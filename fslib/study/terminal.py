"""What the command line prints, and where it cannot: lines at once, help that counts, an output that nobody reads."""

import argparse
import os
import sys
from contextlib import suppress
from typing import Any


class OutputError(Exception):
    """Standard output cannot be written to."""


def say(line: str | None = None) -> None:
    """Print a line at once, also into a pipe, in what characters the terminal has; None: only what is left to print."""
    try:
        if line is not None:
            encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
            print(line.encode(encoding, "backslashreplace").decode(encoding))
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        raise OutputError(error.strerror) from error


class Parser(argparse.ArgumentParser):
    """argparse, but help that cannot be written is no success."""

    def _print_message(self, message: str, file: Any = None) -> None:
        if file is sys.stdout:
            say(message.removesuffix("\n"))
        else:
            super()._print_message(message, file)


def close_output() -> None:
    """Let what is still to be written go nowhere: Python would try again on its way out, and complain."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
