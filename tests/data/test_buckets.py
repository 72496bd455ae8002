"""Text in a bucket is read as text on a disk is, and a cache in a bucket is built once for all machines."""

import gzip
import json
import logging
import pathlib

import numpy as np
import pytest

from maskformer import paths
from maskformer.data import DataConfig, DataError, cache, load_dataset, load_tokenizer
from maskformer.data.sources import open_source
from tests.emulator import contents

_CONFIG = dict(vocabulary_size=300, length=32)


def upload(folder: pathlib.Path, target) -> str:
    for file in folder.rglob("*"):
        if file.is_file():
            (target / file.relative_to(folder).as_posix()).write_bytes(file.read_bytes())
    return str(target)


def documents(name, split="train"):
    return list(open_source(DataConfig(name=str(name)), split).documents())


def test_a_folder_in_a_bucket_has_the_same_documents_as_on_a_disk(folder, bucket):
    there = upload(folder, paths.resolve(bucket) / "text")
    for split in ("train", "validation", "test"):
        assert documents(there, split) == documents(folder, split)


def test_compressed_and_marked_files_are_read_and_hidden_ones_passed_over(bucket, tmp_path):
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "train.txt").write_text("no")
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    (tmp_path / "train.txt").write_bytes("Käse".encode("utf-16"))
    there = upload(tmp_path, paths.resolve(bucket) / "text")
    assert documents(there) == documents(tmp_path) == ["one", "two", "Käse"]


def test_a_changed_file_in_a_bucket_changes_the_fingerprint_and_reading_no_text_is_needed(bucket, folder, monkeypatch):
    there = paths.resolve(bucket) / "text"
    upload(folder, there)
    fetched = []
    read = paths.StorePath.open
    monkeypatch.setattr(paths.StorePath, "open", lambda self, *rest: (fetched.append(self), read(self, *rest))[1])
    before = open_source(DataConfig(name=str(there)), "train").fingerprint
    assert open_source(DataConfig(name=str(there)), "train").fingerprint == before
    (there / "train" / "0.txt").write_text("Another.")
    assert open_source(DataConfig(name=str(there)), "train").fingerprint != before
    assert not fetched


@pytest.mark.parametrize(
    "name, said",
    [
        ("gs://not-there/text", "data.name='gs://not-there/text': there is no bucket gs://not-there; mend its name"),
        ("{}/nothing", "data.name='{}/nothing': no such folder; give a folder of .txt or .jsonl files"),
        ("gz://bucket/text", "data.name='gz://bucket/text': unknown address; did you mean 'gs://'?"),
    ],
)
def test_a_folder_that_is_not_there_is_one_line(bucket, name, said):
    with pytest.raises(DataError) as error:
        documents(name.format(bucket))
    assert str(error.value).startswith(said.format(bucket)) and "\n" not in str(error.value)


@pytest.fixture
def machine(bucket, tmp_path, monkeypatch):
    """`machine(name)` is one with a disk of its own, whose cache is in the bucket."""
    monkeypatch.setenv("MASKFORMER_CACHE", f"{bucket}/cache")

    def become(name):
        monkeypatch.setenv("MASKFORMER_MIRROR", str(tmp_path / name))
        cache._shared.cache_clear()

    yield become
    cache._shared.cache_clear()


def rows_of(folder):
    config = DataConfig(name=str(folder), **_CONFIG)
    return next(load_dataset(config, "test", load_tokenizer(config)).eval_batches(64))


def test_what_one_machine_built_another_fetches_and_builds_nothing(folder, machine, bucket, emulator, monkeypatch):
    machine("one")
    expected = rows_of(folder)
    held = contents(emulator, bucket[5:])
    assert sorted(name.rpartition(".")[2] for name in held).count("whole") == 2  # a tokenizer, and rows
    machine("two")
    for built in ("maskformer.data.dataset.pack_documents", "maskformer.data.tokenizer.train"):
        monkeypatch.setattr(built, lambda *_: pytest.fail("built again"))
    for name, values in rows_of(folder).items():
        np.testing.assert_array_equal(values, expected[name])
    assert contents(emulator, bucket[5:]) == held


def test_damage_in_the_bucket_is_noticed_and_replaced(folder, machine, bucket, emulator, caplog):
    machine("one")
    expected = rows_of(folder)
    tokens = next(name for name in contents(emulator, bucket[5:]) if name.endswith("tokens.bin"))
    data = (paths.resolve(bucket) / tokens).read_bytes()
    (paths.resolve(bucket) / tokens).write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
    machine("two")
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(rows_of(folder)["tokens"], expected["tokens"])
    assert "is damaged" in caplog.text
    assert tokens not in contents(emulator, bucket[5:])
    machine("three")
    caplog.clear()
    np.testing.assert_array_equal(rows_of(folder)["tokens"], expected["tokens"])
    assert "is damaged" not in caplog.text


def test_of_two_machines_that_build_the_same_at_once_both_read_the_first_ones(machine, bucket, emulator):
    machine("two")
    second = cache.cache_dir() / "result.json"

    def slow(path):
        machine("one")
        cache.build_once(cache.cache_dir() / "result.json", lambda path: True, lambda path: path.write_text('"first"'))
        machine("two")
        path.write_text('"second"')

    assert json.loads(cache.build_once(second, lambda path: True, slow).read_text()) == "first"
    assert len(contents(emulator, bucket[5:])) == 2  # the result, and its name


def test_a_cache_that_may_only_be_read_is_said_once_and_used(folder, machine, bucket, monkeypatch, caplog):
    machine("one")

    def refused(*_):
        raise PermissionError(13, "no access")

    monkeypatch.setattr(paths, "put", refused)
    with caplog.at_level(logging.WARNING):
        assert len(rows_of(folder)["tokens"])
    assert caplog.text.count("is only read from (no access)") == 1


def test_a_cache_in_a_bucket_that_is_not_there_is_one_line(machine, monkeypatch):
    monkeypatch.setenv("MASKFORMER_CACHE", "gs://not-there/cache")
    with pytest.raises(DataError, match=r"^MASKFORMER_CACHE=gs://not-there/cache: there is no bucket gs://not-there; "):
        cache.cache_dir()
