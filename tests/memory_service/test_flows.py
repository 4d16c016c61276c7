"""What the client does over a line that breaks: what it repeats, what it does not, and how an upload goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from memory_service.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FotError,
    InvalidArgument,
    NotFound,
    QuotaExceeded,
    ResourceExhausted,
    Unavailable,
)
from memory_service.places.flows import PATIENCE_S, Call, Connect, Send, Sleep, Step, flow_of
from memory_service.types.documents import Document, DocumentInfo
from memory_service.types.memories import MemoryInfo
from memory_service.types.specs import Fingerprint, MemorySpec
from memory_service.types.uploads import Upload
from memory_service.verbs import (
    AbortUpload,
    BeginUpload,
    CommitUpload,
    DeleteMemory,
    GetMemory,
    GetStats,
    GetUpload,
    PutDocument,
    Verb,
)

SPEC = MemorySpec(Fingerprint("tiny"), (0,), 1, 64)
INFO = MemoryInfo("m", SPEC, 0.0)
DONE = DocumentInfo("d", 8192, {}, 1, 0.0)
SMALL = Document("d", *torch.zeros(2, 1, 1, 8, 64, dtype=torch.bfloat16))
LARGE = Document("d", *torch.zeros(2, 1, 1, 8192, 64, dtype=torch.bfloat16))
Script = list[tuple[type[object], Any]]


@dataclass
class Line:
    """Answers the steps of a flow from a script of (verb or step, answer or error); its clock runs only in sleeps."""

    script: Script
    seconds: float = 0.0
    taken: list[Step] = field(default_factory=list)

    def run(self, verb: Verb[Any], timeout_s: float = 60.0) -> Any:
        flow = flow_of(verb, timeout_s, lambda: self.seconds)
        try:
            step = next(flow)
            while True:
                try:
                    answer = self.take(step)
                except FotError as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(answer)
        except StopIteration as end:
            assert not self.script
            return end.value

    def take(self, step: Step) -> Any:
        self.taken.append(step)
        if isinstance(step, Sleep):
            self.seconds += step.seconds
            return None
        expected, answer = self.script.pop(0) if len(self.script) > 1 or not self.repeats else self.script[0]
        assert isinstance(step.verb if isinstance(step, Call) else step, expected)
        if isinstance(answer, FotError):
            raise answer
        return answer

    repeats: bool = False  # The script's last line answers for ever.


DRAINED = Unavailable("stopping", reason="DRAINING")


def gone() -> Unavailable:
    return Unavailable("the line broke")


def upload(*missing: tuple[int, int, int], name: str = "u", committed: DocumentInfo | None = None) -> Upload:
    return Upload(name, 8192, 1, 1 << 20, missing, 0.0, committed)


def put(document: Document) -> PutDocument:
    return PutDocument("m", document, SPEC.fingerprint, request_id="r")


def test_a_repeatable_call_is_repeated_until_it_is_answered() -> None:
    line = Line([(GetStats, gone()), (GetStats, gone()), (GetStats, "figures")])
    assert line.run(GetStats()) == "figures"
    pauses = [step.seconds for step in line.taken if isinstance(step, Sleep)]
    assert pauses[0] == pytest.approx(0.1, rel=0.2)
    assert pauses[1] == pytest.approx(0.2, rel=0.2)


def test_patience_ends() -> None:
    line = Line([(GetStats, gone())], repeats=True)
    with pytest.raises(Unavailable):
        line.run(GetStats())
    assert PATIENCE_S - 3 < line.seconds <= PATIENCE_S


def test_the_callers_time_is_kept() -> None:
    line = Line([(GetStats, gone())], repeats=True)
    with pytest.raises(Unavailable):
        line.run(GetStats(), timeout_s=1.0)
    assert line.seconds <= 1.0
    assert all(step.timeout_s <= 1.0 for step in line.taken if isinstance(step, Call))


def test_a_call_that_must_not_happen_twice_is_sent_once_and_only_to_a_service_that_listens() -> None:
    line = Line([(Connect, None), (DeleteMemory, gone())])
    with pytest.raises(Unavailable):
        line.run(DeleteMemory("m"))
    assert line.script == []


def test_it_waits_for_a_service_that_comes_back() -> None:
    line = Line([(Connect, gone()), (Connect, None), (DeleteMemory, DRAINED), (Connect, None), (DeleteMemory, None)])
    assert line.run(DeleteMemory("m")) is None


def test_a_busy_service_is_asked_again_when_it_says_so() -> None:
    line = Line([(GetStats, ResourceExhausted("busy", retry_after_s=5.0)), (GetStats, "figures")])
    assert line.run(GetStats()) == "figures"
    assert line.seconds == pytest.approx(5.0, rel=0.2)


@pytest.mark.parametrize(
    "error",
    [
        ResourceExhausted("too large"),
        QuotaExceeded("no more documents"),
        InvalidArgument("wrong"),
        DeadlineExceeded("too late"),
        Unavailable("read-only", reason="STORAGE_FAILED"),
    ],
)
def test_what_waiting_cannot_help_is_raised_at_once(error: FotError) -> None:
    line = Line([(GetStats, error)])
    with pytest.raises(type(error)):
        line.run(GetStats())
    assert line.seconds == 0


def test_a_small_document_is_one_call() -> None:
    assert Line([(PutDocument, gone()), (PutDocument, DONE)]).run(put(SMALL)) == DONE


def test_a_large_document_is_begun_sent_and_committed() -> None:
    line = Line([(GetMemory, INFO), (BeginUpload, upload((0, 0, 3))), (Send, None), (CommitUpload, DONE)])
    assert line.run(put(LARGE)) == DONE


def test_a_broken_stream_goes_on_with_what_is_missing() -> None:
    begun, later = upload((0, 0, 3)), upload((0, 2, 1))
    line = Line(
        [
            (GetMemory, INFO),
            (BeginUpload, begun),
            (Send, gone()),
            (GetUpload, later),
            (Send, None),
            (CommitUpload, gone()),
            (CommitUpload, DONE),
        ]
    )
    assert line.run(put(LARGE)) == DONE
    assert [step.upload for step in line.taken if isinstance(step, Send)] == [begun, later]


def test_an_upload_that_a_restarted_service_forgot_begins_again_with_the_same_request() -> None:
    line = Line(
        [
            (GetMemory, INFO),
            (BeginUpload, upload((0, 0, 3))),
            (Send, gone()),
            (GetUpload, NotFound("no such upload")),
            (BeginUpload, upload((0, 0, 3), name="v")),
            (Send, None),
            (CommitUpload, DONE),
        ]
    )
    assert line.run(put(LARGE)) == DONE
    requests = [s.verb.request_id for s in line.taken if isinstance(s, Call) and isinstance(s.verb, BeginUpload)]
    assert requests == ["r", "r"]


def test_a_commit_whose_answer_was_lost_is_recognised() -> None:
    line = Line(
        [
            (GetMemory, INFO),
            (BeginUpload, upload((0, 0, 3))),
            (Send, None),
            (CommitUpload, NotFound("no such upload")),
            (GetUpload, NotFound("no such upload")),
            (BeginUpload, upload(committed=DONE)),
        ]
    )
    assert line.run(put(LARGE)) == DONE


def test_an_upload_that_fails_for_good_is_dropped() -> None:
    line = Line(
        [(GetMemory, INFO), (BeginUpload, upload((0, 0, 3))), (Send, InvalidArgument("NaN")), (AbortUpload, gone())]
    )
    with pytest.raises(InvalidArgument, match="NaN"):
        line.run(put(LARGE))


def test_a_taken_id_is_said_before_anything_is_sent() -> None:
    line = Line([(GetMemory, INFO), (BeginUpload, AlreadyExists("taken"))])
    with pytest.raises(AlreadyExists):
        line.run(put(LARGE))


def test_an_upload_without_progress_is_given_up() -> None:
    line = Line([(GetMemory, INFO), (BeginUpload, upload((0, 0, 3)))])

    def take(step: Step, of: Callable[[Step], Any] = line.take) -> Any:
        if isinstance(step, Send):
            raise gone()
        if isinstance(step, Call) and isinstance(step.verb, GetUpload):
            return upload((0, 0, 3))
        return of(step)

    line.take = take  # type: ignore[method-assign]
    with pytest.raises(Unavailable):
        line.run(put(LARGE), timeout_s=600.0)
    assert line.seconds <= PATIENCE_S


def test_swapped_dimensions_are_refused_before_anything_is_sent() -> None:
    swapped = Document("d", *torch.zeros(2, 1, 64, 8192, 1, dtype=torch.bfloat16))
    with pytest.raises(InvalidArgument, match=r"keys must be \[1 layers, 1 kv heads, tokens, 64\]"):
        Line([(GetMemory, INFO)]).run(put(swapped))
