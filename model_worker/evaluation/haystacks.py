"""Long texts that state facts, and questions about them, as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

from memory_service.errors import InvalidArgument
from model_worker.tasks import lookup
from model_worker.tasks.labels import Labels, stated_twice
from model_worker.tasks.landmark import DESCRIPTION, FILLER
from model_worker.tasks.lookup import Record
from model_worker.tasks.parts import Part, Role, text_of
from model_worker.tasks.tokens import Tokenizer

HAYSTACKS = {"keys": "labelled pass keys in filler", "lookup": "UUID look-up"}  # And what pictures call them.
KEYS = (10_000, 99_999)  # Five digits.

_ANSWERED = (Role.ANSWER, Role.COPIED)
_SAMPLE = 32  # Records that tell how many tokens one takes.


@dataclass(frozen=True, slots=True)
class Cloze:
    """A text whose end is to be found, as token ids."""

    prompt: Sequence[int]
    answer: Sequence[int]


@dataclass(frozen=True, slots=True)
class Haystack:
    """A long text and questions about it, cut as prompts are: what the window reads at once is not in memory."""

    ids: Sequence[int]  # For the memory.
    questions: Sequence[Cloze]  # Each begins with what the text ends with.
    facts: int  # The text states, of which some are asked.


def cloze_of(tokenizer: Tokenizer, parts: Sequence[Part]) -> Cloze:
    """The question that a task's parts put: the prompt is all before the answer. Raises InvalidArgument without one."""
    ids, owners = tokenizer.encode_parts([part.text for part in parts])
    answered = [place for place, owner in enumerate(owners) if parts[owner].role in _ANSWERED]
    if not answered or not answered[0]:
        raise InvalidArgument("a question needs words before its answer, and an answer")
    return Cloze(ids[: answered[0]], ids[answered[0] : answered[-1] + 1])


def haystack_of(name: str, tokenizer: Tokenizer, tokens: int, asked: int, rng: Random, local: int) -> Haystack:
    """The haystack of this name with at most `tokens` tokens and `asked` questions; for `local` see `_cut`.

    Raises InvalidArgument.
    """
    if name not in HAYSTACKS:
        raise InvalidArgument(f"there is no haystack {name!r}; there are {', '.join(HAYSTACKS)}")
    make = keys_haystack if name == "keys" else uuid_haystack
    return make(tokenizer, tokens, asked, rng, local)


def keys_haystack(tokenizer: Tokenizer, tokens: int, asked: int, rng: Random, local: int) -> Haystack:
    """The Landmark prompt's sentences with `asked` labelled pass keys spread evenly over them, all of them asked.

    Raises InvalidArgument if the keys alone need more than `tokens`.
    """
    labels = Labels(rng, held_out=True)
    facts = [(labels.draw(), str(rng.randint(*KEYS))) for _ in range(asked)]
    opening = tokenizer.encode(f"{DESCRIPTION}\n")
    lines = [tokenizer.encode(text_of(stated_twice(label, key))) for label, key in facts]
    room = tokens - len(opening) - sum(map(len, lines))
    if room < 0:
        raise InvalidArgument(
            f"{asked} keys need {tokens - room:,} tokens, more than the haystack's {tokens:,}: give more tokens, or "
            "fewer questions"
        )
    sentences = tokenizer.encode(f" {FILLER}")
    filler = islice(sentences * (room // len(sentences) + 2), rng.randrange(len(sentences)), None)
    ids = list(opening)
    for number, line in enumerate(lines):
        ids += islice(filler, _share(room, number, asked + 1))
        ids += line
    ids += islice(filler, _share(room, asked, asked + 1))
    return _cut(ids, [cloze_of(tokenizer, asking(label, key)) for label, key in facts], asked, local)


def asking(label: str, key: str) -> list[Part]:
    """The Landmark prompt's question."""
    return [Part(f"\nWhat is the {label}? The {label} is ", Role.QUESTION), Part(key, Role.ANSWER)]


def uuid_haystack(tokenizer: Tokenizer, tokens: int, asked: int, rng: Random, local: int) -> Haystack:
    """A JSON object of at most `tokens` tokens that pairs UUIDs, and at most `asked` questions, spread evenly over it.

    In the form of ∞-Bench's Retrieve.KV. Raises InvalidArgument if no record fits.
    """
    records = [lookup.record(rng) for _ in range(_SAMPLE)]
    each = len(tokenizer.encode(text_of(lookup.listed(records)))) / _SAMPLE
    frame = len(tokenizer.encode(_json([])))
    records = [lookup.record(rng) for _ in range(max(0, int((tokens - frame) / each)))]
    ids = tokenizer.encode(_json(records))
    while records and len(ids) > tokens:
        records.pop()
        ids = tokenizer.encode(_json(records))
    if not records:
        raise InvalidArgument(f"{tokens:,} tokens hold no record of about {each:.0f} tokens: give more")
    asked = min(asked, len(records))
    places = [int((number + 0.5) * len(records) / asked) for number in range(asked)]
    questions = [cloze_of(tokenizer, lookup.asked(records[place])) for place in places]
    return _cut(ids, questions, len(records), local)


def _cut(ids: Sequence[int], questions: Sequence[Cloze], facts: int, local: int) -> Haystack:
    """The text goes into memory but for its end, with which every question begins, as the end of one long prompt.

    `local` tokens are read at once: that end, the question and its answer.
    """
    end = max(0, min(local - max(len(one.prompt) + len(one.answer) for one in questions), len(ids)))
    start = len(ids) - end
    asked = [Cloze([*ids[start:], *one.prompt], one.answer) for one in questions]
    return Haystack(ids[:start], asked, facts)


def _json(records: Sequence[Record]) -> str:
    return f"{lookup.TASK}{lookup.OPENING}{text_of(lookup.listed(records))}}}"


def _share(whole: int, number: int, parts: int) -> int:
    """The size of one of so many nearly equal parts."""
    return (number + 1) * whole // parts - number * whole // parts
