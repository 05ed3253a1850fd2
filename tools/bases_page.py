"""A hundred text bases and every text model_type of transformers: what fastft does with each.

    python tools/bases_page.py                    # write docs/bases.md from docs/bases.json
    python tools/bases_page.py --measure          # look at every type first (half an hour)
    python tools/bases_page.py --measure glm opt  # at these alone

docs/bases.json holds what tests/e2e/bases_worker.py printed for each type.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "bases.md", ROOT / "docs" / "bases.json"
HEAD = (
    "Rows without padding | Plan's trainable parameters | Merge | GGUF | KL of f32 |\n"
    "|---|---|---|---|---|---|"
)
EXACT_LOGITS, EXACT_KL = 1e-4, 1e-5
STEPS = {"build": "a small model of the class", "lora": "LoRA", "rows": "a forward pass"}

BASES: dict[str, str] = {
    "llama": "meta-llama/Llama-2-7b-hf meta-llama/Meta-Llama-3-8B meta-llama/Llama-3.1-8B-Instruct "
    "meta-llama/Llama-3.2-1B meta-llama/Llama-3.2-3B meta-llama/Llama-3.3-70B-Instruct "
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0 HuggingFaceTB/SmolLM-1.7B codellama/CodeLlama-7b-hf "
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B deepseek-ai/deepseek-llm-7b-chat 01-ai/Yi-6B "
    "NousResearch/Hermes-3-Llama-3.1-8B allenai/Llama-3.1-Tulu-3-8B upstage/SOLAR-10.7B-v1.0 "
    "nvidia/Llama-3.1-Nemotron-70B-Instruct-HF llm-jp/llm-jp-3-1.8b sbintuitions/sarashina2-7b "
    "tokyotech-llm/Swallow-7b-hf tokyotech-llm/Llama-3.1-Swallow-8B-v0.3 "
    "elyza/ELYZA-japanese-Llama-2-7b elyza/Llama-3-ELYZA-JP-8B stockmark/stockmark-13b",
    "mistral": "mistralai/Mistral-7B-v0.1 mistralai/Mistral-7B-Instruct-v0.3 "
    "mistralai/Mistral-Nemo-Instruct-2407 mistralai/Mistral-Small-24B-Base-2501 "
    "mistralai/Codestral-22B-v0.1 mistralai/Devstral-Small-2507 "
    "teknium/OpenHermes-2.5-Mistral-7B mistralai/Mistral-Small-3.1-24B-Instruct-2503",
    "ministral3": "mistralai/Ministral-3-3B-Instruct-2512 mistralai/Ministral-3-8B-Base-2512",
    "mixtral": "mistralai/Mixtral-8x7B-v0.1",
    "qwen2": "Qwen/Qwen2-7B Qwen/Qwen2.5-0.5B Qwen/Qwen2.5-1.5B-Instruct Qwen/Qwen2.5-3B "
    "Qwen/Qwen2.5-7B-Instruct Qwen/Qwen2.5-14B Qwen/Qwen2.5-32B Qwen/Qwen2.5-Coder-7B-Instruct "
    "Qwen/Qwen2.5-Math-7B Qwen/QwQ-32B deepseek-ai/DeepSeek-R1-Distill-Qwen-7B "
    "open-thoughts/OpenThinker-7B",
    "qwen2_moe": "Qwen/Qwen1.5-MoE-A2.7B",
    "qwen3": "Qwen/Qwen3-0.6B Qwen/Qwen3-1.7B Qwen/Qwen3-4B-Instruct-2507 Qwen/Qwen3-8B "
    "Qwen/Qwen3-14B Qwen/Qwen3-32B deepseek-ai/DeepSeek-R1-0528-Qwen3-8B",
    "qwen3_moe": "Qwen/Qwen3-30B-A3B Qwen/Qwen3-Coder-30B-A3B-Instruct",
    "qwen3_next": "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "qwen3_5_text": "Qwen/Qwen3.5-9B-Instruct",
    "qwen3_5_moe_text": "Qwen/Qwen3.5-35B-A3B-Instruct",
    "gemma": "google/gemma-2b google/codegemma-7b",
    "gemma2": "google/gemma-2-2b-it google/gemma-2-9b google/gemma-2-27b",
    "gemma3_text": "google/gemma-3-270m google/gemma-3-1b-it google/gemma-3-4b-it "
    "google/gemma-3-12b-it",
    "gemma3n_text": "google/gemma-3n-E4B-it",
    "gemma4_text": "google/gemma-4-E2B-it google/gemma-4-31B-it",
    "phi": "microsoft/phi-2",
    "phi3": "microsoft/Phi-3-mini-4k-instruct microsoft/Phi-3.5-mini-instruct "
    "microsoft/Phi-4-mini-instruct microsoft/phi-4",
    "phimoe": "microsoft/Phi-3.5-MoE-instruct",
    "gpt_oss": "openai/gpt-oss-20b",
    "granite": "ibm-granite/granite-3.2-8b-instruct",
    "granitemoehybrid": "ibm-granite/granite-4.0-micro",
    "olmo2": "allenai/OLMo-2-0325-32B-Instruct",
    "olmo3": "allenai/Olmo-3-7B-Instruct",
    "olmoe": "allenai/OLMoE-1B-7B-0924",
    "smollm3": "HuggingFaceTB/SmolLM3-3B",
    "lfm2": "LiquidAI/LFM2-1.2B",
    "apertus": "swiss-ai/Apertus-8B-Instruct-2509",
    "cohere": "CohereLabs/c4ai-command-r-v01",
    "cohere2": "CohereLabs/c4ai-command-r7b-12-2024",
    "glm4": "zai-org/GLM-4-32B-0414",
    "glm4_moe_lite": "zai-org/GLM-4.7-Flash",
    "deepseek_v2": "deepseek-ai/DeepSeek-V2-Chat",
    "deepseek_v3": "deepseek-ai/DeepSeek-V3.1",
    "ernie4_5": "baidu/ERNIE-4.5-0.3B-PT",
    "exaone4": "LGAI-EXAONE/EXAONE-4.0-32B",
    "falcon_h1": "tiiuae/Falcon-H1-34B-Instruct",
    "stablelm": "stabilityai/stablelm-3b-4e1t",
    "starcoder2": "bigcode/starcoder2-3b",
    "gpt_neox": "EleutherAI/pythia-12b rinna/japanese-gpt-neox-3.6b",
    "gpt2": "openai-community/gpt2",
}
"""A hundred bases by their language model's model_type; docs/bases.md says where they are from."""


def measure(types: list[str]) -> None:
    """Look at the types (none: all) and put what was found into RESULTS, each when it is there."""
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    command = [sys.executable, "-m", "tests.e2e.bases_worker", "stock", *types]
    environment = os.environ | {"GGML_NO_BACKTRACE": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            known |= json.loads(line)
            text = json.dumps(dict(sorted(known.items())), indent=1)
            RESULTS.write_text(text + "\n", encoding="utf-8")
    if worker.returncode:
        raise SystemExit(f"the worker ended with {worker.returncode}")


def tables(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the table of the hundred bases and that of all other types, as Markdown."""
    bases = "".join(
        f"| {kind}: {', '.join(name.split('/')[1] for name in names.split())} | "
        f"{_cells(results.get(kind), kind)}\n"
        for kind, names in BASES.items()
    )
    others = "".join(
        f"| {kind} | {_cells(found, kind)}\n"
        for kind, found in results.items()
        if kind not in BASES
    )
    return {"bases": f"| Bases | {HEAD}\n{bases}", "types": f"| model_type | {HEAD}\n{others}"}


def _cells(found: dict[str, Any] | None, kind: str) -> str:
    from fastft.families import FAMILIES

    if found is None:
        return "not looked at | | | | |"

    doing = found["doing"]
    if "rows" not in found:
        return f"no: {STEPS.get(doing, doing)} fails: {_short(found['failed'])} | | | | |"
    row = kind in FAMILIES and FAMILIES[kind].rows == "exact"
    rows = "by its row" if row else "by the check" if found["rows"] != "padded" else "padded: "
    if rows == "padded: ":
        rows += _short(found["rows_why"].removeprefix("padded batches, because "))
    if doing == "train":
        return f"{rows}; fails in training: {_short(found['failed'])} | | | | |"
    return " | ".join([rows, _planned(found), _merged(found), *_gguf(found)]) + " |"


def _planned(found: dict[str, Any]) -> str:
    if found["planned"] is None:
        return _short(found["planned_why"])
    exact = found["planned"] == found["trainable"]
    return "exact" if exact else f"{found['planned']:,} for {found['trainable']:,}"


def _merged(found: dict[str, Any]) -> str:
    if found["doing"] == "merge":
        return f"fails: {_short(found['failed'])}"
    if found.get("merged") is None:
        return f"refused: {_short(found['merged_why'])}"
    return "exact" if found["merged"] < EXACT_LOGITS else f"off by {found['merged']:.1g}"


def _gguf(found: dict[str, Any]) -> tuple[str, str]:
    if found["doing"] == "merge":
        return "", ""
    if not found.get("gguf"):
        why = found["gguf_why"] if "gguf_why" in found else found["failed"]
        return f"none: {_short(why)}", ""
    writer = {"streaming": "own writer"}.get(found["gguf"], "llama.cpp's converter")
    if "kl" not in found:
        return f"{writer}; llama.cpp ends on the small file: {_short(found['failed'])}", ""
    return writer, f"{found['kl']:.0e}" + ("" if found["kl"] < EXACT_KL else " (not exact)")


def _short(words: str) -> str:
    text = " ".join(words.split()).replace("|", "/").removeprefix("fastft.errors.FastFTError: ")
    return text if len(text) <= 150 else text[:147] + "..."


def page() -> str:
    """Return docs/bases.md with both tables of RESULTS in their places."""
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables(json.loads(RESULTS.read_text(encoding="utf-8"))).items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, _, rest = text.partition(begin)
        text = before + begin + table + end + rest.partition(end)[2]
    return text


def main() -> None:
    """Read the command line, measure where asked, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs="*", metavar="MODEL_TYPE")
    asked = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    if asked.measure is not None:
        measure(asked.measure)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
