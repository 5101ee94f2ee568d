"""One raw row in, one training row out: the schemas that corpora come in, the filters."""

import dataclasses
from typing import NamedTuple

import orjson


class BadRow(Exception):
    """A row that cannot be read; the message is its kind, the same for all rows with that fault."""


class Dropped(Exception):
    """A readable row that a filter refuses; the message is the key of the rule in DROP_RULES."""


DROP_RULES = {
    "empty": "a text is empty or blank",
    "min_chars": "shorter than --min_chars",
    "max_chars": "longer than --max_chars",
    "min_chinese": "share of Chinese below --min_chinese",
    "language": "not in the --language asked for",
    "history": "preference inside a longer conversation (one prompt cannot hold it)",
    "same_answers": "chosen and rejected are the same",
    "duplicate": "exact duplicate (--no_dedup keeps them)",
    "near_duplicate": "near duplicate (--near_dedup)",
}


# ---------------------------------------------------------------------------------------------------------- text

# In UTF-8 the lead bytes E4-E9 begin exactly the characters U+4000-U+9FFF, so bytes can be counted in place of characters.
NOT_CHINESE = bytes(set(range(256)) - set(range(0xE4, 0xEA)))
NOT_A_LETTER = bytes(byte for byte in range(0xC0) if not (byte < 128 and chr(byte).isalpha()))


def chinese_share(utf8):
    """Share of Chinese characters (U+4000-U+9FFF) in the UTF-8 bytes, in 0..1.

    ASCII digits, punctuation and white space count for neither side, so that numbers and layout do not make a text
    foreign; a text of nothing else has share 0.
    """
    return len(utf8.translate(None, NOT_CHINESE)) / max(len(utf8.translate(None, NOT_A_LETTER)), 1)


# ------------------------------------------------------------------------------------------------- schemas of rows

PAIR_FIELDS = (("q", "a"), ("instruction", "output"), ("question", "answer"), ("prompt", "response"))
USER_ROLES, ASSISTANT_ROLES = ("user", "human", "prompter"), ("assistant", "gpt", "bot", "model")
CHOSEN_FIELDS = ("chosen", "response_chosen", "chosen_response")
REJECTED_FIELDS = ("rejected", "reject", "response_rejected", "rejected_response")
CHINESE_NAMES = ("chinese", "zh", "zh-cn", "zh_cn", "cn", "中文")


def string(value, field):
    """`value` as text, "" for null; BadRow when it is anything else."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    raise BadRow(f'"{field}" is not a text')


def join_texts(first, second):
    """Two texts with a line break between them, unless one is empty."""
    return f"{first}\n{second}" if first and second else first or second


def message(item):
    """(role, text) of one conversation turn in either usual spelling: role/content or from/value."""
    if not isinstance(item, dict):
        raise BadRow("a conversation turn is not an object with role and content")
    role = item.get("role", item.get("from"))
    text = string(item.get("content", item.get("value")), "content")
    if role in USER_ROLES:
        return "user", text
    if role in ASSISTANT_ROLES:
        return "assistant", text
    if role == "system":
        return "system", text
    raise BadRow("a conversation turn has an unknown role")


def conversation_turns(messages):
    """[[role, text], ...] from a list of messages: user and assistant alternate, the user first.

    A system turn joins the user turn after it, neighbours of the same role are joined, with a line break.
    """
    if not isinstance(messages, list) or not messages:
        raise BadRow("the conversation is not a list of turns")
    turns = []
    for role, text in map(message, messages):
        role = "user" if role == "system" else role
        if turns and turns[-1][0] == role:
            turns[-1][1] = join_texts(turns[-1][1], text)
        else:
            turns.append([role, text])
    if turns[0][0] != "user":
        raise BadRow("the conversation does not begin with the user")
    return turns


def pair_history(value):
    """History as [[question, answer], ...] from such a list, the JSON text of one, an empty text or null."""
    if isinstance(value, str) and value.strip():
        try:
            value = orjson.loads(value)
        except ValueError:
            raise BadRow('"history" is not a list of [question, answer]') from None
    if not value or isinstance(value, str):
        return []
    if not isinstance(value, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in value
    ):
        raise BadRow('"history" is not a list of [question, answer]')
    return value


def conversation_fields(record):
    """(history [[question, answer], ...], question, answer) of one instruction or conversation row."""
    messages = record.get("conversations", record.get("messages"))
    if messages is not None:
        turns = conversation_turns(messages)
        if turns[-1][0] != "assistant":
            raise BadRow("the conversation does not end with an answer")
        texts = [text for _, text in turns]
        pairs = [list(pair) for pair in zip(texts[::2], texts[1::2])]
        return pairs[:-1], *pairs[-1]
    for question_field, answer_field in PAIR_FIELDS:
        if question_field in record and answer_field in record:
            question = string(record[question_field], question_field)
            if question_field == "instruction":
                question = join_texts(question, string(record.get("input"), "input"))
            return pair_history(record.get("history")), question, string(record[answer_field], answer_field)
    raise BadRow('no question and answer fields ("q"/"a", "instruction"/"output" or "conversations")')


def reply(value, field):
    """(turns before the reply, reply) from a text, one message, or a conversation that ends with the reply."""
    if isinstance(value, dict):
        value = [{"role": "assistant", **value}]
    if not isinstance(value, list):
        return [], string(value, field)
    if len(value) == 1:
        return [], message(value[0])[1]
    turns = conversation_turns(value)
    if turns[-1][0] != "assistant":
        raise BadRow(f'"{field}" does not end with an answer')
    return turns[:-1], turns[-1][1]


def prompt_turns(record):
    """Turns before the two replies, the prompt last; [] when the row leaves them to the replies."""
    for field in ("prompt", "question", "conversations", "messages", "instruction"):
        value = record.get(field)
        if isinstance(value, list) and value:
            return conversation_turns(value)
        if isinstance(value, str):
            if field == "instruction":
                value = join_texts(value, string(record.get("input"), "input"))
            return [["user", value]]
    return []


def preference_fields(record):
    """(history, prompt, chosen, rejected) of one preference row; history is [] unless the prompt has earlier turns."""
    pair = record.get("output")
    if not (isinstance(pair, list) and len(pair) == 2):
        names = [next((name for name in fields if name in record), None) for fields in (CHOSEN_FIELDS, REJECTED_FIELDS)]
        if None in names:
            raise BadRow('no "chosen" and "rejected" fields')
        pair = [record[name] for name in names]
    before_chosen, chosen = reply(pair[0], "chosen")
    before_rejected, rejected = reply(pair[1], "rejected")
    if before_chosen and before_rejected and before_chosen != before_rejected:
        raise BadRow("chosen and rejected answer different prompts")
    turns = prompt_turns(record) or before_chosen or before_rejected
    if not turns:
        raise BadRow('no "prompt", "question", "instruction" or conversation before the answers')
    if turns[-1][0] != "user":
        raise BadRow("the prompt does not end with the user")
    return pair_history(record.get("history")) or turns[:-1], turns[-1][1], chosen, rejected


# -------------------------------------------------------------------------------- rules: one row in, one row out


class Row(NamedTuple):
    """A kept document: which output it goes to, its bytes there, how many rows they are.

    `text` is its UTF-8 text for the share of Chinese and --near_dedup; punctuation of the file format does no harm there.
    """

    output: int
    payload: bytes
    rows: int
    text: bytes


def csv_field(text):
    """`text` as a quoted CSV field (RFC 4180). Always quoted: a lone carriage return would end an unquoted one."""
    return '"' + text.replace('"', '""') + '"'


def check_length(text, low, high=0):
    """Drop the row if `text` is blank or has not low..high characters (high 0: no upper bound)."""
    if not text or text.isspace():
        raise Dropped("empty")
    if len(text) < low:
        raise Dropped("min_chars")
    if 0 < high < len(text):
        raise Dropped("max_chars")


@dataclasses.dataclass(frozen=True)
class PretrainRules:
    """{"text"} -> column text. A document stays whole."""

    min_chars: int = 5
    max_chars: int = 0
    min_chinese: float = 0.3
    frames = ((b"text\n", b""),)

    def convert(self, record):
        if "text" not in record:
            raise BadRow('no "text" field')
        text = string(record["text"], "text")
        check_length(text, self.min_chars, self.max_chars)
        payload = (csv_field(text) + "\n").encode()
        return Row(0, payload, 1, payload)


@dataclasses.dataclass(frozen=True)
class ConversationRules:
    """Instruction and conversation rows -> columns history, q, a; output 0 without history, 1 with."""

    min_chars: int = 1
    max_chars: int = 2048
    min_chinese: float = 0.3
    language: str = "Chinese"
    frames = ((b"history,q,a\n", b""), (b"history,q,a\n", b""))

    def convert(self, record):
        spoken = record.get("language")
        if isinstance(spoken, str) and spoken and not self.wants(spoken.lower()):
            raise Dropped("language")
        history, question, answer = conversation_fields(record)
        for text in (question, answer):
            check_length(text, self.min_chars, self.max_chars)
        if any(not text or text.isspace() for pair in history for text in pair):
            raise Dropped("empty")
        fields = orjson.dumps(history).decode(), question, answer
        payload = (",".join(map(csv_field, fields)) + "\n").encode()
        return Row(1 if history else 0, payload, 1, payload)

    def wants(self, spoken):
        wanted = self.language.lower()
        return wanted in ("any", spoken) or (wanted in CHINESE_NAMES and spoken in CHINESE_NAMES)


@dataclasses.dataclass(frozen=True)
class PreferenceRules:
    """Preference rows -> a JSON list of {prompt, chosen, rejected}."""

    min_chars: int = 1
    max_chars: int = 2048
    min_chinese: float = 0.3
    frames = ((b"[", b"\n]\n"),)

    def convert(self, record):
        history, *fields = preference_fields(record)
        if history:
            raise Dropped("history")
        for text in fields:
            check_length(text, self.min_chars, self.max_chars)
        if fields[1] == fields[2]:
            raise Dropped("same_answers")
        payload = b",\n" + orjson.dumps(dict(zip(("prompt", "chosen", "rejected"), fields)))
        return Row(0, payload, 1, "\n".join(fields).encode())
