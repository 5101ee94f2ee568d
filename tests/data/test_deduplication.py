"""Digests form a set, whatever the batches; near duplicates are what the threshold says."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.deduplication import DigestSet, DuplicateFilter, NearDuplicates, minhash_signatures, rows_per_band
from model.errors import UserError


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.integers(0, 40) | st.integers(0, 2**64 - 1), max_size=60), max_size=8))
def test_digest_set_is_a_set(batches):
    digests, model = DigestSet(), set()
    for batch in batches:
        expected = []
        assert digests.contains(np.array(batch, dtype=np.uint64)).tolist() == [value in model for value in batch]
        for value in batch:
            expected.append(value not in model)
            model.add(value)
        assert digests.add(np.array(batch, dtype=np.uint64)).tolist() == expected


def test_digest_set_grows_and_stays_compact():
    values = np.random.default_rng(0).integers(0, 2**64 - 2, 300_000, dtype=np.uint64)
    digests = DigestSet()
    for part in np.array_split(values, 700):
        assert digests.add(part).all()
    assert digests.contains(values).all() and not digests.contains(values + np.uint64(1)).any()
    assert sum(run.nbytes for run in digests.runs) == 8 * len(values) and len(digests.runs) < 10


def test_one_large_batch_with_repeats():
    values = np.random.default_rng(0).integers(0, 2**64 - 1, 100_000, dtype=np.uint64)
    digests = DigestSet()
    assert digests.add(np.concatenate([values, values[::-1]])).tolist() == [True] * 100_000 + [False] * 100_000
    assert not digests.add(values).any() and sum(map(len, digests.runs)) == 100_000


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
def test_bands_find_pairs_at_the_threshold(threshold):
    """The chance that none of 16 bands agrees is (1 - threshold ** rows) ** 16: at most 2 %, with one row more it is not."""
    rows = rows_per_band(threshold)
    missed = [math.prod(1 - threshold**count for _ in range(16)) for count in (rows, rows + 1)]
    assert missed[0] <= 0.02 < missed[1] and 16 * rows <= 512


def test_signatures_of_texts_of_any_length():
    bands, bits = minhash_signatures(["你".encode(), "你是谁".encode(), "你".encode(), b"abcdefgh"], 6)
    assert bands.shape == (4, 16) and bits.shape == (4, 8)
    assert (bands[0] == bands[2]).all() and (bits[0] == bits[2]).all()
    assert not set(bands[0].tolist()) & {*bands[1].tolist(), *bands[3].tolist()}
    assert [part.shape for part in minhash_signatures([], 6)] == [(0, 16), (0, 8)]


def jaccard(first, second):
    first, second = ({text[start : start + 5] for start in range(len(text) - 4)} for text in (first, second))
    return len(first & second) / len(first | second)


def pairs_of_similarity(similarity, count, shingles=400):
    """Pairs of texts that begin with the same characters and go on with others."""
    generator = np.random.default_rng(0)
    same = round(2 * shingles * similarity / (1 + similarity))
    for _ in range(count):
        first = generator.integers(0x4E00, 0x9FA0, shingles + 4)
        second = np.concatenate([first[: same + 4], generator.integers(0x4E00, 0x9FA0, shingles - same)])
        yield "".join(map(chr, first)), "".join(map(chr, second))


@pytest.mark.parametrize("similarity, least, most", [(0.69, 0, 0.02), (0.82, 0.93, 1), (0.75, 0.08, 0.3), (0.9, 1, 1)])
def test_near_duplicates_are_those_of_the_threshold(similarity, least, most):
    """At 0.8. Bands alone dropped 17 % of the pairs of 0.69, and 75 % of those of 0.82."""
    pairs = list(pairs_of_similarity(similarity, 400))
    assert abs(np.mean([jaccard(*pair) for pair in pairs[:20]]) - similarity) < 0.005
    near, signatures = (
        NearDuplicates(0.8),
        [minhash_signatures([t.encode() for t in texts], 6) for texts in zip(*pairs)],
    )
    assert near.keep(*signatures[0]).all()
    assert least <= 1 - near.keep(*signatures[1]).mean() <= most


@pytest.mark.parametrize("similarity, rows", [(0.69, 6), (0.82, 6), (0.82, 14)])
def test_bands_and_bits_agree_as_often_as_the_similarity_says(similarity, rows):
    """A band of r values in a share s ** r of the cases, a bit where the value does and in half of the other cases."""
    pairs = pairs_of_similarity(similarity, 400)
    first, second = (minhash_signatures([text.encode() for text in texts], rows) for texts in zip(*pairs))
    assert (first[0] == second[0]).mean() == pytest.approx(similarity**rows, abs=0.02)
    bits = [np.unpackbits(signature[1].view(np.uint8), axis=1) for signature in (first, second)]
    assert (bits[0] == bits[1]).mean() == pytest.approx((1 + similarity) / 2, abs=0.01)
    assert bits[0].mean() == pytest.approx(0.5, abs=0.01)


FRESH = itertools.count(1000)


def signatures(*documents):
    """(bands, bits) of documents given as ([numbers of shared bands], how many of the 512 bits are set)."""
    bands = [[*shared, *(next(FRESH) for _ in range(16 - len(shared)))] for shared, _ in documents]
    bits = np.array([[1] * ones + [0] * (512 - ones) for _, ones in documents], np.uint8)
    return np.array(bands, np.uint64) << np.uint64(28), np.packbits(bits, axis=1).view(np.uint64)


def test_candidates_share_a_band_and_are_judged_by_their_bits():
    """Similarity 0.8 is a tenth of the bits, one standard error more is 57.98 of 512."""
    near = NearDuplicates(0.8)
    one_block = ([1], 0), ([1, 7], 10), ([1], 200), ([2], 0), ([1], 57), ([1], 58)
    assert near.keep(*signatures(*one_block)).tolist() == [True, False, True, True, False, True]
    # Also those behind the first document of a band are found; what was dropped leaves no band behind.
    later = ([1], 5), ([1], 205), ([1], 300), ([7], 10), ([8], 400), ([8, 9], 410), ([9], 410)
    assert near.keep(*signatures(*later)).tolist() == [False, False, True, True, True, False, True]
    assert near.keep(*minhash_signatures([], 6)).tolist() == []
    assert near.keep(*signatures(([9], 415), ([8], 405), ([8], 450))).tolist() == [False, False, False]
    assert near.keep(*signatures(([8], 510), ([8], 511))).tolist() == [True, False]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_first_documents_of_a_band_are_compared_in_whatever_batches_they_come(monkeypatch, size):
    monkeypatch.setattr("model.data.deduplication.CANDIDATES_OF_A_BAND", 2)
    near, kept = NearDuplicates(0.8), []
    documents = ([1], 0), ([1], 200), ([1], 400), ([1], 401), ([1], 1)
    for start in range(0, len(documents), size):
        kept += near.keep(*signatures(*documents[start : start + size])).tolist()
    assert kept == [True, True, True, True, False]


def test_more_documents_than_an_entry_can_number(monkeypatch):
    monkeypatch.setattr("model.data.deduplication.DOCUMENT", np.uint64(3))
    near = NearDuplicates(0.8)
    assert near.keep(*signatures(([1], 0), ([2], 200))).all()
    with pytest.raises(UserError, match="--near_dedup: more than 3 documents; take --engine datatrove"):
        near.keep(*signatures(([3], 0), ([4], 200)))


def test_near_duplicates_of_thousands_of_documents_are_found():
    generator, near = np.random.default_rng(0), NearDuplicates(0.8)
    bands = generator.integers(0, 2**64 - 1, (3000, 16), dtype=np.uint64)
    bits = generator.integers(0, 2**64 - 1, (3000, 8), dtype=np.uint64)
    for part in np.array_split(np.arange(3000), 70):
        assert near.keep(bands[part], bits[part]).all()
    others = generator.integers(0, 2**64 - 1, (3000, 16), dtype=np.uint64)
    others[:, 3] = bands[:, 3]
    assert not near.keep(others, bits).any() and near.count == 6000  # what decides on later ones stays
    assert sum(run.nbytes for run in near.entries.runs) == 8 * 16 * 6000 and near.bits.nbytes < 80 * 6000


def test_boilerplate_does_not_hide_a_duplicate():
    """Twenty documents share a band though they differ; one more is like the last of them."""
    generator, near = np.random.default_rng(0), NearDuplicates(0.8)
    bands = generator.integers(0, 2**64 - 1, (21, 16), dtype=np.uint64)
    bands[:, 5] = bands[0, 5]
    bits = generator.integers(0, 2**64 - 1, (21, 8), dtype=np.uint64)
    bits[20] = bits[19]
    assert near.keep(bands, bits).tolist() == [True] * 20 + [False]


def test_exact_duplicates_are_no_near_ones():
    duplicates, dropped = DuplicateFilter(True, 0.8), {"duplicate": 0, "near_duplicate": 0}

    def keep(digests, *documents):
        return duplicates.keep(
            SimpleNamespace(payloads=digests, digests=np.array(digests, np.uint64), signatures=signatures(*documents)),
            dropped,
        ).tolist()

    assert keep([1, 2, 1], ([1], 0), ([1], 9), ([3], 400)) == [True, False, False]
    assert keep([1, 3, 4], ([5], 0), ([3], 400), ([1], 9)) == [False, True, False]
    assert dropped == {"duplicate": 2, "near_duplicate": 2}
