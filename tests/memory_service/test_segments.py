"""Staging, sealing, reading and checking segment files."""

from __future__ import annotations

import errno
import random
import threading
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from memory_service.errors import Cancelled, DataLoss, FailedPrecondition, InvalidArgument, ResourceExhausted
from memory_service.storage.memory_file import MemoryFile
from memory_service.storage.parts import CHUNK_BYTES, PartHeader, PartLayout, decode_header, part_ranges, part_tokens
from memory_service.storage.segments import SegmentFiles
from memory_service.storage.staging import Staging
from memory_service.storage.vfs import OsVfs, StorageFailed
from memory_service.types.callers import Cancel
from memory_service.types.specs import DType, MemorySpec
from tests.memory_service.faults import FaultVfs, flip_bit, truncate, zero_page
from tests.memory_service.storage import KEY, SPEC, check_part, content, stage, with_dtype

LARGE = 60_000  # Tokens of a part above SMALL_PART_BYTES: 60,000 * (2 * 2 * 2 * 8 * 2 + 4) bytes.


@pytest.fixture
def vfs(tmp_path: Path) -> FaultVfs:
    (tmp_path / "data").mkdir()
    return FaultVfs(tmp_path / "data")


@pytest.fixture
def files(vfs: FaultVfs) -> Iterator[SegmentFiles]:
    with SegmentFiles(vfs.root, vfs) as found:
        yield found


def payload(layout: PartLayout, seed: int = 0) -> bytes:
    """Random finite numbers."""
    return random.Random(seed).randbytes(layout.nbytes).translate(bytes(one & 0x3F for one in range(256)))


def send(staging: Staging, data: bytes, chunk: int) -> None:
    piece = data[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES]
    staging.write(chunk * CHUNK_BYTES, zlib.crc32(piece), piece)


# --- Layouts and headers ----------------------------------------------------------------------------------------------


def test_a_layouts_extents_cover_the_payload_without_gaps() -> None:
    layout = PartLayout(layers=2, heads=3, dim=4, dtype=DType.BF16, tokens=5)
    planes = [
        layout.extent(which, one, head, 0, 5) for which in ("keys", "values") for one in (0, 1) for head in range(3)
    ]
    runs = [*planes, layout.ids_extent(0, 5)]
    assert [run.offset for run in runs] == [sum(one.nbytes for one in runs[:n]) for n in range(len(runs))]
    assert sum(run.nbytes for run in runs) == layout.nbytes == 2 * 2 * 3 * 5 * 4 * 2 + 4 * 5
    assert layout.extent("values", 1, 2, 3, 2) == (planes[-1].offset + 3 * 8, 16)


def test_a_document_is_cut_into_parts_of_at_most_256_mib() -> None:
    spec = MemorySpec(SPEC.fingerprint, tuple(range(32)), kv_heads=8, head_dim=128)
    step = part_tokens(spec)
    assert PartLayout.of(spec, step).nbytes <= 256 << 20 < PartLayout.of(spec, step + 1).nbytes
    assert part_ranges(spec, 2 * step + 1) == [(0, step), (step, step), (2 * step, 1)]


def test_a_header_that_was_changed_anywhere_is_not_believed(files: SegmentFiles, vfs: FaultVfs) -> None:
    (segment,) = files.seal(KEY, SPEC, stage(files, "a", 1, 20, metadata={"quote": 'é" \\ 𝄞', "n": 1.5, "flag": True}))
    block = (vfs.root / "memories" / KEY / segment.path).read_bytes()[: segment.header_bytes]
    assert decode_header(segment.path, block) == (SPEC, segment)
    for position in range(0, len(block), 7):
        bad = bytearray(block)
        bad[position] ^= 1
        with pytest.raises(DataLoss):
            decode_header(segment.path, bytes(bad))


# --- Staging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 20_000, LARGE])
def test_chunks_may_come_in_any_order_and_twice(files: SegmentFiles, vfs: FaultVfs, tokens: int) -> None:
    layout = PartLayout.of(SPEC, tokens)
    staging = files.stage(KEY, layout)
    assert (staging.path is not None) == (tokens == LARGE)
    data, order = payload(layout), list(range(layout.chunks))
    random.Random(1).shuffle(order)
    assert staging.missing() == [(0, layout.chunks)]
    for chunk in order + order[:2]:
        send(staging, data, chunk)
    assert staging.complete and staging.missing() == [] and staging.received == layout.nbytes
    header = PartHeader("a", 1, 0, 1, 0, tokens, tokens)
    (segment,) = files.seal(KEY, SPEC, [(header, staging)])
    out = bytearray(layout.nbytes)
    files.read(KEY, segment, 0, 0, memoryview(out))
    assert bytes(out) == data
    assert vfs.list_directory(vfs.root / "staging") == []


def test_missing_chunks_are_told_as_runs(files: SegmentFiles) -> None:
    layout = PartLayout.of(SPEC, LARGE)
    staging, data = files.stage(KEY, layout), payload(layout)
    for chunk in (1, 4, 5):
        send(staging, data, chunk)
    assert staging.missing() == [(0, 1), (2, 2), (6, layout.chunks - 6)]


@pytest.mark.parametrize("tokens", [30_000, LARGE])
def test_a_wrong_chunk_is_refused_with_a_reason_and_changes_nothing(files: SegmentFiles, tokens: int) -> None:
    layout = PartLayout.of(SPEC, tokens)
    staging, data = files.stage(KEY, layout), payload(layout)
    first = data[:CHUNK_BYTES]
    for offset, crc, piece, reason in [
        (5, zlib.crc32(first), first, "multiple of 1048576"),
        (-CHUNK_BYTES, zlib.crc32(first), first, "multiple of 1048576"),
        (layout.chunks * CHUNK_BYTES, 0, b"", "multiple of 1048576"),
        (1 << 62, zlib.crc32(first), first, "multiple of 1048576"),
        (0, zlib.crc32(first[:-1]), first[:-1], "must have 1048576 bytes, got 1048575"),
        (0, zlib.crc32(first) ^ 1, first, "CRC-32"),
    ]:
        with pytest.raises(InvalidArgument, match=reason):
            staging.write(offset, crc, piece)
    assert staging.received == 0
    send(staging, data, 0)
    with pytest.raises(InvalidArgument, match="other bytes"):
        staging.write(0, zlib.crc32(bytes(CHUNK_BYTES)), bytes(CHUNK_BYTES))


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("tokens", [3, LARGE])
def test_filling_at_once_is_the_same_as_sending_chunks(files: SegmentFiles, dtype: DType, tokens: int) -> None:
    spec = with_dtype(dtype)
    layout = PartLayout.of(spec, tokens)
    whole = content("a", 1, tokens + 10, spec)
    filled, sent = files.stage(KEY, layout), files.stage(KEY, layout)
    run = slice(4, 4 + tokens)  # Not contiguous: a part of a longer document.
    filled.fill(whole.keys[:, :, run], whole.values[:, :, run], whole.token_ids[run])
    tensors = (whole.keys[:, :, run], whole.values[:, :, run], whole.token_ids[run].to(torch.uint32))
    data = b"".join(one.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for one in tensors)
    for chunk in range(layout.chunks):
        send(sent, data, chunk)
    assert filled.crcs == sent.crcs


@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_refused(files: SegmentFiles, dtype: DType, bad: float) -> None:
    spec = with_dtype(dtype)
    layout = PartLayout.of(spec, 4)
    values = content("a", 1, 4, spec).values
    values[1, 1, 3, 7] = bad
    zeros, ids = torch.zeros_like(values), torch.full((4,), 2**32 - 1)
    with pytest.raises(InvalidArgument, match="NaN or infinity"):
        files.stage(KEY, layout).fill(zeros, values, ids)
    tensors = (zeros, values, ids.to(torch.uint32))
    with pytest.raises(InvalidArgument, match="NaN or infinity"):
        send(files.stage(KEY, layout), b"".join(one.view(-1).view(torch.uint8).numpy().tobytes() for one in tensors), 0)


def test_the_largest_finite_numbers_and_token_ids_are_finite(files: SegmentFiles) -> None:
    for dtype in DType:
        spec = with_dtype(dtype)
        staging = files.stage(KEY, PartLayout.of(spec, 4))
        most = torch.full((2, 2, 4, 8), torch.finfo(dtype.torch).max, dtype=dtype.torch)
        staging.fill(most, -most, torch.full((4,), 2**32 - 1))
        assert staging.complete


def test_tensors_that_do_not_fit_are_refused(files: SegmentFiles) -> None:
    staging = files.stage(KEY, PartLayout.of(SPEC, 4))
    good = content("a", 1, 4)
    for keys, ids, reason in [
        (good.keys.float(), None, "keys must be bf16 of shape"),
        (good.keys[:, :1], None, "keys must be bf16 of shape"),
        (good.keys, torch.zeros(5, dtype=torch.int64), "4 integers"),
        (good.keys, torch.zeros(4), "4 integers"),
        (good.keys, torch.tensor([0, 1, 2, 2**32]), r"0 to 2\^32 - 1"),
        (good.keys, torch.tensor([0, 1, 2, -1]), r"0 to 2\^32 - 1"),
    ]:
        with pytest.raises(InvalidArgument, match=reason):
            staging.fill(keys, good.values, ids)
    assert staging.received == 0


def test_nothing_can_be_written_after_the_end(files: SegmentFiles) -> None:
    one, (_, committed) = content("a", 1, 4), *stage(files, "a", 1, 4)
    files.seal(KEY, SPEC, [(PartHeader("a", 1, 0, 1, 0, 4, 4), committed)])
    with pytest.raises(FailedPrecondition, match="was committed"):
        committed.fill(one.keys, one.values, one.token_ids)
    dropped = files.stage(KEY, PartLayout.of(SPEC, LARGE))
    dropped.discard()
    dropped.discard()
    assert dropped.path is not None and not dropped.path.exists()
    with pytest.raises(FailedPrecondition, match="was dropped"):
        send(dropped, payload(dropped.layout), 0)


def test_an_incomplete_part_is_not_sealed(files: SegmentFiles) -> None:
    staging = files.stage(KEY, PartLayout.of(SPEC, LARGE))
    send(staging, payload(staging.layout), 1)
    with pytest.raises(FailedPrecondition, match="bytes of the upload are still missing"):
        files.seal(KEY, SPEC, [(PartHeader("a", 1, 0, 1, 0, LARGE, LARGE), staging)])
    send(staging, payload(staging.layout), 0)  # It goes on.


def test_a_declared_terabyte_fails_before_anything_is_allocated(files: SegmentFiles, vfs: FaultVfs) -> None:
    vfs.fail("allocate")
    with pytest.raises(ResourceExhausted):
        files.stage(KEY, PartLayout.of(SPEC, (1 << 40) // SPEC.bytes_per_token))
    assert vfs.list_directory(vfs.root / "staging") == []


# --- Sealing ----------------------------------------------------------------------------------------------------------


def test_small_parts_share_a_segment_and_large_ones_have_their_own(files: SegmentFiles) -> None:
    parts = stage(files, "a", 1, 7) + stage(files, "big", 2, LARGE) + stage(files, "b", 3, 9, ranges=[(0, 4), (4, 5)])
    shared, own = files.seal(KEY, SPEC, parts)
    assert [one.header.document for one in shared.parts] == ["a", "b", "b"]
    assert [one.header.document for one in own.parts] == ["big"]
    for segment in (shared, own):
        files.verify(KEY, segment)
        assert files.present(KEY, segment)
        for index in range(len(segment.parts)):
            check_part(files, segment, index)


def test_sixteen_small_documents_cost_one_sync_one_rename_and_one_directory_sync(
    files: SegmentFiles, vfs: FaultVfs
) -> None:
    files.seal(KEY, SPEC, stage(files, "first", 1, 4))
    parts = [part for number in range(16) for part in stage(files, f"d{number}", number, 50)]
    vfs.calls.clear()
    files.seal(KEY, SPEC, parts)
    assert {name: vfs.calls[name] for name in ("create", "fdatasync", "rename", "fsync_directory")} == {
        "create": 1,
        "fdatasync": 1,
        "rename": 1,
        "fsync_directory": 1,
    }


@pytest.mark.parametrize("dtype", list(DType))
def test_stock_safetensors_reads_a_segment(files: SegmentFiles, vfs: FaultVfs, dtype: DType) -> None:
    spec = with_dtype(dtype)
    parts = stage(files, "a", 1, 5, spec=spec) + stage(files, "b", 2, 3, spec=spec)
    (segment,) = files.seal(KEY, spec, parts)
    with safe_open(vfs.root / "memories" / KEY / segment.path, "pt") as stock:
        assert set(stock.keys()) == {f"p{n}.{name}" for n in (0, 1) for name in ("keys", "values", "token_ids")}
        for number, (name, generation, tokens) in enumerate([("a", 1, 5), ("b", 2, 3)]):
            whole = content(name, generation, tokens, spec)
            assert torch.equal(stock.get_tensor(f"p{number}.keys"), whole.keys)
            assert torch.equal(stock.get_tensor(f"p{number}.values"), whole.values)
            assert torch.equal(stock.get_tensor(f"p{number}.token_ids").to(torch.int64), whole.token_ids)


def test_metadata_at_its_limit_fits_the_header(files: SegmentFiles) -> None:
    text = "\x01" * 16_000  # Every character grows to seven bytes.
    for tokens in (1, LARGE):
        (segment,) = files.seal(KEY, SPEC, stage(files, '"' * 512, tokens, tokens, metadata={"a": text}))
        (found,) = (one for one in files.scan(KEY) if one.path == segment.path)
        assert found.segment == segment and segment.parts[0].header.metadata == {"a": text}


@pytest.mark.parametrize("operation", ["create", "allocate", "pwrite", "fdatasync", "rename"])
@pytest.mark.parametrize("tokens", [[5, 6], [LARGE, 5]])
def test_a_full_disk_while_sealing_leaves_nothing_and_small_parts_can_be_sealed_again(
    files: SegmentFiles, vfs: FaultVfs, operation: str, tokens: list[int]
) -> None:
    parts = [part for n, count in enumerate(tokens) for part in stage(files, f"d{n}", n, count)]
    files.seal(KEY, SPEC, stage(files, "before", 1, 3))
    before = vfs.list_directory(vfs.root / "memories" / KEY)
    vfs.fail(operation)
    with pytest.raises(ResourceExhausted):
        files.seal(KEY, SPEC, parts)
    assert vfs.list_directory(vfs.root / "memories" / KEY) == before
    vfs.heal()
    for segment in files.seal(KEY, SPEC, parts):
        files.verify(KEY, segment)


@pytest.mark.parametrize("operation", ["fdatasync", "fsync_directory"])
def test_a_failed_sync_is_never_believed(files: SegmentFiles, vfs: FaultVfs, operation: str) -> None:
    parts = stage(files, "a", 1, LARGE)
    parts[0][1].payload._check(wait=True)  # type: ignore[union-attr]  # Lets the background sync end first.
    vfs.fail(operation, error=errno.EIO)
    with pytest.raises(StorageFailed):
        files.seal(KEY, SPEC, parts)
    assert [one for one in vfs.list_directory(vfs.root / "memories" / KEY) if one.startswith("seg-")] == []
    if operation == "fdatasync":
        with pytest.raises(StorageFailed):
            files.seal(KEY, SPEC, parts)  # The disk would report success now, for pages it lost.


def test_a_failed_background_sync_fails_the_commit(files: SegmentFiles, vfs: FaultVfs) -> None:
    vfs.fail("fdatasync", error=errno.EIO)
    with pytest.raises(StorageFailed):
        files.seal(KEY, SPEC, stage(files, "a", 1, LARGE))


# --- Reading ----------------------------------------------------------------------------------------------------------


def test_any_run_of_tokens_of_any_head_can_be_read(files: SegmentFiles) -> None:
    (segment,) = files.seal(KEY, SPEC, stage(files, "a", 1, LARGE))
    whole, dice = content("a", 1, LARGE), random.Random(2)
    for _ in range(50):
        first = dice.randrange(LARGE)
        count = dice.randrange(1, LARGE - first + 1)
        layer = dice.randrange(2)
        found = files.read_tensor(KEY, segment, 0, "values", layer, first, count)
        assert torch.equal(found, whole.values[layer, :, first : first + count])
        assert torch.equal(files.read_ids(KEY, segment, 0, first, count), whole.token_ids[first : first + count])


def test_a_chunk_is_checked_once_and_then_read_directly(files: SegmentFiles, vfs: FaultVfs) -> None:
    (segment,) = files.seal(KEY, SPEC, stage(files, "a", 1, LARGE))
    path = vfs.root / "memories" / KEY / segment.path
    files.read_tensor(KEY, segment, 0, "keys", 0, 0, 10)
    vfs.calls.clear()
    files.read_tensor(KEY, segment, 0, "keys", 0, 0, LARGE)
    files.read_tensor(KEY, segment, 0, "keys", 0, 0, LARGE)
    assert vfs.calls["pread"] == 2 + 1  # The rest of the chunks' first touch, at once where whole; then one read.
    assert path.exists()


def test_bytes_go_into_a_tensor_of_the_callers(files: SegmentFiles) -> None:
    (segment,) = files.seal(KEY, SPEC, stage(files, "a", 1, 6))
    out = torch.empty(2, 6, 8, dtype=torch.bfloat16)
    files.read(KEY, segment, 0, 0, out)
    assert torch.equal(out, content("a", 1, 6).keys[0])


@pytest.mark.parametrize("damage", [flip_bit, truncate, zero_page])
@pytest.mark.parametrize("tokens", [40, LARGE])
def test_damage_is_found_before_a_byte_is_served(tmp_path: Path, damage: object, tokens: int) -> None:
    assert callable(damage)
    vfs = OsVfs()
    with SegmentFiles(tmp_path, vfs) as files:
        (segment,) = files.seal(KEY, SPEC, stage(files, "a", 1, tokens))
    path = tmp_path / "memories" / KEY / segment.path
    sound = path.read_bytes()
    for seed in range(40 if tokens == 40 else 8):
        what = damage(path, random.Random(seed))
        changed = path.read_bytes() != sound
        with SegmentFiles(tmp_path, vfs) as files:
            found = False
            try:
                files.verify(KEY, segment)
            except DataLoss as error:
                found = segment.path in error.message
            assert found == changed, what
            try:
                check_part(files, segment, 0)  # Raises DataLoss, or the bytes are right.
            except DataLoss as error:
                assert changed, error
        path.write_bytes(sound)


def test_a_swapped_chunk_is_found(files: SegmentFiles, vfs: FaultVfs) -> None:
    (segment,) = files.seal(KEY, SPEC, stage(files, "a", 1, LARGE))
    path, start = vfs.root / "memories" / KEY / segment.path, segment.parts[0].offset
    data = bytearray(path.read_bytes())
    one, two = data[start : start + CHUNK_BYTES], data[start + CHUNK_BYTES : start + 2 * CHUNK_BYTES]
    data[start : start + 2 * CHUNK_BYTES] = two + one
    path.write_bytes(data)
    with pytest.raises(DataLoss, match="chunk 0 of part 0"):
        files.verify(KEY, segment)
    with pytest.raises(DataLoss, match="chunk 1 of part 0"):
        files.read(KEY, segment, 0, CHUNK_BYTES + 5, memoryview(bytearray(10)))


def test_an_unreadable_sector_is_data_loss_not_the_end_of_the_store(files: SegmentFiles, vfs: FaultVfs) -> None:
    (segment,) = files.seal(KEY, SPEC, stage(files, "a", 1, 5))
    vfs.fail("pread", error=errno.EIO)
    with pytest.raises(DataLoss, match=segment.path):
        files.read_ids(KEY, segment, 0, 0, 5)
    check_part(files, segment, 0)


def test_verify_reports_progress_and_stops_when_asked(files: SegmentFiles, vfs: FaultVfs) -> None:
    (segment,) = files.seal(KEY, SPEC, stage(files, "a", 1, LARGE))
    steps: list[int] = []
    files.verify(KEY, segment, progress=steps.append)
    assert sum(steps) == segment.nbytes == vfs.file_size(vfs.root / "memories" / KEY / segment.path)
    cancel = Cancel()
    with pytest.raises(Cancelled):
        files.verify(KEY, segment, cancel, lambda _: cancel.cancel())


def test_a_reader_finishes_although_the_segment_is_removed(files: SegmentFiles, vfs: FaultVfs) -> None:
    (segment,) = files.seal(KEY, SPEC, stage(files, "a", 1, 5))
    path = vfs.root / "memories" / KEY / segment.path
    with files._reader._opened(path) as file:
        files.remove(KEY, segment.path)
        assert not path.exists()
        vfs.pread(file, memoryview(bytearray(10)), 0)
    with pytest.raises(DataLoss, match="missing"):
        files.read_ids(KEY, segment, 0, 0, 5)
    assert not files.present(KEY, segment)


def test_many_readers_share_few_open_files(tmp_path: Path) -> None:
    with SegmentFiles(tmp_path, OsVfs()) as files:
        files._reader._limit = 2
        segments = [files.seal(KEY, SPEC, stage(files, f"d{n}", n, 50))[0] for n in range(6)]
        problems: list[BaseException] = []

        def read(seed: int) -> None:
            dice = random.Random(seed)
            try:
                for _ in range(60):
                    check_part(files, dice.choice(segments), 0)
            except BaseException as error:
                problems.append(error)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert problems == [] and len(files._reader._open) <= 2


# --- Directories ------------------------------------------------------------------------------------------------------


def test_a_scan_reads_headers_back_and_names_what_it_cannot_use(files: SegmentFiles, vfs: FaultVfs) -> None:
    good = files.seal(KEY, SPEC, stage(files, "a", 1, 5) + stage(files, "b", 2, LARGE))
    (bad,) = files.seal(KEY, SPEC, stage(files, "c", 3, 5))
    path = vfs.root / "memories" / KEY / bad.path
    path.write_bytes(path.read_bytes()[:-1])
    found = {one.path: one for one in files.scan(KEY)}
    assert [found[one.path].segment for one in good] == good and found[good[0].path].spec == SPEC
    assert found[bad.path].segment is None and "bytes instead of" in found[bad.path].problem


def test_a_sweep_removes_what_is_not_kept(files: SegmentFiles, vfs: FaultVfs) -> None:
    kept, orphan = (files.seal(KEY, SPEC, stage(files, name, 1, 5))[0] for name in "ab")
    (vfs.root / "memories" / KEY / "memory.json.new").write_bytes(b"half")
    (vfs.root / "staging" / "old.part").write_bytes(b"half")
    live = files.stage(KEY, PartLayout.of(SPEC, LARGE))
    assert files.sweep(KEY, {kept.path}) == 2 and files.sweep_staging() == 1
    assert files.present(KEY, kept) and not files.present(KEY, orphan)
    assert live.path is not None and live.path.exists()


def test_a_memorys_description_survives_or_is_not_believed(files: SegmentFiles, vfs: FaultVfs) -> None:
    memory = MemoryFile("tenant", "name", replace(SPEC, kv_heads=3), 12.5)
    files.create_memory(KEY, memory)
    assert files.memory_keys() == [KEY] and files.read_memory(KEY) == memory
    path = vfs.root / "memories" / KEY / "memory.json"
    sound = path.read_bytes()
    for seed in range(50):
        flip_bit(path, random.Random(seed))
        with pytest.raises(DataLoss):
            files.read_memory(KEY)
        path.write_bytes(sound)
    files.drop_memory(KEY)
    assert files.memory_keys() == []
    with pytest.raises(DataLoss, match="missing"):
        files.read_memory(KEY)
