"""Rows hold every token of the corpus once; batches depend on the seed and the example number alone."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from maskformer.data import DataConfig, DataError, load_dataset, load_tokenizer
from maskformer.data.shuffle import permuted
from maskformer.data.sources import open_source

LENGTH = 24


def config_of(folder, **fields):
    return DataConfig(name=str(folder), vocabulary_size=200, length=LENGTH, **fields)


@pytest.fixture(scope="module")
def dataset(folder):
    config = config_of(folder, segment_by="sentence")
    return load_dataset(config, "train", load_tokenizer(config))


def all_rows(dataset):
    return dataset.rows.read(np.arange(len(dataset)))


def segments_of(batch):
    """`(tokens, positions, word_starts)` of every segment, found by its id alone."""
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            where = batch["segment_ids"][row] == segment
            yield tuple(batch[name][row][where] for name in ("tokens", "positions", "word_starts"))


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("segment_by", ["sentence", "chunk", "document"])
def test_every_corpus_token_appears_exactly_once(folder, segment_by, pack):
    config = config_of(folder, segment_by=segment_by, pack=pack)
    tokenizer = load_tokenizer(config)
    dataset = load_dataset(config, "train", tokenizer)
    # The oracle encodes whole documents with the library alone.
    backend = Backend.from_str(tokenizer._definition)
    expected = Counter()
    for text in open_source(config, "train").documents():
        expected.update(backend.encode(text, add_special_tokens=False).ids)
    batch = all_rows(dataset)
    found = Counter()
    for tokens, _, _ in segments_of(batch):
        assert (tokens[0], tokens[-1]) == (2, 3) and not {0, 2, 3} & set(tokens[1:-1].tolist())
        found.update(tokens[1:-1].tolist())
    assert found == expected
    assert (batch["segment_ids"] > 0).sum() == dataset.tokens_per_epoch == dataset.rows.tokens
    assert dataset.fill == dataset.tokens_per_epoch / (len(dataset) * LENGTH)
    if not pack:
        assert batch["segment_ids"].max() == 1 and len(dataset) == dataset.rows.segments
    elif segment_by == "document":
        assert dataset.fill > 0.95


def test_short_sentences_are_segments_of_their_own_and_long_ones_are_cut_between_words(folder, dataset):
    tokenizer = load_tokenizer(dataset.config)
    texts = Counter(tokenizer.decode(tokens) for tokens, _, _ in segments_of(all_rows(dataset)))
    from maskformer.data.sentences import split_sentences

    for document in open_source(dataset.config, "train").documents():
        for sentence in split_sentences(document):
            tokens, _ = tokenizer.encode_texts([sentence])[0]
            if len(tokens) <= LENGTH - 2:
                assert texts[tokenizer.decode(tokens)] > 0
    for _, _, words in segments_of(all_rows(dataset)):
        assert words[1], "a cut fell inside a word"


def test_positions_restart_in_every_segment_and_padding_is_empty(dataset):
    batch = all_rows(dataset)
    for tokens, positions, _ in segments_of(batch):
        assert positions.tolist() == list(range(len(tokens)))
    padding = batch["segment_ids"] == 0
    assert padding.any()
    assert not batch["tokens"][padding].any() and not batch["positions"][padding].any()
    special = np.isin(batch["tokens"], dataset.vocabulary.ids(["pad", "cls", "sep", "mask"]))
    assert not batch["word_starts"][special].any()


def test_word_starts_number_the_words_of_the_text(folder, dataset):
    words = sum(len(text.replace(".", " .").replace("!", " !").replace("?", " ?").split())
                for text in open_source(dataset.config, "train").documents())  # fmt: skip
    assert all_rows(dataset)["word_starts"].sum() == words == dataset.rows.words


def test_batches_have_the_promised_types_and_shapes(dataset):
    for batch in (next(dataset.train_batches(4, seed=0)), next(dataset.eval_batches(4))):
        assert {name: (str(value.dtype), value.shape) for name, value in batch.items()} == {
            "tokens": ("int32", (4, LENGTH)),
            "segment_ids": ("int32", (4, LENGTH)),
            "positions": ("int32", (4, LENGTH)),
            "word_starts": ("bool", (4, LENGTH)),
            "example_id": ("int32", (4,)),
            "epoch": ("int32", (4,)),
        }


@pytest.mark.parametrize(("start", "end"), [(None, None), ("[CLS]", None), (None, "[SEP]")])
def test_start_and_end_tokens_are_optional(folder, start, end):
    config = config_of(folder, start_token=start, end_token=end)
    dataset = load_dataset(config, "test", load_tokenizer(config))
    for tokens, _, _ in segments_of(all_rows(dataset)):
        assert (2 in tokens, 3 in tokens) == (start is not None, end is not None)


def test_a_start_token_that_the_tokenizer_lacks_is_named(folder):
    config = config_of(folder, start_token="<s>")
    with pytest.raises(DataError, match=r"data.start_token='<s>': .*special tokens are \[PAD\], \[UNK\], \[CLS\]"):
        load_dataset(config, "train", load_tokenizer(config))


def take(batches, count):
    return list(islice(batches, count))


def concatenated(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])


def parts_of(size, processes):
    """Equal runs of a batch's rows, one for each process."""
    return np.split(np.arange(size), processes)


@pytest.mark.parametrize("processes", [2, 3, 6])
def test_training_batches_do_not_depend_on_the_number_of_processes(dataset, processes):
    steps = 2 * len(dataset) // 6 + 3  # past the end of the second epoch
    whole = take(dataset.train_batches(6, seed=5), steps)
    parts = [take(dataset.train_batches(6, 5, rows), steps) for rows in parts_of(6, processes)]
    for step in range(steps):
        assert_same(whole[step], concatenated([part[step] for part in parts]))


def test_a_process_may_read_any_rows_of_a_batch(dataset):
    whole, evaluated = take(dataset.train_batches(8, seed=5), 3), take(dataset.eval_batches(8), 2)
    for rows in ([0, 1, 6, 7], [5], [2, 3, 4]):
        for batch, all_of_it in zip(take(dataset.train_batches(8, 5, np.array(rows)), 3), whole, strict=True):
            assert_same(batch, {name: array[rows] for name, array in all_of_it.items()})
        for batch, all_of_it in zip(take(dataset.eval_batches(8, np.array(rows)), 2), evaluated, strict=True):
            assert_same(batch, {name: array[rows] for name, array in all_of_it.items()})


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**63 - 1), st.integers(0, 40), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]))
def test_a_resumed_stream_goes_on_where_it_stopped_with_any_number_of_processes(dataset, seed, steps, before, after):
    uninterrupted = take(dataset.train_batches(8, seed), steps + 2)[steps:]
    first = [dataset.train_batches(8, seed, rows) for rows in parts_of(8, before)]
    for batches in first:
        take(batches, steps)
    states = [json.loads(json.dumps(batches.get_state())) for batches in first]
    assert states == [{"next_example": 8 * steps}] * before
    start = states[0]["next_example"]
    parts = [take(dataset.train_batches(8, seed, rows, start), 2) for rows in parts_of(8, after)]
    for step in range(2):
        assert_same(uninterrupted[step], concatenated([part[step] for part in parts]))
    rewound = dataset.train_batches(8, seed)
    take(rewound, 3)
    rewound.set_state(states[0])
    assert_same(next(rewound), uninterrupted[0])


def test_the_stream_continues_under_another_batch_size(dataset):
    examples = np.concatenate([b["example_id"] for b in take(dataset.train_batches(4, 1), 6)])
    batches = dataset.train_batches(4, 1)
    take(batches, 3)
    (rest,) = take(dataset.train_batches(12, 1, start_example=batches.get_state()["next_example"]), 1)
    assert rest["example_id"].tolist() == examples[12:].tolist()


def test_every_epoch_visits_every_row_once_in_another_order(dataset):
    size = len(dataset)
    found = concatenated(take(dataset.train_batches(7, seed=3), -(-3 * size // 7)))
    epochs = [found["example_id"][i * size : (i + 1) * size] for i in range(3)]
    for i, rows in enumerate(epochs):
        assert sorted(rows.tolist()) == list(range(size))
        assert (found["epoch"][i * size : (i + 1) * size] == i).all()
    orders = {tuple(rows.tolist()) for rows in epochs}
    orders.add(tuple(concatenated(take(dataset.train_batches(size, seed=4), 1))["example_id"].tolist()))
    orders.add(tuple(range(size)))
    assert len(orders) == 5


def test_an_example_id_always_means_the_same_row(dataset):
    rows = all_rows(dataset)
    batch = concatenated(take(dataset.train_batches(5, seed=9), 8))
    for name in ("tokens", "segment_ids", "positions", "word_starts"):
        np.testing.assert_array_equal(batch[name], rows[name][batch["example_id"]])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_sees_every_row_once_in_full_batches(dataset, processes):
    size = len(dataset)
    batch_size = next(b for b in (8, 12, 16) if size % b)  # the last batch is not full
    parts = [list(dataset.eval_batches(batch_size, rows)) for rows in parts_of(batch_size, processes)]
    assert {len(part) for part in parts} == {-(-size // batch_size)}
    found = [concatenated([part[step] for part in parts]) for step in range(len(parts[0]))]
    assert {len(batch["tokens"]) for batch in found} == {batch_size}
    together = concatenated(found)
    assert together["example_id"].tolist() == [*range(size), *[-1] * (-size % batch_size)]
    empty = together["example_id"] == -1
    assert empty.any() and not together["segment_ids"][empty].any() and not together["word_starts"][empty].any()
    assert (together["segment_ids"][~empty] > 0).any(axis=1).all()
    assert len(list(dataset.eval_batches(batch_size, max_batches=2))) == 2
    assert len(list(dataset.eval_batches(batch_size, max_batches=10_000))) == len(parts[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: d.train_batches(6, 0, np.array([0, 6])), r"rows=\[0, 6\]: expected ascending rows of a batch of 6"),
        (lambda d: d.eval_batches(0), "global_batch_size=0"),
        (lambda d: d.train_batches(4, 0, np.array([1, 1])), r"rows=\[1, 1\]: .* each once"),
        (lambda d: d.eval_batches(4, np.array([], int)), r"rows=\[\]"),
        (lambda d: d.train_batches(4, -1), "seed=-1: expected an integer from 0"),
        (lambda d: d.train_batches(4, 0).set_state({"step": 3}), "iterator state {'step': 3}"),
        (lambda d: d.eval_batches(4, max_batches=0), "max_batches=0"),
    ],
)
def test_a_request_that_cannot_be_met_is_named(dataset, call, message):
    with pytest.raises(DataError, match=message):
        call(dataset)


def test_a_split_without_text_is_an_error(tmp_path, folder):
    (tmp_path / "train.txt").write_text(" \n \n")
    tokenizer = load_tokenizer(config_of(folder))
    with pytest.raises(DataError, match="the train split holds no text"):
        load_dataset(config_of(tmp_path), "train", tokenizer)


@given(st.integers(1, 400), st.integers(0, 2**63 - 1), st.integers(0, 2**40))
def test_the_shuffle_is_a_permutation_for_every_size_seed_and_epoch(size, seed, epoch):
    found = permuted(np.arange(size), size, seed, np.full(size, epoch))
    assert sorted(found.tolist()) == list(range(size))


def test_the_shuffle_is_the_same_in_every_version():
    # A checkpoint's position is only worth something while this holds.
    assert permuted(np.arange(8), 8, 0, np.zeros(8, np.int64)).tolist() == [0, 6, 7, 2, 4, 1, 3, 5]
    huge = permuted(np.array([0, 1]), 10**15, 1, np.array([0, 1]))
    assert huge.tolist() == [448061420396713, 982056455662559]


def test_the_shuffle_leaves_no_trace_of_the_order():
    size = 4000
    places = permuted(np.arange(size), size, 7, np.zeros(size, np.int64))
    other = permuted(np.arange(size), size, 8, np.zeros(size, np.int64))
    for pairs in ((places[:-1], places[1:]), (places, np.arange(size)), (places, other)):
        # Five standard deviations of the correlation of independent orders.
        assert abs(np.corrcoef(*pairs)[0, 1]) < 5 / np.sqrt(size)


def test_a_limited_train_split_is_some_of_its_rows_and_repeats_them(folder, dataset):
    limited = {n: load_dataset(config_of(folder, segment_by="sentence", max_rows=n), "train",
                               load_tokenizer(dataset.config)) for n in (5, 20)}
    texts = {n: [row.tobytes() for row in all_rows(rows)["tokens"]] for n, rows in limited.items()}
    everything = [row.tobytes() for row in all_rows(dataset)["tokens"]]
    assert [len(set(texts[n])) for n in (5, 20)] == [5, 20] and set(texts[20]) < set(everything)
    assert texts[5] == texts[20][:5], "fewer rows are the first of more"
    chosen = sorted(everything.index(text) for text in texts[20])
    assert chosen[0] < len(everything) / 3 and chosen[-1] > 2 * len(everything) / 3, "from all over the split"

    batches = list(islice(limited[5].train_batches(4, seed=1), 5))
    seen = np.concatenate([batch["example_id"] for batch in batches])
    assert all(sorted(seen[i : i + 5]) == list(range(5)) for i in range(0, 20, 5))
    assert np.concatenate([batch["epoch"] for batch in batches]).tolist() == [i // 5 for i in range(20)]
    for batch in batches:
        assert [row.tobytes() for row in batch["tokens"]] == [texts[5][i] for i in batch["example_id"]]


def test_a_limited_train_split_counts_its_own_rows_and_leaves_the_others_alone(folder, dataset):
    config = config_of(folder, segment_by="sentence", max_rows=5)
    tokenizer = load_tokenizer(dataset.config)
    assert load_tokenizer(config).fingerprint == tokenizer.fingerprint
    limited = load_dataset(config, "train", tokenizer)
    batch = all_rows(limited)
    assert limited.tokens_per_epoch == (batch["segment_ids"] > 0).sum() < dataset.tokens_per_epoch
    assert limited.rows.segments == sum(1 for _ in segments_of(batch))
    assert limited.rows.words == batch["word_starts"].sum()
    assert limited.rows.text_tokens == limited.tokens_per_epoch - 2 * limited.rows.segments
    assert limited.fingerprint != dataset.fingerprint
    for fields in ({"max_rows": 5}, {"max_rows": 10**6}):
        config = config_of(folder, segment_by="sentence", **fields)
        for split in ("validation", "test") if fields["max_rows"] == 5 else ("train",):
            whole = load_dataset(config_of(folder, segment_by="sentence"), split, tokenizer)
            assert load_dataset(config, split, tokenizer).fingerprint == whole.fingerprint
