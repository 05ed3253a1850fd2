"""`fastft selftest` on this machine, and with a fault planted in each of the things that it looks at."""

import json

import pytest

from fastft.hardware import probe
from tests.e2e.conftest import fastft, run_python

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

PLANTED = """
import json, sys, time
from pathlib import Path
from fastft.bench import probes
from fastft.planning import memory

folder = Path(sys.argv[1])
case = {
    "name": "tiny", "family": "llama", "config": probes.TINY, "shape": "tiny", "lengths": [40, 20, 30, 10],
    "model": {"quantization": "none"}, "train": {}, "turns": 2,
}

def look(kind, *what):
    (finding,) = list(probes.PARTS[kind](folder, *what))
    return finding.verdict, finding.advice

honest = {"rows": look("rows", ["llama"]), "speed": look("speed", case)}

# An attention that ignores boundaries.
from fastft.kernels import varlen
attention = varlen.varlen_attention
def leaky(*args, cu_seq_lens_q, **kwargs):
    return attention(*args, cu_seq_lens_q=cu_seq_lens_q[[0, -1]], **kwargs)
varlen.varlen_attention = leaky
planted = {"rows": look("rows", ["llama"])}

# An attention that takes its time, in rows alone.
def slow(*args, **kwargs):
    time.sleep(0.5)
    return attention(*args, **kwargs)
varlen.varlen_attention = slow
from fastft.bench import probes as again
fused = again._stepper
again._stepper = lambda *a: fused(*a).__class__(
    a[0], a[1], fused(*a).policy, device=a[0].device, on_note=print)  # transformers' own attention modules
planted["speed"] = look("speed", case)
varlen.varlen_attention = attention

# A plan that takes Python and its libraries for 6 GB.
memory.IMPORTS["cpu"] = int(6e9)
planted["plan"] = look("plan", case)
print(json.dumps({"honest": honest, "planted": planted}))
"""


def test_each_planted_fault_is_named(tmp_path):
    found = run_python(PLANTED, tmp_path, timeout=600)
    assert found["honest"]["rows"][0] == "pass"
    assert found["honest"]["speed"][0] == "pass"
    assert found["planted"]["rows"][0] == "fail"
    assert "not exact for llama" in found["planted"]["rows"][1]
    assert found["planted"]["speed"][0] == "warn"
    assert "slow path" in found["planted"]["speed"][1]
    assert found["planted"]["plan"][0] == "fail"
    assert "The plan is off by +" in found["planted"]["plan"][1]


def test_the_whole_of_it_on_this_machine(tmp_path):
    done = fastft("selftest", "--minutes", "12", "--out", tmp_path / "out", "--json", timeout=800)
    assert done.code == 0, done.out
    found = done.json
    assert json.loads((tmp_path / "out" / "selftest.json").read_text()) == found
    names = [check["name"] for check in found["checks"]]
    assert "rows: llama" in names
    # The third, 4-bit weights, is a card's only: on a CPU the plan of those is an upper bound.
    assert sum(name.startswith("plan: ") for name in names) == (3 if probe().kind == "cuda" else 2)
    assert sum(name.startswith("run: ") for name in names) == 2
    assert found["verdict"] in ("pass", "warn")
    profile = next(c for c in found["checks"] if c["name"] == "speed")["numbers"]["profile"]
    assert len(profile["longest"]) == 10
    assert (tmp_path / "out" / "selftest.md").read_text().startswith("# fastft selftest")
