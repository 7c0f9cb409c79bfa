"""Keyed permutations of 0 .. size - 1 that are computed, not stored."""

import math

import numpy as np

# With 12 rounds the orders of 3, 4 and 5 elements are uniform, and so are positions and
# neighbours among 7 or more; with 6 they are not (tests/.../test_permutation.py).
ROUNDS = 12


class Permutation:
    """A permutation of 0 .. size - 1 in O(1) memory; a pure function of `key`.

    A Feistel network over pairs (left, right) with left < a, right < b and a * b just above
    `size`: each round adds a keyed hash of one half to the other, modulo that half's size. Values
    outside are sent through again until they fall inside (cycle walking). Source: Black and Rogaway
    2002, "Ciphers with Arbitrary Finite Domains". It is no cipher: its hash is chosen for speed.

    Args:
        size: at least 1, less than 2**62.
        key: integers that are not negative; another key is another permutation.

    Raises:
        ValueError: the size is out of range.
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        if not 1 <= size < 2**62:
            raise ValueError(f"a permutation of {size} elements")
        self._size = np.uint64(size)
        left = math.isqrt(size - 1) + 1
        self._left, self._right = np.uint64(left), np.uint64(-(-size // left))
        # The raw bits of Philox: NumPy keeps them for ever, and not how it shuffles.
        self._round_keys = np.random.Philox(np.random.SeedSequence(key)).random_raw(ROUNDS)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Returns the elements at `positions`: int64 [n].

        Args:
            positions: integers [n] in 0 .. size - 1, in any order.
        """
        values = self._once(np.asarray(positions).astype(np.uint64))
        outside = np.flatnonzero(values >= self._size)
        while len(outside):
            values[outside] = self._once(values[outside])
            outside = outside[values[outside] >= self._size]
        return values.astype(np.int64)

    def _once(self, values: np.ndarray) -> np.ndarray:
        """Permutes 0 .. a * b - 1: uint64 [n]."""
        left, right = values % self._left, values // self._left
        halves = [(left, right, self._left), (right, left, self._right)]
        for number, key in enumerate(self._round_keys):
            changed, other, modulus = halves[number % 2]
            changed += _hash_below(other, key, modulus)
            changed -= modulus * (changed >= modulus)
        return left + right * self._left


def _hash_below(values: np.ndarray, key: np.uint64, modulus: np.uint64) -> np.ndarray:
    """Returns hashes in 0 .. modulus - 1, where modulus <= 2**31."""
    hashed = values + key
    hashed *= np.uint64(0x9E3779B97F4A7C15)
    hashed ^= hashed >> np.uint64(32)
    hashed *= np.uint64(0xD6E8FEB86659FD93)
    hashed >>= np.uint64(32)
    hashed *= modulus
    hashed >>= np.uint64(32)
    return hashed
