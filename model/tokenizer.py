"""The tokenizer: text <-> ids, conversations -> (ids, loss mask), and a decoder for streams of ids.

One turn of a conversation is `<s>role\\n` content `</s>\\n`. Only this module spells that format: `render_conversation`
gives it as ids, CHAT_TEMPLATE as Jinja for other programs. They agree on ordinary text and differ where content spells
a control token: `render_conversation` encodes it exactly, as text; the template makes one string of all, in which it
would become a control token, so there `<s>` in content is written `< s>`. A tokenizer folder that brings another
template along, v1's for one, has its turns written as that one writes them.

train_tokenizer.py splits every newline off as a token of its own, so encoding pieces separately equals encoding the
joined text wherever the pieces meet at a newline.
"""

import codecs
import functools
import hashlib
import json
from pathlib import Path

from model.errors import UserError
from model.files import atomic_write

DEFAULT_TOKENIZER_PATH = Path(__file__).parent / "minimind_tokenizer"
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2: padding; start of a turn; end of a turn
ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' ~ message['role'] ~ ', expected system, user or assistant') }}"
    "{% endif %}"
    "{{ '<s>' ~ message['role'] ~ '\\n' }}"
    "{{ message['content'] | replace('<s>', '< s>') | replace('</s>', '< /s>') | replace('<unk>', '< unk>') }}"
    "{{ '</s>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)


def load_tokenizer(path=None, checkpoint=None):
    """Read a tokenizer folder (tokenizer.json, tokenizer_config.json) as a transformers fast tokenizer: `path`, else the
    one that the Hugging Face folder `checkpoint` brings along, else the one shipped.

    Raises UserError for a folder that is missing, unreadable, or whose tokenizer lacks <s> or </s>.
    """
    from transformers import PreTrainedTokenizerFast

    path = Path(path or own_tokenizer(checkpoint) or DEFAULT_TOKENIZER_PATH)
    if not (path / "tokenizer.json").is_file():
        reason = "has no tokenizer.json" if path.is_dir() else "no such tokenizer folder"
        raise UserError(f"{path}: {reason}; correct --tokenizer_path, or make one with train_tokenizer.py")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        lines = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"{path}: damaged tokenizer ({lines[0]}); make it again with train_tokenizer.py") from None
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(f"{path}: names no bos_token and eos_token in tokenizer_config.json; expected <s> and </s>")
    return tokenizer


def own_tokenizer(checkpoint):
    """The folder `checkpoint` itself where it has a tokenizer.json, as an export has; None for a .pth or no checkpoint."""
    return checkpoint if checkpoint is not None and Path(checkpoint, "tokenizer.json").exists() else None


def chat_template(tokenizer):
    """The tokenizer's chat template; CHAT_TEMPLATE with its control tokens where it has none."""
    if tokenizer.chat_template:
        return tokenizer.chat_template
    return CHAT_TEMPLATE.replace("'<s>", f"'{tokenizer.bos_token}").replace("'</s>", f"'{tokenizer.eos_token}")


def save_tokenizer(backend, directory):
    """Write a `tokenizers.Tokenizer` as the folder that load_tokenizer and transformers' AutoTokenizer read.

    Each file appears atomically, and tokenizer.json, the only one that depends on training, last.
    """
    unknown, start, end = SPECIAL_TOKENS
    names = {"bos_token": start, "eos_token": end, "unk_token": unknown, "pad_token": unknown}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,  # it would delete spaces before punctuation: decoding must lose nothing
        "model_max_length": 1_000_000,  # the context belongs to the model, not to the tokenizer
        "model_input_names": ["input_ids", "attention_mask"],  # transformers 4 would add token_type_ids
        "chat_template": CHAT_TEMPLATE,
    }
    directory = Path(directory)
    for name, content in (
        ("special_tokens_map.json", json.dumps(names, indent=2)),
        ("tokenizer_config.json", json.dumps(config, indent=2)),
        ("tokenizer.json", backend.to_str(pretty=True)),
    ):
        with atomic_write(directory / name) as handle:
            handle.write(content.encode() + b"\n")


def turn_frames(tokenizer):
    """({role: (text before, text after a turn's content)}, the text after which the assistant writes), as the tokenizer's
    chat template writes them; as CHAT_TEMPLATE does where it has none.

    Raises UserError for a template that is seen to do more than put a frame around each turn: to trim, to change what it
    writes by place, to add a system turn.
    """
    start, end = tokenizer.bos_token, tokenizer.eos_token
    if tokenizer.chat_template in (None, "", CHAT_TEMPLATE):
        return {role: (f"{start}{role}\n", f"{end}\n") for role in ROLES}, f"{start}assistant\n"

    def written(*turns, add_generation_prompt=False):
        messages = [{"role": role, "content": content} for role, content in turns]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    roles = ("system", *("user", "assistant") * 3, "user")
    turns = [(role, f" \n content {place} \n ") for place, role in enumerate(roles)]
    try:
        question = written(turns[1])
        around = {
            "system": (written(*turns[:2]).removesuffix(question), turns[0][1]),
            "user": (question, turns[1][1]),
            "assistant": (written(*turns[1:3]).removeprefix(question), turns[2][1]),
        }
        frames = {role: text.split(content) for role, (text, content) in around.items()}
        generation_prompt = written(turns[1], add_generation_prompt=True).removeprefix(question)
        joined = "".join(frames[role][0] + content + frames[role][1] for role, content in turns) + generation_prompt
        whole = written(*turns, add_generation_prompt=True)
    except Exception as error:  # a template may raise anything
        joined, whole = "", str(error)
    if joined != whole or not frames["assistant"][1].startswith(end):
        name = Path(tokenizer.name_or_path).name
        raise UserError(
            f"{name}: its chat template does not write each turn by itself and {end} after an answer; remove it"
        )
    return {role: tuple(frame) for role, frame in frames.items()}, generation_prompt


class _Derived:
    """What is computed once per tokenizer: an encoder that knows no control tokens, and as ids what stands before and
    after each role's content, and after which the assistant writes."""

    def __init__(self, tokenizer):
        from tokenizers import Tokenizer

        definition = json.loads(tokenizer.backend_tokenizer.to_str())
        definition.update(added_tokens=[], truncation=None, padding=None, post_processor=None)
        self.encoder = Tokenizer.from_str(json.dumps(definition))

        def ids(text):
            return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

        frames, generation_prompt = turn_frames(tokenizer)
        self.headers = {role: ids(before) for role, (before, _) in frames.items()}
        self.tails = {role: ids(after) for role, (_, after) in frames.items()}
        self.generation_prompt = ids(generation_prompt)

    def encode(self, texts):
        return [encoding.ids for encoding in self.encoder.encode_batch_fast(texts, add_special_tokens=False)]


_derived = functools.lru_cache(maxsize=4)(_Derived)  # of each tokenizer


def encode_text(tokenizer, text):
    """Ids of `text`, none of them a control token even where the text spells "</s>"."""
    return _derived(tokenizer).encode([text])[0]


def encode_texts(tokenizer, texts):
    """encode_text of each of a list of texts, on all cores."""
    return _derived(tokenizer).encode(texts)


def render_conversation(tokenizer, messages, add_generation_prompt=False, last_turn_only=False):
    """Encode a conversation, a list of {"role", "content"} -> (ids, mask), two lists of the same length.

    `mask` is 1 on the content and the `</s>` of every assistant turn that is not blank (with last_turn_only: of the last
    one, if it is not), else 0.
    `add_generation_prompt` appends what the model writes after, `<s>assistant\\n`. Raises UserError for a message without
    a known role or without text.
    """
    ids, mask = join_turns(tokenizer, encoded_turns(tokenizer, messages))
    if add_generation_prompt:
        ids += generation_prompt(tokenizer)
    supervised = [int(value > last_turn_only) for value in mask]
    return ids, supervised + [0] * (len(ids) - len(mask))


def generation_prompt(tokenizer):
    """Ids after which the assistant writes."""
    return _derived(tokenizer).generation_prompt


def encoded_turns(tokenizer, messages):
    """[(role, ids of the content), ...] of a conversation, a list of {"role", "content"}. Raises UserError for a message
    without a known role or without text."""
    contents = encode_texts(tokenizer, [_checked_content(message) for message in messages])
    return [(message["role"], content) for message, content in zip(messages, contents)]


def join_turns(tokenizer, turns):
    """(ids, mask) of a conversation [(role, ids of the content), ...].

    mask: bytearray, 1 on the content and the `</s>` of every assistant turn but the last, 2 there on the last, else 0. A
    blank answer is no target: it would teach to say nothing.
    """
    derived, roles = _derived(tokenizer), [role for role, _ in turns]
    last = len(roles) - 1 - roles[::-1].index("assistant") if "assistant" in roles else None
    ids, mask = [], bytearray()
    for index, (role, content) in enumerate(turns):
        header, tail, supervised = derived.headers[role], derived.tails[role], 0
        if role == "assistant" and not _is_blank(tokenizer, content):
            supervised = 2 if index == last else 1
        ids += header
        ids += content
        ids += tail
        mask += bytes(len(header)) + bytes([supervised]) * len(content)
        mask += bytes([supervised]) * len(tail[:1]) + bytes(len(tail[1:]))  # an answer's tail begins with </s>
    return ids, mask


def _is_blank(tokenizer, ids):
    pieces = token_bytes(tokenizer)
    return not b"".join([pieces[token_id] for token_id in ids]).decode("utf-8", "replace").strip()


def _checked_content(message):
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise UserError(f"message {str(message)[:60]!r}: its role must be one of {', '.join(ROLES)}")
    if not isinstance(message.get("content"), str):
        raise UserError(f"message of role {message['role']}: its content must be text, not {message.get('content')!r}")
    return message["content"]


def byte_characters():
    """The character that stands for each byte 0..255 in a byte-level vocabulary: GPT-2's table."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


@functools.lru_cache(maxsize=4)
def token_bytes(tokenizer):
    """The list of every id's bytes (control tokens: none); its lengths turn loss per token into bits per byte."""
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    table = [b""] * len(tokenizer)
    for token, token_id in tokenizer.get_vocab().items():
        known = byte_of.keys() >= set(token)  # an added token is stored as plain text instead
        table[token_id] = bytes(byte_of[character] for character in token) if known else token.encode()
    for token_id in tokenizer.all_special_ids:
        table[token_id] = b""
    return table


class StreamDecoder:
    """Turns ids into text as they come, never half a character: the pieces join to
    `tokenizer.decode(ids, skip_special_tokens=True)`. Bytes that are no UTF-8 become U+FFFD, as in a full decode.
    """

    def __init__(self, tokenizer):
        self.token_bytes = token_bytes(tokenizer)
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id):
        """The characters that `token_id` completes; "" while one is incomplete, for control tokens and unknown ids."""
        known = 0 <= token_id < len(self.token_bytes)
        return self.decoder.decode(self.token_bytes[token_id] if known else b"")

    def flush(self):
        """What is left at the end: U+FFFD for an unfinished character, else ""."""
        return self.decoder.decode(b"", final=True)


def tokenizer_hash(tokenizer):
    """Hex digest of all that decides ids (vocabulary, merges, normalizer, splitting) and of nothing else."""
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in definition["model"].get("merges", [])]
    deciding = [sorted(tokenizer.get_vocab().items()), merges, definition["normalizer"], definition["pre_tokenizer"]]
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
