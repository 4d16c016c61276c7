"""From rows back to documents: which source and token stands behind a row the engine found."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from memory_service.types.answers import Attribution, TopTokens

# Rows in, out: index into the names, token offset in that source, names.
Locate = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, Sequence[str]]]

_SHIFT = 40  # Rows of one part stay below 2**40.


def session_source(session_id: str) -> str:
    """How a session is named among documents."""
    return f"session:{session_id}"


class Provenance:
    """Gives every part of a scope a base to add to its rows, and turns such rows back into sources."""

    def __init__(self) -> None:
        self._locate: list[Locate] = []

    def base(self, locate: Locate) -> int:
        """A base no other part has."""
        self._locate.append(locate)
        return (len(self._locate) - 1) << _SHIFT

    def sources(
        self, rows: np.ndarray, names: dict[str, int] | None = None
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """For rows with their base, -1 for none: (source index or -1, token offset or -1, names).

        The same `names` given to several calls makes their source indexes comparable.
        """
        source = np.full(rows.shape, -1, np.int64)
        offset = np.full(rows.shape, -1, np.int64)
        names = {} if names is None else names
        part = rows >> _SHIFT
        for number in np.unique(part[rows >= 0]):
            here = (part == number) & (rows >= 0)
            place, token, known = self._locate[number](rows[here] - (int(number) << _SHIFT))
            used, inverse = np.unique(place, return_inverse=True)
            index = np.array([names.setdefault(known[one], len(names)) for one in used], np.int64)
            source[here] = index[inverse]
            offset[here] = token
        return source, offset, list(names)


class Ranking:
    """The kept keys of all rows of a call, best first; looked up together, told of a part of the rows at a time."""

    def __init__(self, provenance: Provenance, scores: Tensor, rows: Tensor, lse: Tensor):
        """Scores and rows [H, R, K], lse [H, R]."""
        order = scores.argsort(dim=2, descending=True, stable=True)
        scores = scores.gather(2, order)
        self._source, self._offset, self._names = provenance.sources(rows.gather(2, order).cpu().numpy())
        self._weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp().cpu()
        self._scores = scores.cpu()

    def top_tokens(self, rows: slice, heads: int) -> TopTokens:
        """Those of some rows, as [G, Q, K] of `heads` query heads; sources that other rows read are not named."""
        shape = (heads, -1, self._scores.shape[2])
        source = self._source[:, rows]
        known = np.bincount(source.ravel() + 1, minlength=len(self._names) + 1)
        known[0] = 1  # -1 stays -1.
        place = np.cumsum(known > 0) - 2
        names = tuple(name for name, count in zip(self._names, known[1:].tolist(), strict=True) if count)
        return TopTokens(
            names,
            torch.from_numpy(place[source + 1].astype(np.int32)).view(shape),
            torch.from_numpy(self._offset[:, rows].copy()).view(shape),
            self._scores[:, rows].reshape(shape),
            self._weights[:, rows].reshape(shape),
        )


class Ledger:
    """Adds up softmax mass by source."""

    def __init__(self, provenance: Provenance) -> None:
        self._provenance = provenance
        self._mass: dict[str, float] = {}

    def add(self, rows: Tensor, mass: Tensor) -> None:
        """Credit the sources of rows (with their base; -1 for none) of any shape with the mass of each."""
        source, _, names = self._provenance.sources(rows.cpu().numpy().ravel())
        weights = mass.double().cpu().numpy().ravel()
        self.credit(names, np.bincount(source[source >= 0], weights[source >= 0], minlength=len(names)))

    def credit(self, names: Sequence[str], masses: np.ndarray) -> None:
        """Credit each of these sources with its mass [sources]."""
        for name, value in zip(names, masses.tolist(), strict=True):
            self._mass[name] = self._mass.get(name, 0.0) + value

    def means(self, rows: int, limit: int = 1000) -> tuple[Attribution, ...]:
        """Mass by source over that many rows, the largest first, as it is."""
        ranked = sorted(self._mass.items(), key=lambda item: -item[1])[:limit]
        return tuple(Attribution(source, mass / rows) for source, mass in ranked if mass > 0)

    def attribution(self, limit: int = 1000) -> tuple[Attribution, ...]:
        """Mean mass by source, the largest first. Sums to 1 (unless there was nothing, or more than `limit`)."""
        total = sum(self._mass.values())
        ranked = sorted(self._mass.items(), key=lambda item: -item[1])[:limit]
        return tuple(Attribution(source, mass / total) for source, mass in ranked if mass > 0)
