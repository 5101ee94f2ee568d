"""Conversations with an engine: the prompt that fits the context, the answer printed while it is being written."""

from model.data.conversations import message
from model.errors import UserError, tell
from model.tokenizer import encoded_turns, generation_prompt, join_turns


def split_system(messages):
    """(system, turns): the system turn that `messages` begin with, as a list of none or one, and the rest."""
    count = sum(message["role"] == "system" for message in messages[:1])
    return messages[:count], messages[count:]


def last_exchanges(messages, count):
    """`messages` with only the last `count` pairs of question and answer, None: all; a system turn stays."""
    system, turns = split_system(messages)
    return system + (turns if count is None else turns[max(len(turns) - 2 * count, 0) :])


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
    if dropped:
        tell(f"note: the oldest {dropped} of {len(messages)} messages did not fit the context and were left out")
    return ids


def print_answer(engine, history, question, parameters):
    """Print the answer to `question` after the messages `history`; returns its text. Raises what print_stream does."""
    print("A: ", end="", flush=True)
    return print_stream(engine, chat_prompt(engine, history, question, parameters), parameters)


def print_stream(engine, prompt_ids, parameters):
    """Print the answer while it is being written, and where it was cut; returns its text.

    Raises UserError for a prompt that Engine.check_prompt refuses, and when the engine fails.
    """
    for delta in engine.stream(prompt_ids, parameters):
        print(delta.text, end="", flush=True)
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
