"""RULER's synthetic tasks (Hsieh et al. 2024, 2404.06654): needles, variable chains, common and frequent words.

Prompts have RULER's own sentences and counts; left out are its worked example before variable chains and common words,
and its essays: needles lie in its sentences of noise. Words are those of `labels`, not RULER's lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from random import Random

from memory_service.errors import InvalidArgument
from model_worker.tasks.labels import words
from model_worker.tasks.landmark import FILLER
from model_worker.tasks.tokens import Tokenizer

HOPS = 4  # Variables assigned from another one.
COMMON, COMMON_TIMES, UNCOMMON_TIMES = 10, 30, 3  # Words to be found, and how often they and the others occur.
SHORT_TIMES = 10  # The first, in prompts of fewer than 4,096 tokens.
SHORT = 4096
FREQUENT = 3  # Coded words to be found.
CODED_LETTERS, CODED_WORDS, ZIPF = 6, 2000, 2.0
KEYS = 4  # Needles of a prompt with several keys, values or questions.


class Task(StrEnum):
    """By their names in RULER, niah being a needle in a haystack."""

    SINGLE = "niah_single"
    MULTIKEY = "niah_multikey"  # Four keys, one asked.
    MULTIKEY_LINES = "niah_multikey_lines"  # Nothing but keys, one asked.
    MULTIVALUE = "niah_multivalue"  # Four values of one key, all asked.
    MULTIQUERY = "niah_multiquery"  # Four keys, all asked.
    VARIABLES = "vt"
    COMMON_WORDS = "cwe"
    FREQUENT_WORDS = "fwe"


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and everything that has to stand in what follows it."""

    task: Task
    prompt: str = field(repr=False)
    answers: tuple[str, ...]

    def score(self, output: str) -> float:
        """Share of the answers that stand in the output, in any order and case: RULER's string match."""
        said = output.lower()
        return sum(answer.lower() in said for answer in self.answers) / len(self.answers)


Writer = Callable[[int, int, Random], tuple[str, Sequence[str]]]


def example(task: Task | str, tokenizer: Tokenizer, tokens: int, rng: Random) -> Example:
    """An example whose prompt has at most `tokens` tokens, and nearly as many.

    Raises InvalidArgument if so few tokens hold none.
    """
    write = _WRITERS[Task(task)]
    seed = rng.getrandbits(64)

    def written(units: int) -> tuple[str, Sequence[str], int]:
        # The same draws for every size that is tried.
        prompt, answers = write(units, tokens, Random(seed))
        return prompt, answers, len(tokenizer.encode(prompt))

    small, large = 1, 2
    _, _, least = written(small)
    if least > tokens:
        raise InvalidArgument(f"the smallest prompt of {task} has {least} tokens, more than the {tokens} asked for")
    while (count := written(large)[2]) <= tokens:
        if large > 8 and count > tokens // 4:
            small, large = large, max(large + 1, large * tokens // count + 2)
        else:
            small, large = large, large * 2
    while large - small > max(1, small // 200):
        middle = (small + large) // 2
        small, large = (middle, large) if written(middle)[2] <= tokens else (small, middle)
    prompt, answers, _ = written(small)
    return Example(Task(task), prompt, tuple(answers))


# --- Needles ----------------------------------------------------------------------------------------------------------


def _number(rng: Random) -> str:
    return str(rng.randint(1_000_000, 9_999_999))


def _names(count: int, rng: Random) -> list[str]:
    """Different keys of two words."""
    names: dict[str, None] = {}
    while len(names) < count:
        names[f"{rng.choice(words(held_out=True))}-{rng.choice(words())}"] = None
    return list(names)


def _needle(key: str, value: str) -> str:
    return f"One of the special magic numbers for {key} is: {value}."


def _hidden(lines: Sequence[str], noise: int, rng: Random) -> str:
    """The lines in random places between so many sentences of noise, in their order."""
    places = sorted(rng.randint(0, noise) for _ in lines)
    text = [FILLER] * noise
    for line, place in reversed(list(zip(lines, places, strict=True))):
        text.insert(place, line)
    return "\n".join(text)


def _needles(context: str, queries: Sequence[str], many: bool) -> str:
    kind = "numbers" if many else "number"
    query = queries[0] if len(queries) == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}"
    # RULER turns the sentence into the singular where there is one answer.
    hidden = "Some special magic numbers are" if many else "A special magic number is"
    it = "them" if many else "it"
    asked = "What are all the special magic numbers" if many else "What is the special magic number"
    are = "are" if many else "is"
    return (
        f"{hidden} hidden within the following text. Make sure to memorize {it}. I will quiz you about the {kind} "
        f"afterwards.\n{context}\n{asked} for {query} mentioned in the provided text? The special magic {kind} for "
        f"{query} mentioned in the provided text {are}"
    )


def _single(units: int, tokens: int, rng: Random) -> tuple[str, Sequence[str]]:
    (key,), value = _names(1, rng), _number(rng)
    return _needles(_hidden([_needle(key, value)], units, rng), [key], many=False), [value]


def _multikey(units: int, tokens: int, rng: Random) -> tuple[str, Sequence[str]]:
    keys = _names(KEYS, rng)
    values = [_number(rng) for _ in keys]
    context = _hidden([_needle(*pair) for pair in zip(keys, values, strict=True)], units, rng)
    asked = rng.randrange(KEYS)
    return _needles(context, [keys[asked]], many=False), [values[asked]]


def _multikey_lines(units: int, tokens: int, rng: Random) -> tuple[str, Sequence[str]]:
    keys = _names(units, rng)
    values = [_number(rng) for _ in keys]
    context = "\n".join(_needle(*pair) for pair in zip(keys, values, strict=True))
    asked = rng.randrange(units)
    return _needles(context, [keys[asked]], many=False), [values[asked]]


def _multivalue(units: int, tokens: int, rng: Random) -> tuple[str, Sequence[str]]:
    (key,) = _names(1, rng)
    values = [_number(rng) for _ in range(KEYS)]
    return _needles(_hidden([_needle(key, value) for value in values], units, rng), [key], many=True), values


def _multiquery(units: int, tokens: int, rng: Random) -> tuple[str, Sequence[str]]:
    keys = _names(KEYS, rng)
    values = [_number(rng) for _ in keys]
    context = _hidden([_needle(*pair) for pair in zip(keys, values, strict=True)], units, rng)
    return _needles(context, keys, many=True), values


# --- The others -------------------------------------------------------------------------------------------------------


def _variables(units: int, tokens: int, rng: Random) -> tuple[str, Sequence[str]]:
    names: dict[str, None] = {}
    while len(names) < HOPS + 1:
        names["".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(5))] = None
    chain = list(names)
    value = str(rng.randint(10_000, 99_999))
    lines = [f"VAR {chain[0]} = {value}"]
    lines += [f"VAR {name} = VAR {before}" for before, name in pairwise(chain)]
    prompt = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{_hidden(lines, units, rng)}\n"
        f"Question: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
        f"chain(s) of variable assignment in the text above, {len(chain)} variables are assigned the value {value}, "
        "they are:"
    )
    return prompt, chain


def _common_words(units: int, tokens: int, rng: Random) -> tuple[str, Sequence[str]]:
    every = list(words())
    rng.shuffle(every)
    # More uncommon words than there are words: two of them joined.
    while len(every) < units + COMMON:
        every.append(f"{rng.choice(words())}-{rng.choice(words())}")
    common, uncommon = every[:COMMON], every[COMMON : COMMON + units]
    times = SHORT_TIMES if tokens < SHORT else COMMON_TIMES
    listed = common * times + uncommon * UNCOMMON_TIMES
    rng.shuffle(listed)
    context = " ".join(f"{place}. {word}" for place, word in enumerate(listed, 1))
    prompt = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{context}\nQuestion: What are the {COMMON} most common words in the above list? "
        f"Answer: The top {COMMON} words that appear most often in the list are:"
    )
    return prompt, common


def _frequent_words(units: int, tokens: int, rng: Random) -> tuple[str, Sequence[str]]:
    coded: dict[str, None] = {"...": None}  # The most frequent of all is no word.
    while len(coded) < CODED_WORDS:
        coded["".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(CODED_LETTERS))] = None
    every = list(coded)
    # So many that the last word to be found occurs oftener than the next, however short the text.
    size = 60 + 10 * units
    shares = [rank**-ZIPF for rank in range(1, CODED_WORDS + 1)]
    whole = sum(shares)
    text = [word for word, share in zip(every, shares, strict=True) for _ in range(round(size * share / whole))]
    rng.shuffle(text)
    prompt = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        f"appeared coded words. {' '.join(text)}\nQuestion: Do not provide any explanation. Please ignore the dots "
        "'....'. What are the three most frequently appeared words in the above coded text? Answer: According to the "
        "coded text above, the three most frequently appeared words are:"
    )
    return prompt, every[1 : 1 + FREQUENT]


_WRITERS: dict[Task, Writer] = {
    Task.SINGLE: _single,
    Task.MULTIKEY: _multikey,
    Task.MULTIKEY_LINES: _multikey_lines,
    Task.MULTIVALUE: _multivalue,
    Task.MULTIQUERY: _multiquery,
    Task.VARIABLES: _variables,
    Task.COMMON_WORDS: _common_words,
    Task.FREQUENT_WORDS: _frequent_words,
}
