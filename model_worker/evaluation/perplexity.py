"""`fot eval perplexity`: does a memory of earlier files help to predict code, and do unrelated files disturb?

Targets are windows of Python files of the standard library that training never saw (`model_worker.tasks.corpus` holds
files out by name), in packages of several files; at most `pieces` windows, spread over the files. Each is predicted
alone, token by token, over memories of 0, 1, 2, 4, … `most` documents of one kind:

    package     the files of its own package that stand nearest by name
    unrelated   files of other packages: distractors alone
    own         the tokens of its own file before the window, and as many unrelated files: distractors beside help

A document is a file's first `file_tokens` tokens (of the own past: its last), encoded on its own; files are encoded
once and windows choose among them by id. Bits per token, the mean over windows; what counts is the difference to the
same window without memory, with a 95 % bootstrap interval that resamples files (Efron 1979). After the Focused
Transformer's multi-document setting (arXiv 2307.03170, section 5).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from memory_service.errors import FailedPrecondition, InvalidArgument
from model_worker.evaluation.bootstrap import mean_of
from model_worker.evaluation.report import Column, Report
from model_worker.evaluation.subject import Library, Subject, Tell
from model_worker.tasks.corpus import Kind, Split, Text, texts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST, PIECES, FILE_TOKENS = 8, 48, 4096
PIECES_A_FILE = 4
KINDS = {"package": "files of its package", "unrelated": "unrelated files", "own": "its own past + unrelated files"}
COLUMNS = (
    Column("memory"), Column("files"), Column("tokens"), Column("bits", "bits/token"), Column("perplexity"),
    Column("gain", "bits gained"), Column("low", "95 % from"), Column("high", "to"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """A window to predict, and what may be remembered for it, by document id."""

    file: str
    ids: Sequence[int]
    own: str
    package: Sequence[str]  # Nearest first.
    unrelated: Sequence[str]

    def memory(self, kind: str, files: int) -> tuple[str, ...]:
        """The documents of one kind, so many of them; the own past is not counted."""
        if kind == "own":
            return (self.own, *self.unrelated[:files])
        return tuple((self.package if kind == "package" else self.unrelated)[:files])


def run(
    subject: Subject,
    *,
    most: int = MOST,
    pieces: int = PIECES,
    file_tokens: int = FILE_TOKENS,
    seed: int = 0,
    found: Sequence[Text] | None = None,
    tell: Tell = lambda *_: None,
) -> Report:
    """Predict every target over every memory; `found` are the texts, by default this machine's.

    Raises InvalidArgument for counts below one, FailedPrecondition if there are too few files.
    """
    if most < 1 or pieces < 1 or file_tokens < 1:
        raise InvalidArgument(f"most, pieces and file_tokens are at least 1, got {most}, {pieces} and {file_tokens}")
    files = {one.name: one for one in (texts(kind=Kind.CODE) if found is None else found)}
    tell(0, 1, "choosing and encoding files")
    targets, documents = _targets(subject, files, most, pieces, file_tokens, Random(f"{seed}"))
    counts = _doubling(most)
    bits: dict[tuple[str, int], list[float]] = {}
    tokens: dict[tuple[str, int], list[int]] = {}
    with subject.library() as library:
        library.put(documents)
        for number, target in enumerate(targets):
            tell(number, len(targets), f"{target.file}")
            plain = _bits(library, target, ())
            for kind in KINDS:
                for count in counts:
                    chosen = target.memory(kind, count)
                    known = bits.setdefault((kind, count), [])
                    known.append(_bits(library, target, chosen) if chosen else plain)
                    tokens.setdefault((kind, count), []).append(sum(len(documents[one]) for one in chosen))
    groups = [target.file for target in targets]
    plain_bits = bits["package", 0]
    rows: list[dict[str, Any]] = []
    for (kind, count), known in bits.items():
        gain = mean_of([a - b for a, b in zip(plain_bits, known, strict=True)], groups, seed)
        mean, held = sum(known) / len(known), tokens[kind, count]
        rows.append(
            {
                "memory": KINDS[kind], "kind": kind, "files": count, "tokens": round(sum(held) / len(held)),
                "bits": mean, "perplexity": 2**mean, "gain": gain.value, "low": gain.low, "high": gain.high,
            }
        )  # fmt: skip
    figures: dict[str, float] = {
        "bits_without_memory": rows[0]["bits"],
        "windows": float(len(targets)),
        "files": float(len(set(groups))),
    }
    for row in rows:
        if row["files"] == most or (row["kind"] == "own" and row["files"] == 0):
            name = f"gain_{row['kind']}_{row['files']}"
            figures |= {name: row["gain"], f"{name}_low": row["low"], f"{name}_high": row["high"]}
    settings = {
        **subject.told(), "most": most, "pieces": pieces, "file_tokens": file_tokens, "seed": seed,
        "targets": [target.file for target in targets],
    }  # fmt: skip
    return Report("perplexity", __doc__ or "", settings, rows, figures)


def picture(report: Report) -> Figure:
    """Bits per token by the number of files in memory."""
    from model_worker.evaluation.pictures import Axis, Line, lines

    plain = report.figures["bits_without_memory"]
    series = []
    for kind, name in KINDS.items():
        rows = [row for row in report.rows if row["kind"] == kind]
        low, high = [plain - row["high"] for row in rows], [plain - row["low"] for row in rows]
        series.append(Line(name, [row["files"] for row in rows], [row["bits"] for row in rows], low, high))
    facts = (
        f"{report.settings['model']}, {report.figures['windows']:.0f} windows of {report.settings['window']} tokens of "
        f"{report.figures['files']:.0f} held-out files; bars: 95 % of the difference to no memory"
    )
    x = Axis("files in memory", marks=[row["files"] for row in report.rows if row["kind"] == "package"])
    return lines(series, x, Axis("bits per token"), "Predicting code with a memory", facts, level=plain)


def _bits(library: Library, target: Target, documents: tuple[str, ...]) -> float:
    """Bits per token of a window over these documents."""
    return float(library.surprise(torch.tensor([target.ids]), documents).mean()) / math.log(2)


def _doubling(most: int) -> list[int]:
    """0, 1, 2, 4, … and `most`."""
    counts = [0]
    while counts[-1] < most:
        counts.append(min(max(1, 2 * counts[-1]), most))
    return counts


# --- Which files ----------------------------------------------------------------------------------------------------


def _targets(
    subject: Subject, files: dict[str, Text], most: int, pieces: int, file_tokens: int, rng: Random
) -> tuple[list[Target], dict[str, list[int]]]:
    """Windows to predict, and the documents they may remember by id."""
    packages: dict[str, list[str]] = {}
    for name in sorted(files):
        packages.setdefault(_package(name), []).append(name)
    packages.pop("", None)  # Modules that only share a folder.
    held_out = [
        name
        for names in packages.values()
        if len(names) > most
        for name in names
        if files[name].split is Split.HELD_OUT
    ]  # fmt: skip
    encoded = dict(
        zip(held_out, subject.tokenizer.encode_many([files[name].text for name in held_out]), strict=True)
    )  # fmt: skip
    cut = [one for name in held_out for one in _windows(name, encoded[name], subject.window)]
    if not cut or len({_package(name) for name, _, _ in cut}) < 2:
        raise FailedPrecondition(
            f"too few held-out files of two windows ({2 * subject.window} tokens) in packages of more than {most} "
            "files: try a smaller --most"
        )
    chosen = [cut[int((number + 0.5) * len(cut) / pieces)] for number in range(pieces)] if len(cut) > pieces else cut
    documents: dict[str, list[int]] = {}
    near: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for name, _, _ in chosen):
        names = packages[_package(name)]
        here = names.index(name)
        near[name] = sorted((one for one in names if one != name), key=lambda one: _distance(names.index(one) - here))
        for one in near[name][:most]:
            if one not in documents:
                documents[one] = subject.tokenizer.encode(files[one].text)[:file_tokens]
    documents = {name: ids for name, ids in documents.items() if ids}
    targets = []
    for name, start, ids in chosen:
        own = f"{name} before {start}"
        others = [one for one in documents if _package(one) != _package(name) and " before " not in one]
        unrelated = rng.sample(others, min(most, len(others)))
        targets.append(Target(name, ids, own, near[name][:most], unrelated))
        documents[own] = encoded[name][max(0, start - file_tokens) : start]
    return targets, documents


def _windows(name: str, ids: Sequence[int], size: int) -> Iterator[tuple[str, int, Sequence[int]]]:
    """At most PIECES_A_FILE whole windows of a file, none of them its first, spread evenly: name, start, tokens."""
    starts = range(size, len(ids) - size + 1, size)
    step = max(1, len(starts) // PIECES_A_FILE)
    for start in starts[::step][:PIECES_A_FILE]:
        yield name, start, ids[start : start + size]


def _package(name: str) -> str:
    """The package of library/package/module.py; nothing for a module that stands alone."""
    parts = name.split("/")
    return parts[1] if len(parts) > 2 else ""


def _distance(places: int) -> tuple[int, int]:
    """Files before come before files behind at the same distance."""
    return abs(places), int(places > 0)
