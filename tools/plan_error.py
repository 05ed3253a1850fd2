"""How wrong is `fastft plan`? Predicted against measured peaks, one process a measurement.

    python tools/plan_error.py               # all cases not measured yet (a GPU's on one),
                                             # then the table and the plot
    python tools/plan_error.py --case NAME   # one case again
    python tools/plan_error.py --report      # the table and the plot, from the committed results

A case is a random model of a real size on disk, trained for a few steps by `fastft.train` and
merged and exported by `fastft.export`, each in a process of its own. Measured is the peak of
resident memory (VmHWM) above what the process had after its imports (where the base is quantised,
from the first step on: the 16-bit files that are mapped until then need no room); predicted is the
plan's peak without its term for the imports. On a GPU, measured is what torch's allocator reserved,
before the first step (load) and from then on (train); predicted is the plan's peak without the CUDA
context, which is compared apart. Linux only.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastft.hardware import Hardware
    from fastft.planning import ModelShape

HERE = Path(__file__).parents[1] / "benchmarks"
RESULTS = HERE / "results" / "plan_error.json"
TABLE = HERE / "plan_error.md"
PLOT = HERE / "plan_error.png"
STEPS = 2
PHASES = ("train", "merge", "export")
GIB = 1024**3

# name: (family, hidden, layers, heads, kv heads, head size, intermediate, vocabulary, tied)
MODELS = {
    "llama-135m": ("llama", 576, 30, 9, 3, 64, 1536, 49152, True),
    "llama-360m": ("llama", 960, 32, 15, 5, 64, 2560, 49152, True),
    "llama-400m-128k": ("llama", 1024, 12, 16, 8, 64, 2816, 128256, False),
    "gemma3-270m": ("gemma3_text", 640, 18, 4, 1, 256, 2048, 262144, True),
    "phi3-300m": ("phi3", 1024, 20, 16, 16, 64, 2816, 32064, False),
    "qwen2-0.5b": ("qwen2", 896, 24, 14, 2, 64, 4864, 151936, True),
    "qwen3-0.6b": ("qwen3", 1024, 28, 16, 8, 128, 3072, 151936, True),
    "llama-3.2-1b": ("llama", 2048, 16, 32, 8, 64, 8192, 128256, True),
    "llama-3.2-3b": ("llama", 3072, 28, 24, 8, 128, 8192, 128256, True),
    "qwen3-4b": ("qwen3", 2560, 36, 32, 8, 128, 9728, 151936, True),
    "llama-3.1-8b": ("llama", 4096, 32, 32, 8, 128, 14336, 128256, False),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
# What a case does not say: rank 16 on all linear layers, bfloat16, no checkpointing, one sequence,
# Unsloth's engine with fastft's fused layers. Cases with a GGUF type are merged and exported as
# well.
CASES: dict[str, dict[str, Any]] = {
    "llama-135m-2048": {"model": "llama-135m", "length": 2048, "gguf": "q8_0"},
    "llama-135m-2048-r64": {"model": "llama-135m", "length": 2048, "rank": 64},
    "llama-135m-4096-attention": {"model": "llama-135m", "length": 4096, "targets": ATTENTION},
    "llama-135m-1024-nf4": {"model": "llama-135m", "length": 1024, "quantization": "nf4"},
    "llama-135m-1024-float32": {"model": "llama-135m", "length": 1024, "dtype": "float32"},
    "llama-135m-1024-stock-unfused": {
        "model": "llama-135m",
        "length": 1024,
        "engine": "stock",
        "fused": False,
    },
    "llama-135m-1024-unfused": {"model": "llama-135m", "length": 1024, "fused": False},
    "llama-135m-8x256": {"model": "llama-135m", "length": 256, "sequences": 8},
    "llama-360m-1024": {"model": "llama-360m", "length": 1024},
    "llama-360m-2048-checkpointing": {"model": "llama-360m", "length": 2048, "checkpointing": True},
    "llama-400m-128k-512-head": {
        "model": "llama-400m-128k",
        "length": 512,
        "targets": [*LINEAR, "lm_head"],
        "engine": "stock",
        "gguf": "q8_0",
    },
    "gemma3-270m-1024": {"model": "gemma3-270m", "length": 1024, "gguf": "q8_0"},
    "phi3-300m-1024": {"model": "phi3-300m", "length": 1024, "gguf": "q4_k_m"},
    "qwen2-0.5b-1024": {"model": "qwen2-0.5b", "length": 1024, "gguf": "q8_0"},
    "qwen3-0.6b-512": {"model": "qwen3-0.6b", "length": 512, "gguf": "q4_k_m"},
    "qwen3-0.6b-512-nf4": {"model": "qwen3-0.6b", "length": 512, "quantization": "nf4"},
    "qwen3-0.6b-1024-checkpointing": {"model": "qwen3-0.6b", "length": 1024, "checkpointing": True},
}
FITTED: tuple[str, ...] = (
    "llama-135m-2048",
    "llama-135m-1024-unfused",
    "llama-360m-2048-checkpointing",
    "qwen2-0.5b-1024",
    "qwen3-0.6b-1024-checkpointing",
)
"""The few constants of the plan's CPU terms come from these alone; all other rows are predictions.
"""
# On a GPU: Unsloth's kernels, 8-bit AdamW, the card's own 16-bit type. Measured where the plan says
# that it fits.
GPU_CASES: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B LoRA 2048": {"model": "qwen3-0.6b", "length": 2048},
    "Qwen3-0.6B LoRA 4 x 2048, AdamW": {
        "model": "qwen3-0.6b",
        "length": 2048,
        "sequences": 4,
        "optimizer": "adamw",
    },
    "Llama-3.2-1B LoRA 512": {"model": "llama-3.2-1b", "length": 512},
    "Llama-3.2-1B LoRA 8192": {"model": "llama-3.2-1b", "length": 8192, "checkpointing": True},
    "Llama-3.2-3B QLoRA 2048": {"model": "llama-3.2-3b", "length": 2048, "quantization": "nf4"},
    "Qwen3-4B QLoRA 2048": {
        "model": "qwen3-4b",
        "length": 2048,
        "quantization": "nf4",
        "checkpointing": True,
    },
    "Qwen3-4B LoRA 4096": {"model": "qwen3-4b", "length": 4096, "checkpointing": True},
    "Llama-3.1-8B QLoRA 2048": {
        "model": "llama-3.1-8b",
        "length": 2048,
        "quantization": "nf4",
        "checkpointing": True,
    },
    "Llama-3.1-8B QLoRA 2 x 2048, r 64": {
        "model": "llama-3.1-8b",
        "length": 2048,
        "sequences": 2,
        "rank": 64,
        "quantization": "nf4",
    },
    "Llama-3.1-8B LoRA 1024": {"model": "llama-3.1-8b", "length": 1024},
}
"""Cases for a GPU: a card that nobody has measured has no rows, and the table says so."""


def main() -> None:
    """Measure what is missing, then write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=[*CASES, *GPU_CASES], metavar="NAME", action="append")
    parser.add_argument("--report", action="store_true")
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir()) / "fastft-plan-error"
    )
    parser.add_argument("--worker", choices=("make", *PHASES), help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        return WORKERS[arguments.worker](json.loads(arguments.settings))
    records = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    if not arguments.report:
        for name in arguments.case or missing(records):
            print(f"{name} ...", file=sys.stderr, flush=True)
            records[record_key(name)] = measure(name, arguments.work)
            RESULTS.parent.mkdir(parents=True, exist_ok=True)
            RESULTS.write_text(json.dumps(dict(sorted(records.items())), indent=1) + "\n")
    # The plan of today against the measurements of then: a formula may have changed since.
    for name, record in records.items():
        record["predicted"] = (predict_gpu if is_gpu(record) else predict)(name, record)
    RESULTS.write_text(json.dumps(dict(sorted(records.items())), indent=1) + "\n")
    report(records)
    return None


def missing(records: dict[str, Any]) -> list[str]:
    """Cases without a record: those of the CPU, and those for a GPU that the plan says fit the one
    that is here.
    """
    names = [name for name in CASES if name not in records]
    if _gpu() is None:
        return names
    chosen = [name for name in GPU_CASES if record_key(name) not in records]
    for name in (name for name in chosen if not fits_here(name)):
        print(f"{name}: left out, the plan says that it does not fit here", file=sys.stderr)
    return names + [name for name in chosen if fits_here(name)]


def fits_here(name: str) -> bool:
    """Whether the plan says that a case fits the GPU that is here (and its host's RAM and disk)."""
    from fastft.config import make_config
    from fastft.planning import plan

    hardware = _gpu()
    if hardware is None:
        return False
    config = make_config(
        _config(name, Path("model"), Path("data.jsonl"), Path(tempfile.gettempdir()))
    )
    return plan(config, hardware, _shape(GPU_CASES[name]["model"])).verdict != "does_not_fit"


def record_key(name: str) -> str:
    """The name of a case's record: cards are kept apart."""
    hardware = _gpu()
    return f"{name}, {hardware.name}" if name in GPU_CASES and hardware is not None else name


def is_gpu(record: dict[str, Any]) -> bool:
    """Whether a record is of a GPU."""
    return "gpu" in record


def _gpu() -> Hardware | None:
    from fastft.hardware import probe

    hardware = probe()
    return hardware if hardware.kind == "cuda" else None


def _shape(model: str) -> ModelShape:
    from fastft.planning import shape_from_config

    return shape_from_config(model_config(model), model)


# --- one case


def measure(name: str, work: Path) -> dict[str, Any]:
    """Return the record of one case: measured bytes of each phase, disk, trainable parameters,
    seconds a step.
    """
    on_gpu = name in GPU_CASES
    case = (GPU_CASES if on_gpu else CASES)[name]
    hardware = _gpu() if on_gpu else None
    if on_gpu and hardware is None:
        raise SystemExit(
            f"{name} needs an NVIDIA GPU that torch can use; fastft doctor says why there is none."
        )
    base = work / "models" / case["model"]
    if not (base / "config.json").is_file():
        _run("make", {"model": case["model"], "out": str(base)}, on_gpu)
    data = work / f"data-{case['length']}.jsonl"
    if not data.is_file():
        _write_data(data, case["length"])
    run = work / "runs" / name
    shutil.rmtree(run, ignore_errors=True)
    settings = {
        "config": _config(name, base, data, work),
        "run": str(run),
        "gguf": case.get("gguf"),
    }
    tokenizer = sum(file.stat().st_size for file in base.glob("*token*"))
    record: dict[str, Any] = {
        "case": case,
        "tokenizer_bytes": tokenizer,
        "measured": {},
        "failed": {},
    }
    if hardware is not None:
        # What the plan goes by, before anything took memory.
        names = (
            "name",
            "vram_bytes",
            "vram_free_bytes",
            "capability",
            "ram_bytes",
            "ram_free_bytes",
            "cpu_cores",
        )
        record["gpu"] = {key: getattr(hardware, key) for key in names}
    for phase in PHASES if "gguf" in case else ("train",):
        try:
            record["measured"] |= _run(phase, settings, on_gpu)
        except subprocess.CalledProcessError as error:
            record["failed"][phase] = (
                error.stderr.strip().splitlines()[-1][:300] if error.stderr.strip() else "killed"
            )
            print(error.stderr[-2000:], file=sys.stderr)
    shutil.rmtree(run, ignore_errors=True)
    return record | {"environment": environment()}


def _config(name: str, base: Path, data: Path, work: Path) -> dict[str, Any]:
    case = (CASES | GPU_CASES)[name]
    sequences = case.get("sequences", 1)
    # Only where the loss keeps whole logits can an evaluation need more than a step: elsewhere it
    # only takes time.
    held_out = 0.05 if case.get("fused") is False else 0.0
    return {
        "project": name,
        "output_dir": str(work / "runs"),
        "model": {
            "name": str(base),
            "max_seq_length": case["length"],
            "quantization": case.get("quantization", "none"),
            "dtype": case.get("dtype", "auto"),
            "engine": case.get("engine", "auto"),
        },
        "data": {
            "source": str(data),
            "format": "text",
            "train_on": "everything",
            "eval_fraction": held_out,
        },
        "lora": {"r": case.get("rank", 16), "target_modules": case.get("targets", "all-linear")},
        "train": {
            "effective_batch_size": sequences,
            "max_steps": STEPS,
            "save_steps": STEPS,
            "eval_steps": STEPS,
            "gradient_checkpointing": case.get("checkpointing", False),
            "optimizer": case.get("optimizer", "auto"),
            "micro_batch_tokens": case["length"] * sequences,
            "fused_layers": case.get("fused", "auto"),
        },
    }


def predict(name: str, record: dict[str, Any]) -> dict[str, Any]:
    """Return the plan's peaks above the imports, the bytes of the files, and the trainable
    parameters.

    Needs no model on disk: the shape comes from MODELS, so `--report` works from the committed
    results alone.
    """
    from fastft.config import make_config
    from fastft.hardware import cpu_only
    from fastft.planning import plan
    from fastft.planning.disk import adapter_bytes, checkpoint_bytes, export_term
    from fastft.planning.resolve import resolve

    case = record["case"]
    config = make_config(_config(name, Path("model"), Path("data.jsonl"), Path(".")))
    cores, threads = record["environment"]["cores"], int(record["environment"]["threads"])
    # The machine that measured, not the one that this runs on, which may have a GPU or no bfloat16.
    bf16 = record["environment"].get("bf16", True)
    hardware, one_thread = cpu_only(cores, bf16=bf16), cpu_only(threads, bf16=bf16)
    shape = replace(_shape(case["model"]), tokenizer_bytes=record["tokenizer_bytes"])
    result = plan(config, hardware, shape)
    s = resolve(config, hardware, shape).situation

    def above_imports(phase: str) -> int:
        return sum(
            t.bytes for t in result.phases[phase].ram_terms if t.name != "Python and libraries"
        )

    return {
        "train": max(above_imports(phase) for phase in ("load", "train", "eval")),
        "merge": above_imports("merge"),
        "export": above_imports("export"),
        "trainable_parameters": result.trainable_parameters,
        "seconds_per_step": round(plan(config, one_thread, shape).seconds_per_step or 0, 3),
        "disk": {
            "checkpoint": checkpoint_bytes(shape, s),
            "adapter": adapter_bytes(shape, s),
            "merged": export_term(shape, s, "merged").bytes,
            "gguf": export_term(shape, s, f"gguf:{case.get('gguf', 'q8_0')}").bytes,
        },
    }


def predict_gpu(name: str, record: dict[str, Any]) -> dict[str, Any]:
    """Return the plan's VRAM of the load and train phases without the CUDA context, that context,
    and the host's RAM.
    """
    from fastft.config import make_config
    from fastft.hardware import cpu_only
    from fastft.planning import plan

    found = record["gpu"]
    capability = tuple(found["capability"])
    hardware = replace(
        cpu_only(found["cpu_cores"], bf16=True),
        **found
        | {"capability": capability, "bf16": capability >= (8, 0), "kind": "cuda", "gpu_count": 1},
    )
    case = name.removesuffix(f", {found['name']}")
    config = make_config(_config(case, Path("model"), Path("data.jsonl"), Path(".")))
    shape = replace(_shape(record["case"]["model"]), tokenizer_bytes=record["tokenizer_bytes"])
    result = plan(config, hardware, shape)

    def reserved(phase: str) -> int:
        return sum(t.bytes for t in result.phases[phase].vram_terms if t.name != "CUDA context")

    context = next(t.bytes for t in result.phases["train"].vram_terms if t.name == "CUDA context")
    return {
        "load": reserved("load"),
        "train": reserved("train"),
        "context": context,
        "ram": max(result.phases[phase].ram_bytes for phase in ("load", "train")),
        "trainable_parameters": result.trainable_parameters,
    }


def model_config(name: str) -> dict[str, Any]:
    """Return the config.json values of one of MODELS."""
    family, hidden, layers, heads, kv_heads, head, intermediate, vocab, tied = MODELS[name]
    values = {
        "model_type": family,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "dtype": "bfloat16",
    }
    return {key: value for key, value in values.items() if (family, key) != ("phi3", "head_dim")}


def _run(worker: str, settings: dict[str, Any], on_gpu: bool = False) -> dict[str, Any]:
    """Run one worker in a fresh process, without the GPU unless `on_gpu`; returns the JSON object
    on its last line.
    """
    command = [sys.executable, __file__, "--worker", worker, "--settings", json.dumps(settings)]
    # Nothing here may ask a network, and the order of hashes must not move memory around.
    quiet = {"HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false"}
    quiet |= {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | quiet
    )
    return json.loads(done.stdout.strip().splitlines()[-1]) if done.stdout.strip() else {}


def _write_data(path: Path, length: int) -> None:
    """Documents of a little more than `length` tokens (over two a word): every row is full, and
    few are held out.
    """
    words = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(24):
            text = " ".join(f"w{words.randrange(2000)}" for _ in range(int(0.5 * length)))
            file.write(json.dumps({"text": text}) + "\n")


# --- workers: each runs alone in its process


def _rss(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{key}:")[1].split()[0]) * 1024


def _start_of_measurement() -> int:
    """Reset the kernel's high-water mark; returns the resident memory of the imports."""
    Path("/proc/self/clear_refs").write_text("5")
    return _rss("VmRSS")


def make_model(settings: dict[str, Any]) -> None:
    """Write a random bfloat16 model with a byte-level BPE tokenizer that fills the vocabulary, as
    real ones do.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    config = AutoConfig.for_model(**model_config(settings["model"]))
    vocabulary, merges = _vocabulary(config.vocab_size)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    # Billions of random numbers take minutes on a CPU; a card too small for the 16-bit model leaves
    # them there.
    size = 2.5 * _shape(settings["model"]).parameters
    there = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > size
    with torch.device("cuda" if there else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(settings["out"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.save_pretrained(settings["out"])


def _vocabulary(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return tokens (two special ones, all bytes, pairs of bytes, then triples) and the merges
    that make them.

    They fill the embedding's `size` rows up to a few, which some families' tokenizers use for
    tokens of their own.
    """
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in alphabet for b in alphabet]
    triples = ((a + b, c) for a, b in pairs for c in alphabet)
    merges = list(itertools.islice(itertools.chain(pairs, triples), size - 16 - len(alphabet)))
    tokens = ["<eos>", "<pad>", *alphabet, *(left + right for left, right in merges)]
    return {token: number for number, token in enumerate(tokens)}, merges


def train_case(settings: dict[str, Any]) -> None:
    """Train; print the peak above the imports, the disk of the checkpoint and the adapter,
    trainable parameters.
    """
    from fastft.engines import get_engine

    get_engine("stock" if settings["config"]["model"]["engine"] == "stock" else "unsloth")
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import trl  # noqa: F401

    import fastft.data
    import fastft.training.callbacks
    import fastft.training.loop
    from fastft.config import make_config
    from fastft.training.train import train

    config = make_config(settings["config"])
    vram = Vram()

    def before_the_first_step() -> None:
        vram.before_the_first_step()
        if config.model.quantization != "none":
            _start_of_measurement()

    cpu_seconds = _count_cpu_seconds(fastft.training.loop.StepTrainer, before_the_first_step)
    before = _start_of_measurement()
    result = train(config)
    peak = _rss("VmHWM") - before
    run = Path(result.run)
    record = json.loads((run / "run.json").read_text())
    checkpoint = next((run / "checkpoints").glob("checkpoint-*"))
    disk = {
        "checkpoint": _folder(checkpoint),
        "adapter": (run / "final" / "adapter_model.safetensors").stat().st_size,
    }
    print(
        json.dumps(
            {"train": peak, "imports": {"train": before}, "disk": disk, "memory": record["memory"]}
            | {"trainable_parameters": record["trainable_parameters"]}
            | {"cpu_seconds_per_step": [round(s, 3) for s in cpu_seconds]}
            | vram.peaks()
        )
    )


class Vram:
    """What torch's CUDA allocator holds at most, before the first step and from it on; nothing
    where there is no GPU.
    """

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda if torch.cuda.is_available() else None
        self.loading: int | None = None

    def before_the_first_step(self) -> None:
        """End of loading: give back what it left cached, so that only training counts from here."""
        if self.cuda is not None:
            self.loading = self.cuda.max_memory_reserved()
            self.cuda.empty_cache()
            self.cuda.reset_peak_memory_stats()

    def peaks(self) -> dict[str, Any]:
        """Return {"vram": {load, train, allocated, context}} in bytes."""
        if self.cuda is None:
            return {}
        free, total = self.cuda.mem_get_info()
        return {
            "vram": {
                "load": self.loading,
                "train": self.cuda.max_memory_reserved(),
                "allocated": self.cuda.max_memory_allocated(),
                # Whatever else uses the card counts as context: measure on a card that nothing else
                # uses.
                "context": total - free - self.cuda.memory_reserved(),
            }
        }


def _count_cpu_seconds(trainer: Any, before_the_first: Callable[[], None]) -> list[float]:
    """Return a list that each step of `trainer` appends its CPU seconds to; what others do beside
    counts not.
    """
    inner, seconds = trainer.training_step, []

    def timed(*arguments: Any, **keywords: Any) -> Any:
        if not seconds:
            before_the_first()
        started = time.process_time()
        result = inner(*arguments, **keywords)
        seconds.append(time.process_time() - started)
        return result

    trainer.training_step = timed
    return seconds


def merge_case(settings: dict[str, Any]) -> None:
    """Merge; print the peak above the imports and the size of the weights."""
    import torch  # noqa: F401

    import fastft.exporting.merged  # noqa: F401

    _export_case(settings, "merged", "merge", "*.safetensors")


def export_case(settings: dict[str, Any]) -> None:
    """Write the GGUF file; print the peak above the imports and its size."""
    import gguf  # noqa: F401
    import torch  # noqa: F401
    from transformers import AutoTokenizer  # noqa: F401

    import fastft.exporting.gguf
    import fastft.exporting.llama  # noqa: F401

    _export_case(settings, f"gguf:{settings['gguf']}", "export", "*.gguf")


def _export_case(settings: dict[str, Any], target: str, phase: str, pattern: str) -> None:
    from fastft.exporting import export

    before = _start_of_measurement()
    export(settings["run"], [target])
    peak = _rss("VmHWM") - before
    size = sum(file.stat().st_size for file in (Path(settings["run"]) / "export").rglob(pattern))
    disk = "disk_merged" if phase == "merge" else "disk_gguf"
    print(json.dumps({phase: peak, f"imports_{phase}": before, disk: size}))


def _folder(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


WORKERS = {"make": make_model, "train": train_case, "merge": merge_case, "export": export_case}


def environment() -> dict[str, Any]:
    """Return versions, CPU, threads, commit and date."""
    from fastft.hardware import probe

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
    )
    names = ("torch", "transformers", "peft", "unsloth", "unsloth_zoo")
    return {
        "versions": {name: importlib.metadata.version(name) for name in names},
        "cpu": probe().name,
        "bf16": probe().cpu_bf16,
        "cores": probe().cpu_cores,
        "threads": os.environ.get("OMP_NUM_THREADS", str(probe().cpu_cores)),
        "malloc": {
            key: value for key, value in os.environ.items() if key.startswith(("MALLOC_", "GLIBC_"))
        },
        "commit": commit.stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


# --- the report


def points(records: dict[str, Any]) -> list[tuple[str, str, int, int]]:
    """Return (case, phase, predicted, measured) of every measured peak, in bytes."""
    return [
        (name, phase, record["predicted"][phase], record["measured"][phase])
        for name, record in sorted(records.items())
        for phase in PHASES
        if phase in record["measured"]
    ]


def report(every: dict[str, Any]) -> None:
    """Write the table and the scatter plot."""
    records = {name: record for name, record in every.items() if not is_gpu(record)}
    rows = ["| case | phase | predicted | measured | error | |", "|---|---|---:|---:|---:|---|"]
    for name, phase, predicted, measured in points(records):
        sizes = f"{predicted / GIB:.2f} GiB | {measured / GIB:.2f} GiB"
        fitted = "fitted" if name in FITTED and phase == "train" else ""
        rows.append(f"| {name} | {phase} | {sizes} | {predicted / measured - 1:+.0%} | {fitted} |")
    failed = [(n, p, why) for n, r in sorted(records.items()) for p, why in r["failed"].items()]
    rows += [f"| {name} | {phase} | | failed: {why} | | |" for name, phase, why in failed]
    rows += [f"| {name} | train | | not measured | | |" for name in CASES if name not in records]
    text = (
        "# Plan: predicted against measured\n\nGenerated by `python tools/plan_error.py`. Peak "
        "resident memory "
    )
    text += (
        "above that of the imports, GiB (2^30 bytes).\n"
        + _summary(records)
        + "\n"
        + "\n".join(rows)
        + "\n"
    )
    text += _gpu_table({name: record for name, record in every.items() if is_gpu(record)})
    TABLE.write_text(text + _disk_table(records) + _time_table(records), encoding="utf-8")
    plot(every)
    print(_summary(records).strip(), file=sys.stderr)


def _summary(records: dict[str, Any]) -> str:
    """How many peaks are within 15 %: of cases above 1 GB, fitted or not, and of every row."""
    errors = {(n, phase): abs(p / m - 1) for n, phase, p, m in points(records)}
    large = {name for name, _, _, measured in points(records) if measured > GIB}
    peaks = {
        key: error for key, error in errors.items() if records[key[0]]["measured"][key[1]] > GIB
    }
    own = {key: error for key, error in peaks.items() if key[0] not in FITTED}
    small = {key: error for key, error in errors.items() if key not in peaks}

    def share(chosen: dict[tuple[str, str], float]) -> str:
        return f"{sum(error <= 0.15 for error in chosen.values())} of {len(chosen)} within 15 %"

    return (
        f"\n{len(large)} cases have a peak above 1 GiB. Peaks above 1 GiB: {share(peaks)}; "
        "those not used for fitting: "
        f"{share(own)}. Smaller peaks: {share(small)}.\n\nConstants were fitted on: "
        f"{', '.join(FITTED)}.\n"
    )


def _gpu_table(records: dict[str, Any]) -> str:
    """VRAM of the cases that were measured on a card, and a row that says so for each that was
    not.
    """
    rows = [
        "\n## VRAM\n",
        "What torch's allocator reserved, CUDA context (last column) not included.\n",
    ]
    rows += [
        "| case | phase | predicted | measured | error | context |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, record in sorted(records.items()):
        measured, predicted = record["measured"].get("vram", {}), record["predicted"]
        for phase in ("load", "train"):
            if measured.get(phase):
                error = f"{predicted[phase] / measured[phase] - 1:+.0%}"
                sizes = [predicted[phase], measured[phase], measured["context"]]
                planned, found, context = (f"{size / GIB:.2f} GiB" for size in sizes)
                rows.append(f"| {name} | {phase} | {planned} | {found} | {error} | {context} |")
        if "imports" in record["measured"]:
            found = record["measured"]["train"] + record["measured"]["imports"]["train"]
            sizes = f"{predicted['ram'] / GIB:.2f} GiB | {found / GIB:.2f} GiB"
            rows.append(
                f"| {name} | RAM beside it | {sizes} | {predicted['ram'] / found - 1:+.0%} | |"
            )
        rows += [
            f"| {name} | {phase} | | failed: {why} | | |" for phase, why in record["failed"].items()
        ]
    done = {name.rpartition(", ")[0] for name in records}
    rows += [f"| {name} | train | | not measured | | |" for name in GPU_CASES if name not in done]
    return "\n".join(rows) + "\n"


def _disk_table(records: dict[str, Any]) -> str:
    rows = [
        "\n## Disk and parameters\n",
        "| case | file | predicted | measured | error |",
        "|---|---|---:|---:|---:|",
    ]
    for name, record in sorted(records.items()):
        measured = record["measured"].get("disk", {}) | {
            kind: record["measured"][f"disk_{kind}"]
            for kind in ("merged", "gguf")
            if f"disk_{kind}" in record["measured"]
        }
        for kind, size in measured.items():
            predicted = record["predicted"]["disk"][kind]
            rows.append(
                f"| {name} | {kind} | {predicted:,} | {size:,} | {predicted / size - 1:+.1%} |"
            )
        counts = (
            record["predicted"]["trainable_parameters"],
            record["measured"].get("trainable_parameters"),
        )
        if counts[1] is not None:
            rows.append(
                f"| {name} | trainable parameters | {counts[0]:,} | {counts[1]:,} | "
                f"{counts[0] - counts[1]:+d} |"
            )
    return "\n".join(rows) + "\n"


def _time_table(records: dict[str, Any]) -> str:
    """CPU seconds of the second step (the first one warms up) against the plan's, on as many
    threads.
    """
    rows = [
        "\n## Seconds of a step\n",
        "CPU seconds of the second step, and the plan's for as many threads.\n",
    ]
    rows += ["| case | predicted | measured | error |", "|---|---:|---:|---:|"]
    for name, record in sorted(records.items()):
        measured = record["measured"].get("cpu_seconds_per_step", [])[1:]
        if measured:
            threads = int(record["environment"]["threads"])
            predicted = record["predicted"]["seconds_per_step"] * threads
            rows.append(
                f"| {name} | {predicted:.2f} | {measured[0]:.2f} | "
                f"{predicted / measured[0] - 1:+.0%} |"
            )
    return "\n".join(rows) + "\n"


def plot(every: dict[str, Any]) -> None:
    """Scatter of predicted over measured with the 15 % band."""
    records = {name: record for name, record in every.items() if not is_gpu(record)}
    vram = [
        (record["measured"]["vram"]["train"] / GIB, record["predicted"]["train"] / GIB)
        for record in every.values()
        if is_gpu(record) and "vram" in record["measured"]
    ]
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for phase, marker in zip(PHASES, "osD", strict=True):
        chosen = [(m / GIB, p / GIB) for _, kind, p, m in points(records) if kind == phase]
        if chosen:
            axes.scatter(*zip(*chosen, strict=True), marker=marker, label=phase)
    if vram:
        axes.scatter(*zip(*vram, strict=True), marker="^", label="train, VRAM")
    sizes = [size / GIB for _, _, *both in points(records) for size in both] + [
        size for both in vram for size in both
    ]
    top = max(sizes, default=1.0) * 1.1
    axes.plot([0, top], [0, top], color="black", linewidth=0.8)
    axes.fill_between([0, top], [0, 0.85 * top], [0, 1.15 * top], alpha=0.15, label="within 15 %")
    axes.set(
        xlabel="measured peak, GiB above imports",
        ylabel="predicted, GiB",
        xlim=(0, top),
        ylim=(0, top),
    )
    axes.legend()
    figure.savefig(PLOT, dpi=130)


if __name__ == "__main__":
    main()
