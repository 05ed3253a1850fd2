"""What an access token looks like, so that none is printed or written."""

from __future__ import annotations

import re

SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|wandb_[A-Za-z0-9_-]{16,})")


def redact(text: str) -> str:
    """Return `text` with everything that looks like an access token replaced by ``***``."""
    return SECRET.sub("***", text)
