"""An OpenAI-compatible server: point Open-WebUI, FastGPT, LangChain or the openai package at http://127.0.0.1:8000/v1.

Takes the newest chat checkpoint as 2-eval.py does, or --checkpoint: a .pth of any stage or a Hugging Face folder. It listens
at once, answers 503 while the model loads, and then prints what it serves. Ctrl-C or SIGTERM: it finishes the answers that it
has begun; a second one cuts them off.

    python my_openai_api.py
    python my_openai_api.py --checkpoint out/multi_chat/full_sft_512.pth --lora identity=out/lora_identity_512.pth
                                                    # "model": "identity" picks it
    MINIMIND_API_KEY=secret python my_openai_api.py --host 0.0.0.0 --port 8080

    curl http://127.0.0.1:8000/v1/chat/completions -H "Content-Type: application/json" -d '{"model": "model-identifier",
      "messages": [{"role": "user", "content": "世界上最高的山是什么？"}], "temperature": 0.7, "max_tokens": -1, "stream": true}'
"""

import argparse
import gc
import math
import os
import signal
import socket
import threading
from pathlib import Path

from model.cli import add_flags, from_flags, script_parser
from model.errors import UserError, run_main, say, warn
from model.settings import InferenceSettings, SamplingParameters, ServerSettings


def parse_arguments():
    parser = script_parser(__doc__)
    add_flags(parser, ServerSettings, "server")
    add_flags(parser, InferenceSettings, "checkpoint and machine", leave_out=("lora",))
    several = "a LoRA adapter that clients choose by naming it as their model; may be given several times"
    parser.add_argument(
        "--lora", action="append", default=[], dest="adapters", type=named_file, metavar="NAME=FILE", help=several
    )
    sampling = "sampling of requests that do not say how (OpenAI's defaults unless set here)"
    add_flags(parser, SamplingParameters, sampling, leave_out=("max_new_tokens", "seed"))
    args = parser.parse_args()
    if len(dict(args.adapters)) < len(args.adapters):
        parser.error("argument --lora: a name may be given to one adapter only")
    if args.api_key is None:
        args.api_key = os.environ.get("MINIMIND_API_KEY") or None
    return args


def named_file(text):
    """argparse type: ("identity", "out/lora_identity_512.pth") of "identity=out/lora_identity_512.pth"."""
    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, got {text}")
    return name, file


def listen(host, port):
    """A listening socket. Raises UserError for an address that is none or taken."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address, family=family)
    except (OSError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or "not an address").partition(" (")[0]
        raise UserError(f"--host {host} --port {port}: {reason}; choose others, --port 0: any free port") from None


def main():
    args = parse_arguments()
    settings, engine_settings = from_flags(ServerSettings, args), from_flags(InferenceSettings, args)
    defaults = from_flags(SamplingParameters, args)
    listener = listen(settings.host, settings.port)
    host, port = listener.getsockname()[:2]
    if not host.startswith("127.") and host != "::1" and settings.api_key is None:
        warn(f"--host {settings.host} without --api_key: whoever reaches this machine's port {port} can use the model")

    # Imported after the arguments are read, so that --help answers at once. torch is not among them: it loads with the model.
    from model.inference.api import create_app
    from model.inference.api_server import Server

    app = create_app(settings=settings, defaults=defaults)
    server, service, failures = Server(app), app.state.service, []

    def load():
        try:
            from model.inference.open import open_engine_with_adapters

            memory = math.inf if settings.max_cache_gb is None else settings.max_cache_gb * 1e9
            sizes = dict(max_batch=settings.max_batch, prefix_rows=settings.max_batch, max_cache_bytes=memory)
            engine, path = open_engine_with_adapters(engine_settings, dict(args.adapters), **sizes)
            engine.generate([[engine.model.config.eos_token_id]], SamplingParameters(max_new_tokens=2))  # warm
            gc.collect()
            gc.freeze()  # a large body makes Python look for garbage, for seconds if among all that is loaded
            service.start(engine, Path(path).name.removesuffix(".pth"))
            adapters = f", adapters {', '.join(name for name, _ in args.adapters)}" if args.adapters else ""
            url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
            if server.should_exit:
                return
            say(f"{path}: {engine.description}\n{service.name}{adapters} at {url}, Ctrl-C ends it")
        except BaseException as error:
            failures.append(error)
            server.should_exit = True

    loader = threading.Thread(target=load, name="loader", daemon=True)
    loader.start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)  # run() does so too, but one more may come after it
    server.run(sockets=[listener])
    if failures:
        raise failures[0]
    if not loader.is_alive():
        service.join()
    os._exit(0)  # Python's own end would take a while, wait for the loader, and let one more signal be the exit code


if __name__ == "__main__":
    run_main(main)
