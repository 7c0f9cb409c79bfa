"""The API server: objects as plain documents, by their REST paths.

`Api` needs no right beyond the namespaced roles `view` (to look) and `edit` (to start and cancel).
"""

import json
from collections.abc import Iterator
from typing import Any, cast
from urllib.parse import urlencode

from launch.kubernetes.manifests import Document

_TIMEOUT_SECONDS = 30
_BUSY = (429, 500, 502, 503, 504)
CLUSTER_WIDE = ("ClusterTrainingRuntime",)


class Refusal(Exception):
    """The API server answered a request with an error.

    Attributes:
        status: The HTTP status.
    """

    def __init__(self, status: int, body: bytes):
        try:
            message = json.loads(body)["message"]
        except (ValueError, KeyError, TypeError):
            message = body.decode(errors="replace")
        super().__init__(message)
        self.status = status


class Api:
    """The API server that the kubeconfig, or in a pod the service account, names.

    Of the Kubernetes client it uses what reads the configuration and gets credentials.

    Attributes:
        errors: What its methods raise if the server refuses a request or cannot be reached.

    Raises:
        ImportError: The extra `warmstate[k8s]` is not installed.
        kubernetes.config.ConfigException: There is no configuration.
    """

    def __init__(self, namespace: str):
        from kubernetes import client, config
        from urllib3.exceptions import HTTPError

        self._configuration = client.Configuration()
        try:
            config.load_kube_config(client_configuration=self._configuration)
            context = config.list_kube_config_contexts()[1]["context"]
        except config.ConfigException:
            config.load_incluster_config(client_configuration=self._configuration)
            context = {}
        self.namespace = namespace or context.get("namespace", "default")
        self._http: Any = client.ApiClient(self._configuration).rest_client.pool_manager
        self.errors = (Refusal, HTTPError)

    def is_outage(self, error: Exception) -> bool:
        """Returns whether the server cannot be reached or is busy, so that a retry may help."""
        return not isinstance(error, Refusal) or error.status in _BUSY

    def create(self, document: Document) -> Document:
        """Creates an object; a field that the server does not know is refused."""
        return self._send("POST", self._path(document, ""), document, {"fieldValidation": "Strict"})

    def get(self, document: Document) -> Document | None:
        """Returns the object that `document` names as it is now, None if there is none."""
        try:
            return self._send("GET", self._path(document))
        except Refusal as error:
            if error.status == 404:  # also if the server does not know the kind
                return None
            raise

    def own(self, document: Document, owner: Document) -> None:
        """Makes `owner` the owner of an object, so that the object is deleted with it."""
        reference = {key: owner[key] for key in ("apiVersion", "kind")}
        reference |= {key: owner["metadata"][key] for key in ("name", "uid")}
        body = {"metadata": {"ownerReferences": [reference]}}
        self._send("PATCH", self._path(document), body)

    def delete(self, document: Document) -> None:
        """Deletes an object once its pods have ended; it is no error if there is none."""
        try:
            # Foreground: the name is free only when no pod of the job is left.
            self._send("DELETE", self._path(document), None, {"propagationPolicy": "Foreground"})
        except Refusal as error:
            if error.status != 404:
                raise

    def pods(self, selector: str, **query: str) -> list[Document]:
        """Returns the pods that a label selector matches, oldest first."""
        pods = self._list("pods", {"labelSelector": selector, **query})
        return sorted(pods, key=lambda pod: pod["metadata"]["creationTimestamp"])

    def events(self, field_selector: str) -> list[Document]:
        """Returns the namespace's events that a field selector matches."""
        return self._list("events", {"fieldSelector": field_selector})

    def log_lines(self, pod: str, **query: str) -> Iterator[str]:
        """Yields the lines that a pod has printed; with follow="true" until it ends."""
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}/log"
        # A log that is followed may be silent for long.
        response = self._request("GET", path, None, query, timeout=None, preload_content=False)
        for line in response:
            yield line.decode(errors="replace")

    def _list(self, plural: str, query: dict[str, str]) -> list[Document]:
        found = self._send("GET", f"/api/v1/namespaces/{self.namespace}/{plural}", None, query)
        return cast(list[Document], found["items"])

    def _path(self, document: Document, name: str | None = None) -> str:
        version, kind = document["apiVersion"], document["kind"].lower()
        plural = f"{kind[:-1]}ies" if kind.endswith("y") else f"{kind}s"
        place = "" if document["kind"] in CLUSTER_WIDE else f"/namespaces/{self.namespace}"
        root = "/apis" if "/" in version else "/api"
        name = document["metadata"]["name"] if name is None else name
        return f"{root}/{version}{place}/{plural}/{name}".rstrip("/")

    def _send(
        self,
        method: str,
        path: str,
        body: Document | None = None,
        query: dict[str, str] | None = None,
    ) -> Document:
        answer = self._request(method, path, body, query or {}, timeout=_TIMEOUT_SECONDS)
        return cast(Document, json.loads(answer.data))

    def _request(
        self, method: str, path: str, body: Document | None, query: dict[str, str], **how: Any
    ) -> Any:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        headers = {"Accept": "*/*", "Content-Type": kind}
        settings: Any = self._configuration.auth_settings()
        for setting in settings.values():
            headers[setting["key"]] = setting["value"]
        answer = self._http.request(
            method,
            f"{self._configuration.host}{path}?{urlencode(query)}",
            body=None if body is None else json.dumps(body),
            headers=headers,
            retries=False,  # urllib3 would retry in silence, and log raw lines
            **how,
        )
        if answer.status >= 300:
            raise Refusal(answer.status, answer.data)
        return answer


def explanation(error: Exception) -> str:
    """Returns one line with the reason for which the API server refused, or cannot be reached."""
    return " ".join(str(error).split())
