"""Data that a person can see and trust: files in, proven samples and a report out. `prepare` is
the door.

read.py      files, folders and the Hub -> rows        formats.py   rows -> messages or texts
messages.py  one message in its shapes                 labels.py    data that is no list of answers
template.py  the chat template, and prompts            bounded.py   its limits of time and memory
turns.py     what is asked, what is answered           encode.py    messages -> ids, proven mask
rows.py      a chunk of rows -> samples and counts     workers.py   chunks through processes
light.py     a tokenizer without torch, for workers
pipeline.py  all of it in order                        cache.py     its result on disk, verified
mix.py       several sources, mixed
split.py     duplicates, and what is held out          store.py     samples in memory or in files
report.py    what a person should see                  batches.py   exact micro-batches
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "prepare": "pipeline", "Prepared": "pipeline", "TokenDataset": "store", "Sample": "store",
    "DataReport": "report", "Conversation": "rows", "ChatTemplate": "template",
    "choose_template": "template", "generation_prompt": "encode", "encode_conversation": "encode",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
