"""Rows for training: tokenised once, packed or batched by length, drawn in an order that can be resumed.

    train, validation = open_pretrain_data(path, tokenizer, max_seq_len, seed=seed)  # or open_sft_data
    sampler = ResumableSampler(len(train), batch_size, seed, rank, world_size, lengths=train.lengths)
    loader = BatchLoader(train, sampler, num_workers=0, pin_memory=device.type == "cuda")
    for batch in loader:    # the rest of the current epoch; afterwards the loader stands at the start of the next one
        ...                 # loader.state_dict() now covers exactly the batches handed out so far

A batch is {"input_ids": LongTensor [B, T], "labels": LongTensor [B, T]} and, only if something is padded,
"attention_mask": LongTensor [B, T] (1 = real). labels[b, t] is input_ids[b, t] or -100; labels[:, 0] is always -100
because nothing predicts the first token, so (labels != -100).sum() is the number of targets. Padding is at the right:
id 0, label -100, mask 0.
"""

import numpy as np
import torch

from model.data.token_cache import PretrainEncoding, SFTEncoding, open_token_cache
from model.errors import UserError
from model.tokenizer import token_bytes

IGNORED = -100  # label of a token that is not a target, as in torch and transformers
PADDING = 0  # only ever under attention_mask 0 and label -100


def open_pretrain_data(path, tokenizer, max_seq_len, validation_share=0.01, seed=0, cache_dir=None):
    """(train, validation) PretrainDatasets over a .csv/.jsonl with column `text`, split by document with `seed`.

    The first call tokenises the file into cache_dir (default: `.cache` beside the file); every process may call it:
    one builds, the others wait. validation_share: share of the documents; 0 or a file with a single document leaves
    validation empty (len 0). Raises UserError: bad file, no text in it, max_seq_len beyond the tokens there are,
    cache folder not writable.
    """
    cache = open_token_cache(path, tokenizer, PretrainEncoding(tokenizer), cache_dir)
    held_out = _held_out(len(cache.document_ends), validation_share, seed)
    train, validation = PretrainDataset(cache, ~held_out, max_seq_len), PretrainDataset(cache, held_out, max_seq_len)
    if train.num_tokens < max_seq_len or max_seq_len < 2:
        raise UserError(
            f"--max_seq_len {max_seq_len}: {path} has {train.num_tokens:,} tokens to train on; "
            f"choose a length between 2 and that, or give it more text"
        )
    return train, validation


def open_sft_data(path, tokenizer, max_seq_len, validation_share=0.01, seed=0, last_turn_only=False, cache_dir=None):
    """(train, validation) SFTDatasets over rows (history, q, a) or {"conversations": [{role, content}...]}.

    They are split by row with `seed`. Too long rows lose their oldest exchanges first, then the system turn, then the
    front of the last question; an answer is never cut: a row whose last answer leaves no room for its question is left
    out and counted. Turns behind the last answer teach nothing and are not kept. Raises UserError as
    open_pretrain_data, and when no row is left.
    """
    cache = open_token_cache(path, tokenizer, SFTEncoding(tokenizer, max_seq_len), cache_dir)
    held_out = _held_out(len(cache.row_ends), validation_share, seed)
    train, validation = (SFTDataset(cache, part, last_turn_only) for part in (~held_out, held_out))
    if not len(train):
        raise UserError(
            f"{path}: no row left to learn from at --max_seq_len {max_seq_len}; " + "; ".join(cache.report.summary())
        )
    return train, validation


def _held_out(count, share, seed):
    """Mask [count] of a seeded choice for validation: at least one and not all, unless share is 0 or count 1."""
    chosen = np.zeros(count, dtype=bool)
    if share and count > 1:
        number = min(max(1, round(share * count)), count - 1)
        chosen[np.random.default_rng((seed, 1)).choice(count, number, replace=False)] = True
    return chosen


class PretrainDataset:
    """Documents `<s> text </s>` joined into one stream and cut into full rows of max_seq_len tokens.

    Neighbouring rows share one token, so every token of the stream except the very first is a target exactly once;
    the last row reaches back to be full and has label -100 where the row before it already learned. (A stream shorter
    than one row is padded.)
    len(dataset): rows. dataset[i] -> row of 1-D tensors; dataset[[i, j, ...]] -> batch (see module docstring).
    Attributes: lengths (None: all rows are equally long), num_documents, num_tokens, num_targets, report (RowReport),
    fingerprint (hex; the same for the same file contents, tokenizer and format, and in SFT max_seq_len).
    """

    lengths = None

    def __init__(self, cache, documents, max_seq_len):
        """documents: bool mask [number of documents] of those that belong to this part."""
        self.cache, self.max_seq_len, self.report, self.fingerprint = cache, max_seq_len, cache.report, cache.fingerprint
        # The stream consists of stretches of the token file, one per run of chosen documents, to save memory.
        edges = np.flatnonzero(np.diff(documents, prepend=False, append=False)).reshape(-1, 2)
        ends = cache.document_ends[edges[:, 1] - 1]
        begins = np.where(edges[:, 0] > 0, cache.document_ends[edges[:, 0] - 1], 0)
        self.stretch_ends = np.cumsum(ends - begins)
        self.stretch_shifts = ends - self.stretch_ends  # position in the token file minus position in the stream
        self.num_documents = int(documents.sum())
        self.num_tokens = int(self.stretch_ends[-1]) if len(edges) else 0
        self.num_targets = max(0, self.num_tokens - 1)

    def __len__(self):
        return -(-self.num_targets // max(1, self.max_seq_len - 1))

    def __getitem__(self, rows):
        if np.ndim(rows) == 0:
            return {name: tensor[0] for name, tensor in self[[rows]].items()}
        width = min(self.max_seq_len, self.num_tokens)
        wanted = np.asarray(rows, dtype=np.int64)[:, None] * (self.max_seq_len - 1)
        starts = np.minimum(wanted, self.num_tokens - width)
        positions = starts + np.arange(width)
        source = positions + self.stretch_shifts[np.searchsorted(self.stretch_ends, positions, side="right")]
        input_ids = self.cache.tokens[source].astype(np.int64)
        labels = np.where(positions > wanted, input_ids, IGNORED)
        return _batch(list(input_ids), list(labels), self.max_seq_len)


class SFTDataset:
    """Conversations in the turn format, one a row, labels on every assistant turn and its </s> (or the last only).

    len(dataset), dataset[i], dataset[[...]] as in PretrainDataset; a batch is as wide as its longest row, or up to
    a sixteenth wider (_batch_width).
    Attributes: lengths (int array, tokens of each row), num_tokens, report (RowReport of the whole file: rows left
    out, rows shortened), fingerprint.
    """

    def __init__(self, cache, part, last_turn_only):
        """part: bool mask [rows of the cache] of those that belong here; rows of which nothing fits are left out."""
        self.cache, self.report, self.fingerprint = cache, cache.report, cache.fingerprint
        self.supervised_from = 2 if last_turn_only else 1
        self.rows = np.flatnonzero(part & (cache.row_lengths > 0)).astype(np.int32)
        self.lengths = cache.row_lengths[self.rows]
        self.num_tokens = int(self.lengths.sum())

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, rows):
        if np.ndim(rows) == 0:
            return {name: tensor[0] for name, tensor in self[[rows]].items()}
        stops, lengths = self.cache.row_ends[self.rows[rows]], self.lengths[rows]
        pieces = [slice(stop - length, stop) for stop, length in zip(stops, lengths)]
        ids = [self.cache.tokens[piece].astype(np.int64) for piece in pieces]
        masks = [self.cache.mask[piece] for piece in pieces]
        labels = [np.where(mask >= self.supervised_from, row, IGNORED) for row, mask in zip(ids, masks)]
        width = int(lengths.max())
        if len(rows) > 1:
            width = min(_batch_width(width), int(self.lengths.max()))
        return _batch(ids, labels, width)


def _batch_width(length):
    """`length` rounded up by at most a sixteenth, to one of sixteen widths per doubling. oneDNN keeps kernels and memory
    for every shape it has met, so hundreds of different widths would fill gigabytes on a CPU."""
    step = max(1, 2 ** (length.bit_length() - 5))
    return -(-length // step) * step


def _batch(ids, labels, width):
    """Stack rows (lists of 1-D arrays) into [B, width] tensors, padded at the right."""
    shape, lengths = (len(ids), width), [len(row) for row in ids]
    batch = {"input_ids": np.full(shape, PADDING, np.int64), "labels": np.full(shape, IGNORED, np.int64)}
    for index, length in enumerate(lengths):
        batch["input_ids"][index, :length], batch["labels"][index, :length] = ids[index], labels[index]
    if min(lengths) < width:
        batch["attention_mask"] = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def token_byte_lengths(tokenizer):
    """LongTensor [V]: bytes of each token, 0 for special ones; bits per byte = nats / ln 2 / table[targets].sum()."""
    return torch.tensor([len(piece) for piece in token_bytes(tokenizer)])


def describe_sample(tokenizer, row, max_tokens=300):
    """Decoded text of one row (dataset[i]) with the supervised stretches between ⟦ and ⟧."""
    real = int(row["attention_mask"].sum()) if "attention_mask" in row else len(row["input_ids"])
    ids, learned = row["input_ids"][:real], row["labels"][:real] != IGNORED
    edges = [0, *(np.flatnonzero(np.diff(learned)) + 1), real]
    pieces = []
    for start, stop in zip(edges, edges[1:]):
        if start < max_tokens:
            text = tokenizer.decode(ids[start : min(stop, max_tokens)].tolist())
            pieces.append(f"⟦{text}⟧" if learned[start] else text)
    return "".join(pieces) + (f" ... ({real - max_tokens} more tokens)" if real > max_tokens else "")
