"""The sessions of --stage=serve: texts that arrive in pieces, in one process's memory.

  POST   /sessions     {}, {"context": "..."} or {"saved": "..."} -> 201 {"session": ID}
  POST   /sessions/ID  {"text": "...", "save": true}
                       -> {"label": ..., "probabilities": {...}, "tokens": 12, "saved": "..."}
  DELETE /sessions/ID  204

`saved` is the session in base64, only on request; any server of the same classifier continues it,
also after this one has stopped. Beside the errors of all requests: 400 for a damaged `saved`, 404
for a session that has expired or was deleted, 409 for a `saved` of another classifier and for a
session whose last piece is still being read, 501 for a classifier that cannot read in pieces, 503
for too many sessions.
"""

import base64
import binascii
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from data_pipelines.errors import InputError
from data_pipelines.sources.text import text_fault
from trainer.inference.http_requests import Refusal, answered, body_of, object_of
from trainer.inference.sessions import ForeignSessionError, Session
from trainer.inference.text_classifier import TextClassifier

MAX_PIECE_BYTES = 1 << 16  # one takes the model for about a second
CountedBytes = Callable[[], AbstractContextManager[Callable[[int], None]]]


class SessionTable:
    """Sessions by id, bounded in number and in the time that they may go without a request.

    Args:
        most: Largest number of sessions.
        seconds: Time without a request after which a session expires.
        clock: Gives the time in seconds.
    """

    def __init__(self, most: int, seconds: float, clock: Callable[[], float] = time.monotonic):
        self._most, self._seconds, self._clock = most, seconds, clock
        self._held: OrderedDict[str, tuple[Session, float]] = OrderedDict()  # least recent first

    def __len__(self) -> int:
        self._expire()
        return len(self._held)

    def add(self, session: Session) -> str:
        """Returns the new id of a session.

        Raises:
            Refusal: There are too many.
        """
        if len(self) >= self._most:
            raise Refusal(503, f"there are {self._most} sessions (--max_sessions): try again later")
        id_ = secrets.token_urlsafe(16)
        self._held[id_] = (session, self._clock())
        return id_

    def get(self, id_: str) -> Session:
        """Returns a session, whose time begins anew.

        Raises:
            Refusal: There is none of this id.
        """
        self._expire()
        session, _ = self._found(id_)
        self._held[id_] = (session, self._clock())
        self._held.move_to_end(id_)
        return session

    def remove(self, id_: str) -> None:
        """Removes a session.

        Raises:
            Refusal: There is none of this id.
        """
        self._expire()
        self._found(id_)
        del self._held[id_]

    def _found(self, id_: str) -> tuple[Session, float]:
        if id_ not in self._held:
            raise Refusal(
                404,
                f"there is no session {id_!r:.99}: it was deleted, or had no request for "
                f"{self._seconds:g} s (--session_seconds)",
            )
        return self._held[id_]

    def _expire(self) -> None:
        oldest = self._clock() - self._seconds
        while self._held and next(iter(self._held.values()))[1] < oldest:
            self._held.popitem(last=False)


def session_routes(
    model: TextClassifier,
    table: SessionTable,
    read: Callable[[Sequence[Session]], Awaitable[np.ndarray]],
    max_body_bytes: int,
    counted_bytes: CountedBytes,
) -> list[Route]:
    """Returns the routes of sessions.

    Args:
        model: The classifier.
        table: The sessions.
        read: Returns the probabilities of sessions; may raise Refusal before anything is read.
        max_body_bytes: Of a request.
        counted_bytes: See `Batcher.counted_bytes`.
    """
    busy: set[str] = set()

    async def object_in(request: Request) -> dict[str, Any]:
        with counted_bytes() as add_bytes:
            return object_of(await body_of(request, max_body_bytes, add_bytes))

    async def create(request: Request) -> Response:
        values = await object_in(request)
        return JSONResponse({"session": table.add(_opened(model, values))}, 201)

    async def feed(request: Request) -> Response:
        id_, values = request.path_params["id"], await object_in(request)
        piece, session = piece_of(values), table.get(id_)
        if id_ in busy:
            raise Refusal(409, f"the last piece of session {id_} is being read: await its answer")
        before = session.pending
        busy.add(id_)
        try:
            session.append(piece)
            (found,) = await read([session])
        except InputError as error:
            raise Refusal(413, str(error)) from None
        except Refusal:
            session.pending = before
            raise
        finally:
            busy.discard(id_)
        answer = {**model.prediction(found).in_json(), "tokens": session.tokens}
        if values.get("save"):
            answer["saved"] = base64.b64encode(session.save()).decode()
        return JSONResponse(answer)

    async def delete(request: Request) -> Response:
        table.remove(request.path_params["id"])
        return Response(status_code=204)

    return [
        Route("/sessions", answered(create), methods=["POST"]),
        Route("/sessions/{id}", answered(feed), methods=["POST"]),
        Route("/sessions/{id}", answered(delete), methods=["DELETE"]),
    ]


def _opened(model: TextClassifier, values: dict[str, Any]) -> Session:
    """Returns the session that a request saved, or a new one."""
    if "saved" in values:
        return restored(model, values["saved"])
    (context,) = contexts_of(model.context_key, [values.get("context")])
    return new_session(model, context)


def contexts_of(key: str, contexts: Any) -> list[str | None]:
    """Returns the contexts in a request.

    Args:
        key: The classifier's `context_key`.
        contexts: What the request says.

    Raises:
        Refusal: They are not a list of names, or the classifier has no contexts.
    """
    if not isinstance(contexts, list) or not all(isinstance(c, str | None) for c in contexts):
        raise Refusal(422, "'context' must be a string, and 'contexts' a list of strings")
    if any(contexts) and not key:
        raise Refusal(422, "the classifier has no contexts: it was trained without --context_key")
    return contexts


def new_session(model: TextClassifier, context: str | None = None) -> Session:
    """Returns a new session.

    Raises:
        Refusal: The classifier cannot read a text in pieces.
    """
    try:
        return model.session(context)
    except InputError as error:
        raise Refusal(501, str(error)) from None


def restored(model: TextClassifier, saved: Any) -> Session:
    """Returns the session that a client has saved.

    Raises:
        Refusal: It is damaged, or not of this classifier.
    """
    session = new_session(model)
    try:
        if not isinstance(saved, str):
            raise Refusal(422, "'saved' is not a string")
        session.load(base64.b64decode(saved, validate=True))
    except ForeignSessionError as error:
        raise Refusal(409, str(error)) from None
    except (InputError, binascii.Error) as error:
        raise Refusal(400, f"'saved': {error}") from None
    return session


def piece_of(values: dict[str, Any]) -> str:
    """Returns the piece of text in a request, which may be empty.

    Raises:
        Refusal: There is none, it is too large, or holds NUL or lone surrogates.
    """
    piece = values.get("text")
    if not isinstance(piece, str):
        raise Refusal(422, 'the body must be {"text": "..."}')
    if len(piece.encode("utf-8", "surrogatepass")) > MAX_PIECE_BYTES:
        raise Refusal(413, f"the piece has more than {MAX_PIECE_BYTES:,} bytes: send smaller ones")
    if piece.strip() and (fault := text_fault(piece)):
        raise Refusal(422, fault)
    return piece
