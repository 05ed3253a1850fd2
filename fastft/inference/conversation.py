"""`fastft chat` at a terminal: one question, a conversation, base and adapter side by side."""

from __future__ import annotations

import re
import sys
from typing import Any

from fastft.errors import FastFTError
from fastft.inference.generate import ChatModel, Messages, ask, messages_of, open_chat
from fastft.inference.sampling import Sampling

HELP = "/exit (/quit, or an empty line) ends it, /reset forgets what was said, /help shows this."
LEAVE = ("", "/exit", "/quit")


def answers(
    target: str,
    prompts: list[str],
    *,
    system: str | None,
    sampling: Sampling,
    compare: bool,
    show: bool,
    **open_keywords: Any,
) -> dict[str, Any]:
    """Answer each prompt as if it were the only one.

    Returns {text, tokens, tokens_per_sec} (and base_text with `compare`) of one prompt, or
    {"answers": [that with its "prompt", ...]} of several.
    """
    model = open_chat(target, **open_keywords)
    base = _open_base(target, open_keywords) if compare else None
    results = []
    for prompt in prompts:
        if show and len(prompts) > 1:
            print(f"? {prompt}")
        messages = messages_of(prompt, system)
        result: dict[str, Any] = {"prompt": prompt} if len(prompts) > 1 else {}
        if base is not None:
            result["base_text"] = _show("base", base, messages, sampling, show).text
        said = _show("adapter" if compare else "", model, messages, sampling, show)
        result |= {"text": said.text, "tokens": said.tokens, "tokens_per_sec": said.tokens_per_sec}
        results.append(result)
    return results[0] if len(results) == 1 else {"answers": results}


def converse(
    target: str, *, system: str | None, sampling: Sampling, compare: bool, **open_keywords: Any
) -> None:
    """Talk until /exit, an empty line or end of input; what was said is part of each prompt."""
    model = open_chat(target, **open_keywords)
    base = _open_base(target, open_keywords) if compare else None
    opening: Messages = [{"role": "system", "content": system}] if system else []
    history = list(opening)
    print("Type a message; /help lists the commands, /exit ends it.", file=sys.stderr)
    while True:
        try:
            prompt = input("> ").strip()
        except EOFError:
            print()  # the shell's prompt begins a line of its own
            return
        if prompt in LEAVE:
            return
        if prompt == "/reset":
            history = list(opening)
            print("The conversation begins anew.", file=sys.stderr)
            continue
        if prompt == "/help":
            print(HELP, file=sys.stderr)
            continue
        if re.fullmatch(r"/[a-z]+", prompt):
            print(f"There is no command {prompt}: {HELP}", file=sys.stderr)
            continue
        history.append({"role": "user", "content": prompt})
        if base is not None:
            _show("base", base, history, sampling, show=True)
        said = _show("adapter" if compare else "", model, history, sampling, show=True)
        history.append({"role": "assistant", "content": said.text})


def _open_base(target: str, keywords: dict[str, Any]) -> ChatModel:
    if str(target).endswith(".gguf"):
        raise FastFTError(
            "--compare needs a run or an adapter folder; a GGUF file holds one model."
        )
    return open_chat(target, **(keywords | {"with_adapter": False}))


def _show(label: str, model: ChatModel, messages: Messages, sampling: Sampling, show: bool) -> Any:
    if not show:
        return ask(model, messages, sampling)
    if label:
        print(f"[{label}] ", end="")
    said = ask(model, messages, sampling, lambda piece: print(piece, end="", flush=True))
    print()
    print(f"({len(said.tokens)} tokens, {said.tokens_per_sec:.1f} tokens/s)", file=sys.stderr)
    return said
