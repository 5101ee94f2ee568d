"""What a conversation is: a list of messages {"role", "content"} with a role of model.tokenizer.ROLES, and only that.

Files spell it in many ways; they are read here into messages and written back from them. The project's own columns are
history, q, a: history is a JSON list of [question, answer], in which a system turn stands as {"role": "system",
"content": text}, usually as the first item.
"""

import itertools

import orjson

PAIR_FIELDS = (("q", "a"), ("instruction", "output"), ("question", "answer"), ("prompt", "response"))
PROMPT_FIELDS = ("prompt", "question", "conversations", "messages", "instruction")
CHOSEN_FIELDS = ("chosen", "response_chosen", "chosen_response")
REJECTED_FIELDS = ("rejected", "reject", "response_rejected", "rejected_response")
ROLE_OF = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model"), "assistant"),
    "system": "system",
}
NO_HISTORY = '"history" is not a list of [question, answer]'


class BadRow(Exception):
    """A row that cannot be read; the message is its kind, the same for all rows with that fault."""


def string(value, field):
    """`value` as text, "" for null; BadRow when it is anything else."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    raise BadRow(f'"{field}" is not a text')


def message(role, content):
    return {"role": role, "content": content}


# ---------------------------------------------------------------------------------- the project's own training rows


def training_conversation(record):
    """Messages of a row {history, q, a} or {conversations} up to its last answer; BadRow: nothing to learn."""
    if "conversations" in record:
        messages = parse_messages(record["conversations"])
    else:
        messages = from_columns(record["history"], record["q"], record["a"])
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise BadRow("no answer to learn from")
    if not messages[-1]["content"].strip():
        raise BadRow("empty answer")
    return messages


def from_columns(history, question, answer):
    """Messages of the columns history, q, a."""
    return [*parse_history(history), message("user", question), message("assistant", answer)]


def to_columns(messages):
    """(history, q, a) of messages as raw_conversation gives them."""
    *earlier, question, answer = messages
    history = []
    for turn in earlier:
        if turn["role"] == "system":
            history.append(turn)
        elif turn["role"] == "user":
            history.append([turn["content"]])
        else:
            history[-1].append(turn["content"])
    return history, question["content"], answer["content"]


def parse_history(history):
    """Messages of a history: a list of [question, answer] and system messages, the JSON text of one, empty or null."""
    if isinstance(history, str):
        try:
            history = orjson.loads(history) if history.strip() else None
        except ValueError:
            raise BadRow(NO_HISTORY) from None
    if history is None:
        return []
    if not isinstance(history, list):
        raise BadRow(NO_HISTORY)
    messages = []
    for item in history:
        if isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], str):
            messages += [message("user", item[0]), message("assistant", item[1])]
        elif isinstance(item, dict) and item.get("role") == "system":
            messages.append(parse_message(item))
        else:
            raise BadRow(NO_HISTORY)
    return messages


def parse_messages(items):
    """Messages of a list of conversation turns."""
    if not isinstance(items, list) or not items:
        raise BadRow("the conversation is not a list of turns")
    return list(map(parse_message, items))


def parse_message(item):
    """One turn in either usual spelling, role/content or from/value, and with any usual name of the role."""
    if not isinstance(item, dict):
        raise BadRow("a conversation turn is not an object with role and content")
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if not isinstance(role, str) or role not in ROLE_OF:
        raise BadRow("a conversation turn has an unknown role")
    if not isinstance(content, str):
        raise BadRow("a conversation turn has no content that is text")
    return message(ROLE_OF[role], content)


# -------------------------------------------------------------------------------------------------------- raw rows


def raw_conversation(record):
    """Messages of one raw instruction or conversation row; they alternate and end with an answer."""
    turns = record.get("conversations", record.get("messages"))
    if turns is None:
        turns = [*parse_history(record.get("history")), *_exchange(record)]
    else:
        turns = parse_messages(turns)
    messages = alternate([*_system(record), *turns])
    if messages[-1]["role"] != "assistant":
        raise BadRow("the conversation does not end with an answer")
    return messages


def raw_preference(record):
    """(messages up to the question, chosen answer, rejected answer) of one raw preference row."""
    pair = record.get("output")
    if not (isinstance(pair, list) and len(pair) == 2):
        names = [next((name for name in fields if name in record), None) for fields in (CHOSEN_FIELDS, REJECTED_FIELDS)]
        if None in names:
            raise BadRow('no "chosen" and "rejected" fields')
        pair = [record[name] for name in names]
    before_chosen, chosen = _reply(pair[0], "chosen")
    before_rejected, rejected = _reply(pair[1], "rejected")
    if before_chosen and before_rejected and before_chosen != before_rejected:
        raise BadRow("chosen and rejected answer different prompts")
    prompt = _prompt(record) or before_chosen or before_rejected
    if not prompt:
        raise BadRow('no "prompt", "question", "instruction" or conversation before the answers')
    messages = alternate([*_system(record), *parse_history(record.get("history")), *prompt])
    if messages[-1]["role"] != "user":
        raise BadRow("the prompt does not end with the user")
    return messages, chosen, rejected


def alternate(messages):
    """The same conversation with user and assistant taking turns, the user first; neighbours of a role are joined with a
    line break.

    A system turn stays one before a question; behind a question or before an answer it belongs to the question.
    """
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
            turns[-1]["content"] = _join(turns[-1]["content"], content)
        else:
            turns.append(message(role, content))
    if not turns or turns[0]["role"] == "assistant":
        raise BadRow("the conversation does not begin with the user")
    return turns


def _join(first, second):
    return f"{first}\n{second}" if first and second else first or second


def _system(record):
    return [message("system", string(record.get("system"), "system"))]


def _exchange(record):
    for question_field, answer_field in PAIR_FIELDS:
        if question_field in record and answer_field in record:
            answer = string(record[answer_field], answer_field)
            return [message("user", _question(record, question_field)), message("assistant", answer)]
    raise BadRow('no question and answer fields ("q"/"a", "instruction"/"output" or "conversations")')


def _question(record, field):
    question = string(record[field], field)
    return _join(question, string(record.get("input"), "input")) if field == "instruction" else question


def _prompt(record):
    """Messages before the two replies; [] when the row leaves them to the replies."""
    for field in PROMPT_FIELDS:
        if isinstance(record.get(field), list) and record[field]:
            return parse_messages(record[field])
        if isinstance(record.get(field), str):
            return [message("user", _question(record, field))]
    return []


def _reply(value, field):
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


# --------------------------------------------------------------------------------------- what fits into a context


def fit_turns(turns, overhead, max_seq_len):
    """Cut a conversation [(role, ids of the content), ...] that ends with an answer to max_seq_len tokens.

    overhead: tokens that a turn has beyond its content, {role: number}. Returns (turns, changes), changes naming what
    was left out: the oldest exchanges go first, then the system turn, then the front of the last question. An answer is
    never cut: where it leaves no room for its question nothing is left, ([], []).
    """
    sizes = [overhead[role] + len(content) for role, content in turns]
    to_end = list(itertools.accumulate(reversed(sizes)))[::-1]
    if to_end[0] <= max_seq_len:
        return turns, []
    roles = [role for role, _ in turns]
    body = int(roles[0] == "system")  # the first turn that goes
    starts = [turn for turn in range(body, len(turns)) if turn == body or roles[turn - 1] == "assistant" != roles[turn]]
    answer = len(turns) - 1
    while answer > starts[-1] and roles[answer - 1] == "assistant":
        answer -= 1
    for system, start in [(body, start) for start in starts] + [
        (0, start) for start in (*starts, *range(starts[-1] + 1, answer))
    ]:
        cut = to_end[start] + system * sizes[0] - max_seq_len
        if cut <= 0:
            kept = turns[:system] + turns[start:]
            break
    else:
        start = answer - 1
        role, content = turns[start]
        if start < starts[-1] or cut >= len(content):
            return [], []
        kept = [(role, content[cut:]), *turns[answer:]]
    lost = {
        "oldest turns left out of a long row": start > body,
        "system turn left out of a long row": body and not system,
        "front of a long question cut": cut > 0,
    }
    return kept, [what for what, happened in lost.items() if happened]
