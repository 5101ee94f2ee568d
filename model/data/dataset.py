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

from model.data.token_cache import ASSISTANT, SYSTEM, PretrainEncoding, SFTEncoding, open_token_cache
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
    cache = open_token_cache(path, tokenizer, SFTEncoding(tokenizer), cache_dir)
    held_out = _held_out(len(cache.row_ends), validation_share, seed)
    rows = _fit_conversations(cache, max_seq_len)
    train, validation = (SFTDataset(cache, rows, part, last_turn_only) for part in (~held_out, held_out))
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
    Attributes: lengths (None: all rows are equally long), num_documents, num_tokens, num_targets, report (RowReport).
    """

    lengths = None

    def __init__(self, cache, documents, max_seq_len):
        """documents: bool mask [number of documents] of those that belong to this part."""
        self.cache, self.max_seq_len, self.report = cache, max_seq_len, cache.report
        self.fingerprint = cache.folder.name.rpartition("-")[2]
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
    out, rows shortened).
    """

    def __init__(self, cache, rows, part, last_turn_only):
        """rows: as _fit_conversations gives them; part: bool mask [rows of the file] of those that belong here."""
        self.cache, self.last_turn_only, self.report = cache, last_turn_only, rows["report"]
        self.fingerprint = cache.folder.name.rpartition("-")[2]
        keep = np.flatnonzero(part & rows["kept"])
        self.begin, self.end, self.system, self.cut = (rows[name][keep] for name in ("begin", "end", "system", "cut"))
        self.lengths = rows["length"][keep]
        self.num_tokens = int(self.lengths.sum())

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, rows):
        if np.ndim(rows) == 0:
            return {name: tensor[0] for name, tensor in self[[rows]].items()}
        rendered = [self._render(row) for row in rows]
        width = int(self.lengths[rows].max())
        if len(rows) > 1:
            width = min(_batch_width(width), int(self.lengths.max()))
        return _batch([ids for ids, _ in rendered], [labels for _, labels in rendered], width)

    def _render(self, row):
        """(ids, labels) of one row: the token file from its first kept turn on, the question's front cut out."""
        cache, begin, end = self.cache, int(self.begin[row]), int(self.end[row])
        start = cache.turn_start(begin)
        ids = cache.tokens[start : cache.turn_ends[end - 1]].astype(np.int64)
        labels = np.full_like(ids, IGNORED)
        for turn in range(end - 1 if self.last_turn_only else begin, end):
            if cache.turn_roles[turn] == ASSISTANT:
                learned = slice(
                    cache.turn_start(turn) + cache.header_lengths[ASSISTANT] - start,
                    cache.turn_ends[turn] - cache.tail_length - start,
                )
                labels[learned] = ids[learned]
        if self.cut[row]:
            header = cache.header_lengths[cache.turn_roles[begin]]
            ids, labels = (np.delete(array, slice(header, header + self.cut[row])) for array in (ids, labels))
        if self.system[row] >= 0:
            system = int(self.system[row])
            turn = cache.tokens[cache.turn_start(system) : cache.turn_ends[system]].astype(np.int64)
            ids, labels = np.concatenate([turn, ids]), np.concatenate([np.full_like(turn, IGNORED), labels])
        return ids, labels


def _fit_conversations(cache, max_seq_len):
    """What of each row fits into max_seq_len tokens, for all rows at once.

    Returns a dict of arrays [rows]: kept (bool), begin and end (turns from the first kept one to behind the last),
    system (turn number put in front, -1: none), cut (tokens of turn `begin` left out behind its header), length
    (tokens); and "report".
    """
    turn_ends, roles, end = np.asarray(cache.turn_ends), np.asarray(cache.turn_roles), np.asarray(cache.row_ends)
    turn_starts = np.concatenate([[0], turn_ends[:-1]])
    first = np.concatenate([[0], end[:-1]])
    has_system = roles[first] == SYSTEM
    system_length = np.where(has_system, turn_ends[first] - turn_starts[first], 0)
    body = first + has_system  # the first turn that may be left out, together with its answer

    answers = roles == ASSISTANT
    changes = np.diff(answers, prepend=False)
    changes[first] = False
    changes[body] = True  # a row's first exchange begins here, whoever speaks
    exchange_starts = np.flatnonzero(changes & ~answers | _marks(body, len(roles)))
    answer_starts = np.flatnonzero(changes & answers)
    token_end = turn_ends[end - 1]

    def first_fitting(starts, room, lowest):
        """For each row the first turn among `starts` from where it has at most `room` tokens; none: `end` or more."""
        turn = np.maximum(np.searchsorted(turn_starts, token_end - room), lowest)
        return np.append(starts, len(roles))[np.searchsorted(starts, turn)]

    with_system = first_fitting(exchange_starts, max_seq_len - system_length, body)
    without = first_fitting(exchange_starts, max_seq_len, body)
    system = np.where(has_system & (with_system < end), first, -1)
    begin = np.where(with_system < end, with_system, without)

    # Not even the last exchange fits: its later prompt turns, at the least the very last one with its front cut off.
    last_exchange = exchange_starts[np.searchsorted(exchange_starts, end) - 1]
    answer = answer_starts[np.searchsorted(answer_starts, end) - 1]
    question = np.maximum(answer - 1, last_exchange)
    tight = begin >= end
    begin = np.where(
        tight, np.clip(np.searchsorted(turn_starts, token_end - max_seq_len), last_exchange, question), begin
    )
    length = token_end - turn_starts[begin] + np.where(system >= 0, system_length, 0)
    cut = np.maximum(length - max_seq_len, 0)
    content = turn_ends[begin] - turn_starts[begin] - cache.header_lengths[roles[begin]] - cache.tail_length - 1
    kept = (cut == 0) | (~answers[begin] & (cut < content))

    report = cache.report.copy()
    if not kept.all():
        report.drop(
            f"the answer leaves no room for the question within --max_seq_len {max_seq_len}", count=int((~kept).sum())
        )
    report.note("oldest turns left out of a long row", int((kept & (begin > body)).sum()))
    report.note("system turn left out of a long row", int((kept & has_system & (system < 0)).sum()))
    report.note("front of a long question cut", int((kept & (cut > 0)).sum()))
    return dict(kept=kept, begin=begin, end=end, system=system, cut=cut, length=length - cut, report=report)


def _marks(indices, length):
    marks = np.zeros(length, dtype=bool)
    marks[indices] = True
    return marks


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
