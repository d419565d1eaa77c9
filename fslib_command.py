"""The command `fslib` as pip installs it: what must hold while the package, and torch with it, is being imported."""

import os
import signal
import sys
from typing import Any


def main() -> int:
    """Import the package and run its command line; what stops the import is said in one line."""
    interrupt = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGTERM, _end)
    if interrupt is signal.default_int_handler:  # one that is ignored stays so
        signal.signal(signal.SIGINT, _end)
    try:
        import fslib.study.cli  # noqa: F401 - `command` opens it, when Ctrl-C is Python's own again
        from fslib.questions import main as command
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        print(
            f"fslib: cannot be started ({reason}); install it with pip install -r requirements.lock -e .",
            file=sys.stderr,
        )
        return 2
    if interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    code = command()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is said and done: Python's own end would answer in a traceback
    return code


def _end(number: int, frame: Any) -> None:
    """End the process at once: nothing was begun, and an exception inside a library's start-up can abort or be lost."""
    word = "interrupted" if number == signal.SIGINT else "terminated"
    os.write(2, f"fslib: {word} before anything was begun\n".encode())
    os._exit(128 + number)
