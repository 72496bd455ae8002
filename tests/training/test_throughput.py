"""Rates are of the time that training took, whatever was done between two log lines."""

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
