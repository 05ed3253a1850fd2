"""Run llama.cpp's own converter in a child process: FOLDER SCRIPT ARGUMENTS.

FOLDER holds the converter and the gguf-py that it came with, which must win over the installed one.
A splitting rule that the converter does not know by its hash was found by behaviour, and comes in
FASTFT_PRE. FASTFT_NO_MTP says that the checkpoint has no heads that predict several tokens, which
the converter would look for where the config speaks of them.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any


def main() -> None:
    """Run the converter as a script, with `sys.argv` as it expects it."""
    folder, script, *arguments = sys.argv[1:]
    sys.path[:0] = [folder, f"{folder}/gguf-py"]
    from conversion.base import ModelBase, TextModel

    ModelBase.no_mtp = bool(os.environ.get("FASTFT_NO_MTP"))
    known = TextModel.get_vocab_base_pre

    def by_behaviour(self: Any, tokenizer: Any) -> str:
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            if not os.environ.get("FASTFT_PRE"):
                raise
            return os.environ["FASTFT_PRE"]

    TextModel.get_vocab_base_pre = by_behaviour
    sys.argv = [script, *arguments]
    runpy.run_path(f"{folder}/{script}", run_name="__main__")


if __name__ == "__main__":
    main()
