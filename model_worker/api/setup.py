"""Everything a served worker is made of, from plain values: what the command line and a cluster's replicas share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoTokenizer

from memory_service import DType, Tls
from memory_service.errors import InvalidArgument
from model_worker.api.keys import Keys
from model_worker.api.limits import Limits
from model_worker.api.tenants import Tenants
from model_worker.api.worker import Worker
from model_worker.decoder.model import FotModel
from model_worker.serving.batcher import Batcher
from model_worker.serving.settings import BatchSettings
from model_worker.settings import SelfExtend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IN_MEMORY = ":memory:"


@dataclass(frozen=True, slots=True)
class Setup:
    """A model, where its callers' memories are, and who may call. Paths are those of the machine that opens it."""

    model: Path  # A checkpoint with a tokenizer.
    name: str  # What callers call it.
    target: str  # Of the memory service: as of `Memory.open`.
    keys: Path | None = None  # API keys; None: everybody is the one tenant.
    memory_tokens: Path | None = None  # A directory with a memory token for every tenant.
    ca: Path | None = None
    insecure: bool = False
    chat_template: str | None = None  # None: the tokenizer's.
    mem_layers: tuple[int, ...] | None = None  # None: the checkpoint's.
    window: int | None = None  # Tokens.
    last_context: int | None = None  # Tokens.
    mem_dtype: DType | None = None
    dtype: DType | None = None
    device: str | None = None
    threads: int | None = None
    self_extend: SelfExtend | None = None
    limits: Limits = field(default_factory=Limits)
    batch: BatchSettings = field(default_factory=BatchSettings)

    @contextmanager
    def open(self) -> Iterator[tuple[Worker, Keys]]:
        """The worker and its keys while the block runs; answers under way are finished at its end.

        Raises InvalidArgument without a checkpoint, a tokenizer or memory layers, and what opening a memory raises.
        """
        keys = Keys(self.keys, self.memory_tokens)
        with ExitStack() as closing:
            model = closing.enter_context(self._model())
            tokenizer = self._tokenizer()
            tls = Tls(ca=self.ca) if self.ca is not None and self.target.startswith("grpcs://") else None
            tenants = Tenants(self.target, keys, tls=tls, insecure=self.insecure)
            closing.callback(tenants.close)
            batcher = Batcher(model, tokenizer, self.batch)
            closing.callback(batcher.close, drain=True)
            worker = Worker(self.name, model, tokenizer, batcher, tenants, self.limits)
            closing.callback(worker.close)
            yield worker, keys

    def _model(self) -> FotModel:
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        model = FotModel.from_pretrained(
            self.model,
            memory=IN_MEMORY,  # Of prompts whose caller names no collection.
            mem_layers=self.mem_layers,
            dtype=None if self.dtype is None else self.dtype.torch,
            device=self.device,
            window=self.window,
            last_context_length=self.last_context,
            mem_dtype=self.mem_dtype,
            self_extend=self.self_extend,
        )
        if not model.fot.mem_layers:
            model.close()
            raise InvalidArgument(f"{self.model} does not say which layers have a memory: give --mem-layers")
        return model

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.model, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise InvalidArgument(f"{self.model} has no tokenizer that transformers can read: {reason}") from None
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template
        return tokenizer
