"""The Focused Transformer's dictionary look-up (2307.03170): definitions of four-token keys, and questions about them.

A definition is <k> k1 k2 k3 k4 <v> v1 v2 v3 v4, a question the same with <q> in front: ten tokens out of a vocabulary
of 64. The paper does not say whether keys are distinct; here they are, or no memory could answer for more than one.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from memory_service.errors import InvalidArgument

KEY, VALUE, QUESTION = 0, 1, 2  # Token ids.
FIRST_SYMBOL = 3
SYMBOLS = 61
VOCABULARY = FIRST_SYMBOL + SYMBOLS
LENGTH = 4  # Tokens of a key, and of a value.
RECORD = 2 * LENGTH + 2  # Tokens.
VALUE_AT = LENGTH + 2  # The value's first token in a record.
MOST_KEYS = SYMBOLS**LENGTH


def distinct(count: int, rng: np.random.Generator, alphabet: int = SYMBOLS) -> NDArray[np.int64]:
    """Numbers of `count` different keys over an alphabet, in random order. [count]

    Raises InvalidArgument if there are not as many.
    """
    most = alphabet**LENGTH
    if count > most:
        raise InvalidArgument(f"there are {most:,} keys of {LENGTH} out of {alphabet} tokens, not {count:,}")
    if count > most // 8:
        return rng.permutation(most)[:count]
    found = np.unique(rng.integers(0, most, count + count // 3 + 64))
    while len(found) < count:
        found = np.unique(np.concatenate([found, rng.integers(0, most, count)]))
    return rng.permutation(found)[:count]


def symbols(numbers: NDArray[np.integer], alphabet: int = SYMBOLS) -> NDArray[np.int64]:
    """The four symbols of each key's number, 0 to alphabet - 1. [..., 4]"""
    powers = alphabet ** np.arange(LENGTH - 1, -1, -1, dtype=np.int64)
    return numbers[..., None].astype(np.int64) // powers % alphabet


def keys_of(numbers: NDArray[np.integer]) -> NDArray[np.int64]:
    """Token ids of the keys with these numbers. [..., 4]"""
    return symbols(numbers) + FIRST_SYMBOL


def nearly_colliding(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Different keys over as few symbols as give enough of them, so that most differ in a token or two. [count, 4]"""
    fewest = math.ceil((1.25 * count) ** (1 / LENGTH))
    alphabet = int(rng.integers(fewest, min(SYMBOLS, fewest + 6) + 1)) if fewest < SYMBOLS else SYMBOLS
    chosen = rng.permutation(SYMBOLS)[:alphabet] + FIRST_SYMBOL
    drawn: NDArray[np.int64] = chosen[symbols(distinct(count, rng, alphabet), alphabet)]
    return drawn


def values(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Token ids of random values, which may repeat. [count, 4]"""
    return rng.integers(FIRST_SYMBOL, VOCABULARY, (count, LENGTH))


def records(first: int, keys: NDArray[np.integer], answers: NDArray[np.integer]) -> NDArray[np.int64]:
    """Definitions (`first` = KEY) or questions with their answers (QUESTION) as token ids. [count, 10]"""
    made = np.empty((len(keys), RECORD), dtype=np.int64)
    made[:, 0] = first
    made[:, 1 : 1 + LENGTH] = keys
    made[:, 1 + LENGTH] = VALUE
    made[:, VALUE_AT:] = answers
    return made
