"""The folder of a run: refused where it cannot be one, the same run or a refusal, and files that are damaged."""

import json
import logging
import os
import pathlib
import random

import pytest

from maskformer.training import default_config, workdir
from maskformer.training.experiment import plain
from maskformer.training.sections import TrainConfig

CONFIG = plain(default_config())
LINES = [{"step": step, "train/loss": 1.0 / step} for step in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    "name, said",
    [
        ("", "workdir='': expected a folder; '.' is the current one"),
        ("gz://bucket/run", "workdir='gz://bucket/run': unknown address; did you mean 'gs://'"),
        ("memory://run", "checkpoints are kept in gs:// or on a file system, and not in memory://; mount it"),
        (pathlib.Path("gz://bucket/run"), "unknown address; did you mean 'gs://'"),
        ("two\nlines\0", r"workdir='two\\nlines\\x00': cannot be written to \(embedded null byte\)"),
        ("/proc/nothing", "cannot be written to"),
    ],
)
def test_what_is_no_folder_is_refused_in_one_line_and_nothing_is_made(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said) as refusal:
        workdir.prepare_workdir(name)
    assert "\n" not in str(refusal.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [".", "run", "a:b/run", "c:/run", "-x", "größe"])
def test_other_names_are_folders(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert workdir.prepare_workdir(name) == (tmp_path / name).absolute() and (tmp_path / name).is_dir()
    assert not list((tmp_path / name).glob(".*"))


def test_processes_of_two_hosts_with_one_number_start_in_a_folder_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    touch, others = pathlib.Path.touch, iter([tmp_path])

    def touch_and_be_overtaken(path):
        touch(path)
        for folder in others:
            workdir.prepare_workdir(folder)

    monkeypatch.setattr(pathlib.Path, "touch", touch_and_be_overtaken)
    assert workdir.prepare_workdir(tmp_path) == tmp_path and not list(tmp_path.iterdir())


def test_what_stands_in_the_place_of_a_runs_files_is_refused_before_training(tmp_path):
    for name, make, said in (
        ("checkpoints", lambda path: path.write_text(""), "checkpoints: is a file, expected a folder"),
        ("checkpoints", lambda path: path.symlink_to(path), "checkpoints: is a link that leads nowhere, expected a"),
        ("config.json", lambda path: path.mkdir(), "config.json: is a folder, expected a file; move it away"),
        ("metrics.jsonl", lambda path: path.mkdir(), "metrics.jsonl: is a folder, expected a file"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        make(folder / name)
        with pytest.raises(ValueError, match=said):
            workdir.prepare_workdir(folder)
    (tmp_path / "large").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "large")
    workdir.prepare_workdir(tmp_path / "run")


@pytest.fixture
def run(tmp_path):
    """A run as `check_same_run` sees it."""
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    workdir.write_config(tmp_path, CONFIG)
    return tmp_path


@pytest.mark.parametrize("field", ["resume", "init_from"])
def test_a_run_that_is_to_begin_with_another_needs_its_checkpoint(field, run, tmp_path_factory):
    nothing = tmp_path_factory.mktemp("nothing")
    (nothing / "file").write_text("")
    for source in (nothing / "absent", nothing / "file", nothing, "two\nlines\0"):
        train = TrainConfig(**{field: str(source)})
        with pytest.raises(ValueError, match=rf"train.{field}='.*': no checkpoint in ") as refusal:
            workdir.check_sources(train, nothing)
        assert "\n" not in str(refusal.value)
        # A run of its own goes on from there, wherever it once began.
        workdir.check_sources(train, run)
    workdir.check_sources(TrainConfig(**{field: str(run)}), nothing)
    workdir.check_sources(TrainConfig(), nothing)


def changed(key, value):
    config = json.loads(json.dumps(CONFIG))
    section, _, leaf = key.rpartition(".")
    (config[section] if section else config)[leaf] = value
    return config


@pytest.mark.parametrize(
    "key, value",
    [
        ("data.prefetch", 3),
        ("data.reader_threads", 7),
        ("data.data_dir", "/elsewhere"),
        ("model.remat", "full"),
        ("model.scan_layers", False),
        ("model.attention_implementation", "reference"),
        ("train.steps", 77),
    ],
)
def test_a_run_goes_on_when_only_how_it_is_computed_changes(run, key, value):
    workdir.check_same_run(changed(key, value), run)


@pytest.mark.parametrize(
    "key, value",
    [
        ("seed", 1),
        ("data.name", "other"),
        ("data.length", 64),
        ("model.layers", 3),
        ("model.compute_dtype", "bfloat16"),
        ("model.hidden_dropout", 0.5),
        ("objective.rate", 0.5),
        ("task.name", "other"),
        ("task.weight", 0.5),
    ],
)
def test_a_run_does_not_go_on_as_another(run, key, value):
    with pytest.raises(ValueError, match=f"{key}={value!r}: the run in .* has .*; use a new --workdir"):
        workdir.check_same_run(changed(key, value), run)


def test_a_run_from_before_a_key_existed_had_its_default(run):
    """Experts, say, came later than many a run that is to go on."""
    old = json.loads(json.dumps(CONFIG))
    later = ("experts", "experts_per_token", "moe_period", "router_softmax", "balance_loss", "router_z_loss")
    for key in later:
        del old["model"][key]
    workdir.write_config(run, old)
    workdir.check_same_run(CONFIG, run)
    with pytest.raises(ValueError, match=r"model\.experts=8: the run in .* has 0; use a new --workdir"):
        workdir.check_same_run(changed("model.experts", 8), run)


@pytest.mark.parametrize("before", [None, {}, {"name": None}])
@pytest.mark.parametrize("now", [None, {}, {"name": None}])
def test_no_task_of_its_own_is_the_objectives_however_it_is_written(run, before, now):
    """A config from before there were tasks has no such section."""
    old, new = ({**CONFIG, "task": task} for task in (before, now))
    for config in (old, new):
        if config["task"] is None:
            del config["task"]
    workdir.write_config(run, old)
    workdir.check_same_run(new, run)
    with pytest.raises(ValueError, match="task.name='other': the run in .* has None; use a new --workdir"):
        workdir.check_same_run({**CONFIG, "task": {"name": "other"}}, run)


HALF = {"rate": {"schedule": "linear", "start": 0.1, "end": 0.2, "steps": "50%"}}


@pytest.mark.parametrize(
    "damage, said",
    [
        (b"", "is empty, expected a JSON object"),
        (b"\0" * 50, "line 1 column 1 is not JSON"),
        (b"garbage", "line 1 column 1 is not JSON"),
        (json.dumps(CONFIG, indent=2).encode()[:300], r"line \d+ column \d+ is not JSON"),
        (b'{"seed":\n\n\xff\xfe}', "line 3 is not UTF-8 text"),
        (random.Random(0).randbytes(2000), "line 1 is not UTF-8 text"),
        (b"[1, 2]", r"holds \[1, 2\], expected a JSON object"),
        (b"7", "holds 7, expected"),
        (b"NaN", "holds nan, expected"),
        (b'"text"', "holds 'text', expected"),
        (b"null", "holds None, expected"),
        (b"{}", "has no 'data', expected an object of that name"),
        (b'{"data": 3}', "has data=3, expected an object of that name"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
        (json.dumps(changed("train.steps", "many") | {"objective": HALF}).encode(), "describes no run"),
    ],
    ids=range(16),
)
def test_a_damaged_config_is_one_line_with_file_and_fix(run, damage, said):
    (run / "config.json").write_bytes(damage)
    with pytest.raises(ValueError, match=said) as error:
        workdir.check_same_run(CONFIG, run)
    message = str(error.value)
    assert message.startswith(f"{run / 'config.json'}: ") and "\n" not in message and len(message) < 600
    assert message.endswith(workdir.CONFIG_FIX)


def test_a_config_in_the_encoding_of_an_editor_is_read(run):
    (run / "config.json").write_bytes(b"\xef\xbb\xbf" + (run / "config.json").read_bytes())
    workdir.check_same_run(CONFIG, run)


def test_a_config_that_is_a_folder_or_a_loop_is_one_line_too(tmp_path):
    for make in (pathlib.Path.mkdir, lambda path: path.symlink_to(path)):
        make(tmp_path / "config.json")
        with pytest.raises(ValueError, match="config.json: cannot be read"):
            workdir.read_config(tmp_path)
        os.rename(tmp_path / "config.json", tmp_path / f"aside-{make.__name__}")
    with pytest.raises(ValueError, match="no config.json there; expected the folder of a run"):
        workdir.read_config(tmp_path)


def test_only_folders_named_as_steps_are_checkpoints(tmp_path):
    for name in ("3", "10", "007", "4.orbax-checkpoint-tmp", "x", "\u0663", "\u00b2"):
        (tmp_path / name).mkdir()
    (tmp_path / "5").write_text("")
    (tmp_path / "6").symlink_to(tmp_path / "6")
    assert workdir.checkpoint_steps(tmp_path) == [3, 10] and workdir.stray_steps(tmp_path) == [5, 6]
    assert workdir.checkpoint_steps(tmp_path / "nothing") == []


def metrics_bytes(damage, at=2):
    texts = [json.dumps(line).encode() for line in LINES]
    return b"".join(text + b"\n" for text in [*texts[:at], damage, *texts[at:]])


@pytest.mark.parametrize(
    "damage",
    [
        b"\xff\xfe\x00binary\x80",
        b"\0" * 4096,
        b'{"step": 2, "train/lo',
        b"[1, 2]",
        b"7",
        b"null",
        b'"text"',
        b"{}",
        b'{"step": "2"}',
        b'{"step": 2, "train/loss": "low"}',
        b'{"step": 2, "train/loss": {"a": 1}}',
        b"[" * 100_000,
        b'{"step": ' + b"1" * 5000 + b"}",
    ],
    ids=range(13),
)
def test_the_lines_around_damage_are_read_and_one_warning_says_where_it_is(damage, tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(metrics_bytes(damage))
    with caplog.at_level(logging.WARNING):
        assert workdir.read_metrics(path) == LINES
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: damaged at line 3, which is left out; the other 4 lines are used"
    ]


@pytest.mark.parametrize("damage", [b"\0" * 4096, b'{"step": 2, "train/lo', b"\xff\xfe"])
def test_a_line_that_begins_in_the_middle_of_damage_is_read(damage, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(metrics_bytes(b"").replace(b"\n\n", b"\n" + damage))
    assert workdir.read_metrics(path) == LINES


def test_the_line_that_a_kill_cut_off_is_left_out_without_a_word(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(metrics_bytes(b"", 4).rstrip(b"\n") + b'\n{"step": 5, "train/lo')
    assert workdir.read_metrics(path) == LINES and not caplog.records


def test_metrics_that_are_not_numbers_are_metrics(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "validation/loss": NaN, "train/loss": Infinity}\n')
    assert len(workdir.read_metrics(path)) == 1 and not caplog.records


def test_a_file_that_cannot_be_written_leaves_the_old_one_and_stops_the_run_in_one_line(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    workdir.write_config(tmp_path, {"seed": 0})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workdir.os, "fsync", full)
    with pytest.raises(workdir.RunError, match=r"config.json: cannot be written \(No space left on device\)"):
        workdir.write_config(tmp_path, {"seed": 1})
    assert json.loads(path.read_text()) == {"seed": 0}
