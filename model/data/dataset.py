"""Rows for training: tokenised once, packed or padded to batches, which model.data.loader draws.

A batch is {"input_ids": LongTensor [B, T], "labels": LongTensor [B, T]} and, only if something is padded,
"attention_mask": LongTensor [B, T] (1 = real). labels[b, t] is input_ids[b, t] or -100; labels[:, 0] is always -100
because nothing predicts the first token, so (labels != -100).sum() is the number of targets. Padding is at the right:
id 0, label -100, mask 0.
"""

import functools
import itertools

import numpy as np
import torch

from model.data.token_cache import PreferenceEncoding, PretrainEncoding, SFTEncoding, open_token_cache
from model.errors import UserError
from model.tokenizer import token_bytes

IGNORED = -100  # label of a token that is not a target, as in torch and transformers
PADDING = 0  # only ever under attention_mask 0 and label -100


def open_pretrain_data(path, tokenizer, max_seq_len, validation_share=0.01, seed=0, cache_dir=None):
    """(train, validation) PretrainDatasets over .csv/.jsonl files with column `text`, split by document with `seed`.

    path: a file, a folder or a glob pattern (see data_files). The first call tokenises each file into cache_dir (default:
    `.cache` beside the file). validation_share: share of the documents of each file; 0 or a file with a single document
    leaves validation empty (len 0). A file's split depends on that file alone: another one beside it moves no document
    from one part to the other. Raises UserError: bad file, no text in it, max_seq_len beyond the tokens there are, cache
    folder not writable.
    """
    cache = open_token_cache(path, tokenizer, PretrainEncoding(tokenizer), cache_dir)
    held_out = _held_out(cache.counts, validation_share, seed)
    train, validation = PretrainDataset(cache, ~held_out, max_seq_len), PretrainDataset(cache, held_out, max_seq_len)
    if train.num_tokens < max_seq_len or max_seq_len < 2:
        way_out = "choose a length between 2 and that, or give it more text"
        raise UserError(f"--max_seq_len {max_seq_len}: {path} has {train.num_tokens:,} tokens to train on; {way_out}")
    return train, validation


def open_sft_data(path, tokenizer, max_seq_len, validation_share=0.01, seed=0, last_turn_only=False, cache_dir=None):
    """(train, validation) SFTDatasets over rows (history, q, a) or {"conversations": [{role, content}...]}.

    path: as in open_pretrain_data. They are split by row with `seed`; model.data.conversations.fit_turns says what too long
    rows lose. Turns behind the last answer teach nothing and are not kept. Raises UserError as open_pretrain_data, and when
    no row is left.
    """
    cache = open_token_cache(path, tokenizer, SFTEncoding(tokenizer, max_seq_len), cache_dir)
    held_out = _held_out(cache.counts, validation_share, seed)
    train, validation = (SFTDataset(cache, part, last_turn_only) for part in (~held_out, held_out))
    if not len(train):
        reasons = "; ".join(cache.report.summary())
        raise UserError(f"{path}: no row left to learn from at --max_seq_len {max_seq_len}; {reasons}")
    return train, validation


def open_preference_data(
    path, tokenizer, max_seq_len, validation_path=None, validation_share=0.05, seed=0, cache_dir=None
):
    """(train, validation) PreferenceDatasets over {prompt, chosen, rejected}, a JSON list or one object a line; the prompt is
    a text or a list of messages, and there may be a history.

    path, validation_path: as in open_pretrain_data. They are split by row with `seed`, unless validation_path names files of
    its own. Raises UserError as open_sft_data.
    """
    encoding = PreferenceEncoding(tokenizer, max_seq_len)
    cache = open_token_cache(path, tokenizer, encoding, cache_dir)
    held_out = _held_out(cache.counts, 0 if validation_path else validation_share, seed)
    train = PreferenceDataset(cache, ~held_out)
    if not len(train):
        reasons = "; ".join(cache.report.summary())
        raise UserError(f"{path}: no pair left to learn from at --max_seq_len {max_seq_len}; {reasons}")
    if validation_path:
        cache = open_token_cache(validation_path, tokenizer, encoding, cache_dir)
        held_out = np.ones(len(cache.row_ends), dtype=bool)
    return train, PreferenceDataset(cache, held_out)


def _held_out(counts, share, seed):
    """Mask [sum of counts] of a seeded choice for validation of the rows of each file, whose number is `counts`: at least
    one and not all, unless share is 0 or the count 1."""
    masks = [np.zeros(count, dtype=bool) for count in counts]
    for mask, count in zip(masks, counts):
        if share and count > 1:
            number = min(max(1, round(share * count)), count - 1)
            mask[np.random.default_rng((seed, 1)).choice(count, number, replace=False)] = True
    return np.concatenate(masks)


class PretrainDataset:
    """Documents `<s> text </s>` joined into one stream and cut into full rows of max_seq_len tokens.

    Neighbouring rows share one token, so every token of the stream except the very first is a target exactly once;
    the last row reaches back to be full and has label -100 where the row before it already learned. (A stream shorter
    than one row is padded.) dataset[i] -> row of 1-D tensors; dataset[[i, j, ...]] -> batch. Attributes: lengths (None:
    all are equal), num_documents, num_tokens, num_targets, report (RowReport) and fingerprint of the TokenCache.
    """

    lengths = None

    def __init__(self, cache, documents, max_seq_len):
        """documents: bool mask [number of documents] of those that belong to this part."""
        self.cache, self.report, self.fingerprint = cache, cache.report, cache.fingerprint
        self.max_seq_len, self.num_documents = max_seq_len, int(documents.sum())
        # The stream consists of stretches of the token file, one per run of chosen documents, to save memory.
        edges = np.flatnonzero(np.diff(documents, prepend=False, append=False)).reshape(-1, 2)
        begins, ends = np.append(0, cache.document_ends)[edges].T
        self.stretch_ends = np.cumsum(ends - begins)
        self.stretch_shifts = ends - self.stretch_ends  # position in the token file minus position in the stream
        self.num_tokens = int(self.stretch_ends[-1]) if len(edges) else 0
        self.num_targets = max(0, self.num_tokens - 1)

    def __len__(self):
        return -(-self.num_targets // max(1, self.max_seq_len - 1))

    def __getitem__(self, rows):
        if np.ndim(rows) == 0:
            return {name: tensor[0] for name, tensor in self[[rows]].items()}
        width = min(self.max_seq_len, self.num_tokens)
        wanted = np.asarray(rows, dtype=np.int64)[:, None] * (self.max_seq_len - 1)
        positions = np.minimum(wanted, self.num_tokens - width) + np.arange(width)
        source = positions + self.stretch_shifts[np.searchsorted(self.stretch_ends, positions, side="right")]
        input_ids = self.cache.tokens[source].astype(np.int64)
        labels = np.where(positions > wanted, input_ids, IGNORED)
        return _batch(input_ids.ravel(), labels.ravel(), np.full(len(rows), width), self.max_seq_len)


class SFTDataset:
    """Conversations in the turn format, one a row, labels on every assistant turn and its </s> (or the last only).

    Indexed as PretrainDataset; a batch is as wide as its longest row, or up to a sixteenth wider (batch_width).
    Attributes: lengths (int array, tokens of each row), num_tokens, num_targets (learned tokens; the first look counts them),
    report (of the whole file), fingerprint.
    """

    def __init__(self, cache, part, last_turn_only):
        """part: bool mask [rows of the cache] of those that belong here; rows of which nothing fits are left out."""
        self.cache, self.report, self.fingerprint = cache, cache.report, cache.fingerprint
        self.supervised_from = 2 if last_turn_only else 1
        self.rows = np.flatnonzero(part & (np.asarray(cache.row_lengths) > 0)).astype(np.int32)
        self.lengths = cache.row_lengths[self.rows]
        self.num_tokens = int(self.lengths.sum())

    @functools.cached_property
    def num_targets(self):
        return _count_learned(self.cache, self.cache.row_ends[self.rows], self.lengths, self.supervised_from)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, rows):
        if np.ndim(rows) == 0:
            return {name: tensor[0] for name, tensor in self[[rows]].items()}
        stops, lengths = self.cache.row_ends[self.rows[rows]], self.lengths[rows]
        width = int(lengths.max())
        if len(rows) > 1:
            width = min(batch_width(width), int(self.lengths.max()))
        return _conversations(self.cache, stops, lengths, width, self.supervised_from)


class PreferenceDataset:
    """Pairs of answers to one prompt. A batch of P pairs has 2 P rows, the conversations with the chosen answers and then,
    in the same order, those with the rejected ones; labels are on that last answer and its </s> alone.

    Attributes: lengths (int array, tokens of the longer side of each pair), longer_is_chosen (share of pairs, equal ones
    count half), num_tokens, num_targets (of the answers; the first look counts them), report (of the whole file), fingerprint.
    """

    def __init__(self, cache, part):
        """part: bool mask [rows of the cache] of those that belong here; rows of which nothing fits are left out."""
        self.cache, self.report, self.fingerprint = cache, cache.report, cache.fingerprint
        self.rows = np.flatnonzero(part & (np.asarray(cache.chosen_lengths) > 0)).astype(np.int32)
        chosen, rejected = cache.chosen_lengths[self.rows], cache.rejected_lengths[self.rows]
        self.lengths, self.num_tokens = np.maximum(chosen, rejected), int(chosen.sum() + rejected.sum())
        self.longer_is_chosen = float(np.mean((np.sign(chosen - rejected) + 1) / 2)) if len(self.rows) else None

    @functools.cached_property
    def num_targets(self):
        both = self.cache.chosen_lengths[self.rows] + self.cache.rejected_lengths[self.rows]
        return _count_learned(self.cache, self.cache.row_ends[self.rows], both, supervised_from=2)

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, rows):
        wanted = self.rows[np.atleast_1d(rows)]
        chosen, rejected = self.cache.chosen_lengths[wanted], self.cache.rejected_lengths[wanted]
        ends = self.cache.row_ends[wanted]
        stops, lengths = np.concatenate([ends - rejected, ends]), np.concatenate([chosen, rejected])
        width = int(lengths.max())
        if len(wanted) > 1:
            width = min(batch_width(width), int(self.lengths.max()))
        return _conversations(self.cache, stops, lengths, width, supervised_from=2)


def _conversations(cache, stops, lengths, width, supervised_from):
    """Batch of the rows of a cache that end at `stops` and have these lengths."""
    positions = _positions(stops, lengths)
    input_ids = cache.tokens[positions].astype(np.int64)
    labels = np.where(cache.mask[positions] >= supervised_from, input_ids, IGNORED)
    return _batch(input_ids, labels, lengths, width)


def _positions(stops, lengths):
    """Places in a cache of the tokens of rows that end at `stops` and have these lengths, row after row."""
    return np.repeat(stops - np.cumsum(lengths), lengths) + np.arange(lengths.sum())


def _count_learned(cache, stops, lengths, supervised_from):
    """How many tokens of these rows of a cache are learned, counted in blocks of rows to save memory."""
    total = 0
    for start in range(0, len(stops), 10_000):
        block = slice(start, start + 10_000)
        total += int((cache.mask[_positions(stops[block], lengths[block])] >= supervised_from).sum())
    return total


def batch_width(length):
    """`length` rounded up by at most a sixteenth, to one of sixteen widths per doubling. oneDNN keeps kernels and
    memory for every shape it has met, so hundreds of different widths would fill gigabytes on a CPU."""
    step = max(1, 2 ** (length.bit_length() - 5))
    return -(-length // step) * step


def _batch(input_ids, labels, lengths, width):
    """[B, width] tensors, padded at the right, of rows of these lengths that stand one behind the other."""
    real = np.arange(width) < lengths[:, None]
    batch = {"input_ids": np.full(real.shape, PADDING, np.int64), "labels": np.full(real.shape, IGNORED, np.int64)}
    batch["input_ids"][real], batch["labels"][real] = input_ids, labels
    if not real.all():
        batch["attention_mask"] = real.astype(np.int64)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def cut_rows(batch, length):
    """A batch of full rows [B, T] as one of rows [B * T / length, length] of the same tokens. (The first token of each has
    nothing before it, so it is no target.)"""
    cut = {name: tensor.reshape(-1, length) for name, tensor in batch.items()}
    cut["labels"] = cut["labels"].clone()
    cut["labels"][:, 0] = IGNORED
    return cut


def token_byte_lengths(tokenizer):
    """LongTensor [V]: bytes of each token, 0 for special ones; bits per byte = nats / ln 2 / table[targets].sum()."""
    return torch.tensor([len(piece) for piece in token_bytes(tokenizer)])


def describe_sample(tokenizer, row, max_tokens=300):
    """Decoded text of one row (dataset[i]) with the supervised stretches between ⟦ and ⟧."""
    real = int(row["attention_mask"].sum()) if "attention_mask" in row else len(row["input_ids"])
    shown = zip(row["input_ids"][: min(real, max_tokens)].tolist(), (row["labels"] != IGNORED).tolist())
    text = ""
    for learned, tokens in itertools.groupby(shown, key=lambda pair: pair[1]):
        piece = tokenizer.decode([token for token, _ in tokens])
        text += f"⟦{piece}⟧" if learned else piece
    return text + (f" ... ({real - max_tokens} more tokens)" if real > max_tokens else "")


def repeated_share(dataset, most=100_000):
    """(share, rows): how many of the documents, conversations or pairs in a dataset's files, of the first `most`, repeat
    another one token by token."""
    cache, seen, repeated = dataset.cache, set(), 0
    ends = np.asarray(getattr(cache, cache.names[-1])[np.arange(min(most, sum(cache.counts)))])
    for start, end in zip(np.append(0, ends[:-1]), ends):
        digest = hash(np.asarray(cache.tokens[np.arange(start, end)]).tobytes())
        repeated += end > start and digest in seen
        seen.add(digest)
    return repeated / max(1, len(ends)), len(ends)
