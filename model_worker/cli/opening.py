"""How a command opens what its options name: the memory, the model, the tokenizer."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from memory_service import DType, NotFound
from memory_service.errors import InvalidArgument
from model_worker import reference
from model_worker.settings import Recall, SelfExtend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from memory_service import Memory, MemorySpec, Tls
    from model_worker.decoder.model import FotModel

IN_MEMORY = ":memory:"
PATIENCE_S = 60.0  # Of every call to the memory that has no time of its own.
MEM_LAYER = 2  # Where no one says which; FoT's passkey models have their memory there.


def open_memory(
    target: str,
    name: str,
    token_file: str | Path | None = None,
    ca: Path | None = None,
    insecure: bool = False,
    spec: MemorySpec | None = None,
) -> Memory:
    """The memory that --memory, --name and the credentials name; with a spec it is created if there is none.

    Raises NotFound without a spec, and what `Memory.open` raises.
    """
    from memory_service import Memory  # Loads torch: fot --help does not wait for it.

    tls = tls_of(ca, target)
    return Memory.open(target, name, spec, token=token_file, tls=tls, insecure=insecure, timeout_s=PATIENCE_S)


def find_memory(
    target: str, name: str, token_file: str | Path | None = None, ca: Path | None = None, insecure: bool = False
) -> Memory | None:
    """`open_memory`, or None where there is none yet."""
    try:
        return open_memory(target, name, token_file, ca, insecure)
    except NotFound:
        return None


def load_model(
    directory: Path,
    memory: Memory | None,
    *,
    mem_layers: tuple[int, ...] | None = None,
    window: int | None = None,
    last_context: int | None = None,
    overlap: int | None = None,
    mem_dtype: DType | None = None,
    dtype: DType | None = None,
    device: str | None = None,
    threads: int | None = None,
    self_extend: SelfExtend | None = None,
    recall: Recall | None = None,
) -> FotModel:
    """The checkpoint with its memory, None for one in RAM; layers are by default the memory's, then the checkpoint's.

    Raises InvalidArgument if there is no checkpoint, UnsupportedModel, and WrongModel if the memory is another model's.
    """
    directory = checkpoint_of(directory)
    import torch

    from memory_service import Memory
    from model_worker.decoder.fitting import spec_of
    from model_worker.decoder.model import FotModel

    quiet()
    if threads is not None:
        torch.set_num_threads(threads)
    if memory is not None:
        if mem_dtype not in (None, memory.spec.dtype):
            raise InvalidArgument(f"memory {memory.name!r} stores {memory.spec.dtype}; leave --mem-dtype out")
        mem_layers, mem_dtype = mem_layers or memory.spec.layers, memory.spec.dtype
    model = FotModel.from_pretrained(
        directory,
        memory=memory or IN_MEMORY,
        mem_layers=mem_layers,
        recall=recall,
        dtype=None if dtype is None else dtype.torch,
        device=device,
        window=window,
        last_context_length=last_context,
        overlap=overlap,
        mem_dtype=mem_dtype,
        self_extend=self_extend,
    )
    if model.fot.mem_layers or mem_layers is not None:
        return model
    # Neither the caller nor a memory nor the checkpoint says which.
    fot = replace(model.fot, mem_layers=(min(MEM_LAYER, model.decoder.layers - 1),))
    base = model.detach()
    return FotModel(base, fot, Memory.open(IN_MEMORY, spec=spec_of(base, fot)), recall, owns_memory=True)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. Raises InvalidArgument if there is none."""
    directory = checkpoint_of(directory)
    from transformers import AutoTokenizer

    quiet()
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InvalidArgument(f"{directory} has no tokenizer that transformers can read: {reason}") from None


def tls_of(ca: Path | None, target: str) -> Tls | None:
    """What to trust, where the target may speak TLS: --ca may stand in the environment for other targets."""
    from memory_service import Tls

    speaks = "://" in target and not target.startswith("grpc://")
    return Tls(ca=ca) if ca is not None and speaks else None


def checkpoint_of(model: str | Path) -> Path:
    """What --model names: a directory, or a model that comes with the package. Nothing is ever downloaded.

    Raises InvalidArgument unless a checkpoint lies there.
    """
    directory = Path(model)
    if str(model) in reference.NAMES and not directory.is_dir():
        directory = reference.path(str(model))
    if not (directory / "config.json").is_file():
        raise InvalidArgument(
            f"{directory} is no checkpoint: it has no config.json; --model takes a directory, or "
            f"{', '.join(reference.NAMES)}, which come with the package"
        )
    return directory


def quiet() -> None:
    """No progress bars of transformers where nobody watches."""
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()
