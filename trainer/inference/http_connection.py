"""HTTP connections of --stage=serve with deadlines and a bounded number.

uvicorn closes idle connections between requests, but waits for ever for headers and bodies.
"""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 20
# Above LIMIT_CONCURRENCY, requests are answered with 503; above twice as many, connections are
# closed unanswered: a process has 1,024 descriptors.
LIMIT_CONCURRENCY = 256


class HttpConnection(H11Protocol):
    """Aborts a connection on which a request, or the client's reading of an answer, is late."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the deadline of the first request."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(REQUEST_SECONDS, transport.abort)
        if len(self.connections) > 2 * LIMIT_CONCURRENCY:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """Ends the deadline when the request is complete."""
        super().data_received(data)
        self._cancel_if_complete()

    def on_response_complete(self) -> None:
        """Starts the deadline of the next request; the answer must have been read by then."""
        self._deadline.cancel()
        self._deadline = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)
        super().on_response_complete()  # may find the next request complete in the buffer
        self._cancel_if_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the deadline."""
        self._deadline.cancel()
        super().connection_lost(exc)

    def _cancel_if_complete(self) -> None:
        is_answered = self.cycle is None or self.cycle.response_complete
        if not is_answered and self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._deadline.cancel()
