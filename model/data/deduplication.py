"""Exact and near duplicates in flat memory: a compact set of digests, MinHash signatures banded into the same set."""

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
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(shingles), offsets, bands * rows, MINHASH_SEED)
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
    """A set of uniform 64-bit digests in 10-15 bytes each: open addressing in arrays, probed a batch at a time.

    Sixteen shards by the low bits, so that growing one copies little; the high 32 bits pick the slot. 0 marks a free
    slot, so digest 0 is stored as 1. Ten million documents give one false duplicate with probability 3e-6.
    """

    SHARDS, FULL, GROWTH = 16, 0.8, 1.5

    def __init__(self):
        self.tables = [np.zeros(1024, dtype=np.uint64) for _ in range(self.SHARDS)]
        self.counts = [0] * self.SHARDS

    def add(self, digests):
        """Add uint64 [n]; bool [n]: which were new, the first of several equal ones only."""
        unique, first = np.unique(np.maximum(digests, np.uint64(1)), return_index=True)
        new = np.zeros(len(digests), dtype=bool)
        for shard, members in self.by_shard(unique):
            self.reserve(shard, len(members))
            added = probe(self.tables[shard], unique[members], insert=True)
            self.counts[shard] += int(added.sum())
            new[first[members[added]]] = True
        return new

    def contains(self, digests):
        """bool [n]: which of uint64 [n] are in the set."""
        digests = np.maximum(digests, np.uint64(1))
        found = np.zeros(len(digests), dtype=bool)
        for shard, members in self.by_shard(digests):
            found[members] = ~probe(self.tables[shard], digests[members], insert=False)
        return found

    def by_shard(self, digests):
        shards = (digests & np.uint64(self.SHARDS - 1)).astype(np.uint8)
        for shard in range(self.SHARDS):
            members = np.flatnonzero(shards == shard)
            if members.size:
                yield shard, members

    def reserve(self, shard, more):
        old, needed = self.tables[shard], self.counts[shard] + more
        if needed <= self.FULL * len(old):
            return
        grown = np.zeros(int(max(self.GROWTH * len(old), needed / self.FULL + 1)), dtype=np.uint64)
        for start in range(0, len(old), 1 << 16):  # in slices: the index arrays of a probe are larger than the digests
            part = old[start : start + (1 << 16)]
            probe(grown, part[part != 0], insert=True)
        self.tables[shard] = grown


def probe(table, digests, insert):
    """bool [n]: which of the distinct non-zero uint64 `digests` are not in `table`; put those in if `insert`."""
    absent = np.zeros(len(digests), dtype=bool)
    slots = ((digests >> np.uint64(32)) * np.uint64(len(table))) >> np.uint64(32)
    pending = np.arange(len(digests))
    while pending.size:
        wanted, places = digests[pending], slots[pending]
        free = table[places] == 0
        if insert:
            table[places[free]] = wanted[free]  # where several want one slot the last gets it, the others move on
        settled = table[places] == wanted if insert else free | (table[places] == wanted)
        absent[pending[free & settled]] = True
        pending = pending[~settled]
        slots[pending] = (slots[pending] + np.uint64(1)) % np.uint64(len(table))
    return absent


class DuplicateFilter:
    """Remembers every kept document; `keep` answers which documents of the next block are new."""

    def __init__(self, exact, near):
        self.exact = DigestSet() if exact else None
        self.near = DigestSet() if near else None

    def keep(self, block, dropped):
        """bool [documents] of a Converted block; counts the others in `dropped`."""
        kept = np.ones(len(block.ends), dtype=bool)
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
