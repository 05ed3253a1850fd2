"""The mirror on file systems that fail: training goes on, nothing partial is taken for whole, and the fault is named."""

import errno
import json
import os
import random
import shutil
import subprocess
import threading
import time

import pytest

from fastft.config import make_config
from fastft.errors import FastFTError
from fastft.files import Files
from fastft.runs import checkpoint
from fastft.runs.folder import RunFolder
from fastft.runs.mirror import Mirror, follow

SIZE = 40_000  # bytes of a checkpoint's weights


def make_run(path, run_id="a", status=None):
    run = RunFolder(path)
    path.mkdir(parents=True)
    run.checkpoints.mkdir()
    run.write_config(make_config({"model": {"name": "m"}, "data": {"source": "d"}}))
    run.update_record(run_id=run_id, started="2026-01-01T00:00:00Z", dataset={"fingerprint": "f"})
    run.samples.write_text("{}\n")
    return run


def save(run, step):
    """What a training step leaves: a line in the log, then a sealed checkpoint."""
    run.append_log({"step": step, "loss": 1.0 / step})
    aside = run.checkpoints / f".writing-{step}"
    aside.mkdir()
    for name in checkpoint.REQUIRED:
        (aside / name).write_bytes(
            random.Random(f"{step}{name}").randbytes(SIZE if "adapter" in name else 100)
        )
    run.keep_state(aside)
    checkpoint.seal(aside, run.checkpoints / f"checkpoint-{step}")


class Said:
    def __init__(self):
        self.notes, self.warnings = [], []

    @property
    def text(self):
        return " ".join(self.warnings)


def mirror_of(run, folder, files=None, **keywords):
    said = Said()
    keywords = {"stall_seconds": 5.0, "retry_after_seconds": (0.0,)} | keywords
    mirror = Mirror(
        run,
        folder,
        note=said.notes.append,
        warn=said.warnings.append,
        files=files or Files(),
        **keywords,
    )
    return mirror, said


def settle(mirror, number):
    assert mirror._wait_for(number, 20.0)


def train(run, mirror, steps, keep=2):
    """Save each of `steps`, prune as the run does, and let the mirror follow."""
    for step in steps:
        save(run, step)
        checkpoint.prune(run.checkpoints, keep, mirror.copying)
        settle(mirror, mirror.request(keep))


def same(one, other):
    names = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(other) for p in other.rglob("*") if p.is_file())
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def whole_steps(folder):
    """Steps that are named like checkpoints; each must be whole."""
    for step, path in checkpoint.checkpoints(folder):
        assert checkpoint.what_is_wrong(path) is None, (step, checkpoint.what_is_wrong(path))
    return [step for step, _ in checkpoint.checkpoints(folder)]


def restored(folder, path, files=None):
    """The run as an empty machine gets it from the mirror."""
    run = RunFolder(path / "t")
    run.path.mkdir(parents=True)
    mirror, said = mirror_of(run, folder, files)
    mirror.restore()
    newest, _ = checkpoint.newest_whole(run.checkpoints)
    run.repair_state(newest)
    return run, newest, said


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "runs" / "t")


@pytest.fixture
def drive(tmp_path):
    (tmp_path / "drive").mkdir()
    return tmp_path / "drive" / "fastft" / "t"


def test_an_empty_machine_goes_on_from_the_mirror_alone(run, drive, tmp_path):
    mirror, said = mirror_of(run, drive)
    train(run, mirror, [4, 8, 12])
    assert mirror.close()
    assert said.warnings == []
    assert whole_steps(drive / "checkpoints") == [8, 12]
    there, newest, _ = restored(drive, tmp_path / "elsewhere")
    assert newest.name == "checkpoint-12"
    assert same(newest, run.checkpoints / "checkpoint-12")
    assert there.is_started()
    assert [r["step"] for r in there.read_log()] == [4, 8, 12]
    assert there.read_record()["run_id"] == "a"


def test_the_newest_of_either_place_wins(run, drive):
    mirror, _ = mirror_of(run, drive)
    train(run, mirror, [4, 8])
    mirror.close()
    behind = RunFolder(run.path.with_name("behind"))
    shutil.copytree(run.path, behind.path)
    shutil.rmtree(behind.checkpoints / "checkpoint-8")
    back, said = mirror_of(behind, drive)
    back.restore()
    assert whole_steps(behind.checkpoints) == [4, 8]
    assert "is ahead" in said.notes[0]
    save(behind, 12)
    back, said = mirror_of(behind, drive)
    back.restore()
    assert said.notes == []
    assert whole_steps(behind.checkpoints) == [4, 8, 12]


def test_final_and_exports_are_mirrored_and_a_done_run_comes_back_done(run, drive, tmp_path):
    mirror, _ = mirror_of(run, drive)
    train(run, mirror, [4])
    aside = run.path / ".writing-final"
    aside.mkdir()
    (aside / "adapter_model.safetensors").write_bytes(b"adapter")
    checkpoint.seal(aside, run.final)
    (run.export / "merged").mkdir(parents=True)
    (run.export / "merged" / "model.safetensors").write_bytes(b"merged")
    (run.export / "t.Q8_0.gguf").write_bytes(b"gguf")
    run.update_record(status="done", steps=4)
    assert mirror.close()
    assert same(run.final, drive / "final")
    assert same(run.export, drive / "export")
    there, _, _ = restored(drive, tmp_path / "elsewhere")
    assert there.read_record()["status"] == "done"
    assert same(there.final, run.final)


def test_what_is_exported_after_training_follows_at_once(run, drive):
    config = run.read_config().model_copy(
        update={"mirror": str(drive.parent), "project": drive.name}
    )
    run.write_config(config)
    mirror, said = mirror_of(run, drive)
    train(run, mirror, [4])
    assert mirror.close()
    run.export.mkdir()
    (run.export / "t.Q8_0.gguf").write_bytes(b"gguf")
    follow(run, note=said.notes.append, warn=said.warnings.append)
    assert same(run.export, drive / "export")
    assert not said.warnings


def test_a_run_without_a_mirror_has_nothing_to_follow(run):
    follow(run, note=pytest.fail, warn=pytest.fail)


# --- faults


class Broken(Files):
    """Fails as told. `fault(operation, path)` may raise."""

    def __init__(self, fault=lambda operation, path: None, content=lambda data: data):
        self.fault, self.content = fault, content

    def write(self, path, chunks):
        self.fault("write", path)
        super().write(path, [self.content(b"".join(chunks))])

    def rename(self, old, new):
        self.fault("rename", new)
        super().rename(old, new)

    def make_folder(self, path):
        self.fault("make_folder", path)
        super().make_folder(path)

    def remove(self, path):
        self.fault("remove", path)
        super().remove(path)

    def read(self, path):
        self.fault("read", path)
        yield from super().read(path)


class Counter:
    """Raise `error` at the n-th call of `operation` (and, with `onwards`, at all later ones)."""

    def __init__(self, operation, number, error, onwards=False):
        self.operation, self.number, self.error, self.onwards = operation, number, error, onwards
        self.calls = 0

    def __call__(self, operation, path):
        if operation != self.operation:
            return
        self.calls += 1
        if self.calls == self.number or (self.onwards and self.calls > self.number):
            raise OSError(self.error, os.strerror(self.error))


@pytest.mark.parametrize("operation", ["write", "rename", "make_folder", "remove", "read"])
@pytest.mark.parametrize("onwards", [False, True])
def test_an_error_at_every_operation_in_turn(operation, onwards, run, drive, tmp_path):
    """One fault is got over; a mirror that stays broken is said, keeps what it had, and works when it is back."""
    save(run, 4)
    healthy, _ = mirror_of(run, drive)
    settle(healthy, healthy.request(2))
    counted = Counter(operation, -1, errno.EIO)
    save(run, 8)
    probe = RunFolder(tmp_path / "probe" / "t")
    shutil.copytree(run.path, probe.path)
    shutil.copytree(drive, tmp_path / "probe-drive")
    counting, _ = mirror_of(probe, tmp_path / "probe-drive", Broken(counted))
    settle(counting, counting.request(2))
    assert counted.calls >= 2
    told = 0
    for number in range(1, counted.calls + 1, 1 if operation != "read" else 5):
        folder = tmp_path / f"drive-{number}" / "t"
        shutil.copytree(drive, folder)
        mirror, said = mirror_of(
            run, folder, Broken(Counter(operation, number, errno.EIO, onwards))
        )
        settle(mirror, mirror.request(2))
        steps = whole_steps(folder / "checkpoints")
        assert 4 in steps or 8 in steps
        if mirror.problem:  # the last removals change nothing that a second attempt would need
            told += 1
            assert onwards
            assert "Input/output error" in said.text
            assert "Training goes on" in said.text
            mirror.files = Files()
            settle(mirror, mirror.request(2))
            assert any("works again" in note for note in said.notes)
        assert whole_steps(folder / "checkpoints") == [4, 8]
        assert mirror.problem is None
        _, newest, _ = restored(folder, tmp_path / f"machine-{number}")
        assert same(newest, run.checkpoints / "checkpoint-8")
    assert told > 0 if onwards else told == 0


LIES = {
    "short writes": (lambda data: data[: max(1, len(data) // 2)], "came back"),
    "nothing is written": (lambda data: b"", "came back"),
    "a flipped bit": (lambda data: bytes([data[0] ^ 1]) + data[1:], "other bytes came back"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_drive_is_found_out(lie, run, drive):
    change, says = LIES[lie]
    mirror, said = mirror_of(run, drive, Broken(content=change))
    train(run, mirror, [4, 8])
    assert not mirror.close()
    assert whole_steps(drive / "checkpoints") == []
    assert says in said.text
    assert "does not keep what is written to it" in said.text
    assert whole_steps(run.checkpoints) == [4, 8]


def test_old_copies_stay_until_a_newer_one_is_verified(run, drive):
    mirror, _ = mirror_of(run, drive)
    train(run, mirror, [4, 8])
    mirror.files = Broken(content=lambda data: data[:-1])
    train(run, mirror, [12, 16, 20])
    assert whole_steps(drive / "checkpoints") == [4, 8]
    mirror.files = Files()
    train(run, mirror, [24])
    assert whole_steps(drive / "checkpoints") == [8, 24]


def test_protected_checkpoints_are_copied_and_kept(run, drive):
    mirror, _ = mirror_of(run, drive)
    for step in (4, 8, 12, 16):
        save(run, step)
        settle(mirror, mirror.request(1, {4}))
    assert whole_steps(drive / "checkpoints") == [4, 16]


@pytest.mark.parametrize(
    "fault", ["truncated", "corrupted", "missing file", "no manifest", "damaged manifest"]
)
def test_a_damaged_copy_is_passed_over_with_a_warning(fault, run, drive, tmp_path):
    mirror, _ = mirror_of(run, drive)
    train(run, mirror, [4, 8])
    mirror.close()
    weights = drive / "checkpoints" / "checkpoint-8" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    if fault == "truncated":
        weights.write_bytes(whole[:-7])
    elif fault == "corrupted":
        weights.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    elif fault == "missing file":
        weights.unlink()
    elif fault == "no manifest":
        (weights.parent / "manifest.json").unlink()
    else:
        (weights.parent / "manifest.json").write_text('{"files": ')
    _, newest, said = restored(drive, tmp_path / "elsewhere")
    assert newest.name == "checkpoint-4"
    assert "checkpoint-8 there is damaged" in said.text
    assert "the one before it is taken" in said.text
    # and a run that still has it puts it right
    again, _ = mirror_of(run, drive)
    settle(again, again.request(2))
    assert whole_steps(drive / "checkpoints") == [4, 8]


def test_a_deleted_folder_is_made_again(run, drive):
    mirror, said = mirror_of(run, drive)
    train(run, mirror, [4, 8])
    shutil.rmtree(drive.parent)
    train(run, mirror, [12])
    assert whole_steps(drive / "checkpoints") == [12]
    shutil.rmtree(drive.parent.parent)
    train(run, mirror, [16])
    assert "is the drive still mounted?" in said.text
    assert not drive.parent.parent.exists()  # a drive that is gone is not made up
    drive.parent.parent.mkdir()
    assert mirror.close()
    assert whole_steps(drive / "checkpoints") == [16]


def test_clocks_do_not_matter(run, drive, tmp_path):
    mirror, _ = mirror_of(run, drive)
    train(run, mirror, [4, 8, 12])
    for number, path in enumerate(sorted([*drive.rglob("*"), *run.path.rglob("*")])):
        os.utime(path, (number % 3 * 2e9, (number * 7919 % 5) * 1e9))
    _, newest, _ = restored(drive, tmp_path / "elsewhere")
    assert newest.name == "checkpoint-12"
    train(run, mirror, [16])
    assert whole_steps(drive / "checkpoints") == [12, 16]


def test_a_stale_listing_loses_nothing(run, drive, tmp_path):
    """A listing without the newest copy, and one that still shows a deleted one."""

    class Stale(Files):
        def names(self, folder):
            names = super().names(folder)
            return (
                [n for n in names if n != "checkpoint-12"] + ["checkpoint-16"]
                if folder.name == "checkpoints"
                else names
            )

    mirror, _ = mirror_of(run, drive)
    train(run, mirror, [4, 8, 12])
    mirror.close()
    _, newest, said = restored(drive, tmp_path / "elsewhere", Stale())
    assert newest.name == "checkpoint-12"
    assert "checkpoint-16 there is damaged" in said.text


def test_a_drive_that_hangs_blocks_neither_training_nor_the_end(run, drive):
    release = threading.Event()

    def hang(operation, path):
        if operation == "write" and path.name.startswith("adapter"):
            release.wait(30)

    mirror, said = mirror_of(run, drive, Broken(hang), stall_seconds=0.3)
    began = time.monotonic()
    for step in (4, 8, 12):
        save(run, step)
        checkpoint.prune(run.checkpoints, 1, mirror.copying)
        mirror.request(1)
        time.sleep(0.05)
    assert mirror.blocked_seconds < 0.1
    assert (run.checkpoints / "checkpoint-4").is_dir()  # it is being read
    assert not mirror.close(0.5)
    assert time.monotonic() - began < 12
    assert "is behind: it has nothing verified" in said.text
    release.set()
    mirror._thread.join(10)
    assert whole_steps(drive / "checkpoints") == []  # what nobody waits for any more stops


def test_a_slow_drive_gets_the_newest_and_skips_those_between(run, drive):
    def slow(operation, path):
        if operation == "write":
            time.sleep(0.02)

    mirror, _ = mirror_of(run, drive, Broken(slow))
    for step in range(1, 30):
        save(run, step)
        checkpoint.prune(run.checkpoints, 2, mirror.copying)
        mirror.request(2)
    assert mirror.close(60)
    assert max(whole_steps(drive / "checkpoints")) == 29
    assert len(mirror.copy_seconds) < 29
    assert mirror.blocked_seconds < 0.1


def test_a_drive_that_cannot_be_read_at_the_start(tmp_path, drive):
    run = RunFolder(tmp_path / "runs" / "t")
    run.path.mkdir(parents=True)
    missing = tmp_path / "not-mounted" / "fastft" / "t"
    mirror, _ = mirror_of(run, missing)
    with pytest.raises(FastFTError, match="is the drive still mounted"):
        mirror.restore()
    shutil.rmtree(run.path)
    run = make_run(run.path)
    save(run, 4)
    mirror, said = mirror_of(run, missing)
    mirror.restore()
    assert "going on with the run's own checkpoints" in said.text
    hanging, said = mirror_of(
        run, drive, Broken(lambda operation, path: time.sleep(3)), stall_seconds=0.2
    )
    hanging.restore()
    assert "did not answer" in said.text
    hanging.files = Broken(lambda operation, path: None)  # the drive answers again
    save(run, 8)
    hanging.request(2)
    assert hanging.close(20)
    assert 8 in whole_steps(drive / "checkpoints"), "one stall does not end the mirror"


def test_another_run_of_the_same_name_is_not_touched(run, drive, tmp_path):
    mirror, _ = mirror_of(run, drive)
    train(run, mirror, [4])
    mirror.close()
    other = make_run(tmp_path / "other" / "t", run_id="b")
    stranger, _ = mirror_of(other, drive)
    with pytest.raises(FastFTError, match="holds another run of this name"):
        stranger.restore()


# --- the same with the kernel's own means


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 192 KiB."""
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=192k", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def test_a_really_full_disk(run, small_disk):
    (small_disk / "ballast").write_bytes(b"x" * 80_000)
    mirror, said = mirror_of(run, small_disk / "t")
    train(run, mirror, [4])
    assert "No space left on device (1." in said.text  # found before anything is written
    assert "MiB are needed, 0.1 MiB are free); make room there" in said.text
    mirror.files = type("Optimist", (Files,), {"free_bytes": lambda self, folder: 2**40})()
    said.warnings.clear()
    train(run, mirror, [8, 12])
    assert whole_steps(small_disk / "t" / "checkpoints") == [8]
    assert "No space left on device" in said.text
    (small_disk / "ballast").unlink()
    assert mirror.close()
    assert max(whole_steps(small_disk / "t" / "checkpoints")) == 12


def test_a_really_read_only_disk(run, small_disk, tmp_path):
    big = type("Optimist", (Files,), {"free_bytes": lambda self, folder: 2**40})
    mirror, said = mirror_of(run, small_disk / "t", big())
    train(run, mirror, [4])
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    train(run, mirror, [8])
    assert "Read-only file system" in said.text
    assert "mount it writable" in said.text
    _, newest, _ = restored(small_disk / "t", tmp_path / "elsewhere")
    assert newest.name == "checkpoint-4"
    subprocess.run(["umount", "-l", str(small_disk)], check=True)
    train(run, mirror, [12])
    assert whole_steps(run.checkpoints) == [8, 12]


def test_run_json_keeps_how_the_mirror_stands(run, drive):
    mirror, _ = mirror_of(run, drive)
    train(run, mirror, [4])
    mirror.close()
    facts = json.loads(json.dumps(mirror.facts()))
    assert facts["verified_steps"] == [4]
    assert facts["copied_bytes"] > SIZE
    assert facts["behind_because"] is None
    assert 0 <= facts["seconds_blocked"] < 0.1
