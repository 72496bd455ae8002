"""Whole runs: equal on other devices and after interruption, clean on the step path, loud when something is wrong."""

import contextlib
import dataclasses
import json
import re
import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest

from maskformer import objectives
from maskformer.training import NonFiniteError, Preempted, checkpoints, program, runs, throughput, train_and_evaluate
from maskformer.training.checkpoints import Checkpoints, RunRecord, checkpoint_steps, restore_params
from maskformer.training.experiment import plain
from maskformer.training.lock import Lock, LockError
from maskformer.training.loop import starting_state
from maskformer.training.sections import CheckpointConfig, EvaluationConfig
from maskformer.training.workdir import check_same_run
from tests.training.tiny import metric_lines, tiny_config

# One run's sums on another layout differ by the order of additions only.
CLOSE = dict(rtol=2e-4, atol=2e-5)


@pytest.fixture(scope="module")
def reference(corpus, first_device, tmp_path_factory):
    """An uninterrupted run on one device."""
    workdir = tmp_path_factory.mktemp("reference")
    with first_device():
        results = train_and_evaluate(tiny_config(corpus), workdir)
    return workdir, results


def numbers(lines, *names):
    return np.array([[line[name] for name in names] for line in lines if names[0] in line])


def test_a_run_learns_and_leaves_its_records(reference):
    workdir, results = reference
    lines = metric_lines(workdir)
    losses = numbers(lines, "train/loss")[:, 0]
    assert losses[-1] < losses[0]
    assert [line["step"] for line in lines if "train/loss" in line] == [3, 6, 9, 12]
    assert [line["step"] for line in lines if "validation/loss" in line] == [6, 12]
    assert json.loads((workdir / "config.json").read_text())["objective"]["rate"] == 0.2
    assert results["loss"] == lines[-1]["validation/loss"]
    assert 0 < lines[-2]["train/tokens_predicted"] < lines[-2]["train/tokens_seen"]


def test_flops_count_every_copy_of_a_row_and_tokens_seen_count_the_text(corpus, devices, tmp_path):
    last = []
    for copies in (1, 2):
        config = tiny_config(
            corpus, objective__predict_rate=0.2 * copies, train__steps=3, evaluation__every=0, checkpoint__every=0
        )
        train_and_evaluate(config, tmp_path / str(copies))
        last.append(metric_lines(tmp_path / str(copies))[-1])
    assert last[1]["train/tokens_seen"] == last[0]["train/tokens_seen"]
    assert last[1]["train/tokens_predicted"] > 1.9 * last[0]["train/tokens_predicted"]
    assert last[1]["train/flops"] == pytest.approx(2 * last[0]["train/flops"], rel=1e-6)


@pytest.mark.parametrize("kill_at", [5, 10])
def test_a_run_cut_off_without_warning_resumes_to_the_same_bits(
    reference, corpus, devices, tmp_path, monkeypatch, kill_at
):
    """The process dies in the middle: what a kill -9 leaves behind is what had been committed by then."""

    class Killed(BaseException):
        pass

    to_global, calls = program.sharding.to_global, []

    def dying(batch, where):
        calls.append(1)
        if len(calls) > kill_at + 2:  # evaluation batches count too
            raise Killed
        return to_global(batch, where)

    monkeypatch.setattr(program.sharding, "to_global", dying)
    with pytest.raises(Killed):
        train_and_evaluate(tiny_config(corpus), tmp_path)
    monkeypatch.setattr(program.sharding, "to_global", to_global)
    train_and_evaluate(tiny_config(corpus), tmp_path)
    assert metric_lines(tmp_path) == metric_lines(reference[0])


@pytest.mark.parametrize("mesh", [dict(data=8), dict(data=2, fsdp=2, tensor=2), dict(data=2, context=4)])
def test_eight_devices_give_the_losses_of_one(reference, corpus, devices, tmp_path, capfd, mesh):
    devices(8)
    overrides = {f"mesh__{axis}": size for axis, size in mesh.items()}
    train_and_evaluate(tiny_config(corpus, train__steps=6, **overrides), tmp_path)
    names = ("train/loss", "train/grad_norm")
    expected = [line for line in metric_lines(reference[0]) if line["step"] <= 6]
    np.testing.assert_allclose(numbers(metric_lines(tmp_path), *names), numbers(expected, *names), **CLOSE)
    np.testing.assert_allclose(
        numbers(metric_lines(tmp_path), "validation/loss"), numbers(expected, "validation/loss"), **CLOSE
    )
    # XLA's complaint when an array must be gathered whole because two shardings do not meet.
    assert "Involuntary full rematerialization" not in capfd.readouterr().err


def test_accumulated_parts_give_the_update_of_the_whole_batch_under_uneven_masking(corpus, devices, tmp_path):
    still = dict(model__hidden_dropout=0.0, model__attention_dropout=0.0, train__steps=4, evaluation__every=0)
    for parts in (1, 4):
        train_and_evaluate(
            tiny_config(corpus, train__accumulation_steps=parts, **still), tmp_path / str(parts)
        )
    names = ("train/loss", "train/grad_norm", "train/tokens_predicted")
    np.testing.assert_allclose(
        numbers(metric_lines(tmp_path / "4"), *names), numbers(metric_lines(tmp_path / "1"), *names), rtol=1e-5
    )


def test_a_checkpoint_of_eight_devices_resumes_on_one(reference, corpus, devices, tmp_path):
    devices(8)
    train_and_evaluate(tiny_config(corpus, mesh__data=2, mesh__fsdp=4, train__steps=6), tmp_path)
    devices(1)
    train_and_evaluate(tiny_config(corpus), tmp_path)
    names = ("train/loss", "train/grad_norm", "train/tokens_predicted")
    np.testing.assert_allclose(
        numbers(metric_lines(tmp_path), *names), numbers(metric_lines(reference[0]), *names), **CLOSE
    )


def test_sigterm_saves_at_the_step_boundary_and_the_same_command_goes_on(
    reference, corpus, devices, tmp_path, monkeypatch
):
    to_global, calls = program.sharding.to_global, []

    def interrupting(batch, where):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return to_global(batch, where)

    monkeypatch.setattr(program.sharding, "to_global", interrupting)
    with pytest.raises(Preempted) as stop:
        train_and_evaluate(tiny_config(corpus), tmp_path)
    assert stop.value.step == 3 and checkpoint_steps(tmp_path / "checkpoints") == [3]
    train_and_evaluate(tiny_config(corpus), tmp_path)
    assert metric_lines(tmp_path) == metric_lines(reference[0])


def test_a_second_training_in_a_workdir_is_refused_and_may_take_it_over(corpus, devices, tmp_path):
    short = tiny_config(corpus, train__steps=2, evaluation__every=0, checkpoint__every=0)
    with Lock(tmp_path):
        with pytest.raises(LockError, match=r"process \d+ on .*--steal"):
            train_and_evaluate(short, tmp_path)
        assert not (tmp_path / "metrics.jsonl").exists()
        train_and_evaluate(short, tmp_path, steal=True)
        assert checkpoint_steps(tmp_path / "checkpoints") == [2]
    train_and_evaluate(short, tmp_path)  # released by all


def test_the_newest_and_the_best_checkpoints_are_kept(reference):
    assert checkpoint_steps(reference[0] / "checkpoints") == [8, 12]


def test_the_best_checkpoint_outlives_a_resume_and_is_the_one_loaded(corpus, devices, tmp_path):
    """With the highest loss as the best, the first evaluation stays the best, and the newest never is."""
    changes = dict(checkpoint__every=2, checkpoint__keep=1, evaluation__every=4, evaluation__mode="max")
    checkpoints = tmp_path / "checkpoints"
    for steps in (8, 10, 14):
        train_and_evaluate(tiny_config(corpus, train__steps=steps, **changes), tmp_path)
        # Step 10 and 14 end the run and are evaluated for that; 6 and 12 are saved without an evaluation.
        assert checkpoint_steps(checkpoints) == [4, steps]
    losses = {line["step"]: line["validation/loss"] for line in metric_lines(tmp_path) if "validation/loss" in line}
    assert max(losses, key=losses.get) == 4 == runs.load(tmp_path).step


@pytest.mark.parametrize("mode, best", [("min", 3), ("max", 2)])
def test_the_best_of_both_modes_is_kept_beside_saves_without_a_metric_and_with_none_that_is_a_number(
    tmp_path, mode, best
):
    state = {"weight": np.arange(4.0, dtype=np.float32)}
    abstract = jax.eval_shape(lambda: jax.tree.map(jax.numpy.asarray, state))
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
        ),
        abstract,
    )
    metrics = {1: None, 2: 3.0, 3: 1.0, 4: 2.0, 5: float("nan"), 6: None}
    for steps in ((1, 2, 3, 4), (5, 6)):
        kept = Checkpoints(tmp_path, CheckpointConfig(keep=2), EvaluationConfig(mode=mode))
        for step in steps:
            saved = {"params": jax.tree.map(lambda leaf, step=step: jax.numpy.asarray(leaf) * step, state)}
            kept.save(step, saved, RunRecord(), metrics[step])
        kept.close()
    assert checkpoint_steps(tmp_path / "checkpoints") == [best, 5, 6]
    params, step = restore_params(tmp_path, abstract)
    assert step == best
    np.testing.assert_array_equal(params["weight"], best * state["weight"])
    assert restore_params(tmp_path, abstract, "latest")[1] == 6


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(
    reference, corpus, devices, tmp_path, caplog
):
    workdir = tmp_path / "run"
    shutil.copytree(reference[0], workdir)
    newest = workdir / "checkpoints" / "12" / "state"
    for file in newest.rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    train_and_evaluate(tiny_config(corpus), workdir)
    assert "checkpoint of step 12" in caplog.text and "damaged" in caplog.text
    assert (workdir / "damaged-12").is_dir()
    assert metric_lines(workdir) == metric_lines(reference[0])


def test_another_models_checkpoint_is_refused_by_name_and_nothing_is_set_aside(reference, corpus, devices, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(reference[0], workdir)
    (workdir / "config.json").unlink()
    with pytest.raises(RuntimeError, match="has shape .* and the config asks for"):
        train_and_evaluate(tiny_config(corpus, model__width=64), workdir)
    assert checkpoint_steps(workdir / "checkpoints") == [8, 12]


def test_a_workdir_is_not_continued_with_another_mask_objective_or_seed(reference, corpus, devices, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(reference[0], workdir)
    before = (workdir / "config.json").read_text()
    for change, named in (
        (dict(model__mask="causal"), "model.mask='causal': the run in .* has 'everything'; use a new --workdir"),
        (dict(objective__rate=0.4), "objective.rate=0.4: the run in .* has 0.2"),
        (dict(seed=1), "seed=1: the run in .* has 0"),
    ):
        with pytest.raises(ValueError, match=named):
            train_and_evaluate(tiny_config(corpus, **change), workdir)
    assert (workdir / "config.json").read_text() == before


def test_a_run_from_before_a_key_existed_and_a_schedule_by_step_are_continued(corpus, tmp_path):
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    config = tiny_config(corpus, objective__rate={"schedule": "step", "values": {0: 0.3, 10: 0.15}})
    objective = program.resolve(config).create_objective(objectives.Vocabulary(100, pad=0, mask=4))
    assert objective.rate(10) == np.float32(0.15)
    older = plain(config)
    for key in ("embedding_width", "generator"):
        del older["model"][key]
    (tmp_path / "config.json").write_text(json.dumps(older))
    check_same_run(plain(config), tmp_path)
    config = tiny_config(corpus, objective__rate={"schedule": "step", "values": {0: 0.3, 11: 0.15}})
    with pytest.raises(ValueError, match="objective.rate=.*'11'.*: the run in .* has .*'10'"):
        check_same_run(plain(config), tmp_path)


def test_a_complete_run_says_its_result_again_and_adds_nothing(reference, corpus, devices, tmp_path, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(reference[0], workdir)
    again = train_and_evaluate(tiny_config(corpus), workdir)
    assert again == reference[1]
    assert metric_lines(workdir) == metric_lines(reference[0])
    assert "nothing to do: step 12 of 12 is reached; --config.train.steps=24 goes on" in caplog.text


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(corpus, devices, tmp_path):
    # Each step multiplies the parameters by 1 - 999 * 999.
    config = tiny_config(
        corpus, optimizer__name="sgd", optimizer__learning_rate=999.0, optimizer__weight_decay=999.0,
        evaluation__every=0, checkpoint__every=0,
    )
    with pytest.raises(NonFiniteError, match=r"train/(loss|grad_norm) is NaN or infinite at step \d+; the last good"):
        train_and_evaluate(config, tmp_path)
    assert checkpoint_steps(tmp_path / "checkpoints") == []


def test_the_checkpoint_that_an_error_names_is_the_one_on_its_way_to_the_disk(
    corpus, devices, tmp_path, monkeypatch, quick_compilation
):
    write = checkpoints.write_checksums

    def slowly(folder, step):
        time.sleep(0.5)
        write(folder, step)

    monkeypatch.setattr(checkpoints, "write_checksums", slowly)
    config = tiny_config(
        corpus, optimizer__name="sgd", optimizer__learning_rate=999.0, optimizer__weight_decay=999.0,
        optimizer__warmup_steps=0, evaluation__every=0, checkpoint__every=1,
    )
    with pytest.raises(NonFiniteError) as stopped:
        train_and_evaluate(config, tmp_path)
    bad, good = re.search(r"at step (\d+); the last good checkpoint is .*/(\d+);", str(stopped.value)).groups()
    assert int(good) == int(bad) - 1


def test_training_stops_early_when_the_metric_does_not_improve_and_stays_stopped(corpus, devices, tmp_path):
    config = tiny_config(
        corpus, evaluation__every=2, evaluation__patience=2, evaluation__min_improvement=100.0, checkpoint__every=0
    )
    train_and_evaluate(config, tmp_path)
    assert checkpoint_steps(tmp_path / "checkpoints") == [6]
    before = metric_lines(tmp_path)
    train_and_evaluate(config, tmp_path)
    assert metric_lines(tmp_path) == before


def test_init_from_takes_the_parameters_and_resume_takes_everything(reference, corpus, devices, tmp_path):
    constant = dict(train__log_every=1)
    # With master weights, the copy that is trained comes from there as well: the second step has not forgotten.
    narrow = dict(model__param_dtype="bfloat16", optimizer__master_weights=True, train__steps=2)
    fresh = tiny_config(corpus, train__init_from=str(reference[0]), **constant, **narrow)
    train_and_evaluate(fresh, tmp_path / "fresh")
    losses = [line["train/loss"] for line in metric_lines(tmp_path / "fresh") if "train/loss" in line]
    assert len(losses) == 2 and max(losses) < metric_lines(reference[0])[0]["train/loss"]
    further = tiny_config(corpus, train__resume=str(reference[0]), train__steps=14, **constant)
    train_and_evaluate(further, tmp_path / "further")
    assert metric_lines(tmp_path / "further")[0]["step"] == 13


def test_parameters_that_begin_with_an_average_are_its_rounding(corpus, devices, tmp_path, quick_compilation):
    narrow = dict(model__param_dtype="bfloat16", optimizer__ema_decay=0.9)
    config = tiny_config(corpus, train__init_from=str(tmp_path), **narrow)
    placed = program.Program.of(config).on()
    mean = jax.tree.map(lambda leaf: jax.numpy.full(leaf.shape, 1.003), placed.params)
    with contextlib.closing(Checkpoints(tmp_path, CheckpointConfig(), EvaluationConfig())) as kept:
        kept.save(1, {"params": mean, "ema": mean}, RunRecord(), None)
        kept.wait()
        np.testing.assert_array_equal(jax.tree.leaves(restore_params(tmp_path, placed.params)[0])[0], np.float32(1.003))
    state, _ = starting_state(placed, Checkpoints(tmp_path / "new", CheckpointConfig(), EvaluationConfig()))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.ema)} == {"float32"}
    for mean, param in zip(*map(jax.tree.leaves, (state.ema, state.params)), strict=True):
        np.testing.assert_array_equal(mean, param.astype("float32"))
    assert float(mean.max()) == 1.0


def test_the_moving_average_is_evaluated_and_survives_a_restart(corpus, devices, tmp_path):
    averaged = dict(optimizer__ema_decay=0.9)
    train_and_evaluate(tiny_config(corpus, train__steps=8, **averaged), tmp_path / "a")
    train_and_evaluate(tiny_config(corpus, **averaged), tmp_path / "a")
    train_and_evaluate(tiny_config(corpus, **averaged), tmp_path / "b")
    last = [line for line in metric_lines(tmp_path / "a") if line["step"] == 12]
    assert last == [line for line in metric_lines(tmp_path / "b") if line["step"] == 12]


def test_one_run_compiles_its_step_once(corpus, devices, tmp_path, compiled_steps):
    train_and_evaluate(tiny_config(corpus), tmp_path)
    assert [step._cache_size() for step in compiled_steps] == [1]


def test_evaluations_and_saves_are_no_part_of_a_windows_time(corpus, devices, tmp_path, monkeypatch, quick_compilation):
    done = []

    def note(owner, name):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, **named: done.append(name) or original(*given, **named))

    for name in ("pause", "resume", "rates"):
        note(throughput.Clock, name)
    note(program.Placed, "evaluate")
    note(Checkpoints, "save")
    rhythm = dict(train__steps=4, train__log_every=2, evaluation__every=3, checkpoint__every=1)
    train_and_evaluate(tiny_config(corpus, **rhythm), tmp_path)
    saved = ["pause", "save", "resume"]
    evaluated = ["pause", "evaluate", "save", "resume"]
    assert done == [*saved, "rates", *saved, *evaluated, "rates", *evaluated]


def test_nothing_is_read_back_from_the_device_between_log_lines(corpus, devices, tmp_path, monkeypatch):
    """Every read of a value goes through an array's `_value`; between log lines there is none."""
    reads, steps = [], []
    array_type = type(jax.numpy.zeros(1))
    value = array_type._value

    def counting(self):
        reads.append(len(steps))
        return value.fget(self)

    to_global = program.sharding.to_global
    monkeypatch.setattr(program.sharding, "to_global", lambda *args: (steps.append(1), to_global(*args))[1])
    monkeypatch.setattr(array_type, "_value", property(counting))
    with jax.transfer_guard_device_to_host("log"):
        train_and_evaluate(
            tiny_config(corpus, train__log_every=6, evaluation__every=0, checkpoint__every=0), tmp_path
        )
    # Tracing the first step reads constants. After that the window of step 6 is read once it is ready, which may be at
    # once, and no other step is waited for.
    during = {read for read in reads if 1 < read < 12}
    assert reads and all(read >= 6 for read in during)


def test_bad_workdirs_and_batches_are_one_line_errors(corpus, devices, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(ValueError, match="cannot be written to"):
        train_and_evaluate(tiny_config(corpus), blocked / "run")
    devices(8)
    with pytest.raises(ValueError, match="batch_size=12: does not divide over mesh data x fsdp x expert = 8"):
        train_and_evaluate(tiny_config(corpus, train__batch_size=12, mesh__data=8), tmp_path)


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(train__resume="/no/such/run"), "train.resume='/no/such/run': no checkpoint in"),
        (dict(train__init_from="/no/such/run"), "train.init_from='/no/such/run': no checkpoint in"),
        (dict(writers__wandb_project="mine"), "writers.wandb_project='mine': wandb is not installed"),
    ],
)
def test_what_a_run_needs_and_is_not_there_is_missed_before_data_and_devices(
    changes, said, corpus, tmp_path, monkeypatch
):
    def late(*_):
        raise AssertionError("too late")

    monkeypatch.setattr(program.Program, "prepare_data", late)
    monkeypatch.setattr(program.Program, "on", late)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=said):
        train_and_evaluate(tiny_config(corpus, **changes), tmp_path)


def test_the_record_survives_json():
    record = RunRecord(next_example=7, best=0.5)
    assert RunRecord(**json.loads(json.dumps(dataclasses.asdict(record)))) == record
