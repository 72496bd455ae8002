"""The events of a run: what is written is read again, over kills, damage and a folder that cannot be written."""

import json
import pathlib
import threading
import time

import pytest

from maskformer.training import lines
from maskformer.training.events import EVENTS, Events, read_events


def test_what_is_written_is_read_again_in_order_with_time_and_attempt(tmp_path):
    first, second = Events(tmp_path, "a1"), Events(tmp_path, "b2")
    first.write("start", host="h", step=0)
    first.write("phase", time=12.5, name="init", seconds=1.25)
    second.write("start", host="h", step=4)
    events = read_events(tmp_path)
    assert [(line["event"], line["attempt"]) for line in events] == [("start", "a1"), ("phase", "a1"), ("start", "b2")]
    assert events[1] == {"event": "phase", "time": 12.5, "attempt": "a1", "name": "init", "seconds": 1.25}
    assert 1.7e9 < events[0]["time"] <= events[2]["time"]


def test_a_line_is_on_disk_when_it_is_written(tmp_path):
    events = Events(tmp_path, "a")
    for count in (1, 2, 3):
        events.write("phase", name="steps", seconds=1.0)
        assert len((tmp_path / EVENTS).read_text().splitlines()) == count


@pytest.mark.parametrize("kept", range(1, 60, 7))
def test_a_line_that_a_kill_cut_off_is_left_out_and_spoils_no_later_one(tmp_path, kept):
    Events(tmp_path, "a").write("phase", time=5.0, name="steps", seconds=1.0)
    whole = (tmp_path / EVENTS).read_bytes()
    (tmp_path / EVENTS).write_bytes(whole + whole[:kept])
    assert len(read_events(tmp_path)) == 1
    Events(tmp_path, "b").write("start", step=0)
    assert [line["attempt"] for line in read_events(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize(
    "text",
    ["[1, 2]", "7", '"start"', '{"event": "start"}', '{"event": 3, "attempt": "a", "time": 1.0}', "\0\0\0\xff",
     "[" * 9999, '{"event": "end", "attempt": "a", "time": NaN}', '{"event": "end", "attempt": "a", "time": true}'],
)  # fmt: skip
def test_what_is_no_event_is_left_out(tmp_path, text):
    Events(tmp_path, "a").write("start", step=0)
    with (tmp_path / EVENTS).open("a", encoding="latin-1") as file:
        file.write(text + "\n")
    Events(tmp_path, "a").write("end", code=0)
    assert [line["event"] for line in read_events(tmp_path)] == ["start", "end"]


def test_a_run_without_events_has_none_and_a_folder_in_their_place_is_an_error(tmp_path):
    assert read_events(tmp_path) == []
    (tmp_path / EVENTS).mkdir()
    with pytest.raises(ValueError, match=r"events.jsonl: cannot be read \(Is a directory\)"):
        read_events(tmp_path)


def test_a_file_that_cannot_be_written_is_said_once_and_stops_nothing(tmp_path, caplog):
    events = Events(tmp_path / "missing", "a")
    events.write("start", step=0)
    events.write("end", code=0)
    assert caplog.text.count("events.jsonl: cannot be written (No such file or directory)") == 1


def test_a_disk_that_is_full_is_said_once_and_the_end_of_the_run_goes_well(tmp_path, monkeypatch, caplog):
    events = Events(tmp_path, "a")
    events.write("start", step=0)
    (tmp_path / EVENTS).unlink()
    full = pathlib.Path("/dev/full")
    if not full.exists():
        pytest.skip("a machine without /dev/full")
    monkeypatch.setattr(events, "_file", lines.LineFile(full))
    events.write("phase", name="steps", seconds=1.0)
    events.write("end", code=1)
    events.close()
    assert caplog.text.count("cannot be written (No space left on device)") == 1


def test_in_a_bucket_a_start_and_an_end_are_there_at_once(tmp_path, monkeypatch):
    import fsspec

    from maskformer import paths

    workdir = paths.resolve("memory://bucket/run")
    events = Events(workdir, "a")
    events.write("start", step=0)
    events.write("phase", name="steps", seconds=1.0)
    assert [line["event"] for line in read_events("memory://bucket/run")] == ["start"]
    events.write("end", code=0)
    assert [line["event"] for line in read_events("memory://bucket/run")] == ["start", "phase", "end"]
    fsspec.filesystem("memory").store.clear()


def test_what_happened_while_a_bucket_was_away_is_written_when_it_is_back(monkeypatch, caplog):
    import fsspec

    from maskformer import paths

    events = Events(paths.resolve("memory://bucket/run"), "a")
    events.write("start", step=0)
    asked = []

    def away(*arguments):
        asked.append(arguments)
        raise paths.StoreError("memory://bucket does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(paths, "put", away)
        patch.setattr(lines, "STORE_SECONDS", 0.2)
        time.sleep(0.3)
        for _ in range(20):
            events.write("phase", name="steps", seconds=1.0)
    # Each time it is asked it may take half a minute to say no.
    assert len(asked) == 1 and caplog.text.count("cannot be written (memory://bucket does not answer)") == 1
    events.write("end", code=0)
    assert [line["event"] for line in read_events("memory://bucket/run")] == ["start", *["phase"] * 20, "end"]
    fsspec.filesystem("memory").store.clear()


def test_lines_of_several_threads_do_not_mix(tmp_path):
    events = Events(tmp_path, "a")
    threads = [
        threading.Thread(target=lambda: [events.write("phase", name="x" * 500) for _ in range(50)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_events(tmp_path)) == 200
    assert all(json.loads(line)["name"] == "x" * 500 for line in (tmp_path / EVENTS).read_text().splitlines())
