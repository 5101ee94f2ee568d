"""Conversations with an engine: the prompt that fits the context, the answer printed while it is being written."""

from model.data.conversations import message, parse_history
from model.errors import tell
from model.tokenizer import render_conversation


def conversation_prompt(tokenizer, messages, context, max_new_tokens):
    """Token ids that ask for the assistant's next turn, and how many of the oldest messages had to be dropped.

    Whole exchanges are dropped, never a system turn or the last question, until the answer has max_new_tokens or a
    quarter of the `context` left, whichever is less. A last question that fills the context alone is left to
    Engine.add to refuse.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    room = min(max_new_tokens, context // 4)
    starts = [place for place in range(1, len(turns)) if turns[place]["role"] == "user" or place == len(turns) - 1]
    for dropped in (0, *starts):
        ids, _ = render_conversation(tokenizer, system + turns[dropped:], add_generation_prompt=True)
        if len(ids) + room <= context:
            break
    return ids, dropped


def chat_prompt(engine, history, question, parameters):
    """Token ids that ask `question` after `history`, as training rows have it; says on stderr what did not fit."""
    messages = [*parse_history(list(history)), message("user", question)]
    ids, dropped = conversation_prompt(engine.tokenizer, messages, engine.max_length, parameters.max_new_tokens)
    if dropped:
        tell(f"note: the oldest {dropped} of {len(messages)} messages did not fit the context and were left out")
    return ids


def print_answer(engine, history, question, parameters):
    """Print the answer to `question` after `history`; returns its text."""
    print("A: ", end="", flush=True)
    return print_stream(engine, chat_prompt(engine, history, question, parameters), parameters)


def print_stream(engine, prompt_ids, parameters):
    """Print the answer while it is being written; returns its text."""
    for delta in engine.stream(prompt_ids, parameters):
        print(delta.text, end="", flush=True)
    print()
    return delta.request.text
