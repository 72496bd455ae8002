"""Files of JSON lines: one file on a file system, numbered parts on an object store, and copies between the two."""

import contextlib
import json
import pathlib

import pytest

from maskformer import paths
from maskformer.training import lines
from tests.emulator import contents


@pytest.fixture(params=["local", "bucket"])
def folder(request, tmp_path):
    return tmp_path if request.param == "local" else paths.resolve(request.getfixturevalue("bucket")) / "run"


def written(path, steps):
    file = lines.LineFile(path)
    for step in steps:
        file.write({"step": step})
    file.close()


def steps(path):
    return [line["step"] for line in lines.read_lines(path)]


def test_lines_are_read_as_they_were_written_over_restarts(folder):
    path = folder / "metrics.jsonl"
    assert not lines.exists(path)
    written(path, [1, 2])
    written(path, [3])
    assert lines.exists(path) and steps(path) == [1, 2, 3]


def test_a_flushed_line_is_there_for_others_while_the_file_is_open(folder):
    file = lines.LineFile(folder / "events.jsonl")
    file.write({"step": 1, "nested": {"a": 1}})
    file.flush()
    assert lines.read_lines(folder / "events.jsonl") == [{"step": 1, "nested": {"a": 1}}]
    file.close()


def test_a_torn_last_line_is_left_out(folder):
    path = folder / "metrics.jsonl"
    (path if paths.is_local(path) else lines.part_path(path, 1)).write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    assert steps(path) == [1]


def test_an_object_store_has_parts_of_a_limited_length(bucket, emulator, monkeypatch):
    monkeypatch.setattr(lines, "PART_BYTES", 30)
    path = paths.resolve(bucket) / "run" / "metrics.jsonl"
    file = lines.LineFile(path)
    for step in range(1, 8):
        file.write({"step": step})
        file.flush()
    held = contents(emulator, bucket[5:])
    assert sorted(held) == [f"run/metrics.0000{number}.jsonl" for number in (1, 2, 3)]
    assert max(int(item["size"]) for item in held.values()) <= 30 + len('{"step": 1}\n')
    assert steps(path) == list(range(1, 8))


def test_rewriting_drops_the_end_and_leaves_whole_parts_alone(bucket, emulator, monkeypatch):
    monkeypatch.setattr(lines, "PART_BYTES", 30)
    path = paths.resolve(bucket) / "run" / "metrics.jsonl"
    written(path, [])
    file = lines.LineFile(path)
    for step in range(1, 8):
        file.write({"step": step})
        file.flush()
    first = contents(emulator, bucket[5:])["run/metrics.00001.jsonl"]["generation"]
    lines.rewrite(path, [line for line in lines.read_lines(path) if line["step"] <= 5])
    assert steps(path) == [1, 2, 3, 4, 5]
    assert contents(emulator, bucket[5:])["run/metrics.00001.jsonl"]["generation"] == first
    written(path, [6])
    assert steps(path) == [1, 2, 3, 4, 5, 6]


def test_a_kill_while_parts_that_were_flushed_by_many_lines_are_rewritten_loses_none(bucket, monkeypatch):
    monkeypatch.setattr(lines, "PART_BYTES", 30)
    path = paths.resolve(bucket) / "run" / "metrics.jsonl"
    file = lines.LineFile(path)
    for first in (1, 6, 11):
        for step in range(first, first + 5):
            file.write({"step": step})
        file.flush()

    class Killed(Exception):
        pass

    write, writes = paths.StorePath.write_bytes, []

    def killed(*arguments):
        if writes:
            raise Killed
        writes.append(write(*arguments))

    kept = lines.read_lines(path)[:12]
    with monkeypatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(paths.StorePath, "write_bytes", killed)
        lines.rewrite(path, kept)
    assert steps(path)[:12] == list(range(1, 13))


def test_two_writers_of_one_file_do_not_overwrite_each_other(bucket):
    path = paths.resolve(bucket) / "metrics.jsonl"
    one, other = lines.LineFile(path), lines.LineFile(path)
    one.write({"step": 1})
    one.flush()
    other.write({"step": 2})
    with pytest.raises(OSError, match="written by another process"):
        other.flush()
    assert steps(path) == [1]


def test_a_run_that_was_copied_from_a_bucket_to_a_disk_and_back_goes_on(bucket, tmp_path):
    here, there = tmp_path / "metrics.jsonl", paths.resolve(bucket) / "metrics.jsonl"
    written(there, [1, 2])
    pathlib.Path(lines.part_path(here, 1)).write_bytes(lines.part_path(there, 1).read_bytes())
    assert steps(here) == [1, 2]
    written(here, [3])
    assert [json.loads(line)["step"] for line in here.read_text().splitlines()] == [1, 2, 3]
    back = paths.resolve(bucket) / "back" / "metrics.jsonl"
    back.write_bytes(here.read_bytes())
    written(back, [4])
    lines.rewrite(back, lines.read_lines(back)[:2])
    assert steps(back) == [1, 2]
