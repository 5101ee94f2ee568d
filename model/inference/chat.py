"""Conversations: the prompt that fits the context, the answer printed while it is being written, the commands of a
terminal."""

import contextlib
import importlib
import sys

from model.data.conversations import message
from model.errors import UserError, tell
from model.tokenizer import encode_text, encoded_turns, generation_prompt, join_turns

COMMANDS = """/clear forgets the conversation, /system TEXT says how to answer (alone: as before), /exit (or Ctrl-D) leaves,
Ctrl-C stops an answer, /help says this again"""


def split_system(messages):
    """(system, turns): the system turn that `messages` begin with, as a list of none or one, and the rest."""
    count = sum(message["role"] == "system" for message in messages[:1])
    return messages[:count], messages[count:]


def last_exchanges(messages, count):
    """`messages` with only the last `count` pairs of question and answer, None: all; a system turn stays."""
    system, turns = split_system(messages)
    return system + (turns if count is None else turns[max(len(turns) - 2 * count, 0) :])


def text_prompt(tokenizer, text):
    """Token ids of a text to go on from. Documents were trained as <s> text </s>, so it begins with <s>."""
    return [tokenizer.bos_token_id, *encode_text(tokenizer, text)]


def conversation_prompt(tokenizer, messages, context, max_new_tokens):
    """Token ids that ask for the assistant's next turn, and how many of the oldest messages had to be dropped.

    Whole exchanges are dropped, never a system turn or the last question, until the answer has max_new_tokens or a
    quarter of the `context` left, whichever is less. A last question that fills the context alone is left to
    Engine.add to refuse.
    """
    system, turns = split_system(messages)
    encoded = encoded_turns(tokenizer, messages)  # nothing is encoded twice
    sizes = [len(join_turns(tokenizer, [turn])[0]) for turn in encoded]
    head, sizes = sum(sizes[: len(system)]) + len(generation_prompt(tokenizer)), sizes[len(system) :]
    room = min(max_new_tokens, context // 4)
    droppable = [place for place in range(1, len(turns)) if turns[place]["role"] == "user" or place == len(turns) - 1]
    for dropped in (0, *droppable):
        if head + sum(sizes[dropped:]) + room <= context:
            break
    kept = [*encoded[: len(system)], *encoded[len(system) + dropped :]]
    return join_turns(tokenizer, kept)[0] + generation_prompt(tokenizer), dropped


def chat_prompt(engine, history, question, parameters):
    """Token ids that ask `question` after the messages `history`; says on stderr what did not fit."""
    messages = [*history, message("user", question)]
    ids, dropped = conversation_prompt(engine.tokenizer, messages, engine.max_length, parameters.max_new_tokens)
    tell_dropped(dropped, messages)
    return ids


def tell_dropped(dropped, messages):
    """Say on stderr how many of `messages` were left out, if any."""
    if dropped:
        tell(f"note: the oldest {dropped} of {len(messages)} messages did not fit the context and were left out")


def show(text):
    """Print the next piece of an answer."""
    print(text, end="", flush=True)


def print_answer(engine, history, question, parameters):
    """Print the answer to `question` after the messages `history`; returns its text. Raises what print_stream does."""
    show("A: ")
    return print_stream(engine, chat_prompt(engine, history, question, parameters), parameters)


def print_stream(engine, prompt_ids, parameters, write=show):
    """Print the answer while it is being written, by write(text), and where it was cut; returns its text.

    Raises UserError for a prompt that Engine.check_prompt refuses, and when the engine fails.
    """
    with contextlib.closing(engine.stream(prompt_ids, parameters)) as deltas:
        for delta in deltas:
            write(delta.text)
    request = delta.request
    if request.finish_reason == "error":
        print()
        raise UserError(request.error)
    if request.finish_reason == "length":
        own_limit = request.limit == parameters.max_new_tokens
        limit = f"--max_new_tokens {request.limit}" if own_limit else f"the context's {engine.max_length} tokens"
        print(f" …(cut at {limit})", end="")
    print()
    return request.text


def converse(answer, remembered=None, system=None):
    """A conversation in the terminal, or with the lines of a file or pipe, until /exit, Ctrl-D or Ctrl-C at a question.

    answer(messages, write) gives the assistant's next turn to write(text) as it comes; it may return how many of the
    oldest messages are not to be shown to it again. A UserError that it raises, or Ctrl-C, ends this turn only; what had
    come of it is remembered as the answer. remembered: how many earlier exchanges it sees, None: all. system: the system
    prompt to begin with. Returns the exit code: 1 when a line of a file or pipe got no whole answer.
    """
    sys.stdin.reconfigure(errors="replace")  # a stray byte in the terminal is no reason to end a conversation
    with contextlib.suppress(ImportError):  # Windows has none
        importlib.import_module("readline")  # input() then edits whole characters and remembers earlier lines
    print(COMMANDS)
    turns, failed = [], False
    while True:
        print()
        try:
            question = input("Q: ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return int(failed)
        if not sys.stdin.isatty():
            print(question)  # so that it stands in the output as it does on a terminal
        command, _, rest = question.partition(" ")
        if command == "/exit":
            return int(failed)
        if command == "/clear":
            turns = []
        elif command == "/system":
            system = rest.strip()
        elif command == "/help":
            print(COMMANDS)
        elif question == command and command[:1] == "/" and command[1:].isalpha():
            print(f"({command}: no such command; /help lists them)")
        elif question:
            before = [message("system", system)] if system else []
            turns, problem = one_turn(answer, before, last_exchanges(turns, remembered), question)
            failed |= problem


def one_turn(answer, system, turns, question):
    """Ask `question` after the messages `system` and `turns` as converse does; returns the turns to remember, with this
    one unless no word of an answer came, and whether it failed in a file or pipe."""
    written, dropped, failed = [], 0, False

    def write(text):
        written.append(text)  # first: Ctrl-C may come in between
        show(text)

    show("A: ")
    try:
        dropped = answer([*system, *turns, message("user", question)], write) or 0
    except KeyboardInterrupt:
        print(" (stopped)")
    except UserError as error:
        failed = not sys.stdin.isatty()  # nobody sits there who reads what a conversation says in passing
        print("" if failed else "\n" * bool(written) + f"({error})", flush=True)
        if failed:
            tell(f"error: {error}")
    text = "".join(written)
    added = [message("user", question), message("assistant", text)] if text else []
    return turns[dropped:] + added, failed
