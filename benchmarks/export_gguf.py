"""From an adapter to q4_k_m: one pass, against merging, converting to bf16 and quantising.

    python -m benchmarks.export_gguf [--repeats 3] [--out result.json]

Makes a llama of about 0.5B random parameters and an adapter on all linear layers, then runs both ways in turn, each
step in a process of its own. Reported: seconds from start to file (imports included), the highest peak RSS of any
process, and the bytes of intermediate files. The three-step way is peft's merge_and_unload in bfloat16, llama.cpp's
converter, and llama_model_quantize on all cores.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPE = {"hidden_size": 1024, "intermediate_size": 4608, "num_hidden_layers": 26, "num_attention_heads": 16}
SHAPE |= {"num_key_value_heads": 4, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True}

ONE_PASS = """
from pathlib import Path
from fastft.export.gguf import export_gguf
export_gguf(Path({base!r}), Path({out!r}), ["q4_k_m"], adapter=Path({adapter!r}))
"""
MERGE = """
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, {adapter!r}).merge_and_unload()
model.save_pretrained({merged!r})
AutoTokenizer.from_pretrained({base!r}).save_pretrained({merged!r})
"""
CONVERT = """
from pathlib import Path
from fastft.export.gguf.upstream import convert, upstream_folder
convert(upstream_folder(), Path({merged!r}), Path({sixteen!r}), "bf16", "llama-bpe")
"""
QUANTIZE = """
from fastft.export.gguf import isolated
from fastft.export.gguf.quantize import FILE_TYPES
from fastft.export.gguf.writer import cores
assert not list(isolated.quantize({sixteen!r}, {out!r}, FILE_TYPES["q4_k_m"], cores(), None, 0))[0]["failed"]
"""
PEAK = """
import resource
peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print("PEAK", max(peaks) * 1024)
"""


def make_model(home: Path) -> tuple[Path, Path, int]:
    """Write the base (bfloat16) and the adapter; return both and the number of parameters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from tests.families import make_checkpoint

    base = make_checkpoint("llama", home / "base", dtype="bfloat16", **SHAPE)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    parameters = sum(p.numel() for p in model.parameters())
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    model.save_pretrained(home / "adapter")
    return base, home / "adapter", parameters


def make_in_a_process(home: Path) -> tuple[Path, Path, int]:
    """Do `make_model` in a process: on Linux a child's peak RSS begins with its parent's, which must stay small."""
    call = f"make_model(Path({str(home)!r}))"
    code = f"from pathlib import Path; from benchmarks.export_gguf import make_model; print({call}[2])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return home / "base", home / "adapter", int(done.stdout.split()[-1])


def run(code: str) -> tuple[float, int]:
    """Run Python `code` in a process; return its seconds and the peak RSS of it and its children, in bytes."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code + PEAK], check=True, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    return seconds, int(done.stdout.rpartition("PEAK ")[2])


def one_pass(home: Path, base: Path, adapter: Path) -> dict[str, Any]:
    """Measure the streaming export."""
    out = home / "one-pass.gguf"
    seconds, peak = run(ONE_PASS.format(base=str(base), adapter=str(adapter), out=str(out)))
    return {"seconds": seconds, "peak_rss_bytes": peak, "intermediate_bytes": 0, "bytes": out.stat().st_size}


def three_steps(home: Path, base: Path, adapter: Path) -> dict[str, Any]:
    """Measure merging, converting and quantising."""
    merged, sixteen, out = home / "merged", home / "sixteen.gguf", home / "three-steps.gguf"
    names = {"base": base, "adapter": adapter, "merged": merged, "sixteen": sixteen, "out": out}
    steps = [run(code.format(**{k: str(v) for k, v in names.items()})) for code in (MERGE, CONVERT, QUANTIZE)]
    between = sum(p.stat().st_size for p in merged.iterdir()) + sixteen.stat().st_size
    result = {
        "seconds": sum(seconds for seconds, _ in steps),
        "steps": [round(seconds, 2) for seconds, _ in steps],
        "peak_rss_bytes": max(peak for _, peak in steps),
        "intermediate_bytes": between,
        "bytes": out.stat().st_size,
    }
    shutil.rmtree(merged)
    sixteen.unlink()
    return result


def main() -> None:
    """Run both ways in turn and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    arms = {"one_pass": one_pass, "three_steps": three_steps}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    with tempfile.TemporaryDirectory() as work:
        base, adapter, parameters = make_in_a_process(Path(work))
        for _ in range(args.repeats):
            for name, arm in arms.items():
                runs[name].append(arm(Path(work), base, adapter))
                print(name, runs[name][-1], file=sys.stderr, flush=True)
    middle = {
        name: {key: statistics.median(r[key] for r in found) for key in ("seconds", "peak_rss_bytes")}
        for name, found in runs.items()
    }
    ratios = {key: middle["one_pass"][key] / middle["three_steps"][key] for key in ("seconds", "peak_rss_bytes")}
    machine = {"machine": platform.machine(), "python": platform.python_version()}
    result = {"parameters": parameters, "median": middle, "ratio": ratios, "runs": runs, **machine}
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
