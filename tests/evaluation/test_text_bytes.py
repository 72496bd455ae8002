"""Bytes behind tokens, against what the tokenizer itself decodes and what the files hold."""

import dataclasses

import numpy as np
import pytest

from maskformer import data, evaluation

TEXTS = {
    # Accents, characters of two to four bytes, quotes, runs of white space, and words that no small vocabulary has.
    "train": "The lady’s café — “naïve” £5, 漢字 and 😀!\n\n  Hello,   world. " * 40,
    "validation": "A short text.",
    "test": "“Café,” said the naïve lady; 漢字 😀 xylophone.\n\nHello   world — and so on. The 😀 lady!",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    for split, text in TEXTS.items():
        (folder / split).mkdir()
        (folder / split / "a.txt").write_text(text, encoding="utf-8")
    (folder / "test" / "b.txt").write_text("Another document, with a lady in it.", encoding="utf-8")
    return folder


KINDS = {
    "wordpiece": {"tokenizer": "wordpiece", "vocabulary_size": 120},
    "cased": {"tokenizer": "wordpiece", "vocabulary_size": 120, "lowercase": False},
    "bpe": {"tokenizer": "bpe", "vocabulary_size": 300},
    "unigram": {"tokenizer": "unigram", "vocabulary_size": 90},
}


def load(corpus, kind, **changes):
    config = data.DataConfig(name=str(corpus), length=32, segment_by="sentence", **{**KINDS[kind], **changes})
    tokenizer = data.load_tokenizer(config)
    return config, tokenizer, data.load_dataset(config, "test", tokenizer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["[CLS]", None])
def test_the_tokens_of_a_segment_have_the_bytes_that_the_tokenizer_decodes(corpus, kind, start):
    _, tokenizer, dataset = load(corpus, kind, start_token=start)
    batch = dataset.rows.read(np.arange(len(dataset)))
    table = evaluation.token_bytes(tokenizer)
    sizes = np.asarray(evaluation.bytes_of_tokens(table, batch["tokens"], batch["segment_ids"], batch["positions"]))
    segments = 0
    for tokens, ids, row in zip(batch["tokens"], batch["segment_ids"], sizes):
        for number in range(1, ids.max() + 1):
            text = tokenizer.decode(tokens[ids == number])
            if "\ufffd" not in text:  # a cut within a character decodes to a mark of another length
                assert row[ids == number].sum() == len(text.encode())
            segments += 1
        assert not row[ids == 0].any()
    assert segments >= 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_split_has_exactly_the_bytes_of_its_files(corpus, kind):
    config, tokenizer, dataset = load(corpus, kind)
    split = evaluation.split_bytes(config, "test", tokenizer)
    assert split.text == sum(file.stat().st_size for file in (corpus / "test").iterdir())
    batch = dataset.rows.read(np.arange(len(dataset)))
    sizes = evaluation.bytes_of_tokens(split.table, batch["tokens"], batch["segment_ids"], batch["positions"])
    assert split.of(float(sizes.sum())) == pytest.approx(split.text, rel=1e-12)


def test_a_byte_level_vocabulary_counts_the_bytes_of_split_characters(corpus):
    _, tokenizer, _ = load(corpus, "bpe")
    text = "xx😀漢yy"
    ((tokens, _),) = tokenizer.encode_texts([text])
    assert len(tokens) > len(text) - 4  # the emoji and the sign are cut into bytes
    table = evaluation.token_bytes(tokenizer)
    assert table[1][tokens].sum() == len(text.encode())


def test_special_tokens_and_unknown_words_stand_for_no_bytes(corpus):
    _, tokenizer, _ = load(corpus, "wordpiece")
    assert not evaluation.token_bytes(tokenizer)[:, list(tokenizer.vocabulary.special_ids)].any()


def test_a_limit_on_training_rows_does_not_change_the_bytes_of_a_token(corpus):
    config, tokenizer, _ = load(corpus, "wordpiece")
    limited = evaluation.split_bytes(dataclasses.replace(config, max_rows=1), "train", tokenizer)
    whole = evaluation.split_bytes(config, "train", tokenizer)
    assert (limited.text, limited.decoded) == (whole.text, whole.decoded)


@pytest.mark.parametrize("letters", ["漢字中國", "привет", "0123", "+-=~"])
def test_a_vocabulary_without_a_latin_letter_has_bytes(tmp_path, letters):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]) + "\n", encoding="utf-8")
    tokenizer = data.load_tokenizer(data.DataConfig(tokenizer=str(path), lowercase=False))
    table = evaluation.token_bytes(tokenizer)
    assert table[0].tolist() == [0] * 5 + [len(c.encode()) for c in letters]
    if letters.isalnum():
        assert table[1].tolist() == [0] * 5 + [len(c.encode()) + 1 for c in letters]  # this decoder writes a space


def test_a_split_has_the_bytes_before_newlines_are_translated(tmp_path):
    written = "a lady\r\n" * 50
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_bytes(written.encode())
    config, tokenizer, _ = load(tmp_path, "bpe")
    assert evaluation.split_bytes(config, "test", tokenizer).text == len(written)
