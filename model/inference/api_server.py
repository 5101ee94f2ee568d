"""uvicorn with the application of create_app, and how it ends."""

import asyncio

import uvicorn

from model.inference.api import GRACE


class Server(uvicorn.Server):
    """Serves an application of create_app until SIGINT or SIGTERM, and run() returns for both. The first signal refuses what
    has not arrived yet, and lets the answers be finished that are being written; a second one cuts them off.

    uvicorn itself would cancel what is open then, each with a traceback. Here the connections are closed instead, which to
    every request means no more than that its client has left.
    """

    def __init__(self, app):
        # No WebSockets, for JSON bodies are all there is.
        super().__init__(uvicorn.Config(app, lifespan="off", log_level="warning", access_log=False, ws="none"))
        self.service, self.at_once = app.state.service, False

    def handle_exit(self, number, frame):
        self.at_once, self.should_exit = self.should_exit, True
        if self.at_once:
            self.service.close(drain=False)

    async def shutdown(self, sockets=None):
        self.service.close(drain=not self.at_once)
        self.service.refuse_arriving()
        hanging_up = asyncio.create_task(self.hang_up())
        await super().shutdown(sockets)
        hanging_up.cancel()

    async def hang_up(self):
        """Close the connections whose clients have not read the end of their answers, GRACE seconds after the last one."""
        await asyncio.to_thread(self.service.join)
        for _ in range(20):
            await asyncio.sleep(GRACE / 20)
            if self.at_once:
                break
        for connection in list(self.server_state.connections):
            connection.transport.abort()
