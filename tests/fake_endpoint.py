"""A stand-in for an OpenAI-compatible server, in a thread of the test."""

import contextlib
import http.server
import json
import threading
import time

KEY = "sk-of-this-test"


class FakeEndpoint:
    """What it lists, answers and has seen. answer: the pieces of each answer, or a function of the request's body that gives
    them: texts; an Event to wait for; ("error", message) as servers say it in the middle; None, where the connection breaks
    off. refusal: (status, message) instead of an answer; listing: (status, JSON value) instead of the list of models.
    context: most characters of all messages; overflow: fields of the error that says there are more."""

    def __init__(self):
        self.models, self.answer, self.key, self.refusal = ["minimind", "minimind-lora"], ["你", "好", "！"], None, None
        self.listing = self.context = None
        self.overflow = {"code": "context_length_exceeded"}
        self.finish_reason, self.requests, self.sent, self.disconnects, self.pause = "stop", [], [], 0, 0.0
        self.ended = threading.Event()  # set when an answer came to its end or was given up

    def start(self):
        """Begin to serve; sets .url."""
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler_of(self))
        self.server.daemon_threads, self.server.block_on_close = True, False
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def stop(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def handler_of(fake):
    """The request handler class of a FakeEndpoint."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.allowed() and self.found():
                models = [{"id": name, "object": "model"} for name in fake.models]
                self.reply(*(fake.listing or (200, {"object": "list", "data": models})))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not (self.allowed() and self.found()):
                return
            fake.requests.append(body)
            size = sum(len(message["content"]) for message in body["messages"])
            if size > (fake.context or size):
                return self.reply(400, {"error": {"message": f"{size} characters are too many", **fake.overflow}})
            if fake.refusal:
                status, message = fake.refusal
                return self.reply(status, {"error": {"message": message, "type": "invalid_request_error"}})
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                self.stream(fake.answer(body) if callable(fake.answer) else fake.answer)
            except OSError:
                fake.disconnects += 1
            fake.ended.set()

        def stream(self, pieces):
            count = 0
            for piece in pieces:
                if isinstance(piece, threading.Event):
                    piece.wait(20)
                elif piece is None:
                    return
                elif isinstance(piece, tuple):
                    return self.event({"error": {"message": piece[1], "type": "server_error"}})
                else:
                    count += 1
                    self.chunk({"content": piece}, None)
                    fake.sent.append(piece)
                    time.sleep(fake.pause)
            self.chunk({}, fake.finish_reason)
            self.chunk({}, None)  # as some servers do
            self.event({**chunk(), "choices": [], "usage": usage(count)})
            self.wfile.write(b"data: [DONE]\n\n")

        def chunk(self, delta, reason):
            self.event({**chunk(), "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})

        def event(self, value):
            self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())
            self.wfile.flush()

        def allowed(self):
            """Whether the key is right; if not the client is told."""
            if fake.key in (None, self.headers["Authorization"].removeprefix("Bearer ")):
                return True
            self.reply(401, {"error": {"message": f"wrong key: {self.headers['Authorization']}"}})

        def found(self):
            """Whether the address is one below /v1; if not the client is told."""
            if self.path.startswith("/v1/"):
                return True
            self.reply(404, {"error": {"message": f"{self.path}: no such address"}})

        def reply(self, status, value):
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(content)

        def log_message(self, *words):
            pass

    return Handler


def chunk():
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "minimind"}


def usage(tokens):
    """As if each piece had been two tokens."""
    return {"prompt_tokens": 5, "completion_tokens": 2 * tokens, "total_tokens": 5 + 2 * tokens}
