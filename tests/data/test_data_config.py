"""Errors of the configuration name the field, its value and the way out, before any data is touched."""

import pytest

from maskformer.data import DataConfig, DataError


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(segment_by="sentense"), "data.segment_by='sentense': .* did you mean 'sentence'"),
        (dict(tokenizer="wordpeice"), "data.tokenizer='wordpeice': .* did you mean 'wordpiece'"),
        (dict(length=2), "data.length=2: expected 3 to 65535"),
        (dict(length=70_000), "data.length=70000: expected 3 to 65535"),
        (dict(length="128"), "data.length='128': expected int, got str"),
        (dict(length=True), "data.length=True: expected int, got bool"),
        (dict(pack=1), "data.pack=1: expected bool, got int"),
        (dict(vocabulary_size=100, tokenizer="bpe"), "data.vocabulary_size=100: expected at least 261"),
        (dict(vocabulary_size=100, tokenizer="a/tokenizer.json"), "data.vocabulary_size=100: .* fixes it"),
        (dict(lowercase=True, tokenizer="a/tokenizer.json"), "data.lowercase=True: .* its own normalizer"),
        (dict(sentinels=5, tokenizer="a/vocab.txt"), "data.sentinels=5"),
        (dict(sentinels=-1), "data.sentinels=-1: expected at least 0"),
        (dict(data_dir="/data"), "data.data_dir='/data': only 'tfds:' datasets"),
        (dict(start_token=""), "data.start_token=''"),
        (dict(name=""), "data.name=''"),
        (dict(name="tfds:"), "data.name='tfds:'"),
        (dict(reader_threads=0), "data.reader_threads=0: expected at least 1"),
        (dict(text_key=""), "data.text_key=''"),
        (dict(max_rows=0), "data.max_rows=0: expected at least 1, or None for all"),
    ],
)
def test_a_field_that_cannot_work_is_named_with_its_value(fields, message):
    with pytest.raises(DataError, match=message) as raised:
        DataConfig(**fields)
    assert "\n" not in str(raised.value)


def test_an_unknown_split_names_the_nearest():
    with pytest.raises(DataError, match="split 'validaton'.* did you mean 'validation'"):
        DataConfig().split_name("validaton")


def test_without_start_and_end_tokens_a_row_may_be_one_token():
    assert DataConfig(length=1, start_token=None, end_token=None).length == 1
