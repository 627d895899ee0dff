"""The one exception for what a user, a file or a limit can break, and how commands show it."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input. The message says what was expected, what was found and what to do next.

    Commands print it without a traceback and exit with status 1; everything else is a bug and keeps
    its traceback.
    """


def run_command(main: Callable[[], int | None]) -> None:
    """Run a module's `main` as the process: a UserError exits with 1, an interrupt with 130."""
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130  # 128 + SIGINT, as shells report it
    sys.exit(status)
