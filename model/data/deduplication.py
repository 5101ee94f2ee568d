"""Exact and near duplicates in flat memory: a set of sorted digests; MinHash signatures, banded to find candidates.

MinHash (Broder 1997): where all shingles are put into a random order, two texts have the same first one with a
probability that is their Jaccard similarity. A signature is the first shingles under 512 orders. Texts that agree in all
values of some band of it are candidates (Leskovec, Rajaraman, Ullman, Mining of Massive Datasets, section 3.4), and one
bit of each value tells how similar they are (Li and Koenig 2010, arXiv 0910.3349).
"""

import math

import numpy as np

from model.errors import UserError

SHINGLE_CHARACTERS = 5
MINHASH_SEED = 42
SIGNATURE_VALUES = 512
BANDS = 16
# An entry of a band is one number: the upper 36 bits of its hash, then the document's number.
DOCUMENT, BAND = np.uint64((1 << 28) - 1), np.uint64((1 << 64) - (1 << 28))
CANDIDATES_OF_A_BAND = 32  # the first ones: boilerplate of thousands must not be compared with all of them
DOCUMENTS_AT_ONCE = 512  # bounds the memory that comparing them with their candidates takes


def rows_per_band(threshold):
    """The most values a band may have for at least 98 % of the pairs of Jaccard similarity `threshold`, 0.5 or more, to
    share a band."""
    choices = range(1, SIGNATURE_VALUES // BANDS + 1)
    return max(rows for rows in choices if (1 - threshold**rows) ** BANDS <= 0.02)


def minhash_signatures(texts, rows):
    """(bands, bits) of UTF-8 texts over runs of 5 characters: uint64 [n, 16], a hash of the `rows` values of each band;
    uint64 [n, 8], a bit of each of the 512 values."""
    from rensa import RMinHash

    if not texts:
        return np.empty((0, BANDS), np.uint64), np.empty((0, SIGNATURE_VALUES // 64), np.uint64)
    shingles = [shingle_hashes(text) for text in texts]
    offsets = np.cumsum([0] + [len(hashes) for hashes in shingles]).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(shingles), offsets, SIGNATURE_VALUES, MINHASH_SEED
    )
    values = np.array(matrix.to_rows(), dtype=np.uint64)
    bands = np.broadcast_to(np.arange(1, BANDS + 1, dtype=np.uint64), (len(texts), BANDS))
    for row in range(rows):
        bands = mix(bands ^ values[:, row * BANDS : (row + 1) * BANDS])
    return bands, np.packbits(values.astype(np.uint8) & 1, axis=1).view(np.uint64)


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


def candidate_pairs(entries, runs):
    """uint64 [p], sorted: document << 32 | an earlier one, for each document of `entries` and the first
    CANDIDATES_OF_A_BAND documents of each of its bands. Those are in `runs`, sorted arrays of entries, older documents in
    earlier arrays; `entries` are sorted too and part of the last one."""
    pairs, left = [], np.full(len(entries), CANDIDATES_OF_A_BAND)
    for run in runs:
        first = np.searchsorted(run, entries & BAND)  # of its band, then up to its own place
        counts = np.minimum(np.searchsorted(run, entries) - first, left)
        left -= counts
        places = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        documents = np.repeat(entries & DOCUMENT, counts)
        pairs.append(documents << np.uint64(32) | run[places] & DOCUMENT)
    return np.unique(np.concatenate(pairs))


def are_similar(bits, others, threshold):
    """bool [n]: whether the texts with these bits, uint64 [n, 8] twice, are near duplicates: their estimated similarity
    (1 - 2 * share of bits that differ) is at most one standard error below the threshold. At 0.8 that takes 97 % of the
    pairs of similarity 0.82 and less than 1 % of those of 0.69."""
    error = math.sqrt((1 - threshold**2) / SIGNATURE_VALUES)
    most_differing = (1 - threshold + error) / 2 * SIGNATURE_VALUES
    return np.bitwise_count(bits ^ others).sum(axis=1, dtype=np.int64) <= most_differing


class SortedRuns:
    """Many uniform 64-bit numbers, added a batch at a time, in about 11 bytes each (17 while the largest runs merge).

    A log-structured merge tree (O'Neil et al. 1996) of sorted arrays: a new run swallows those less than FANOUT times
    its size, so few runs are to be searched.
    """

    FANOUT = 4

    def __init__(self):
        self.runs = []

    def insert(self, numbers):
        """Add uint64 [n]."""
        parts = [numbers]
        while self.runs and len(self.runs[-1]) < self.FANOUT * sum(map(len, parts)):
            parts.append(self.runs.pop())
        if len(parts[-1]):
            run = np.concatenate(parts)
            run.sort(kind="stable")  # timsort: merges runs that are sorted already
            self.runs.append(run)


class DigestSet(SortedRuns):
    """A set of uniform 64-bit digests. Ten million documents give one false duplicate with probability 3e-6."""

    def add(self, digests):
        """Add uint64 [n]; bool [n]: which were new, the first of several equal ones only."""
        unique, first = np.unique(digests, return_index=True)
        added = ~self.contains(unique)
        self.insert(unique[added])
        new = np.zeros(len(digests), dtype=bool)
        new[first[added]] = True
        return new

    def contains(self, digests):
        """bool [n]: which of uint64 [n] are in the set."""
        found = np.zeros(len(digests), dtype=bool)
        for run in self.runs:
            found |= run[np.minimum(np.searchsorted(run, digests), len(run) - 1)] == digests
        return found


class NearDuplicates:
    """The signatures of documents, 200 bytes each: 64 for the bits, the rest for the bands (measured with 800,000
    documents: 199, and up to 384 for as long as the largest runs merge). Those of near duplicates too: which documents
    are compared must not depend on how they come in batches.
    """

    def __init__(self, threshold):
        self.threshold, self.entries, self.count = threshold, SortedRuns(), 0
        self.bits, self.kept = np.empty((0, SIGNATURE_VALUES // 64), np.uint64), np.empty(0, bool)

    def keep(self, bands, bits):
        """bool [n]: which of the documents with these minhash_signatures are no near duplicate of an earlier kept one,
        of this call or a previous one; those are kept too."""
        starts = range(0, max(1, len(bands)), DOCUMENTS_AT_ONCE)
        parts = [slice(start, start + DOCUMENTS_AT_ONCE) for start in starts]
        return np.concatenate([self.keep_some(bands[part], bits[part]) for part in parts])

    def keep_some(self, bands, bits):
        first, self.count = self.count, self.count + len(bits)
        if self.count > DOCUMENT:
            raise UserError(f"--near_dedup: more than {DOCUMENT:,} documents; take --engine datatrove and more --tasks")
        if self.count > len(self.bits):
            size = len(self.bits) * 9 // 8 + len(bits)
            self.bits.resize((size, bits.shape[1]), refcheck=False)
            self.kept.resize(size, refcheck=False)
        self.bits[first : self.count], self.kept[first : self.count] = bits, True
        documents = np.arange(first, self.count, dtype=np.uint64)
        entries = np.sort((bands & BAND | documents[:, None]).ravel())  # sorted ones are found touching less memory
        pairs = candidate_pairs(entries, [*self.entries.runs, entries])
        documents, others = (pairs >> np.uint64(32)).astype(np.int64), (pairs & DOCUMENT).astype(np.int64)
        similar = are_similar(self.bits[documents], self.bits[others], self.threshold)
        for document, other in zip(documents[similar].tolist(), others[similar].tolist()):
            if self.kept[other]:
                self.kept[document] = False
        self.entries.insert(entries)
        return self.kept[first : self.count].copy()


class DuplicateFilter:
    """Remembers every kept document; `keep` answers which documents of the next block are new."""

    def __init__(self, exact, near_threshold):
        self.exact = DigestSet() if exact else None
        self.near = NearDuplicates(near_threshold) if near_threshold else None

    def keep(self, block, dropped):
        """bool [documents] of a Converted block; counts the others in `dropped`."""
        kept = np.ones(len(block.payloads), dtype=bool)
        if self.exact:
            kept = self.exact.add(block.digests)
            dropped["duplicate"] += int((~kept).sum())
        if self.near:
            before = int(kept.sum())
            kept[kept] = self.near.keep(*(part[kept] for part in block.signatures))
            dropped["near_duplicate"] += before - int(kept.sum())
        return kept
