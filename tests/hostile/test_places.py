"""Nothing that fastft did not write is deleted, and no two exports meet."""

import json
import os

import pytest

from fastft.config import make_config
from fastft.errors import FastFTError
from fastft.exporting.gguf.writer import header_bytes
from fastft.exporting.ollama import write_modelfile
from fastft.exporting.place import LOCK, one_at_a_time, whole_or_nothing
from fastft.exporting.push import adapter_parts
from fastft.files import ours
from fastft.runs import checkpoint
from fastft.runs.adapter import copy_adapter
from fastft.runs.card import write_card
from fastft.runs.folder import RunFolder
from fastft.runs.mirror import Mirror, follow
from fastft.runs.target import Target


@pytest.fixture
def final(tmp_path):
    """A sealed adapter folder, with what a careless user keeps beside it."""
    aside = tmp_path / ".writing-final"
    aside.mkdir()
    (aside / "adapter_model.safetensors").write_bytes(b"weights")
    (aside / "adapter_config.json").write_text("{}")
    checkpoint.seal(aside, tmp_path / "final")
    return tmp_path / "final"


def test_a_foreign_folder_is_never_replaced_by_an_adapter(final, tmp_path):
    foreign = tmp_path / "out" / "adapter"
    foreign.mkdir(parents=True)
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(FastFTError, match="not written by fastft"):
        copy_adapter(final, foreign)
    assert (foreign / "thesis.txt").read_text() == "years of work"
    link = tmp_path / "out" / "link"
    link.symlink_to(foreign)
    with pytest.raises(FastFTError, match="not written by fastft"):
        copy_adapter(final, link)


def test_a_note_in_our_own_folder_outlives_a_second_export(final, tmp_path):
    out = copy_adapter(final, tmp_path / "adapter")
    (out / "note.txt").write_text("keep me")
    (out / "pictures").mkdir()
    (out / "pictures" / "a.png").write_bytes(b"png")
    copy_adapter(final, out)
    assert (out / "note.txt").read_text() == "keep me"
    assert (out / "pictures" / "a.png").read_bytes() == b"png"
    assert checkpoint.what_is_wrong(out, ("adapter_model.safetensors",)) is None


def test_only_what_an_adapter_is_made_of_is_copied_and_uploaded(final, tmp_path):
    for name in ("optimizer.pt", "secrets.txt", "training_args.bin", "adapter_model.bin"):
        (final / name).write_text("private")
    for folder in ("wandb", ".git", "checkpoint-3"):
        (final / folder).mkdir()
        (final / folder / "adapter_model.safetensors").write_text("private")
    out = copy_adapter(final, tmp_path / "adapter")
    expected = {"adapter_model.safetensors", "adapter_config.json"}
    assert {p.name for p in out.iterdir()} == expected | {checkpoint.MANIFEST}
    parts = adapter_parts(Target("owner/base", None, final, None), "owner/base")
    assert {part.path for part in parts} == expected


def test_a_link_that_leads_out_of_the_folder_is_not_uploaded(final, tmp_path):
    (tmp_path / "id_rsa").write_text("private key")
    (final / "README.md").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(FastFTError, match=r"README\.md is a link"):
        adapter_parts(Target("owner/base", None, final, None), "owner/base")


def test_a_merged_folder_keeps_what_is_foreign_even_when_killed_between_its_two_renames(tmp_path):
    out = tmp_path / "merged"
    out.mkdir()
    (out / "config.json").write_text("old")
    (out / "note.txt").write_text("mine")

    def write(text):
        with whole_or_nothing(out, 10, lambda name: name == "config.json") as folder:
            (folder / "config.json").write_text(text)

    write("new")
    assert {p.name: p.read_text() for p in out.iterdir()} == {
        "config.json": "new",
        "note.txt": "mine",
    }
    out.rename(tmp_path / ".writing-old-merged")  # the moment of the kill
    (tmp_path / ".writing-merged").mkdir()
    (tmp_path / ".merged.mine").mkdir()  # not our kind of name
    write("newest")
    assert (out / "note.txt").read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"merged", ".merged.mine"}


def test_a_second_export_into_one_folder_is_refused_and_leaves_no_lock(tmp_path):
    out = tmp_path / "out"
    with one_at_a_time(out):
        with pytest.raises(FastFTError, match=f"process {os.getpid()}"), one_at_a_time(out):
            pass
        assert (out / LOCK).exists()
    assert list(out.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(FastFTError, match="cannot be written"), one_at_a_time(tmp_path / "file"):
        pass


def test_a_run_from_elsewhere_does_not_choose_what_is_written_to(tmp_path):
    """Its run.yaml names a mirror; only a folder that holds this run already is one."""
    run, there = RunFolder(tmp_path / "downloaded"), tmp_path / "home" / "my-run"
    run.path.mkdir()
    there.mkdir(parents=True)
    run.write_config(
        make_config({"model": {"name": "m"}, "data": {"source": "d"}, "mirror": str(there.parent)})
    )
    run.update_record(run_id="theirs", started="2026-01-01T00:00:00Z", dataset={})
    notes = []
    follow(run, note=notes.append, warn=pytest.fail)
    (there / "run.json").write_text(json.dumps({"run_id": "mine"}))
    follow(run, note=notes.append, warn=pytest.fail)
    assert len(notes) == 2
    assert [p.name for p in there.iterdir()] == ["run.json"]


def test_a_file_that_fastft_did_not_write_is_never_replaced(tmp_path):
    text = ours.signed("FROM ./a.gguf\n")
    modelfile, gguf = tmp_path / "Modelfile", tmp_path / "a.gguf"
    modelfile.write_text(text)
    gguf.write_bytes(header_bytes("llama", {ours.GGUF_KEY: (ours.NAME, "STRING")}, [])[0])
    ours.refuse_foreign([modelfile, gguf, tmp_path / "nothing.gguf"])
    modelfile.write_text(text.replace("a.gguf", "b.gguf"))  # the user's own change
    gguf.write_bytes(header_bytes("llama", {"general.name": ("fastft", "STRING")}, [])[0])
    (tmp_path / "link.gguf").symlink_to(tmp_path / "nowhere")
    with pytest.raises(
        FastFTError, match=r"Modelfile, a\.gguf, link\.gguf in .* would be replaced"
    ):
        ours.refuse_foreign([modelfile, gguf, tmp_path / "link.gguf"])
    assert write_card(modelfile, "card") is not None
    assert "b.gguf" in modelfile.read_text()
    with pytest.raises(FastFTError, match="not written by fastft"):
        write_modelfile(tmp_path, gguf, None)


def test_a_new_run_replaces_nothing_that_lies_in_its_folder(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.write_config(make_config({"model": {"name": "m"}, "data": {"source": "d"}}))
    run.refuse_foreign()  # left by a kill before the first record
    (run.path / "run.yaml").write_text("# mine\n" + (run.path / "run.yaml").read_text())
    (run.path / "report.md").write_text("years of work")
    with pytest.raises(FastFTError, match=r"holds report\.md, run\.yaml"):
        run.refuse_foreign()


def test_a_foreign_folder_is_no_mirror(tmp_path):
    run, there = RunFolder(tmp_path / "run"), tmp_path / "drive" / "run"
    run.path.mkdir()
    (there / "final").mkdir(parents=True)
    (there / "final" / "thesis.txt").write_text("years of work")
    with pytest.raises(FastFTError, match="is no copy of a run, but holds final"):
        Mirror(run, there, note=pytest.fail, warn=pytest.fail).restore()
    assert (there / "final" / "thesis.txt").exists()
