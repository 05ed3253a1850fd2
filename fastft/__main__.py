"""`fastft` and `python -m fastft`."""

from fastft.cli import main

if __name__ == "__main__":
    main()
