"""Indexes find what brute force finds, honour scopes, and survive odd keys and damaged files."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from memory_service import Memory
from memory_service.errors import Cancelled, InvalidArgument, ResourceExhausted
from memory_service.index import factories, faiss_index
from memory_service.index.unit import IndexedDocument, IndexUnit
from memory_service.storage.vfs import Buffer, File, OsVfs
from memory_service.types.callers import Cancel
from memory_service.types.specs import DType, Fingerprint, IndexPolicy, MemorySpec

DIM = 16
FACTORIES = [
    "Flat",
    "SQ8",
    "HNSW16",
    "IVF16,PQ4",
    "IVF16,PQ8x4fs",
    "IVF16,Flat",
    "IVF16,SQbf16",
    "IVF16,PQ16x4fsr",
    "IVF16,RaBitQ",
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    faiss_index.set_threads(1)


def spec_of(layers: int = 1, heads: int = 1, dim: int = DIM, dtype: DType = DType.BF16) -> MemorySpec:
    return MemorySpec(Fingerprint("tiny"), tuple(range(layers)), heads, dim, dtype)


def clustered(tokens: int, dim: int = DIM, seed: int = 0) -> Tensor:
    """Keys [T, D] around 100 centres, a few of them long."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(100, dim, generator=generator)
    keys = centres[torch.randint(100, (tokens,), generator=generator)] + torch.randn(tokens, dim, generator=generator)
    return (keys * torch.exp(0.3 * torch.randn(tokens, 1, generator=generator))).bfloat16()


def build(keys: Tensor, factory: str = "auto", cuts: tuple[int, ...] = ()) -> IndexUnit:
    """A unit of one layer and head over keys [T, D], as documents that end at `cuts`."""
    parts = torch.tensor_split(keys, cuts)
    documents = [IndexedDocument(pk, 1, len(part)) for pk, part in enumerate(parts)]
    spec = spec_of(dim=keys.shape[1])
    return faiss_index.build("unit", documents, spec, factory, lambda position, layer_index: parts[position][None])


def best(keys: Tensor, queries: np.ndarray, count: int) -> np.ndarray:
    return (torch.from_numpy(queries) @ keys.float().T).topk(count).indices.numpy()


def recall(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.mean([np.isin(one, other).mean() for one, other in zip(wanted, found, strict=True)]))


def queries_near(keys: Tensor, count: int = 64, seed: int = 1) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(keys), (count,), generator=generator)
    return (keys[rows].float() + torch.randn(count, keys.shape[1], generator=generator)).numpy()


# --- What is found --------------------------------------------------------------------------------------------------


def test_the_automatic_index_finds_nearly_all_of_the_top_32() -> None:
    keys = clustered(32_768)
    queries = queries_near(keys)
    unit = build(keys)
    found = unit.search(0, 0, queries, factories.default_candidates(unit.factory, DIM, 32))
    assert unit.factory == "IVF512,PQ16x4fsr"
    assert recall(found, best(keys, queries, 32)) > 0.98


@pytest.mark.parametrize("factory", ["Flat", "IVF16,Flat"])
def test_visiting_every_list_of_unrounded_keys_is_exact(factory: str) -> None:
    keys = clustered(2000)
    queries = queries_near(keys)
    found = build(keys, factory).search(0, 0, queries, 32, {"nprobe": 16})
    assert recall(found, best(keys, queries, 32)) == 1.0


def test_more_lists_find_more() -> None:
    keys = torch.randn(8192, DIM, generator=torch.Generator().manual_seed(3)).bfloat16()
    queries, unit = queries_near(keys), build(keys)
    few, many = (unit.search(0, 0, queries, 64, {"nprobe": nprobe}) for nprobe in (1, 200))
    assert recall(few, best(keys, queries, 16)) + 0.1 < recall(many, best(keys, queries, 16))


@pytest.mark.parametrize("length", [0.01, 100.0])
@pytest.mark.parametrize(
    ("codec", "least"),
    [
        ("Flat", 1.0), ("SQ8", 1.0), ("SQ6", 1.0), ("SQ4", 0.98), ("SQfp16", 1.0), ("SQbf16", 1.0), ("PQ8", 0.9),
        ("PQ16x4fs", 0.95), ("PQ8x4fsr", 0.9), ("PQ32x4fsr", 0.98), ("RaBitQ", 0.97),
    ],
)  # fmt: skip
def test_looking_into_more_lists_never_finds_less(codec: str, least: float, length: float) -> None:
    keys = (clustered(8192, 32).float() + 3.0).bfloat16()  # Attention keys have a mean far from zero.
    queries = length * queries_near(keys, 100)
    unit = build(keys, f"IVF64,{codec}")
    recalls = [
        recall(unit.search(0, 0, queries, 128, {"nprobe": nprobe}), best(keys, queries, 16))
        for nprobe in (2, 8, 32, 64)
    ]
    assert all(more >= less - 0.005 for less, more in pairwise(recalls))
    assert recalls[-1] >= least


@pytest.mark.parametrize("factory", ["IVF64,SQ8", "IVF64,PQ16x4fsr", "IVF64,PQ16x4fs", "IVF64,RaBitQ"])
def test_queries_asked_together_find_what_each_finds_alone(factory: str) -> None:
    keys = clustered(4096)
    queries, unit = queries_near(keys, 1500), build(keys, factory)
    together = unit.search(0, 0, queries, 96, {"nprobe": 16})
    some = range(0, 1500, 50)
    alone = [unit.search(0, 0, queries[row : row + 1], 96, {"nprobe": 16})[0] for row in some]
    assert all(len(np.intersect1d(one, other)) >= 94 for one, other in zip(together[::50], alone, strict=True))


def test_few_keys_are_kept_apart_however_many_there_are() -> None:
    assert [factories.outlier_count(tokens) for tokens in (0, 1280, 1 << 20, 1 << 24)] == [0, 10, 8192, 16_384]


def test_the_sample_foretells_how_many_keys_are_kept_apart() -> None:
    # 64 rows a list are little in 64 dimensions: measured on themselves, keys look closer to their list than they are.
    keys = torch.randn(49_152, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    apart = build(keys, "IVF64,SQ8").nbytes - (49_152 * (64 + 8) + 4 * 2 * 64 * 64)
    each = 4 * 64 - (64 + 8)
    assert 0.7 * 384 < apart / each < 1.4 * 384


@pytest.mark.parametrize("factory", [one for one in FACTORIES if one.startswith("IVF")])
def test_how_long_a_query_is_does_not_change_what_it_finds(factory: str) -> None:
    keys = clustered(4096)
    queries, unit = queries_near(keys), build(keys, factory)
    found, same = (np.sort(unit.search(0, 0, length * queries, 64, {"nprobe": 8})) for length in (1.0, 2.0**-9))
    assert np.array_equal(found, same)


def test_lone_keys_in_a_repetitive_haystack_are_found() -> None:
    keys = clustered(500)[torch.arange(20_000) % 500]
    needles = torch.randperm(20_000, generator=torch.Generator().manual_seed(5))[:50]
    directions = torch.randn(50, DIM, generator=torch.Generator().manual_seed(6))
    keys[needles] = (12 * directions / directions.norm(dim=1, keepdim=True)).bfloat16()
    queries = 4 * keys[needles].float().numpy()
    found = build(keys).search(0, 0, queries, 64)
    assert (found == best(keys, queries, 1)).any(axis=1).mean() == 1.0


@pytest.mark.parametrize("factory", [one for one in FACTORIES if one != "HNSW16"])
def test_bit_identical_keys_do_not_break_an_index(factory: str) -> None:
    keys = torch.ones(3000, DIM).bfloat16()
    keys[1234] = 3.0
    found = build(keys, factory).search(0, 0, np.ones((2, DIM), np.float32), 40)
    # Faiss's fast scan leaves out keys with the lowest score its codes can tell: less may be found, never less good.
    held = [[token for token in row if token >= 0] for row in found.tolist()]
    assert all(1234 in row and len(set(row)) == len(row) and max(row) < 3000 for row in held)


@pytest.mark.parametrize("factory", [*FACTORIES, "auto"])
@pytest.mark.parametrize("length", [0.0, 1e-30, 1e30])
def test_queries_no_model_makes_still_find_tokens(factory: str, length: float) -> None:
    keys = clustered(2000)
    keys[:, 3] = 0.5  # A dimension that never varies, and a query along it.
    queries = length * np.eye(DIM, dtype=np.float32)
    found = build(keys, factory).search(0, 0, queries, 40)
    assert (found >= 0).all()


@pytest.mark.parametrize("factory", [*FACTORIES, "auto"])
@pytest.mark.parametrize("tokens", [1, 2, 17, 300, 1100])
def test_units_of_any_size_build_in_silence(factory: str, tokens: int, capfd: pytest.CaptureFixture[str]) -> None:
    found = build(clustered(tokens), factory).search(0, 0, queries_near(clustered(9)), 8, {"nprobe": 16})
    held = found[found >= 0]
    assert found.shape == (64, 8)
    assert held.size >= 64 * min(tokens, 8) * 0.9
    assert held.max(initial=0) < tokens
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dim", [1, 3, 7, 24, 100, 128, 513])
def test_any_head_dim_works(dim: int) -> None:
    keys = clustered(1100, dim)
    queries = queries_near(keys)
    found = build(keys).search(0, 0, queries, 96, {"nprobe": 64})
    wanted = best(keys, queries, 4) if dim > 1 else np.zeros((0, 4), np.int64)
    assert found.shape == (64, 96)
    assert not len(wanted) or recall(found, wanted) > 0.9


@pytest.mark.parametrize("dtype", list(DType))
def test_keys_of_every_dtype_are_indexed(dtype: DType) -> None:
    keys = clustered(4096).to(dtype.torch)
    documents = [IndexedDocument(1, 1, 4096)]
    unit = faiss_index.build("unit", documents, spec_of(dtype=dtype), "auto", lambda position, layer_index: keys[None])
    queries = queries_near(keys)
    assert recall(unit.search(0, 0, queries, 96), best(keys, queries, 16)) > 0.95


def test_many_query_rows_are_searched_in_blocks_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = clustered(4096)
    queries, unit = queries_near(keys, 300), build(keys)
    whole = unit.search(0, 0, queries, 32)
    monkeypatch.setattr(faiss_index, "BLOCK_FLOATS", 5000)
    assert np.array_equal(np.sort(unit.search(0, 0, queries, 32)), np.sort(whole))
    assert unit.search(0, 0, queries[:0], 32).shape == (0, 32)


def test_more_candidates_than_tokens_are_padded() -> None:
    found = build(clustered(5)).search(0, 0, queries_near(clustered(5), 3), 12)
    assert [sorted(row) for row in found.tolist()] == [[-1] * 7 + [0, 1, 2, 3, 4]] * 3


# --- Documents, layers, heads ---------------------------------------------------------------------------------------


def test_ids_are_places_in_the_documents_laid_end_to_end() -> None:
    keys = clustered(3000)
    unit = build(keys, "Flat", cuts=(1000, 1001))
    queries = queries_near(keys)
    assert unit.tokens == 3000
    assert unit.starts.tolist() == [0, 1000, 1001]
    assert unit.starts.dtype == np.int64
    assert recall(unit.search(0, 0, queries, 8), best(keys, queries, 8)) == 1.0


def test_how_keys_are_cut_into_documents_does_not_change_what_is_found() -> None:
    keys = clustered(6000)
    queries = queries_near(keys)
    one, many = build(keys), build(keys, cuts=(1, 2000, 2001, 5999))
    assert np.array_equal(np.sort(one.search(0, 0, queries, 64)), np.sort(many.search(0, 0, queries, 64)))


def test_every_layer_and_head_has_its_own_index() -> None:
    keys = torch.stack([clustered(2000, seed=seed) for seed in range(6)]).view(2, 3, 2000, DIM)
    documents = [IndexedDocument(1, 1, 1500), IndexedDocument(2, 1, 500)]
    read: Callable[[int, int], Tensor] = lambda at, layer: keys[layer, :, (0, 1500)[at] : (1500, 2000)[at]]  # noqa: E731
    steps: list[int] = []
    unit = faiss_index.build("unit", documents, spec_of(2, 3), "IVF8,Flat", read, None, steps.append)
    for layer in range(2):
        for head in range(3):
            queries = queries_near(keys[layer, head])
            found = unit.search(layer, head, queries, 16, {"nprobe": 8})
            assert recall(found, best(keys[layer, head], queries, 16)) == 1.0
    assert sum(steps) == 2 * 2000


def test_building_twice_gives_the_same_bytes() -> None:
    keys = clustered(6000)
    first, second = build(keys), build(keys)
    assert [bytes(one) for one in first.heads[0].pieces()] == [bytes(one) for one in second.heads[0].pieces()]


def test_a_cancelled_build_stops() -> None:
    cancel = Cancel()
    cancel.cancel()
    with pytest.raises(Cancelled):
        faiss_index.build("unit", [IndexedDocument(1, 1, 9)], spec_of(), "auto", lambda *_: clustered(9)[None], cancel)


def test_searches_at_once_do_not_disturb_each_other() -> None:
    keys = clustered(8192)
    queries, unit = queries_near(keys), build(keys)
    nprobes = [1, 3, 10, 50, 200] * 6
    alone = [np.sort(unit.search(0, 0, queries, 32, {"nprobe": one})) for one in nprobes]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda one: np.sort(unit.search(0, 0, queries, 32, {"nprobe": one})), nprobes))
    assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


def test_the_estimate_is_near_what_an_index_takes() -> None:
    unit = build(clustered(32_768, 64))
    assert factories.estimate_bytes(32_768, spec_of(dim=64), "auto") == pytest.approx(unit.nbytes, rel=0.2)


# --- Scopes and parameters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [*FACTORIES, "auto"])
def test_only_allowed_tokens_are_found(factory: str) -> None:
    keys = clustered(3001)
    allowed = np.zeros(3001, bool)
    allowed[700:1500] = allowed[2990:3001] = True
    queries = queries_near(keys)
    bits = np.packbits(allowed, bitorder="little")
    found = build(keys, factory).search(0, 0, queries, 128, {"nprobe": 128, "efSearch": 512}, bits)
    ids = np.flatnonzero(allowed)
    assert np.isin(found[found >= 0], ids).all()
    assert recall(found, ids[best(keys[ids], queries, 8)]) > (0.5 if factory in ("IVF16,PQ4", "IVF16,RaBitQ") else 0.9)


@pytest.mark.parametrize("factory", [*FACTORIES, "auto"])
def test_an_empty_scope_finds_nothing(factory: str) -> None:
    keys = clustered(3000)
    found = build(keys, factory).search(0, 0, queries_near(keys), 40, {}, np.zeros(375, np.uint8))
    assert (found == -1).all()


@pytest.mark.parametrize(
    "params", [{"probes": 4}, {"nprobe": 0}, {"nprobe": 1.5}, {"nprobe": 1e9}, {"efSearch": float("nan")}, {"": 1}]
)
def test_wrong_search_parameters_are_refused(params: dict[str, float]) -> None:
    unit = build(clustered(9))
    with pytest.raises(InvalidArgument):
        unit.search(0, 0, queries_near(clustered(9)), 4, params)


def test_parameters_an_index_does_not_have_are_of_no_effect() -> None:
    keys = clustered(9)
    found = build(keys, "Flat").search(0, 0, queries_near(keys), 4, {"nprobe": 3, "efSearch": 9, "candidates": 5})
    assert found.min() >= 0


@pytest.mark.parametrize(
    "factory",
    [
        *("", "flat", "Flat ", "IVF0,Flat", "IVF2000000000,Flat", "IVF16385,Flat", "IVF8", "IVF8(IVF9,Flat),Flat"),
        *("PQ8", "PQ8x4fs", "RaBitQ", "IVF8,PQ5", "IVF8,PQ8fs", "IVF8,PQ8x24", "HNSW3", "HNSW4000", "HNSW32,SQ8"),
        *("IDMap,Flat", "OPQ8,IVF8,PQ8", "LSH", "SQ8,RFlat", "IVF8,SQ8\n"),
    ],
)
def test_factories_outside_the_list_are_refused(factory: str) -> None:
    with pytest.raises(InvalidArgument, match="index factory"):
        factories.check_factory(factory, DIM)


@pytest.mark.parametrize("factory", [*FACTORIES, "auto", "none"])
def test_factories_on_the_list_are_accepted(factory: str) -> None:
    factories.check_factory(factory, DIM)


def test_the_automatic_factory_grows_with_the_square_root_of_the_tokens() -> None:
    tokens = (1, 1023, 1024, 65_536, 262_144, 1 << 24, 1 << 31)
    chosen = [factories.choose_factory(one, 64, "auto") for one in tokens]
    assert chosen == ["Flat", "Flat", *(f"IVF{lists},PQ64x4fsr" for lists in (128, 1024, 2048, 16_384, 16_384))]


@pytest.mark.parametrize(("factory", "wanted"), [("IVF8,PQ16x4fsr", 96), ("Flat", 40), ("IVF8,SQ8", 40)])
def test_rough_codes_ask_for_more_candidates(factory: str, wanted: int) -> None:
    assert factories.default_candidates(factory, DIM, 32) == wanted


# --- Sidecars -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [*FACTORIES, "auto"])
@pytest.mark.parametrize("sync", [False, True])
def test_a_saved_unit_comes_back_the_same(factory: str, sync: bool, tmp_path: Path) -> None:
    keys = clustered(2000)
    unit = build(keys, factory, cuts=(500,))
    faiss_index.save(unit, tmp_path / "unit", OsVfs(), sync=sync)
    again = faiss_index.load(tmp_path / "unit", OsVfs(), spec_of())
    queries = queries_near(keys)
    assert again is not None
    assert (again.name, again.documents, again.factory) == (unit.name, unit.documents, unit.factory)
    assert again.nbytes == unit.nbytes
    assert np.array_equal(again.search(0, 0, queries, 40), unit.search(0, 0, queries, 40))


def test_saving_replaces_what_was_there(tmp_path: Path) -> None:
    faiss_index.save(build(clustered(50)), tmp_path / "unit", OsVfs())
    faiss_index.save(build(clustered(70)), tmp_path / "unit", OsVfs())
    again = faiss_index.load(tmp_path / "unit", OsVfs(), spec_of())
    assert again is not None
    assert again.tokens == 70


def test_every_flipped_bit_is_noticed_and_the_directory_removed(tmp_path: Path) -> None:
    unit = build(clustered(1500))
    generator = np.random.default_rng(7)
    for _ in range(150):
        faiss_index.save(unit, tmp_path / "unit", OsVfs())
        files = sorted((tmp_path / "unit").iterdir())
        victim = files[generator.integers(len(files))]
        data = bytearray(victim.read_bytes())
        data[generator.integers(len(data))] ^= 1 << int(generator.integers(8))
        victim.write_bytes(data)
        assert faiss_index.load(tmp_path / "unit", OsVfs(), spec_of()) is None
        assert not (tmp_path / "unit").exists()


@pytest.mark.parametrize("length", [0, 1, 9, 100, -1])
@pytest.mark.parametrize("name", ["manifest.json", "head-00000.faiss"])
def test_every_cut_file_is_noticed(name: str, length: int, tmp_path: Path) -> None:
    faiss_index.save(build(clustered(1500)), tmp_path / "unit", OsVfs())
    path = tmp_path / "unit" / name
    path.write_bytes(path.read_bytes()[:length])
    assert faiss_index.load(tmp_path / "unit", OsVfs(), spec_of()) is None
    assert not (tmp_path / "unit").exists()


@pytest.mark.parametrize("name", ["manifest.json", "head-00000.faiss"])
def test_every_missing_file_is_noticed(name: str, tmp_path: Path) -> None:
    faiss_index.save(build(clustered(1500)), tmp_path / "unit", OsVfs())
    (tmp_path / "unit" / name).unlink()
    assert faiss_index.load(tmp_path / "unit", OsVfs(), spec_of()) is None
    assert faiss_index.load(tmp_path / "unit", OsVfs(), spec_of()) is None  # The directory is gone by now.


def test_heads_swapped_on_disk_are_noticed(tmp_path: Path) -> None:
    keys = torch.stack([clustered(1500), clustered(1500, seed=1)])
    unit = faiss_index.build("unit", [IndexedDocument(1, 1, 1500)], spec_of(heads=2), "auto", lambda *_: keys)
    faiss_index.save(unit, tmp_path / "unit", OsVfs())
    first, second = tmp_path / "unit" / "head-00000.faiss", tmp_path / "unit" / "head-00001.faiss"
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    assert faiss_index.load(tmp_path / "unit", OsVfs(), spec_of(heads=2)) is None


@pytest.mark.parametrize("spec", [spec_of(2), spec_of(heads=2), spec_of(dim=8)])
def test_a_unit_of_another_spec_is_not_taken(spec: MemorySpec, tmp_path: Path) -> None:
    faiss_index.save(build(clustered(1500)), tmp_path / "unit", OsVfs())
    assert faiss_index.load(tmp_path / "unit", OsVfs(), spec) is None


def test_a_unit_of_another_faiss_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faiss_index.save(build(clustered(1500)), tmp_path / "unit", OsVfs())
    monkeypatch.setattr(faiss_index.faiss, "__version__", "0.0.0")
    assert faiss_index.load(tmp_path / "unit", OsVfs(), spec_of()) is None


class FullDisk(OsVfs):
    """Takes so many bytes and no more."""

    def __init__(self, room: int):
        self.room = room

    def pwrite(self, file: File, data: Buffer, offset: int) -> None:
        self.room -= memoryview(data).nbytes
        if self.room < 0:
            raise ResourceExhausted("no space left", reason="DISK_FULL")
        super().pwrite(file, data, offset)


def test_a_full_disk_leaves_nothing_behind_at_any_write(tmp_path: Path) -> None:
    unit = build(clustered(1500))
    faiss_index.save(unit, tmp_path / "unit", OsVfs())
    size = sum(path.stat().st_size for path in (tmp_path / "unit").iterdir())
    for room in (0, 100, size // 2, size - 1):
        with pytest.raises(ResourceExhausted):
            faiss_index.save(unit, tmp_path / "unit", FullDisk(room))
        assert not (tmp_path / "unit").exists()


@pytest.mark.parametrize("tokens", [2048, 4096, 16_384])
def test_an_index_is_there_again_after_a_restart_whatever_tables_faiss_makes_of_it(tmp_path: Path, tokens: int) -> None:
    # Faiss held a table of products it makes on reading against the limit for what it reads, at some sizes only.
    spec = MemorySpec(Fingerprint("m"), (0,), 1, 64, index=IndexPolicy(min_tokens=1 << 40))
    keys, values = torch.randn(2, 1, 1, tokens, 64, generator=torch.Generator().manual_seed(1))
    with Memory.open(tmp_path, spec=spec) as memory:
        memory.put("document", keys, values)
        memory.wait(memory.start("index"))
    with Memory.open(tmp_path, spec=spec) as memory:
        assert memory.stats().indexed_tokens == tokens
        assert memory.attend(0, keys[0, :, :1], top_k=4, engine="index").engine.startswith("index:")


@pytest.mark.parametrize("durable", [False, True])
def test_an_index_can_be_built_anew_with_another_factory(tmp_path: Path, durable: bool) -> None:
    spec = MemorySpec(Fingerprint("m"), (0,), 1, 16, index=IndexPolicy(min_tokens=1 << 40))
    keys, values = torch.randn(2, 1, 1, 3000, 16, generator=torch.Generator().manual_seed(1))
    with Memory.open(tmp_path if durable else ":memory:", spec=spec) as memory:
        memory.put("first", keys[:, :, :2000], values[:, :, :2000])
        memory.wait(memory.start("index"))
        memory.put("second", keys[:, :, 2000:], values[:, :, 2000:])
        for factory in ("IVF16,SQ8", "HNSW8"):
            done = memory.wait(memory.start("index", factory=factory))
            assert (done.state, memory.stats().indexed_tokens) == ("done", 3000)
            answer = memory.attend(0, keys[0, :, :4], top_k=4, engine="index")
            assert answer.engine == f"index:{factory}"
        # Without a factory there is nothing left to do.
        assert memory.wait(memory.start("index")).message == "every document is indexed already"
    if durable:
        with Memory.open(tmp_path) as memory:
            assert memory.attend(0, keys[0, :, :4], top_k=4, engine="index").engine == "index:HNSW8"


@pytest.mark.parametrize(("kind", "factory"), [("index", "PQ3"), ("index", "none"), ("compact", "SQ8"), ("index", "?")])
def test_a_factory_that_cannot_be_built_is_refused_before_any_work(kind: str, factory: str) -> None:
    with Memory.open(":memory:", spec=spec_of()) as memory:
        with pytest.raises(InvalidArgument):
            memory.start(kind, factory=factory)
        assert list(memory.operations()) == []
