"""From an adapter to one quantised GGUF file: fastft's one pass, against merging, converting and
quantising.

Measured from process start to file, imports included; the peak RSS is the highest of any process,
the intermediate bytes are what lay on disk besides the result. The three steps are peft's
merge_and_unload in bfloat16, llama.cpp's converter, and llama_model_quantize on all cores; the
converter is told the splitting rule, which the one pass has to find out by itself.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastft.bench.case import Case
from fastft.bench.side_by_side import (
    SideBySide,
    assembled,
    in_a_process,
    make_model,
    measure_ways,
    models_and_threads,
    paired,
)
from fastft.files.scratch import scratch
from fastft.hardware import peak_resident_bytes

KIND = "q4_k_m"
ONE_PASS, THREE_STEPS = "fastft, one pass", "merge, convert, quantise"


def run_export(
    case: Case,
    *,
    repeats: int = 3,
    say: Callable[[str], None] = lambda text: None,
) -> SideBySide:
    """Measure both ways on the shape of `case`.

    Raises FastFTError for a case that names a model, or where llama-cpp-python or the converter is
    missing.
    """
    with scratch("fastft-export-") as home:
        made, threads = models_and_threads(__name__, case, home, say)
        ways = {
            ONE_PASS: lambda: _one_pass(home, threads),
            THREE_STEPS: lambda: _three_steps(home, made["pre"], threads),
        }
        runs = measure_ways(ways, repeats, seed=case.seed, say=say)
    title = f"Export to {KIND} of {case.name} ({made['parameters'] / 1e6:,.0f}M parameters)"
    result = assembled(
        "export", title, case.name, made["parameters"], threads, runs, list(ways), []
    )
    ratios = {
        name: paired(result, ONE_PASS, THREE_STEPS, name) for name in ("seconds", "peak_rss_bytes")
    }
    result.notes.append(
        f"one pass over three steps: {ratios['seconds']:.2f}x the time, "
        f"{ratios['peak_rss_bytes']:.2f}x the memory "
        "(median of the rounds)"
    )
    return result


def _one_pass(home: Path, threads: int) -> dict[str, float]:
    out = home / "one-pass.gguf"
    seconds, record = in_a_process(__name__, "one-pass", str(home), str(out), threads=threads)
    return _figures(seconds, record["peak_rss_bytes"], 0, out)


def _three_steps(home: Path, pre: str, threads: int) -> dict[str, float]:
    merged, sixteen, out = home / "merged", home / "sixteen.gguf", home / "three-steps.gguf"
    steps = [
        in_a_process(__name__, "merge", str(home), str(merged), threads=threads),
        in_a_process(__name__, "convert", str(merged), str(sixteen), pre, threads=threads),
        in_a_process(__name__, "quantise", str(sixteen), str(out), str(threads), threads=threads),
    ]
    between = sum(path.stat().st_size for path in merged.iterdir()) + sixteen.stat().st_size
    shutil.rmtree(merged)
    sixteen.unlink()
    seconds = sum(seconds for seconds, _ in steps)
    return _figures(seconds, max(record["peak_rss_bytes"] for _, record in steps), between, out)


def _figures(seconds: float, peak: int, between: int, out: Path) -> dict[str, float]:
    size = out.stat().st_size
    out.unlink()
    return {
        "seconds": seconds,
        "peak_rss_bytes": peak,
        "intermediate_bytes": between,
        "file_bytes": size,
    }


# --- what runs in the processes


def _make(folder: str, case: str) -> dict[str, Any]:
    return make_model(Case.model_validate_json(case), Path(folder))


def _run_one_pass(home: str, out: str) -> dict[str, Any]:
    from fastft.exporting.gguf import export_gguf

    export_gguf(Path(home) / "base", Path(out), [KIND], adapter=Path(home) / "adapter")
    return {}


def _run_merge(home: str, merged: str) -> dict[str, Any]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = Path(home) / "base"
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, str(Path(home) / "adapter")).merge_and_unload()
    model.save_pretrained(merged)
    AutoTokenizer.from_pretrained(base).save_pretrained(merged)
    return {}


def _run_convert(merged: str, sixteen: str, pre: str) -> dict[str, Any]:
    from fastft.exporting.gguf.upstream import convert, upstream_folder

    words = {"tokenizer.ggml.model": ("gpt2", "STRING"), "tokenizer.ggml.pre": (pre, "STRING")}
    convert(upstream_folder(), Path(merged), Path(sixteen), "bf16", words)
    return {}


def _run_quantise(sixteen: str, out: str, threads: str) -> dict[str, Any]:
    from fastft.exporting.gguf import llama_job
    from fastft.exporting.gguf.quantize import FILE_TYPES

    done = list(llama_job.quantize(sixteen, out, FILE_TYPES[KIND], int(threads), None, 0))
    assert not done[0]["failed"]
    return {}


STEPS: dict[str, Callable[..., dict[str, Any]]] = {
    "make": _make,
    "one-pass": _run_one_pass,
    "merge": _run_merge,
    "convert": _run_convert,
    "quantise": _run_quantise,
}

if __name__ == "__main__":
    answer = STEPS[sys.argv[1]](*sys.argv[2:])
    print("\n" + json.dumps(answer | {"peak_rss_bytes": peak_resident_bytes(children=True)}))
