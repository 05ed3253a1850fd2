"""`fastft push`, and models and datasets by id, against a loopback stand-in of the Hub: what is sent, and what is said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastft.config import dump_config, make_config
from fastft.files import sha256
from tests.families import make_checkpoint
from tests.hub_stand_in import TOKEN, HubStandIn

# One process for all calls: it imports huggingface_hub with HF_ENDPOINT set. Waits are recorded and cut short.
WORKER = """
import json, os, sys, time, warnings
warnings.simplefilter("ignore")
answers, sys.stdout = sys.stdout, sys.stderr
slept, real_sleep = [], time.sleep
def sleep(seconds):
    slept.append(seconds)
    real_sleep(min(seconds, 0.01))
time.sleep = sleep
from fastft.errors import FastFTError

def push(**arguments):
    from fastft.exporting.push import push
    return push(**arguments)

def check_model(name):
    from fastft.models import check_checkpoint
    check_checkpoint(name)

def shape(name):
    from fastft.planning import load_shape
    return load_shape(name).parameters

def rows(name):
    from fastft.data.read import open_source
    return [row for chunk in open_source(name).chunks() for row in chunk.rows]

def snapshot(name, folder):
    from huggingface_hub import snapshot_download
    snapshot_download(name, local_dir=folder)

for line in sys.stdin:
    job = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if job["token"]:
        os.environ["HF_TOKEN"] = job["token"]
    slept.clear()
    try:
        answer = {"code": 0, "result": globals()[job["call"]](**job["arguments"])}
    except FastFTError as error:
        answer = {"code": error.exit_code, "message": str(error)}
    except Exception as error:
        answer = {"code": -1, "message": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer | {"slept": list(slept)}), file=answers, flush=True)
"""


@pytest.fixture(scope="module")
def hub():
    with HubStandIn() as server:
        server.add("own/base", {"config.json": b"{}", "model.safetensors": b"x"})
        yield server


@pytest.fixture(autouse=True)
def _clean(hub):
    hub.reset()


def surroundings(hub, home):
    """Return the environment of a process that knows no other Hub and no token."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1",
                   "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "HF_HUB_ETAG_TIMEOUT": "5"}  # fmt: skip


@pytest.fixture(scope="module")
def call(hub, tmp_path_factory):
    home = tmp_path_factory.mktemp("hf")
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=surroundings(hub, home),
    )  # fmt: skip

    def ask(what, /, token=TOKEN, **arguments):
        worker.stdin.write(
            json.dumps({"call": what, "token": token, "arguments": arguments}) + "\n"
        )
        worker.stdin.flush()
        return json.loads(worker.stdout.readline())

    yield ask
    worker.stdin.close()
    worker.wait(timeout=20)


@pytest.fixture
def run(tmp_path):
    """A finished run on a local base, with a certified export; the weights are small but real files."""
    import numpy as np
    from safetensors.numpy import save_file

    base, data = tmp_path / "models" / "my base", tmp_path / "secret folder" / "rows.jsonl"
    for folder in (base, data.parent, tmp_path / "runs/r/final", tmp_path / "runs/r/export/merged"):
        folder.mkdir(parents=True)
    data.write_text("{}\n")
    run = tmp_path / "runs" / "r"
    config = make_config(
        {
            "project": "r",
            "output_dir": str(run.parent),
            "model": {"name": str(base)},
            "data": {"source": str(data)},
        }
    )
    (run / "run.yaml").write_text(dump_config(config))
    (run / "run.json").write_text(
        json.dumps({"started": "x", "dataset": {"rows_used": 3}, "steps": 5})
    )
    final, export = run / "final", run / "export"
    save_file({"a": np.arange(5000, dtype=np.float32)}, final / "adapter_model.safetensors")
    (final / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": str(base), "r": 4})
    )
    (final / "tokenizer.json").write_text("{}")
    (final / "README.md").write_text(f"---\nlibrary_name: peft\n---\nbase {base}")
    (final / "manifest.json").write_text('{"files": {}}')
    (export / "r.Q8_0.gguf").write_bytes(b"GGUF" + bytes(range(256)) * 40)
    save_file({"w": np.ones(2000, dtype=np.float32)}, export / "merged" / "model.safetensors")
    certify(export, {"r.Q8_0.gguf": "pass", "merged": "pass"})
    return run


def certify(export, verdicts):
    files = {
        name: {
            "path": str(export / name),
            "kind": "x",
            "verdict": verdict,
            "sha256": sha256(export / name),
            "kl_mean": 0.001,
        }
        for name, verdict in verdicts.items()
    }
    (export / "certificate.json").write_text(json.dumps({"files": files}))
    (export / "certificate.md").write_text("# certificate")


def pushed(call, run, **more):
    return call("push", **{"run": str(run), "repo": "me/r", "base_id": "own/base"} | more)


# --- what arrives


def test_a_push_is_one_commit_that_loads_again_byte_for_byte(call, hub, run, tmp_path):
    answer = pushed(call, run, include=["gguf", "merged"], private=True)
    assert answer["code"] == 0, answer
    repo = hub.repos["models", "me/r"]
    assert repo.private
    assert [sorted(paths) for _, paths in repo.commits] == [sorted(repo.files)]
    assert set(repo.files) == {
        "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md", "r.Q8_0.gguf",
        "certificate.json", "certificate.md", "merged/model.safetensors",
    }  # fmt: skip
    assert answer["result"]["url"] == f"{hub.endpoint}/me/r"
    assert {f["path"]: f["bytes"] for f in answer["result"]["files"]} == {
        p: len(c) for p, c in repo.files.items()
    }

    assert call("snapshot", name="me/r", folder=str(tmp_path / "again"))["code"] == 0
    for name in ("adapter_model.safetensors", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (run / "final" / name).read_bytes()
    assert (tmp_path / "again" / "r.Q8_0.gguf").read_bytes() == (
        run / "export" / "r.Q8_0.gguf"
    ).read_bytes()


def test_local_paths_stay_here(call, hub, run, tmp_path):
    assert pushed(call, run, include=["gguf"])["code"] == 0
    files = hub.repos["models", "me/r"].files
    for path, content in files.items():
        assert str(tmp_path).encode() not in content, path
        assert b"secret folder" not in content, path
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "own/base"
    card = files["README.md"].decode()
    assert "base_model: own/base" in card
    assert "rows.jsonl" in card


def test_only_whole_paths_are_taken_out_of_texts(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from fastft.exporting.push import _replaced, _scrub

    assert _replaced("see /home/me/runs/a/b, /home/me/runs", "/home/me/runs/a/", "") == (
        "see b, /home/me/runs"
    )
    assert _replaced('"base_model_name_or_path": "model"', "model", "own/base") == (
        '"base_model_name_or_path": "own/base"'
    )
    monkeypatch.chdir(tmp_path)
    target = SimpleNamespace(base="own/base", run=None, adapter=Path("."))
    cached = "/home/me/.cache/huggingface/hub/models--own--base/snapshots/0a1b"
    text = f'{{"./": 5, "model": "{cached} with the adapter {tmp_path}/final"}}'
    assert _scrub(text, target, "own/base") == (
        '{"./": 5, "model": "own/base with the adapter final"}'
    )


def test_an_adapter_without_a_run_is_pushed_too(call, hub, run):
    (run / "run.yaml").unlink()
    assert pushed(call, run / "final")["code"] == 0
    card = hub.repos["models", "me/r"].files["README.md"].decode()
    assert card == "---\nbase_model: own/base\nlibrary_name: peft\n---\nbase own/base"


def test_a_second_push_sends_only_what_changed(call, hub, run):
    assert pushed(call, run)["code"] == 0
    before = len(hub.requests)
    (run / "final" / "tokenizer.json").write_text('{"changed": 1}')
    assert pushed(call, run)["code"] == 0
    assert [paths for _, paths in hub.repos["models", "me/r"].commits][1:] == [["tokenizer.json"]]
    assert not [line for line in hub.requests[before:] if line.startswith("PUT")]


# --- what is refused before anything is sent


def test_a_local_base_is_refused_until_its_public_name_is_given(call, hub, run):
    answer = call("push", run=str(run), repo="me/r")
    assert answer["code"] == 2
    assert "--base-id" in answer["message"]
    assert "my base" in answer["message"]
    assert hub.requests == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"repo": "no-owner"}, "write it as user/name"),
        ({"base_id": "just-a-name"}, "write it as user/name"),
        ({"include": ["ggfu"]}, "did you mean 'gguf'"),
        ({"token": None}, "needs a Hugging Face token"),
    ],
)
def test_wrong_input(call, hub, run, change, says):
    answer = pushed(call, run, **change)
    assert answer["code"] == 2
    assert says in answer["message"]
    assert hub.requests == []


def test_a_base_id_that_names_nothing(call, hub, run):
    answer = pushed(call, run, base_id="own/nothing")
    assert (answer["code"], "no base model 'own/nothing'" in answer["message"]) == (2, True)
    assert ("models", "me/r") not in hub.repos


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda e: certify(e, {"r.Q8_0.gguf": "fail"}), "is not the trained model"),
        (lambda e: certify(e, {}), "has no certificate"),
        (lambda e: (e / "certificate.json").unlink(), "has no certificate"),
        (
            lambda e: (e / "r.Q8_0.gguf").write_bytes(b"GGUF other"),
            "changed after it was certified",
        ),
        (lambda e: (e / "r.Q8_0.gguf").unlink(), "does not hold what --include asks for"),
    ],
)
def test_only_certified_exports_are_pushed(call, hub, run, spoil, says):
    spoil(run / "export")
    answer = pushed(call, run, include=["gguf"])
    assert (answer["code"], says in answer["message"]) == (2, True), answer
    assert hub.requests == []


def test_private_is_not_granted_by_a_public_repository(call, hub, run):
    hub.add("me/r", {})
    answer = pushed(call, run, private=True)
    assert (answer["code"], "is public" in answer["message"]) == (2, True), answer
    assert hub.repos["models", "me/r"].files == {}


# --- what the Hub refuses


@pytest.mark.parametrize(
    ("token", "may_write", "says"),
    [
        ("hf_" + "x" * 34, True, "does not accept the token (401)"),
        (TOKEN, False, "may not do this (403)"),
    ],
)
def test_no_right(call, hub, run, token, may_write, says):
    hub.may_write = may_write
    answer = pushed(call, run, token=token)
    assert (answer["code"], says in answer["message"]) == (2, True), answer
    assert token not in json.dumps(answer)
    assert ("models", "me/r") not in hub.repos


def test_a_foreign_account(call, hub, run):
    answer = pushed(call, run, repo="someone/else")
    assert (answer["code"], "403" in answer["message"]) == (2, True), answer


def test_the_repository_vanishes(call, hub, run):
    hub.fail("POST .*/commit/", 404, times=9, X_Error_Code="RepoNotFound")
    answer = pushed(call, run)
    assert (answer["code"], "there is no repository 'me/r'" in answer["message"]) == (2, True), (
        answer
    )


# --- what is tried again


FAULTS = {
    "too many requests": ("POST .*/commit/", 429),
    "too many, at the start": ("POST /api/repos/create", 429),
    "another commit at the same time": ("POST .*/commit/", 409),
    "server error": ("POST .*/commit/", 503),
    "server error, upload": ("PUT /lfs/", 500),
    "broken upload": ("PUT /lfs/", "break"),
    "broken commit": ("POST .*/commit/", "break"),
    "commit done, answer lost": ("POST .*/commit/", "lose"),
    "broken at the start": ("POST /api/repos/create", "break"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_is_tried_again_and_gives_one_commit(call, hub, run, fault):
    pattern, how = FAULTS[fault]
    hub.fail(pattern, how)
    answer = pushed(call, run)
    assert answer["code"] == 0, answer
    assert len(hub.repos["models", "me/r"].commits) == 1
    assert (
        hub.repos["models", "me/r"].files["adapter_model.safetensors"]
        == (run / "final" / "adapter_model.safetensors").read_bytes()
    )
    assert answer["slept"], "there was a pause"


# An answer that is always lost was a commit all the same.
@pytest.mark.parametrize("fault", [name for name, (_, how) in FAULTS.items() if how != "lose"])
def test_a_lasting_fault_ends_with_one_message_and_nothing_public(call, hub, run, fault):
    pattern, how = FAULTS[fault]
    hub.fail(pattern, how, times=10_000)
    answer = pushed(call, run)
    assert answer["code"] == 3, answer
    assert "Nothing half is public" in answer["message"]
    repo = hub.repos.get(("models", "me/r"))
    assert repo is None or (repo.files == {} and repo.commits == [])
    assert 0 < sum(answer["slept"]) < 300, "bounded"
    hub.faults.clear()
    assert pushed(call, run)["code"] == 0, "the same call goes on"
    assert len(hub.repos["models", "me/r"].commits) == 1


def test_retry_after_is_honoured_but_not_for_ever(call, hub, run):
    hub.fail("POST .*/commit/", 429, Retry_After="37")
    answer = pushed(call, run)
    assert answer["code"] == 0
    assert max(answer["slept"]) >= 37
    hub.reset()
    for pattern in ("POST .*/commit/", "PUT /lfs/"):
        hub.fail(pattern, 429, times=99, Retry_After="7200")
        answer = pushed(call, run)
        assert (answer["code"], "7,200 s" in answer["message"]) == (3, True), answer
        assert sum(answer["slept"]) < 60
        hub.reset()


# --- by id


@pytest.fixture(scope="module")
def by_id(hub, tmp_path_factory):
    folder = make_checkpoint("llama", tmp_path_factory.mktemp("by_id"))
    files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
    rows = "".join(
        json.dumps({"question": f"What is {i}?", "answer": f"It is {i}."}) + "\n" for i in range(40)
    ).encode()
    for name, more in {
        "own/tiny": {},
        "own/hidden": {"private": True},
        "own/gated": {"gated": True},
    }.items():
        hub.add(name, files, **more)
        hub.add(name, {"train.jsonl": rows}, kind="datasets", **more)
    for number in range(4):
        hub.add(f"own/fault{number}", files)
        hub.add(f"own/fault{number}", {"train.jsonl": rows}, kind="datasets")
    return folder


def load(call, what, name, token=TOKEN):
    """Load as `fastft plan` and `train` do: a model is checked and measured, a dataset is read."""
    if what == "dataset":
        return call("rows", token=token, name=name)
    answer = call("check_model", token=token, name=name)
    return call("shape", token=token, name=name) if answer["code"] == 0 else answer


def test_a_model_and_a_dataset_by_id(call, hub, by_id):
    assert load(call, "model", "own/tiny")["result"] > 1000
    assert load(call, "dataset", "own/tiny")["result"][3] == {
        "question": "What is 3?",
        "answer": "It is 3.",
    }
    assert load(call, "dataset", "own/hidden")["code"] == 0


@pytest.mark.parametrize("what", ["model", "dataset"])
@pytest.mark.parametrize(
    ("name", "token", "says"),
    [
        (
            "own/nothing",
            TOKEN,
            "there is no {what} 'own/nothing' on the Hub that can be seen with this token",
        ),
        (
            "own/hidden2",
            None,
            "there is no {what} 'own/hidden2' on the Hub that can be seen without signing in",
        ),
        ("own/gated", TOKEN, "'own/gated' is gated: accept its licence"),
        ("own/gated", None, "and sign in with: hf auth login"),
        ("own/tiny2", "hf_" + "x" * 34, "does not accept the token (401)"),
    ],
)
def test_by_id_what_the_user_must_mend(call, hub, by_id, what, name, token, says):
    hub.repos["models", "own/hidden2"] = hub.repos["models", "own/hidden"]
    hub.repos["datasets", "own/hidden2"] = hub.repos["datasets", "own/hidden"]
    hub.repos["models", "own/tiny2"] = hub.repos["models", "own/tiny"]
    hub.repos["datasets", "own/tiny2"] = hub.repos["datasets", "own/tiny"]
    answer = load(call, what, name, token)
    assert (answer["code"], says.format(what=what) in answer["message"]) == (2, True), answer
    assert "Traceback" not in answer["message"]
    assert len(answer["message"]) < 400


@pytest.mark.parametrize("what", ["model", "dataset"])
@pytest.mark.parametrize(("how", "says"), [(429, "(429)"), (500, "(500)"), (503, "(503)")])
def test_by_id_what_the_hub_cannot_do_now(call, hub, by_id, what, how, says):
    hub.fail(".*fault0", how, times=10_000)
    answer = load(call, what, "own/fault0")
    assert (answer["code"], says in answer["message"]) == (3, True), answer
    assert sum(answer["slept"]) < 300


@pytest.mark.parametrize("what", ["model", "dataset"])
def test_by_id_over_a_broken_connection(call, hub, by_id, what):
    hub.fail(".*fault1", "break", times=10_000)
    answer = load(call, what, "own/fault1")
    assert (answer["code"], "cannot be reached" in answer["message"]) == (2, True), answer
    assert "own/fault1" in answer["message"]


@pytest.mark.parametrize("what", ["model", "dataset"])
def test_by_id_offline(hub, what, tmp_path):
    code = {
        "model": "from fastft.engines.loading import check_checkpoint; check_checkpoint('own/tiny')",
        "dataset": "from fastft.data.read import open_source; open_source('own/tiny')",
    }[what]
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=surroundings(hub, tmp_path) | {"HF_HUB_OFFLINE": "1"},
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        f"fastft.errors.FastFTError: {what} 'own/tiny' is not in the local cache, and HF_HUB_OFFLINE is set"
    )
    assert hub.requests == []


def test_the_command_line(hub, run, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fastft", "push", str(run), "--repo", "me/r", "--base-id", "own/base", "--private",
         "--include", "gguf", "--json"], capture_output=True, text=True, env=surroundings(hub, tmp_path) | {"HF_TOKEN": TOKEN},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["url"] == f"{hub.endpoint}/me/r"
    assert TOKEN not in done.stdout + done.stderr


def test_a_run_of_a_model_and_a_dataset_by_id_is_pushed_without_a_base_id(hub, by_id, tmp_path):
    """Everything over the wire: the base and the data come from the Hub, the adapter goes there, and names its base."""
    config = {
        "project": "r", "output_dir": str(tmp_path), "data": {"source": "own/tiny"},
        "model": {"name": "own/tiny", "max_seq_length": 64, "engine": "stock", "dtype": "float32"},
        "train": {"max_steps": 2, "effective_batch_size": 4},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    environment = surroundings(hub, tmp_path / "hf") | {"HF_TOKEN": TOKEN}
    for command in (
        ["train", str(tmp_path / "run.yaml")],
        ["push", str(tmp_path / "r"), "--repo", "me/r"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "fastft", *command],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
    files = hub.repos["models", "me/r"].files
    assert (
        files["adapter_model.safetensors"]
        == (tmp_path / "r" / "final" / "adapter_model.safetensors").read_bytes()
    )
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "own/tiny"
    assert not [
        path
        for path, content in files.items()
        if str(tmp_path).encode() in content or TOKEN.encode() in content
    ]
