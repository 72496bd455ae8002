"""A cluster for tests: it keeps JobSets and machines in memory, and answers kubectl as a Kubernetes API server."""

import http.server
import json
import threading
import urllib.parse

GROUP = "jobset.x-k8s.io/v1alpha2"


class Cluster:
    """Keeps JobSets and gives each its slices in the order of their creation, of as many as there are.

    It says what JobSet's controller says in `status`, no more than `launch.kubectl` may rely on.
    """

    def __init__(self, slices=100):
        self.slices = slices
        self.objects = {}
        self.made = []  # (name, slices, maxRestarts) of all that ever were
        self.most = 0  # how many that had not ended were there at once

    def create(self, item):
        name, spec = item["metadata"]["name"], item["spec"]
        if name in self.objects:
            return False
        item = json.loads(json.dumps(item)) | {"status": {"restarts": 0}}
        item["spec"]["suspend"] = False  # a default of the server
        self.objects[name] = item
        self.made.append((name, spec["replicatedJobs"][0]["replicas"], spec["failurePolicy"]["maxRestarts"]))
        self.most = max(self.most, len(self.running()))
        return True

    def delete(self, name):
        self.objects[name]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"

    def running(self):
        return [name for name, item in self.objects.items() if "conditions" not in item["status"]]

    def tick(self):
        """Pods of what was deleted end; what waits gets its machines."""
        self.objects = {
            name: item for name, item in self.objects.items() if "deletionTimestamp" not in item["metadata"]
        }
        free = self.slices
        for name in self.running():
            item = self.objects[name]
            wanted = item["spec"]["replicatedJobs"][0]["replicas"]
            got = wanted if wanted <= free else 0
            free -= got
            item["status"]["replicatedJobsStatus"] = [{"name": "slice", "ready": got, "succeeded": 0}]

    def end(self, name, condition="Completed", message="jobset completed successfully"):
        self.objects[name]["status"]["conditions"] = [{"type": condition, "status": "True", "message": message}]

    def interrupt(self, name, counted=0):
        status = self.objects[name]["status"]
        status["restarts"] += 1
        status["restartsCountTowardsMax"] = status.get("restartsCountTowardsMax", 0) + counted
        status["replicatedJobsStatus"] = [{"name": "slice", "ready": 0}]


class ApiServer(http.server.ThreadingHTTPServer):
    """As much of Kubernetes' API as kubectl needs to create, list and delete JobSets; `cluster` keeps them."""

    def __init__(self, cluster):
        super().__init__(("127.0.0.1", 0), ApiHandler)
        self.cluster = cluster
        self.validations = []
        self.refusal = None  # (code, reason, message) of every answer to a creation
        self.has_jobsets = True
        self.each_look = lambda cluster: None
        threading.Thread(target=self.serve_forever, daemon=True).start()


class ApiHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, item, code=200):
        body = json.dumps(item).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, code, reason, message):
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason}
        # Of what is invalid, a server says the object and each cause apart.
        details = {"name": "bert", "group": "jobset.x-k8s.io", "kind": "JobSet"}
        causes = [{"reason": "FieldValueInvalid", "message": message, "field": "spec.replicatedJobs[0].name"}]
        self.answer(status | {"message": message, "details": details | {"causes": causes}}, code)

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        resource = {"name": "jobsets", "singularName": "jobset", "namespaced": True, "kind": "JobSet",
                    "verbs": ["create", "delete", "get", "list"]}  # fmt: skip
        kind = {"group": "jobset.x-k8s.io", "kind": "JobSet", "version": "v1alpha2"}
        # That an API server checks fields itself is what kubectl reads from this.
        post = {"parameters": [{"name": "fieldValidation", "in": "query"}], "x-kubernetes-group-version-kind": kind}
        version = {"groupVersion": GROUP, "version": "v1alpha2"}
        group = {"name": "jobset.x-k8s.io", "versions": [version], "preferredVersion": version}
        here = self.server.has_jobsets
        pages = {
            "/version": {"major": "1", "minor": "32", "gitVersion": "v1.32.4"},
            "/api": {"kind": "APIVersions", "versions": ["v1"]},
            "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": []},
            "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": [group] if here else []},
            f"/apis/{GROUP}": {"kind": "APIResourceList", "groupVersion": GROUP, "resources": [resource]},
            "/openapi/v3": {"paths": {f"apis/{GROUP}": {"serverRelativeURL": f"/openapi/v3/apis/{GROUP}?hash=1"}}},
            f"/openapi/v3/apis/{GROUP}": {
                "openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1.32.4"},
                "paths": {f"/apis/{GROUP}/namespaces/{{namespace}}/jobsets": {"post": post, "patch": post}},
            },
        }  # fmt: skip
        if url.path == f"/apis/{GROUP}/namespaces/research/jobsets":
            self.server.cluster.tick()
            self.server.each_look(self.server.cluster)
            wanted = urllib.parse.parse_qs(url.query)["labelSelector"][0].split("=")
            items = [
                item for item in self.server.cluster.objects.values()
                if list(wanted) in [list(pair) for pair in item["metadata"]["labels"].items()]
            ]  # fmt: skip
            self.answer({"apiVersion": GROUP, "kind": "JobSetList", "metadata": {}, "items": items})
        elif url.path in pages:
            self.answer(pages[url.path])
        else:
            self.refuse(404, "NotFound", "the server could not find the requested resource")

    def do_POST(self):
        url = urllib.parse.urlsplit(self.path)
        item = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.validations += urllib.parse.parse_qs(url.query).get("fieldValidation", [])
        assert url.path == f"/apis/{GROUP}/namespaces/research/jobsets"
        if self.server.refusal:
            self.refuse(*self.server.refusal)
        elif self.server.cluster.create(item):
            self.answer(item, 201)
        else:
            name = item["metadata"]["name"]
            self.refuse(409, "AlreadyExists", f'jobsets.jobset.x-k8s.io "{name}" already exists')

    def do_DELETE(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        name = urllib.parse.urlsplit(self.path).path.rsplit("/", 1)[1]
        self.server.cluster.delete(name)
        self.answer(self.server.cluster.objects[name])
