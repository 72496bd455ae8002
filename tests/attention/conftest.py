"""Small tiles, so that tiny sequences have many."""

import pytest

from maskformer.attention import blocks


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Tiles of 8 x 8: a sequence of 37 has five rows of them."""
    monkeypatch.setattr(blocks, "COST", {8: 1.0})
