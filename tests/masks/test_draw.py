"""Pictures, in text and as PNG."""

import numpy as np
import pytest

from maskformer import masks


def test_text_picture_has_a_row_for_each_query():
    ids = np.array([[1, 1, 2], [1, 2, 2]])
    assert masks.segments(ids).to_string(3, 3, batch=1) == "█ · ·\n· █ █\n· █ █"


def test_png_shows_matrix_and_block_map(tmp_path):
    path = tmp_path / "mask.png"
    figure = masks.draw(masks.causal() & masks.sliding_window(9), 32, 48, block=8, path=path)
    assert path.read_bytes().startswith(b"\x89PNG") and len(figure.axes) == 2
    assert figure.axes[0].images[0].get_array().shape == (32, 48)
    assert figure.axes[1].images[0].get_array().shape == (4, 6)


def test_a_long_mask_is_drawn_as_its_block_map_alone():
    figure = masks.draw(masks.causal() & masks.sliding_window(4096), 1 << 17, block=2048)
    assert len(figure.axes) == 1
    with pytest.raises(ValueError, match="give block="):
        masks.draw(masks.causal(), 1 << 17)


def test_picture_prints_the_mask_its_tiles_and_their_count(tmp_path):
    text = masks.picture("causal & segments", 8, block=4, path=tmp_path / "m.png", segment_ids=np.arange(8) // 4)
    assert "█ █ · · · · · ·" in text and "· · · · █ █ █ █" in text
    assert "0 full, 2 partial, 2 empty (50.0% skipped); 20 of 64 pairs attend" in text
    assert (tmp_path / "m.png").exists()


def test_picture_says_which_arrays_it_made_up():
    assert "with an example segment_ids = [1, 1, 1, 2, 2, 3, 3, 3]" in masks.picture("segments", 8)
    with pytest.raises(ValueError, match="needs the array 'adjacency'"):
        masks.picture("dense(adjacency)", 8)


def test_picture_shows_each_head_of_a_mask_that_differs_between_them():
    text = masks.picture("per_head(causal, ~causal)", 2, block=2)
    assert text.count("1 partial") == 2
    first, second = text.split("head 1 of 2:")
    assert "head 0 of 2:\n\n█ ·\n█ █" in first and second.startswith("\n\n· █\n· ·")
    title = masks.draw(masks.parse("per_head(causal, ~causal)"), 4, head=1).get_suptitle()
    assert title == "per_head(causal, ~causal) (head 1 of 2)"


def test_a_long_example_is_printed_by_its_ends():
    text = masks.picture("segments", 5000, block=1000)
    assert "[1, 1, 1, ..., 0, 0, 0]" in text and len(text) < 1000


def test_a_picture_in_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        masks.draw(masks.causal(), 4, path=tmp_path / "absent" / "mask.png")


def test_picture_of_a_long_mask_prints_only_tiles():
    text = masks.picture("causal & window(4096)", 1 << 17, block=1 << 14)
    assert len(text.splitlines()) == 12 and "pairs attend" not in text


def test_a_picture_gives_ones_own_mask_arrays_with_a_batch_dimension_as_a_model_does():
    @masks.builder(ids="segment_ids")
    def same_id_of_batch(ids):
        return masks.predicate(lambda q, k, ids: ids[q] == ids[k], ids, batch_dims=1)

    assert masks.picture("same_id_of_batch", 8).splitlines()[-1] == masks.picture("segments", 8).splitlines()[-1]
