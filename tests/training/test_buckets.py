"""A run in a bucket, against a real server: checkpoints that count when committed, the lock, and whole runs."""

import base64
import json
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from maskformer import paths, report
from maskformer.training import lock, runs, train_and_evaluate, writers
from maskformer.training.checkpoints import CheckpointError, Checkpoints, RunRecord, SaveError, restore_params
from maskformer.training.checksums import verify
from maskformer.training.lock import Lock, LockError, LockLostError
from maskformer.training.sections import CheckpointConfig, EvaluationConfig
from maskformer.training.workdir import checkpoint_steps, unfinished_steps, write_config
from tests.emulator import contents
from tests.training.tiny import metric_lines, tiny_config

PLACE = jax.sharding.SingleDeviceSharding(jax.devices()[0])
ROOT = pathlib.Path(__file__).parents[2]


def state_of(step):
    key = jax.random.fold_in(jax.random.key(0), step)
    return {"params": {"weight": jax.random.normal(key, (32, 32))}, "step": jax.numpy.asarray(step)}


ABSTRACT = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=PLACE), state_of(0))


@pytest.fixture
def run(bucket):
    return paths.resolve(f"{bucket}/runs/one")


def save(run, *steps):
    made = Checkpoints(run, CheckpointConfig(keep=3), EvaluationConfig())
    try:
        for step in steps:
            made.save(step, state_of(step), RunRecord(next_example=8 * step), float(abs(step - 2)))
    finally:
        made.close()


def resume(run):
    made = Checkpoints(run, CheckpointConfig(keep=3), EvaluationConfig())
    restored = made.restore_latest(ABSTRACT)
    made.close()
    if restored is None:
        return None
    state, record = restored
    np.testing.assert_array_equal(state["params"]["weight"], state_of(record.next_example // 8)["params"]["weight"])
    return record.next_example // 8


def flip(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 64]))


def test_checkpoints_in_a_bucket_are_saved_resumed_and_the_best_is_found(run):
    save(run, 1, 2, 3)
    assert checkpoint_steps(run / "checkpoints") == [1, 2, 3]
    assert resume(run) == 3
    assert [restore_params(str(run), ABSTRACT["params"], which)[1] for which in ("best", "latest")] == [2, 3]


def test_the_checksums_are_those_that_the_server_computed(run, bucket, emulator):
    save(run, 1)
    folder = run / "checkpoints" / "1"
    held = contents(emulator, bucket[5:])
    listed = json.loads((folder / "checksums.json").read_text())["files"]
    assert len(listed) > 8
    for name, (length, checksum) in listed.items():
        item = held[f"{folder.key}/{name}"]
        assert (length, checksum) == (int(item["size"]), f"md5:{base64.b64decode(item['md5Hash']).hex()}")


def test_a_step_that_was_never_committed_is_no_checkpoint_and_gives_way(run, bucket, emulator):
    save(run, 1, 2)
    (run / "checkpoints" / "2" / "commit_success.txt").unlink()
    assert checkpoint_steps(run / "checkpoints") == [1] and unfinished_steps(run / "checkpoints") == [2]
    assert resume(run) == 1
    (run / "checkpoints" / "2" / "leftover").write_text("of the save that was cut off")
    save(run, 2)
    assert checkpoint_steps(run / "checkpoints") == [1, 2] and resume(run) == 2
    assert f"{run.key}/checkpoints/2/leftover" not in contents(emulator, bucket[5:])


def test_a_run_with_nothing_committed_says_so(run):
    save(run, 1)
    (run / "checkpoints" / "1" / "commit_success.txt").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in gs://.* \(those of steps \[1\] were never committed"):
        restore_params(run, ABSTRACT["params"])


def test_one_flipped_bit_in_the_bucket_is_noticed_and_the_checkpoint_before_is_used(run, bucket, emulator, caplog):
    save(run, 1, 2, 3)
    arrays = [path for path in paths.files_below(run / "checkpoints" / "3" / "state") if "/d/" in str(path)]
    flip(max(arrays, key=paths.size))
    with caplog.at_level(logging.WARNING):
        assert restore_params(run, ABSTRACT["params"], "latest")[1] == 2
        assert resume(run) == 2
    assert caplog.text.count("is not as it was saved); using that of step 2 instead") == 2
    assert checkpoint_steps(run / "checkpoints") == [1, 2]
    aside = [name for name in contents(emulator, bucket[5:]) if name.startswith(f"{run.key}/damaged-3/")]
    assert len(aside) > 8
    save(run, 3)
    assert resume(run) == 3


def test_a_missing_file_in_the_bucket_is_noticed(run):
    save(run, 1, 2)
    next(path for path in paths.files_below(run / "checkpoints" / "2" / "state") if "/d/" in str(path)).unlink()
    assert resume(run) == 1


def test_a_checkpoint_that_was_copied_to_a_disk_is_checked_there_too(run, tmp_path):
    save(run, 1)
    for file in paths.files_below(run):
        target = tmp_path / file.relative_to(run).as_posix()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    assert verify(tmp_path / "checkpoints" / "1", 1) and resume(tmp_path) == 1
    flip(tmp_path / "checkpoints" / "1" / "state" / "manifest.ocdbt")
    with pytest.raises(CheckpointError, match=r"manifest.ocdbt is not as it was saved"):
        resume(tmp_path)


@pytest.mark.parametrize("answer", [403])
def test_a_bucket_that_refuses_a_save_is_one_line_with_the_last_good_checkpoint(proxy, run, answer):
    save(run, 1)
    made = Checkpoints(run, CheckpointConfig(keep=3), EvaluationConfig())
    proxy.answer = lambda method, path: answer if method == "POST" else None
    with pytest.raises(SaveError) as error:
        made.save(2, state_of(2), RunRecord(next_example=16), None)
        made.wait()
    with pytest.raises(SaveError):
        made.close()
    said = str(error.value)
    assert said.startswith(f"the checkpoint of step 2 cannot be written to {run / 'checkpoints'} (")
    assert "the last good checkpoint is of step 1; run the same command again" in said and "\n" not in said
    proxy.answer = lambda method, path: None
    assert checkpoint_steps(run / "checkpoints") == [1]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    monkeypatch.setattr(lock, "STALE_AFTER", 0.6)


def held_by(run, **changes):
    holder = {**lock._machine(), "started": time.time(), "alive": time.time(), "token": "theirs", **changes}
    (run / lock.LOCK).write_text(json.dumps(holder))


def test_a_second_training_in_a_bucket_is_refused_in_one_line_that_names_the_first(run):
    with Lock(run), pytest.raises(LockError) as refusal, Lock(run):
        pass
    named = f"workdir {run}: process {os.getpid()} on {lock.socket.gethostname()} (last sign of life "
    assert str(refusal.value).startswith(named) and "\n" not in str(refusal.value)
    assert not (run / lock.LOCK).exists()


def test_a_holder_elsewhere_that_shows_life_is_refused_and_one_that_does_not_is_replaced(run, quick):
    held_by(run, host="elsewhere")
    with Lock(run):
        assert lock.holder(run)[0]["host"] == lock.socket.gethostname()
    stop = threading.Event()

    def alive():
        while not stop.wait(0.05):
            held_by(run, host="elsewhere")

    held_by(run, host="elsewhere")
    thread = threading.Thread(target=alive)
    thread.start()
    try:
        with pytest.raises(LockError, match="on elsewhere"), Lock(run):
            pass
    finally:
        stop.set()
        thread.join()


def test_of_several_that_begin_at_one_moment_one_gets_the_workdir(run, quick):
    held_by(run, host="elsewhere")  # dead, so that they take over and do not only create
    got, refused = [], []
    barrier = threading.Barrier(5)

    def begin():
        made = Lock(run)
        barrier.wait()
        try:
            made.__enter__()
            got.append(made)
        except LockError:
            refused.append(made)

    threads = [threading.Thread(target=begin) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 4)
    got[0].__exit__(None, None, None)


def test_whoever_is_stolen_from_learns_of_it_and_does_not_take_it_back(run, quick):
    with Lock(run) as first, Lock(run, steal=True) as second:
        deadline = time.monotonic() + 20
        with pytest.raises(LockLostError, match=f"workdir {run}: was taken over by process"):
            while time.monotonic() < deadline:
                first.check()
                time.sleep(0.02)
        time.sleep(0.3)
        second.check()
        assert lock.holder(run)[0]["token"] == second._mine["token"]


def test_signs_of_life_are_shown_in_the_bucket(run, quick):
    with Lock(run):
        seen = set()
        deadline = time.monotonic() + 20
        while len(seen) < 3 and time.monotonic() < deadline:
            seen.add(lock.Lock(run)._place.read().version)
        assert len(seen) == 3


def test_tensorboard_events_in_a_bucket_hold_every_point(run, monkeypatch):
    from tensorboardX.proto import event_pb2

    monkeypatch.setattr(writers, "TENSORBOARD_BYTES", 300)
    writer = writers.TensorBoardWriter(run, 0)
    for step in range(1, 20):
        writer.write(step, {"train/loss": 1.0 / step})
        writer.flush()
    writer.close()
    files = sorted(run.glob("events.out.tfevents.*"))
    assert len(files) > 2
    points = []
    for file in files:
        data, start = file.read_bytes(), 0
        # Each record: its length in 8 bytes, their checksum in 4, the event, its checksum in 4.
        while start < len(data):
            length = int.from_bytes(data[start : start + 8], "little")
            event = event_pb2.Event.FromString(data[start + 12 : start + 12 + length])
            points += [(event.step, value.simple_value) for value in event.summary.value]
            start += 16 + length
    assert points == [(step, pytest.approx(1.0 / step)) for step in range(1, 20)]


def test_the_id_at_weights_and_biases_is_kept_in_the_bucket(run):
    assert writers.wandb_id(run) == writers.wandb_id(run) == (run / "wandb_id").read_text()


def test_a_run_in_a_bucket_resumes_is_evaluated_and_reported_as_on_a_disk(
    run, bucket, emulator, corpus, first_device, tmp_path, quick_compilation
):
    local = tmp_path / "local"
    with first_device():
        results = train_and_evaluate(tiny_config(corpus), local)
        train_and_evaluate(tiny_config(corpus, train__steps=6), str(run))
        # Its last line was written after its last checkpoint by a run that was killed.
        part = paths.resolve(run / "metrics.00001.jsonl")
        part.write_bytes(part.read_bytes() + b'{"step": 7, "train/loss": 9.9}\n')
        train_and_evaluate(tiny_config(corpus), str(run))
        assert metric_lines(run) == metric_lines(local)
        assert runs.load(str(run)).measure("loss", "validation") == results
    there, here = (report.table([str(workdir)]).splitlines()[-1].split("|")[2:] for workdir in (run, local))
    assert there == here
    report.draw_curves([str(run)], str(run / "report.png"))
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    names = {name.removeprefix(f"{run.key}/").split("/")[0] for name in contents(emulator, bucket[5:])}
    assert names >= {"checkpoints", "config.json", "metrics.00001.jsonl", "report.png"}
    assert not [name for name in names if name.startswith((".write_test", "lock"))]


@pytest.mark.slow
@pytest.mark.parametrize("field, first", [("resume", 6), ("init_from", 0)])
def test_a_run_begins_with_one_that_is_in_a_bucket(
    run, corpus, first_device, tmp_path, quick_compilation, field, first
):
    with first_device():
        train_and_evaluate(tiny_config(corpus, train__steps=6), str(run))
        before = contents_of(run)
        train_and_evaluate(tiny_config(corpus, **{f"train__{field}": str(run)}, train__steps=7), tmp_path)
    assert min(line["step"] for line in metric_lines(tmp_path)) == first + (1 if first else 3)
    assert contents_of(run) == before


def contents_of(run):
    return {path: path.read_bytes() for path in paths.files_below(run)}


KILLED = """
import os, signal, sys
sys.path.insert(0, ".")
from maskformer.training import checkpoints, train_and_evaluate
from tests.training.tiny import tiny_config
corpus, workdir, when = sys.argv[1:]
write = checkpoints.write_checksums
def kill(folder, step):
    if step != 8 or when == "after checksums":
        write(folder, step)
    if step == 8:
        os.kill(os.getpid(), signal.SIGKILL)
if when != "never":
    checkpoints.write_checksums = kill
train_and_evaluate(tiny_config(corpus), workdir)
"""


def start(corpus, workdir, when="never"):
    command = [sys.executable, "-c", KILLED, str(corpus), str(workdir), when]
    environment = {**os.environ, "MASKFORMER_DISTRIBUTED": "off", "XLA_FLAGS": ""}
    return subprocess.run(command, env=environment, cwd=ROOT, timeout=300).returncode


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    assert start(corpus, workdir) == 0
    return metric_lines(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["before checksums", "after checksums"])
def test_a_run_killed_in_the_middle_of_a_save_ends_with_the_bits_of_one_that_was_not(
    run, bucket, emulator, corpus, undisturbed, when
):
    assert start(corpus, run, when) == -signal.SIGKILL
    held = contents(emulator, bucket[5:])
    assert [name for name in held if name.startswith(f"{run.key}/checkpoints/8/state/")]
    assert f"{run.key}/checkpoints/8/commit_success.txt" not in held
    assert checkpoint_steps(run / "checkpoints") == [4]
    assert start(corpus, run) == 0
    assert metric_lines(run) == undisturbed
    assert max(checkpoint_steps(run / "checkpoints")) == 12


def test_a_card_tells_a_run_in_a_bucket_that_is_complete_from_one_that_is_not(run, corpus):
    from experiments import running

    config = tiny_config(corpus)
    write_config(run, running._stored(config))
    mark = run / "checkpoints" / "12" / "commit_success.txt"
    mark.write_text("")
    assert running.is_complete(config, run)
    mark.unlink()
    assert not running.is_complete(config, run)
