"""HTTP connections of --stage=serve with deadlines, a bounded number and bounded headers.

uvicorn closes idle connections between requests, but waits for ever for headers and bodies, and
keeps headers of any size.
"""

import asyncio
import socket

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

REQUEST_SECONDS = 20
# Above LIMIT_CONCURRENCY, requests are answered with 503; above twice as many, connections are
# closed unanswered: a process has 1,024 descriptors.
LIMIT_CONCURRENCY = 256
HEADER_BYTES = 1 << 16


class HttpConnection(HttpToolsProtocol):
    """Aborts a connection on which a request, or the client's reading of an answer, is late."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the deadline of the first request."""
        super().connection_made(transport)
        # An answer is two writes, and the second one would wait 40 ms for the client's
        # acknowledgement. asyncio leaves that as it is on a socket that uvicorn has bound.
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._read_bytes = self._request_began = 0
        self._in_headers = True
        self._deadline = self.loop.call_later(REQUEST_SECONDS, transport.abort)
        if len(self.connections) > 2 * LIMIT_CONCURRENCY:
            transport.abort()

    def data_received(self, data: bytes) -> None:
        """Refuses headers that are too large."""
        self._read_bytes += len(data)
        super().data_received(data)
        if self._in_headers and self._read_bytes - self._request_began > HEADER_BYTES:
            self.send_400_response("The headers are too large.")

    def on_headers_complete(self) -> None:
        """Lets the body be as large as the application allows."""
        self._in_headers = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Ends the deadline when the request is complete."""
        # The next request begins in the bytes read last, or after them.
        self._request_began, self._in_headers = self._read_bytes, True
        if not self.cycle.response_complete:  # else the deadline is the next request's
            self._deadline.cancel()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Starts the deadline of the next request; the answer must have been read by then."""
        self._deadline.cancel()
        following = self.pipeline[-1][0] if self.pipeline else None
        super().on_response_complete()  # starts `following`
        if following is None or following.more_body:
            self._deadline = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends the deadline."""
        self._deadline.cancel()
        super().connection_lost(exc)
