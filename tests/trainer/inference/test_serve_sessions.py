import base64
import http.client
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.trainer.inference.test_serve import JSON, served
from trainer.inference.text_classifier import load_classifier

REVIEW = ["A fine fi", "lm, but <b", "r>it is too ", "long: 中", "文 bad, bad."]


@pytest.fixture(scope="module")
def server(classifier_bundle: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """Yields a server's process and its port."""
    with served(classifier_bundle, "--max_sessions=40") as it:
        yield it


def call(port: int, path: str, values: object = None, method: str = "POST") -> tuple[int, dict]:
    """Returns the status and the answer of a request."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, json.dumps(values or {}).encode(), JSON)
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read() or "{}")
    finally:
        connection.close()


def new_session(port: int, **values: object) -> str:
    status, answer = call(port, "/sessions", values)
    assert status == 201, answer
    return f"/sessions/{answer['session']}"


def test_pieces_are_answered_as_the_text_so_far(server: tuple, classifier_bundle: Path) -> None:
    _, port = server
    model = load_classifier(classifier_bundle)
    session = new_session(port)
    for count, piece in enumerate(REVIEW, 1):
        status, answer = call(port, session, {"text": piece})
        expected = model.predict(["".join(REVIEW[:count])])[0]
        assert status == 200 and answer["label"] == expected.label
        assert answer["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
        assert "saved" not in answer
    assert call(port, session, method="DELETE") == (204, {})
    assert call(port, session, {"text": "x"})[0] == 404


def test_many_sessions_at_once_each_have_their_own_text(
    server: tuple, classifier_bundle: Path
) -> None:
    _, port = server
    texts = [f"the film number {i} was {'good' if i % 3 else 'bad'}, " for i in range(30)]
    sessions = [new_session(port) for _ in texts]
    with ThreadPoolExecutor(16) as clients:
        for _ in range(2):
            found = list(clients.map(lambda s, t: call(port, s, {"text": t}), sessions, texts))
    wholes = load_classifier(classifier_bundle).predict([2 * text for text in texts])
    for (status, answer), expected in zip(found, wholes, strict=True):
        assert status == 200
        assert answer["probabilities"] == pytest.approx(expected.probabilities, abs=1e-5)
    for session in sessions:
        assert call(port, session, method="DELETE")[0] == 204


def test_what_is_refused(server: tuple, make_classifier_bundle: Callable[..., Path]) -> None:
    _, port = server
    session = new_session(port)
    status, answer = call(port, session, {"text": "A fine fi", "save": True})
    saved, before = base64.b64decode(answer["saved"]), answer
    other = load_classifier(make_classifier_bundle(pooling="mean")).session().save()
    for body, expected, says in (
        ({"saved": base64.b64encode(other).decode()}, 409, "belongs to the classifier"),
        ({"saved": base64.b64encode(saved[:-1]).decode()}, 400, "damaged"),
        ({"saved": base64.b64encode(os.urandom(300)).decode()}, 400, "damaged"),
        ({"saved": "no base64!"}, 400, "'saved'"),
        ({"saved": 3}, 422, "'saved' is not a string"),
        ([1], 422, "must be a JSON object"),
    ):
        status, answer = call(port, "/sessions", body)
        assert (status, says in answer["error"]) == (expected, True), answer
    for body, expected, says in (
        ({}, 422, 'must be {"text"'),
        ({"text": 3}, 422, 'must be {"text"'),
        ({"text": "a\0b"}, 422, "NUL"),
        ({"text": "\ud800"}, 422, "lone surrogate"),
        ({"text": "a " * 40_000}, 413, "more than 65,536 bytes"),
        ({"text": "x" * 20_000}, 413, "without a space"),
    ):
        status, answer = call(port, session, body)
        assert (status, says in answer["error"]) == (expected, True), answer
    status, answer = call(port, session, {"text": "", "save": True})
    assert status == 200 and answer == before  # nothing that was refused was read
    assert call(port, "/sessions/none", {"text": "a"})[0] == 404
    assert call(port, "/sessions/none", method="DELETE")[0] == 404
    assert call(port, session, method="DELETE")[0] == 204


def test_the_number_of_sessions_is_bounded(server: tuple) -> None:
    _, port = server
    sessions = [new_session(port) for _ in range(40)]
    status, answer = call(port, "/sessions")
    assert status == 503 and "--max_sessions" in answer["error"]
    for session in sessions:
        assert call(port, session, method="DELETE")[0] == 204
    assert call(port, new_session(port), method="DELETE")[0] == 204


def test_a_classifier_of_the_whole_text_has_no_sessions(
    make_classifier_bundle: Callable[..., Path],
) -> None:
    from trainer.inference.http_requests import Refusal
    from trainer.inference.serve_sessions import new_session

    with pytest.raises(Refusal, match="--initial_state=encode") as caught:
        new_session(load_classifier(make_classifier_bundle(reads_first=True)))
    assert caught.value.status == 501


def test_contexts_of_texts_and_sessions(make_classifier_bundle: Callable[..., Path]) -> None:
    folder = make_classifier_bundle(num_contexts=3)
    text, contexts = "A fine film.", ["ann", "bob", "nobody", None]
    expected = load_classifier(folder).predict([text] * 4, contexts)
    assert expected[2] == expected[3] != expected[0]
    with served(folder) as (_, port):
        status, answer = call(port, "/predict", {"texts": [text] * 4, "contexts": contexts})
        assert status == 200
        found = [prediction["probabilities"] for prediction in answer["predictions"]]
        for context, each, wanted in zip(contexts, found, expected, strict=True):
            assert each == pytest.approx(wanted.probabilities, abs=2e-6)
            one = call(port, "/predict", {"text": text, "context": context})[1]["predictions"][0]
            session = new_session(port, **({"context": context} if context else {}))
            in_session = call(port, session, {"text": text})[1]
            for other in (one, in_session):
                assert other["probabilities"] == pytest.approx(each, abs=2e-6)
        for body, says in (
            ({"texts": [text], "contexts": ["ann", "bob"]}, "2 contexts for 1 texts"),
            ({"texts": [text], "contexts": "ann"}, "'contexts' a list of strings"),
            ({"text": text, "context": 3}, "'context' must be a string"),
        ):
            status, answer = call(port, "/predict", body)
            assert (status, says in answer["error"]) == (422, True), answer


def test_a_context_for_a_classifier_without_is_refused(server: tuple) -> None:
    for path, body in (
        ("/predict", {"text": "a", "context": "ann"}),
        ("/sessions", {"context": "ann"}),
    ):
        status, answer = call(server[1], path, body)
        assert (status, "without --context_key" in answer["error"]) == (422, True)


def test_sessions_expire_by_their_last_request(classifier_bundle: Path) -> None:
    from trainer.inference.http_requests import Refusal
    from trainer.inference.serve_sessions import SessionTable

    now = [0.0]
    table = SessionTable(most=3, seconds=10, clock=lambda: now[0])
    model = load_classifier(classifier_bundle)
    first, second = table.add(model.session()), table.add(model.session())
    now[0] = 9
    table.get(first)
    now[0] = 11
    with pytest.raises(Refusal, match="no request for 10 s") as caught:
        table.get(second)
    assert caught.value.status == 404 and len(table) == 1
    now[0] = 19
    assert table.get(first) is table.get(first)
    now[0] = 30
    assert len(table) == 0


def test_term_answers_the_piece_and_its_session_continues_elsewhere(
    server: tuple, classifier_bundle: Path
) -> None:
    """Comes last: it ends the module's server."""
    process, port = server
    session = new_session(port)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    text = "a long text, " * 4000
    connection.request("POST", session, json.dumps({"text": text, "save": True}).encode(), JSON)
    assert call(port, "/healthz", method="GET")[0] == 200  # what was sent before is read by now
    process.send_signal(signal.SIGTERM)
    reply = connection.getresponse()
    answer = json.loads(reply.read())
    connection.close()
    assert reply.status == 200 and process.wait(timeout=30) == 0
    model = load_classifier(classifier_bundle)
    local = model.session()
    local.load(base64.b64decode(answer["saved"]))
    assert local.tokens == answer["tokens"] == 16_000
    found = model.prediction(local.probabilities()).probabilities
    assert found == pytest.approx(answer["probabilities"], abs=1e-5)
