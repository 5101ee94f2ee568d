"""Conversations with an engine: the prompt that fits the context, the answer printed while it is being written."""

import sys

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
    dropped = 0
    while True:
        ids, _ = render_conversation(tokenizer, system + turns[dropped:], add_generation_prompt=True)
        if len(ids) + room <= context or len(turns) - dropped <= 1:
            return ids, dropped
        dropped += 1
        while turns[dropped]["role"] != "user" and dropped < len(turns) - 1:
            dropped += 1


def as_messages(history, question):
    """Earlier exchanges [question, answer] and the question now asked, as messages with roles."""
    messages = []
    for asked, answered in history:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return messages + [{"role": "user", "content": question}]


def chat_prompt(engine, history, question, parameters):
    """Token ids that ask `question` after `history`; says so on stderr when older exchanges do not fit the context."""
    messages = as_messages(history, question)
    ids, dropped = conversation_prompt(engine.tokenizer, messages, engine.max_length, parameters.max_new_tokens)
    if dropped:
        print(
            f"note: the oldest {dropped} of {len(messages)} messages did not fit the context and were left out",
            file=sys.stderr,
        )
    return ids


def print_stream(engine, prompt_ids, parameters):
    """Print the answer while it is being written; returns its text."""
    parts = []
    for delta in engine.stream(prompt_ids, parameters):
        print(delta.text, end="", flush=True)
        parts.append(delta.text)
    print()
    return "".join(parts)
