"""The recipes of CONTRIBUTING.md, followed: each adds something of its own, and the package takes it from there."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fastft import config, exporting, families
from fastft.bench.case import known_cases, load_case
from fastft.data import formats
from fastft.files import written_aside
from fastft.planning.shape import shape_from_config

ROOT = Path(__file__).parents[2]


def test_a_family_is_one_row(monkeypatch):
    row = replace(families.FAMILIES["qwen3"], model_type="newcomer", norms="plus_one")
    monkeypatch.setitem(families.FAMILIES, "newcomer", row)
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 320,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    known = shape_from_config({"model_type": "qwen3", **sizes}, "known")
    new = shape_from_config({"model_type": "newcomer", **sizes}, "new")
    assert new.parameters == known.parameters  # with the norms of queries and keys
    assert families.family_of("newcomer").rows == "exact"
    assert families.gguf_arch("newcomer") == "qwen3"
    assert families.family_of("a stranger").rows == "check"


def test_a_format_is_its_columns_and_a_converter(monkeypatch):
    def convert(value, format, heading):
        return formats._pair(f"Translate: {value['source']}", value["target"], value, "target")

    shape = formats.Shape(
        ("source", "target"), ("system", "history"), {"target": ("reference",)}, convert
    )
    monkeypatch.setitem(formats.FORMATS, "translation", shape)
    rows = [{"source": "dog", "reference": "犬"}, {"source": "cat", "reference": "猫"}]
    found = formats.detect(rows)
    assert (found.name, found.columns["target"]) == ("translation", "reference")
    example = formats.convert(rows[0], found)
    assert [m["content"] for m in example.messages] == ["Translate: dog", "犬"]


def test_an_export_target_is_a_name_and_a_writer(monkeypatch, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    empty = b"{}      "
    (adapter / "adapter_model.safetensors").write_bytes(len(empty).to_bytes(8, "little") + empty)

    def write(request):
        path = request.folder / "names.txt"
        with written_aside(path) as aside:
            aside.write_text(request.target.base, encoding="utf-8")
        return [exporting.describe(path, "names")]

    monkeypatch.setattr(config, "EXPORT_KINDS", (*config.EXPORT_KINDS, "names"))
    monkeypatch.setitem(exporting.WRITERS, "names", write)
    assert config.ExportConfig(to=["names"]).to == ["names"]
    found = exporting.export(adapter, ["names"], out=tmp_path / "out")
    assert found["files"] == [
        {"path": str(tmp_path / "out" / "names.txt"), "kind": "names", "bytes": len("owner/base")}
    ]
    assert (tmp_path / "out" / "names.txt").read_text(encoding="utf-8") == "owner/base"


def test_a_benchmark_case_is_a_file(tmp_path):
    shutil.copy(known_cases()["smoke"], tmp_path / "mine.yaml")
    path = tmp_path / "mine.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("name: smoke", "name: mine"))
    assert known_cases(tmp_path) == {"mine": path}
    case = load_case("mine", tmp_path)
    assert case.name == "mine"
    sources = [arm.source for table in case.tables.values() for arm in table.arms.values()]
    assert all(sources)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md", "docs/kernels.md"])
def test_the_files_that_the_pages_name_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:fastft|tests|docs|benchmarks)/[\w/.]+)", text))
    assert len(named) >= 2
    assert [
        n for n in sorted(named) if "NAME" not in n and not (ROOT / n.rstrip("/.")).exists()
    ] == []


def test_the_functions_that_the_walk_names_are_where_it_says():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:fastft/)?[\w/]+\.py): ([\w.]+)`", text)
    assert len(named) >= 10
    for file, name in named:
        source = (ROOT / "fastft" / file.removeprefix("fastft/")).read_text(encoding="utf-8")
        for part in name.split("."):
            assert re.search(rf"^\s*(def|class) {part}\b", source, re.M), f"{file}: {name}"
