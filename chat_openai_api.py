"""Talk to a chat model behind an OpenAI-compatible server in the terminal.

The server: python my_openai_api.py in another terminal, or any other one that speaks OpenAI's protocol (llama.cpp, vLLM,
Ollama). The answer is printed while it comes; Ctrl-C stops it, and the server's work on it, but not the program.

    python chat_openai_api.py                                  # a conversation; /help lists its commands
    python chat_openai_api.py --base_url http://192.168.1.5:8000/v1 --model minimind --system "请用一句话回答。"
    echo "你是谁？" | python chat_openai_api.py --temperature 0 # the lines of a pipe or file, as one conversation
"""

import contextlib
import sys

from model.cli import add_flags, from_flags, non_negative_int, script_parser
from model.errors import UserError, run_main, warn
from model.settings import EndpointSettings


def parse_arguments():
    parser = script_parser(__doc__)
    add_flags(parser, EndpointSettings, "server and sampling")
    talk = parser.add_argument_group("conversation")
    talk.add_argument("--system", metavar="TEXT", help="how to answer, as a system prompt (default: none)")
    talk.add_argument("--history", type=non_negative_int, help="earlier exchanges the model sees (default: all)")
    return parser.parse_args()


def main():
    args = parse_arguments()
    if sys.stdin is None:
        raise UserError("there is no standard input to read questions from", exit_code=2)

    # Imported after the arguments are read, so that --help answers at once.
    from model.inference.chat import converse, tell_dropped
    from model.inference.endpoint import Endpoint

    settings = from_flags(EndpointSettings, args)
    endpoint = Endpoint(settings.base_url, settings.api_key)
    listed = endpoint.models()  # a wrong address or key shows here, before anybody types a question
    model = settings.model or next(iter(listed), None)
    if model is None:
        raise UserError(f"{endpoint.place}: lists no model{endpoint.hint}; name one with --model")
    if not listed and endpoint.hint:
        warn(f"{endpoint.place}: lists no model{endpoint.hint}")
    others = [name for name in listed if name != model]
    print(f"{settings.base_url}: {model}" + (f" (--model also knows {', '.join(others)})" if others else ""))

    def reply(messages, write):
        reason, dropped = None, 0
        pieces = endpoint.stream(model, messages, settings.temperature, settings.top_p, settings.max_tokens)
        with contextlib.closing(pieces):  # on Ctrl-C too: the server sees that nobody listens any more
            for piece in pieces:
                write(piece.text)
                reason, dropped = piece.finish_reason or reason, dropped + piece.dropped
        limit = f"--max_tokens {settings.max_tokens}" if settings.max_tokens else "the server's limit"
        print(f" …(cut at {limit})" if reason == "length" else "", flush=True)
        tell_dropped(dropped, messages)
        return dropped

    return converse(reply, args.history, args.system)


if __name__ == "__main__":
    run_main(main)
