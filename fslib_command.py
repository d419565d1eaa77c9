"""The command `fslib` as pip installs it: what must hold while the package, and torch with it, is being imported."""

import signal
import sys
from typing import Any


def main() -> int:
    """Import the package and run its command line; what stops the import is said in one line."""
    said = "before anything was begun"
    try:
        signal.signal(signal.SIGTERM, _stop)
        from fslib.questions import main as command
    except KeyboardInterrupt:
        print(f"fslib: interrupted {said}", file=sys.stderr)
        return 130
    except SystemExit:
        print(f"fslib: terminated {said}", file=sys.stderr)
        return 143
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        print(
            f"fslib: cannot be started ({reason}); install it with pip install -r requirements.lock -e .",
            file=sys.stderr,
        )
        return 2
    return command()


def _stop(number: int, frame: Any) -> None:
    sys.exit(143)
