"""Faiss indexes over the keys of a memory, one for each (layer, kv head): derived data, rebuilt at any time.

They only choose candidates, by inner product; the caller scores those again from the stored keys. R query rows,
N lists, O outliers, D head_dim. An inverted-file index ("IVFn,…") is more than Faiss's own here:

- Lists are visited in the order of `q·c + RADIUS_WEIGHT·|q|·radius` instead of `q·c`: a key far from its centroid can
  score high in a list whose centroid looks dull.
- The keys farthest from every centroid (1 in 128, about 16,384 at most) are kept apart and scored exactly for every
  query. The one key a look-up is after is often such a lone key, and neither lists nor short codes serve it.
- RaBitQ is asked for queries as long as keys are: its scores err the more the farther a query lies from a centroid.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memory_service.index import sidecars
from memory_service.index.clustering import Floats, Ints, distinct, outlier_reach, train_centroids
from memory_service.index.factories import (
    Factory,
    choose_factory,
    outlier_count,
    parse_factory,
)
from memory_service.index.unit import Bits, HeadIndex, IndexedDocument, IndexUnit
from memory_service.storage.vfs import Buffer, Vfs
from memory_service.types.callers import Cancel
from memory_service.types.specs import MemorySpec

Read = Callable[[int, int], Tensor]
"""(document position, layer index) -> keys [H, T, D] in the memory's dtype."""

FORMAT = "fot.index.v1"
RADIUS_WEIGHT = 0.25
STRETCH = 4.0  # The longest a query is made for RaBitQ, in norms of the centroid it is closest to.
OUTLIER_SLACK = 2  # Times as many outliers as are wanted, should the sample have misjudged the rest.
SAMPLE_BYTES = 256 << 20  # Of keys to train on, all heads of a layer together.
SAMPLE_TOKENS = 1 << 18
SAMPLE_PER_LIST = 64
CODE_SAMPLE = 1 << 14  # Keys that codes, and what is an outlier, are learnt from.
DISTINCT_PER_LIST = 4  # Fewer lists are made if the keys are so alike.
BLOCK_FLOATS = 1 << 22  # Of what one step of a build or a search holds in float32.
SEARCH_ROWS = 4096  # Query rows that visit lists together.
faiss: Any = _faiss  # Its type stubs miss half of what it has.
_HEADER = struct.Struct("<qqq")  # Of a head's file: bytes of Faiss's part, lists, outliers.
_deserialising = threading.Lock()  # Faiss's limits on what it reads belong to the process.
_DERIVED_BYTES = 2 << 30  # Where Faiss itself stops making tables.


def set_threads(count: int) -> None:
    """How many threads Faiss uses for work of the calling thread; OpenMP keeps this for each thread apart."""
    faiss.omp_set_num_threads(count)


# --- Building -------------------------------------------------------------------------------------------------------


def build(
    name: str,
    documents: Sequence[IndexedDocument],
    spec: MemorySpec,
    factory: str,
    read: Read,
    cancel: Cancel | None = None,
    progress: Callable[[int], None] | None = None,
) -> IndexUnit:
    """Index the keys of `documents`; the same keys always give the same index.

    `progress` gets the tokens added since its last call, each token once a layer. Documents are read twice a layer, in
    order. Beside the index it holds SAMPLE_BYTES of keys, one document's keys of one layer, and one head's block in
    float32. Takes 4 to 9 s of one core a head for 262,144 keys of 64 dims; stops within a second or so when cancelled.
    """
    cancel = cancel or Cancel()
    tokens = sum(one.tokens for one in documents)
    shape = parse_factory(choose_factory(tokens, spec.head_dim, factory), spec.head_dim)
    block = max(1, BLOCK_FLOATS // spec.head_dim)
    heads: list[HeadIndex] = []
    for layer_index in range(len(spec.layers)):
        builders = _train(documents, spec, shape, read, layer_index, cancel)
        start = 0
        for position, document in enumerate(documents):
            keys = read(position, layer_index)  # [H, T, D]
            assert keys.shape == (spec.kv_heads, document.tokens, spec.head_dim)
            for first in range(0, document.tokens, block):
                for head, builder in enumerate(builders):
                    cancel.check()
                    builder.add(_floats(keys[head, first : first + block]), start + first)
                if progress:
                    progress(min(block, document.tokens - first))
            start += document.tokens
        heads.extend(builder.finish() for builder in builders)
    return IndexUnit(name, tuple(documents), shape.text, spec.kv_heads, tuple(heads))


def _train(
    documents: Sequence[IndexedDocument], spec: MemorySpec, shape: Factory, read: Read, layer_index: int, cancel: Cancel
) -> Sequence[_WholeBuilder | _ListsBuilder]:
    """A builder for each head of a layer."""
    tokens = sum(one.tokens for one in documents)
    most = SAMPLE_BYTES // (spec.kv_heads * spec.head_dim * spec.dtype.itemsize)
    count = min(tokens, most, max(SAMPLE_PER_LIST * shape.lists, 1 << 14), SAMPLE_TOKENS)
    generator = np.random.default_rng(layer_index)
    chosen = np.arange(tokens) if count == tokens else np.sort(generator.choice(tokens, count, replace=False))
    ends = np.cumsum([one.tokens for one in documents])
    sample = torch.empty(spec.kv_heads, count, spec.head_dim, dtype=spec.dtype.torch)
    filled = 0
    for position, inside in enumerate(np.split(chosen, np.searchsorted(chosen, ends[:-1]))):
        if len(inside):
            cancel.check()
            rows = torch.from_numpy(inside - (ends[position] - documents[position].tokens))
            sample[:, filled : filled + len(inside)] = read(position, layer_index)[:, rows]
            filled += len(inside)
    if shape.lists:
        return [_ListsBuilder(shape, _floats(one), tokens, cancel) for one in sample]
    return [_WholeBuilder(shape, _floats(one)) for one in sample]


class _WholeBuilder:
    """Builds an index without lists."""

    def __init__(self, shape: Factory, sample: Floats):
        self._index = _empty(shape, sample.shape[1])
        if not self._index.is_trained:
            self._index.train(_for_codes(sample))

    def add(self, keys: Floats, first_id: int) -> None:
        assert self._index.ntotal == first_id
        self._index.add(keys)

    def finish(self) -> WholeIndex:
        return WholeIndex(self._index)


class _ListsBuilder:
    """Builds an index with lists, radii and outliers."""

    def __init__(self, shape: Factory, sample: Floats, tokens: int, cancel: Cancel):
        whole = len(sample) == tokens
        some = np.arange(len(sample))[:: max(1 if whole else 4, len(sample) // CODE_SAMPLE)]
        # Centroids lie close to what they were made of: other keys tell how far from them keys are.
        different = distinct(sample if whole else np.delete(sample, some, axis=0))
        lists = min(shape.lists, max(1, len(different) // DISTINCT_PER_LIST))
        centroids = train_centroids(different, lists, _nearest, 0, cancel)  # [N, D]
        self._quantizer = _flat_l2(centroids)
        self._fast = shape.codec.partition("fs")[1:]  # ("fs", "r"), ("fs", "") or ("", "").
        plain = replace(shape, lists=lists, codec=shape.codec.partition("fs")[0])
        self._index = _empty(plain, sample.shape[1])
        if self._fast[0]:
            self._index.by_residual = self._fast[1] == "r"
        _replace_quantizer(self._index, _flat_l2(centroids))
        apart = sample[some]
        distances, _ = _search_one(self._quantizer, apart)
        share = outlier_count(tokens) / max(tokens, 1)
        self._reach = outlier_reach(apart, distances, share)
        self._room = int(OUTLIER_SLACK * outlier_count(tokens))
        self._index.train(_for_codes(apart[distances <= self._reach]))
        self._radii = np.zeros(lists, np.float32)  # Squared until `finish`.
        self._ids: list[Ints] = []
        self._outliers: list[Floats] = []

    def add(self, keys: Floats, first_id: int) -> None:
        distances, lists = _search_one(self._quantizer, keys)
        far = np.flatnonzero(distances > self._reach)[: self._room]
        self._room -= len(far)
        self._ids.append(first_id + far)
        self._outliers.append(keys[far])
        near = np.ones(len(keys), bool)
        near[far] = False
        np.maximum.at(self._radii, lists[near], distances[near])
        ids = first_id + np.flatnonzero(near)
        rest, owners = keys[near], lists[near]
        self._index.add_core(len(rest), faiss.swig_ptr(rest), faiss.swig_ptr(ids), faiss.swig_ptr(owners))

    def finish(self) -> ListsIndex:
        index = _fast_scan(self._index) if self._fast[0] else self._index
        return ListsIndex(index, np.sqrt(self._radii), np.concatenate(self._ids), np.concatenate(self._outliers))


def _floats(keys: Tensor) -> Floats:
    return np.ascontiguousarray(keys.float().cpu().numpy())


def _for_codes(rows: Floats) -> Floats:
    """Rows to train codes on: enough of them, no two alike and no dimension constant.

    A codebook of equal entries gives Faiss's fast scan a table without a span, which it divides by: keys vanish. And
    its k-means takes seconds over equal rows.
    """
    rows = rows[:: max(1, len(rows) // CODE_SAMPLE)] if len(rows) >= 256 else np.resize(rows, (256, rows.shape[1]))
    spread = float(np.sqrt(np.mean(np.square(rows)))) or 1.0
    noise = np.random.default_rng(0).standard_normal(rows.shape, np.float32)
    return rows + np.float32(1e-4 * spread) * noise


def _nearest(centroids: Floats, rows: Floats) -> tuple[Floats, Ints]:
    return _search_one(_flat_l2(centroids), rows)


def _fast_scan(plain: Any) -> Any:
    """The same lists packed for fast scan; `plain` is emptied. Adding to such lists would look for each key's again."""
    packed = faiss.IndexIVFPQFastScan(plain)
    plain.own_fields, packed.own_fields = False, True  # The quantizer.
    plain.reset()
    return packed


def _search_one(index: Any, rows: Floats) -> tuple[Floats, Ints]:
    distances, owners = index.search(rows, 1)
    return np.maximum(distances[:, 0], 0), np.ascontiguousarray(owners[:, 0])


def _flat_l2(rows: Floats) -> Any:
    index = faiss.IndexFlatL2(rows.shape[1])
    index.add(rows)
    return index


def _empty(shape: Factory, dim: int) -> Any:
    """An untrained Faiss index that does not complain about few training points."""
    index = faiss.index_factory(dim, shape.text, faiss.METRIC_INNER_PRODUCT)
    if shape.codec.startswith("PQ"):
        index.pq.cp.min_points_per_centroid = 1
    if isinstance(index, faiss.IndexIVFPQ):
        index.do_polysemous_training = False  # Ten seconds for a search mode that is not used.
    return index


def _replace_quantizer(index: Any, quantizer: Any) -> None:
    """Let the index own `quantizer`: keys go to the L2-nearest list although scores are inner products."""
    faiss.downcast_index(index.quantizer).this.own(True)  # So that Python frees the one it came with.
    quantizer.this.disown()
    index.quantizer = quantizer
    index.own_fields = True


# --- Searching ------------------------------------------------------------------------------------------------------


class WholeIndex:
    """An index without lists: Faiss's own Flat, SQ or HNSW."""

    def __init__(self, index: Any):
        self._index = index
        self.keys = int(index.ntotal)

    @property
    def nbytes(self) -> int:
        # A graph is the only one of these without `code_size`; its keys are float32, its links counted as 64 bytes.
        code_bytes = 4 * self._index.d + 64 if isinstance(self._index, faiss.IndexHNSW) else self._index.code_size
        return self.keys * int(code_bytes)

    def search(self, queries: Floats, candidates: int, params: Mapping[str, float], allowed: Bits | None) -> Ints:
        selector = None if allowed is None else faiss.IDSelectorBitmap(allowed)
        if isinstance(self._index, faiss.IndexHNSW):
            how = faiss.SearchParametersHNSW(efSearch=max(int(params.get("efSearch", 64)), candidates), sel=selector)
        else:
            how = None if selector is None else faiss.SearchParameters(sel=selector)
        found: Ints = self._index.search(queries, candidates, params=how)[1]
        return found

    def pieces(self) -> Sequence[Buffer]:
        data = faiss.serialize_index(self._index)
        return [_HEADER.pack(data.nbytes, 0, 0), data.data]


class ListsIndex:
    """An inverted-file index with radii and outliers."""

    def __init__(self, index: Any, radii: Floats, outlier_ids: Ints, outliers: Floats):
        centroids = faiss.downcast_index(index.quantizer).reconstruct_n(0, index.nlist)  # [N, D]
        self._index = index
        self._radii = torch.from_numpy(radii)  # [N]
        self._centroids = torch.from_numpy(centroids).T.contiguous()  # [D, N]
        self._outlier_ids = outlier_ids  # [O]
        self._outliers = torch.from_numpy(outliers).T.contiguous()  # [D, O]
        self.keys = int(index.ntotal) + len(outlier_ids)

    @property
    def nbytes(self) -> int:
        rows = 2 * len(self._radii) + len(self._outlier_ids)
        return int(self._index.ntotal) * (int(self._index.code_size) + 8) + 4 * rows * int(self._index.d)

    @property
    def default_nprobe(self) -> int:
        """Lists visited when the caller does not say."""
        return min(max(16, len(self._radii) // 32), 128)

    def search(self, queries: Floats, candidates: int, params: Mapping[str, float], allowed: Bits | None) -> Ints:
        lists = len(self._radii)
        nprobe: float = self.default_nprobe
        selector = outside = None
        if allowed is not None:
            selector = faiss.IDSelectorBitmap(allowed)
            outside = (allowed[self._outlier_ids >> 3] >> (self._outlier_ids & 7) & 1) == 0
            # What is allowed is thinner in every list: look further for it.
            nprobe /= max(np.count_nonzero(np.unpackbits(allowed)) / self.keys, 0.25)
        how = faiss.SearchParametersIVF(nprobe=min(int(params.get("nprobe", nprobe)), lists), sel=selector)
        found = [
            self._search(queries[first : first + SEARCH_ROWS], candidates, how, outside)
            for first in range(0, len(queries), SEARCH_ROWS)
        ]
        return found[0] if len(found) == 1 else np.concatenate([np.empty((0, candidates), np.int64), *found])

    def _search(self, queries: Floats, candidates: int, how: Any, outside: NDArray[np.bool_] | None) -> Ints:
        rows = torch.from_numpy(queries)  # [R, D]
        step = max(1, BLOCK_FLOATS // max(len(self._radii), len(self._outlier_ids)))
        chosen = [self._choose(block, how.nprobe) for block in torch.split(rows, step)]
        lists, coarse, lengths = (np.concatenate(part) for part in zip(*chosen, strict=True))
        best = np.empty((len(queries), candidates), np.float32)
        ids = np.empty((len(queries), candidates), np.int64)
        asked = queries * lengths  # A name keeps it alive: pointers do not.
        query, *rest = [faiss.swig_ptr(one) for one in (asked, lists, coarse, best, ids)]
        # All rows at once: Faiss reads a list once for several of them. The Python wrapper of this call takes no
        # parameters and reads nprobe from the shared index. Residual codes want `coarse` to be q·c, which Faiss's own
        # search would not give them: its quantizer here is an L2 one.
        self._index.search_preassigned_c(len(queries), query, candidates, *rest, False, how)
        if not len(self._outlier_ids):
            return ids
        best /= lengths  # Scores by code are exact ones but for rounding, so they rank together.
        best[ids < 0] = -np.inf
        apart = [self._apart(block, candidates, outside) for block in torch.split(rows, step)]
        scores, outliers = (np.concatenate(part) for part in zip(*apart, strict=True))
        both = np.concatenate([scores, best], axis=1)
        places = _largest(both, candidates)
        picked: Ints = np.take_along_axis(np.concatenate([outliers, ids], axis=1), places, axis=1)
        picked[np.take_along_axis(both, places, axis=1) == -np.inf] = -1
        return picked

    def _choose(self, rows: Tensor, nprobe: int) -> tuple[Ints, Floats, Floats]:
        """Lists for query rows [R, D] to visit [R, nprobe], their q·c, and how much longer to make the rows [R, 1]."""
        scores = rows @ self._centroids  # [R, N]
        reach = torch.addmm(scores, rows.norm(dim=1, keepdim=True), self._radii[None], alpha=RADIUS_WEIGHT)
        lists = _largest(reach.numpy(), nprobe)
        rounded = isinstance(self._index, faiss.IndexIVFRaBitQ)
        lengths = self._lengths(rows, scores) if rounded else np.ones((len(rows), 1), np.float32)
        return lists, np.take_along_axis(scores.numpy(), lists, axis=1), lengths

    def _apart(self, rows: Tensor, count: int, outside: NDArray[np.bool_] | None) -> tuple[Floats, Ints]:
        """Exact scores of the best outliers, and their ids: [R, up to `count`]."""
        exact = (rows @ self._outliers).numpy()  # [R, O]
        if outside is not None:
            exact[:, outside] = -np.inf
        places = _largest(exact, min(count, exact.shape[1]))
        return np.take_along_axis(exact, places, axis=1), self._outlier_ids[places]

    def _lengths(self, rows: Tensor, scores: Tensor) -> Floats:
        """Factors [R, 1] that put queries [R, D] beside the keys: their scores by RaBitQ err least there.

        It rounds q - c, so the error of q·x grows with |q - c| where q·x itself grows with |q|: a query much shorter
        than the keys drowns in it. |q - c| / |q| is least where q's projection on c is c, its best centroid.
        """
        best, which = scores.max(dim=1)
        centroid = self._centroids.norm(dim=0)[which]
        longest = STRETCH * centroid / rows.norm(dim=1)
        wanted = torch.where(best > 0, centroid * (centroid / best), longest).minimum(longest)
        return torch.where(wanted.isfinite() & (wanted > 0), wanted, 1.0)[:, None].numpy()

    def pieces(self) -> Sequence[Buffer]:
        data = faiss.serialize_index(self._index)
        outliers = self._outliers.T.contiguous().numpy()
        header = _HEADER.pack(data.nbytes, len(self._radii), len(outliers))
        return [header, data.data, self._radii.numpy().data, self._outlier_ids.data, outliers.data]


def _largest(scores: Floats, count: int) -> Ints:
    """Columns of the `count` largest of each row, in no order."""
    first = scores.shape[1] - count
    columns = np.argpartition(scores, first, axis=1)[:, first:] if first else np.argsort(scores, axis=1)
    return np.ascontiguousarray(columns)


# --- Sidecars -------------------------------------------------------------------------------------------------------


def save(unit: IndexUnit, directory: Path, vfs: Vfs, *, sync: bool = False) -> None:
    """Write the unit into its own `directory`, replacing what is there; the manifest, written last, makes it valid."""
    about = {
        "format": FORMAT,
        "faiss": faiss.__version__,
        "name": unit.name,
        "factory": unit.factory,
        "heads": len(unit.heads),
        "documents": [[one.pk, one.generation, one.tokens] for one in unit.documents],
    }
    blobs = ((_file_name(number), head.pieces()) for number, head in enumerate(unit.heads))
    sidecars.write(vfs, directory, about, blobs, sync=sync)


def load(directory: Path, vfs: Vfs, spec: MemorySpec) -> IndexUnit | None:
    """The unit `save` wrote; None, and the directory is gone, if anything about it is in doubt."""
    try:
        return _load(directory, vfs, spec)
    except sidecars.Damaged:
        vfs.remove_directory(directory)
        return None


def _load(directory: Path, vfs: Vfs, spec: MemorySpec) -> IndexUnit:
    about, files = sidecars.read_manifest(vfs, directory)
    if about["format"] != FORMAT or about["faiss"] != faiss.__version__:
        raise sidecars.Damaged(f"{directory.name} was written by another version")
    names = [_file_name(number) for number in range(len(spec.layers) * spec.kv_heads)]
    if sorted(names) != sorted(files):
        raise sidecars.Damaged(f"{directory.name} is of another spec")
    documents = tuple(IndexedDocument(*one) for one in about["documents"])
    heads = tuple(_read_head(sidecars.read_blob(vfs, directory / name, *files[name]), spec) for name in names)
    unit = IndexUnit(about["name"], documents, about["factory"], spec.kv_heads, heads)
    if any(head.keys != unit.tokens for head in heads):
        raise sidecars.Damaged(f"{directory.name} does not hold its documents' tokens")
    return unit


def _file_name(number: int) -> str:
    return f"head-{number:05d}.faiss"


def _read_head(data: bytes, spec: MemorySpec) -> WholeIndex | ListsIndex:
    """A head from bytes whose checksum matched: bytes this service wrote."""
    length, lists, outliers = _HEADER.unpack_from(data)
    with _deserialising:
        # Reading also makes what is not in the file, such as a table of products a list, up to _DERIVED_BYTES of it.
        faiss.set_deserialization_vector_byte_limit(len(data) + _DERIVED_BYTES)
        faiss.set_deserialization_loop_limit(1 << 20)
        try:
            index = faiss.deserialize_index(np.frombuffer(data, np.uint8, length, _HEADER.size))
        except RuntimeError as error:
            raise sidecars.Damaged(f"Faiss cannot read an index it wrote: {error}") from error
    if index.d != spec.head_dim:
        raise sidecars.Damaged(f"an index of {index.d} dimensions, not {spec.head_dim}")
    if not lists:
        return WholeIndex(index)
    rest = _arrays(data, _HEADER.size + length, lists, outliers, spec.head_dim)
    return ListsIndex(index, *rest)


def _arrays(data: bytes, offset: int, lists: int, outliers: int, dim: int) -> Iterator[Any]:
    for kind, shape in ((np.float32, (lists,)), (np.int64, (outliers,)), (np.float32, (outliers, dim))):
        count = int(np.prod(shape))
        yield np.frombuffer(data, kind, count, offset).reshape(shape).copy()
        offset += count * np.dtype(kind).itemsize
