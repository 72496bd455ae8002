"""These tests compile a hundred small programs and run each a few times, so they ask XLA for less optimisation."""

import jax
import pytest


@pytest.fixture(autouse=True)
def quick_compilation():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
