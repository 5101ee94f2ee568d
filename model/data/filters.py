"""One raw row in, one training row out: the schemas that corpora come in, the filters."""

import dataclasses
from typing import NamedTuple

import orjson

from model.data.conversations import BadRow, raw_conversation, raw_preference, string, to_columns


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


CHINESE_NAMES = ("chinese", "zh", "zh-cn", "zh_cn", "cn", "中文")


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
    """Instruction and conversation rows -> columns history, q, a; output 0 for a single exchange, 1 for several."""

    min_chars: int = 1
    max_chars: int = 2048
    min_chinese: float = 0.3
    language: str = "Chinese"
    frames = ((b"history,q,a\n", b""), (b"history,q,a\n", b""))

    def convert(self, record):
        spoken = record.get("language")
        if isinstance(spoken, str) and spoken and not self.wants(spoken.lower()):
            raise Dropped("language")
        messages = raw_conversation(record)
        history, question, answer = to_columns(messages)
        for text in (question, answer):
            check_length(text, self.min_chars, self.max_chars)
        if any(not message["content"] or message["content"].isspace() for message in messages):
            raise Dropped("empty")
        fields = orjson.dumps(history).decode(), question, answer
        payload = (",".join(map(csv_field, fields)) + "\n").encode()
        several = any(message["role"] == "assistant" for message in messages[:-1])
        return Row(int(several), payload, 1, payload)

    def wants(self, spoken):
        wanted = self.language.lower()
        return wanted in ("any", spoken) or (wanted in CHINESE_NAMES and spoken in CHINESE_NAMES)


@dataclasses.dataclass(frozen=True)
class PreferenceRules:
    """Preference rows -> a JSON list of {prompt, chosen, rejected}; with a system turn the prompt is a list of messages."""

    min_chars: int = 1
    max_chars: int = 2048
    min_chinese: float = 0.3
    frames = ((b"[", b"\n]\n"),)

    def convert(self, record):
        messages, chosen, rejected = raw_preference(record)
        *system, question = messages
        if any(message["role"] != "system" for message in system):
            raise Dropped("history")
        for text in (question["content"], chosen, rejected):
            check_length(text, self.min_chars, self.max_chars)
        if chosen == rejected:
            raise Dropped("same_answers")
        row = {"prompt": messages if system else question["content"], "chosen": chosen, "rejected": rejected}
        texts = [*(message["content"] for message in messages), chosen, rejected]
        return Row(0, b",\n" + orjson.dumps(row), 1, "\n".join(texts).encode())
