"""Checkpoints of two arrays: what is damaged is noticed and got round, and a save that fails says so in one line."""

import contextlib
import errno
import json
import logging
import os
import pathlib
import shutil
import subprocess
import tempfile

import jax
import numpy as np
import pytest

from maskformer.training import checkpoints, checksums
from maskformer.training.checkpoints import CheckpointError, Checkpoints, RunRecord, SaveError, restore_params
from maskformer.training.sections import CheckpointConfig, EvaluationConfig
from maskformer.training.workdir import RunError, checkpoint_steps

PLACE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def state_of(step):
    key = jax.random.fold_in(jax.random.key(0), step)
    return {"params": {"weight": jax.random.normal(key, (32, 32))}, "step": jax.numpy.asarray(step)}


ABSTRACT = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=PLACE), state_of(0))


@contextlib.contextmanager
def opened(workdir, keep=3, **evaluation):
    made = Checkpoints(workdir, CheckpointConfig(keep=keep), EvaluationConfig(**evaluation))
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoints of steps 1 to 3, the second one the best."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    workdir.mkdir()
    with opened(workdir) as made:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
            made.save(step, state_of(step), RunRecord(next_example=8 * step, tokens=100 * step), loss)
    return workdir


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run", symlinks=True)


def resume(workdir):
    with opened(workdir) as made:
        restored = made.restore_latest(ABSTRACT)
    if restored is None:
        return None
    state, record = restored
    step = int(state["step"])
    np.testing.assert_array_equal(state["params"]["weight"], state_of(step)["params"]["weight"])
    assert record.next_example == 8 * step and record.tokens == 100 * step
    return step


def evaluate(workdir, which):
    params, step = restore_params(workdir, ABSTRACT["params"], which)
    np.testing.assert_array_equal(params["weight"], state_of(step)["params"]["weight"])
    return step


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_an_undamaged_run_resumes_at_the_newest_and_evaluates_the_best_without_a_word(run, caplog):
    with caplog.at_level(logging.WARNING, logger="maskformer"):
        assert (resume(run), evaluate(run, "best"), evaluate(run, "latest")) == (3, 2, 3)
    assert not [record for record in caplog.records if record.name.startswith("maskformer")]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_one_flipped_bit_of_the_arrays_is_noticed_and_the_checkpoint_before_is_used(run, share, caplog):
    path = largest(run / "checkpoints" / "3" / "state")
    data = bytearray(path.read_bytes())
    data[int(len(data) * share)] ^= 1
    path.write_bytes(data)
    assert evaluate(run, "latest") == 2 and checkpoint_steps(run / "checkpoints") == [1, 2, 3]
    assert resume(run) == 2 and (run / "damaged-3").is_dir()
    said = f"checkpoint of step 3 in {run / 'checkpoints'} is damaged ({path.relative_to(run / 'checkpoints' / '3')} "
    assert caplog.text.count(said + "is not as it was saved); using that of step 2 instead") == 2


def test_a_flip_in_any_file_that_orbax_wrote_is_noticed(run, caplog):
    folder = run / "checkpoints" / "3"
    names = [path for path in folder.rglob("*") if path.is_file() and path.name not in checksums.UNCHECKED]
    assert len(names) > 8
    for path in names:
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 64]))
        assert evaluate(run, "latest") == 2, path
        path.write_bytes(before)
    assert evaluate(run, "latest") == 3


SMALL = ("record/metadata", "metrics/metrics", "checksums.json", "_CHECKPOINT_METADATA")
DAMAGE = ("", "garbage", "[1]", "7", "-5", "NaN", "null", "{}", '"text"', "\0" * 40, '{"tokens": -5}', "[" * 10**5)


@pytest.mark.parametrize("name", SMALL)
def test_damage_to_a_small_file_is_named_and_got_round(run, name, caplog):
    path = run / "checkpoints" / "3" / name
    for text in DAMAGE:
        path.write_text(text)
        # Orbax's own notes are needed by nobody, and are not what was saved.
        usable = 3 if name == "_CHECKPOINT_METADATA" else 2
        caplog.clear()
        assert evaluate(run, "latest") == usable, text
        assert usable == 3 or name in caplog.text, text
    assert evaluate(run, "best") == 2 and resume(run) == usable


@pytest.mark.parametrize("name, text", [(SMALL[1], ""), (SMALL[1], "[1]"), (SMALL[3], "[1]")])
def test_a_damaged_small_file_of_an_older_checkpoint_does_not_stand_in_the_way_of_the_next(run, name, text, caplog):
    path = run / "checkpoints" / "2" / name
    path.write_text(text)
    assert resume(run) == 3
    with opened(run) as made:
        made.save(4, state_of(4), RunRecord(next_example=32, tokens=400), None)
    assert str(path) in caplog.text and evaluate(run, "latest") == 4


def test_records_swapped_between_steps_and_renamed_checkpoints_are_noticed(run):
    folder = run / "checkpoints"
    shutil.copy(folder / "1" / "record" / "metadata", folder / "3" / "record" / "metadata")
    (folder / "1").rename(folder / "5")
    assert evaluate(run, "latest") == 2
    assert resume(run) == 2


def test_a_record_of_another_step_is_noticed_without_checksums_too(run, caplog):
    folder = run / "checkpoints"
    for step in (1, 2, 3):
        (folder / str(step) / "checksums.json").unlink()
    assert resume(run) == 3 and "has no checksums.json: used unchecked" in caplog.text
    swapped = (folder / "1" / "record" / "metadata").read_text()
    for record in ("{}", '{"next_example": -5, "tokens": 1, "predicted": 1}', swapped):
        (folder / "3" / "record" / "metadata").write_text(record)
        with pytest.raises(checksums.DamageError, match="record"):
            checkpoints.restore(folder, 3, ABSTRACT)
    assert resume(run) == 2


def test_a_best_that_was_not_a_number_is_read_as_none(run):
    folder = run / "checkpoints"
    (folder / "3" / "checksums.json").unlink()
    path = folder / "3" / "record" / "metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), "best": float("nan")}))
    assert checkpoints.restore(folder, 3, ABSTRACT)[1].best is None


def as_file(path):
    path.write_text("")


def as_loop(path):
    path.symlink_to(path)


def as_dangling_link(path):
    path.symlink_to(path.parent / "nowhere")


@pytest.mark.parametrize("damage", [as_file, as_loop, as_dangling_link])
def test_a_checkpoint_that_is_no_folder_is_named_and_does_not_stand_in_the_way(run, damage, caplog):
    path = run / "checkpoints" / "3"
    shutil.rmtree(path)
    damage(path)
    assert evaluate(run, "latest") == 2
    assert "step 3" in caplog.text and "is no folder" in caplog.text and "using that of step 2" in caplog.text
    assert resume(run) == 2
    with opened(run) as made:
        made.save(3, state_of(3), RunRecord(next_example=24, tokens=300), None)
    assert resume(run) == 3


def test_when_nothing_can_be_read_every_try_says_so_and_nothing_is_moved(run, caplog):
    for step in (1, 2, 3):
        shutil.rmtree(run / "checkpoints" / str(step) / "state")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be read \(step 3: .*step 2: .*step 1: "):
            resume(run)
        with pytest.raises(CheckpointError, match=r"can be read \(step 2: .*step 3: .*step 1: "):
            evaluate(run, "best")
    assert checkpoint_steps(run / "checkpoints") == [1, 2, 3]


def test_the_next_best_is_evaluated_where_the_best_is_damaged(run, caplog):
    largest(run / "checkpoints" / "2").write_bytes(b"")
    assert evaluate(run, "best") == 3
    assert "step 2" in caplog.text and "using that of step 3 instead" in caplog.text


def test_an_average_is_returned_as_wide_as_it_was_kept(tmp_path):
    narrow = jax.numpy.ones((4, 4), jax.numpy.bfloat16)
    mean = jax.numpy.linspace(1.0, 1.01, 16).reshape(4, 4)
    state = {"params": {"weight": narrow, "count": jax.numpy.arange(3)}}
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=PLACE), state["params"])
    for name, extra, expected in (("without", {}, narrow), ("with", {"ema": state["params"] | {"weight": mean}}, mean)):
        with opened(tmp_path / name) as made:
            made.save(1, state | extra, RunRecord(), None)
        params, _ = restore_params(tmp_path / name, abstract)
        assert params["weight"].dtype == expected.dtype and params["count"].dtype == state["params"]["count"].dtype
        np.testing.assert_array_equal(params["weight"], expected)


def test_a_score_by_another_metric_keeps_no_checkpoint_and_is_not_the_best(tmp_path):
    with opened(tmp_path, keep=1) as made:
        for step, loss in ((1, 0.1), (2, 3.0)):
            made.save(step, state_of(step), RunRecord(), loss)
    assert checkpoint_steps(tmp_path / "checkpoints") == [1, 2]
    with opened(tmp_path, metric="negative", mode="max", keep=1) as made:
        # Until the new metric has a score, the best by the old one is the best that is known.
        assert evaluate(tmp_path, "best") == 1
        for step, value in ((3, -5.0), (4, -7.0), (5, None)):
            made.save(step, state_of(step), RunRecord(), value)
    assert checkpoint_steps(tmp_path / "checkpoints") == [3, 5] and evaluate(tmp_path, "best") == 3
    with opened(tmp_path, keep=1, metric="accuracy", mode="max") as made:
        made.save(6, state_of(6), RunRecord(), 0.5)
    assert checkpoint_steps(tmp_path / "checkpoints") == [6]


def test_a_score_from_before_it_named_its_metric_counts(run):
    for step in (1, 2, 3):
        path = run / "checkpoints" / str(step) / "metrics" / "metrics"
        path.write_text(json.dumps({"score": json.loads(path.read_text())["score"]}))
        (run / "checkpoints" / str(step) / "checksums.json").unlink()
    with opened(run, keep=1) as made:
        made.save(4, state_of(4), RunRecord(), 2.5)
    assert checkpoint_steps(run / "checkpoints") == [2, 4] and evaluate(run, "best") == 2


def test_another_runs_newest_checkpoint_is_got_round_and_left_alone(run, caplog):
    largest(run / "checkpoints" / "3").write_bytes(b"")
    state, record = checkpoints.restore_newest(run / "checkpoints", ABSTRACT)
    assert int(state["step"]) == 2 and record.next_example == 16
    assert checkpoint_steps(run / "checkpoints") == [1, 2, 3]


def test_checksums_are_part_of_what_makes_a_checkpoint_count(tmp_path, monkeypatch):
    """Whoever is killed while they are written leaves no checkpoint without them."""

    def killed(folder, step):
        assert folder.name != str(step) and largest(folder / "state").stat().st_size > 1000
        raise OSError(errno.EIO, "killed")

    monkeypatch.setattr(checkpoints, "write_checksums", killed)
    with pytest.raises(SaveError), opened(tmp_path) as made:
        made.save(1, state_of(1), RunRecord(), None)
    assert checkpoint_steps(tmp_path / "checkpoints") == []


def test_parts_of_the_files_checked_by_several_processes_make_up_all(run):
    folder = run / "checkpoints" / "3"
    largest(folder).write_bytes(b"")
    found = []
    for part in range(3):
        try:
            assert checksums.verify(folder, 3, part, 3)
        except checksums.DamageError:
            found.append(part)
    assert len(found) == 1


def test_a_save_that_finds_too_little_room_is_one_line_and_nothing_is_begun(tmp_path, monkeypatch):
    with opened(tmp_path) as made:
        made.save(1, state_of(1), RunRecord(next_example=8, tokens=100), None)
        made.wait()
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(SaveError, match="needs about 4 kB, and 1 kB are free; the last good .* is of step 1"):
            made.save(2, state_of(2), RunRecord(), None)
    assert issubclass(SaveError, RunError) and resume(tmp_path) == 1


def test_the_room_for_checkpoints_is_that_of_the_disk_they_are_linked_to(tmp_path, monkeypatch):
    workdir, elsewhere = tmp_path / "run", tmp_path / "larger"
    workdir.mkdir()
    elsewhere.mkdir()
    (workdir / "checkpoints").symlink_to(elsewhere)
    usage = shutil.disk_usage(tmp_path)
    full, empty = usage._replace(free=1000), usage._replace(free=10**9)
    with opened(workdir) as made:
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: empty if path == elsewhere else full)
        made.save(1, state_of(1), RunRecord(next_example=8, tokens=100), None)
        made.wait()
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: full if path == elsewhere else empty)
        with pytest.raises(SaveError, match="the disk is full.* and 1 kB are free; the last good .* is of step 1"):
            made.save(2, state_of(2), RunRecord(), None)
    assert resume(workdir) == 1


@pytest.fixture
def other_disk(tmp_path):
    memory = pathlib.Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield pathlib.Path(folder)


def test_a_damaged_checkpoint_on_a_linked_disk_is_set_aside_there(run, other_disk, caplog):
    shutil.move(run / "checkpoints", other_disk / "checkpoints")
    (run / "checkpoints").symlink_to(other_disk / "checkpoints")
    for number in (1, 2):
        largest(run / "checkpoints" / "3" / "state").write_bytes(b"")
        assert resume(run) == 2
        with opened(run) as made:
            made.save(3, state_of(3), RunRecord(next_example=24, tokens=300), 2.0)
        assert resume(run) == 3 and evaluate(run, "best") == 2, number
    aside = sorted(path.name for path in (run / "checkpoints").glob("damaged-*"))
    assert aside == ["damaged-3", "damaged-3-1"] and caplog.text.count("set aside: ") == 2
    assert not list(run.glob("damaged-*")) and not list(other_disk.glob("damaged-*"))


def test_a_damaged_checkpoint_that_cannot_be_set_aside_is_one_line(run, monkeypatch):
    largest(run / "checkpoints" / "3" / "state").write_bytes(b"")

    def rename(path, target):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(pathlib.Path, "rename", rename)
    with pytest.raises(RunError, match=r"damaged-3: cannot be written \(Permission denied\)"):
        resume(run)


def test_a_workdir_that_vanishes_is_one_line_too(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with opened(workdir) as made:
        made.save(1, state_of(1), RunRecord(), None)
        made.wait()
        shutil.rmtree(workdir)
        with pytest.raises(SaveError, match="its folder cannot be reached .*; the last good checkpoint is none"):
            made.save(2, state_of(2), RunRecord(), None)


@pytest.mark.skipif(shutil.which("mount") is None or os.getuid() != 0, reason="mounts a small file system")
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_fills_up_during_a_save_is_one_line_and_the_run_goes_on_with_room(tmp_path, caplog, capfd):
    small = tmp_path / "small"
    small.mkdir()
    # The second checkpoint fits by half: enough for the save to begin.
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    large = np.random.default_rng(0).normal(size=625_000).astype(np.float32)

    def save_three():
        with opened(small) as made:
            for step in range((made.latest_step() or 0) + 1, 4):
                made.save(step, {**state_of(step), "large": jax.numpy.asarray(large)}, RunRecord(), None)

    try:
        with pytest.raises(SaveError) as failure:
            save_three()
        said = str(failure.value)
        assert "the checkpoint of step 2 cannot be written to" in said and "the disk is full" in said
        assert "needs about 2.5 MB" in said and "the last good checkpoint is of step 1" in said and "\n" not in said
        assert "Traceback" not in caplog.text and capfd.readouterr().err == ""
        assert [path.name for path in (small / "checkpoints").iterdir()] == ["1"]
        subprocess.run(["mount", "-o", "remount,size=40m", str(small)], check=True)
        save_three()
        assert checkpoint_steps(small / "checkpoints") == [1, 2, 3]
    finally:
        subprocess.run(["umount", str(small)], check=True)
