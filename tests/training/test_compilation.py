"""The compilation cache: on by default, the same numbers from it, and no folder or file in it that stops a run."""

import os
import pathlib
import re
import subprocess
import sys
import warnings

import fsspec
import jax
import pytest
from jax._src import compilation_cache

from maskformer import paths
from maskformer.data import cache as data_cache
from maskformer.training import compilation
from maskformer.training.events import read_events
from tests.training.tiny import metric_lines

ROOT = pathlib.Path(__file__).parents[2]
CHOOSE = "JAX_COMPILATION_CACHE_DIR"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A process in which no cache is chosen yet, and the folder that will be."""
    monkeypatch.setenv("MASKFORMER_CACHE", str(tmp_path))
    made = compilation_cache.get_file_cache
    names = {"jax_compilation_cache_dir": None, "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    for name, value in names.items():
        jax.config.update(name, value)
    yield tmp_path / "xla" / compilation.machine()
    compilation_cache.reset_cache()
    compilation_cache.get_file_cache = made
    for name, value in before.items():
        jax.config.update(name, value)


def compile_anew(number):
    """Compile a program of its own, or read it from the cache; hits and misses by it."""
    jax.clear_caches()
    before = compilation.counts()
    assert float(jax.jit(lambda x: x * number + 1.0)(2.0)) == 2.0 * number + 1.0
    return tuple(now - then for now, then in zip(compilation.counts(), before))


def test_the_second_compilation_is_read_from_the_folder_of_this_machine(cache):
    assert compilation.use_cache() == str(cache) and compilation.in_use()
    assert compile_anew(3.0) == (0, 1)
    assert [path.name.rpartition("-")[2] for path in cache.iterdir()] == ["cache"]
    assert compile_anew(3.0) == (1, 0)
    assert compilation.use_cache() == str(cache)


def test_a_folder_that_was_chosen_is_used_and_a_cache_that_was_turned_off_stays_off(cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    assert compilation.use_cache() == str(tmp_path / "mine") and not cache.exists()
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        assert compilation.use_cache() is None and not compilation.in_use() and not cache.exists()
    finally:
        jax.config.update("jax_enable_compilation_cache", True)


def test_an_entry_has_its_name_only_when_it_is_whole(cache, monkeypatch, caplog):
    compilation.use_cache()
    write = type(cache).write_bytes

    def full(path, data):
        write(path, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(cache), "write_bytes", full)
    assert compile_anew(5.0) == (0, 1) and compile_anew(6.0) == (0, 1)
    assert list(cache.iterdir()) == []
    assert caplog.text.count("cannot be written (No space left on device)") == 1

    def killed(path, data):
        write(path, data[: len(data) // 2])
        raise SystemExit

    monkeypatch.setattr(type(cache), "write_bytes", killed)
    with pytest.raises(SystemExit):
        compile_anew(5.0)
    assert not list(cache.glob("*-cache")) and len(list(cache.iterdir())) == 1
    monkeypatch.undo()
    assert compile_anew(5.0) == (0, 1) and compile_anew(5.0) == (1, 0)


def test_a_damaged_entry_is_compiled_anew_and_stops_nothing(cache):
    compilation.use_cache()
    compile_anew(7.0)
    (entry,) = cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:-100])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert compile_anew(7.0)[0] == 0
    # And is there again for the next one.
    assert compile_anew(7.0) == (1, 0)


@pytest.mark.parametrize("kind", ["a file", "no permission"])
def test_a_folder_that_cannot_be_used_is_one_line_and_the_run_goes_on(cache, kind, monkeypatch, caplog):
    if kind == "a file":
        cache.parent.write_text("")
    else:

        def refused(*arguments, **options):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.TemporaryFile", refused)
    assert compilation.use_cache() is None and not compilation.in_use()
    assert len([record for record in caplog.records if "no compilation cache" in record.message]) == 1
    assert "\n" not in caplog.records[-1].message
    assert compile_anew(8.0) == (0, 0)


@pytest.fixture
def bucket(cache, tmp_path, monkeypatch):
    """A cache in a bucket, which has a mirror on this machine."""
    monkeypatch.setenv("MASKFORMER_CACHE", "memory://bucket/cache")
    monkeypatch.setattr(data_cache, "cache_dir", lambda: tmp_path)
    yield f"memory://bucket/cache/xla/{compilation.machine()}"
    fsspec.filesystem("memory").store.clear()


def test_a_cache_in_a_bucket_is_used_there(bucket, cache):
    assert compilation.use_cache() == str(cache)
    assert compile_anew(9.0) == (0, 1) and compile_anew(9.0) == (1, 0)
    assert len(list(paths.resolve(bucket).iterdir())) == 1 and not list(cache.iterdir())


def test_a_store_that_fails_is_one_line_and_stops_nothing(bucket, monkeypatch, caplog):
    compilation.use_cache()

    def forbidden(*_):
        raise PermissionError(13, "gs://bucket: forbidden")

    monkeypatch.setattr(paths.StorePath, "read_bytes", forbidden)
    monkeypatch.setattr(paths.StorePath, "write_bytes", forbidden)
    assert compile_anew(9.0) == (0, 1) and compile_anew(9.5) == (0, 1)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"compilation cache {bucket}: cannot be read (gs://bucket: forbidden)"
    ]


def test_a_cache_that_grew_too_large_loses_its_oldest_entries_and_what_kills_left(tmp_path):
    for age in range(10):
        (tmp_path / f"{age}-cache").write_bytes(b"x" * 100)
        os.utime(tmp_path / f"{age}-cache", (1e9 - age, 1e9 - age))
    (tmp_path / "old.partial").touch()
    os.utime(tmp_path / "old.partial", (1e9, 1e9))
    (tmp_path / "new.partial").touch()
    (tmp_path / "xla_gpu_per_fusion_autotune_cache_dir").mkdir()
    compilation._trim(tmp_path, most=1000)
    assert len(list(tmp_path.glob("*-cache"))) == 10 and not (tmp_path / "old.partial").exists()
    compilation._trim(tmp_path, most=999)
    assert sorted(path.name for path in tmp_path.glob("*-cache")) == [f"{age}-cache" for age in range(7)]
    assert (tmp_path / "new.partial").exists()


def test_machines_with_other_instructions_or_cores_have_other_folders(monkeypatch):
    text = "processor : 0\nmodel name : A\nflags : sse avx\n\nprocessor : 1\nmodel name : A\nflags : sse avx\n"

    def named(text, cores=4):
        monkeypatch.setattr(compilation.pathlib.Path, "read_text", lambda *_, **__: text)
        monkeypatch.setattr(compilation.os, "cpu_count", lambda: cores)
        return compilation.machine()

    one = named(text)
    assert named(text.replace("sse avx", "avx sse")) == one
    assert len({one, named(text.replace("avx", "avx512")), named(text, 8), named(text.replace(": A", ": B"))}) == 4


RUN = """
import sys
import jax
from maskformer.training import train_and_evaluate
from tests.training.tiny import tiny_config

train_and_evaluate(tiny_config(sys.argv[1], train__steps=4, evaluation__every=2), sys.argv[2])
"""


def test_a_second_start_reads_its_programs_and_trains_to_the_same_bits(corpus, tmp_path):
    """Two runs at once into an empty cache, and then one that finds it filled."""
    environment = {name: value for name, value in os.environ.items() if name != CHOOSE} | {
        "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "MASKFORMER_CACHE": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }  # fmt: skip

    def begin(name):
        command = [sys.executable, "-W", "ignore", "-c", RUN, str(corpus), str(tmp_path / name)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    together = [begin("one"), begin("two")]
    said = [process.communicate(timeout=300) for process in together]
    said.append(begin("three").communicate(timeout=300))
    assert metric_lines(tmp_path / "one") == metric_lines(tmp_path / "two") == metric_lines(tmp_path / "three")
    assert all(errors == "" for _, errors in said), said
    hits = [sum(line.get("cache_hits", 0) for line in read_events(tmp_path / name)) for name in ("one", "three")]
    misses = [sum(line.get("cache_misses", 0) for line in read_events(tmp_path / name)) for name in ("one", "three")]
    assert hits[1] >= 3 and misses == [misses[0], 0] and misses[0] >= 1, (hits, misses)
    assert re.search(r"started in [0-9.]+ s: .*compile [0-9.]+.* \(cache: [1-9][0-9]* hits, 0 misses\)", said[2][0])
