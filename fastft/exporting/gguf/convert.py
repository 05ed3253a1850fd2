"""Run llama.cpp's own converter in a child process: FOLDER SCRIPT ARGUMENTS.

FOLDER holds the converter and the gguf-py that it came with, which must win over the installed one.
A splitting rule that the converter does not know by its hash was found by behaviour, and comes in
FASTFT_PRE. FASTFT_NO_MTP says that the checkpoint has no heads that predict several tokens, which
the converter would look for where the config speaks of them. FASTFT_ADD_BOS (0 or 1) is written
where the converter says nothing of it: llama.cpp adds a BOS by the splitting rule's default then.
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
    import gguf
    from conversion.base import ModelBase, TextModel

    header = gguf.GGUFWriter.write_header_to_file

    def with_bos(self: Any, *args: Any, **kwargs: Any) -> None:
        said = "tokenizer.ggml.add_bos_token" in self.kv_data[0]
        if os.environ.get("FASTFT_ADD_BOS") and not said:
            self.add_add_bos_token(os.environ["FASTFT_ADD_BOS"] == "1")
        header(self, *args, **kwargs)

    gguf.GGUFWriter.write_header_to_file = with_bos  # type: ignore[method-assign]
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
