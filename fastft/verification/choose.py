"""`--quant auto`: the smallest GGUF type whose answers stay within a KL budget, found by trying."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastft.errors import AnswerIsNoError, CouldNotFinishError, FastFTError
from fastft.exporting.certificate import forget
from fastft.exporting.llama import base_folder, importance, sample_ids
from fastft.exporting.place import one_at_a_time
from fastft.files import ours
from fastft.files.scratch import scratch
from fastft.progress import Reporter, sized
from fastft.runs.target import resolve

if TYPE_CHECKING:
    import numpy as np

CANDIDATES = ("q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "q8_0", "f16")
"""Types from the smallest to the largest file."""


def choose_quantization(
    base: Path,
    adapter: Path | None,
    *,
    samples: Sequence[Any],
    max_kl: float,
    out: Path,
    candidates: Sequence[str] = CANDIDATES,
    imatrix: dict[str, np.ndarray] | None = None,
    name: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Return {"chosen", "tried": [{"type", "bytes", "kl_mean", "verdict"}], "record"} and leave
    the file in `out`.

    The mean KL divergence to the trained model on `samples` (as `verify_files` takes them) must be
    at most `max_kl` nats a token, and the file must not fail any check. `candidates` are ordered
    by size; KL falls with size, so a bisection writes and measures about log2 of their number, and
    keeps only the chosen file. Raises AnswerIsNoError with what was measured where no type is near
    enough.
    """
    from fastft.exporting.gguf import export_gguf
    from fastft.verification.verify import make_reference, verify_one

    out.mkdir(parents=True, exist_ok=True)
    tried: dict[str, dict[str, Any]] = {}
    with scratch(".choose-", out) as folder:
        make_reference(
            folder, str(base), str(adapter) if adapter else None, list(samples), max_new_tokens=64
        )

        def near_enough(kind: str) -> bool:
            record = export_gguf(base, folder, [kind], adapter=adapter, imatrix=imatrix, name=name)[
                0
            ]
            job = {
                "path": record["path"],
                "kind": "gguf",
                "base": str(base),
                "adapter": None,
                "base_gguf": None,
            }
            entry = verify_one(job, folder)
            tried[kind] = {"type": kind, "bytes": record["bytes"], "kl_mean": entry["kl_mean"]}
            tried[kind] |= {"verdict": entry["verdict"], "record": record}
            if entry["kl_mean"] is None:
                raise CouldNotFinishError(
                    f"{kind} could not be measured: {json.dumps(entry['checks'][-1])}"
                )
            say(f"{kind}: {sized(record['bytes'])}, KL {entry['kl_mean']:.3g}, {entry['verdict']}")
            return entry["kl_mean"] <= max_kl and entry["verdict"] != "fail"

        chosen = smallest(candidates, near_enough)
        measured = [
            {key: value for key, value in t.items() if key != "record"} for t in tried.values()
        ]
        if chosen is None:
            numbers = ", ".join(f"{t['type']} {t['kl_mean']:.3g}" for t in measured)
            raise AnswerIsNoError(
                f"no type keeps the mean KL within {max_kl:g} ({numbers}). Raise --max-kl."
            )
        record = tried[chosen]["record"]
        final = out / Path(record["path"]).name
        ours.refuse_foreign([final])
        Path(record["path"]).replace(final)
        forget(out, [final.name])
    return {"chosen": chosen, "tried": measured, "record": record | {"path": str(final)}}


def smallest(candidates: Sequence[str], holds: Callable[[str], bool]) -> str | None:
    """Return the first candidate for which `holds` is true, by bisection: false up to some point,
    true from there.
    """
    low, high = 0, len(candidates)
    while low < high:
        middle = (low + high) // 2
        if holds(candidates[middle]):
            high = middle
        else:
            low = middle + 1
    return candidates[low] if low < len(candidates) else None


def choose_for_run(
    run: str | Path,
    quant: str,
    *,
    max_kl: float,
    out: str | Path | None = None,
    base: str | None = None,
    imatrix: str | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """Write the smallest GGUF within `max_kl` of the run and return its {"path", "kind", "bytes"}.

    Raises FastFTError where `quant` is not "auto" or `max_kl` not positive, AnswerIsNoError where
    no type is near enough.
    """
    if quant != "auto":
        raise FastFTError(
            f"--quant is {quant!r}; it can only be auto. A type of your choice is written "
            "with --to gguf:TYPE."
        )
    if not max_kl > 0:
        raise FastFTError(
            f"--max-kl is {max_kl}; it must be above 0 (nats a token; 0.01 is close, 0.1 is loose)."
        )
    report = reporter or Reporter()
    target = resolve(run, base=base)
    folder = Path(out).expanduser() if out is not None else target.default_out
    with one_at_a_time(folder):
        found = choose_quantization(
            base_folder(target),
            target.adapter,
            samples=sample_ids(target),
            max_kl=max_kl,
            out=folder,
            imatrix=importance(target, folder, imatrix, report),
            name=target.name,
            say=report.note,
        )
    report.note(f"{found['chosen']} is the smallest type within a mean KL of {max_kl:g}")
    return {key: found["record"][key] for key in ("path", "kind", "bytes")}
