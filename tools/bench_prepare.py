"""How fast rows are prepared: fastft with the proof on, trl's preparation, and `datasets.map`.

    python tools/bench_prepare.py --rows 1000 --repeats 3 [--out benchmarks/results/prepare.json]

The same rows (about 4.5 KB, one to four turns), the same tokenizer (Qwen 2's vocabulary) and the
same template in one process, the arms interleaved. Reported: the median of rows a second by the
clock, from rows in a file to token ids and labels.

    fastft          fastft.data.prepare: rows counted, masked, every sample proven, duplicates found
    fastft workers  the same with two worker processes, as files above 32 MB are prepared
    trl             SFTTrainer._prepare_dataset, assistant_only_loss, dataset_num_proc 2
    datasets.map    apply_chat_template of the whole and of each prompt, num_proc 2: masks without
                    a proof
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PROCESSES = 2
LENGTH = 2048


def make_rows(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Return conversations of about 4.5 KB, English and some Japanese."""
    rng = random.Random(seed)
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    words += (ROOT / "README.ja.md").read_text(encoding="utf-8").split()[:200]

    def text(size: int) -> str:
        made: list[str] = []
        while sum(map(len, made)) + len(made) < size:
            made.append(rng.choice(words))
        return " ".join(made)

    rows = []
    for _ in range(count):
        turns = rng.choice([1, 1, 2, 3, 4])
        messages = [{"role": "system", "content": "You are a helpful assistant."}]
        for _ in range(turns):
            messages.append({"role": "user", "content": text(4400 // turns // 4)})
            messages.append({"role": "assistant", "content": text(4400 // turns * 3 // 4)})
        rows.append({"messages": messages})
    return rows


def of_fastft(path: Path, tokenizer: Any, folder: Path, processes: int) -> int:
    """Prepare with fastft; return the trained tokens."""
    from fastft.config import DataConfig
    from fastft.data import prepare

    config = DataConfig(source=str(path), eval_fraction=0.0)
    made = prepare(config, tokenizer, max_seq_length=LENGTH, cache_dir=folder, processes=processes)
    assert made.report.rows_used == made.report.rows_total
    return made.train.trained_tokens


def of_trl(path: Path, tokenizer: Any, training_template: str) -> int:
    """Prepare as trl's SFTTrainer does; return the trained tokens."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    dataset = datasets.load_dataset("json", data_files=str(path), split="train")
    arguments = SFTConfig(
        output_dir="unused", assistant_only_loss=True, max_length=LENGTH, use_cpu=True,
        dataset_num_proc=PROCESSES, report_to=[], bf16=False,
    )  # fmt: skip
    trainer = types.SimpleNamespace(
        _tokenizer=tokenizer, chat_template=training_template, completion_only_loss=False
    )
    made = SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, arguments, False, None, "train")
    return sum(sum(label != -100 for label in labels) for labels in made["labels"])


def of_map(path: Path, tokenizer: Any) -> int:
    """Prepare with `datasets.map` over `apply_chat_template`; return the trained tokens."""
    import datasets

    dataset = datasets.load_dataset("json", data_files=str(path), split="train")
    made = dataset.map(
        _masked, fn_kwargs={"tokenizer": tokenizer}, num_proc=PROCESSES,
        remove_columns=dataset.column_names,
    )  # fmt: skip
    return sum(sum(label != -100 for label in labels) for labels in made["labels"])


def _masked(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    messages = row["messages"]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    labels = [-100] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(
                tokenizer.apply_chat_template(
                    messages[:index], add_generation_prompt=True, return_dict=False
                )
            )
            end = len(tokenizer.apply_chat_template(messages[: index + 1], return_dict=False))
            labels[start:end] = ids[start:end]
    return {"input_ids": ids[:LENGTH], "labels": labels[:LENGTH]}


def main() -> None:
    """Measure and print; with --out, keep the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import datasets
    import trl

    from tests.unit.data import real_tokenizers as real

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = real.qwen()
    templates = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (templates / "qwen2_5.jinja").read_text(encoding="utf-8")
    training = (templates / "qwen2_5_training.jinja").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "rows.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) for row in make_rows(options.rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
        arms: dict[str, Callable[[], int]] = {
            "fastft": lambda: of_fastft(path, tokenizer, Path(work), 1),
            "fastft workers": lambda: of_fastft(path, tokenizer, Path(work), PROCESSES),
            "trl": lambda: of_trl(path, tokenizer, training),
            "datasets.map": lambda: of_map(path, tokenizer),
        }
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        trained: dict[str, int] = {}
        for turn in range(options.repeats + 1):
            for name, arm in arms.items():
                started = time.perf_counter()
                trained[name] = arm()
                if turn:  # the first round warms up
                    seconds[name].append(time.perf_counter() - started)
    result = {
        "rows": options.rows,
        "bytes_per_row": round(sum(map(len, lines)) / len(lines)),
        "rows_per_sec": {
            name: round(options.rows / statistics.median(taken), 1)
            for name, taken in seconds.items()
        },
        "seconds": {name: [round(s, 3) for s in taken] for name, taken in seconds.items()},
        "trained_tokens": trained,
        "machine": f"{platform.machine()}, {PROCESSES} cores, Python {platform.python_version()}",
        "versions": {"datasets": datasets.__version__, "trl": trl.__version__},
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
