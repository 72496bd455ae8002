"""The line that a terminal shows while a run trains."""

import io

import pytest
import rich.console

from maskformer import models, objectives
from maskformer.training import progress as progress_display
from maskformer.training import tasks
from maskformer.training.progress import Progress

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
