"""The roll between threads of one process: the same sockets as between hosts."""

import contextlib
import dataclasses
import json
import socket
import threading
import time

import pytest

from launch.local import free_port
from maskformer.training import roll
from maskformer.training.roll import Caller, JoinError

AGREED = {"the number of processes": 3}


class Process(threading.Thread):
    """One process of a run: `error` is what it ended with, `notes` what it said."""

    def __init__(self, number, port, count=3, timeout=20.0, bind=None, agreed=None, host=None):
        super().__init__(daemon=True)
        self.caller = Caller(number, agreed or {"the number of processes": count}, host or f"host-{number}")
        self.arguments = port, bind or port, count, timeout
        self.notes, self.error = [], None
        self.start()

    def run(self):
        port, bind, count, timeout = self.arguments
        try:
            if self.caller.process == 0:
                roll.call(
                    f"127.0.0.1:{port}", f"127.0.0.1:{bind}", self.caller, count, timeout, self.notes.append,
                    lambda absent: f". Absent: {absent}",
                )
            else:
                roll.answer(f"127.0.0.1:{port}", self.caller, timeout, self.notes.append, ". Look there")
        except (ValueError, JoinError) as error:
            self.error = error

    def end(self):
        self.join(20)
        assert not self.is_alive()
        return self.error


@contextlib.contextmanager
def caller(port, number, count=3):
    """The socket of a process that says who it is and then answers nothing."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        hello = dataclasses.asdict(Caller(number, {"the number of processes": count}, f"host-{number}"))
        connection.sendall(json.dumps(hello).encode() + b"\n")
        yield connection


@pytest.fixture
def port():
    return free_port()


def until_listening(port):
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        time.sleep(0.01)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_when_all_have_come_all_go_and_the_port_is_free_for_jax(port, order):
    processes = []
    for number in order:
        processes.append(Process(number, port))
        time.sleep(0.05)
    assert [process.end() for process in processes] == [None] * 3
    with socket.create_server(("127.0.0.1", port), reuse_port=False) as server:
        assert server.getsockname()[1] == port
    assert not any(process.notes for process in processes)


def test_hundreds_come_at_once(port, monkeypatch):
    monkeypatch.setattr(roll, "RIVAL", 0.1)
    first = Process(0, port, count=300)
    until_listening(port)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(caller(port, number, 300)) for number in range(1, 300)]
        assert first.end() is None
        for connection in sockets:
            assert b'"go"' in connection.recv(4096)


def test_who_is_missing_is_noted_soon_and_named_on_all_that_are_there_when_time_is_up(port, monkeypatch):
    monkeypatch.setattr(roll, "FIRST_NOTE", 0.3)
    first, second = Process(0, port, count=5, timeout=1.0), Process(2, port, count=5)
    until_listening(port)
    with caller(port, 4, 5):
        time.sleep(0.3)
    line = (
        "3 of 5 processes have not come {}: 1, 3-4; gone again: 4 on host-4; there: 0 on host-0, 2 on host-2. "
        "Absent: [1, 3, 4]"
    )
    assert [str(process.end()) for process in (first, second)] == [line.format("within 1 s")] * 2
    assert type(first.error) is type(second.error) is JoinError
    (note,) = first.notes
    assert note == "waiting: " + line.format("for 0 s")


def test_an_absent_process_0_is_noted_and_named(port, monkeypatch):
    monkeypatch.setattr(roll, "FIRST_NOTE", 0.2)
    process = Process(1, port, timeout=0.5)
    assert f"coordinator 127.0.0.1:{port}: process 0 could not be reached there within" in str(process.end())
    assert str(process.error).endswith("Is it running, and is the port open?. Look there")
    (note,) = process.notes
    assert note.startswith(f"waiting: coordinator 127.0.0.1:{port}: process 0 could not be reached there for 0 s")


def test_two_processes_of_one_number_are_named_on_all_as_a_mistake(port):
    processes = [Process(0, port)]
    until_listening(port)
    processes += [Process(1, port, host="a"), Process(1, port, host="b")]
    errors = [process.end() for process in processes]
    assert {type(error) for error in errors} == {ValueError}
    (line,) = {str(error) for error in errors}
    assert line.startswith("process 1 came twice, from ") and "a (process id" in line and "b (process id" in line


def test_a_second_process_0_on_another_host_finds_the_first(port):
    first = Process(0, port, host="a")
    until_listening(port)
    second = Process(0, port, bind=free_port(), host="b")
    for process in (first, second):
        assert isinstance(process.end(), ValueError)
        assert str(process.error).startswith("process 0 came twice, from a (process id")


def test_a_process_that_died_and_was_started_again_is_not_two(port):
    first = Process(0, port)
    until_listening(port)
    with caller(port, 1):
        time.sleep(0.1)
    processes = [first, Process(1, port), Process(2, port)]
    assert [process.end() for process in processes] == [None] * 3


def test_a_process_on_a_host_that_was_lost_is_replaced_by_the_next_of_its_number(port, monkeypatch):
    monkeypatch.setattr(roll, "RIVAL", 0.3)
    first = Process(0, port)
    until_listening(port)
    with caller(port, 1):  # no sign of its end comes: it only answers no question
        time.sleep(0.1)
        processes = [first, Process(1, port), Process(2, port)]
        assert [process.end() for process in processes] == [None] * 3


def test_a_silent_process_is_taken_off_the_roll(port, monkeypatch):
    monkeypatch.setattr(roll, "GONE", 0.3)
    monkeypatch.setattr(roll, "ASK", 0.1)
    first = Process(0, port, count=4, timeout=1.0)
    until_listening(port)
    with caller(port, 1, 4):
        other = Process(2, port, count=4)
        assert ": 1, 3; gone again: 1 on host-1; there: 0 on host-0, 2 on host-2" in str(first.end())
        assert str(other.end()) == str(first.error)


def test_what_differs_between_processes_is_named_as_a_mistake(port):
    first = Process(0, port)
    until_listening(port)
    other = Process(1, port, count=4)
    for process in (first, other):
        assert isinstance(process.end(), ValueError)
        assert str(process.error).startswith("the number of processes is 3 on process 0, host-0 (process id ")
        assert "and 4 on process 1, host-1 (process id" in str(process.error)


def test_what_is_no_process_of_the_run_disturbs_nothing(port):
    first = Process(0, port)
    until_listening(port)
    with contextlib.ExitStack() as stack:
        for text in (b"GET / HTTP/1.1\r\n\r\n", b"{}\n", b'{"process": 1}\n', b"[1]\n", b"\xff" * 20_000, b""):
            stranger = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            with contextlib.suppress(OSError):
                stranger.sendall(text)
        processes = [first, Process(1, port), Process(2, port)]
        assert [process.end() for process in processes] == [None] * 3


def test_a_port_that_another_program_has_is_named(port, monkeypatch):
    monkeypatch.setattr(roll, "FIRST_NOTE", 0.2)
    with socket.create_server(("127.0.0.1", port)):
        first = Process(0, port, timeout=0.5)
        assert f"process 0 cannot listen at 127.0.0.1:{port} (Address already in use)" in str(first.end())
        assert len(first.notes) == 1


def test_a_process_that_comes_after_the_roll_is_told_that_the_run_has_begun(port):
    # As JAX's service does with what is not HTTP/2: it says something of its own, and closes.
    with socket.create_server(("127.0.0.1", port)) as server:
        def serve():
            while True:
                with contextlib.suppress(OSError):
                    connection, _ = server.accept()
                    connection.recv(4096)
                    connection.sendall(b"\0\0\x18\x04\0\0\0\0\0")
                    connection.close()

        threading.Thread(target=serve, daemon=True).start()
        late = Process(1, port, timeout=0.3)
        assert "the run there has begun without this process 1, which waits within 0 s" in str(late.end())
