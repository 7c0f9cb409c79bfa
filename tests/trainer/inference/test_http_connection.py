import asyncio
import socket

from starlette.applications import Starlette
from uvicorn.server import ServerState

from trainer.inference.http_connection import HttpConnection
from trainer.inference.serve import server_of


def test_the_second_write_of_an_answer_does_not_wait_for_an_acknowledgement() -> None:
    async def option_of_a_connection() -> int:
        config, made = server_of(Starlette()).config, asyncio.Queue[HttpConnection]()
        config.load()

        class Noted(HttpConnection):
            def connection_made(self, transport: asyncio.Transport) -> None:
                super().connection_made(transport)
                made.put_nowait(self)

        with socket.socket() as bound:  # as uvicorn binds it: asyncio does not know it for TCP
            bound.bind(("127.0.0.1", 0))
            loop = asyncio.get_running_loop()
            state = ServerState()
            server = await loop.create_server(lambda: Noted(config, state, {}), sock=bound)
            _, writer = await asyncio.open_connection(*bound.getsockname())
            connection = (await made.get()).transport.get_extra_info("socket")
            found = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            writer.close()
            server.close()
            return found

    assert asyncio.run(option_of_a_connection())
