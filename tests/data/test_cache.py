"""What is cached is built once, appears whole or not at all, and is rebuilt when damaged."""

import errno
import os
import resource
import shutil
import subprocess
import sys

import filelock
import pytest

from maskformer.data import DataConfig, DataError, cache_dir, load_dataset, load_tokenizer, prepare
from maskformer.data import seal as seal_module
from maskformer.data.austen import text as austen
from maskformer.data.cache import build_once
from maskformer.data.seal import is_sealed, seal
from maskformer.data.sources import open_source

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


_SMALL_FILES = {"a list": b"[1]", "a number": b"17", "binary": b"\x80\xff\0", "empty": b"", "an object": b"{}"}
_DAMAGE = ["truncate", "flip", "no meta", "half meta", "missing file"]
_DAMAGE += ["another length", "no seal", "a folder", "a circle"]
_DAMAGE += [f"{file}: {content}" for file in ("meta", "seal") for content in _SMALL_FILES]


@pytest.mark.parametrize("damage", _DAMAGE)
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
    elif damage == "another length":
        meta.write_text(meta.read_text().replace('"length": 32', '"length": 16'))
    elif damage == "no seal":
        (rows / "seal.json").unlink()
    elif damage == "a folder":
        meta.unlink()
        meta.mkdir()
    elif damage == "a circle":
        shutil.rmtree(rows)
        rows.symlink_to(rows)
    elif ":" in damage:
        (meta if damage.startswith("meta") else rows / "seal.json").write_bytes(_SMALL_FILES[damage[6:]])
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


def test_a_cache_at_an_address_is_refused_and_no_folder_of_that_name_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASKFORMER_CACHE", "gz://bucket/cache")
    with pytest.raises(DataError, match="cache folder gz://bucket/cache: unknown address; did you mean .*; set M"):
        cache_dir()
    assert not list(tmp_path.iterdir())


def test_names_that_are_no_text_are_refused_where_a_library_needs_text(tmp_path, monkeypatch):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(DataError, match=r"data.data_dir='.*caf\\udce9': TFDS needs a name in UTF-8"):
        open_source(DataConfig(name="tfds:lm1b", data_dir=name), "train")
    monkeypatch.setenv("MASKFORMER_CACHE", name)
    with pytest.raises(DataError, match=r"cache folder .*/caf\\xe9: its name is not UTF-8; set MASKFORMER_CACHE"):
        cache_dir()


def test_without_the_variable_the_cache_is_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("MASKFORMER_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "maskformer" and cache_dir().is_dir()


def test_every_block_of_a_large_file_that_was_touched_is_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(seal_module, "_BLOCK", 64)
    content = bytes(range(256)) * 100
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "large").write_bytes(content)
    seal(tmp_path)
    assert is_sealed(tmp_path)
    for place in range(0, len(content), 997):
        (tmp_path / "deep" / "large").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert not is_sealed(tmp_path)
    (tmp_path / "deep" / "large").write_bytes(content)
    assert is_sealed(tmp_path), "written anew with the same content"


def test_an_untouched_large_file_is_opened_at_constant_cost(tmp_path, monkeypatch):
    monkeypatch.setattr(seal_module, "_BLOCK", 64)
    (tmp_path / "large").write_bytes(bytes(64 * 1000))
    seal(tmp_path)
    read, real = [], seal_module._checksums
    monkeypatch.setattr(seal_module, "_checksums", lambda path, blocks: read.extend(blocks) or real(path, blocks))
    assert is_sealed(tmp_path) and len(read) == 16 and (read[0], read[-1]) == (0, 999)


def test_damaged_records_of_the_embedded_corpus_are_prepared_again(cache, monkeypatch):
    monkeypatch.setattr(austen, "BOOKS", {"persuasion": "Persuasion"})  # a sixth of the time
    expected = list(open_source(DataConfig(), "test").documents())
    (file,) = (cache / "tfds").rglob("austen-test.array_record*")
    content = file.read_bytes()
    file.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    assert list(open_source(DataConfig(), "test").documents()) == expected
    file.unlink()
    assert list(open_source(DataConfig(), "test").documents()) == expected


def test_what_killed_builds_left_is_removed_and_what_is_being_built_is_not(tmp_path):
    for name in ("killed", "alive", "result"):
        (tmp_path / f"{name}.building.x1").mkdir()
        (tmp_path / f"{name}.building.x1" / "half").write_text("x")
    with filelock.FileLock(tmp_path / "alive.lock"):  # as another process holds it
        build_once(tmp_path / "result", lambda p: True, lambda p: p.write_text("whole"))
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".lock") == ["alive.building.x1", "result"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "tokens.bin"),
        OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
        RuntimeError("Failed to finalize writing: write() failed: No space left on device; at byte 100\nmore"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_one_line_with_what_is_needed(tmp_path, error):
    def build(path):
        path.mkdir()
        (path / "half").write_bytes(bytes(3_000_000))
        raise error

    with pytest.raises(DataError, match=r"(No space left on device|Disk quota exceeded); it takes more than") as raised:
        build_once(tmp_path / "rows", lambda p: True, build)
    said = str(raised.value)
    assert said.startswith(f"cannot write {tmp_path / 'rows'}: ") and "\n" not in said
    assert "more than 3.0 MB and " in said and said.endswith("set MASKFORMER_CACHE to a folder with more")
    assert not list(tmp_path.glob("*.building.*"))
    with pytest.raises(DataError, match=r"more than 7.5 MB"):
        build_once(tmp_path / "rows", lambda p: True, build, lambda: 7_500_000)


def test_another_error_of_a_build_is_not_taken_for_a_full_disk(tmp_path):
    def build(path):
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        build_once(tmp_path / "rows", lambda p: True, build)


def test_preparing_a_corpus_on_a_full_disk_ends_in_one_line(cache, capfd):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert prepare.main(["--rows"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    printed = capfd.readouterr()
    assert printed.out == ""
    (said,) = printed.err.splitlines()
    assert said.startswith(f"error: cannot write {cache / 'tfds'}") and said.endswith("raise it: ulimit -f unlimited")
    assert "File too large; it takes more than 4.0 MB" in said
