"""Tokens per second of one model through transformers and through llama.cpp: same prompts, same
count, greedy.

The prompt (reading it, up to the first new token) and decoding (every further one) are timed
apart. Weights are random and so are the prompts, so that no way ends early; the end token is not
obeyed anywhere.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
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
)
from fastft.files.scratch import scratch
from fastft.hardware import peak_resident_bytes

TYPES = ("bf16", "q8_0", "q4_k_m")
PROMPT_TOKENS, NEW_TOKENS = 128, 64
TRANSFORMERS = "transformers, bfloat16"
FIRST_TOKEN, LAST_TOKEN = 300, 1900  # ordinary tokens of the quickstart's tokenizer


def run_generate(
    case: Case,
    *,
    repeats: int = 5,
    say: Callable[[str], None] = lambda text: None,
) -> SideBySide:
    """Measure the shape of `case` in bfloat16 through transformers and as GGUF of TYPES through
    llama.cpp.

    Raises FastFTError for a case that names a model, or where llama-cpp-python is missing.
    """
    with scratch("fastft-generate-") as home:
        made, threads = models_and_threads(__name__, case, home, say)
        job = {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
        job |= {"threads": threads, "seed": case.seed}
        targets = {TRANSFORMERS: home / "base"} | {
            f"llama.cpp, {kind}": home / f"{kind}.gguf" for kind in TYPES
        }
        ways: dict[str, Callable[[], dict[str, float]]] = {
            way: partial(_one_run, target, job) for way, target in targets.items()
        }
        runs = measure_ways(ways, repeats, seed=case.seed, say=say)
    title = f"Generation with {case.name} ({made['parameters'] / 1e6:,.0f}M parameters)"
    note = (
        f"prompt of {PROMPT_TOKENS} tokens, {NEW_TOKENS} new ones, greedy, batch 1; one warm-up "
        "before"
    )
    return assembled(
        "generate", title, case.name, made["parameters"], threads, runs, list(ways), [note]
    )


def _one_run(target: Path, job: dict[str, Any]) -> dict[str, float]:
    _, found = in_a_process(__name__, "run", str(target), json.dumps(job), threads=job["threads"])
    first, last, tokens = found["first_seconds"], found["last_seconds"], found["tokens"]
    assert tokens == job["new_tokens"], f"{tokens} tokens came of {job['new_tokens']}"
    return {
        "prompt_tokens_per_sec": job["prompt_tokens"] / first,
        "decode_tokens_per_sec": (tokens - 1) / (last - first),
        "peak_rss_bytes": found["peak_rss_bytes"],
    }


# --- what runs in the processes


def _make(folder: str, case: str) -> dict[str, Any]:
    from fastft.exporting.gguf import export_gguf

    made = make_model(Case.model_validate_json(case), Path(folder))
    for kind in TYPES:
        export_gguf(Path(folder) / "base", Path(folder) / f"{kind}.gguf", [kind])
    return made


def _run(target: str, job: str) -> dict[str, Any]:
    import numpy as np

    settings = json.loads(job)
    rng = np.random.default_rng(settings["seed"])
    prompt = [
        int(token) for token in rng.integers(FIRST_TOKEN, LAST_TOKEN, settings["prompt_tokens"])
    ]
    way = _with_llama_cpp if target.endswith(".gguf") else _with_transformers
    marks = way(target, prompt, settings)
    return {"first_seconds": marks[0], "last_seconds": marks[-1], "tokens": len(marks)}


def _with_transformers(target: str, prompt: list[int], settings: dict[str, Any]) -> list[float]:
    """Return the seconds from the start to each new token."""
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    torch.set_num_threads(settings["threads"])
    model: Any = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    model.eval()
    marks: list[float] = []

    class Clock(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **keywords: Any) -> Any:
            marks.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    ids = torch.tensor([prompt])
    for count in (4, settings["new_tokens"]):  # the first is the warm-up
        marks.clear()
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=count,
                max_new_tokens=count,
                stopping_criteria=StoppingCriteriaList([Clock()]),
            )
    return [mark - start for mark in marks]


def _with_llama_cpp(target: str, prompt: list[int], settings: dict[str, Any]) -> list[float]:
    """Return the seconds from the start to each new token."""
    import numpy as np

    from fastft.inference.llamacpp import bindings

    llama_cpp = bindings()
    threads = settings["threads"]
    model = llama_cpp.Llama(
        target,
        n_ctx=len(prompt) + settings["new_tokens"] + 8,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )
    vocabulary = model.n_vocab()
    marks: list[float] = []
    for count in (4, settings["new_tokens"]):  # the first is the warm-up
        marks.clear()
        model.reset()
        start = time.perf_counter()
        tokens = prompt
        while len(marks) < count:
            model.eval(tokens)
            logits = np.ctypeslib.as_array(
                llama_cpp.llama_get_logits_ith(model.ctx, -1), shape=(vocabulary,)
            )
            tokens = [int(logits.argmax())]
            marks.append(time.perf_counter())
    return [mark - start for mark in marks]


STEPS: dict[str, Callable[..., dict[str, Any]]] = {"make": _make, "run": _run}

if __name__ == "__main__":
    answer = STEPS[sys.argv[1]](*sys.argv[2:])
    print("\n" + json.dumps(answer | {"peak_rss_bytes": peak_resident_bytes(children=True)}))
