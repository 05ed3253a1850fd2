"""What somebody meets in the first minutes: each command, and what it must say."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from rich.cells import cell_len
from rich.console import Console

from fastft import cli, console
from fastft.config import load_config, make_config
from fastft.data import inspect
from fastft.data.glance import Glance, glance
from fastft.exporting import certificate, ollama
from fastft.files import sha256
from fastft.files.locks import held
from fastft.inference import conversation
from fastft.inference.sampling import Sampling
from fastft.planning.init import commented_config
from fastft.progress import Pace
from fastft.runs import listing
from fastft.verification.evaluation import trained_on


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qa.jsonl").write_text(
        '{"question": "富士山の高さは?", "answer": "3776メートルです。"}\n' * 40, encoding="utf-8"
    )
    return tmp_path


@pytest.fixture
def say(capsys):
    """Run a command; returns (exit code, standard output, standard error)."""

    def run(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def a_run(folder, *, status=None, steps=0, total=10, held_out=None, exports=()):
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text("model: {name: x}\ndata: {source: y}\n")
    record = {"started": "now", "dataset": {}, "total_steps": total}
    if status:
        record["status"] = status
    (folder / "run.json").write_text(json.dumps(record))
    lines = [{"step": step, "loss": 1.0} for step in range(1, steps + 1)]
    lines += [{"step": steps, "eval_loss": held_out}] if held_out else []
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in exports:
        (folder / "export").mkdir(exist_ok=True)
        (folder / "export" / name).write_text("")
    return folder


# --- a config for one's own data


def test_init_looks_at_the_data(here, say):
    code, out, err = say("init", "--data", "qa.jsonl", "-o", "run.yaml")
    assert (code, out) == (0, "")
    assert "wrote run.yaml for 40 rows" in err
    assert "next: fastft plan run.yaml\n      fastft train run.yaml" in err
    config = load_config(here / "run.yaml")
    assert (config.project, config.train.epochs, config.model.max_seq_length) == ("qa", 3, 256)
    code, _, err = say("init", "-o", "run.yaml")
    assert code == 2
    assert "run.yaml exists and is not replaced" in err


def test_init_prints_where_no_file_is_named(here, say):
    code, out, _ = say("init", "--project", "mine")
    assert code == 0
    assert yaml.safe_load(out)["project"] == "mine"
    assert "data.jsonl is no file here" in out


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("qa.json", "(did you mean 'qa.jsonl'?)"),
        ("train.csv", "data files there: qa.jsonl"),
        ("nowhere/train.csv", "that folder does not exist either"),
    ],
)
def test_init_refuses_data_that_is_not_there(here, say, given, hint):
    code, out, err = say("init", "--data", given)
    assert (code, out) == (2, "")
    assert f"the data file {given} does not exist" in err
    assert hint in err.replace("\n", " ")


def test_plan_says_that_the_data_is_not_there(here, say):
    say("init", "--data", "qa.jsonl", "--model", "quickstart", "-o", "run.yaml")
    assert "is not on this machine" not in say("plan", "run.yaml")[2]
    code, _, err = say("plan", "run.yaml", "data.source=qa.json")
    assert code == 0
    assert "the data file qa.json is not on this machine" in err


def test_init_says_what_the_embedded_model_is_good_for(here, say):
    code, out, err = say("init", "--data", "qa.jsonl", "--model", "quickstart")
    assert code == 0
    assert "knows nothing but its own invented towns" in err
    assert yaml.safe_load(out)["train"]["learning_rate"] == 3e-3
    _, out, err = say("init", "--data", "qa.jsonl", "--model", "some/base")
    assert "towns" not in err
    assert yaml.safe_load(out)["train"]["learning_rate"] == 2e-4


def test_the_t4s_model_is_the_notebooks():
    from tests.e2e.test_notebooks import ROOT

    model = yaml.safe_load(commented_config(gpu="t4"))["model"]["name"]
    assert f'BASE_MODEL_ID = "{model}"' in (ROOT / "notebooks" / "quickstart.md").read_text("utf-8")


def test_lengths_are_counted_where_the_tokenizer_is_here(here):
    from fastft.quickstart import base_path

    counted = glance("qa.jsonl", str(base_path()))
    estimated = glance("qa.jsonl", "some/base")
    assert counted.counted
    assert not estimated.counted
    assert counted.rows == estimated.rows == 40
    assert 0.3 < estimated.median_tokens / counted.median_tokens < 3
    assert glance("user/dataset", "some/base") is None


@pytest.mark.parametrize(("tokens", "length"), [(30, 256), (257, 512), (4097, 8192)])
def test_the_length_holds_nearly_all_rows(tokens, length):
    assert Glance(10, tokens, tokens, counted=True).max_seq_length == length


# --- settings and mistakes


def test_data_given_as_a_config_says_what_to_do(here, say):
    code, _, err = say("train", "qa.jsonl")
    assert code == 2
    assert "qa.jsonl is data, not a config" in err
    assert "fastft init --data qa.jsonl -o qa.yaml" in err


def test_a_mistake_is_said_of_the_place_where_it_stands(here, say):
    (here / "run.yaml").write_text("model: {name: some/base}\ndata: {source: qa.jsonl}\n")
    code, _, err = say("plan", "run.yaml", "lora.rr=4")
    assert code == 2
    assert "the settings on the command line (lora.rr=4): 1 problem" in err
    (here / "run.yaml").write_text("model: {name: some/base}\ndata: {sauce: qa.jsonl}\n")
    _, _, err = say("plan", "run.yaml", "lora.rr=4")
    assert "run.yaml: 2 problems" in err


def test_a_config_of_a_near_name_is_offered(here, say):
    (here / "run.yaml").write_text("{}")
    code, _, err = say("plan", "run.yml")
    assert code == 2
    assert "(did you mean 'run.yaml'?)" in err.replace("\n", " ")


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (["train", "a.yaml", "lora.r=4"], ["train", "a.yaml", "--set", "lora.r=4"]),
        (
            ["plan", "a.yaml", "project=x", "--json"],
            ["plan", "a.yaml", "--set", "project=x", "--json"],
        ),
        (["train", "a.yaml", "--set", "lora.r=4"], ["train", "a.yaml", "--set", "lora.r=4"]),
        (["chat", "run", "-p", "a=b"], ["chat", "run", "-p", "a=b"]),
        (
            ["train", "a.yaml", "--json", "lora.r=4"],
            ["train", "a.yaml", "--json", "--set", "lora.r=4"],
        ),
        (["train", "my=file.yaml"], ["train", "--set", "my=file.yaml"]),
        ([], []),
    ],
)
def test_key_value_after_the_config_is_a_setting(given, taken):
    assert cli._settings_as_options(given) == taken


def test_every_command_has_an_example(say):
    _, out, _ = say("--help")
    commands = re.findall(r"^│ ([a-z][a-z-]+) ", out, re.MULTILINE)
    assert {"train", "plan", "runs", "chat"} <= set(commands)
    for command in commands:
        if command != "bench":  # its examples stand with its own commands
            assert f"Example: fastft {command}" in say(command, "--help")[1], command


def test_completion_can_be_installed(say):
    assert "--install-completion" in say("--help")[1]


# --- runs


def test_runs_are_listed(here, say):
    a_run(here / "runs" / "done", status="done", steps=10, held_out=0.5, exports=("a.gguf",))
    a_run(here / "runs" / "killed", steps=4, held_out=0.75)
    a_run(here / "runs" / "busy", steps=2)
    (a_run(here / "runs" / "broken") / "run.json").write_text("{")
    with held(here / "runs" / "busy" / ".lock", RuntimeError):
        code, out, _ = say("runs")
        assert code == 0
        found = {line.split()[0]: line for line in out.splitlines()}
        assert re.search(r"done +10 of 10 +0\.5000 +a\.gguf", found["runs/done"])
        assert re.search(r"stopped +4 of 10 +0\.7500", found["runs/killed"])
        assert "running" in found["runs/busy"]
        assert "damaged" in found["runs/broken"]
        assert "runs/broken: " in out
    values = listing.as_json(listing.list_runs("runs"))["runs"]
    assert {run["run"]: run["status"] for run in values}["runs/busy"] == "stopped"
    assert {"run", "status", "step", "total_steps", "eval_loss", "exports"} <= values[0].keys()


def test_the_trials_of_a_sweep_are_listed_and_columns_stand_below_each_other(here, say):
    a_run(here / "runs" / "町の案内", status="done", steps=10, held_out=0.5)
    a_run(here / "runs" / "faq-sweep" / "lora.r=4", status="done", steps=10, held_out=0.25)
    (here / "runs" / "faq-sweep" / "sweep.json").write_text("{}")
    code, out, _ = say("runs")
    assert code == 0
    assert re.search(r"faq-sweep/lora.r=4 +done +10 of 10 +0\.2500", out)
    starts = {cell_len(line[: line.index("done")]) for line in out.splitlines()[1:]}
    assert len(starts) == 1


def test_no_runs(here, say):
    assert say("runs")[0] == 2
    (here / "runs").mkdir()
    assert "no run in runs yet" in say("runs")[1]


@pytest.mark.parametrize("command", ["chat", "export", "verify"])
def test_a_run_that_is_not_there_is_said_with_those_that_are(here, say, command):
    a_run(here / "runs" / "mine")
    code, _, err = say(command, "runs/mine2")
    assert code == 2
    assert "runs/mine2 does not exist. Runs in runs: runs/mine." in err


def test_a_chats_commands(monkeypatch, capsys):
    typed = iter(["/bye", "/reset", "/quit", "never asked for"])
    monkeypatch.setattr(conversation, "open_chat", lambda target, **keywords: None)
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    conversation.converse("run", system=None, sampling=Sampling(), compare=False)
    said = capsys.readouterr().err
    assert "There is no command /bye" in said
    assert "begins anew" in said
    assert next(typed) == "never asked for"


def test_projects_in_japanese_are_different_models_in_ollama():
    names = [
        ollama.create_line("Modelfile", name).split()[2] for name in ("町の案内", "社内FAQ", "規程")
    ]
    assert names[1] == "faq"
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name) for name in names)


def test_an_evaluation_on_trained_rows_says_so(here):
    run = a_run(here / "runs" / "mine", status="done", steps=10)
    (run / "run.yaml").write_text(f"model: {{name: x}}\ndata: {{source: {here / 'qa.jsonl'}}}\n")
    copy = here / "copy.jsonl"
    copy.write_bytes((here / "qa.jsonl").read_bytes())
    (here / "new.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    assert trained_on(run, "qa.jsonl")
    assert trained_on(run, "copy.jsonl")
    assert not trained_on(run, "new.jsonl")
    assert not trained_on("model.gguf", "qa.jsonl")


# --- outside a terminal


def test_a_log_file_says_where_a_run_stands(monkeypatch):
    now = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr("fastft.progress.time.monotonic", lambda: next(now))
    pace = Pace(110)
    assert pace.place(10) == "step 10 of 110"
    assert pace.place(20) == "step 20 of 110, 90.0 s left"
    assert Pace(None).place(3) == "step 3"


def test_a_download_is_a_line_every_few_seconds(monkeypatch, tmp_path):
    from fastft import hub, progress

    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    said = io.StringIO()
    report = progress.Reporter(Console(file=said, width=200))
    with hub.watched("a/b", "models", 4_000_000, report.bytes):
        (blobs / "x.incomplete").write_bytes(os.urandom(3_000_000))
    assert re.search(r"downloading a/b \(4 MB\): 3 of 4 MB \(75%\), [\d.,]+ MB/s", said.getvalue())


# --- what comes next


def test_then_quotes_what_a_shell_would_split():
    assert console.then(["fastft", "chat", "my runs/a"], "stop") == (
        "\nnext: fastft chat 'my runs/a'\n      stop"
    )


def test_exports_say_how_they_are_used_from_here(here):
    (here / "out").mkdir()
    (here / "out" / "Modelfile").write_text("# ollama create my-run -f Modelfile\nFROM ./a.gguf\n")
    said = cli._use("runs/a", ["out/a.Q4_K_M.gguf", "out/Modelfile"])
    assert "fastft chat out/a.Q4_K_M.gguf" in said
    assert "ollama create my-run -f out/Modelfile" in said


def test_a_finished_run_names_its_report(here):
    run = a_run(here / "runs" / "a", status="done")
    (run / "report.md").write_text("")
    said = cli._trained(
        SimpleNamespace(run="runs/a", final="runs/a/final", status="done"), "c.yaml"
    )
    assert "done: runs/a/final" in said
    assert "runs/a/report.md" in said
    assert "fastft export runs/a --to gguf:q4_k_m" in said
    paused = SimpleNamespace(run="runs/a", final=None, status="paused")
    assert "next: fastft train c.yaml" in cli._trained(paused, "c.yaml")


# --- two configs, one run; a file that was changed


def test_data_writes_nothing_into_a_run_of_other_data(here):
    a_run(here / "runs" / "mine")
    values = {"model": {"name": "x"}, "project": "mine"}
    said = io.StringIO()
    other = make_config({**values, "data": {"source": "b.jsonl"}})
    assert inspect._place_of_plot(other, Console(file=said, width=200)) is None
    assert "runs/mine is a run of other data (y)" in said.getvalue()
    same = make_config({**values, "data": {"source": "y"}})
    assert inspect._place_of_plot(same, Console(file=said)) == Path("runs/mine/data.png")


def test_a_changed_file_stays_changed_until_it_is_exported_again(here):
    file, other = here / "a.gguf", here / "b.gguf"
    file.write_bytes(b"one")
    other.write_bytes(b"same")
    entries = [
        {"path": str(path), "sha256": sha256(path), "verdict": "pass", "checks": []}
        for path in (file, other)
    ]
    certificate.write_certificate(here, entries, {})
    assert certificate.changed_since(file, here) is None
    was = sha256(file)
    file.write_bytes(b"two")
    for _ in range(2):  # verifying another file does not launder this one
        assert certificate.changed_since(file, here) == was
        certificate.write_certificate(here, entries[1:], {})
        found = certificate.read_certificate(here)["files"]
        assert (found["a.gguf"]["verdict"], found["b.gguf"]["verdict"]) == ("fail", "pass")
        assert "was changed after it was certified" in (here / "certificate.md").read_text()
    file.write_bytes(b"one")
    assert certificate.changed_since(file, here) is None
    file.write_bytes(b"three")
    certificate.forget(here, ["a.gguf"])
    assert certificate.changed_since(file, here) is None
    assert "a.gguf" not in (here / "certificate.md").read_text()


# --- said before it costs time


def test_a_warm_up_longer_than_the_run_is_said(here):
    from fastft.planning import command

    settings = ["train.max_steps=10", "train.warmup_steps=100"]
    notes = " ".join(command.run(write_config(here), settings, show=False).notes)
    assert "the warm-up of 100 steps is longer than the run of 10" in notes
    assert "reaches 10% of train.learning_rate at most" in notes


def write_config(folder):
    path = folder / "run.yaml"
    path.write_text("model: {name: quickstart}\ndata: {source: qa.jsonl}\n")
    return path


def test_the_embedded_base_has_a_name(here):
    name = load_config(write_config(here)).model.name
    assert (Path(name) / "config.json").is_file()
    (here / "quickstart").mkdir()
    assert load_config(here / "run.yaml").model.name == "quickstart", "an own folder comes first"


def test_a_conversation_knows_its_commands(monkeypatch, capsys):
    from fastft.inference import conversation

    asked = []

    def answer(model, messages, sampling, on_piece=None):
        asked.append([m["content"] for m in messages])
        return SimpleNamespace(text="yes", tokens=[1], tokens_per_sec=1.0)

    typed = iter(["hello", "more", "/help", "/reset", "again", "/exit", "never"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    monkeypatch.setattr(conversation, "open_chat", lambda target, **keywords: None)
    monkeypatch.setattr(conversation, "ask", answer)
    conversation.converse("run", system=None, sampling=None, compare=False)
    assert asked == [["hello"], ["hello", "yes", "more"], ["again"]]
    assert "/reset forgets what was said" in capsys.readouterr().err
    assert next(typed) == "never"


def test_ctrl_c_while_libraries_are_read_is_one_line(tmp_path):
    code = (
        "import builtins, sys\n"
        "real = builtins.__import__\n"
        "def interrupted(name, *rest):\n"
        "    if name == 'fastft.cli': raise KeyboardInterrupt\n"
        "    return real(name, *rest)\n"
        "from fastft.__main__ import main\n"
        "builtins.__import__ = interrupted\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


DOWNLOAD = """
import sys
from rich.cells import cell_len
from rich.console import Console
from fastft import hub, progress
progress.SECONDS_BETWEEN_LINES = 0.0
report = progress.Reporter(Console(file=sys.stdout, width=200))
for _ in range(2):
    hub.download_model("own/base", progress=report.bytes)
    print("--")
"""


SWALLOWED = """
import signal, time
from fastft.cli import repeat_swallowed_interrupts

signal.signal(signal.SIGTERM, signal.default_int_handler)
repeat_swallowed_interrupts()

class Dying:
    def __del__(self):
        raise KeyboardInterrupt

try:
    Dying()
    time.sleep(30)
    print("lost")
except KeyboardInterrupt:
    print("came again")
"""


def test_an_interrupt_that_meets_a_destructor_is_not_lost():
    done = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("came again\n", "")


def test_a_model_is_downloaded_once_with_its_size(tmp_path):
    from tests.hub_stand_in import HubStandIn

    with HubStandIn() as server:
        files = {"config.json": b"{}", "model.safetensors": b"x" * 3_000_000, "a.bin": b"pickle"}
        server.add("own/base", files)
        environment = {
            **os.environ, "HF_ENDPOINT": server.endpoint, "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", DOWNLOAD], capture_output=True, text=True, env=environment
        )
    assert done.returncode == 0, done.stderr
    first, second, _ = done.stdout.split("--\n")
    assert re.search(r"downloading own/base.*: 3 (of 3 )?MB", first), first
    assert second == "", "everything is in the cache"
    assert not list(tmp_path.rglob("a.bin")), "pickles stay on the Hub"


def test_no_placeholder_is_left():
    root = Path(__file__).parents[2]
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    texts = (".md", ".ipynb", ".py", ".toml", ".yaml", ".yml", ".txt")
    placeholder = "OWNER" + "/"
    found = [
        name
        for name in listed.stdout.splitlines()
        if name.endswith(texts) and placeholder in (root / name).read_text("utf-8", "replace")
    ]
    assert found == []
