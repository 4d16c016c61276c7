"""What asks the passkey job's questions, opened here or in the workers of a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory_service import DType
from memory_service.errors import InvalidArgument
from model_worker.cli.opening import IN_MEMORY, PATIENCE_S, checkpoint_of, load_tokenizer, quiet, tls_of

if TYPE_CHECKING:
    from memory_service.client import Client
    from model_worker.evaluation.asking import Asking
    from model_worker.evaluation.passkey import Parts, Plan
    from model_worker.settings import FotConfig

LONG_S = 1800.0  # Of a call to the memory: exact attention to ten million tokens may take minutes on a busy machine.


@dataclass(frozen=True, slots=True)
class Opening:
    """How the model and the place of the memories are opened, by whoever asks."""

    model: str
    memory: str
    asking: Asking
    mem_layers: tuple[int, ...] | None
    given: Mapping[str, Any]  # Fields of FotConfig; None: as the checkpoint says.
    dtype: DType | None
    device: str | None
    threads: int | None
    token: str | Path | None  # Itself, or its file.
    ca: Path | None
    insecure: bool

    def parts(self, plan: Plan, stack: ExitStack) -> Parts:
        """Everything, closed with the stack."""
        from model_worker.evaluation.asking import MemoryAsker
        from model_worker.evaluation.passkey import Parts
        from model_worker.tasks.tokens import tokens_of

        directory = checkpoint_of(self.model)
        tokenizer = tokens_of(load_tokenizer(directory))
        client = stack.enter_context(self._client())
        base, fot = self._model(directory)
        given = {name: value for name, value in self.given.items() if value is not None}
        fot = replace(fot, **given)
        settings = {
            "model": self.model, "memory": self.memory, **asdict(self.asking), "mem_layers": fot.mem_layers,
            "window": fot.window, "last_context_length": fot.last_context_length, "overlap": fot.overlap,
            "mem_dtype": fot.mem_dtype, "block_tokens": fot.block_tokens,
            "dtype": str(base.dtype).removeprefix("torch."),
        }  # fmt: skip
        questions = plan.questions(tokenizer, fot.last_context_length)
        return Parts(questions, MemoryAsker(base, fot, client, self.asking), settings)

    def _client(self) -> Client:
        """The place of the memories; asked once, so that nothing is computed for one that does not answer."""
        from memory_service.client import Client

        def opened(timeout_s: float) -> Client:
            tls = tls_of(self.ca, self.memory)
            return Client.open(self.memory, token=self.token, tls=tls, insecure=self.insecure, timeout_s=timeout_s)

        if self.memory != IN_MEMORY:
            with opened(PATIENCE_S) as asked:
                asked.stats()
        return opened(LONG_S)

    def _model(self, directory: Path) -> tuple[Any, FotConfig]:
        """The checkpoint's model, and what it says of its memory."""
        import torch

        from model_worker.decoder.fitting import config_of
        from model_worker.hf import checkpoint

        quiet()
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        dtype = None if self.dtype is None else self.dtype.torch
        base, fields = checkpoint.load(directory, dtype=dtype, device=self.device)
        fot = config_of(base, fields)
        if self.mem_layers is not None:
            fot = replace(fot, mem_layers=self.mem_layers)
        if not fot.mem_layers:
            raise InvalidArgument(
                f"{directory} does not say which of its layers have a memory, and without one nothing is remembered: "
                "give --mem-layers"
            )
        return base, fot


def open_parts(opening: Opening, plan: Plan) -> Parts:
    """What a worker asks with until its process ends."""
    return opening.parts(plan, ExitStack())
