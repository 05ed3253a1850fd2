"""Both notebooks: as generated, cell by cell, and executed from the first cell to the last on the embedded model."""

import ast
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import make_notebooks as make
import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from fastft.quickstart import base_path, write_task

ROOT = Path(__file__).parents[2]
STAND_IN = ROOT / "tests" / "colab_stand_in"
TOKEN = "hf_" + "S" * 34
LANGUAGES = ("en", "ja")


# The settings that people know, all of which the first cell must offer.
NAMES = """
    PROJECT_NAME BASE_SAVE_DIR BASE_MODEL_ID USE_4BIT DATASET_ID DATASET_SPLIT TEXT_COLUMN MAX_SEQ_LENGTH PACKING LORA_R
    LORA_ALPHA LORA_DROPOUT LORA_TARGET_MODULES BATCH_SIZE GRADIENT_ACCUMULATION_STEPS LEARNING_RATE NUM_TRAIN_EPOCHS
    WARMUP_STEPS LOGGING_STEPS SAVE_STEPS MAX_STEPS FASTFT_SOURCE USE_8BIT TEMPERATURE TOP_P MAX_NEW_TOKENS
"""


def read(language):
    return nbformat.read(ROOT / "notebooks" / make.FILES[language], as_version=4)


def code_of(language):
    return {cell.id: cell.source for cell in read(language).cells if cell.cell_type == "code"}


def with_settings(source, settings):
    """Return the settings cell with values replaced; every other character stays."""
    for name, value in settings.items():
        before, line, after = re.split(rf"^({name} = .*?)(?=  # @param)", source, flags=re.M)
        assert line
        source = f"{before}{name} = {value!r}{after}"
    return source


def colab(tmp_path, **more):
    """Return the environment of a kernel that looks like Colab's."""
    (tmp_path / "cloud").mkdir(exist_ok=True)
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "COLAB_"))
    }
    return {
        **environment,
        "PYTHONPATH": str(STAND_IN),
        "COLAB_DRIVE": str(tmp_path / "cloud"),
        "COLAB_DOWNLOADS": str(tmp_path / "downloads.txt"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        "OMP_WAIT_POLICY": "PASSIVE",
        **more,
    }


# --- as generated


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_committed_notebook_is_what_the_source_makes(language):
    committed = (ROOT / "notebooks" / make.FILES[language]).read_text(encoding="utf-8")
    assert committed == make.notebook(language)


@pytest.mark.parametrize("language", LANGUAGES)
def test_it_is_a_valid_notebook_for_a_colab_gpu_without_outputs(language):
    notebook = read(language)
    nbformat.validate(notebook)
    assert notebook.metadata.colab.gpuType == "T4"
    assert notebook.metadata.accelerator == "GPU"
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)


class NoText(ast.NodeTransformer):
    def visit_Constant(self, node):
        return ast.Constant("") if isinstance(node.value, str) else node


def programs(cells):
    """Return each cell's program without its texts and comments."""
    return {name: ast.dump(NoText().visit(ast.parse(source))) for name, source in cells.items()}


def test_the_two_differ_in_words_only():
    english, japanese = code_of("en"), code_of("ja")
    assert list(english) == list(japanese)
    assert programs(english) == programs(japanese)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_settings_cell_has_a_form_field_for_every_name(language):
    source = code_of(language)["settings"]
    fields = re.findall(r"^([A-Z_0-9]+) = .*?  # @param ", source, flags=re.M)
    assert set(NAMES.split()) <= set(fields)
    assert len(fields) == len(set(fields))
    assigned = [node.targets[0].id for node in ast.parse(source).body]
    assert assigned == fields, "every setting has its form field"
    assert "-bnb-4bit" in source.split("BASE_MODEL_ID = ")[1].splitlines()[0], (
        "pre-quantised by default"
    )


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_setting_is_used(language):
    cells = code_of(language)
    later = "\n".join(source for name, source in cells.items() if name != "settings")
    fields = re.findall(r"^([A-Z_0-9]+) = .*?  # @param ", cells["settings"], flags=re.M)
    assert [name for name in fields if not re.search(rf"\b{name}\b", later)] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_it_uses_only_the_public_names(language):
    import fastft

    used = set(re.findall(r"\bfastft\.([A-Za-z_]+)", "\n".join(code_of(language).values())))
    assert used <= set(fastft.__all__)
    assert not re.search(r"(from|import) fastft\.", "\n".join(code_of(language).values()))


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_cell_says_what_to_do_when_it_fails(language):
    cells = read(language).cells
    says = {"en": "If it fails", "ja": "失敗したら"}[language]
    for before, cell in itertools.pairwise(cells):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown", cell.id
            assert says in before.source.replace("\n", " "), cell.id


# --- cells on their own


def run_cells(
    tmp_path, names, settings, *, before="", after="", env=None, language="en", colab_like=True
):
    """Run some cells in a process of their own; returns (exit code, standard output and error)."""
    cells = code_of(language)
    cells["settings"] = with_settings(cells["settings"], settings)
    program = "\n".join([before, cells["settings"], *(cells[name] for name in names), after])
    environment = colab(tmp_path, **(env or {}))
    if not colab_like:
        environment.pop("PYTHONPATH")
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


SIGN_IN = "IN_COLAB = True"
TELL = "import os, hashlib; print('digest', hashlib.sha256(os.environ.get('HF_TOKEN', '').encode()).hexdigest())"


@pytest.mark.parametrize(
    ("secrets", "asks", "found"),
    [
        ({"HF_TOKEN": {"access": True, "payload": TOKEN}}, False, True),
        ({"HF_TOKEN": {"access": False, "payload": TOKEN}}, False, False),
        ({"HF_TOKEN": {"timeout": True}}, False, False),
        ({}, False, False),
        ({}, True, True),
    ],
)
def test_sign_in_takes_the_secret_or_asks_and_never_shows_it(tmp_path, secrets, asks, found):
    import hashlib

    prompt = (
        f"{SIGN_IN}\nimport getpass\ngetpass.getpass = lambda prompt: {TOKEN!r}"
        if asks
        else SIGN_IN
    )
    code, text = run_cells(
        tmp_path,
        ["signin"],
        {"ASK_FOR_TOKEN": asks},
        before=prompt,
        after=TELL,
        env={"COLAB_SECRETS": json.dumps(secrets)},
    )
    assert code == 0, text
    assert hashlib.sha256(TOKEN.encode() if found else b"").hexdigest() in text
    assert TOKEN not in text


# Where fastft is not installed yet; pip is recorded instead of run.
FRESH = """
import importlib.util, subprocess, sys
_find, _ran = importlib.util.find_spec, []
importlib.util.find_spec = lambda name, *rest: None if name == "fastft" else _find(name, *rest)
def _run(command, **keywords):
    _ran.append(command)
    return subprocess.CompletedProcess(command, FAILS, "", "ERROR: no matching distribution")
subprocess.run = _run
"""
TELL_PIP = "\nimport json; print('RAN ' + json.dumps(_ran))"


def test_the_install_cell_installs_the_pinned_set_and_nothing_else(tmp_path):
    wheel = tmp_path / "drive" / "MyDrive" / "fastft-0.1.0-py3-none-any.whl"
    code, text = run_cells(
        tmp_path,
        ["install"],
        {"FASTFT_SOURCE": str(wheel)},
        before=FRESH.replace("FAILS", "0"),
        after=TELL_PIP,
    )
    assert code == 0, text
    first, second = json.loads(text.split("RAN ")[1])
    assert first[1:5] == ["-m", "pip", "install", "--quiet"]
    assert first[5:] == make.requirements(ROOT / "requirements-colab.txt")
    assert second[5:] == [
        "--no-deps",
        *make.requirements(ROOT / "requirements" / "unsloth.txt"),
        str(wheel),
    ]
    assert "Mounted at" in text, "the wheel lies in Drive, so Drive must be there first"


@pytest.mark.parametrize("where", ["in Drive", "beside", "uploaded", "nowhere"])
def test_without_a_source_a_wheel_is_looked_for_or_asked_for(tmp_path, where):
    name, uploads = "fastft-0.1.0-py3-none-any.whl", {}
    places = {"in Drive": "cloud/fastft", "beside": ".", "uploaded": "computer"}
    if where in places:
        (tmp_path / places[where]).mkdir(parents=True, exist_ok=True)
        (tmp_path / places[where] / name).write_bytes(b"wheel")
    if where == "uploaded":
        uploads = {"COLAB_UPLOAD": str(tmp_path / "computer" / name)}
    settings = {"BASE_SAVE_DIR": str(tmp_path / "drive" / "MyDrive" / "fastft")}
    fresh = FRESH.replace("FAILS", "0")
    code, text = run_cells(
        tmp_path, ["install"], settings, before=fresh, after=TELL_PIP, env=uploads
    )
    if where == "nowhere":
        assert code == 1
        assert (
            "no wheel of it is here. Put fastft-....whl (`make wheel`) into BASE_SAVE_DIR" in text
        )
        return
    assert code == 0, text
    assert json.loads(text.split("RAN ")[1])[1][-1].endswith(name)
    assert ("Upload a wheel of fastft" in text) == (where == "uploaded")


def test_a_failed_install_shows_pips_last_words(tmp_path):
    source = {"FASTFT_SOURCE": "fastft"}
    code, text = run_cells(tmp_path, ["install"], source, before=FRESH.replace("FAILS", "1"))
    assert code == 1
    assert text.strip().endswith("ERROR: no matching distribution")


def test_where_fastft_is_installed_nothing_is_installed(tmp_path):
    code, text = run_cells(
        tmp_path,
        ["install"],
        {},
        before="import subprocess\nsubprocess.run = None",
        colab_like=False,
    )
    assert code == 0, text
    assert text.startswith("fastft ")


def test_llama_cpp_is_built_only_where_gguf_is_asked_for_and_with_a_progress_line(tmp_path):
    source = code_of("en")["save"].split("kinds = ")[0]
    recorded = """
import importlib.util, subprocess, sys, time
importlib.util.find_spec = lambda name: None
time.sleep = lambda seconds: None
class Popen:
    def __init__(self, command):
        self.polls, self.returncode = iter([None, None, 0]), 0
        print("RAN", *command[1:])
    __enter__ = lambda self: self
    __exit__ = lambda self, *error: None
    poll = lambda self: next(self.polls)
subprocess.Popen = Popen
"""
    for types, builds in (("", 0), ("q4_k_m", 1)):
        done = subprocess.run(
            [sys.executable, "-c", f"{recorded}\nGGUF_TYPES = {types!r}\n{source}"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("RAN -m pip install --quiet gguf==") == builds
        assert done.stdout.count("building llama-cpp-python: 0.0 min") == 2 * builds


PLANNED = """
import re, fastft
from pathlib import Path
IN_COLAB = in_drive = False
local = Path("runs")
hardware = None
"""
SEED = {
    "LORA_R": 64, "LORA_ALPHA": 16, "LORA_DROPOUT": 0.05, "LORA_TARGET_MODULES": ["q_proj", "v_proj"],
    "BATCH_SIZE": 1, "GRADIENT_ACCUMULATION_STEPS": 16, "LEARNING_RATE": 2e-4, "WARMUP_STEPS": 100,
    "LOGGING_STEPS": 10, "SAVE_STEPS": 500, "MAX_STEPS": -1, "MAX_SEQ_LENGTH": 1024,
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("all-linear", "all-linear"),
        (["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        ('["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("q_proj", ["q_proj"]),
    ],
)
def test_the_settings_that_people_know_are_taken_as_they_stand(given, taken):
    cells = code_of("en")
    known = SEED | {"LORA_TARGET_MODULES": given, "DATASET_ID": "x"}
    source = with_settings(cells["settings"], known)
    plan = cells["plan"].split("forecast = ")[0]
    names = {}
    exec(PLANNED + source + plan, names)
    config = names["config"]
    assert config.lora.target_modules == taken
    assert (config.train.max_steps, config.train.warmup_steps) == (None, 100)
    assert (config.lora.r, config.lora.alpha, config.train.effective_batch_size) == (64, 16, 16)
    for four, eight, kind in ((True, False, "nf4"), (False, True, "int8"), (False, False, "none")):
        exec(PLANNED + source + f"\nUSE_4BIT, USE_8BIT = {four}, {eight}\n" + plan, names)
        assert names["config"].model.quantization == kind
        assert names["config"].model.name.endswith("-bnb-4bit") == four


def test_with_a_repository_there_is_a_badge_and_a_source():
    plain, published = make.notebook("en"), make.notebook("en", "user/name")
    assert "colab-badge" not in plain
    assert "OWNER" not in plain
    assert "colab.research.google.com/github/user/name/blob/main" in published
    assert 'FASTFT_SOURCE = \\"git+https://github.com/user/name' in published


# --- from the first cell to the last


def execute(language, tmp_path, settings, environment, kernel="python3"):
    notebook = read(language)
    cell = next(cell for cell in notebook.cells if cell.get("id") == "settings")
    cell.source = with_settings(cell.source, settings)
    client = NotebookClient(
        notebook,
        timeout=280,
        kernel_name=kernel,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute(env=environment)
    return notebook


def notebook_cell(notebook, name):
    return next(cell for cell in notebook.cells if cell.get("id") == name)


def text_of(notebook, name):
    cell = notebook_cell(notebook, name)
    parts = [
        out.get("text", "") or out.get("data", {}).get("text/plain", "") for out in cell.outputs
    ]
    return "\n".join(parts)


def tiny(tmp_path, language, **more):
    """Return the settings of a small run on the embedded model, as a user would fill in cell 1."""
    question = {"en": "What is the flag animal of Sedok?", "ja": "セドクの旗の動物は何ですか?"}[
        language
    ]
    return {
        "PROJECT_NAME": "t", "BASE_SAVE_DIR": str(tmp_path / "drive" / "MyDrive" / "fastft"),
        "BASE_MODEL_ID": str(base_path()), "USE_4BIT": False, "MAX_SEQ_LENGTH": 128, "CHAT_TEMPLATE": "chatml",
        "DATASET_ID": str(write_task(tmp_path / "data").train), "BATCH_SIZE": 4, "GRADIENT_ACCUMULATION_STEPS": 4,
        "LEARNING_RATE": 3e-3, "MAX_STEPS": 40, "SAVE_STEPS": 20, "GGUF_TYPES": "q8_0",
        "TEST_PROMPTS": f"{question} | {question}", "TEMPERATURE": 0.0, "MAX_NEW_TOKENS": 16,
    } | more  # fmt: skip


@pytest.mark.parametrize("language", ["en", pytest.param("ja", marks=pytest.mark.long)])
def test_run_all(language, tmp_path):
    settings = tiny(tmp_path, language)
    secret = json.dumps({"HF_TOKEN": {"access": True, "payload": TOKEN}})
    notebook = execute(language, tmp_path, settings, colab(tmp_path, COLAB_SECRETS=secret))
    if keep := os.environ.get("FASTFT_KEEP_NOTEBOOKS"):  # to look at what a reader sees
        nbformat.write(notebook, Path(keep) / f"executed_{language}.ipynb")
    saved = tmp_path / "cloud" / "fastft" / "t"  # what is left when the session is gone

    assert (saved / "final" / "adapter_model.safetensors").is_file()
    certificate = json.loads((saved / "export" / "certificate.json").read_text())
    assert {name: entry["verdict"] for name, entry in certificate["files"].items()} == {
        "t.Q8_0.gguf": "pass"
    }
    assert (saved / "export" / "t.Q8_0.gguf").stat().st_size > 1_000_000

    said = text_of(notebook, "chat").split("? ")[1:]
    question = settings["TEST_PROMPTS"].split(" | ")[0]
    assert len(said) == 2
    assert all(answer.removeprefix(question).strip() for answer in said)
    outputs = notebook_cell(notebook, "train").outputs
    assert [o for o in outputs if "image/png" in o.get("data", {})], "the loss curve"
    assert (tmp_path / "downloads.txt").read_text().splitlines()[0].endswith("t.Q8_0.gguf")

    record = json.loads((tmp_path / "runs" / "t" / "run.json").read_text())
    assert record["choices"]["engine"]["value"] == "unsloth"
    assert "imported_before_unsloth" not in record["patches"]
    assert record["steps"] == 40

    preview = [
        out.data["text/html"]
        for cell in notebook.cells
        for out in cell.get("outputs", [])
        if "text/html" in out.get("data", {})
    ]
    assert any("background-color" in html for html in preview), "the trained tokens are in colour"

    everything = json.dumps(notebook) + "".join(
        file.read_text(encoding="utf-8")
        for file in tmp_path.rglob("*")
        if file.suffix in {".json", ".yaml", ".md", ".jsonl"}
    )
    assert TOKEN not in everything, "the token is neither shown nor saved"


@pytest.mark.long
@pytest.mark.parametrize("language", LANGUAGES)
def test_run_all_with_the_settings_that_people_know(language, tmp_path):
    """Rank 64 on two modules, dropout, one by sixteen, a warm-up of 100 steps on fewer."""
    settings = tiny(tmp_path, language) | SEED | {"MAX_SEQ_LENGTH": 128, "GGUF_TYPES": "q8_0"}
    notebook = execute(language, tmp_path, settings, colab(tmp_path))
    if keep := os.environ.get("FASTFT_KEEP_NOTEBOOKS"):
        nbformat.write(notebook, Path(keep) / f"seed_{language}.ipynb")
    said = " ".join(text_of(notebook, "train").split())
    assert "warm-up of 100 steps is longer than the run" in said
    record = json.loads((tmp_path / "runs" / "t" / "run.json").read_text())
    assert record["steps"] == record["total_steps"] < 100
    assert (tmp_path / "cloud" / "fastft" / "t" / "export" / "t.Q8_0.gguf").is_file()


@pytest.fixture
def fresh_kernel(tmp_path, monkeypatch):
    """A kernel whose Python has every library of this one but fastft; returns its name."""
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for entry in Path(importlib.util.find_spec("torch").origin).parents[1].iterdir():
        if not entry.name.startswith(("fastft", "__editable__")) and entry.suffix != ".pth":
            (libraries / entry.name).symlink_to(entry)
    venv.create(tmp_path / "env", with_pip=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(f"{libraries}\n")
    spec = tmp_path / "jupyter" / "kernels" / "fresh"
    spec.mkdir(parents=True)
    start = [str(tmp_path / "env/bin/python"), "-m", "ipykernel_launcher", "-f"]
    kernel = {"argv": [*start, "{connection_file}"], "display_name": "fresh", "language": "python"}
    (spec / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    return "fresh"


@pytest.mark.long
@pytest.mark.parametrize("place", ["Drive", "upload"])
def test_run_all_from_a_wheel(place, tmp_path, fresh_kernel):
    """The install cell as it stands, in an environment without fastft: a wheel in Drive, or one
    that is uploaded when the cell asks for it.
    """
    settings, environment = tiny(tmp_path, "en"), colab(tmp_path)
    target = tmp_path / ("cloud/fastft" if place == "Drive" else "elsewhere")
    target.mkdir(parents=True)
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", target, ROOT]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    (wheel,) = target.glob("fastft-*.whl")
    if place == "upload":
        environment["COLAB_UPLOAD"] = str(wheel)
    notebook = execute("en", tmp_path, settings, environment, fresh_kernel)
    said = text_of(notebook, "install")
    assert "installing fastft from:" in said
    assert ("Upload a wheel of fastft" in said) == (place == "upload")
    assert list((tmp_path / "env").glob("lib/python*/site-packages/fastft/__init__.py"))
    if keep := os.environ.get("FASTFT_KEEP_NOTEBOOKS"):
        nbformat.write(notebook, Path(keep) / f"wheel_{place}.ipynb")
    certificate = json.loads((tmp_path / "cloud/fastft/t/export/certificate.json").read_text())
    assert certificate["files"]["t.Q8_0.gguf"]["verdict"] == "pass"


@pytest.mark.long
def test_two_cut_sessions(tmp_path):
    """Twice the runtime goes with its disk; the third session finishes from what lies in Drive."""
    for session in range(3):
        settings = tiny(tmp_path, "en", MAX_MINUTES=0 if session == 2 else 0.01)
        if session < 2:
            with pytest.raises(CellExecutionError, match="paused; run all cells again"):
                execute("en", tmp_path, settings, colab(tmp_path))
            steps = [
                json.loads(line)["step"] for line in (tmp_path / "runs" / "t" / "log.jsonl").open()
            ]
            assert max(steps) == session + 1
            shutil.rmtree(tmp_path / "runs")
            (tmp_path / "drive" / "MyDrive").unlink()
            (tmp_path / "drive").rmdir()
        else:
            notebook = execute("en", tmp_path, settings, colab(tmp_path))
    assert "resuming after step 2" in text_of(notebook, "train")
    steps = [json.loads(line) for line in (tmp_path / "runs" / "t" / "log.jsonl").open()]
    assert [line["step"] for line in steps if "loss" in line] == list(range(1, 41))
    assert (tmp_path / "cloud" / "fastft" / "t" / "export" / "t.Q8_0.gguf").is_file()
