"""Documents from TFDS and folders: the right ones in each split, and one-line errors that say what to do."""

import json
import logging
import shutil

import pytest
import tensorflow_datasets as tfds

from maskformer.data import DataConfig, DataError, prepare
from maskformer.data.folder import LONGEST_DOCUMENT
from maskformer.data.sources import open_source


def read(name, split="train", **fields):
    return list(open_source(DataConfig(name=str(name), **fields), split).documents())


def write_lines(path, texts, key="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def lm1b(tmp_path_factory):
    """TFDS's own lm1b, as its builder prepares it, from other sentences."""
    root = tmp_path_factory.mktemp("tfds")
    builder = tfds.builder("lm1b", data_dir=root, file_format="array_record")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(builder),
            "_split_generators",
            lambda self, manager: {
                split: [(f"{split}{i}", {"text": f"{split} sentence \u00e9 {i}"}) for i in range(count)]
                for split, count in {"train": 600, "test": 5}.items()
            },
        )
        builder.download_and_prepare()
    return root


def test_a_tfds_dataset_is_read_whole_with_its_splits_and_slices(lm1b):
    expected = {f"train sentence \u00e9 {i}" for i in range(600)}
    found = read("tfds:lm1b", data_dir=str(lm1b))
    assert len(found) == 600 and set(found) == expected
    slices = dict(data_dir=str(lm1b), train_split="train[:90%]", validation_split="train[90%:]")
    train, validation = (read("tfds:lm1b", split, **slices) for split in ("train", "validation"))
    assert len(train) == 540 and set(train) | set(validation) == expected and not set(train) & set(validation)
    assert len(read("tfds:lm1b", "test", data_dir=str(lm1b))) == 5


def test_splits_are_added_whole_or_in_slices(lm1b):
    sizes = {"train+test": 605, "train[:2]+train[4:]": 598, "test+train[:10]": 15, "all": 605}
    for split, size in sizes.items():
        assert len(read("tfds:lm1b", data_dir=str(lm1b), train_split=split)) == size, split


def test_the_bytes_of_a_split_are_those_of_its_records(lm1b):
    source = open_source(DataConfig(name="tfds:lm1b", data_dir=str(lm1b)), "train")
    assert source.text_bytes() == sum(len(text.encode()) for text in source.documents())


def test_records_that_are_no_text_are_counted_and_said_once(lm1b, monkeypatch, caplog):
    source = open_source(DataConfig(name="tfds:lm1b", data_dir=str(lm1b)), "test")
    monkeypatch.setattr(source, "_texts", lambda: iter([b"caf\xe9", b"caf\xc3\xa9", "\ufffd".encode(), b"\xff\xff"]))
    with caplog.at_level(logging.WARNING):
        expected = ["caf\ufffd", "caf\u00e9", "\ufffd", "\ufffd" * 2]
        assert list(source.documents()) == list(source.documents()) == expected
    assert source.text_bytes() == 4 + 5 + 3 + 2
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == "dataset 'lm1b/1.1.0': 2 records are not UTF-8; what cannot be read is U+FFFD"


@pytest.fixture(scope="module")
def own(lm1b, tmp_path_factory):
    """A prepared dataset that TFDS has no code for, as a group keeps its own."""
    root = tmp_path_factory.mktemp("own")
    folder = root / "mine" / "big" / "1.1.0"
    shutil.copytree(lm1b / "lm1b" / "1.1.0", folder)
    for file in folder.iterdir():
        file.rename(file.with_name(file.name.replace("lm1b", "mine")))
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "name": "mine", "configName": "big"}))
    return root


def test_a_dataset_of_ones_own_is_read_and_another_version_of_it_names_those_that_are_there(own):
    assert len(read("tfds:mine/big:1.1.0", "test", data_dir=str(own))) == 5
    for name in ("tfds:mine/big:9.9.9", "tfds:mine/small", "tfds:mine:1.0.0"):
        with pytest.raises(DataError) as raised:
            read(name, data_dir=str(own))
        assert str(raised.value) == (
            f"data.name={name!r}: no such version or configuration; prepared in {own}: tfds:mine/big:1.1.0"
        )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tfds:lm1b:9.9.9", "Dataset lm1b cannot be loaded at version 9.9.9, only: 1.1.0"),
        ("tfds:lm1b/nope", "BuilderConfig nope not found with version 1.1.0$"),
        ("tfds:lm1b:nope", "TFDS has 'lm1b', but not as 'lm1b:nope'; write tfds:lm1b, "),
        ("tfds:lm1bb", "TFDS knows no such dataset; .* did you mean 'lm1b'"),
    ],
)
def test_a_wrong_version_or_configuration_is_told_from_an_unknown_dataset(tmp_path, name, message):
    with pytest.raises(DataError, match=message) as raised:
        read(name, data_dir=str(tmp_path))
    assert str(raised.value).startswith(f"data.name={name!r}: ") and "\n" not in str(raised.value)


def test_builtin_schema_is_known_to_mocked_tfds(tmp_path):
    # The mock serves schemas, but neither splits nor batched reads: an unprepared dataset is what it stands for.
    with tfds.testing.mock_data(policy=tfds.testing.MockPolicy.USE_CODE):
        assert "text" in tfds.builder("lm1b").info.features
        with pytest.raises(DataError, match="dataset 'lm1b' is not prepared"):
            read("tfds:lm1b", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(text_key="body"), "data.text_key='body': the records of 'lm1b/1.1.0' have text"),
        (dict(train_split="trian"), "dataset 'lm1b/1.1.0' has no split 'trian': it has test, train"),
        (dict(train_split="train[:x%]"), "train\\[:x%\\]"),
        (dict(train_split="train+tset"), "'tset' \\(in 'train\\+tset'\\): it has test, train; did you mean 'test'"),
        (dict(train_split="train+"), "no split '' \\(in 'train\\+'\\)"),
        (dict(train_split="train[:0]"), "split 'train\\[:0\\]': "),
    ],
)
def test_a_field_that_the_tfds_dataset_lacks_is_named(lm1b, fields, message):
    with pytest.raises(DataError, match=message) as raised:
        read("tfds:lm1b", data_dir=str(lm1b), **fields)
    assert "\n" not in str(raised.value)


def test_an_unprepared_dataset_names_the_command_that_prepares_it(tmp_path):
    with pytest.raises(DataError) as raised:
        read("tfds:lm1b", data_dir=str(tmp_path))
    assert str(raised.value) == (
        f"dataset 'lm1b' is not prepared in {tmp_path};"
        f" prepare it: python -m maskformer.data.prepare --name=tfds:lm1b --data_dir={tmp_path}"
    )


def test_a_dataset_without_random_access_names_the_format_that_has_it(lm1b, tmp_path):
    target = tmp_path / "lm1b" / "1.1.0"
    target.mkdir(parents=True)
    for name in ("dataset_info.json", "features.json"):
        text = (lm1b / "lm1b" / "1.1.0" / name).read_text()
        (target / name).write_text(text.replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match="prepared as tfrecord, which has no random access; prepare it as array_record"):
        read("tfds:lm1b", data_dir=str(tmp_path))


def test_an_unknown_dataset_is_a_one_line_error(tmp_path):
    with pytest.raises(DataError, match="^data.name='tfds:no_such': TFDS knows no such dataset[^\n]*$"):
        read("tfds:no_such")
    with pytest.raises(DataError, match="data.name='lm1b': no such folder.* written 'tfds:lm1b'"):
        read("lm1b")


def test_the_prepare_command_packs_and_prints_every_split(folder, cache, capsys):
    assert prepare.main([f"--name={folder}", "--vocabulary_size=300", "--length=32", "--pack=true", "--rows"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()] == ["split", "train", "validation", "test"]
    assert prepare.main(["--name=tfds:no_such"]) == 2
    assert capsys.readouterr().err == (
        "error: data.name='tfds:no_such': TFDS knows no such dataset; see tfds.list_builders()\n"
    )


@pytest.mark.parametrize("flag", ["--pack=maybe", "--length=long", "--sentinels=1.5"])
def test_the_prepare_command_refuses_a_value_of_another_type(flag, capsys):
    with pytest.raises(SystemExit) as raised:
        prepare.main([flag])
    assert raised.value.code == 2 and "invalid" in capsys.readouterr().err


def test_files_set_apart_for_a_split_are_that_split(tmp_path):
    write_lines(tmp_path / "train-00.jsonl", ["a", "b"])
    write_lines(tmp_path / "train-01.jsonl", ["c"])
    write_lines(tmp_path / "validation" / "x.jsonl", ["d"])
    (tmp_path / "test.txt").write_text("e\nf\n")
    (tmp_path / "README.md").write_text("not data")
    assert read(tmp_path) == ["a", "b", "c"]
    assert read(tmp_path, "validation") == ["d"]
    assert read(tmp_path, "test") == ["e\nf\n"]


def test_documents_without_named_splits_are_shared_out_by_content(tmp_path):
    texts = [f"document {i}" for i in range(1000)]
    write_lines(tmp_path / "all.jsonl", texts + texts[:100])
    found = {split: read(tmp_path, split) for split in ("train", "validation", "test")}
    assert sorted(text for split in found.values() for text in split) == sorted(texts + texts[:100])
    # A repeated document must not be trained on and tested on.
    assert sum(len(set(split)) for split in found.values()) == 1000
    assert 20 < len(set(found["validation"])) < 90 and 20 < len(set(found["test"])) < 90


def test_a_text_file_longer_than_memory_should_hold_is_cut_between_lines(tmp_path):
    line = "x" * 99 + "\n"
    (tmp_path / "train.txt").write_text(line * (2 * LONGEST_DOCUMENT // 100))
    found = read(tmp_path)
    assert len(found) > 1 and "".join(found) == line * (2 * LONGEST_DOCUMENT // 100)
    assert all(len(text) <= LONGEST_DOCUMENT and text.endswith("\n") for text in found)


def test_the_fingerprint_follows_content_and_not_time(tmp_path):
    write_lines(tmp_path / "train.jsonl", ["a"])

    def fingerprint(**fields):
        return open_source(DataConfig(name=str(tmp_path), **fields), "train").fingerprint

    before = fingerprint()
    write_lines(tmp_path / "train.jsonl", ["a"])
    write_lines(tmp_path / "test.jsonl", ["other split"])
    assert fingerprint() == before
    write_lines(tmp_path / "train.jsonl", ["b"])
    assert fingerprint() != before


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"body": "a"}', "train.jsonl:1: no key 'text', found body; set data.text_key"),
        ('{"text": "a"}\n{"text": ', "train.jsonl:2: not JSON"),
        ('\n["a"]', "train.jsonl:2: no key 'text', found list"),
        ('{"text": 3}', "train.jsonl:1: 'text' is int, expected text"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, lines, message):
    (tmp_path / "train.jsonl").write_text(lines)
    with pytest.raises(DataError, match=message) as raised:
        read(tmp_path)
    assert "\n" not in str(raised.value)


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a\\ud800b"}')
    assert read(tmp_path) == ["a?b"]


def test_a_folder_without_the_split_or_without_text_says_where_to_put_it(tmp_path):
    with pytest.raises(DataError, match="holds no .txt or .jsonl file"):
        read(tmp_path)
    (tmp_path / "file.txt").write_text("one document")
    with pytest.raises(DataError, match="is not a folder"):
        read(tmp_path / "file.txt")
    with pytest.raises(DataError, match="no such folder"):
        read(tmp_path / "absent")
    splits = ("train", "validation", "test")
    empty = []
    for split in splits:
        try:
            read(tmp_path, split)
        except DataError as error:
            assert f"too few documents to draw a {split!r} split" in str(error)
            empty.append(split)
    assert len(empty) == 2
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.txt").write_text("a")
    with pytest.raises(DataError, match=f"files for train but none for 'test'; put some into {tmp_path / 'test'}"):
        read(tmp_path, "test")
