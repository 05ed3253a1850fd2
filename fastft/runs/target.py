"""RUN on the command line: a run folder, any peft adapter folder, a plain model folder or Hub id,
or a GGUF file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fastft.data.bounded import matches
from fastft.errors import FastFTError
from fastft.files import read_json, sha256
from fastft.models import check_files
from fastft.runs.checkpoint import MANIFEST, read_manifest
from fastft.runs.fingerprint import base_fingerprint, differences
from fastft.runs.folder import RunFolder
from fastft.runs.listing import known_runs

LEFT_BY_DATA = {".lock", "data.png"}
"""What `fastft data`, or a `fastft train` that was refused, leaves in a run's folder."""


@dataclass(frozen=True)
class Target:
    """What a command works on."""

    base: str
    """Folder or Hub id of the base model (the model itself where there is no adapter)."""
    revision: str | None
    adapter: Path | None
    run: RunFolder | None

    @property
    def name(self) -> str:
        """A short name for files made from it."""
        if self.run is not None:
            return self.run.path.name
        path = self.adapter or Path(self.base)
        return path.parent.name if path.name == "final" else path.name

    @property
    def quantization(self) -> str:
        """How the run held its base while it trained: none, nf4 or int8; none without a run."""
        choices = self.run.read_record().get("choices", {}) if self.run is not None else {}
        return str(choices.get("quantization", {}).get("value", "none"))

    @property
    def default_out(self) -> Path:
        """Where exports go unless --out says otherwise."""
        return self.run.export if self.run is not None else Path("export") / self.name


def resolve(target: str | Path, *, base: str | None = None) -> Target:
    """Return what `target` names. Raises FastFTError where it is none of the known things, or has
    no base.
    """
    path = Path(target).expanduser()
    if (path / "run.yaml").is_file():
        return _run(RunFolder(path), base)
    if (path / "adapter_config.json").is_file():
        run = RunFolder(path.resolve().parent)
        return _adapter(path, base, run if (run.path / "run.yaml").is_file() else None)
    if path.is_dir() or not path.exists():
        from fastft.models import check_checkpoint

        if path.is_dir() and {p.name for p in path.iterdir()} <= LEFT_BY_DATA:
            raise FastFTError(
                f"nothing was trained in {path} yet. Start with: fastft train run.yaml"
            )
        if path.is_dir() and not (path / "config.json").is_file():
            found = ", ".join(sorted(p.name for p in path.iterdir())[:5]) or "nothing"
            raise FastFTError(
                f"{path} is neither a run (run.yaml), nor an adapter (adapter_config.json), "
                "nor a model (config.json). It "
                f"holds: {found}."
            )
        if not path.exists() and _looks_like_a_path(str(target)):
            raise FastFTError(f"{target} does not exist.{known_runs(path)}")
        check_checkpoint(str(target))
        return Target(str(target), None, None, None)
    raise FastFTError(
        f"{path} is a file; give a run folder, an adapter folder or a model folder (or a "
        ".gguf file, to chat with it)."
    )


def _looks_like_a_path(name: str) -> bool:
    """Whether `name` is meant as a folder here: a Hub id has one slash, and no such folder before
    it.
    """
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        return True
    return Path(name.split("/")[0]).is_dir()


def _run(run: RunFolder, base: str | None) -> Target:
    config = run.read_config()
    if not (run.final / "adapter_config.json").is_file():
        raise FastFTError(
            f"the run {run.path} is not finished: it has no final/. Go on with: fastft train "
            f"{run.path / 'run.yaml'}"
        )
    _check_adapter(run.final)
    if base is None:
        _check_base(run, config.model.name, config.model.revision)
    return Target(
        base or config.model.name, config.model.revision if base is None else None, run.final, run
    )


def _adapter(path: Path, base: str | None, run: RunFolder | None) -> Target:
    config = read_json(path / "adapter_config.json")
    _check_adapter(path)
    name = base or config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name or "\0" in name:
        raise FastFTError(
            f"{path / 'adapter_config.json'} does not name its base model. Give it with --base."
        )
    if base is None and run is not None and path.name == "final":
        _check_base(run, name, config.get("revision"))
    return Target(name, config.get("revision") if base is None else None, path, run)


def _check_base(run: RunFolder, name: str, revision: str | None) -> None:
    """Raise FastFTError where what lies at the base's place is not what the run was trained on."""
    was = run.read_record().get("base")
    if was is None or (was["kind"] == "folder" and not Path(name).expanduser().is_dir()):
        return  # an older run; or no base there, which says so itself
    found = differences(was, base_fingerprint(name, revision, full=False))
    if found:
        raise FastFTError(
            f"the base model {name} is not the one that {run.path} was trained on:\n"
            + "\n".join(f"  - {line}" for line in found)
            + "\nPut the old one back, or name the right one with --base (which is then taken "
            "as it is)."
        )


def _check_adapter(path: Path) -> None:
    """Raise FastFTError unless the adapter folder holds whole safetensors weights, those of its
    manifest if it has one.
    """
    from fastft.models import read_header

    weights = path / "adapter_model.safetensors"
    check_files(path)
    if not weights.is_file():
        pickle = (path / "adapter_model.bin").is_file()
        what = (
            "has only a pickle (adapter_model.bin), which can run code when loaded"
            if pickle
            else "has no adapter_model.safetensors"
        )
        raise FastFTError(f"adapter {path} {what}. Save it again with safe_serialization=True.")
    tensors, _ = read_header(weights)
    _check_shapes(path, {name: entry["shape"] for name, entry in tensors.items()})
    _check_patterns(path, {re.split(r"\.lora_|\.modules_to_save", name)[0] for name in tensors})
    _check_manifest(path)


def _check_shapes(path: Path, shapes: dict[str, list[int]]) -> None:
    """Raise FastFTError for parts of LoRA that are no matrices, and for a rank in
    adapter_config.json above every side of every one of them: peft would make room for it.
    """
    parts = {name: shape for name, shape in shapes.items() if re.search(r"\.lora_[AB]\.", name)}
    for name, shape in parts.items():
        if len(shape) < 2:
            raise FastFTError(f"adapter {path}: {name} has the shape {shape} and is no matrix.")
    config = read_json(path / "adapter_config.json")
    pattern = config.get("rank_pattern")
    said = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    longest = max((max(shape) for shape in parts.values()), default=None)
    above = [rank for rank in said if type(rank) is int and longest and rank > longest]
    if above:
        raise FastFTError(
            f"adapter {path}: adapter_config.json says rank {above[0]:,}, and the longest side of "
            f"its weights is {longest:,}. They do not belong together; download or copy it again."
        )


def _check_patterns(path: Path, modules: set[str]) -> None:
    """Raise FastFTError for a pattern in adapter_config.json that takes seconds on the names of the
    adapter's own modules: peft tries each on every module.
    """
    config = read_json(path / "adapter_config.json")
    patterns = [config.get("target_modules"), config.get("exclude_modules")]
    for key in ("rank_pattern", "alpha_pattern"):
        patterns += config[key] if isinstance(config.get(key), dict) else []
    for pattern in patterns:
        for name in modules if isinstance(pattern, str) else ():
            matches(rf"(.*\.)?({pattern})", name, whole=True)


def _check_manifest(path: Path) -> None:
    """Raise FastFTError where the weights or their settings are not what training wrote (a README
    may be edited).
    """
    try:
        entries = read_manifest((path / MANIFEST).read_bytes())
    except (FileNotFoundError, ValueError):
        # another tool's adapter, or nothing to compare with: `fastft train` finds a damaged
        # manifest and mends it
        return
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        if name in entries and (
            not (path / name).is_file() or sha256(path / name) != entries[name]["sha256"]
        ):
            raise FastFTError(
                f"{path / name} was changed after training: its sha256 is not the one in "
                f"{MANIFEST}. Run `fastft train` "
                f"again to have it restored; to use it as it is, delete {MANIFEST}."
            )
