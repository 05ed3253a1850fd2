"""Export and generation measured for real, on a model of a few million parameters."""

import json

import pytest

from fastft.bench.case import load_case
from fastft.bench.exporting import ONE_PASS, THREE_STEPS
from fastft.bench.generating import TRANSFORMERS, TYPES
from fastft.bench.side_by_side import read_side_by_side
from tests.e2e.conftest import fastft

pytest.importorskip("llama_cpp")


@pytest.fixture
def small_case(tmp_path):
    """The smoke case with rows that K-quants can take and a vocabulary that holds the tokenizer's 1,920 tokens."""
    values = load_case("smoke").model_dump(mode="json")
    values["model"]["config"] |= {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2432}
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(values))
    return path


def measured(command, case, tmp_path):
    done = fastft(
        "bench",
        command,
        "--case",
        case,
        "--repeats",
        1,
        "--out",
        tmp_path / "out",
        "--json",
        timeout=580,
    )
    assert done.code == 0, done.err
    (path,) = (tmp_path / "out").glob(f"{command}--*.json")
    result = read_side_by_side(path)
    assert done.json["kind"] == result.kind == command
    return result


@pytest.mark.long
def test_export_measures_both_ways_and_they_write_files_of_one_size(small_case, tmp_path):
    result = measured("export", small_case, tmp_path)
    figures = {run.way: run.figures for run in result.runs}
    assert set(figures) == {ONE_PASS, THREE_STEPS}
    assert figures[ONE_PASS]["intermediate_bytes"] == 0
    assert (
        figures[THREE_STEPS]["intermediate_bytes"] > 2 * 2 * result.parameters
    )  # merged and 16-bit, 2 bytes each
    sizes = [found["file_bytes"] for found in figures.values()]
    assert max(sizes) - min(sizes) < 0.02 * max(sizes)  # metadata may differ, tensors may not


@pytest.mark.long
def test_generation_times_the_same_count_of_tokens_everywhere(small_case, tmp_path):
    result = measured("generate", small_case, tmp_path)
    assert set(result.summary) == {TRANSFORMERS, *(f"llama.cpp, {kind}" for kind in TYPES)}
    for run in result.runs:  # that the counts are equal is asserted where they are measured
        assert run.figures["decode_tokens_per_sec"] > 0
        assert run.figures["prompt_tokens_per_sec"] > run.figures["decode_tokens_per_sec"]


@pytest.mark.long
def test_scaling_measures_its_smallest_points(tmp_path):
    for axis, most, way in (("size", 25_000_000, "20M"), ("rows", 1000, "1,000 rows")):
        options = ("--axes", axis, "--most", most, "--repeats", 1, "--out", tmp_path, "--json")
        done = fastft("bench", "scaling", *options, timeout=580)
        assert done.code == 0, done.err
        assert list(done.json[axis]["summary"]) == [way]
    figures = done.json["rows"]["runs"][0]["figures"]
    assert figures["rows_per_sec"] > 0
    assert figures["peak_rss_bytes"] > 1e8


def test_most_is_of_one_axis_and_axes_have_names(tmp_path):
    for options, said in (
        (("--axes", "size,rows", "--most", 5), "in the unit of one axis"),
        (("--axes", "speed"), "unknown axis 'speed'"),
        (("--axes", "size", "--most", 5), "no point of axis size is at most 5"),
    ):
        done = fastft("bench", "scaling", *options, "--out", tmp_path)
        assert done.code == 2
        assert said in done.err
