"""Signals in the middle of an evaluation or a save: nothing is lost, and nothing is recorded twice."""

import contextlib
import signal

import pytest

from maskformer.training import Preempted, checksums, program, train_and_evaluate
from maskformer.training.checkpoints import Checkpoints
from maskformer.training.record import read_record
from maskformer.training.scores import read_score
from tests.training.tiny import metric_lines, tiny_config

# Evaluations of several batches, after steps 2 and 4; the last is the better one.
CHANGES = dict(train__steps=4, train__log_every=2, evaluation__every=2, evaluation__batch_size=2, checkpoint__every=2)


def outcome(workdir):
    """The metrics of a run, and the scores of its checkpoints."""
    folders = (workdir / "checkpoints").iterdir()
    return metric_lines(workdir), {folder.name: read_score(folder) for folder in folders}


@pytest.fixture(scope="module")
def undisturbed(corpus, first_device, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    with first_device():
        train_and_evaluate(tiny_config(corpus, **CHANGES), workdir)
    return outcome(workdir)


@pytest.fixture
def batches(monkeypatch):
    """A function that sends SIGTERM as the batch of this number is placed, of training and evaluation together."""
    place, seen, moments = program.sharding.to_global, [], []

    def placing(batch, where):
        seen.append(1)
        if len(seen) in moments:
            signal.raise_signal(signal.SIGTERM)
        return place(batch, where)

    monkeypatch.setattr(program.sharding, "to_global", placing)

    def interrupt(*numbers):
        seen.clear()
        moments[:] = numbers

    return interrupt


# Two steps, then the evaluation: batch 2 is the step before it.
@pytest.mark.parametrize("batch", [2, 3, 4])
def test_an_evaluation_is_stopped_at_once_and_made_again_by_the_run_that_goes_on(
    batch, undisturbed, corpus, devices, tmp_path, batches
):
    batches(batch)
    with pytest.raises(Preempted) as stop:
        train_and_evaluate(tiny_config(corpus, **CHANGES), tmp_path)
    lines, scores = outcome(tmp_path)
    assert stop.value.step == 2 and list(scores) == ["2"]
    assert [line["step"] for line in lines] == [2] and "train/loss" in lines[0]
    # Stopped again while it makes up for it.
    batches(2)
    with pytest.raises(Preempted) as stop:
        train_and_evaluate(tiny_config(corpus, **CHANGES), tmp_path)
    assert stop.value.step == 2 and outcome(tmp_path) == (lines, scores)
    batches()
    train_and_evaluate(tiny_config(corpus, **CHANGES), tmp_path)
    assert outcome(tmp_path) == undisturbed


def test_the_last_evaluation_is_made_up_for_and_not_twice(undisturbed, corpus, devices, tmp_path, batches):
    train_and_evaluate(tiny_config(corpus, **CHANGES | dict(train__steps=3)), tmp_path)
    batches(2)  # one step, and then the first batch
    with pytest.raises(Preempted) as stop:
        train_and_evaluate(tiny_config(corpus, **CHANGES), tmp_path)
    assert stop.value.step == 4
    batches()
    for _ in range(2):
        results = train_and_evaluate(tiny_config(corpus, **CHANGES), tmp_path)
        lines, scores = outcome(tmp_path)
        assert [line["step"] for line in lines] == [2, 2, 3, 3, 4, 4]
        assert lines[-1]["validation/loss"] == results["loss"] == undisturbed[0][-1]["validation/loss"]
        assert scores["4"] == undisturbed[1]["4"]
        assert not read_record(tmp_path / "checkpoints" / "4" / "record" / "metadata", 4).evaluation_due


def test_a_run_that_resumes_another_one_in_its_stopped_evaluation_makes_up_for_it_and_leaves_the_other_alone(
    undisturbed, corpus, devices, tmp_path, batches
):
    batches(3)
    with pytest.raises(Preempted):
        train_and_evaluate(tiny_config(corpus, **CHANGES), tmp_path / "stopped")
    batches()
    before = outcome(tmp_path / "stopped")
    train_and_evaluate(tiny_config(corpus, **CHANGES, train__resume=str(tmp_path / "stopped")), tmp_path / "run")
    lines, scores = outcome(tmp_path / "run")
    assert lines == undisturbed[0][1:] and scores == {"4": undisturbed[1]["4"]}
    assert outcome(tmp_path / "stopped") == before


@pytest.mark.parametrize("before", [False, True])
def test_a_kill_while_the_checkpoint_is_completed_leaves_one_that_is_whole(
    before, undisturbed, corpus, devices, tmp_path, batches, monkeypatch
):
    batches(3)
    with pytest.raises(Preempted):
        train_and_evaluate(tiny_config(corpus, **CHANGES), tmp_path)
    batches()
    complete = Checkpoints.complete

    def killed(*arguments):
        if not before:
            complete(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Checkpoints, "complete", killed)
        train_and_evaluate(tiny_config(corpus, **CHANGES), tmp_path)
    assert len(metric_lines(tmp_path)) == 2
    train_and_evaluate(tiny_config(corpus, **CHANGES), tmp_path)
    assert outcome(tmp_path) == undisturbed


@pytest.mark.parametrize("written", range(5))
def test_a_checkpoint_is_whole_at_every_moment_while_its_small_files_are_replaced(written, tmp_path, monkeypatch):
    for name in ("record/metadata", "metrics/metrics", "state/array"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    checksums.write_checksums(tmp_path, 7)
    replace, left = checksums.replace_text, [None] * written

    def replacing(*arguments):
        left.pop()
        replace(*arguments)

    monkeypatch.setattr(checksums, "replace_text", replacing)
    with contextlib.suppress(IndexError):
        checksums.replace_files(tmp_path, 7, {"record/metadata": "new", "metrics/metrics": "newer"})
    assert checksums.verify(tmp_path, 7)
    assert [(tmp_path / name).read_text() for name in ("record/metadata", "metrics/metrics")] == [
        "new" if written > 1 else "record/metadata", "newer" if written > 2 else "metrics/metrics",
    ]  # fmt: skip
    if written >= 4:
        (tmp_path / "metrics" / "metrics").write_text("damaged")
        with pytest.raises(checksums.DamageError, match="metrics/metrics"):
            checksums.verify(tmp_path, 7)
        (tmp_path / "metrics" / "metrics").write_text("newer")
    (tmp_path / "state" / "array").write_text("damaged")
    with pytest.raises(checksums.DamageError, match="state/array"):
        checksums.verify(tmp_path, 7)


def test_a_signal_during_a_save_stops_at_that_very_step(undisturbed, corpus, devices, tmp_path, monkeypatch):
    save = Checkpoints.save

    def saving(self, step, *arguments):
        signal.raise_signal(signal.SIGTERM)
        save(self, step, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", saving)
        with pytest.raises(Preempted) as stop:
            train_and_evaluate(tiny_config(corpus, **CHANGES), tmp_path)
        assert stop.value.step == 2 and set(outcome(tmp_path)[1]) == {"2"}
        # During the last one the run is complete.
        train_and_evaluate(tiny_config(corpus, **CHANGES), tmp_path)
    assert outcome(tmp_path) == undisturbed
