"""Rates are of the time that training took, whatever was done between two log lines."""

import types

import jax
import pytest

from maskformer.training import throughput


@pytest.fixture
def clock(monkeypatch):
    """A clock of one FLOP a token, and the hands that move it."""
    time = [100.0]

    def wait(seconds):
        time[0] += seconds

    monkeypatch.setattr(throughput.time, "perf_counter", lambda: time[0])
    return throughput.Clock(1.0, jax.devices()[:1]), wait


def test_the_first_window_has_no_rate_and_the_next_has_that_of_its_time(clock):
    made, wait = clock
    wait(60.0)
    assert made.rates(1000) == {}
    wait(2.0)
    rates = made.rates(1000)
    assert rates["seconds"] == 2.0 and rates["tokens_per_second"] == 500.0 and "mfu" not in rates


def test_an_evaluation_or_a_save_within_a_window_is_left_out_and_the_steps_before_it_are_not(clock):
    made, wait = clock
    made.rates(1000)
    wait(3.0)
    for pause, trained in ((50.0, 1.0), (7.0, 0.0)):
        made.pause()
        wait(pause)
        made.resume()
        wait(trained)
    assert made.rates(1000)["tokens_per_second"] == 250.0
    wait(4.0)
    assert made.rates(1000)["seconds"] == 4.0


def test_a_pause_in_the_first_window_changes_no_later_one(clock):
    made, wait = clock
    made.pause()
    wait(50.0)
    made.resume()
    assert made.rates(1000) == {}
    wait(2.0)
    assert made.rates(1000)["seconds"] == 2.0


@pytest.mark.parametrize("kind, devices, teraflops", [
    # TFLOP/s of a chip, as the vendors' data sheets have it, and how many devices JAX makes of one.
    ("TPU v5 lite", 1, 197), ("TPU v5", 1, 459), ("TPU v6 lite", 1, 918), ("TPU7x", 2, 2307),
    ("NVIDIA H100 80GB HBM3", 1, 989),
])  # fmt: skip
def test_the_peak_of_a_device_is_its_share_of_the_chips(kind, devices, teraflops):
    device = types.SimpleNamespace(device_kind=kind)
    assert devices * throughput.peak_flops(device) == teraflops * 1e12
