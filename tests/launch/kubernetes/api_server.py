"""A stand-in for an API server that answers as a real one did (see recorded/).

It keeps objects, refuses what exists, is unknown or not allowed, deletes in the foreground, and
hands out the pods, events and logs that a test gives it.
"""

import contextlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Document = dict[str, Any]
RECORDED = Path(__file__).with_name("recorded")
# What the namespaced role `edit` allows, by group and plural; `view` allows to get and list it.
EDIT = {
    "": {"services", "configmaps", "persistentvolumeclaims", "pods", "pods/log", "events"},
    "batch": {"jobs"},
    "networking.k8s.io": {"networkpolicies"},
}
_PATH = re.compile(
    r"/apis?(?:/(?P<group>[a-z0-9]+(?:\.[a-z0-9.-]+)?))??/(?P<version>v\w+)"
    r"(?:/namespaces/(?P<namespace>[\w.-]+))?/(?P<plural>[a-z]+)"
    r"(?:/(?P<name>[\w.-]+))?(?P<sub>/log)?"
)


def recorded(name: str) -> Document:
    """Returns a recorded request with its answer."""
    return json.loads((RECORDED / f"{name}.json").read_text())


class ApiServer(http.server.ThreadingHTTPServer):
    """The stand-in.

    Attributes:
        objects: By path.
        roles: Allowed plurals by group; None for an administrator.
        read_only: Whether the roles allow only to look, as `view` does.
        groups: Of the kinds that are installed.
        pods, events, log: What is listed, and what every pod has printed.
        requests: Method and path with query of each request.
        refusals: Recorded answers to whoever creates an object of this plural.
        log_is_open: Whether a log that is followed stays open, as of a pod that runs.
        log_was_asked: Is set by the first request to follow a log.
        away: Whether connections are closed without an answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, Document] = {}
        self.roles: dict[str, set[str]] | None = None
        self.read_only = False
        self.groups = {"", "batch", "networking.k8s.io"}
        self.pods: list[Document] = []
        self.events: list[Document] = []
        self.log = ""
        self.requests: list[tuple[str, str]] = []
        self.refusals: dict[str, Document] = {}
        self.away = False
        self.log_is_open = False
        self.log_was_asked = threading.Event()

    def add(self, path: str, document: Document) -> None:
        """Puts an object there as if somebody had created it."""
        name = path.rpartition("/")[2]
        metadata = {"name": name, "uid": f"uid-of-{name}", **document.get("metadata", {})}
        self.objects[path] = {"spec": {}, **document, "metadata": metadata}

    def finish_deletions(self) -> None:
        """Removes what is being deleted, as the controller does when the pods have ended."""
        gone = {
            each["metadata"]["uid"]
            for each in self.objects.values()
            if "deletionTimestamp" in each["metadata"]
        }
        for path, each in list(self.objects.items()):
            owners = {owner["uid"] for owner in each["metadata"].get("ownerReferences", [])}
            if each["metadata"]["uid"] in gone or owners & gone:
                del self.objects[path]

    def count(self, method: str, part: str = "") -> int:
        """Returns how many requests had this method and this part in their path."""
        return sum(each[0] == method and part in each[1] for each in self.requests)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: ApiServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it and delayed acknowledgements add 40 ms to each answer

    def _serve(self) -> None:
        if self.server.away:
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, self.path))
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        match = _PATH.fullmatch(url.path)
        assert match, url.path
        code, answer = self._answer(match.groupdict(), url.path, query, body)
        if query.get("follow"):
            self.server.log_was_asked.set()
        while query.get("follow") and self.server.log_is_open:
            time.sleep(0.01)
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PATCH = do_DELETE = _serve

    def _answer(
        self, place: Document, path: str, query: dict[str, str], body: bytes
    ) -> tuple[int, Document | str]:
        server, group, plural = self.server, place["group"] or "", place["plural"]
        resource = plural + (place["sub"] or "")
        details = {"name": place["name"], "group": group, "kind": plural}
        reads = self.command == "GET"
        allowed = server.roles is None or resource in server.roles.get(group, ())
        if not allowed or (server.read_only and not reads):
            verb = {"GET": "get", "POST": "create", "PATCH": "patch", "DELETE": "delete"}
            where = f' in the namespace "{place["namespace"]}"' if place["namespace"] else ""
            where = where or " at the cluster scope"
            message = (
                f'{_full(details)} is forbidden: User "dev" cannot {verb[self.command]} resource '
                f'"{resource}" in API group "{group}"{where}'
            )
            return 403, _status(403, "Forbidden", message, details)
        if group not in server.groups:
            return 404, "404 page not found\n"
        if self.command == "POST":
            return self._create(path, details, query, json.loads(body))
        if plural == "pods" and place["sub"]:
            return 200, server.log
        if plural in ("pods", "events") and place["name"] is None:
            items = server.pods if plural == "pods" else server.events
            return 200, {"items": [each for each in items if _is_selected(each, query)]}
        if path not in server.objects:
            return 404, _status(404, "NotFound", f"{_full(details)} not found", details)
        found = server.objects[path]
        if self.command == "PATCH":
            found["metadata"] |= json.loads(body)["metadata"]
        if self.command == "DELETE":
            if query.get("propagationPolicy") != "Foreground":
                del server.objects[path]
            found["metadata"]["deletionTimestamp"] = "2026-11-28T09:00:00Z"
        return 200, found

    def _create(
        self, path: str, details: Document, query: dict[str, str], document: Document
    ) -> tuple[int, Document]:
        name = document["metadata"]["name"]
        details = details | {"name": name}
        assert query["fieldValidation"] == "Strict"
        if refusal := self.server.refusals.get(details["kind"]):
            return refusal["status"], refusal["body"]
        if f"{path}/{name}" in self.server.objects:
            return 409, _status(409, "AlreadyExists", f"{_full(details)} already exists", details)
        self.server.add(f"{path}/{name}", document)
        return 201, self.server.objects[f"{path}/{name}"]

    def log_message(self, *words: object) -> None:
        """Prints nothing."""


def _full(details: Document) -> str:
    group = f".{details['group']}" if details["group"] else ""
    return f'{details["kind"]}{group} "{details["name"]}"'


def _status(code: int, reason: str, message: str, details: Document) -> Document:
    details = {key: value for key, value in details.items() if value}
    answer = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
    return answer | {"message": message, "reason": reason, "details": details, "code": code}


def _is_selected(item: Document, query: dict[str, str]) -> bool:
    labels = item["metadata"].get("labels", {})
    for pair in filter(None, query.get("labelSelector", "").split(",")):
        key, _, value = pair.partition("=")
        if labels.get(key) != value:
            return False
    for pair in filter(None, query.get("fieldSelector", "").split(",")):
        key, _, value = pair.partition("=")
        found: Any = item
        for word in key.split("."):
            found = found[word]
        if found != value:
            return False
    return True


@contextlib.contextmanager
def running(kubeconfig: Path) -> Iterator[ApiServer]:
    """Yields a server, which `kubeconfig` names with the namespace `team`."""
    server = ApiServer()
    address = {"server": f"http://127.0.0.1:{server.server_port}"}
    context = {"cluster": "c", "user": "u", "namespace": "team"}
    kubeconfig.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "clusters": [{"name": "c", "cluster": address}],
                "users": [{"name": "u", "user": {"token": "secret"}}],
                "contexts": [{"name": "x", "context": context}],
                "current-context": "x",
            }
        )
    )
    thread = threading.Thread(target=server.serve_forever, args=[0.05], daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
