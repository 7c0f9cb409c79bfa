"""Moto's S3 server in a process, behind a front that fails as a test asks.

    python -m tests.s3_server [HOST]

prints its port, and a line for each request that a fault of kind "hold" has reached.
"""

import contextlib
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = REPOSITORY / ".venv-s3"  # of `make test-s3`
KEY = "test"  # the only access key that the front accepts, and its secret
BUCKET = "bucket"
CONTROL = "/_faults"
ERRORS = {
    "slow_down": (503, "SlowDown"),
    "error": (500, "InternalError"),
    "denied": (403, "AccessDenied"),
    "full": (403, "QuotaExceeded"),  # as Ceph's gateway says it
}
needs_s3 = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("s3fs", "moto", "boto3"))),
    reason="s3fs, moto or boto3 is not installed: make test-s3",
)


class Front:
    """The WSGI application; faults are {"kind", "method", "part", "times"}, the first that fits."""

    def __init__(self, application: Any):
        self._application = application
        self._lock = threading.Lock()
        self._faults: list[dict[str, Any]] = []
        self._counts: Counter[str] = Counter()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        if path == CONTROL:
            return self._control(environ, start_response)
        kind = self._fault(method, path + "?" + environ.get("QUERY_STRING", ""))
        if f"Credential={KEY}/" not in environ.get("HTTP_AUTHORIZATION", ""):
            kind = "denied"
        with self._lock:
            self._counts[f"{method} {kind or 'ok'}"] += 1
        if kind in ("cut", "hold"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0) // 2)
            if kind == "hold":
                print(f"held {method} {path}", flush=True)
                threading.Event().wait()
            self._cut(environ)
        if kind == "cut_reply":
            list(self._application(environ, lambda *words: lambda data: None))
            self._cut(environ)
        if kind and kind.startswith("wait "):
            time.sleep(float(kind[5:]))
        if kind in ERRORS:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            status, code = ERRORS[kind]
            body = f"<Error><Code>{code}</Code><Message>{code}, says the test</Message></Error>"
            start_response(f"{status} {code}", [("Content-Type", "application/xml")])
            return [body.encode()]
        return self._application(environ, start_response)

    def _fault(self, method: str, path: str) -> str | None:
        with self._lock:
            for fault in self._faults:
                if fault["times"] and fault["method"] in ("", method) and fault["part"] in path:
                    fault["times"] -= 1
                    return fault["kind"]
        return None

    def _control(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        data = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        with self._lock:
            if data:
                self._faults = json.loads(data)
            counts = json.dumps(self._counts).encode()
        start_response("200 OK", [])
        return [counts]

    def _cut(self, environ: dict[str, Any]) -> None:
        environ["werkzeug.socket"].shutdown(2)
        raise ConnectionError("cut, as the test asked")


class Server:
    """A running server, as a test sees it."""

    def __init__(self, process: subprocess.Popen[str], endpoint: str):
        self.process, self.endpoint = process, endpoint

    @property
    def environment(self) -> dict[str, str]:
        """Variables by which the driver finds the server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def fail(self, kind: str, method: str = "", part: str = "", times: int = -1) -> None:
        """Makes requests fail from now on that have the method and the part in their path."""
        self.fail_all([{"kind": kind, "method": method, "part": part, "times": times}])

    def fail_all(self, faults: Sequence[dict[str, Any]]) -> None:
        """Replaces the faults; the first one that fits a request counts."""
        self._ask(json.dumps(list(faults)).encode())

    def hold(self, method: str, part: str, after: int) -> None:
        """Holds the requests, after so many that it answers; see `wait_until_held`."""
        fault = {"method": method, "part": part}
        answered, held = {"kind": "wait 0", "times": after}, {"kind": "hold", "times": -1}
        self.fail_all([fault | answered, fault | held])

    def work(self) -> None:
        """Ends all faults."""
        self.fail_all([])

    def counts(self) -> Counter[str]:
        """Returns the numbers of requests, by method and fault, as "PUT ok"."""
        return Counter(json.loads(self._ask(None)))

    def wait_until_held(self) -> str:
        """Returns the next line of a request that is held."""
        assert select.select([self.process.stdout], [], [], 120)[0], "no request was held"
        return self.process.stdout.readline()

    def client(self) -> Any:
        """Returns boto3's client."""
        import boto3

        named = {"aws_access_key_id": KEY, "aws_secret_access_key": KEY}
        return boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", **named)

    def keys(self, prefix: str = "") -> dict[str, int]:
        """Returns the bucket's objects and their sizes."""
        pages = (
            self.client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        )
        return {o["Key"]: o["Size"] for page in pages for o in page.get("Contents", [])}

    def unfinished_uploads(self, prefix: str) -> list[str]:
        """Returns the keys of uploads in parts that were neither completed nor aborted."""
        found = self.client().list_multipart_uploads(Bucket=BUCKET, Prefix=prefix)
        return [upload["Key"] for upload in found.get("Uploads", [])]

    def _ask(self, data: bytes | None) -> bytes:
        with urllib.request.urlopen(self.endpoint + CONTROL, data, timeout=30) as reply:
            return reply.read()


@contextlib.contextmanager
def s3_server(host: str = "127.0.0.1", before: Sequence[str] = ()) -> Iterator[Server]:
    """Serves an empty bucket.

    Args:
        before: Words before the command, as of `ip netns exec`.
    """
    process = subprocess.Popen(
        [*before, sys.executable, "-m", "tests.s3_server", host],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        port = process.stdout.readline().strip()
        yield Server(process, f"http://{host}:{port}")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def main() -> None:
    """Is the server."""
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    host = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1"
    front = Front(DomainDispatcherApplication(create_backend_app))
    server = make_server(host, 0, front, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://{host}:{server.port}"
    named = {"aws_access_key_id": KEY, "aws_secret_access_key": KEY, "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=endpoint, **named).create_bucket(Bucket=BUCKET)
    print(server.port, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
