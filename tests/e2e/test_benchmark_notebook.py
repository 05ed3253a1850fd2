"""benchmark.ipynb: as generated, and executed from the first cell to the last on the smoke case."""

import ast
import json
import os
import re
import zipfile
from pathlib import Path

import jsonschema
import make_notebooks
import nbformat
from nbclient import NotebookClient

from tests.e2e.test_notebooks import ROOT, colab, text_of, with_settings

PATH = ROOT / "notebooks" / make_notebooks.BENCHMARK


def code():
    return {
        cell.id: cell.source
        for cell in nbformat.read(PATH, as_version=4).cells
        if cell.cell_type == "code"
    }


def test_the_committed_notebook_is_what_the_source_makes():
    assert PATH.read_text(encoding="utf-8") == make_notebooks.benchmark_notebook()
    assert "{{" not in PATH.read_text(encoding="utf-8")
    nbformat.validate(nbformat.read(PATH, as_version=4))


def test_every_setting_has_a_form_field_and_is_used():
    cells = code()
    fields = re.findall(r"^([A-Z_0-9]+) = .*?  # @param ", cells["settings"], flags=re.M)
    assert [node.targets[0].id for node in ast.parse(cells["settings"]).body] == fields
    later = "\n".join(source for name, source in cells.items() if name != "settings")
    assert [name for name in fields if not re.search(rf"\b{name}\b", later)] == []


def test_run_all_on_the_smoke_case(tmp_path):
    notebook = nbformat.read(PATH, as_version=4)
    cell = next(cell for cell in notebook.cells if cell.get("id") == "settings")
    place = tmp_path / "drive" / "MyDrive" / "bench"
    settings = {
        "CASES": "smoke",
        "ARMS": "peft,fastft",
        "TABLES": "defaults",
        "REPEATS": 1,
        "BASE_SAVE_DIR": str(place),
    }
    cell.source = with_settings(cell.source, settings)
    client = NotebookClient(
        notebook,
        timeout=560,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute(env=colab(tmp_path))
    if keep := os.environ.get("FASTFT_KEEP_NOTEBOOKS"):  # to look at what a reader sees
        nbformat.write(notebook, Path(keep) / "executed_benchmark.ipynb")

    saved = tmp_path / "cloud" / "bench"  # what is left when the session is gone
    (result,) = saved.glob("smoke--*.json")
    schema = json.loads((ROOT / "benchmarks" / "result.schema.json").read_text())
    values = json.loads(result.read_text())
    jsonschema.validate(values, schema)
    assert {record["arm"]: record["status"] for record in values["records"]} == {
        "peft": "ok",
        "fastft": "ok",
    }
    assert "fastft over peft: " in text_of(notebook, "results")
    shown = [
        out
        for cell in notebook.cells
        for out in cell.get("outputs", [])
        if "image/png" in out.get("data", {})
    ]
    assert len(shown) >= 2  # step time and memory; speed-up where parity holds

    downloads = [Path(line) for line in (tmp_path / "downloads.txt").read_text().splitlines()]
    assert [path.name for path in downloads] == ["benchmark.html", "benchmark-results.zip"]
    assert zipfile.ZipFile(downloads[1]).namelist() == [result.name]
