"""Where the numbers go: the line that a terminal shows while a run trains, and the files it leaves."""

import contextlib
import io
import json
import struct

import pytest
import rich.console
from tensorboardX.proto import event_pb2

from maskformer import models, objectives
from maskformer.training import progress as progress_display
from maskformer.training import tasks, writers
from maskformer.training.progress import Progress
from maskformer.training.workdir import RunError

FAST = dict(loss=10.12345, accuracy=0.12345, tokens_per_second=123456.7, tflops_per_second=123.4, mfu=0.4123)
ENCODER = models.EncoderConfig(vocab_size=20, layers=1, width=8, heads=1)
TASK = tasks.create(
    {},
    objectives.create("electra", objectives.Vocabulary(size=20, pad=0, mask=1), 8),
    models.with_generator(ENCODER, models.GeneratorConfig()),
)
SLOW = {name: value for name, value in FAST.items() if name != "mfu"}


@pytest.mark.parametrize(
    "metrics, shown",
    [
        (FAST, "loss 10.1235 acc 12.35% 123,457 tok/s MFU 41.2%"),
        (SLOW, "loss 10.1235 acc 12.35% 123,457 tok/s"),
        ({**FAST, "discriminator_loss": 0.41234}, "loss 10.1235 disc 0.4123 123,457 tok/s MFU 41.2%"),
    ],
)
def test_the_live_line_fits_eighty_columns_whole(metrics, shown, monkeypatch):
    screen = io.StringIO()
    console = rich.console.Console(file=screen, force_terminal=True, width=80, color_system=None, soft_wrap=True)
    monkeypatch.setattr(progress_display.rich.console, "Console", lambda **options: console)
    progress = Progress(50_000, 0, live=True)
    progress.train(12_345, TASK.describe(metrics), metrics)
    progress._bar.refresh()
    progress.close()
    lines = [line.removeprefix("\x1b[2K") for line in screen.getvalue().replace("\r", "\n").split("\n")]
    last = [line for line in lines if "loss" in line][-1]
    assert len(last) <= 80 and last.startswith("step 12345/50000 ") and shown in last
    assert last.rstrip().endswith("eta -:--:--"), last


def test_a_line_that_is_not_on_a_terminal_counts_the_time_left_from_the_first_line(capsys, monkeypatch):
    # The first 50 steps hold the compilation: a minute that says nothing of the 100 after them.
    times = iter([60.0, 70.0])
    monkeypatch.setattr(progress_display.time, "monotonic", lambda: next(times))
    progress = Progress(200, 0, live=True)
    progress.train(50, TASK.describe(SLOW), SLOW)
    progress.train(100, TASK.describe(SLOW), SLOW)
    progress.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 50/200  loss 10.1235 acc 12.35% 123,457 tok/s 123.400 TFLOP/s"
    assert second == first.replace("50/", "100/") + "  eta 0:20"


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("folder", ["runs/[/x]", "runs/[lr=1]", "runs/[red]a[/red]", "runs/:bug:", "runs/[link"])
def test_a_name_is_shown_as_it_is_whatever_a_markup_would_make_of_it(folder, terminal, monkeypatch):
    screen = io.StringIO()
    make = rich.console.Console
    fixed = dict(file=screen, force_terminal=terminal, width=80, color_system=None)
    monkeypatch.setattr(progress_display.rich.console, "Console", lambda **options: make(**{**options, **fixed}))
    progress = Progress(10, 0, live=True)
    progress.line(f"from step 0 of 10 in {folder}")
    progress.train(5, f"loss {folder} 1.0", {})
    progress.close()
    shown = screen.getvalue()
    assert f"in {folder}" in shown and f"loss {folder} 1.0" in shown


def events(folder):
    """(step, session start, {tag: value}) of each TensorBoard event, in the order of the files."""
    found = []
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            starts = event.HasField("session_log") and event.session_log.status == event_pb2.SessionLog.START
            found.append((event.step, starts, {value.tag: value.simple_value for value in event.summary.value}))
    return found


def displayed(folder):
    """Points as TensorBoard shows them: a session start at a step purges what was at that step or later."""
    points = []
    for step, starts, values in events(folder):
        if starts:
            points = [point for point in points if point[0] < step]
        points += [(step, tag, value) for tag, value in values.items()]
    return points


@pytest.mark.parametrize("resume_step, kept", [(0, []), (2, [(1, "train/loss", 9.0), (2, "train/loss", 9.0)])])
def test_points_that_a_restarted_run_writes_again_are_shown_once(tmp_path, resume_step, kept):
    for start, loss in ((0, 9.0), (resume_step, 1.0)):
        writer = writers.TensorBoardWriter(tmp_path, start)
        for step in range(start + 1, 4):
            writer.write(step, {"train/loss": loss})
        writer.close()
    assert displayed(tmp_path) == kept + [(step, "train/loss", 1.0) for step in range(resume_step + 1, 4)]


def test_a_resumed_run_keeps_the_lines_after_damage_and_drops_those_after_its_checkpoint(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    texts = [json.dumps({"step": step, "train/loss": 0.5}) for step in (1, 2, 3, 4, 5)]
    damaged = [*texts[:2], "\0\0", '{"step": 2, "tr', "7", "[]", *texts[2:], '{"step": 6, "t']
    path.write_bytes("\n".join(damaged).encode())
    writer = writers.JsonlWriter(path, 4)
    writer.write(5, {"train/loss": 0.25})
    writer.close()
    assert path.read_text().splitlines() == [*texts[:4], json.dumps({"step": 5, "train/loss": 0.25})]
    assert "damaged at line 3, 4, 5 and 1 more" in caplog.text


@pytest.mark.parametrize("kind", [writers.JsonlWriter, writers.TensorBoardWriter])
def test_a_disk_that_is_full_stops_the_run_in_one_line(kind, tmp_path):
    writer = kind(tmp_path / "metrics.jsonl" if kind is writers.JsonlWriter else tmp_path, 0)
    # /dev/full answers every write with "No space left on device".
    full = open("/dev/full", "wb" if kind is writers.TensorBoardWriter else "w")
    if kind is writers.TensorBoardWriter:
        writer._file._py_recordio_writer._writer = full
    else:
        writer._file._file = full
    with pytest.raises(RunError, match=r"cannot be written \(No space left on device\); free some space") as failure:
        for step in range(1, 5):
            writer.write(step, {f"train/{name}": 0.5 for name in range(2000)})
            writer.flush()
    assert "\n" not in str(failure.value)
    # What is left in the buffer has nowhere to go.
    with contextlib.suppress(OSError):
        full.close()


def test_the_id_of_a_run_at_weights_and_biases_is_kept_and_a_damaged_one_is_named(tmp_path):
    first = writers.wandb_id(tmp_path)
    assert writers.wandb_id(tmp_path) == first and len(first) == 32
    for damage in (b"", b"\0\0", b"\xff", b"two words", b"x" * 500):
        (tmp_path / "wandb_id").write_bytes(damage)
        with pytest.raises(ValueError, match="wandb_id: expected the id of a Weights & Biases run, got .*; write"):
            writers.wandb_id(tmp_path)
