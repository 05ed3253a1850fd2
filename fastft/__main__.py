"""`fastft` and `python -m fastft`."""

import sys
from typing import NoReturn

from fastft.child import forget_current_folder


def main() -> NoReturn:
    """Run the command line; nothing more is imported from the current folder."""
    forget_current_folder()
    try:
        from fastft.cli import main as run
    except KeyboardInterrupt:  # while the libraries are read
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
