"""What the benchmark prints and writes from a result. The results here are made up; none of them is a measurement."""

import base64
import io
import json
import random
import re
from pathlib import Path

import jsonschema
import pytest
from rich.console import Console

from fastft.bench.case import Case, load_case
from fastft.bench.compare import compare
from fastft.bench.record import (
    ArmSummary,
    Check,
    Machine,
    Noise,
    Parity,
    Peak,
    Ratio,
    Record,
    Result,
    Step,
    TableResult,
)
from fastft.bench.scaling import growth_text
from fastft.bench.side_by_side import Run, SideBySide, measure_ways, paired, summarised
from fastft.bench.statistics import spread
from fastft.bench.views import plots, tables
from fastft.bench.views.html import write_html
from fastft.bench.views.report import markdown_cell, read_results, schema_text, write_report
from fastft.bench.views.tables import show
from fastft.errors import FastFTError

ROOT = Path(__file__).parents[2]
GB = 10**9

# arm: (seconds a step, GB), or the status of an arm that died
CPU_ARMS = {"peft": (8.1, 13.7), "trl": "unsupported", "unsloth": (4.9, 10.4), "fastft": (2.3, 5.9)}
GPU_ARMS = {"peft": (3.1, 11.2), "unsloth": (1.6, 9.8), "liger": "oom", "fastft": (1.1, 8.1)}


def made_up_case(name="cpu-135m", *, card=None, longest=1024, arms=CPU_ARMS, **changes):
    settings = {
        arm: {"source": f"{arm}'s | documentation", "environment": {"OMP_NUM_THREADS": "2"}}
        for arm in arms
    }
    values = {
        "name": name,
        "title": "made up",
        "device": "cuda" if card else "cpu",
        "card": card,
        "model": {"family": "llama", "config": {"hidden_size": 576}},
        "lengths": {"median": 120, "longest": longest},
        "tables": {table: {"arms": settings} for table in ("defaults", "matched")},
    }
    return Case.model_validate(values | changes)


def made_up_machine(*, card=None, cap_gb=None, label=None):
    if card is None and cap_gb is None:
        return Machine(
            device="cpu",
            label=label or "EPYC, 2 threads",
            card=None,
            cpu="EPYC",
            threads=2,
            memory_bytes=24 * GB,
            matmul_flops=8.3e11,
        )
    return Machine(
        device="cuda",
        label=label or (f"H200, capped at {cap_gb} GB" if cap_gb else card.upper()),
        card=None if cap_gb else card,
        cpu="Xeon",
        threads=16,
        memory_bytes=128 * GB,
        gpu="NVIDIA H200",
        vram_bytes=141 * GB,
        driver="580.1",
        cap_bytes=cap_gb * GB if cap_gb else None,
        matmul_flops=7e14,
    )


def made_up_record(table, arm, repeat, seconds, size, device, rng, noise):
    steps = [
        Step(
            seconds=seconds * rng.uniform(1 - noise, 1 + noise),
            loss=3.0 - 0.01 * i,
            grad_norm=1.0,
            tokens=1200,
            padded_tokens=1200 if arm == "fastft" else 2600,
        )
        for i in range(5)
    ]
    bytes_ = int(size * GB * rng.uniform(0.99, 1.01))
    vram = (
        {f"vram_{name}_bytes": bytes_ for name in ("allocated", "reserved", "device")}
        if device == "cuda"
        else {}
    )
    return Record(
        table=table,
        arm=arm,
        repeat=repeat,
        order=repeat,
        status="ok",
        import_seconds=4.0,
        load_seconds=3.0,
        first_step_seconds=9.0,
        warmup_steps=1,
        steps=steps,
        trainable_parameters=4884480,
        peak=Peak(rss_bytes=bytes_ if device == "cpu" else 3 * GB, **vram),
        noise=Noise(load_average_before=0.1, load_average_after=2.0),
    )


def summed_up(records, ceiling):
    good = [record for record in records if record.status == "ok"]
    if not good:
        return ArmSummary(status=records[0].status, reason=records[0].reason, repeats=0)
    speed = spread([record.non_padding_tokens_per_sec for record in good])
    flops = speed.median * 0.63e9
    return ArmSummary(
        status="ok",
        repeats=len(good),
        non_padding_tokens_per_sec=speed,
        seconds_per_step=spread([record.seconds / len(record.measured) for record in good]),
        first_step_seconds=9.0,
        load_seconds=3.0,
        padding_share=1 - good[0].steps[0].tokens / good[0].steps[0].padded_tokens,
        peak=good[0].peak,
        flops=flops,
        ceiling_share=flops / ceiling,
        noisy=speed.relative > 0.1,
    )


def made_up_gate(arm, passed=True):
    text = f"step-1 loss 3.00000, the reference has {3 if passed else 4}.00000"
    return Parity(
        passed=passed, checks=[Check(name="step-1 loss", passed=passed, value=3.0, text=text)]
    )


def made_up_result(
    case=None, machine=None, *, arms=CPU_ARMS, repeats=5, seed=0, noise=0.02, failing=(), **changes
):
    """Return a Result with consistent records, summaries, ratios and gates; `failing` arms fail the gate."""
    machine = machine or made_up_machine()
    case = case or made_up_case(arms=arms)
    rng = random.Random(seed)
    found, records = {}, []
    for table in ("defaults", "matched"):
        runs = {}
        for arm, figures in arms.items():
            if isinstance(figures, str):
                runs[arm] = [
                    Record(
                        table=table,
                        arm=arm,
                        repeat=0,
                        order=0,
                        status=figures,
                        reason="why",
                        log_tail=["the end"],
                    )
                ]
            else:
                runs[arm] = [
                    made_up_record(table, arm, i, *figures, machine.device, rng, noise)
                    for i in range(repeats)
                ]
            records += runs[arm]
        summaries = {arm: summed_up(runs[arm], machine.matmul_flops) for arm in arms}
        gates = {
            arm: made_up_gate(arm, arm not in failing)
            for arm, s in summaries.items()
            if s.status == "ok"
        }
        ours = summaries["fastft"]
        ratios = {
            arm: Ratio(
                speed=(middle := s.seconds_per_step.median / ours.seconds_per_step.median),
                speed_low=0.95 * middle,
                speed_high=1.06 * middle,
                memory=0.43,
            )
            for arm, s in summaries.items()
            if arm != "fastft"
            and s.status == "ok"
            and arm not in failing
            and "fastft" not in failing
        }
        found[table] = TableResult(arms=summaries, ratios=ratios, parity=gates)
    values = {
        "case": case,
        "case_hash": case.hash,
        "date": "2026-11-20T10:00:00+00:00",
        "commit": "0123456789abcdef",
        "dirty": False,
        "machine": machine,
        "versions": {"torch": "2.13.0", "peft": "0.21.2"},
        "repeats": repeats,
        "tables": found,
        "records": records,
        "notes": ["load was <high> | in round 2"],
    }
    return Result.model_validate(values | changes)


def printed(result, width=200):
    stream = io.StringIO()
    show(result, Console(file=stream, width=width, force_terminal=False))
    return stream.getvalue()


# --- the terminal


def test_the_terminal_shows_both_tables_and_the_ratios():
    result = made_up_result()
    text = printed(result)
    ratio = result.tables["matched"].ratios["peft"]
    assert "cpu-135m on EPYC, 2 threads" in text
    assert "Everyone's defaults" in text
    assert "Matched settings" in text
    assert (
        f"fastft over peft: {ratio.speed:.2f}x ({ratio.speed_low:.2f} to {ratio.speed_high:.2f}), memory 0.43x"
        in text
    )
    assert "fastft over trl: no ratio\n    trl: unsupported (why)" in text
    assert "54 %" in text  # padding of 1200 in 2600
    assert "note: load was <high>" in text
    assert "!" not in text


def test_a_wide_spread_is_flagged_beside_the_figure():
    result = made_up_result(noise=0.0)
    summary = result.tables["matched"].arms["peft"]
    assert "!" not in tables.cells("peft", summary)[2]
    assert tables.cells("peft", summary.model_copy(update={"noisy": True}))[2].endswith(" !")


def test_no_ratio_where_the_gate_fails():
    text = printed(made_up_result(failing={"peft"}))
    assert (
        "fastft over peft: parity failed: no ratio\n    peft: step-1 loss 3.00000, the reference has 4.00000"
        in text
    )
    assert "fastft over unsloth: 2." in text
    ours = printed(made_up_result(failing={"fastft"}))
    assert "x (" not in ours.partition("fastft over")[2]
    assert ours.count("fastft: step-1 loss") == 6


def test_vram_is_shown_as_allocated_reserved_and_device():
    peak = Peak(
        rss_bytes=GB,
        vram_allocated_bytes=5 * GB,
        vram_reserved_bytes=6 * GB,
        vram_device_bytes=None,
    )
    assert tables.peak_text(peak) == "5.00 / 6.00 / - GB"
    assert tables.peak_text(Peak(rss_bytes=2 * GB)) == "2.00 GB"
    assert tables.peak_text(Peak(rss_bytes=2 * GB, anonymous_bytes=GB)) == "1.00 GB"


# --- benchmarks/README.md


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "cases").mkdir()
    return tmp_path


def write_case(folder, case):
    text = json.dumps(case.model_dump(mode="json"))  # JSON is YAML
    (folder / "cases" / f"{case.name}.yaml").write_text(text)


def report(folder, **keywords):
    readme = folder / "README.md"
    changed = write_report(
        folder / "results", readme, folder / "images", cases=folder / "cases", **keywords
    )
    return [path.name for path in changed], readme.read_text() if readme.exists() else ""


def test_the_readme_is_written_once_and_then_up_to_date(folder):
    write_case(folder, made_up_case())
    made_up_result().write(folder / "results" / "a.json")
    (folder / "results" / "plan_error.json").write_text('{"llama": {"case": {}}}')
    changed, text = report(folder)
    assert "README.md" in changed
    assert len([name for name in changed if name.endswith(".png")]) == 3
    for link in re.findall(r"\]\(((?:images|results)/[^)]*)\)", text):
        assert (folder / link).exists(), link
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    assert report(folder)[0] == []
    assert before == {path: path.read_bytes() for path in folder.rglob("*.*")}
    assert report(folder, check=True)[0] == []


def test_check_finds_what_is_stale_and_writes_nothing(folder):
    write_case(folder, made_up_case())
    made_up_result().write(folder / "results" / "a.json")
    assert report(folder, check=True)[0]
    assert not (folder / "README.md").exists()
    report(folder)
    made_up_result(seed=1, date="2026-11-21T10:00:00").write(folder / "results" / "a.json")
    before = (folder / "README.md").read_bytes()
    stale = report(folder, check=True)[0]
    assert "README.md" in stale
    assert "cpu-135m-on-epyc-2-threads-step-time.png" in stale
    assert (folder / "README.md").read_bytes() == before


def test_plots_of_a_result_that_is_gone_are_removed_but_no_other_picture(folder):
    write_case(folder, made_up_case())
    made_up_result().write(folder / "results" / "a.json")
    report(folder)
    (folder / "images" / "photo.png").write_bytes(b"not ours")
    (folder / "results" / "a.json").unlink()
    report(folder)
    assert [path.name for path in (folder / "images").iterdir()] == ["photo.png"]


def test_a_case_that_nobody_measured_says_so(folder):
    write_case(folder, made_up_case())
    write_case(folder, made_up_case("t4-8b", card="t4", arms=GPU_ARMS))
    made_up_result().write(folder / "results" / "a.json")
    text = report(folder)[1]
    assert "| t4-8b | t4 | not measured | - | - | - | - |" in text
    assert "| cpu-135m | CPU | not measured" not in text


def test_a_capped_result_never_fills_the_cards_row(folder):
    case = made_up_case("t4-8b", card="t4", arms=GPU_ARMS)
    write_case(folder, case)
    made_up_result(case, made_up_machine(cap_gb=15), arms=GPU_ARMS).write(
        folder / "results" / "capped.json"
    )
    text = report(folder)[1]
    assert "| t4-8b | t4 | not measured |" in text
    own, _, elsewhere = text.partition("On another machine")
    assert "H200" not in own
    assert "H200, capped at 15 GB" in elsewhere
    assert "## t4-8b on H200, capped at 15 GB" in text
    made_up_result(case, made_up_machine(card="t4"), arms=GPU_ARMS).write(
        folder / "results" / "own.json"
    )
    text = report(folder)[1]
    assert "| t4 | T4, 2026-11-20, 5 repeats |" in text
    assert "## t4-8b on T4" in text
    assert "## t4-8b on H200, capped at 15 GB" in text


def test_a_cap_on_a_cpu_belongs_to_the_case():
    machine = made_up_machine().model_copy(update={"cap_bytes": 8 * GB})
    assert tables.own_card(made_up_result(machine=machine))


def test_the_newest_result_wins_and_older_ones_are_linked(folder):
    write_case(folder, made_up_case())
    made_up_result(date="2026-11-20T10:00:00", commit="a" * 40).write(folder / "results" / "z.json")
    made_up_result(date="2026-11-22T10:00:00", commit="b" * 40).write(folder / "results" / "a.json")
    other = made_up_case(steps=9)
    made_up_result(other, date="2026-11-19T10:00:00", commit="c" * 40).write(
        folder / "results" / "m.json"
    )
    text = report(folder)[1]
    assert text.count("## cpu-135m on") == 1
    assert "Measured 2026-11-22, commit bbbbbbbbbb" in text
    assert "[2026-11-20, commit aaaaaaaaaa](results/z.json)" in text
    assert "[2026-11-19, commit cccccccccc, another version of the case](results/m.json)" in text


def test_a_result_of_an_earlier_version_of_the_case_says_so(folder):
    write_case(folder, made_up_case(steps=9))
    made_up_result().write(folder / "results" / "a.json")
    assert "(the case has changed since)" in report(folder)[1]


def test_a_result_whose_arms_inherited_a_setting_says_so(folder):
    write_case(folder, made_up_case())
    result = made_up_result()
    result.write(folder / "results" / "a.json")
    assert "every arm of this measurement had OMP" in report(folder)[1]
    result.records[0].environment = {"OMP_NUM_THREADS": "2"}
    result.write(folder / "results" / "a.json")
    assert "every arm of this measurement had" not in report(folder)[1]


def test_a_part_of_the_case_is_not_called_an_earlier_version(folder):
    case = made_up_case()
    write_case(folder, case)
    defaults = case.model_copy(update={"tables": {"defaults": case.tables["defaults"]}})
    part = made_up_result(defaults, repeats=1)
    del part.tables["matched"]
    part.write(folder / "results" / "a.json")
    text = report(folder)[1]
    assert "(some of its arms or tables only), 1 repeat:" in text
    assert "has changed" not in text
    assert "not measured | not measured |" in text  # the matched table's columns
    assert " to " not in text.split("| peft | ok |")[1].splitlines()[0]  # one run has no range


def made_up_export(**changes):
    seconds = {"fastft, one pass": 20, "merge, convert, quantise": 50}
    runs = [
        Run(way=way, repeat=i, figures={"seconds": s + i, "peak_rss_bytes": s * 3e7})
        for i in range(3)
        for way, s in seconds.items()
    ]
    values = {
        "kind": "export", "title": "Export", "case": "cpu-0.5b", "parameters": 5, "machine": "EPYC, 2 threads",
        "date": "2026-11-20T10:00:00", "commit": None, "versions": {}, "repeats": 3,
        "summary": summarised(runs, list(seconds)), "runs": runs, "notes": ["less | is better"],
    }  # fmt: skip
    return SideBySide.model_validate(values | changes)


def test_export_and_generation_have_their_section_and_the_newest_wins(folder):
    made_up_export(title="An old export").write(folder / "results" / "export--a.json")
    made_up_export(date="2026-11-21T10:00:00").write(folder / "results" / "export--b.json")
    text = report(folder)[1]
    assert "### Export\n" in text
    assert "An old export" not in text
    assert "| fastft, one pass | 21.0 (20.4 to 21.6) s | 0.6 GB |" in text
    assert "less \\| is better" in text
    assert (
        paired(made_up_export(), "fastft, one pass", "merge, convert, quantise", "seconds")
        == 21 / 51
    )


def test_ways_are_interleaved():
    seen = []
    ways = {name: (lambda name=name: seen.append(name) or {"seconds": 1.0}) for name in "abc"}
    runs = measure_ways(ways, 20, seed=1, say=lambda text: None)
    rounds = ["".join(seen[i : i + 3]) for i in range(0, 60, 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"abc"}
    assert len(set(rounds)) > 2
    assert [run.repeat for run in runs[:6]] == [0, 0, 0, 1, 1, 1]
    with pytest.raises(FastFTError, match="at least 1"):
        measure_ways(ways, 0, seed=1, say=lambda text: None)


def test_damaged_results_are_refused_with_their_name(folder):
    (folder / "results" / "bad.json").write_text(
        '{"schema_version": 1, "case": {"name": 3}, "tables": {}}'
    )
    with pytest.raises(FastFTError, match=r"bad\.json"):
        report(folder)
    (folder / "results" / "bad.json").write_text("{")
    with pytest.raises(FastFTError, match=r"bad\.json is not JSON"):
        report(folder)
    with pytest.raises(FastFTError, match="is not a folder"):
        write_report(folder / "nowhere", folder / "README.md", folder / "images")


def test_markdown_cannot_be_broken_by_a_machines_name():
    assert markdown_cell("a|b\nc <i> *x* [y]") == r"a\|b c &lt;i> \*x\* \[y\]"


# --- the plots


def other_length(case):
    return case.tables["matched"].model_copy(
        update={"lengths": case.lengths.model_copy(update={"longest": 64})}
    )


def test_memory_over_length_needs_cases_that_differ_only_in_length():
    short = made_up_result(made_up_case("len-512", longest=512))
    long = made_up_result(made_up_case("len-2048", longest=2048, title="other words"))
    other = made_up_result(made_up_case("len-4096", longest=4096, lora={"r": 64}))
    assert plots.groups_by_length([short]) == []
    both = short.case.model_copy(
        update={"tables": {**short.case.tables, "matched": other_length(short.case)}}
    )
    assert plots.groups_by_length([made_up_result(both)]) == []  # two tables of one result
    assert plots.groups_by_length([short, other]) == []
    groups = plots.groups_by_length([long, short, other])
    assert [[result.case.name for result in group] for group in groups] == [["len-512", "len-2048"]]
    elsewhere = made_up_result(
        made_up_case("len-2048", longest=2048), made_up_machine(label="another CPU")
    )
    assert plots.groups_by_length([short, elsewhere]) == []


def test_every_announced_plot_is_drawn_with_its_digest(tmp_path):
    result = made_up_result()
    paths = plots.plot_result(result, tmp_path)
    assert [path.name for path in paths] == [plot.name for plot in plots.plots_of(result)]
    assert {plots.digest_of(path) for path in paths} == {plots.digest(result)}
    again = plots.plot_result(result, tmp_path / "again")
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]


def test_no_speed_up_plot_without_a_ratio(tmp_path):
    result = made_up_result(failing={"fastft"})
    assert [path.stem.rpartition("-")[2] for path in plots.plot_result(result, tmp_path)] == [
        "time",
        "memory",
    ]
    dead = dict.fromkeys(CPU_ARMS, "oom")
    gone = made_up_result(arms=CPU_ARMS)
    for table in gone.tables.values():
        table.arms = {arm: ArmSummary(status=status, repeats=0) for arm, status in dead.items()}
        table.ratios = {}
    assert plots.plot_result(gone, tmp_path) == []


# --- the page


def test_the_page_needs_no_other_file_and_shows_everything(tmp_path):
    result = made_up_result(failing={"unsloth"}, notes=["<script>alert(1)</script>"])
    page = write_html([result, made_up_result(seed=2)], tmp_path / "page.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert "<script>" not in page
    images = re.findall(r"base64,([A-Za-z0-9+/=]+)", page)
    assert len(images) == 6
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    assert "parity failed: no ratio" in page
    assert "the reference has 4.00000" in page
    assert "peft&#39;s | documentation" in page
    assert page.count("<td>matched</td><td>fastft</td><td>") >= 5
    assert "the end" in page  # the log of the arm that died
    assert '"schema_version"'.replace('"', "&#34;") in page
    with pytest.raises(FastFTError, match="at least one"):
        write_html([], tmp_path / "none.html")


# --- what changed


def test_two_measurements_of_the_same_thing_are_no_regression():
    found = compare(made_up_result(seed=0), made_up_result(seed=1))
    assert found.regressions == []
    assert found.exit_code == 0
    assert len(found.changes) == 12  # 3 arms that ran, 2 tables, speed and memory
    assert "nothing got worse" in found.text()


def test_slower_and_outside_the_noise_is_a_regression():
    slow = CPU_ARMS | {"fastft": (2.3 * 1.12, 5.9)}
    found = compare(made_up_result(), made_up_result(arms=slow, seed=1))
    worse = [change for change in found.changes if change.regression]
    assert {(change.arm, change.quantity) for change in worse} == {
        ("fastft", "non_padding_tokens_per_sec")
    }
    assert len(worse) == 2
    assert found.exit_code == 1
    assert worse[0].relative == pytest.approx(1 / 1.12 - 1, abs=0.02)
    assert (
        compare(made_up_result(), made_up_result(arms=slow, seed=1), threshold=0.2).exit_code == 0
    )
    assert (
        compare(made_up_result(arms=slow, seed=1), made_up_result()).exit_code == 0
    )  # faster is no regression


def test_slower_within_the_noise_is_none():
    slow = CPU_ARMS | {"fastft": (2.3 * 1.1, 5.9)}
    found = compare(
        made_up_result(noise=0.9), made_up_result(arms=slow, noise=0.9, seed=1), threshold=0.0
    )
    speed = [
        c for c in found.changes if c.arm == "fastft" and c.quantity == "non_padding_tokens_per_sec"
    ]
    assert all(change.overlap and not change.regression for change in speed)


def test_more_memory_is_a_regression():
    more = CPU_ARMS | {"fastft": (2.3, 6.6)}
    found = compare(made_up_result(), made_up_result(arms=more, seed=1))
    assert {(c.arm, c.quantity) for c in found.changes if c.regression} == {
        ("fastft", "peak_memory_bytes")
    }
    assert "GB" in found.regressions[0]


def test_an_arm_that_died_or_fails_the_gate_now_is_a_regression():
    died = compare(
        made_up_result(), made_up_result(arms=CPU_ARMS | {"fastft": (2.3, 5.9), "unsloth": "oom"})
    )
    assert died.exit_code == 1
    assert any("unsloth: was ok, now oom" in line for line in died.regressions)
    failed = compare(made_up_result(), made_up_result(failing={"unsloth"}))
    assert any("unsloth: passed the gate, now fails it" in line for line in failed.regressions)


def test_different_cases_are_refused_unless_forced():
    other = made_up_result(made_up_case(learning_rate=1e-3))
    with pytest.raises(FastFTError, match="different cases"):
        compare(made_up_result(), other)
    found = compare(made_up_result(), other, force=True)
    assert ("case learning_rate", "0.0002", "0.001") in [
        (d.what, d.before, d.after) for d in found.differences
    ]
    with pytest.raises(FastFTError, match="threshold"):
        compare(made_up_result(), made_up_result(), threshold=5)


def test_conditions_that_changed_are_named():
    after = made_up_result(
        versions={"torch": "2.14.0", "trl": "1.15.0"}, commit="f" * 40, dirty=True
    )
    after.machine.matmul_flops = 2e11
    found = {d.what: (d.before, d.after) for d in compare(made_up_result(), after).differences}
    assert found["version torch"] == ("2.13.0", "2.14.0")
    assert found["version peft"] == ("0.21.2", "none")
    assert found["uncommitted changes"] == ("False", "True")
    assert "0.24x" in found["matmul ceiling"][1]
    assert "commit" in found
    json.dumps(compare(made_up_result(), after).model_dump(mode="json"))


# --- the schema


def test_the_committed_schema_is_the_models_and_accepts_a_result():
    committed = (ROOT / "benchmarks" / "result.schema.json").read_text()
    assert committed == schema_text(), (
        "python -m fastft.bench schema > benchmarks/result.schema.json"
    )
    values = json.loads(made_up_result().model_dump_json())
    jsonschema.validate(values, json.loads(committed))
    del values["records"][0]["status"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, json.loads(committed))


def test_the_committed_readme_is_up_to_date():
    home = ROOT / "benchmarks"
    stale = write_report(home / "results", home / "README.md", home / "images", check=True)
    assert stale == [], "python -m fastft.bench report"


def test_the_committed_results_validate():
    schema = json.loads(schema_text())
    for path, result in read_results(ROOT / "benchmarks" / "results"):
        jsonschema.validate(json.loads(path.read_text()), schema)
        load_case(result.case.name)


# --- scaling


def scaled(axis, speeds, quantity="flops_per_sec"):
    runs = [
        Run(
            way=f"{at}",
            repeat=0,
            figures={quantity: speed, "tokens_per_sec": 10.0, "peak_rss_bytes": 1e9, "at": at},
        )
        for at, speed in speeds.items()
    ]
    return SideBySide(
        kind="scaling",
        title=f"Scaling over {axis}",
        case=axis,
        parameters=0,
        machine="EPYC, 2 threads",
        date="2026-11-28T00:00:00",
        commit=None,
        versions={},
        repeats=1,
        summary=summarised(runs, [run.way for run in runs]),
        runs=runs,
    )


def test_what_grows_faster_than_its_arithmetic_is_named():
    even = scaled("length", {256: 100.0, 512: 120.0, 1024: 109.0})
    assert growth_text(even) == (
        "the arithmetic a second nowhere falls by more than 10% against a smaller point"
    )
    uneven = scaled("length", {256: 100.0, 512: 120.0, 1024: 107.0, 2048: 60.0})
    assert growth_text(uneven).endswith("smaller point: 1024 11%, 2048 50%")
    rows = scaled("rows", {1000: 900.0, 10_000: 300.0}, "rows_per_sec")
    assert growth_text(rows).startswith("rows a second falls")
    assert "1 1.00x, 2 1.90x" in growth_text(scaled("threads", {1: 100.0, 2: 190.0}))


def test_a_scaling_result_has_its_table_and_its_plot_in_the_readme(tmp_path):
    scaled("length", {256: 100.0, 512: 120.0}).write(tmp_path / "results" / "s.json")
    readme = tmp_path / "README.md"
    stale = write_report(tmp_path / "results", readme, tmp_path / "images")
    (picture,) = (tmp_path / "images").glob("*.png")
    assert set(stale) == {readme, picture}
    text = readme.read_text(encoding="utf-8")
    assert f"images/{picture.name}" in text
    assert "| way | flops per sec | tokens per sec | peak rss |" in text
    assert not write_report(tmp_path / "results", readme, tmp_path / "images")
