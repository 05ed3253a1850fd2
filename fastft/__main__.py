"""`fastft` and `python -m fastft`."""

from typing import NoReturn

from fastft.child import forget_current_folder


def main() -> NoReturn:
    """Run the command line; nothing more is imported from the current folder."""
    forget_current_folder()
    from fastft.cli import main as run

    run()


if __name__ == "__main__":
    main()
