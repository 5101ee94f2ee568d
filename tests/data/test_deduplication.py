"""Digests form a set, whatever the batches; near duplicates share a band where the threshold says so."""

from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from model.data.deduplication import DigestSet, DuplicateFilter, band_shape, minhash_bands


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


def test_minhash_bands_meet_the_threshold_and_take_texts_of_any_length():
    for threshold in (0.5, 0.8, 0.9):
        bands, rows = band_shape(threshold)
        assert bands * rows <= 128 and abs((1 / bands) ** (1 / rows) - threshold) < 0.03
    bands = minhash_bands(["你".encode(), "你是谁".encode(), "你".encode(), b"abcdefgh"], 11, 11)
    assert (bands[0] == bands[2]).all() and not set(bands[0].tolist()) & {*bands[1].tolist(), *bands[3].tolist()}
    assert minhash_bands([], 11, 11).shape == (0, 11)


def test_a_shared_band_is_a_near_duplicate_in_the_same_block_and_in_later_ones():
    duplicates, dropped = DuplicateFilter(exact=True, near=True), {"duplicate": 0, "near_duplicate": 0}

    def keep(digests, bands):
        block = SimpleNamespace(
            payloads=digests, digests=np.array(digests, np.uint64), bands=np.array(bands, np.uint64)
        )
        return duplicates.keep(block, dropped).tolist()

    assert keep([1, 2, 3, 1], [[11, 12], [13, 12], [14, 15], [16, 17]]) == [True, False, True, False]
    # The documents that were dropped leave no band behind.
    assert keep([4, 5, 6], [[19, 14], [13, 18], [16, 17]]) == [False, True, True]
    assert dropped == {"duplicate": 1, "near_duplicate": 2}
