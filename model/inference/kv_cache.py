"""A preallocated cache of keys and values with a length per row.

Shape letters: B rows, T new tokens, K keys, G key/value heads, D head size.
"""

import contextlib
import math

import torch


class KVCache:
    """Keys and values of `batch` rows in preallocated tensors [B, G, capacity, D] per layer. Row r holds lengths[r]
    tokens in slots 0 .. lengths[r] - 1: a batch of unequal rows is padded on the right, never on the left.

    A forward pass first asks get_seq_length(), which also settles where the update() of each layer will write; after it
    the owner calls advance().
    """

    def __init__(self, config, batch, capacity, dtype=torch.float32, device="cpu"):
        shape = self.shape(config, batch, capacity)
        # Zeros, not empty: a masked slot has weight 0 in attention, and 0 times a leftover NaN would be NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.lengths = torch.zeros(batch, dtype=torch.long)  # on the host, so that looking at it never waits for a GPU
        self.past, self.fixed_shapes = 0, False

    @staticmethod
    def shape(config, batch, capacity):
        return (batch, config.n_kv_heads, capacity, config.head_dim)

    @classmethod
    def bytes_needed(cls, config, batch, capacity, dtype):
        """Size of a cache with these arguments."""
        return 2 * config.n_layers * math.prod(cls.shape(config, batch, capacity)) * dtype.itemsize

    @property
    def batch(self):
        return self.keys[0].shape[0]

    def get_seq_length(self):
        """Tokens stored per row: an int when all rows hold the same number, else a LongTensor [B]."""
        if self.fixed_shapes:
            return self.past
        different = set(self.lengths.tolist())
        self.past = different.pop() if len(different) == 1 else self.lengths.to(self.keys[0].device)
        return self.past

    def key_count(self, new):
        """K of what update() returns for `new` tokens: the longest row's length with them, or the fixed capacity."""
        return self.keys[0].shape[2] if self.fixed_shapes else int(self.lengths.max()) + new

    def update(self, key, value, layer_index):
        """Store key and value [B, G, T, D] after each row's stored tokens; return all keys and values [B, G, K, D]."""
        keys, values, new = self.keys[layer_index], self.values[layer_index], key.shape[2]
        if isinstance(self.past, int):  # plain slices: no index tensors, and views instead of copies come back
            end = self.past + new
            keys[:, :, self.past : end] = key
            values[:, :, self.past : end] = value
            return keys[:, :, :end], values[:, :, :end]
        rows = torch.arange(self.batch, device=key.device)[:, None]
        slots = self.past[:, None] + torch.arange(new, device=key.device)
        keys[rows, :, slots] = key.transpose(1, 2)
        values[rows, :, slots] = value.transpose(1, 2)
        end = self.key_count(new)
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, counts):
        """After a forward pass: row r now holds counts[r] more tokens (counts: an int, or a list or LongTensor [B])."""
        self.lengths += torch.as_tensor(counts, dtype=torch.long)

    @contextlib.contextmanager
    def with_fixed_shapes(self):
        """Within, get_seq_length() is a LongTensor and K is the capacity, whatever the lengths: compiled code, made for
        fixed shapes, serves every step."""
        self.past, self.fixed_shapes = self.lengths.to(self.keys[0].device), True
        try:
            yield
        finally:
            self.fixed_shapes = False

    def rows(self, first, last):
        """Rows first .. last - 1 as a cache of their own on the same memory."""
        view = object.__new__(KVCache)
        view.keys = [keys[first:last] for keys in self.keys]
        view.values = [values[first:last] for values in self.values]
        view.lengths, view.past, view.fixed_shapes = self.lengths[first:last], 0, False
        return view

    def move_row(self, source, target):
        """Copy row `source` over row `target`."""
        self.copy_row(source, target, int(self.lengths[source]))

    def copy_row(self, source, target, count):
        """Make row `target` hold the first `count` tokens of row `source`."""
        for storage in (*self.keys, *self.values):
            storage[target, :, :count] = storage[source, :, :count]
        self.lengths[target] = count

    def swap_rows(self, one, other):
        """Exchange two rows."""
        count = int(self.lengths[one])
        kept = self.save_row(one, count)
        self.move_row(other, one)
        self.load_row(other, kept, count)

    def save_row(self, row, count):
        """A copy of the first `count` tokens of row `row`, for load_row."""
        return [storage[row, :, :count].clone() for storage in (*self.keys, *self.values)]

    def load_row(self, row, saved, count):
        """Make row `row` hold the first `count` tokens of what save_row returned."""
        for storage, kept in zip((*self.keys, *self.values), saved):
            storage[row, :, :count] = kept[:, :count]
        self.lengths[row] = count

    def clear_row(self, row):
        """Zeros into row `row`, which may hold NaN."""
        for storage in (*self.keys, *self.values):
            storage[row].zero_()

    def grow(self, batch):
        """Have `batch` rows, more than so far; one tensor after the other, so that only one is there twice. Where memory runs out
        the rows stay as they were."""
        before = self.batch
        try:
            for storages in (self.keys, self.values):
                for index, storage in enumerate(storages):
                    storages[index] = storage.new_zeros(batch, *storage.shape[1:])
                    storages[index][:before] = storage
        except BaseException:
            self.keys = [storage[:before] for storage in self.keys]
            self.values = [storage[:before] for storage in self.values]
            raise
        self.lengths = torch.cat((self.lengths, self.lengths.new_zeros(batch - before)))
