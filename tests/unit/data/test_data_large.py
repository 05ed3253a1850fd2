"""A 2 GB file streams with less than 1 GB of resident memory above that of the imports. Long: run with -m long."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys

import pytest

GIGABYTE = 10**9
SIZE = int(float(os.environ.get("FASTFT_TEST_BYTES", 2 * GIGABYTE)))

# Runs in a process of its own, so that its memory is its own. Prints one line of JSON.
MEASURE = """
import json, sys, threading, time
from pathlib import Path
import psutil
from tests.unit.data.real_tokenizers import llama3, template
from fastft.config import DataConfig
from fastft.data import prepare

def memory():
    total = {"Rss": 0, "Anonymous": 0}
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            key, _, rest = line.partition(":")
            if key in total:
                total[key] += int(rest.split()[0]) * 1024
    return total

tokenizer = llama3()
tokenizer.chat_template = template("meta-llama-Llama-3.1-8B-Instruct")
import fastft.data.pipeline
before, peak, busy = memory(), {"Rss": 0, "Anonymous": 0}, [True]

def watch():
    while busy[0]:
        now = memory()
        for key in peak:
            peak[key] = max(peak[key], now[key])
        time.sleep(1)

thread = threading.Thread(target=watch)
thread.start()
made = prepare(DataConfig(source=sys.argv[1], streaming=True), tokenizer, max_seq_length=2048, cache_dir=Path(sys.argv[2]))
read = sum(int(made.train[i].input_ids[0]) >= 0 for i in range(0, len(made.train), 100))
busy[0] = False
thread.join()
print(json.dumps({"before": before, "peak": peak, "rows": made.report.rows_total, "used": made.report.rows_used,
                  "rows_per_sec": made.report.rows_per_sec, "tokens": made.report.tokens, "read": read}))
"""


def _write(path, size):
    pick = random.Random(1)
    words = [
        f"{a}{b}"
        for a in ("stone", "river", "light", "north", "wind")
        for b in ("", "s", "ward", "fall", "ing")
    ]
    texts = [
        " ".join(pick.choices(words, k=pick.randint(60, 600))) + "。北の街です" for _ in range(5000)
    ]
    rows = written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            asked, said = pick.choice(texts)[:300], pick.choice(texts)
            line = (
                json.dumps(
                    {"question": f"{rows} {asked}", "answer": f"{said} {rows}"}, ensure_ascii=False
                )
                + "\n"
            )
            written += len(line.encode())
            file.write(line)
            rows += 1
    return rows


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_a_large_file_streams_in_constant_memory(tmp_path):
    if shutil.disk_usage(tmp_path).free < 4 * SIZE:
        pytest.skip(f"needs {4 * SIZE / GIGABYTE:.0f} GB of disk")
    source = tmp_path / "large.jsonl"
    rows = _write(source, SIZE)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    print(result)
    assert result["rows"] == result["used"] == rows
    for kind in ("Rss", "Anonymous"):
        assert result["peak"][kind] - result["before"][kind] < GIGABYTE, result
