"""Compare fastft's masks with three others on the same conversations, and explain each difference.

    python tools/compare_masks.py            # prints the table
    python tools/compare_masks.py --write    # writes docs/masks.md

    trl        assistant_only_loss: the tokens that trl's training template marks as generated
    unsloth    train_on_responses_only: what follows the marker of an answer, to the next question's
    apart      a second implementation: prompt and whole are tokenised apart, the rest is trained

A difference is explained when it is of a kind that `explain` names; anything else is a fault.
"""

from __future__ import annotations

import argparse
import collections
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from template_matrix import CONVERSATIONS, FORMAT  # noqa: E402

from fastft.data.encode import IGNORE, encode_turns  # noqa: E402
from fastft.data.formats import convert  # noqa: E402
from fastft.data.template import choose_template  # noqa: E402
from fastft.errors import FastFTError  # noqa: E402
from tests.unit.data import real_tokenizers as real  # noqa: E402

# family: (trl's file, Unsloth's marker of a question, its marker of an answer)
FAMILIES = {
    "llama3": ("llama3", "<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "qwen2.5": ("qwen2_5", "<|im_start|>user\n", "<|im_start|>assistant\n"),
    "qwen3": ("qwen3", "<|im_start|>user\n", "<|im_start|>assistant\n"),
    "qwen3-2507": ("qwen3_instruct_2507", "<|im_start|>user\n", "<|im_start|>assistant\n"),
    "gemma": ("gemma", "<start_of_turn>user\n", "<start_of_turn>model\n"),
    "gemma3": ("gemma3", "<start_of_turn>user\n", "<start_of_turn>model\n"),
    "phi3": ("phi3", "<|user|>\n", "<|assistant|>\n"),
    "gpt-oss": ("gptoss", "<|start|>user<|message|>", "<|start|>assistant"),
    "deepseek-r1": ("deepseek_r1_distill", "<｜User｜>", "<｜Assistant｜>"),
    "lfm2": ("lfm2", "<|im_start|>user\n", "<|im_start|>assistant\n"),
    "cohere2": ("cohere2", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    "glm4-moe": ("glm4moe", "<|user|>", "<|assistant|>"),
}  # fmt: skip
CHOSEN = (
    "one question", "two turns", "five turns", "system, three turns", "Japanese", "emoji", "HTML",
    "answer in tags", "code", "first answer excluded", "excluded in the middle", "reasoning",
    "reasoning, two turns", "tools, none called", "tool call", "tool chain", "parallel chain",
)  # fmt: skip
KINDS = {
    "same": "the same tokens are trained",
    "behind the end": "the other also trains what the template writes behind the token that ends the turn (a line feed, one more end of text); a model is stopped before it",
    "no end": "the other does not train the token that ends the turn: the model would not learn to stop",
    "heading": "the other trains a part of the heading, which is given to the model when it is asked",
    "excluded turn": "the other trains a turn that the row excludes by `weight: 0`",
    "history": "the template writes earlier turns differently once they are history: the other trains that form, fastft trains each turn as it is generated (in a sequence of its own)",
    "question trained": "the other trains a part of what is asked or of a tool's result",
    "thought left out": "the template leaves the reasoning out, or the other's marker does; fastft trains it as it is generated",
    "call lost": "the template writes a call only where the content beside it is null; the other gives it an empty text",
    "not trained": "the other trains nothing of an answer",
    "refused": "fastft refuses the row, because the template would lose a part of it; the other trains what is left",
    "other refuses": "the other raises an error",
}  # fmt: skip


def runs(ids: Sequence[int], labels: Sequence[int], decode: Any) -> list[str]:
    """Return the texts of the runs of trained tokens."""
    made: list[list[int]] = []
    before = False
    for token, label in zip(ids, labels, strict=True):
        if label != IGNORE:
            if not before:
                made.append([])
            made[-1].append(token)
        before = label != IGNORE
    return [decode(run) for run in made]


def of_trl(tokenizer: Any, training: str, messages: list[Any], tools: Any) -> list[str]:
    """Return what trl's assistant_only_loss trains."""
    made = tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=training, return_assistant_tokens_mask=True,
        return_dict=True,
    )  # fmt: skip
    masked = [
        token if mask else IGNORE
        for token, mask in zip(made["input_ids"], made["assistant_masks"], strict=True)
    ]
    return runs(made["input_ids"], masked, tokenizer.decode)


def of_unsloth(
    tokenizer: Any, markers: tuple[str, str], messages: list[Any], tools: Any
) -> list[str]:
    """Return what Unsloth's train_on_responses_only trains."""
    from unsloth.chat_templates import train_on_responses_only

    function = train_on_responses_only(
        None, instruction_part=markers[0], response_part=markers[1], tokenizer=tokenizer,
        return_function=True,
    )  # fmt: skip
    ids = tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)
    labels = function({"input_ids": [ids]})["labels"][0]
    return runs(ids, list(map(int, labels)), tokenizer.decode)


def of_apart(tokenizer: Any, messages: list[Any], tools: Any) -> list[str]:
    """Return what a plain second implementation trains: whole minus prompt, turn by turn."""
    made = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("weight", 1) == 0:
            continue
        before = [{k: v for k, v in m.items() if k != "weight"} for m in messages[: index + 1]]
        asked = tokenizer.apply_chat_template(
            before[:-1], tools=tools, add_generation_prompt=True, return_dict=False
        )
        whole = tokenizer.apply_chat_template(before, tools=tools, return_dict=False)
        shared = next(
            (i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b),
            min(len(asked), len(whole)),
        )
        made.append(tokenizer.decode(whole[shared:]))
    return made


def explain(
    mine: list[str] | None, theirs: list[str] | None, excluded: list[str], asked: list[str]
) -> str:
    """Return the kind of a difference (see KINDS); `unexplained` where it is of none."""
    if mine is None:
        return "refused"
    if theirs is None:
        return "other refuses"
    if mine == theirs:
        return "same"
    ours, others = "\0".join(mine), "\0".join(theirs)
    squeezed = [
        "".join(text.split()) for text in (ours.replace("\0", ""), others.replace("\0", ""))
    ]
    if any(part in others for part in excluded):
        return "excluded turn"
    if any(part in others for part in asked):
        return "question trained"
    if squeezed[0] == squeezed[1] or (
        len(mine) == len(theirs) and all(t.startswith(m) for m, t in zip(mine, theirs, strict=True))
    ):
        return "behind the end"
    if ours.count("get_weather") > others.count("get_weather"):
        return "call lost"
    if "THOUGHT" in ours and others.count("THOUGHT") < ours.count("THOUGHT"):
        return "thought left out"
    if len(theirs) < len(mine) and all(any(t.strip() in m for m in mine) for t in theirs):
        return "not trained"
    if squeezed[0].startswith(squeezed[1]) or _without_ends(mine) == [t.strip() for t in theirs]:
        return "no end"
    if squeezed[1].endswith(squeezed[0]) or all(
        any("".join(t.split()).endswith("".join(m.split())) for t in theirs) for m in mine
    ):
        return "heading"
    bodies = [_body(m) for m in mine]
    if all(any(body in "".join(t.split()) for t in theirs) for body in bodies):
        return "history"
    return "unexplained"


def _without_ends(texts: list[str]) -> list[str]:
    return [text[: text.rindex("<")].strip() if "<" in text else text.strip() for text in texts]


def _body(text: str) -> str:
    """Return an answer without the tokens around it."""
    plain = text[: text.rindex("<")] if "<" in text.rstrip()[1:] else text
    return "".join(plain.split("|>")[-1].split("</think>")[-1].split())


def compare() -> dict[tuple[str, str], dict[str, str]]:
    """Return (family, conversation) -> other -> kind of difference."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    found: dict[tuple[str, str], dict[str, str]] = {}
    for family, (file, *markers) in FAMILIES.items():
        source = (folder / f"{file}.jinja").read_text(encoding="utf-8")
        training = (folder / f"{file}_training.jinja").read_text(encoding="utf-8")
        tokenizer = real.tiny_for(source)
        template = choose_template(tokenizer)
        for name in CHOSEN:
            example = convert(CONVERSATIONS[name].row, FORMAT)
            messages, tools = example.messages, example.tools
            try:
                made = encode_turns(tokenizer, template, messages, tools)
                mine = [a for sequence in reversed(made) for a in sequence.answers]
                mine = sorted(mine, key=lambda a: _place(a, messages))
            except FastFTError:
                mine = None
            excluded = [m["content"] for m in messages if m.get("weight") == 0]
            asked = [m["content"] for m in messages if m["role"] != "assistant"]
            plain = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
            found[family, name] = {
                other: explain(mine, _or_none(call, *arguments), excluded, asked)
                for other, call, arguments in (
                    ("trl", of_trl, (tokenizer, training, plain, tools)),
                    ("unsloth", of_unsloth, (tokenizer, tuple(markers), plain, tools)),
                    ("apart", of_apart, (tokenizer, messages, tools)),
                )
            }
    return found


def _place(answer: str, messages: list[Any]) -> int:
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    return next((i for i, text in enumerate(said) if text and text in answer), -1)


def _or_none(call: Any, *arguments: Any) -> list[str] | None:
    from jinja2 import TemplateError

    try:
        return call(*arguments)
    except (TemplateError, TypeError, ValueError, RuntimeError, KeyError):
        return None


def table(found: dict[tuple[str, str], dict[str, str]]) -> str:
    """Return the comparison as Markdown."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in found.values():
        for other, kind in row.items():
            counts[other][kind] += 1
    used = [kind for kind in (*KINDS, "unexplained") if any(c[kind] for c in counts.values())]
    lines = [
        "# Masks, compared",
        "",
        "Generated by `python tools/compare_masks.py --write`: "
        f"{len(FAMILIES)} template families of trl, {len(CHOSEN)} conversations each, with tiny "
        "byte-level tokenizers. Each cell is how many of them.",
        "",
        "| against fastft | trl assistant_only_loss | Unsloth train_on_responses_only | prompt and whole apart | what it is |",
        "|---|---|---|---|---|",
    ]
    for kind in used:
        cells = " | ".join(str(counts[other][kind]) for other in ("trl", "unsloth", "apart"))
        lines.append(f"| {kind} | {cells} | {KINDS.get(kind, 'unexplained')} |")
    lines += ["", "| family, conversation | trl | Unsloth | apart |", "|---|---|---|---|"]
    for (family, name), row in found.items():
        if set(row.values()) != {"same"}:
            lines.append(f"| {family}, {name} | {row['trl']} | {row['unsloth']} | {row['apart']} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    text = table(compare())
    if parser.parse_args().write:
        (ROOT / "docs" / "masks.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
