"""Processes that fastft starts for itself: they import nothing from the current folder and end
with their parent.

`python -m` puts the current folder first on `sys.path`, where a user's `random.py` or
`tokenize.py` would stand in for the standard library's. So a child is started with -P (nothing is
put in front), and this file, run as a script, adds the folder that fastft lies in at the end.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from pathlib import Path

LOOK_SECONDS = 0.3  # how often a child looks whether its parent is still there


def command(module: str, *arguments: str) -> list[str]:
    """Return the command line that runs `module` as `__main__` in a safe child; "-c" and a text
    run that text.
    """
    return [sys.executable, "-P", str(Path(__file__)), str(os.getpid()), module, *arguments]


def environment(**more: str) -> dict[str, str]:
    """Return this process's variables and `more`, with no relative folder in PYTHONPATH.

    An empty entry there, as `PYTHONPATH=:/some/folder` has one, is the current folder.
    """
    variables = os.environ | more
    if "PYTHONPATH" in variables:
        entries = variables["PYTHONPATH"].split(os.pathsep)
        variables["PYTHONPATH"] = os.pathsep.join(e for e in entries if os.path.isabs(e))
    return variables


def forget_current_folder() -> None:
    """Take the current folder from `sys.path`, where `python -m fastft` has put it."""
    with contextlib.suppress(FileNotFoundError):  # a folder that was deleted meanwhile
        if not sys.flags.safe_path and sys.path[:1] in ([""], [os.getcwd()]):
            del sys.path[0]


def end_with(parent: int) -> None:
    """Have a thread end this process, without any further work, as soon as `parent` is not its
    parent any more.

    A thread, since Linux's own signal for it comes when the *thread* ends that made the child.
    """
    if os.name == "nt":  # there a child keeps its parent's number for good
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="fastft-end-with-parent", daemon=True).start()


def _main() -> None:
    import runpy

    root = str(Path(__file__).resolve().parent.parent)
    if root not in sys.path:
        sys.path.append(root)
    parent, module, *arguments = sys.argv[1:]
    end_with(int(parent))
    if module == "-c":
        sys.argv = ["-c", *arguments[1:]]
        exec(compile(arguments[0], "<fastft>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main()
