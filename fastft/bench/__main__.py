"""python -m fastft.bench, the same as fastft bench."""

import os
import sys

from fastft.cli import run

if __name__ == "__main__":
    code = run(["bench", *sys.argv[1:]])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
