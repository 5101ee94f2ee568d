"""One raw row in, one training row out: the schemas that corpora come in, the filters."""

import dataclasses
from typing import NamedTuple

import orjson

from model.data.conversations import BadRow, raw_conversation, raw_preference, string, to_columns
from model.settings import Checked, flag


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
CHINESE_NAMES = ("chinese", "zh", "zh-cn", "zh_cn", "cn", "中文")
# In UTF-8 the lead bytes E4-E9 begin exactly the characters U+4000-U+9FFF, so bytes can be counted in place of characters.
NOT_CHINESE = bytes(set(range(256)) - set(range(0xE4, 0xEA)))
NOT_A_LETTER = bytes(byte for byte in range(0xC0) if not (byte < 128 and chr(byte).isalpha()))


def chinese_share(utf8):
    """Share of Chinese characters (U+4000-U+9FFF) in the UTF-8 bytes, in 0..1.

    ASCII digits, punctuation and white space count for neither side, so that numbers and layout do not make a text
    foreign; a text of nothing else has share 0.
    """
    return len(utf8.translate(None, NOT_CHINESE)) / max(len(utf8.translate(None, NOT_A_LETTER)), 1)


class Row(NamedTuple):
    """A kept document: which output it goes to, its bytes there, and its UTF-8 text for the share of Chinese and
    --near_dedup, where punctuation of the file format does no harm."""

    output: int
    payload: bytes
    text: bytes


def csv_field(text):
    """`text` as a quoted CSV field (RFC 4180). Always quoted: a lone carriage return would end an unquoted one."""
    return '"' + text.replace('"', '""') + '"'


@dataclasses.dataclass(frozen=True)
class Rules(Checked):
    """What all kinds of rows have in common; `convert` makes a Row of a record, or raises BadRow or Dropped. `suffix` and
    `frames`: of the files that hold them, what these are called and begin and end with."""

    suffix = ".csv"

    min_chars: int = flag(1, "least characters of each question and answer (default: {default})", least=0)
    max_chars: int = flag(2048, "most characters of each question and answer, longer ones are dropped; 0: no limit "
                          "(default: {default})", least=0)  # fmt: skip
    min_chinese: float = flag(0.3, "least share of Chinese characters; ASCII digits, punctuation and spaces do not count "
                              "(default: {default})", least=0, most=1)  # fmt: skip

    def check_lengths(self, *texts):
        for text in texts:
            if not text.strip():
                raise Dropped("empty")
            if len(text) < self.min_chars:
                raise Dropped("min_chars")
            if 0 < self.max_chars < len(text):
                raise Dropped("max_chars")


@dataclasses.dataclass(frozen=True)
class PretrainRules(Rules):
    """{"text"} -> column text. A document stays whole."""

    min_chars: int = flag(5, "least characters of a document (default: {default})", least=0)
    max_chars: int = flag(
        0, "most characters of a document, longer ones are dropped; 0: no limit (default: {default})", least=0
    )
    frames = ((b"text\n", b""),)

    def convert(self, record):
        if "text" not in record:
            raise BadRow('no "text" field')
        text = string(record["text"], "text")
        self.check_lengths(text)
        payload = (csv_field(text) + "\n").encode()
        return Row(0, payload, payload)


@dataclasses.dataclass(frozen=True)
class ConversationRules(Rules):
    """Instruction and conversation rows -> columns history, q, a; output 0 for a single exchange, 1 for several."""

    language: str = flag("Chinese", 'keep rows whose "language" field, where there is one, is this; "any" keeps all, '
                         "for English also set --min_chinese 0 (default: {default})")  # fmt: skip
    frames = ((b"history,q,a\n", b""), (b"history,q,a\n", b""))

    def convert(self, record):
        spoken = record.get("language")
        if isinstance(spoken, str) and spoken and not self.wants(spoken.lower()):
            raise Dropped("language")
        messages = raw_conversation(record)
        history, question, answer = to_columns(messages)
        self.check_lengths(question, answer)
        if any(not message["content"].strip() for message in messages):
            raise Dropped("empty")
        fields = orjson.dumps(history).decode(), question, answer
        payload = (",".join(map(csv_field, fields)) + "\n").encode()
        several = any(message["role"] == "assistant" for message in messages[:-1])
        return Row(int(several), payload, payload)

    def wants(self, spoken):
        wanted = self.language.lower()
        return wanted in ("any", spoken) or (wanted in CHINESE_NAMES and spoken in CHINESE_NAMES)


@dataclasses.dataclass(frozen=True)
class PreferenceRules(Rules):
    """Preference rows -> a JSON list of {prompt, chosen, rejected}; with a system turn the prompt is a list of messages."""

    suffix, frames = ".json", ((b"[", b"\n]\n"),)

    def convert(self, record):
        messages, chosen, rejected = raw_preference(record)
        *system, question = messages
        if any(message["role"] != "system" for message in system):
            raise Dropped("history")
        self.check_lengths(question["content"], chosen, rejected)
        if chosen == rejected:
            raise Dropped("same_answers")
        row = {"prompt": messages if system else question["content"], "chosen": chosen, "rejected": rejected}
        texts = [*(message["content"] for message in messages), chosen, rejected]
        return Row(0, b",\n" + orjson.dumps(row), "\n".join(texts).encode())
