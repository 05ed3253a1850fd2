"""What of a run is served: its newest certified GGUF file, or merged model or adapter by vLLM.

llama.cpp's server is `fastft.inference.serve`. vLLM is another program, in an environment of its
own: fastft makes the command that serves *this run*, with its end tokens and its template.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastft.errors import FastFTError
from fastft.exporting.certificate import certified
from fastft.files import read_json
from fastft.runs.target import Target, resolve

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""vLLM's choices of --max-lora-rank (vllm/config/lora.py, 0.32)."""


def gguf_of(target: str | Path, *, base: str | None = None) -> tuple[Path, str]:
    """Return (GGUF file to serve, why this one): the file itself, or a run's newest certified one.

    A file is certified when its certificate says pass or warn for its present bytes. Raises
    FastFTError where a run has none, with what to type.
    """
    path = Path(target).expanduser()
    if path.suffix == ".gguf" or path.is_file():
        return path, "asked for"
    resolved = resolve(target, base=base)
    if resolved.adapter is None:
        raise FastFTError(
            f"{target} is a model folder. Export it first: fastft export {target} --to "
            "gguf:q4_k_m, or serve it with vLLM: --with vllm."
        )
    folder = resolved.default_out
    files = [p for p in folder.glob("[!.]*.gguf") if not p.name.endswith(".lora.gguf")]
    files.sort(key=lambda file: file.stat().st_mtime_ns, reverse=True)
    refused = []
    for file in files:
        entry = certified(file)
        if entry is not None and entry["verdict"] != "fail":
            return file, f"the newest certified file ({entry['verdict']}) of {len(files)}"
        refused.append(f"{file.name} ({'its check failed' if entry else 'no certificate'})")
    found = f" It holds {', '.join(refused)}." if refused else ""
    raise FastFTError(
        f"{folder} has no certified GGUF file to serve.{found} Write one with: fastft export "
        f"{target} --to gguf:q4_k_m; or name a file."
    )


def vllm_command(
    target: str | Path,
    *,
    base: str | None = None,
    adapters: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    n_ctx: int | None = None,
) -> list[str]:
    """Return the arguments after `vllm` that serve `target` (a run, adapter or model folder).

    The merged model where the run has a certified one, else the base with the adapter on it;
    `adapters`: more of them on the same base, each NAME=RUN. --generation-config and
    --chat-template are the trained ones: without them vLLM takes the base's, whose end token is
    often another, and answers run on. Raises FastFTError for adapters that vLLM cannot apply.
    """
    resolved = resolve(target, base=base)
    more = [_named(entry, resolved) for entry in adapters]
    merged = resolved.default_out / "merged"
    arguments = ["serve"]
    if resolved.adapter is None:
        arguments += [resolved.base, "--served-model-name", resolved.name]
    elif not more and _is_certified(merged):
        arguments += [str(merged.resolve()), "--served-model-name", resolved.name]
    else:
        arguments += _lora_arguments(resolved, more)
    if resolved.revision is not None and str(merged.resolve()) not in arguments:
        arguments += ["--revision", resolved.revision]
    trained = resolved.adapter.resolve() if resolved.adapter is not None else None
    if trained is not None and (trained / "generation_config.json").is_file():
        arguments += ["--generation-config", str(trained)]
    if trained is not None and (trained / "chat_template.jinja").is_file():
        arguments += ["--chat-template", str(trained / "chat_template.jinja")]
    if n_ctx is not None:
        arguments += ["--max-model-len", str(n_ctx)]
    return [*arguments, "--host", host, "--port", str(port)]


def vllm_program() -> list[str] | None:
    """Return how vLLM is started here: this environment's, else the one on PATH; None for none."""
    if importlib.util.find_spec("vllm") is not None:
        # -P: without it a module of the current folder would stand in for the standard library's.
        return [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main"]
    found = shutil.which("vllm")
    return [found] if found else None


def _is_certified(merged: Path) -> bool:
    entry = certified(merged) if (merged / "config.json").is_file() else None
    return entry is not None and entry["verdict"] != "fail"


def _lora_arguments(resolved: Target, more: list[tuple[str, Path]]) -> list[str]:
    assert resolved.adapter is not None
    modules = [(resolved.name, resolved.adapter), *more]
    names = [name for name, _ in modules]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise FastFTError(
            f"two adapters are called {', '.join(twice)}; give each a name of its own."
        )
    ranks = [_rank(name, folder) for name, folder in modules]
    rank = next(rank for rank in LORA_RANKS if rank >= max(ranks))
    pairs = [f"{name}={folder.resolve()}" for name, folder in modules]
    return [
        resolved.base, "--tokenizer", str(resolved.adapter.resolve()), "--enable-lora",
        "--max-lora-rank", str(rank), "--max-loras", str(len(pairs)), "--lora-modules", *pairs,
    ]  # fmt: skip


def _rank(name: str, adapter: Path) -> int:
    """Return the adapter's rank; FastFTError where vLLM would leave a part of it out."""
    config: dict[str, Any] = read_json(adapter / "adapter_config.json")
    cannot = []
    if config.get("use_dora"):
        cannot.append("DoRA")
    if config.get("trainable_token_indices") or config.get("modules_to_save"):
        cannot.append("trained token rows")
    ranks = [config.get("r"), *_values(config.get("rank_pattern"))]
    if not all(type(one) is int and one > 0 for one in ranks):
        raise FastFTError(
            f"{adapter / 'adapter_config.json'}: its ranks (r, rank_pattern) are {ranks}, and each "
            "must be a whole number above 0."
        )
    rank = max(ranks)
    if rank > LORA_RANKS[-1]:
        cannot.append(f"rank {rank}, which is above {LORA_RANKS[-1]}")
    if cannot:
        raise FastFTError(
            f"the adapter {name} has {' and '.join(cannot)}, which vLLM does not apply. Serve the "
            f"merged model: fastft export {adapter.parent} --to merged"
        )
    return rank


def _values(mapping: Any) -> list[Any]:
    return list(mapping.values()) if isinstance(mapping, dict) else [mapping] if mapping else []


def _named(entry: str, first: Target) -> tuple[str, Path]:
    """Return (name, adapter folder) of NAME=RUN; its base must be the first one's."""
    name, sign, where = entry.partition("=")
    if not (name and sign and where):
        raise FastFTError(f"--adapter {entry!r}: write NAME=RUN.")
    other = resolve(where)
    if other.adapter is None or (other.base, other.revision) != (first.base, first.revision):
        raise FastFTError(
            f"--adapter {name}: {where} stands on {other.base}, but {first.name} on {first.base}. "
            "Adapters that are served together need one base."
        )
    return name, other.adapter
