"""A Cloud of TPUs on this machine: a server on loopback that answers gcloud, and machines that are local processes.

`gcloud` on PATH is a stub that runs `ssh` as such processes and leaves the rest to the real gcloud, or (a call of which
takes two seconds) asks the server itself, with the same requests.
"""

from __future__ import annotations

import http.server
import json
import os
import pathlib
import shutil
import signal
import sys
import threading
import time

from launch.local import free_port
from launch.tpu_resource import hosts

STUB = r"""
import json, os, re, subprocess, sys, urllib.error, urllib.request

words = sys.argv[1:]
assert words[:3] == ["compute", "tpus", "queued-resources"], words
verb, name = words[3:5]
flags = {word.partition("=")[0]: word.partition("=")[2] for word in words[5:]}
base = os.environ["CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU"]
place = f"v2/projects/{os.environ['CLOUDSDK_CORE_PROJECT']}/locations/{flags['--zone']}/queuedResources"


def ask(method, path, body=None):
    request = urllib.request.Request(base + path, json.dumps(body).encode() if body else None, method=method)
    try:
        return json.load(urllib.request.urlopen(request))
    except urllib.error.HTTPError as error:
        said = json.load(error)["error"]
        sys.exit(f"ERROR: (gcloud.compute.tpus.queued-resources.{verb}) {said['status']}: {said['message']}")


if verb != "ssh" and "REAL_GCLOUD" in os.environ:
    os.execv(os.environ["REAL_GCLOUD"], [os.environ["REAL_GCLOUD"], *words])
elif verb == "create":
    node = {"acceleratorType": flags["--accelerator-type"]}
    count = flags.get("--node-count")
    of = {"multisliceParams": {"nodeCount": int(count)}} if count else {"nodeId": flags["--node-id"]}
    ask("POST", f"{place}?queuedResourceId={name}", {"tpu": {"nodeSpec": [{**of, "node": node}]}})
elif verb == "describe":
    answer = ask("GET", f"{place}/{name}")
    print(answer["state"]["state"] if flags["--format"] == "value(state.state)" else json.dumps(answer))
elif verb == "delete":
    assert "--force" in flags
    ask("DELETE", f"{place}/{name}?force=True")
elif verb == "ssh":
    chosen = lambda flag, index: flags.get(flag, "0") in ("all", str(index))
    clients = []
    for worker in ask("GET", f"machines/{name}"):
        if chosen("--node", worker["slice"]) and chosen("--worker", worker["worker"]):
            environment = worker["environment"]
            client = subprocess.Popen(["bash", "-c", flags["--command"]], env=environment, cwd=environment["HOME"])
            open(environment["HOME"] + "/clients", "a").write(f"{client.pid}\n")
            clients.append(client)
    sys.exit(next((code for code in [client.wait() for client in clients] if code), 0) & 255)
"""


class Cloud:
    """The server, for as long as the `with` block runs.

    Attributes:
      scripts: for each request that is made, the states that are told of it one after another; the last one stays.
        Where there are no more, ACTIVE at once.
      environment: of the processes on all machines.
      calls: what gcloud asked, as (method, name, body).
      unreachable: workers, such as "0.1", that ssh does not find.
    """

    def __init__(self, folder: pathlib.Path, real: bool = False):
        self.folder = folder
        self.scripts: list[list[str]] = []
        self.environment: dict[str, str] = {}
        self.calls: list[tuple[str, str, dict]] = []
        self.unreachable: set[str] = set()
        self.most = 0
        self._resources: dict[str, dict] = {}
        self._count = 0
        (folder / "bin").mkdir(parents=True)
        stub = folder / "bin" / "gcloud"
        stub.write_text(f"#!{sys.executable} -IS\n{STUB}")
        stub.chmod(0o755)
        (folder / "token").write_text("token")
        cloud = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def answer(self):
                length = int(self.headers.get("Content-Length") or 0)
                code, body = cloud._answer(self.command, self.path, json.loads(self.rfile.read(length) or b"{}"))
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = answer

            def log_message(self, *words):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        # What the launcher runs with.
        self.caller = {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"http://{self.address}/",
            "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(folder / "token"),
            "CLOUDSDK_CORE_PROJECT": "lab",
            "CLOUDSDK_CONFIG": str(folder / "config"),
            "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1",
            "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "1",
        }
        if real:
            self.caller["REAL_GCLOUD"] = str(shutil.which("gcloud"))

    def __enter__(self) -> Cloud:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for name in list(self._resources):
            self._end_machines(name)
        self._server.shutdown()
        self._server.server_close()

    def names(self, method: str) -> list[str]:
        """Whom gcloud asked so, in order."""
        return [name for what, name, _ in self.calls if what == method]

    def preempt(self, name: str) -> None:
        """Takes the machines away: first the connections break."""
        self._end_machines(name)
        self._resources[name]["states"] = ["SUSPENDED"]

    def disconnect(self, name: str) -> None:
        """Breaks the connections of all machines, whose processes go on."""
        for home in self._homes(name):
            _break_connections(home)

    def _homes(self, name: str) -> list[pathlib.Path]:
        return [pathlib.Path(machine["environment"]["HOME"]) for machine in self._machines(name)]

    def _end_machines(self, name: str) -> None:
        for home in self._homes(name):
            _break_connections(home)
            for group in home.glob(".maskformer/*/*/group"):
                _kill(os.killpg, group.read_text())

    def _machines(self, name: str) -> list[dict]:
        resource = self._resources[name]
        machines = []
        for number in range(resource["slices"]):
            for worker in range(resource["hosts"]):
                home = self.folder / "machines" / str(resource["number"]) / f"{number}.{worker}"
                home.mkdir(parents=True, exist_ok=True)
                index = number * resource["hosts"] + worker
                found = {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{resource['port']}",
                    "JAX_NUM_PROCESSES": str(resource["slices"] * resource["hosts"]),
                    "JAX_PROCESS_ID": str(index),
                }
                environment = {
                    "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}", "HOME": str(home),
                    "GCE_METADATA_IP": f"{self.address}/{name}/{number}/{worker}",
                    # What a machine before this one has left in its image, its disk or a profile.
                    "MEGASCALE_NUM_SLICES": "9", "MEGASCALE_PORT": "9", "TPU_WORKER_ID": "9",
                    **found, **self.environment,
                }  # fmt: skip
                machines.append({"slice": number, "worker": worker, "environment": environment})
        return machines

    def _answer(self, method: str, path: str, body: dict) -> tuple[int, object]:
        path, _, query = path.partition("?")
        words = path.strip("/").split("/")
        if words[0] == "machines":
            return 200, [m for m in self._machines(words[1]) if f"{m['slice']}.{m['worker']}" not in self.unreachable]
        if "computeMetadata" in words:
            return self._metadata(*words[:3], words[-1])
        name = query.partition("queuedResourceId=")[2].partition("&")[0] or words[-1]
        if method != "GET":
            self.calls.append((method, name, body))
        if method == "POST":
            if name in self._resources:
                return _error(409, "ALREADY_EXISTS", f"Resource '{name}' already exists")
            spec = body["tpu"]["nodeSpec"][0]
            self._resources[name] = {
                "number": self._count, "body": body, "port": free_port(),
                "states": self.scripts.pop(0) if self.scripts else ["ACTIVE"],
                "slices": spec.get("multisliceParams", {}).get("nodeCount", 1),
                "hosts": hosts(spec["node"]["acceleratorType"]),
            }  # fmt: skip
            self._count += 1
            self.most = max(self.most, len(self._resources))
            return 200, {"name": "projects/lab/locations/z/operations/1", "done": True, "response": {}}
        if name not in self._resources:
            return _error(404, "NOT_FOUND", f"Resource '{name}' was not found")
        if method == "DELETE":
            self._end_machines(name)
            del self._resources[name]
            return 200, {"name": "projects/lab/locations/z/operations/2", "done": True, "response": {}}
        states = self._resources[name]["states"]
        state, _, why = states[0].partition(": ")
        if len(states) > 1:
            states.pop(0)
        failed = {"failedData": {"error": {"code": 8, "message": why}}} if why else {}
        return 200, {**self._resources[name]["body"], "name": name, "state": {"state": state, **failed}}

    def _metadata(self, name: str, number: str, worker: str, key: str) -> tuple[int, object]:
        resource = self._resources[name]
        if key == "agent-worker-number":
            return 200, worker
        lines = [f"NODE_ID: '{name}'", f"WORKER_ID: '{worker}'"]
        if resource["slices"] > 1:
            lines += [
                f"MEGASCALE_NUM_SLICES: '{resource['slices']}'", f"MEGASCALE_SLICE_ID: '{number}'",
                "MEGASCALE_COORDINATOR_ADDRESS: '127.0.0.1:8080'",
            ]  # fmt: skip
        return (200, "\n".join(lines)) if key == "tpu-env" else _error(404, "NOT_FOUND", key)


def _break_connections(home: pathlib.Path) -> None:
    """Ends what shows the output of a machine, and not what runs there in process groups of its own."""
    for clients in home.glob("clients"):
        waiting = clients.read_text().split()
        for pid in waiting:  # which grows meanwhile
            try:
                waiting += [
                    child
                    for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
                    if os.getpgid(int(child)) == os.getpgid(int(pid))
                ]
            except OSError:
                continue  # it has ended
        for pid in waiting:
            _kill(os.kill, pid)


def _kill(kill, pid: str) -> None:
    try:
        kill(int(pid), signal.SIGKILL)
    except (ProcessLookupError, ValueError):
        pass


def _error(code: int, status: str, message: str) -> tuple[int, object]:
    return code, {"error": {"code": code, "status": status, "message": message}}


def until(ready, what: str, timeout: float = 30.0) -> None:
    """Waits for a condition."""
    deadline = time.monotonic() + timeout
    while not ready():
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.02)
