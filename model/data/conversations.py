"""What a conversation is: a list of messages {"role", "content"} with a role of model.tokenizer.ROLES, and only that.

Files spell it in many ways. The project's own columns are history, q, a: history is a JSON list of [question, answer],
in which a system turn stands as {"role": "system", "content": text}, usually as the first item.
"""

import itertools

import orjson

PAIR_FIELDS = (("q", "a"), ("instruction", "output"), ("question", "answer"), ("prompt", "response"))
PROMPT_FIELDS = ("prompt", "question", "conversations", "messages", "instruction")
CHOSEN = ("chosen", "response_chosen", "chosen_response")
REJECTED = ("rejected", "reject", "response_rejected", "rejected_response")
ROLE_OF = {"system": "system", "user": "user", "human": "user", "prompter": "user"}
ROLE_OF |= dict.fromkeys(("assistant", "gpt", "bot", "model"), "assistant")


class BadRow(Exception):
    """A row that cannot be read; the message is its kind, the same for all rows with that fault."""


def string(value, field):
    """`value` as text, "" for null; BadRow when it is anything else."""
    if not isinstance(value, str | None):
        raise BadRow(f'"{field}" is not a text')
    return value or ""


def message(role, content):
    return {"role": role, "content": content}


def parse_row(record):
    """Messages of a row with a question and an answer (and a history), or with a list of turns."""
    turns = record.get("conversations", record.get("messages"))
    if turns is not None:
        return parse_messages(turns)
    for question, answer in PAIR_FIELDS:
        if question in record and answer in record:
            reply = message("assistant", string(record[answer], answer))
            return [*parse_history(record.get("history")), *parse_prompt(record, question), reply]
    raise BadRow('no question and answer fields ("q"/"a", "instruction"/"output" or "conversations")')


def parse_prompt(record, field):
    """Messages of a field that holds a question or a list of turns."""
    if isinstance(record[field], list):
        return parse_messages(record[field])
    question = string(record[field], field)
    if field == "instruction":
        question = join(question, string(record.get("input"), "input"))
    return [message("user", question)]


def parse_history(history):
    """Messages of a history: a list of [question, answer] and system messages, the JSON text of one, empty or null."""
    fault = BadRow('"history" is not a list of [question, answer]')
    if isinstance(history, str):
        try:
            history = orjson.loads(history.strip() or "null")
        except ValueError:
            raise fault from None
    if not isinstance(history, list | None):
        raise fault
    messages = []
    for item in history or []:
        match item:
            case [str(question), str(answer)]:
                messages += [message("user", question), message("assistant", answer)]
            case {"role": "system", "content": str(content)}:
                messages.append(message("system", content))
            case _:
                raise fault
    return messages


def parse_messages(items):
    """Messages of a list of turns, spelled role/content or from/value, with any usual name of the role."""
    if not isinstance(items, list) or not items:
        raise BadRow("the conversation is not a list of turns")
    messages = []
    for item in items:
        if not isinstance(item, dict):
            raise BadRow("a conversation turn is not an object with role and content")
        role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
        if not isinstance(role, str) or role not in ROLE_OF:
            raise BadRow("a conversation turn has an unknown role")
        if not isinstance(content, str):
            raise BadRow("a conversation turn has no content that is text")
        messages.append(message(ROLE_OF[role], content))
    return messages


def training_conversation(record):
    """Messages of a training row up to its last answer; BadRow when there is nothing to learn."""
    messages = parse_row(record)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise BadRow("no answer to learn from")
    if not messages[-1]["content"].strip():
        raise BadRow("empty answer")
    return messages


def training_preference(record):
    """(messages up to the question, chosen answer, rejected answer) of a training row; BadRow when there is nothing to
    learn."""
    messages, chosen, rejected = raw_preference(record)
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise BadRow(f'empty "{name}" answer')
    if chosen == rejected:
        raise BadRow("chosen and rejected answer are the same")
    return messages, chosen, rejected


def to_columns(messages):
    """(history, q, a) of messages as raw_conversation gives them; a training row of these is read as the same again."""
    *earlier, question, answer = messages
    history = []
    for turn in earlier:
        if turn["role"] == "assistant":
            history[-1].append(turn["content"])
        else:
            history.append(turn if turn["role"] == "system" else [turn["content"]])
    return history, question["content"], answer["content"]


def raw_conversation(record):
    """Messages of one raw instruction or conversation row; they alternate and end with an answer."""
    messages = alternate([message("system", string(record.get("system"), "system")), *parse_row(record)])
    if messages[-1]["role"] != "assistant":
        raise BadRow("the conversation does not end with an answer")
    return messages


def raw_preference(record):
    """(messages up to the question, chosen answer, rejected answer) of one raw preference row."""
    pair = record.get("output")
    if not (isinstance(pair, list) and len(pair) == 2):
        pair = [next((record[name] for name in names if name in record), None) for names in (CHOSEN, REJECTED)]
        for name, answer in zip(("chosen", "rejected"), pair):
            if answer is None:
                raise BadRow(f'no "{name}" answer')
    before_chosen, chosen = split_reply(pair[0], "chosen")
    before_rejected, rejected = split_reply(pair[1], "rejected")
    if before_chosen and before_rejected and before_chosen != before_rejected:
        raise BadRow("chosen and rejected answer different prompts")
    given = [(field, record.get(field)) for field in PROMPT_FIELDS]
    fields = [field for field, value in given if (value.strip() if isinstance(value, str) else value)]
    prompt = parse_prompt(record, fields[0]) if fields else before_chosen or before_rejected
    if not prompt:
        raise BadRow('no "prompt", "question", "instruction" or conversation before the answers')
    system = message("system", string(record.get("system"), "system"))
    messages = alternate([system, *parse_history(record.get("history")), *prompt])
    if messages[-1]["role"] != "user":
        raise BadRow("the prompt does not end with the user")
    return messages, chosen, rejected


def split_reply(value, field):
    """(messages before the reply, reply) from a text, one message, or a conversation that ends with the reply."""
    if isinstance(value, dict):
        value = [{"role": "assistant", **value}]
    if not isinstance(value, list):
        return [], string(value, field)
    messages = parse_messages(value)
    if len(messages) == 1:
        return [], messages[0]["content"]
    *before, reply = alternate(messages)
    if reply["role"] != "assistant":
        raise BadRow(f'"{field}" does not end with an answer')
    return before, reply["content"]


def alternate(messages):
    """The same conversation with user and assistant taking turns, the user first; neighbours of a role are joined. A
    system turn stays one before a question; behind a question or before an answer it belongs to the question."""
    turns = []
    for turn in messages:
        role, content = turn["role"], turn["content"]
        previous = turns[-1]["role"] if turns else None
        if role == "system" and (not content or content.isspace()):
            continue
        if role == "system" and previous == "user":
            role = "user"
        if role == "assistant" and previous == "system":
            turns[-1]["role"] = "user"
        if role == previous:
            turns[-1]["content"] = join(turns[-1]["content"], content)
        else:
            turns.append(message(role, content))
    if not turns or turns[0]["role"] == "assistant":
        raise BadRow("the conversation does not begin with the user")
    return turns


def join(first, second):
    """Two texts with a line break between them, unless one is empty."""
    return f"{first}\n{second}" if first and second else first or second


def fit_turns(turns, overhead, max_seq_len):
    """Cut a conversation [(role, ids of the content), ...] that ends with an answer to max_seq_len tokens.

    overhead: tokens that a turn has beyond its content, {role: number}. Returns (turns, changes), changes naming what
    was left out: the oldest exchanges go first, then the system turn, then the front of the last question. An answer is
    never cut: where it leaves no room for its question nothing is left, ([], []).
    """
    sizes = [overhead[role] + len(content) for role, content in turns]
    if sum(sizes) <= max_seq_len:
        return turns, []
    to_end = list(itertools.accumulate(reversed(sizes)))[::-1]
    roles = [role for role, _ in turns]
    body = int(roles[0] == "system")  # the first turn that goes
    starts = [turn for turn in range(body, len(turns)) if turn == body or roles[turn - 1] == "assistant" != roles[turn]]
    within_last = range(starts[-1] + 1, roles.index("assistant", starts[-1]))  # further turns of the last question
    choices = [(body, start) for start in starts] + [(0, start) for start in (*starts, *within_last)]
    fitting = ((system, start) for system, start in choices if system * sizes[0] + to_end[start] <= max_seq_len)
    system, start = next(fitting, choices[-1])
    role, content = turns[start]
    cut = max(0, system * sizes[0] + to_end[start] - max_seq_len)
    if cut and (role == "assistant" or cut >= len(content)):
        return [], []
    lost = {
        "oldest turns left out of a long row": start > body,
        "system turn left out of a long row": body > system,
        "front of a long question cut": cut,
    }
    return [*turns[:system], (role, content[cut:]), *turns[start + 1 :]], [what for what in lost if lost[what]]
