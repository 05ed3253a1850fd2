"""Which base model is this? A fingerprint of its weights, so a run can never silently continue on
a different base.

An adapter is a difference to one base. A folder whose weights were exchanged, or a Hub branch that
moved, loads without any message, and all that is trained, merged or exported upon it is wrong.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from fastft.files import read_json, sha256

FULL_BYTES = 2 * 2**30  # folders up to this size are hashed whole: a few seconds
SAMPLES, SAMPLE_BYTES = 64, 2**16
# of config.json, written by the saving program
VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")


def base_fingerprint(
    name: str, revision: str | None = None, *, full: bool = True
) -> dict[str, Any]:
    """Return what identifies the base model `name`, a folder or a Hub id.

    A folder: {"kind": "folder", "config": sha256, "files": {name: {"bytes", "sampled"[,
    "sha256"]}}}. "sampled" hashes the safetensors header and 64 pieces of 64 KiB, evenly spread;
    "sha256" is there with `full` and up to 2 GiB in all. A Hub id: {"kind": "hub", "name",
    "commit"}, commit None where the cache does not know it.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return {"kind": "hub", "name": name, "commit": _commit(name, revision)}
    weights = sorted(folder.glob("*.safetensors"))
    full = full and sum(path.stat().st_size for path in weights) <= FULL_BYTES
    return {
        "kind": "folder",
        "config": _config(folder),
        "files": {path.name: _file(path, full) for path in weights},
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each thing in which two fingerprints of a base differ; what only one of
    them knows is no difference.
    """
    if before.get("kind") != now["kind"]:
        return [f"the base was a {before.get('kind')}, is now a {now['kind']}"]
    if now["kind"] == "hub":
        return [
            f"{key} was {before.get(key)}, is now {now[key]}"
            for key in ("name", "commit")
            if before.get(key) and now[key] and before[key] != now[key]
        ]
    lines = []
    if before["config"] != now["config"]:
        lines.append(f"config.json was {before['config'][:12]}, is now {now['config'][:12]}")
    for name in sorted({*before["files"], *now["files"]}):
        old, new = before["files"].get(name), now["files"].get(name)
        if old is None or new is None:
            lines.append(f"{name} {'is new' if old is None else 'is missing'}")
        elif any(
            key in old and key in new and old[key] != new[key]
            for key in ("bytes", "sampled", "sha256")
        ):
            lines.append(f"{name} was {_short(old)}, is now {_short(new)}")
    return lines


def _short(entry: dict[str, Any]) -> str:
    return f"{entry.get('sha256', entry['sampled'])[:12]} ({entry['bytes']:,} bytes)"


def _config(folder: Path) -> str:
    path = folder / "config.json"
    if not path.is_file():
        path = folder / "adapter_config.json"  # an adapter folder as base
    values = {k: v for k, v in read_json(path).items() if k not in VOLATILE}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _file(path: Path, full: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"bytes": path.stat().st_size, "sampled": _sampled(path)}
    if full:
        entry["sha256"] = sha256(path)
    return entry


def _sampled(path: Path) -> str:
    """Return the hash of the header (it begins with its length in 8 bytes) and of evenly spread
    pieces.
    """
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        digest.update(file.read(min(length, 2**26)))
        for i in range(SAMPLES):
            file.seek(i * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _commit(name: str, revision: str | None) -> str | None:
    """Return the commit that the cache holds for a Hub id: the name of the snapshot folder."""
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", "adapter_config.json"):
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return Path(found).parent.name
    return None
