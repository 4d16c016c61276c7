"""Training documents that state keys somewhere and ask for them at the end, among real text and other fillers.

The memory windows of a document state keys; its last window asks for some of them. Groups of documents share their
memory windows, so a key has to be told from those of other documents, the paper's cross-batch negatives (2307.03170).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray

from memory_service.errors import InvalidArgument
from model_worker.tasks import corpus, labels, landmark, lookup
from model_worker.tasks.corpus import Kind, Split, Text
from model_worker.tasks.labels import Labels
from model_worker.tasks.parts import Part, Role
from model_worker.tasks.tokens import Tokenizer
from model_worker.training.part_encoder import PartEncoder
from model_worker.training.reads import grouped
from model_worker.training.shapes import Batch, Shape, batch_of

# What predicting a token is worth. Nobody can know a key where it is first stated; learning to repeat it a few tokens
# later is what retrieval grows from.
WEIGHTS = {
    Role.PLAIN: 1.0,
    Role.NEW: 0.0,
    Role.REPEATED: 3.0,
    Role.QUESTION: 0.3,
    Role.ANSWER: 8.0,
    Role.STOP: 8.0,
    Role.COPIED: 2.0,
}
LIST_WEIGHT = 0.1  # Of a JSON object's punctuation.
CROSSING = 0.35  # Share of documents with a line put across a window's border.
LOCAL = 0.3  # Share of documents that state a key where they ask for it.
DESCRIBED = 0.3  # Share of documents that begin with the task's description.
PROSE = 0.25  # Share of real text that is prose; there is twenty times as much code.
CONTINUED = 0.4  # Share of UUID questions that only begin the record again.
UUID_WINDOW = 192  # Tokens a window needs to hold a UUID question.


@dataclass(frozen=True, slots=True)
class Filler:
    """What stands between the lines of a document."""

    share: float
    weight: float
    draw: Callable[[int, Random], NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens with what predicting each of them is worth."""

    ids: NDArray[np.int64]  # [T]
    weights: NDArray[np.float32]  # [T]
    answers: NDArray[np.bool_]  # [T]

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, start: int, stop: int) -> Piece:
        """A slice."""
        return Piece(self.ids[start:stop], self.weights[start:stop], self.answers[start:stop])


class RetrievalSource:
    """Labelled keys and UUID records in landmark filler, real text, random words and repeated snippets."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        seed: int,
        texts: Sequence[Text] | None = None,
        *,
        uuid: float = 0.0,
        plain: float = 0.7,
        close: float = 0.0,
        bare: float = 0.0,
        copied: float = WEIGHTS[Role.COPIED],
    ):
        """Shares and weights, all of them options of a training's `[data]`.

        `uuid` is the share of documents that are UUID look-ups, `plain` that of groups where one label is "pass key",
        `close` that of labels that differ little from another of their group, `bare` that of look-ups whose last window
        begins with the question rather than with the object's end. `copied` is what predicting a value's later tokens
        is worth, for whoever must copy all of it. `texts` is what real text and code are drawn from; None: what this
        machine has for training.
        """
        if not 0 <= copied < math.inf:
            raise InvalidArgument(f"copied is a weight of 0 or more, got {copied}")
        for name, share in (("uuid", uuid), ("plain", plain), ("close", close), ("bare", bare)):
            if not 0 <= share <= 1:
                raise InvalidArgument(f"{name} is a share from 0 to 1, got {share}")
        self._encode = PartEncoder(tokenizer)
        self._tokenizer = tokenizer
        self._seed = seed
        self._uuid = uuid
        self._plain = plain
        self._close = close
        self._bare = bare
        self._weights = {**WEIGHTS, Role.COPIED: copied}
        found = corpus.texts(Split.TRAIN) if texts is None else texts
        code, prose = (
            corpus.token_ids([one for one in found if one.kind is kind], tokenizer) for kind in (Kind.CODE, Kind.PROSE)
        )
        if not len(code) + len(prose):
            raise InvalidArgument("there is no real text to train on")
        self._code, self._prose = code if len(code) else prose, prose if len(prose) else code
        self._description = np.array(tokenizer.encode(landmark.DESCRIPTION + "\n"), dtype=np.int64)
        self._period = np.array(tokenizer.encode(f" {landmark.FILLER}"), dtype=np.int64)
        rng = Random(0)
        words = " ".join(rng.choice(labels.words()) for _ in range(50_000))
        self._words = np.array(tokenizer.encode(words), dtype=np.int64)
        self._fillers = (
            Filler(0.40, 0.1, self._landmark),
            Filler(0.35, 1.0, self._text),
            Filler(0.10, 0.02, lambda tokens, rng: _slice(self._words, tokens, rng)),
            Filler(0.15, 0.3, self._snippet),
        )

    def batch(self, step: int, shape: Shape) -> Batch:
        """The batch of a step."""
        if shape.windows < 2:
            raise InvalidArgument("a retrieval shape needs 2 windows or more: memory, and one that asks")
        rng = Random(f"retrieval {self._seed} {step}")
        documents = []
        for _ in range(0, shape.documents, shape.group):
            documents += self._group(shape, rng)
        stacked = Piece(
            np.stack([one.ids for one in documents]),
            np.stack([one.weights for one in documents]),
            np.stack([one.answers for one in documents]),
        )
        reads = grouped(shape.documents, shape.windows, shape.group)
        return batch_of(stacked.ids, stacked.weights, stacked.answers, shape, reads)

    # Documents

    def _group(self, shape: Shape, rng: Random) -> list[Piece]:
        """Documents that read each other: all labels differ, and at most one of them is the plain one."""
        drawn = Labels(rng, close=self._close)
        share = self._uuid if shape.uuid is None else shape.uuid
        # Records have to be told from records, so some groups have many of them and the others none.
        mixed = rng.uniform(max(0.0, 2 * share - 1), 1.0) if rng.random() < 2 * share else 0.0
        plain = rng.randrange(shape.group) if rng.random() < self._plain else -1
        documents = []
        for place in range(shape.group):
            if rng.random() < mixed:
                documents.append(self._records(shape, rng))
            else:
                documents.append(self._labelled(shape, drawn, place == plain, rng))
        return documents

    def _labelled(self, shape: Shape, drawn: Labels, plain: bool, rng: Random) -> Piece:
        """Lines with keys in the memory windows, questions in the last one, filler of one kind between them."""
        (filler,) = rng.choices(self._fillers, [one.share for one in self._fillers])
        count = 1 if plain and rng.random() < 0.5 else rng.randint(1, shape.keys)
        keys = [(drawn.plain() if plain and n == 0 else drawn.draw(), labels.number(rng)) for n in range(count)]
        lines = [self._piece(labels.stated(*key, rng)) for key in keys]
        rng.shuffle(lines)
        description = self._description if rng.random() < DESCRIBED else self._description[:0]
        crossing = rng.random() < CROSSING
        room = (shape.windows - 1) * shape.window
        memory, kept = self._scattered(room, lines, filler, rng, description, shape.window if crossing else 0)
        if kept < count:
            raise InvalidArgument(
                f"{count} keys do not fit into {room} tokens of memory: ask for fewer keys a document"
            )

        questions = rng.sample(keys, count)
        if plain:
            questions.insert(0, keys[0])  # The plain label is what the Landmark prompt asks for.
        questions = questions[: rng.randint(1, shape.questions)]
        rng.shuffle(questions)
        local = [(drawn.draw(), labels.number(rng))] if rng.random() < LOCAL else []
        last = [self._piece(labels.stated(*key, rng)) for key in local]
        last += [self._piece(labels.asked(*key, rng)) for key in [*questions, *local]]
        asking, _ = self._scattered(shape.window + 1, last, filler, rng)
        return _joined([memory, asking])

    def _scattered(
        self,
        tokens: int,
        pieces: Sequence[Piece],
        filler: Filler,
        rng: Random,
        beginning: NDArray[np.int64] | None = None,
        border: int = 0,
    ) -> tuple[Piece, int]:
        """As many of the pieces as fit, in their order and at random places of a filler; and how many these are.

        With `border`, the first piece lies across a multiple of it.
        """
        kept: list[Piece] = []
        room = tokens
        for piece in pieces:
            if len(piece) <= room:
                kept.append(piece)
                room -= len(piece)
        text = filler.draw(room, rng)
        if beginning is not None and len(beginning) < room:
            text = np.concatenate([beginning, text[len(beginning) :]])
        places = sorted(rng.randint(0, room) for _ in kept)
        if border and kept and tokens > border:
            at = border if len(kept) > 1 else border * rng.randint(1, tokens // border - 1)
            first = min(max(at - rng.randint(1, len(kept[0]) - 1), 0), room)
            places = [first, *sorted(rng.randint(first, room) for _ in kept[1:])]
        between = Piece(text, np.full(room, filler.weight, np.float32), np.zeros(room, np.bool_))
        together = []
        last = 0
        for place, piece in zip(places, kept, strict=True):
            together += [between.cut(last, place), piece]
            last = place
        together.append(between.cut(last, room))
        return _joined(together), len(kept)

    def _records(self, shape: Shape, rng: Random) -> Piece:
        """A JSON object of UUIDs in the memory windows and the beginning of the last, which then asks for some."""
        if shape.window < UUID_WINDOW:
            raise InvalidArgument(
                f"a window of {shape.window} tokens is too short for UUID questions: use {UUID_WINDOW} or set uuid = 0"
            )
        room = (shape.windows - 1) * shape.window
        head = lookup.TASK + lookup.OPENING if rng.random() < DESCRIBED else ""
        parts = [Part(head, Role.PLAIN)] if head else []
        first = len(parts)
        # About 77 tokens a record; what runs over is what the last window begins with.
        records = [lookup.record(rng) for _ in range((room + shape.window) // 77 + 2)]
        parts += lookup.listed(records)
        listing, owners = self._piece_and_owners(parts, LIST_WEIGHT)
        start = 0 if head else rng.randrange(77)
        memory = listing.cut(start, start + room)
        owners = owners[start : start + room]
        inside = self._whole(owners, first, len(records), shape.window, rng)

        question_room = shape.window + 1
        tail = rng.randrange(question_room - UUID_WINDOW + 16)
        asked = rng.sample(inside, min(len(inside), rng.randint(1, shape.questions)))
        # Not drawn where it is not wanted: what other models were trained on must stay what it was.
        bare = bool(asked) and self._bare > 0 and rng.random() < self._bare
        asking = [] if bare else [listing.cut(start + room, start + room + tail)]
        for place in asked:
            form = lookup.continued if rng.random() < CONTINUED else lookup.asked
            closing = [Part('"}', Role.PLAIN)] if asking else []
            asking.append(self._piece([*closing, *form(records[place])]))
        whole = _joined(asking)
        if len(whole) < question_room:
            (filler,) = rng.choices(self._fillers, [one.share for one in self._fillers])
            missing = question_room - len(whole)
            padding = np.full(missing, filler.weight, np.float32)
            rest = Piece(filler.draw(missing, rng), padding, np.zeros(missing, np.bool_))
            whole = _joined([whole, rest])
        return _joined([memory, whole.cut(0, question_room)])

    def _whole(self, owners: NDArray[np.int64], first: int, records: int, window: int, rng: Random) -> list[int]:
        """The records that stand in memory with their value whole; mostly those that no window's border cuts."""
        crossing = rng.random() < CROSSING
        whole = []
        for place in range(records):
            key, value = first + lookup.PARTS * place + 1, first + lookup.PARTS * place + 3
            at = np.flatnonzero((owners >= key) & (owners <= value))
            # With a token before the key and one behind the value, nothing of the record is missing.
            if len(at) == 0 or at[0] == 0 or at[-1] == len(owners) - 1:
                continue
            if crossing or at[0] // window == at[-1] // window:
                whole.append(place)
        return whole

    # Tokens

    def _piece(self, parts: Sequence[Part]) -> Piece:
        return self._piece_and_owners(parts, WEIGHTS[Role.PLAIN])[0]

    def _piece_and_owners(self, parts: Sequence[Part], plain: float) -> tuple[Piece, NDArray[np.int64]]:
        """The parts' tokens, and the part that each belongs to; `plain` is the weight of the plain ones."""
        ids, owners = self._encode(parts)
        place = np.array(owners, dtype=np.int64)
        weights = np.array([plain if p.role is Role.PLAIN else self._weights[p.role] for p in parts], dtype=np.float32)
        answers = np.array([part.role is Role.ANSWER for part in parts])
        return Piece(np.array(ids, dtype=np.int64), weights[place], answers[place]), place

    def _landmark(self, tokens: int, rng: Random) -> NDArray[np.int64]:
        period = self._period
        start = rng.randrange(len(period))
        return np.tile(period, (start + tokens) // len(period) + 1)[start : start + tokens]

    def _text(self, tokens: int, rng: Random) -> NDArray[np.int64]:
        prose = rng.random() < PROSE
        return _slice(self._prose if prose else self._code, tokens, rng)

    def _snippet(self, tokens: int, rng: Random) -> NDArray[np.int64]:
        snippet = self._text(rng.randint(8, 40), rng)
        return np.resize(snippet, tokens)


def _slice(ids: NDArray[np.integer], tokens: int, rng: Random) -> NDArray[np.int64]:
    """Consecutive tokens from anywhere; a text that is too short begins again."""
    start = rng.randrange(max(1, len(ids) - tokens))
    cut: NDArray[np.int64] = np.resize(ids[start : start + tokens], tokens).astype(np.int64)
    return cut


def _joined(pieces: Sequence[Piece]) -> Piece:
    return Piece(
        np.concatenate([piece.ids for piece in pieces]),
        np.concatenate([piece.weights for piece in pieces]),
        np.concatenate([piece.answers for piece in pieces]),
    )
