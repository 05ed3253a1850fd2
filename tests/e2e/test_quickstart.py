"""The quickstart as a user runs it: it learns, what it saves loads elsewhere, and its exports carry a proof."""

import importlib.util
import json
import struct
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.e2e.conftest import Outcome, fastft, run_python

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """fastft from its wheel, in an environment of its own outside the clone; only the libraries are shared."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("fastft-*.whl")
    venv.create(folder / "env", with_pip=False)
    inside = folder / "env" / "bin" / "python"
    subprocess.run([*pip, "--python", inside, "install", "--quiet", "--no-deps", wheel], check=True)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    libraries = Path(importlib.util.find_spec("torch").origin).parents[1]
    (site / "libraries.pth").write_text(f"{libraries}\n")
    return folder / "env" / "bin" / "fastft"


@pytest.fixture(scope="module")
def quickstart(installed, tmp_path_factory):
    """The quickstart as a user of the wheel runs it, in an empty folder."""
    out = tmp_path_factory.mktemp("quickstart")
    done = subprocess.run(
        [installed, "quickstart", "--out", out, "--json"],
        cwd=out, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert outcome.code == 0, outcome.err[-3000:]
    return outcome.json, out / "quickstart"


def test_the_wheel_is_what_ran(installed, quickstart):
    config = json.loads((quickstart[1] / "final" / "adapter_config.json").read_text())
    base = Path(config["base_model_name_or_path"])
    assert installed.parents[1] in base.parents
    assert ROOT not in base.parents


def test_it_learns_to_answer_from_what_it_knows_and_only_that(quickstart):
    share = quickstart[0]["exact_match"]
    assert share["heldout_before"] <= 0.10
    assert share["heldout_after"] >= 0.90
    assert share["unknown_after"] < 0.10


def test_the_task_is_large_enough_to_judge(quickstart):
    data = quickstart[1] / "data"
    assert len((data / "heldout.jsonl").read_text(encoding="utf-8").splitlines()) >= 200
    trained = (data / "train.jsonl").read_text(encoding="utf-8")
    questions = [
        json.loads(line)["messages"][0]["content"]
        for line in (data / "heldout.jsonl").open(encoding="utf-8")
    ]
    assert not any(json.dumps(question, ensure_ascii=False) in trained for question in questions)


def test_the_run_folder_is_complete(quickstart):
    run = quickstart[1]
    for name in ("run.yaml", "run.json", "log.jsonl", "loss.png", "report.md", "samples.jsonl"):
        assert (run / name).is_file(), name
    for name in (
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "config.json",
        "README.md",
    ):
        assert (run / "final" / name).is_file(), name
    width, height = struct.unpack(">II", (run / "loss.png").read_bytes()[16:24])
    assert (width, height) > (400, 200)


def test_unsloth_trained_it(quickstart):
    record = json.loads((quickstart[1] / "run.json").read_text())
    assert record["choices"]["engine"]["value"] == "unsloth"
    assert record["patches"]["unsloth"].startswith("2026.")
    assert "imported_before_unsloth" not in record["patches"]


def test_gguf_files_answer_as_well_as_the_model_and_are_certified(quickstart):
    result, run = quickstart
    share = result["exact_match"]
    for name in ("heldout_q8_0", "heldout_q4_k_m"):
        assert abs(share[name] - share["heldout_after"]) <= 0.02
    certificate = json.loads((run / "export" / "certificate.json").read_text())
    assert result["certificate"] == "pass"
    assert len(json.dumps(certificate)) > 500


PLAIN_PEFT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
final, prompt = sys.argv[1:]
base = json.load(open(final + "/adapter_config.json"))["base_model_name_or_path"]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), final).eval()
tokenizer = AutoTokenizer.from_pretrained(final)
ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
ends = json.load(open(final + "/generation_config.json"))["eos_token_id"]
out = model.generate(**ids, max_new_tokens=16, do_sample=False, eos_token_id=ends)[0, ids["input_ids"].shape[1]:]
assert "fastft" not in sys.modules
print(json.dumps(out.tolist()))
"""


def test_final_loads_without_fastft_and_says_the_same(quickstart):
    run = quickstart[1]
    prompt = json.loads(
        (run / "data" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[0]
    )["messages"][0]["content"]
    said = fastft(
        "chat", run, "--prompt", prompt, "--max-new-tokens", 16, "--dtype", "float32", "--json"
    )
    assert said.code == 0, said.err
    assert set(said.json) == {"text", "tokens", "tokens_per_sec"}
    assert said.json["tokens"] == run_python(PLAIN_PEFT, run / "final", prompt)


MERGED = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
final, merged = sys.argv[1:]
base = json.load(open(final + "/adapter_config.json"))["base_model_name_or_path"]
ids = torch.arange(100, 160)[None]
with torch.no_grad():
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), final).eval()(ids).logits
    found = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()(ids).logits
print(json.dumps(float((trained - found).abs().max())))
"""


def test_the_float32_merge_is_the_trained_model(quickstart, tmp_path):
    run = quickstart[1]
    outcome = fastft(
        "export",
        run,
        "--to",
        "merged",
        "--dtype",
        "float32",
        "--out",
        tmp_path,
        "--no-verify",
        "--json",
    )
    assert outcome.code == 0, outcome.err
    assert run_python(MERGED, run / "final", tmp_path / "merged") < 1e-4


def test_compare_shows_base_and_adapter(quickstart):
    outcome = fastft(
        "chat",
        quickstart[1],
        "--prompt",
        "What is the flag animal of Sedok?",
        "--compare",
        "--json",
    )
    assert outcome.code == 0, outcome.err
    assert outcome.json["base_text"] != outcome.json["text"]


def test_the_report_reads_well(quickstart):
    report = (quickstart[1] / "report.md").read_text(encoding="utf-8")
    assert "| prompt | before | after | reference |" in report
    assert "engine: **unsloth**" in report
    assert "nan" not in report.lower().replace("finance", "")


def test_a_certified_file_that_was_changed_no_longer_verifies(quickstart, tmp_path):
    run = quickstart[1]
    entry = next(f for f in quickstart[0]["files"] if f["kind"] == "gguf:q8_0")
    damaged = tmp_path / Path(entry["path"]).name
    content = bytearray(Path(entry["path"]).read_bytes())
    content[-200_000:-100_000] = bytes(100_000)
    damaged.write_bytes(content)
    outcome = fastft("verify", run, "--out", tmp_path, "--json")
    assert outcome.code == 1, outcome.err
    assert {f["path"]: f["verdict"] for f in outcome.json["files"]}[str(damaged)] == "fail"
