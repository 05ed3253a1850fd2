"""Certificates: whether an exported file is the model that was trained.

Every file is compared with the trained model (base plus adapter, plain transformers and peft). The
reference and the checks of each file run in processes of their own: a crash of llama.cpp is a
failed check that says where, never a crash of fastft.
"""

from __future__ import annotations

import json
import signal
import struct
import subprocess
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastft import child
from fastft.errors import CouldNotFinishError, FastFTError
from fastft.exporting.certificate import (
    changed_since,
    refuse_foreign,
    unchanged_check,
    worst,
    write_certificate,
)
from fastft.exporting.llama import base_folder, sample_ids, tokenizer_source
from fastft.exporting.place import one_at_a_time
from fastft.files import sha256
from fastft.files.scratch import scratch
from fastft.hardware import installed
from fastft.progress import Reporter
from fastft.runs.card import write_export_card
from fastft.runs.mirror import follow
from fastft.runs.target import Target, resolve

KINDS = ("adapter", "merged", "gguf", "gguf-lora", "ollama")


def verify(
    run: str | Path,
    *,
    out: str | Path | None = None,
    base: str | None = None,
    files: Sequence[Path | str] | None = None,
    accept_changed: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Check what was exported of `run` (a run, adapter or model folder) against the trained model;
    see `verify_files`.

    A file whose bytes are not those that its certificate was written for is judged, and fails:
    something else than fastft wrote it. `accept_changed` judges it as a new file.

    `files`: those to check; default: everything in `out` (default: the run's export/) and the
    run's final/. Raises FastFTError where nothing was exported.
    """
    target = resolve(run, base=base)
    folder = Path(out).expanduser() if out is not None else target.default_out
    report = reporter or Reporter()
    paths = [Path(file) for file in files] if files is not None else exported_files(target, folder)
    if not paths:
        raise FastFTError(
            f"nothing to verify: {folder} holds no export. Write one with: fastft export "
            f"{run} --to gguf:q4_k_m"
        )
    base_path = base_folder(target)
    with one_at_a_time(folder), scratch("fastft-verify-") as work:
        base_gguf = None
        if any(path.name.endswith(".lora.gguf") for path in paths):
            from fastft.exporting.gguf import export_gguf

            base_gguf = export_gguf(
                base_path, work / "base.gguf", ["f32"], tokenizer=tokenizer_source(target)
            )[0]["path"]
        found = verify_files(
            paths, base=base_path, adapter=target.adapter, samples=sample_ids(target), out=folder,
            base_gguf=base_gguf, accept_changed=accept_changed, say=report.note,
        )  # fmt: skip
    if target.run is not None:
        if kept := write_export_card(target.run, folder, found):
            report.note(kept)
        follow(target.run, note=report.note, warn=report.warn)
    return found


def exported_files(target: Target, folder: Path) -> list[Path]:
    """Return the adapter of a run and everything that `fastft export` wrote into `folder`."""
    found = [target.run.final] if target.run is not None else []
    found += [path for path in (folder / "adapter", folder / "merged") if path.is_dir()]
    found += sorted(folder.glob("[!.]*.gguf"))
    found += [path for path in (folder / "Modelfile",) if path.is_file()]
    return found


def verify_files(
    files: Sequence[Path | str],
    *,
    base: Path | str,
    adapter: Path | str | None = None,
    samples: Sequence[Any] = (),
    out: Path | str,
    base_gguf: Path | str | None = None,
    max_new_tokens: int = 64,
    accept_changed: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Check every file against the trained model, write `out`/certificate.json and .md, and return
    the findings.

    `base`: the 16-bit base model (folder or Hub id); `adapter`: the trained adapter folder, None
    for a plain model. `samples`: held-out text: strings, lists of messages, lists of token ids, or
    {"input_ids", "labels"} (positions with label -100 are not counted); where there are none,
    built-in texts are used and the certificate says so. `base_gguf`: a GGUF of the base in f32 or
    f16, needed for LoRA adapters in GGUF form. `say` gets a line a file.

    Returns {"files": [{path, kind, sha256, verdict, kl_mean, kl_p99, top1, ppl_ratio, checks:
    [{name, verdict, detail}]}], "verdict": the worst}; the numbers are None where a file did not
    get that far. Raises FastFTError for files that are none of the known kinds,
    CouldNotFinishError where the trained model itself cannot be run.
    """
    paths = [Path(file) for file in files]
    kinds = [kind_of(path) for path in paths]
    if "gguf-lora" in kinds and base_gguf is None:
        raise FastFTError(
            "a LoRA adapter in GGUF form is checked on a GGUF of its base; give base_gguf "
            "(f32 or f16)."
        )
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    refuse_foreign(out)
    entries = []
    with scratch(".verify-", out) as folder:
        say("trained model: logits, answers and weights to compare with")
        about = make_reference(
            folder, str(base), str(adapter) if adapter else None, list(samples), max_new_tokens
        )
        for path, kind in zip(paths, kinds, strict=True):
            job = {
                "path": str(path),
                "kind": kind,
                "base": str(base),
                "adapter": adapter and str(adapter),
            }
            job["base_gguf"] = base_gguf and str(base_gguf)
            say(f"checking {path.name}")
            was = None if accept_changed or kind == "adapter" else changed_since(path, out)
            entry = verify_one(job, folder)
            if was:
                entry |= {"verdict": "fail", "changed_from": was}
                entry["checks"].insert(0, unchanged_check(path, was, entry["sha256"]))
            entries.append(entry)
            if entry["verdict"] != "pass":  # the answer lists every file's verdict
                say(f"{path.name}: {entry['verdict']}{first_trouble(entry)}")
    about["reference"]["model"] = str(base) + (f" with the adapter {adapter}" if adapter else "")
    write_certificate(out, entries, about)
    return {"files": entries, "verdict": worst(entry["verdict"] for entry in entries)}


def kind_of(path: Path) -> str:
    """Return which of KINDS the file or folder `path` is; FastFTError where it is none."""
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            return "adapter"
        if (path / "config.json").is_file():
            return "merged"
        raise FastFTError(
            f"{path} holds neither adapter_config.json nor config.json: not a model that can "
            "be checked."
        )
    if not path.is_file():
        raise FastFTError(f"{path} does not exist; export it first.")
    if path.name.startswith("Modelfile"):
        return "ollama"
    with path.open("rb") as file:
        head = file.read(4096)
    if path.suffix != ".gguf" and not head.startswith(b"GGUF"):
        raise FastFTError(f"{path} is not a GGUF file, a Modelfile, or a model folder.")
    # A damaged file is still to be checked: its kind is looked for in the raw bytes (a text, 8, of
    # 7 bytes).
    return (
        "gguf-lora" if b"general.type" + struct.pack("<IQ", 8, 7) + b"adapter" in head else "gguf"
    )


def make_reference(
    folder: Path, base: str, adapter: str | None, samples: list[Any], max_new_tokens: int
) -> dict[str, Any]:
    """Let a subprocess write what the trained model says into `folder`; return what the
    certificate tells about it.
    """
    job = {"folder": str(folder), "base": base, "adapter": adapter, "samples": samples}
    code, log = run_module(
        "fastft.verification.reference", job | {"max_new_tokens": max_new_tokens}, folder
    )
    if code != 0 or not (folder / "reference.json").is_file():
        raise CouldNotFinishError(
            f"the trained model could not be run ({ending(code)}): {log[-1500:]}"
        )
    facts = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    positions = sum(len(sample["counted"]) for sample in facts["sequences"])
    what = "built-in texts" if facts["built_in_samples"] else "held-out samples"
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "reference": {
            "compute": facts["compute"],
            "samples": f"{positions} positions of {len(facts['sequences'])} {what}",
        },
    }


def _modelfile_checks(path: Path) -> list[dict[str, Any]]:
    from fastft.exporting.ollama import check_modelfile, has_template

    problems = check_modelfile(path)
    detail = "; ".join(problems) or "the syntax is right and the file it is made from exists"
    checks = [{"name": "modelfile", "verdict": "fail" if problems else "pass", "detail": detail}]
    if not has_template(path):
        why = (
            "no TEMPLATE: Go's template language cannot write what the model was trained with, so "
            "Ollama takes one of its own that looks alike, and answers may differ"
        )
        checks.append({"name": "template", "verdict": "warn", "detail": why})
    return checks


def verify_one(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Check one file in a subprocess; return its entry in the certificate."""
    path = Path(job["path"])
    entry: dict[str, Any] = {
        "path": str(path),
        "kind": job["kind"],
        "sha256": sha256(path),
        "verdict": "fail",
    }
    entry |= {"kl_mean": None, "kl_p99": None, "top1": None, "ppl_ratio": None, "checks": []}
    if job["kind"] == "ollama":
        entry["checks"] = _modelfile_checks(path)
    else:
        report = folder / "report.jsonl"
        report.unlink(missing_ok=True)
        code, log = run_module(
            "fastft.verification.checks",
            job | {"reference": str(folder), "report": str(report)},
            folder,
        )
        entry |= read_report(report, code, log)
    entry["verdict"] = (
        worst(check["verdict"] for check in entry["checks"]) if entry["checks"] else "fail"
    )
    return entry


def read_report(report: Path, code: int, log: str) -> dict[str, Any]:
    """Return {"checks", and what was measured}; the check during which the process died is a
    failed one.
    """
    found: dict[str, Any] = {"checks": []}
    begun = "load"
    for line in report.read_text(encoding="utf-8").splitlines() if report.is_file() else []:
        item = json.loads(line)
        begun = item.get("begin", begun)
        if "measured" in item:
            found |= item["measured"]
        elif "verdict" in item:
            found["checks"].append(item)
    if code != 0:
        detail = f"the process ended with {ending(code)}: {log[-800:].strip() or 'no message'}"
        found["checks"].append({"name": begun, "verdict": "fail", "detail": detail})
    return found


def run_module(module: str, job: dict[str, Any], folder: Path) -> tuple[int, str]:
    """Run `module` with the job's file in a child; return (exit code, its standard error)."""
    path = folder / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    done = subprocess.run(
        child.command(module, str(path)),
        env=child.environment(GGML_NO_BACKTRACE="1", TOKENIZERS_PARALLELISM="false"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    return done.returncode, done.stderr


def ending(code: int) -> str:
    """Return in words how a process ended: its signal, and what that mostly means, or its exit
    code.
    """
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    reasons = {
        "SIGKILL": "most likely out of memory",
        "SIGILL": "llama-cpp-python does not suit this processor; build it again",
    }
    return f"{name}, {reasons[name]}" if name in reasons else name


def first_trouble(entry: dict[str, Any]) -> str:
    """Return the first check that has the entry's verdict, for a line on the screen; empty where
    all passed.
    """
    if entry["verdict"] == "pass":
        return ""
    check = next(check for check in entry["checks"] if check["verdict"] == entry["verdict"])
    return f" ({check['name']}: {check['detail'][:300]})"


def versions() -> dict[str, str]:
    """Return the versions that a verdict depends on."""
    return installed(("fastft", "torch", "transformers", "peft", "llama_cpp_python", "gguf"))
