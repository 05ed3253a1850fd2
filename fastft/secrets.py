"""What an access token looks like, so that none is printed or written. The only such list."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

KINDS = (
    r"\bhf_[A-Za-z0-9]{16,}",  # Hugging Face
    r"\bapi_org_[A-Za-z0-9]{16,}",
    r"\bsk-[A-Za-z0-9_-]{16,}",  # OpenAI, Anthropic and those that copy them
    r"\bwandb_[A-Za-z0-9_-]{16,}",
    r"\b(?:ghp|gho|ghu|ghs|ghr)_[A-Za-z0-9]{20,}",  # GitHub
    r"\bgithub_pat_[A-Za-z0-9_]{20,}",
    r"\bglpat-[A-Za-z0-9_-]{16,}",  # GitLab
    r"\bxox[abprs]-[A-Za-z0-9-]{16,}",  # Slack
    r"\bA(?:KIA|SIA)[A-Z0-9]{16}\b",  # Amazon
    r"\bAIza[A-Za-z0-9_-]{35}",  # Google
    r"(?<=://)[^\s/@:'\"]{1,200}:[^\s/@'\"]{1,200}(?=@)",  # name:password@host in an address
    r"(?<=Bearer )[A-Za-z0-9._~+/=-]{12,}",
)
SECRET = re.compile("|".join(KINDS))
VARIABLE = re.compile(r"(TOKEN|API_KEY|SECRET|PASSWORD|PASSWD)$")
SHORTEST_VALUE = 12  # of an environment variable: a shorter one may be a word of the text


def redact(text: str) -> str:
    """Return `text` with everything that looks like an access token replaced by ``***``, and the
    values of variables that hold one (HF_TOKEN, WANDB_API_KEY ...).

    The name of a file or folder that exists is no token, whatever it looks like.
    """
    for value in _values():
        text = text.replace(value, "***")
    return SECRET.sub(lambda m: m.group() if _is_path(text, m.start(), m.end()) else "***", text)


def _values() -> Iterator[str]:
    for name, value in os.environ.items():
        if len(value) >= SHORTEST_VALUE and VARIABLE.search(name.upper()):
            yield value


def _is_path(text: str, start: int, end: int) -> bool:
    """Whether the match text[start:end] is part of a path that exists, read from some slash or
    blank before it.
    """
    end = re.compile(r"[^\s/'\"`,;:)\]}]*").match(text, end).end()  # type: ignore[union-attr]
    line = text.rfind("\n", 0, start) + 1
    begins = [m.start() for m in re.finditer(r"/|(?<=[\s'\"`(=:\[])\S", text[line:start])][-30:]
    candidates = (text[line + at : end] for at in (*begins, start - line))
    return any(
        len(path) < 4096 and "\0" not in path and os.path.lexists(path) for path in candidates
    )
