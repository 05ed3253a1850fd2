"""The model card that goes with every export: what it is made of, how, and under whose licence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from fastft.config import RunConfig
from fastft.files import ours, write_atomically
from fastft.runs.folder import RunFolder
from fastft.secrets import redact


def write_export_card(run: RunFolder, folder: Path, certificate: dict[str, Any]) -> str | None:
    """Write README.md beside exported files: the model card, with the certificate's verdicts
    quoted. Returns why it was not written, or None.
    """
    rows = [
        f"| {Path(entry['path']).name} | {entry['verdict']} | "
        f"{'' if entry['kl_mean'] is None else format(entry['kl_mean'], '.3g')} | "
        f"`{entry['sha256'][:16]}` |"
        for entry in certificate["files"]
    ]
    quoted = [
        "## Certificate",
        "",
        "Each file was compared with the trained model; certificate.md has every check and "
        "its threshold.",
        "",
        "| file | verdict | mean KL (nats a token) | sha256 |",
        "|---|---|---|---|",
        *rows,
        "",
    ]
    card = model_card(run.read_config(), run.read_record(), kind="gguf")
    card = card.replace("## Licence", "\n".join([*quoted, "## Licence"]))
    return write_card(folder / "README.md", card)


def write_card(path: Path, card: str) -> str | None:
    """Write a model card; returns why not, or None: a README.md that is somebody else's stays."""
    if (path.is_symlink() or path.exists()) and not ours.is_ours(path):
        return f"{path} was not written by fastft or was changed since, so it stays as it is"
    write_atomically(path, ours.signed(card, "<!-- {} -->"))
    return None


def model_card(
    config: RunConfig, record: dict[str, Any], *, kind: str, base_id: str | None = None
) -> str:
    """Return a README.md with the Hub's metadata header. `kind` is adapter, merged or gguf;
    `base_id` a public name.
    """
    base = base_id or config.model.name
    header: dict[str, Any] = {
        "library_name": {"adapter": "peft", "gguf": "gguf"}.get(kind, "transformers"),
        "tags": ["fastft", "lora"],
    }
    if not base.startswith(("/", ".", "~")):
        header["base_model"] = base
    dataset, lora, train = record.get("dataset", {}), config.lora, config.train
    losses = record.get("eval_loss_before"), record.get("eval_loss_after")
    rows = {
        "Base model": f"{base}" + (f" @ {config.model.revision}" if config.model.revision else ""),
        "Data": f"{config.data.named}: {dataset.get('rows_used', '?')} examples, "
        f"{dataset.get('trained_tokens', '?')} trained tokens",
        "Chat template": (record.get("template") or {}).get("name", "the base model's"),
        "LoRA": f"r {lora.r}, alpha {lora.alpha:g}, dropout {lora.dropout:g}, {lora.target_modules}"
        + (", rsLoRA" if lora.use_rslora else "")
        + (", DoRA" if lora.use_dora else ""),
        "Training": f"{record.get('steps', '?')} steps of {train.effective_batch_size} sequences, "
        f"learning rate {train.learning_rate:g}, {train.scheduler}, seed {train.seed}",
        "Precision": f"{_choice(record, 'dtype')}, quantization {_choice(record, 'quantization')}, "
        f"engine {_choice(record, 'engine')}",
        "Held-out loss": "not measured"
        if None in losses
        else f"{losses[0]:.4f} before, {losses[1]:.4f} after",
        "Trained with": ", ".join(
            f"{name} {version}" for name, version in (record.get("versions") or {}).items()
        ),
    }
    what = {"adapter": "LoRA adapter", "merged": "merged model", "gguf": "GGUF files"}[kind]
    lines = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        f"# {config.project} ({what})",
        "",
        "Fine-tuned with fastft.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()),
        "",
        *_usage(kind, base),
        "## Licence",
        "",
        "This model is derived from its base model and its training data; their licences "
        "apply. Check both before you share it.",
        "",
    ]
    return redact("\n".join(lines))


def _usage(kind: str, base: str) -> list[str]:
    if kind == "adapter":
        code = [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f'base = AutoModelForCausalLM.from_pretrained("{base}")',
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        ]
    elif kind == "merged":
        code = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")',
        ]
    else:
        return []
    return ["## Use", "", "```python", *code, "```", ""]


def _choice(record: dict[str, Any], name: str) -> str:
    return str((record.get("choices") or {}).get(name, {}).get("value", "?"))
