"""The roll of a run's processes, called by process 0 before JAX joins them: who has come, who has not, who came twice.

JAX waits too, but in silence, and ends with a C++ stack trace. The roll is held on the coordinator's own port, before
JAX listens there, and so needs no other port, no configuration and nothing but TCP.

Process 0 greets each connection; the process says who it is. Both write JSON, one object a line. From time to time
process 0 asks, and who is still there answers: a process that died, or whose host was lost, is taken off the roll, and
one that was started again takes its place. When all are there process 0 stops listening and tells them to go. Who comes
later finds no greeting, but JAX.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import selectors
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# When those who wait first say for whom, and how often from then on: seconds.
FIRST_NOTE, NOTES = 20.0, 60.0
# Between two questions; without an answer for so long a process is gone. Who is said to be there twice has less time.
ASK, GONE, RIVAL = 5.0, 20.0, 5.0
# Bytes of a line, beyond which it is none of ours.
LONGEST = 8192
# Processes that a line names one by one.
NAMED = 8

Say = Callable[[str], None]
# What to do about processes that have not come; empty if there is nothing particular to say.
Hint = Callable[[list[int]], str]


class JoinError(RuntimeError):
    """This process could not join the others of its run. It may be that they are late: worth another start."""


@dataclasses.dataclass(frozen=True)
class Caller:
    """A process, as it names itself.

    Attributes:
      process, host, pid: which one, and where.
      agreed: what has to be the same on all processes, by the name under which a difference is reported.
    """

    process: int
    agreed: Mapping[str, Any]
    host: str = dataclasses.field(default_factory=socket.gethostname)
    pid: int = dataclasses.field(default_factory=os.getpid)
    token: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    def __str__(self) -> str:
        return f"{self.host} (process id {self.pid})"


def call(address: str, bind: str, me: Caller, processes: int, timeout: float, say: Say, hint: Hint) -> None:
    """Call the roll as process 0; returns when all have come, and nothing listens at `bind` any more.

    Args:
      address: host:port where the others look for this process.
      bind: host:port to listen at.
      me: this process.
      processes: how many there are to be.
      timeout: seconds to wait for them.
      say: is given the lines that tell who is waited for.
      hint: ends the line about those that have not come.

    Raises:
      ValueError: two processes have one number, or do not agree.
      JoinError: some have not come in time, or the port is taken.
    """
    deadline = time.monotonic() + timeout
    listener = _listen(bind, deadline, timeout, say)
    with contextlib.closing(_Roll(listener, me, processes, hint)) as roll:
        threading.Thread(target=roll.look_for_itself, args=(address,), name="roll", daemon=True).start()
        roll.wait(deadline, timeout, say)


def answer(address: str, me: Caller, timeout: float, say: Say, hint: str = "") -> None:
    """Answer the roll as one of the other processes; returns when all have come.

    Args:
      address: host:port of process 0.
      me: this process.
      timeout: seconds to wait for process 0; how long it waits for the others is its own affair.
      say: is given the line that process 0 is waited for.
      hint: ends the line of an error about process 0.

    Raises:
      ValueError: two processes have one number, or do not agree.
      JoinError: process 0 is not there, or not all others have come.
    """
    notes, start = _Notes(say), time.monotonic()
    while True:
        try:
            with socket.create_connection(_split(address), timeout=5) as connection:
                missed = _follow(connection, me)
            if missed is None:
                return
        except OSError as error:
            missed = "process 0 could not be reached there", f" ({error}). Is it running, and is the port open?"
        waited = time.monotonic() - start
        when = f"within {timeout:.0f} s" if waited > timeout else f"for {waited:.0f} s"
        line = f"coordinator {address}: {missed[0]} {when}{missed[1]}{hint}"
        if waited > timeout:
            raise JoinError(line)
        notes.maybe(line)
        time.sleep(0.2 if waited < 30 else 1.0)


def _follow(connection: socket.socket, me: Caller) -> tuple[str, str] | None:
    """Tell process 0 who this is and wait for its word: None to go, or why there is none, around a time."""
    connection.settimeout(GONE)
    connection.sendall(_line(dataclasses.asdict(me)))
    greeted = False
    with connection.makefile("rb") as lines:  # closed with it: it would keep the connection open
        while line := lines.readline(LONGEST):
            message = _parse(line)
            if message is None:
                break
            greeted = True
            if "stop" in message:
                raise ValueError(message["stop"]) if message.get("mistake") else JoinError(message["stop"])
            if "go" in message:
                return None
            if "ask" in message:
                connection.sendall(_line({"here": True}))
    if greeted:
        return "process 0 was there and has not come back", ". Did it fail?"
    return (
        f"the run there has begun without this process {me.process}, which waits",
        ": it was started twice, or again without the others, or the port belongs to another program",
    )


def _listen(bind: str, deadline: float, timeout: float, say: Say) -> socket.socket:
    notes, start = _Notes(say), time.monotonic()
    host, port = _split(bind)
    while True:
        try:
            # One socket for both families, as JAX's own will be.
            if host in ("", "::") and socket.has_dualstack_ipv6():
                return socket.create_server(
                    ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=socket.SOMAXCONN
                )
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server(("" if host == "::" else host, port), family=family, backlog=socket.SOMAXCONN)
        except OSError as error:
            line = f"process 0 cannot listen at {bind} ({os.strerror(error.errno or 0)})"
            if error.errno == errno.EADDRINUSE:
                line += "; another process does: end it (an earlier run?), or choose another port"
            if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                raise JoinError(line) from None
            notes.maybe(f"{line}; waited for {time.monotonic() - start:.0f} of {timeout:.0f} s")
            time.sleep(0.2)


@dataclasses.dataclass(eq=False)
class _Connection:
    """One that has connected, and once it has said so, who it is."""

    socket: socket.socket
    heard: float
    caller: Caller | None = None
    data: bytes = b""
    # It claims the number of another one, which has until then to show that it is still there.
    rival_until: float | None = None

    def send(self, message: Mapping[str, Any]) -> None:
        with contextlib.suppress(OSError):  # that it is gone is seen where it is read
            self.socket.send(_line(message))


class _Roll:
    """Process 0's side."""

    def __init__(self, listener: socket.socket, me: Caller, processes: int, hint: Hint):
        self._listener, self._me, self._processes, self._hint = listener, me, processes, hint
        self._connections: set[_Connection] = set()
        self._left: dict[int, str] = {}
        self._elsewhere = ""
        self._mistake: str | None = None
        listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def wait(self, deadline: float, timeout: float, say: Say) -> None:
        notes, start, asked = _Notes(say), time.monotonic(), 0.0
        while len(self._there()) < self._processes or self._rivals():
            now = time.monotonic()
            if now > deadline:
                self._stop(self._missing(f"within {timeout:.0f} s"), mistake=False)
            notes.maybe(self._missing(f"for {now - start:.0f} s"))
            if now - asked > ASK:
                asked = now
                self._tell({"ask": True})
            for key, _ in self._selector.select(0.1):
                if key.data is None:
                    self._accept()
                else:
                    self._read(key.data)
            self._drop_silent()
            if self._mistake is not None:
                self._stop(self._mistake, mistake=True)
        # First: who hears "go" looks for JAX there, and must not find this.
        self._stop_listening()
        self._tell({"go": True})
        self._let_them_leave()

    def close(self) -> None:
        self._stop_listening()
        for connection in list(self._connections):
            self._forget(connection)
        self._selector.close()

    def look_for_itself(self, address: str) -> None:
        """Whether the others' address leads here, or to another process 0."""
        try:
            with socket.create_connection(_split(address), timeout=10) as connection:
                if _follow(connection, self._me) is not None:
                    self._elsewhere = f"; {address} leads to another program than this one on {self._me.host}"
        except OSError as error:
            self._elsewhere = f"; process 0 itself does not reach {address} ({error})"
        except (ValueError, JoinError) as error:
            self._mistake = str(error)

    def _there(self) -> dict[int, Caller]:
        callers = [c.caller for c in self._connections if c.caller is not None and c.rival_until is None]
        return {self._me.process: self._me} | {caller.process: caller for caller in callers}

    def _rivals(self) -> list[_Connection]:
        return [connection for connection in self._connections if connection.rival_until is not None]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                accepted, _ = self._listener.accept()
                accepted.setblocking(False)
                connection = _Connection(accepted, time.monotonic())
                self._connections.add(connection)
                self._selector.register(accepted, selectors.EVENT_READ, connection)
                connection.send({"roll": self._processes})

    def _read(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(LONGEST)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        connection.data += data
        *lines, connection.data = connection.data.split(b"\n")
        messages = [_parse(line) for line in lines]
        if not data or None in messages or len(connection.data) > LONGEST:
            self._forget(connection)
            return
        connection.heard = time.monotonic()
        for message in messages:
            if connection.caller is None and message is not None:
                self._greet(connection, message)
        for rival in self._rivals():
            assert rival.caller is not None
            if connection.caller and connection is not rival and connection.caller.process == rival.caller.process:
                self._mistake = self._twice(connection.caller, rival.caller)

    def _greet(self, connection: _Connection, message: Mapping[str, Any]) -> None:
        try:
            caller = Caller(**message)
            if not (isinstance(caller.agreed, dict) and type(caller.process) is int):
                raise TypeError
        except TypeError:  # a line of JSON, and none of ours
            self._forget(connection)
            return
        if caller.token == self._me.token:
            connection.send({"go": True})
            self._forget(connection)
            return
        for name in sorted(self._me.agreed.keys() | caller.agreed.keys()):
            ours, theirs = self._me.agreed.get(name), caller.agreed.get(name)
            if ours != theirs:
                self._mistake = (
                    f"{name} is {ours} on process {self._me.process}, {self._me}, and {theirs} on process "
                    f"{caller.process}, {caller}: expected one value on all processes; is one left of another run?"
                )
        known = self._there().get(caller.process)
        connection.caller = caller
        if known is self._me:
            self._mistake = self._twice(self._me, caller)
        elif known is not None:
            connection.rival_until = time.monotonic() + RIVAL
            for other in self._connections:
                if other.caller is known:
                    other.send({"ask": True})
        else:
            self._left.pop(caller.process, None)

    def _drop_silent(self) -> None:
        now = time.monotonic()
        for connection in list(self._connections):
            if now - connection.heard > GONE:
                self._forget(connection)
        for rival in self._rivals():
            assert rival.caller is not None
            same = [c for c in self._connections if c.caller and c.caller.process == rival.caller.process]
            if len(same) == 1 or now > (rival.rival_until or 0.0):
                # The one before did not answer: it is gone.
                for other in same:
                    if other.rival_until is None:
                        self._forget(other)
                rival.rival_until = None
                self._left.pop(rival.caller.process, None)

    def _forget(self, connection: _Connection) -> None:
        if connection not in self._connections:
            return
        self._connections.remove(connection)
        self._selector.unregister(connection.socket)
        connection.socket.close()
        if connection.caller is not None and connection.caller.token != self._me.token:
            self._left[connection.caller.process] = connection.caller.host

    def _stop_listening(self) -> None:
        with contextlib.suppress(KeyError, ValueError):  # it was done already
            self._selector.unregister(self._listener)
        self._listener.close()

    def _let_them_leave(self) -> None:
        # Who closes first keeps the port busy for a while, and it is needed here.
        deadline = time.monotonic() + RIVAL
        while any(c.caller for c in self._connections) and time.monotonic() < deadline:
            for key, _ in self._selector.select(0.1):
                self._read(key.data)

    def _tell(self, message: Mapping[str, Any]) -> None:
        for connection in self._connections:
            connection.send(message)

    def _stop(self, line: str, mistake: bool) -> None:
        self._stop_listening()
        self._tell({"stop": line, "mistake": mistake})
        self._let_them_leave()
        raise ValueError(line) if mistake else JoinError(line)

    def _twice(self, first: Caller, second: Caller) -> str:
        return (
            f"process {first.process} came twice, from {first} and from {second}: give each process a number of its "
            "own (JAX_PROCESS_ID), and start each once"
        )

    def _missing(self, when: str) -> str:
        there = self._there()
        absent = [process for process in range(self._processes) if process not in there]
        gone = {process: host for process, host in self._left.items() if process in absent}
        left = f"; gone again: {_named(gone)}" if gone else ""
        return (
            f"{len(absent)} of {self._processes} processes have not come {when}: {ranges(absent)}{left}; there: "
            f"{_named({process: caller.host for process, caller in there.items()})}"
            f"{self._elsewhere}{self._hint(absent)}"
        )


class _Notes:
    """Says a line after a while, and then now and again."""

    def __init__(self, say: Say):
        self._say, self._next = say, time.monotonic() + FIRST_NOTE

    def maybe(self, line: str) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + NOTES
            self._say(f"waiting: {line}")


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers in short.

    >>> ranges([1, 2, 3, 7, 9, 8])
    '1-3, 7-9'
    """
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    text = ", ".join("-".join(map(str, part)) for part in parts)
    return text if len(text) <= 200 else f"{text[:150]} ... {text[-40:]}"


def _named(hosts: Mapping[int, str]) -> str:
    one_by_one = ", ".join(f"{process} on {hosts[process]}" for process in sorted(hosts)[:NAMED])
    return one_by_one + (f" and {len(hosts) - NAMED} more" if len(hosts) > NAMED else "")


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None
