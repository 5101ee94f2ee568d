"""Exact and near duplicates in flat memory: a set of sorted digests, MinHash signatures banded into the same set."""

import numpy as np

SHINGLE_CHARACTERS = 5
MINHASH_SEED = 42


def band_shape(threshold, signature=128):
    """(bands, rows per band) whose turning point (1/bands)^(1/rows) is nearest to the Jaccard `threshold`.

    Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4.
    """
    shapes = [(signature // rows, rows) for rows in range(1, signature + 1)]
    return min(shapes, key=lambda shape: abs((1 / shape[0]) ** (1 / shape[1]) - threshold))


def minhash_bands(texts, bands, rows):
    """uint64 [len(texts), bands]: one hash per band of the MinHash signature over character 5-grams."""
    from rensa import RMinHash

    if not texts:
        return np.empty((0, bands), dtype=np.uint64)
    shingles = [shingle_hashes(text) for text in texts]
    offsets = np.cumsum([0] + [len(hashes) for hashes in shingles]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(shingles), offsets, bands * rows, MINHASH_SEED
    )
    signatures = np.array(matrix.to_rows(), dtype=np.uint64).reshape(len(texts), bands, rows)
    hashes = np.broadcast_to(np.arange(1, bands + 1, dtype=np.uint64), (len(texts), bands))
    for row in range(rows):
        hashes = mix(hashes ^ signatures[:, :, row])
    return hashes


def shingle_hashes(text):
    """uint64 hash of every run of 5 characters of the UTF-8 `text` (of the whole text when it is shorter)."""
    codes = np.frombuffer(text.decode().encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    width = min(SHINGLE_CHARACTERS, len(codes))
    count = len(codes) - width + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(width):
        hashes = (hashes ^ codes[offset : offset + count]) * np.uint64(0x9E3779B97F4A7C15)
    return mix(hashes)


def mix(values):
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): spreads every input bit over all 64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class DigestSet:
    """A set of uniform 64-bit digests in about 11 bytes each (17 while the largest runs merge), added a batch at a time.

    A log-structured merge tree (O'Neil et al. 1996) of sorted arrays: a new run swallows those less than FANOUT times
    its size, so few runs are to be searched. Ten million documents give one false duplicate with probability 3e-6.
    """

    FANOUT = 4

    def __init__(self):
        self.runs = []

    def add(self, digests):
        """Add uint64 [n]; bool [n]: which were new, the first of several equal ones only."""
        unique, first = np.unique(digests, return_index=True)
        added = ~self.contains(unique)
        parts = [unique[added]]
        while self.runs and len(self.runs[-1]) < self.FANOUT * sum(map(len, parts)):
            parts.append(self.runs.pop())
        if len(parts[-1]):
            run = np.concatenate(parts)
            run.sort(kind="stable")  # timsort: merges runs that are sorted already
            self.runs.append(run)
        new = np.zeros(len(digests), dtype=bool)
        new[first[added]] = True
        return new

    def contains(self, digests):
        """bool [n]: which of uint64 [n] are in the set."""
        found = np.zeros(len(digests), dtype=bool)
        for run in self.runs:
            found |= run[np.minimum(np.searchsorted(run, digests), len(run) - 1)] == digests
        return found


class DuplicateFilter:
    """Remembers every kept document; `keep` answers which documents of the next block are new."""

    def __init__(self, exact, near):
        self.exact, self.near = DigestSet() if exact else None, DigestSet() if near else None

    def keep(self, block, dropped):
        """bool [documents] of a Converted block; counts the others in `dropped`."""
        kept = np.ones(len(block.payloads), dtype=bool)
        if self.exact:
            kept = self.exact.add(block.digests)
            dropped["duplicate"] += int((~kept).sum())
        if self.near:
            before = int(kept.sum())
            kept[kept] = self.near_new(block.bands[kept])
            dropped["near_duplicate"] += before - int(kept.sum())
        return kept

    def near_new(self, bands):
        """Which documents share no band with an earlier kept one (banding LSH, candidates taken as duplicates)."""
        new = ~self.near.contains(bands.ravel()).reshape(bands.shape).any(axis=1)
        in_block = set()
        for index in np.flatnonzero(new):
            document = bands[index].tolist()
            new[index] = in_block.isdisjoint(document)
            if new[index]:
                in_block.update(document)
        self.near.add(bands[new].ravel())
        return new
