"""SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014; with the finalizer of
Vigna's splitmix64.c). Its n-th output is the mix of start + n * GOLDEN: each can be had without those before it.
"""

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

GOLDEN = 0x9E3779B97F4A7C15
# The finalizer, variant 13 of David Stafford's: shifts, and what is multiplied by between them.
SHIFTS, FACTORS = (30, 27, 31), (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS, _FACTORS = [np.uint64(shift) for shift in SHIFTS], [np.uint64(factor) for factor in FACTORS]


def mix(word: int) -> int:
    """The finalizer of one word of 64 bits, without numpy's cost."""
    word = (word ^ (word >> SHIFTS[0])) * FACTORS[0] % 2**64
    word = (word ^ (word >> SHIFTS[1])) * FACTORS[1] % 2**64
    return word ^ (word >> SHIFTS[2])


def mix_words(words: Words) -> Words:
    """`mix` of each word, in place."""
    shifted = words >> _SHIFTS[0]
    for factor, shift in zip(_FACTORS, _SHIFTS[1:], strict=True):
        words ^= shifted
        words *= factor
        np.right_shift(words, shift, out=shifted)
    words ^= shifted
    return words
