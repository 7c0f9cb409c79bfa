"""Reads HTTP requests without trust."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

READ_AND_DROPPED = 64  # times --max_body_bytes are read of an oversized body before the answer


class Refusal(Exception):
    """A refused request: the HTTP status and the reason."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


Respond = Callable[[Request], Awaitable[Response]]


def answered(respond: Respond) -> Respond:
    """Returns a handler that refuses requests of foreign pages, and answers each Refusal."""

    async def handle(request: Request) -> Response:
        try:
            refuse_foreign(request)
            return await respond(request)
        except Refusal as refusal:
            return JSONResponse({"error": str(refusal)}, refusal.status)
        except ClientDisconnect:
            return Response(status_code=400)

    return handle


def refuse_foreign(request: Request) -> None:
    """Raises Refusal for a request that a web page of another site may have sent.

    Browsers let any page post forms and plain text to any address. They ask the server before
    they post JSON, and always send the page's Origin.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.method == "POST" and kind != "application/json":
        raise Refusal(415, f"Content-Type is {kind!r:.99}; it must be application/json")
    origin, host = request.headers.get("origin"), request.headers.get("host", "")
    if origin is not None and origin.partition("://")[2].lower() != host.lower():
        raise Refusal(403, f"Origin {origin!r:.99} is not this server's Host, {host!r:.99}")


async def body_of(request: Request, max_bytes: int, add_bytes: Callable[[int], None]) -> bytes:
    """Returns the body of a request.

    Args:
        max_bytes: Up to READ_AND_DROPPED times as many are read before a larger body is refused:
            a client that is still sending would not see the answer.
        add_bytes: Called with the size of each part that is kept; may raise Refusal.

    Raises:
        Refusal: It is larger than `max_bytes`, declared or not.
    """
    declared = request.headers.get("content-length", "")
    size = int(declared) if declared.isdecimal() else 0
    parts = []
    if size <= READ_AND_DROPPED * max_bytes:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size <= max_bytes:
                add_bytes(len(part))
                parts.append(part)
            elif size > READ_AND_DROPPED * max_bytes:
                break
    if size > max_bytes:
        raise Refusal(413, f"the body is larger than {max_bytes} bytes (--max_body_bytes)")
    return b"".join(parts)


def object_of(body: bytes) -> dict[str, Any]:
    """Returns the JSON object of a request's body.

    Raises:
        Refusal: It is not JSON, or not an object.
    """
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise Refusal(422, f"the body must be a JSON object, not a {type(values).__name__}")
    return values
