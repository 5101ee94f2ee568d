"""Training the tokenizer: a fair sample of text -> a byte-level BPE, the standard `tokenizers.Tokenizer`.

Words are chosen by byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909): every character seen often enough
becomes a word; then the pair of neighbouring words seen most often becomes a word, again and again. Three choices
differ from GPT-2's recipe for the sake of Chinese:
  - Merging starts from characters, not bytes, so no word holds the end of one character and the start of the next.
    The result is written as byte-level merges (bytes -> character -> words): any text can be encoded and comes back
    exactly, and a stream of tokens shows whole characters.
  - Nothing but newlines and digits is split off beforehand: Chinese has no spaces, and `了。` is a good word. This
    alone gives 4 % more characters per token.
  - The sample is shared out fairly between groups of text, so that one large source does not decide the words for all.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import random
import sys

from tqdm import tqdm

from model.data.conversations import BadRow, parse_row
from model.data.rows import RowReport, iter_records, read_lines
from model.errors import UserError
from model.files import uncompressed_suffix
from model.tokenizer import ROLES, SPECIAL_TOKENS, byte_characters

# One token each, however rare in the sample: the names in every turn's header, and the blank of exam questions.
WHOLE_WORDS = (*ROLES, "____")
CHARACTER_SHARE = 20e-6  # characters rarer than this are better spelled by their bytes than given a word of their own
HELD_OUT_SHARE = 0.01
VOCABULARY_SIZES = range(512, (1 << 16) + 1)  # the token cache stores uint16


@dataclasses.dataclass
class Sample:
    """Texts to train on, texts held out, and {group: characters} of all that was there and of what was not excluded."""

    texts: list
    held_out: list
    sizes: dict
    kept_sizes: dict


def read_sample(paths, max_characters, group_field=None, excluded=(), seed=0):
    """Draw a Sample of at most `max_characters` from .csv, .jsonl and .txt files, each group with a fair share.

    A file is a group, or with `group_field` the rows that agree in that field; groups beginning with one of `excluded`
    stay out. Bad rows are summed up on stderr. Raises UserError for a file that cannot be read and when no text is left.
    """
    sizes = count_groups(paths, group_field)
    kept = {group: size for group, size in sizes.items() if not group.startswith(tuple(excluded))}
    if not sum(kept.values()):
        raise UserError(f"{', '.join(map(str, paths))}: no text to train on; look at --data_path and --exclude_groups")
    shares = fair_shares(kept, max_characters)
    return Sample(*sample_documents(paths, group_field, kept, shares, seed), sizes, kept)


def iter_documents(path, group_field, report):
    """Stream (group, text) of a file: of a row of .csv/.jsonl (turns are joined by newlines), of a line of .txt."""
    if uncompressed_suffix(path) == ".txt":
        yield from ((str(path), line) for line in iter_text_lines(path, report) if line)
        return
    columns = column_layout(path) + ((group_field,) if group_field else ())
    for row in iter_records(path, columns, report, ("history", "conversations"), "conversations"):
        try:
            texts = [row["text"]] if "text" in row else [message["content"] for message in parse_row(row)]
        except BadRow as error:
            report.drop(str(error), report.place)
        else:
            yield row.get(group_field) or str(path), "\n".join(texts)


def iter_text_lines(path, report):
    for number, line in read_lines(path, report):
        report.rows += 1
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            report.drop("not UTF-8", f"{path}:{number}")
    if not report.rows:
        raise UserError(f"{path}: is empty, it has no lines")


def column_layout(path):
    """The columns, of texts or of conversations, of which the file has a readable row."""
    for columns in (("text",), ("history", "q", "a")):
        with contextlib.suppress(UserError):
            next(iter_records(path, columns, RowReport(), ("history", "conversations"), "conversations"))
            return columns
    return ("text",)  # whoever reads these is told what is wrong


def count_groups(paths, group_field):
    """Characters of every group, reporting bad rows on stderr: Counter {group: characters}."""
    sizes = collections.Counter()
    with tqdm(desc="Counting", unit=" rows", unit_scale=True) as progress:
        for path in paths:
            report = RowReport()
            for group, text in iter_documents(path, group_field, report):
                sizes[group] += len(text)
                progress.update()
            if report.dropped:
                tqdm.write(f"{path}: " + "\n".join(report.summary()), file=sys.stderr)
    return sizes


def fair_shares(sizes, budget):
    """Characters to take of each group: all of the small ones, and the same number of all others, `budget` in all."""
    shares, left = {}, budget
    for index, (group, size) in enumerate(sorted(sizes.items(), key=lambda item: (item[1], item[0]))):
        shares[group] = min(size, left // (len(sizes) - index))
        left -= shares[group]
    return shares


def sample_documents(paths, group_field, sizes, shares, seed):
    """Draw each group's share evenly from all of its rows -> (documents to train on, held-out documents)."""
    random_state, left, sample, held_out = random.Random(seed), dict(shares), [], []
    with tqdm(desc="Sampling", total=sum(shares.values()), unit=" characters", unit_scale=True) as progress:
        for path in paths:
            for group, text in iter_documents(path, group_field, RowReport()):
                if not left.get(group) or random_state.random() * sizes[group] >= shares[group]:
                    continue
                text = text[: left[group]]
                left[group] -= len(text)
                (held_out if random_state.random() < HELD_OUT_SHARE else sample).append(text)
                progress.update(len(text))
    if not held_out and len(sample) > 1:
        held_out.append(sample.pop())
    return sample, held_out


def choose_alphabet(counts, room):
    """The frequent characters, most frequent first; their merges take at most `room` words."""
    lowest = max(2, CHARACTER_SHARE * counts.total())
    alphabet, merges = [], set()
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        utf8 = character.encode()
        needed = {utf8[:length] for length in range(2, len(utf8) + 1)} - merges
        if count < lowest or len(merges) + len(needed) > room:
            break
        alphabet.append(character)
        merges |= needed
    return alphabet


def learn_character_merges(sample, alphabet, count):
    """Byte-pair encoding over characters: the first `count` merges as (left, right) texts, by falling frequency."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    # Nothing merges across a rare character, as nothing does across a newline.
    rare = {ord(character): "\n" for character in set().union(*sample) - set(alphabet)}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\n+"), "removed"), pre_tokenizers.Digits(individual_digits=True)]
    )
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + count, min_frequency=2, show_progress=sys.stderr.isatty())
    tokenizer.train_from_iterator((text.translate(rare) for text in sample), trainer, length=len(sample))
    return [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]


class ByteLevelVocabulary:
    """Words and merges of a byte-level BPE, in which control tokens and the 256 bytes come first."""

    def __init__(self, size):
        self.size = size
        self.character = byte_characters()
        self.words = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *sorted(self.character)))}
        self.merges = {}  # a dict keeps the order and drops repeats

    def spell(self, text):
        """`text` with a character for each of its bytes, as words are written."""
        return "".join(self.character[byte] for byte in text.encode())

    def add(self, left, right):
        """Merge two words, if there is room for the result."""
        if left + right in self.words or len(self.words) < self.size:
            self.words.setdefault(left + right, len(self.words))
            self.merges[left, right] = None

    def add_whole_word(self, word):
        """Make one word of the pieces `word` is encoded as; these merges come last, so other text keeps its words."""
        while len(pieces := self.backend().encode(word).tokens) > 1:
            self.add(*pieces[:2])

    def backend(self):
        """The standard `tokenizers.Tokenizer` of these words."""
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

        tokenizer = Tokenizer(models.BPE(vocab=self.words, merges=list(self.merges)))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\n"), "isolated"),
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL_TOKENS])
        return tokenizer


def train(sample, vocab_size):
    """Train on a list of texts -> tokenizers.Tokenizer. Raises UserError when the text has too few different words."""
    vocabulary = ByteLevelVocabulary(vocab_size)
    counts = collections.Counter(itertools.chain.from_iterable(sample))
    del counts["\n"]
    alphabet = choose_alphabet(counts, (vocab_size - len(vocabulary.words)) * 2 // 3)
    for character in map(vocabulary.spell, alphabet):
        for length in range(1, len(character)):
            vocabulary.add(character[:length], character[length])
    merges = learn_character_merges(sample, alphabet, vocab_size - len(vocabulary.words))
    merges = [tuple(map(vocabulary.spell, merge)) for merge in merges]
    common = max(0, len(merges) - sum(len(word) - 1 for word in WHOLE_WORDS))
    for left, right in merges[:common]:
        vocabulary.add(left, right)
    for word in WHOLE_WORDS:
        vocabulary.add_whole_word(word)
    for left, right in merges[common:]:
        vocabulary.add(left, right)
    if len(vocabulary.words) < vocab_size:
        raise UserError(
            f"--vocab_size {vocab_size}: the sample of {counts.total():,} characters yields only "
            f"{len(vocabulary.words)} words; give more text with --data_path, or a smaller --vocab_size"
        )
    return vocabulary.backend()


def characters_per_token(backend, texts):
    tokens = sum(len(encoding.ids) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False))
    return sum(map(len, texts)) / max(1, tokens)
