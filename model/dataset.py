"""Rows for training: text is tokenised once into a memory-mapped cache, packed or batched by length, drawn in a resumable order.

    train, validation = open_pretrain_data(path, tokenizer, max_seq_len, validation_share=0.01, seed=seed)   # or open_sft_data
    sampler = ResumableSampler(len(train), batch_size, seed=seed, rank=rank, world_size=world_size, lengths=train.lengths)
    loader = BatchLoader(train, sampler, num_workers=0, pin_memory=device.type == "cuda")
    for batch in loader:    # the rest of the current epoch; afterwards the loader stands at the start of the next one
        ...                 # loader.state_dict() now covers exactly the batches handed out so far

A batch is {"input_ids": LongTensor [B, T], "labels": LongTensor [B, T]} and, only if something is padded,
"attention_mask": LongTensor [B, T] (1 = real). labels[b, t] is input_ids[b, t] or -100; labels[:, 0] is always -100 because
nothing predicts the first token, so (labels != -100).sum() is the number of targets. Padding is at the right: id 0, label -100, mask 0.
"""

from model.records import RowReport, iter_records  # noqa: F401


class PretrainDataset:
    """Documents `<s> text </s>` joined into one stream and cut into full rows of max_seq_len tokens.

    Neighbouring rows share one token, so every token of the stream except the very first is a target exactly once; the last row
    reaches back to be full and has label -100 where the row before it already learned.
    len(dataset): rows. dataset[i] -> row of 1-D tensors; dataset[[i, j, ...]] -> batch (see module docstring).
    Attributes: lengths (None: all rows are equally long), num_documents, num_tokens, num_targets, report (RowReport).
    """


class SFTDataset:
    """Conversations in the turn format, one a row, labels on every assistant turn and its </s> (or the last one only).

    len(dataset), dataset[i], dataset[[...]] as in PretrainDataset.
    Attributes: lengths (int array, tokens of each row), num_tokens, num_targets, report (RowReport: rows left out by reason, rows shortened).
    """


def open_pretrain_data(path, tokenizer, max_seq_len, validation_share=0.01, seed=0, cache_dir=None):
    """(train, validation) PretrainDatasets over a .csv/.jsonl with column `text`, split by document with `seed`.

    The first call tokenises the file into cache_dir (default: `.cache` beside the file); every process may call it: one builds, the others wait.
    validation_share: share of the documents; 0 or a file with a single document leaves validation empty (len 0).
    Raises UserError: bad file, no text in it, max_seq_len beyond the tokens there are, cache folder not writable.
    """
    raise NotImplementedError


def open_sft_data(path, tokenizer, max_seq_len, validation_share=0.01, seed=0, last_turn_only=False, cache_dir=None):
    """(train, validation) SFTDatasets over rows (history, q, a) or {"conversations": [{role, content}...]}, split by row with `seed`.

    Too long rows lose their oldest exchanges first, then the system turn, then the front of the last question; an answer is never cut:
    a row whose last answer leaves no room for its question is left out and counted. Raises UserError as open_pretrain_data.
    """
    raise NotImplementedError


class ResumableSampler:
    """The order of an epoch as a pure function of (seed, epoch): which rows form each batch, and how far the run has come.

    batch_size is per rank; a global micro-batch is batch_size * world_size consecutive rows of the epoch's order and each rank takes
    its slice, so the order is the same at every world size with the same product. lengths: batches get rows of similar length.
    The last micro-batch of an epoch is smaller, never lost. shuffle=False: file order.
    """

    def __init__(self, num_rows, batch_size, seed=0, rank=0, world_size=1, lengths=None, shuffle=True):
        raise NotImplementedError

    def __len__(self):
        """Micro-batches in a whole epoch (the same on every rank)."""
        raise NotImplementedError

    def state_dict(self):
        """{"seed", "epoch", "position" (rows of this epoch already consumed by all ranks), "num_rows", "group_size"}: plain numbers."""
        raise NotImplementedError

    def load_state_dict(self, state):
        """Go on behind the rows already consumed, in constant time. UserError when the data has another number of rows."""
        raise NotImplementedError


class BatchLoader:
    """Iterates over the batches of this rank; position counts what was handed out, not what workers prefetched.

    `for batch in loader` yields the rest of the current epoch; iterate again for the next one. len(loader): micro-batches per epoch.
    """

    def __init__(self, dataset, sampler, num_workers=0, pin_memory=False):
        raise NotImplementedError

    @property
    def epoch(self):
        """Current epoch, from 0."""
        raise NotImplementedError

    def state_dict(self):
        """The sampler's state behind the last batch handed out."""
        raise NotImplementedError

    def load_state_dict(self, state):
        """Resume there; takes effect at the next iteration."""
        raise NotImplementedError


def token_byte_lengths(tokenizer):
    """LongTensor [V]: UTF-8 bytes each token stands for (0 for special tokens): bits per byte = nats / ln 2 / table[targets].sum()."""
    raise NotImplementedError


def describe_sample(tokenizer, row, max_tokens=300):
    """Decoded text of one row (dataset[i]) with the supervised stretches between ⟦ and ⟧."""
    raise NotImplementedError
