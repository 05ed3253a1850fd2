"""Export target `adapter`: the folder that plain peft loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastft.config import RunConfig
from fastft.errors import FastFTError
from fastft.runs import checkpoint
from fastft.runs.card import model_card

ADAPTER_FILES = frozenset({
    "adapter_model.safetensors", "adapter_config.json", "config.json", "generation_config.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json", "README.md", "LICENSE", "LICENSE.txt", "NOTICE",
})  # fmt: skip
"""Names of the files that an adapter consists of; nothing else is copied or uploaded."""


def write_adapter(
    model: Any,
    tokenizer: Any,
    out: Path,
    *,
    config: RunConfig,
    record: dict[str, Any],
    end_token_ids: list[int],
    initial: Path | None = None,
) -> Path:
    """Write the trained adapter to `out`: safetensors, adapter and base config, tokenizer, model
    card; whole or not at all.

    It loads with `peft.PeftModel.from_pretrained(base, out)`, without fastft. `initial` is the
    adapter as it was before the first step, for inits that moved the base's weights: the
    difference of the two (rank 2r) fits the plain base.
    """
    with checkpoint.sealed(out) as aside:
        # peft saves the rows of trained tokens inside the adapter; whole embeddings only where they
        # were resized.
        conversion = {"path_initial_model_for_weight_conversion": str(initial)} if initial else {}
        model.save_pretrained(str(aside), safe_serialization=True, **conversion)
        tokenizer.save_pretrained(str(aside))
        base = model.get_base_model()
        base.config.to_json_file(str(aside / "config.json"))
        generation = base.generation_config.to_dict() | {
            "eos_token_id": end_token_ids,
            "pad_token_id": tokenizer.pad_token_id,
        }
        (aside / "generation_config.json").write_text(
            json.dumps(generation, indent=1), encoding="utf-8"
        )
        source = Path(config.model.name).expanduser() / "tokenizer.model"
        if source.is_file():  # transformers 5 no longer writes it; llama.cpp's converter needs it
            shutil.copy2(source, aside / "tokenizer.model")
        (aside / "README.md").write_text(
            model_card(config, record, kind="adapter"), encoding="utf-8"
        )
    return out


def copy_adapter(final: Path, out: Path) -> Path:
    """Copy an adapter folder to `out`, whole or not at all.

    Raises FastFTError where `out` exists and is no adapter folder that fastft wrote.
    """
    if out.resolve() == final.resolve():
        return out
    if out.is_symlink() or (out.exists() and not _is_ours(out)):
        raise FastFTError(
            f"{out} exists and was not written by fastft. Choose another --out, or move it away."
        )
    with checkpoint.sealed(out) as aside:
        shutil.copytree(final, aside, ignore=_not_the_adapters(final))
    return out


def _is_ours(out: Path) -> bool:
    """Whether `out` is an empty folder, or one whose manifest names an adapter's weights."""
    if not out.is_dir():
        return False
    try:
        entries = checkpoint.read_manifest((out / checkpoint.MANIFEST).read_bytes())
    except (OSError, ValueError):
        return not any(out.iterdir())
    return "adapter_model.safetensors" in entries


def _not_the_adapters(final: Path) -> Callable[[Any, list[str]], set[str]]:
    """Return what `copytree` leaves out: all that is no file of an adapter, in any folder."""
    return lambda folder, names: {
        name for name in names if Path(folder) != final or not belongs_to_adapter(final / name)
    }


def belongs_to_adapter(path: Path) -> bool:
    """Whether a file in an adapter folder is one that an adapter is made of.

    Not: what a trainer leaves beside it (optimizer.pt, checkpoints), notes, keys.
    """
    return path.name in ADAPTER_FILES and path.is_file()


def keep_initial(model: Any, out: Path) -> Path:
    """Keep the untrained adapter in `out` (once), which `write_adapter` needs for inits that moved
    the base's weights.
    """
    if not (out / "adapter_config.json").is_file():
        config = model.peft_config["default"]
        # peft refuses to convert towards itself
        init, config.init_lora_weights = (config.init_lora_weights, True)
        model.save_pretrained(str(out), safe_serialization=True)
        config.init_lora_weights = init
    return out
