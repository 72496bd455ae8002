"""Small tiles, so that tiny sequences have many."""

import pytest

from maskformer.attention import blocks, blockwise_layout


@pytest.fixture
def tiny_tiles(monkeypatch):
    """Tiles of 8 x 8, in bands of up to three: a sequence of 37 has five rows of them."""
    monkeypatch.setattr(blocks, "LIST_COST", {8: 1.0})
    monkeypatch.setattr(blocks, "BAND_COST", {8: 1.0})
    monkeypatch.setattr(blockwise_layout, "BAND", 24)
    monkeypatch.setattr(blockwise_layout, "WIDTHS", (1, 3))
