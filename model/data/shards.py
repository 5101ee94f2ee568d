"""Several token caches read as one: the shards of a corpus, one behind the other. Nothing is copied; what a batch asks for
is looked up in the shards that hold it."""

import hashlib
import json

import numpy as np

from model.data.rows import RowReport


class JoinedArrays:
    """Arrays of one dtype as a single one, of which np.asarray makes a copy and an index reads only what it names.

    shifts: number added to what is read of each array (positions within a shard become positions within all).
    """

    def __init__(self, arrays, shifts):
        self.arrays, self.shifts, self.dtype = arrays, shifts, arrays[0].dtype
        self.ends = np.cumsum([len(array) for array in arrays])

    def __len__(self):
        return int(self.ends[-1])

    def __array__(self, dtype=None, copy=None):
        whole = np.concatenate([array + shift for array, shift in zip(self.arrays, self.shifts)])
        return whole.astype(dtype or self.dtype, copy=False)

    def __getitem__(self, positions):
        """The elements (or rows) at `positions`, an array of any shape (numbers from 0 to len - 1)."""
        positions, row = np.asarray(positions), self.arrays[0].shape[1:]
        wanted, found = positions.ravel(), np.empty((positions.size, *row), self.dtype)
        numbers = np.searchsorted(self.ends, wanted, side="right")  # of the array that holds each
        order = np.argsort(numbers, kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1) if len(wanted) else ():
            number = numbers[places[0]]
            array = self.arrays[number]
            found[places] = array[wanted[places] - (self.ends[number] - len(array))] + self.shifts[number]
        return found.reshape(positions.shape + row)


class JoinedCaches:
    """TokenCaches of one encoding as a single one: the same attributes. The fingerprint is of theirs, in order."""

    def __init__(self, caches):
        self.caches, self.names = caches, caches[0].names
        self.name = f"{caches[0].name} and {len(caches) - 1} more"
        self.counts = [count for cache in caches for count in cache.counts]
        fingerprints = [cache.fingerprint for cache in caches]
        digest_size = len(fingerprints[0]) // 2
        self.fingerprint = hashlib.blake2b(json.dumps(fingerprints).encode(), digest_size=digest_size).hexdigest()
        self.report = RowReport()
        for cache in caches:
            self.report.add(cache.report)
        starts = np.cumsum([0, *(len(cache.tokens) for cache in caches)])[:-1].tolist()
        for name in self.names:
            arrays = [getattr(cache, name) for cache in caches]
            setattr(self, name, JoinedArrays(arrays, starts if name.endswith("_ends") else [0] * len(arrays)))

    def __reduce__(self):
        return JoinedCaches, (self.caches,)  # as a TokenCache: a spawned worker maps the files itself
