"""These tests compile a hundred small programs and run each a few times."""

import pytest


@pytest.fixture(autouse=True)
def _quickly(quick_compilation):
    """All of them, with less optimisation."""
