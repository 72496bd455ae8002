"""What is cached is built once, appears whole or not at all, and is rebuilt when damaged."""

import subprocess
import sys

import pytest

from maskformer.data import DataConfig, DataError, cache_dir, load_dataset, load_tokenizer
from maskformer.data.cache import build_once

_CONFIG = dict(vocabulary_size=300, length=32)


def test_two_processes_that_start_together_build_once(tmp_path):
    code = f"""
import pathlib, time
from maskformer.data.cache import build_once
def build(path):
    with open({str(tmp_path / "builds")!r}, "a") as log:
        log.write("built\\n")
    time.sleep(1)
    path.write_text("whole")
ready = pathlib.Path({str(tmp_path / "ready")!r})
with ready.open("a") as file:
    file.write("x")
while len(ready.read_text()) < 2:
    time.sleep(0.01)
print(build_once(pathlib.Path({str(tmp_path / "deep" / "result")!r}), lambda p: True, build).read_text())
"""
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [run.communicate()[0].strip() for run in runs] == ["whole", "whole"]
    assert (tmp_path / "builds").read_text() == "built\n"


def test_a_build_that_dies_leaves_nothing_to_be_mistaken_for_a_result(tmp_path):
    def dies(path):
        path.mkdir()
        (path / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "result", lambda p: True, dies)
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []
    assert build_once(tmp_path / "result", lambda p: True, lambda p: p.write_text("whole")).read_text() == "whole"


@pytest.mark.parametrize("damage", ["truncate", "flip", "no meta", "half meta", "missing file"])
def test_damaged_rows_are_rebuilt_and_the_same(folder, cache, damage):
    config = DataConfig(name=str(folder), **_CONFIG)
    tokenizer = load_tokenizer(config)
    expected = next(load_dataset(config, "test", tokenizer).eval_batches(64))
    (rows,) = (p for p in (cache / "rows").iterdir() if p.is_dir())
    tokens, meta = rows / "tokens.bin", rows / "meta.json"
    content = tokens.read_bytes()
    if damage == "truncate":
        tokens.write_bytes(content[:-2])
    elif damage == "flip":
        tokens.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif damage == "no meta":
        meta.unlink()
    elif damage == "half meta":
        meta.write_text(meta.read_text()[:20])
    else:
        tokens.unlink()
    found = next(load_dataset(config, "test", tokenizer).eval_batches(64))
    assert all((found[name] == expected[name]).all() for name in expected)
    assert tokens.read_bytes() == content


def test_a_second_load_builds_nothing(folder, cache, monkeypatch):
    config = DataConfig(name=str(folder), **_CONFIG)
    tokenizer = load_tokenizer(config)
    load_dataset(config, "test", tokenizer)
    monkeypatch.setattr("maskformer.data.dataset.write_rows", lambda *_: pytest.fail("built twice"))
    load_dataset(config, "test", tokenizer)
    with pytest.raises(pytest.fail.Exception, match="built twice"):
        load_dataset(DataConfig(name=str(folder), vocabulary_size=300, length=33), "test", tokenizer)


def test_an_unwritable_cache_names_the_variable_that_moves_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MASKFORMER_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="cache folder .*file/cache: .*; set MASKFORMER_CACHE to a folder"):
        cache_dir()


def test_without_the_variable_the_cache_is_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MASKFORMER_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "maskformer" and cache_dir().is_dir()
