"""A decoder with a memory: windows of a long input go to the memory, and memory layers attend to it.

    with FotModel.from_pretrained("path", memory="./corpus", mem_layers=(6, 12, 18)) as model:
        model.generate(**tokenizer("…", return_tensors="pt"), max_new_tokens=20)

B batch rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import MaxLengthCriteria
from transformers.modeling_outputs import CausalLMOutputWithPast

from memory_service import DType, FailedPrecondition, IndexPolicy, InvalidArgument, Memory, MemorySpec
from model_worker.errors import UnsupportedModel
from model_worker.hf import checkpoint
from model_worker.hf.decoder import Decoder
from model_worker.hf.fingerprint import fingerprint
from model_worker.loading import SessionStore, cut, load
from model_worker.positions.policy import Policy
from model_worker.positions.self_extend import advice, check_reach, reach
from model_worker.recall.reader import Reader
from model_worker.settings import Cut, FotConfig, Overflow, Recall, SelfExtend
from model_worker.state import State
from model_worker.steps import Piece, WindowStep
from model_worker.window import Window

LEASE_S = 3600.0
_LOG = logging.getLogger(__name__)
_DEFAULT_WINDOW = 2048


class FotModel(GenerationMixin):  # type: ignore[misc]  # transformers is read as Any
    """A Hugging Face decoder whose memory layers also attend to a memory; `generate` is Hugging Face's own."""

    main_input_name = "input_ids"  # What follows is asked by GenerationMixin.
    base_model_prefix = "base"
    _is_stateful = False
    _supports_cache_class = True

    def __init__(
        self,
        base: PreTrainedModel,
        fot: FotConfig,
        memory: Memory | None = None,
        recall: Recall | None = None,
        *,
        name: str | None = None,
        lease_s: float = LEASE_S,
        owns_memory: bool = False,
    ):
        """Attach to `base`, whose attention is in use until `detach` or `close`.

        `name` stands for the model in fingerprints, by default its path or hub id; `lease_s` is how long a session
        outlives its last use. Raises UnsupportedModel, InvalidArgument for layers or lengths that cannot be, and
        WrongModel if the memory holds another model's keys and values.
        """
        self.decoder = Decoder(base, fot.window)
        self.fot = fot
        self.base = base
        self.memory = memory
        self.recall = recall or Recall()
        self._lease_s = lease_s
        self._owns_memory = owns_memory
        _check(self.decoder, fot, memory)
        self._spec = _spec(self.decoder, fot, name) if fot.mem_layers else None
        if memory is not None and self._spec is not None:
            check_spec(memory.spec, self._spec)
        self.policies = _policies(self.decoder, fot)
        self._reader = Reader(memory) if memory is not None and fot.mem_layers else None
        self.generation_config: GenerationConfig = base.generation_config or GenerationConfig()
        self.decoder.attach()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        memory: Memory | str | Path | None = ":memory:",
        name: str = "default",
        token: str | Path | None = None,
        mem_layers: Sequence[int] | None = None,
        recall: Recall | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
        index: IndexPolicy | None = None,
        lease_s: float = LEASE_S,
        **fields: Any,
    ) -> Self:
        """The checkpoint at `path` with a memory: a `Memory`, or a target as of `Memory.open`, made if there is none.

        `mem_layers` and `fields` are those of `FotConfig`; what is not given comes from the checkpoint's configuration
        (LongLLaMA's, or one saved with a FotConfig), else from FotConfig's defaults. `name` and `token` choose the
        memory at the target. Raises what `__init__` and `Memory.open` raise.
        """
        base, kept = checkpoint.load(path, dtype=dtype, device=device, revision=revision)
        given = {key: value for key, value in fields.items() if value is not None}
        if mem_layers is not None:
            given["mem_layers"] = tuple(mem_layers)
        fot = _config(base, {**kept, **given})
        if memory is None or isinstance(memory, Memory):
            return cls(base, fot, memory, recall, lease_s=lease_s)
        if not fot.mem_layers:
            return cls(base, fot, None, recall, lease_s=lease_s)
        opened = Memory.open(memory, name, spec_of(base, fot, index=index), token=token)
        try:
            return cls(base, fot, opened, recall, lease_s=lease_s, owns_memory=True)
        except BaseException:
            opened.close()
            raise

    # --- what transformers asks ---

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    @property
    def spec(self) -> MemorySpec:
        """What a memory of this model must be. Raises InvalidArgument without memory layers."""
        if self._spec is None:
            raise InvalidArgument("a model without memory layers has no memory: give mem_layers=(…)")
        return self._spec

    def can_generate(self) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> Any:
        return self.base.get_experts_implementation()

    def set_experts_implementation(self, implementation: Any) -> None:
        self.base.set_experts_implementation(implementation)

    def eval(self) -> Self:
        self.base.eval()
        return self

    # --- one call ---

    def start(self, recall: Recall | None = None) -> State:
        """A state for a batch: pass it as `past_key_values`, close it when done."""
        window = Window(self.policies, self.device)
        return State(self.fot, window, self._reader, recall or self.recall, self._lease_s)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: State | None = None,
        use_cache: bool | None = True,
        logits_to_keep: int = 0,
        labels: Tensor | None = None,
        recall: Recall | None = None,
        return_dict: bool | None = True,
    ) -> CausalLMOutputWithPast:
        """Logits [B, kept, V] of the next tokens of every row, input_ids [B, T] with padding on the left.

        More than `last_context_length` tokens are cut into windows which go to memory. `attention_mask` [B, ≥ T] is 0
        on padding. `use_cache=False` sends the last window to memory too, which is how to load documents into a state.
        `logits_to_keep` 0 keeps all T: prefix windows then run through the whole stack. Raises InvalidArgument,
        InputTooLong (Self-Extend), SessionExpired, Unavailable and what else the memory answers.
        """
        if not self.decoder.attached:
            raise FailedPrecondition("this FotModel was detached from its model; make another")
        ids, pads = _checked(input_ids, attention_mask)
        own = past_key_values is None
        state = self.start(recall) if past_key_values is None else past_key_values
        if recall is not None:
            state.recall = recall
        try:
            state.begin(len(ids))
            logits = self._run(state, ids, pads, logits_to_keep, bool(use_cache))
        except BaseException:
            state.fail()
            if own:
                state.close()
            raise
        loss = None
        if labels is not None:
            if logits_to_keep:
                raise InvalidArgument("a loss needs the logits of all tokens: leave logits_to_keep at 0")
            loss = self.base.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
        if own and not use_cache:
            state.close()
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=cast(Any, None if own and not use_cache else state)
        )

    __call__ = forward

    def _run(self, state: State, ids: Tensor, pads: list[int], keep: int, use_cache: bool) -> Tensor:
        total = ids.shape[1]
        texts = [row[pad:].cpu() for row, pad in zip(ids, pads, strict=True)]
        prefix = self._prefix(total, pads)
        wanted = keep == 0 or keep > total - max(prefix, default=0)
        found: Tensor | None = None  # [B, T, V] when logits of loaded windows are wanted too

        def on_logits(piece: Piece, logits: Tensor) -> None:
            nonlocal found
            found = logits.new_zeros(len(ids), total, logits.shape[-1]) if found is None else found
            found[piece.row, pads[piece.row] + piece.fresh : pads[piece.row] + piece.stop] = logits[piece.kept]

        if any(prefix):
            if any(state.window.held(row) for row in range(state.batch)):
                self._walk(state, texts, prefix, on_logits if wanted else None)
            else:
                self._load(state, texts, prefix, pads, on_logits if wanted else None)
        rest = [text[stop:] for text, stop in zip(texts, prefix, strict=True)]
        last = min(total, self.fot.last_context_length)
        width = total if not any(prefix) else last if self.fot.cut is Cut.BATCH else 1
        rest_ids, rest_pads = self._padded(rest, width)
        logits = self._feed(state, rest_ids, rest_pads, rest, keep if not wanted else 0)
        if not use_cache:
            state.send_all()
        if found is not None:
            for row, (pad, text) in enumerate(zip(rest_pads, rest, strict=True)):
                if len(text):
                    found[row, total - len(text) :] = logits[row, pad:]
            logits = found
        return logits[:, -keep:] if keep else logits

    def _prefix(self, total: int, pads: Sequence[int]) -> list[int]:
        """How many of each row's tokens go to memory before the last window."""
        last = self.fot.last_context_length
        if self._reach is not None:
            return [0] * len(pads)
        if self.fot.cut is Cut.BATCH:
            return [max(total - last - pad, 0) for pad in pads]
        return [max(total - pad - last, 0) for pad in pads]

    @property
    def _reach(self) -> int | None:
        """The most tokens a row may have where none can leave its window."""
        if self.fot.self_extend is None or self.fot.mem_layers:
            return None
        return reach(self.fot.self_extend, self.decoder.trained_length)

    def _load(self, state: State, texts: list[Tensor], prefix: list[int], pads: list[int], on_logits: Any) -> None:
        fot = self.fot
        shifts = pads if fot.cut is Cut.BATCH else [0] * len(pads)
        overlap = 0 if fot.cut is Cut.BATCH else fot.overlap
        pieces = [
            piece
            for row, stop in enumerate(prefix)
            for piece in cut(row, stop, fot.window, overlap, shifts[row])
        ]  # fmt: skip
        store = SessionStore(self._reader, state.rows, texts, state.recall) if self._reader is not None else None
        load(self.decoder, fot, self.policies, pieces, texts, store, on_logits)
        if store is not None:
            store.finish(prefix)
        for row, stop in enumerate(prefix):
            state.texts[row] = torch.cat([state.texts[row], texts[row][:stop]])

    def _walk(self, state: State, texts: list[Tensor], prefix: list[int], on_logits: Any) -> None:
        """Windows one after another, on top of what the rows' windows hold already."""
        size = self.fot.window
        for start in range(0, max(prefix), size):
            parts = [text[start : min(start + size, stop)] for text, stop in zip(texts, prefix, strict=True)]
            ids, pads = self._padded(parts, 0)
            logits = self._feed(state, ids, pads, parts, 0 if on_logits is not None else 1)
            for row, part in enumerate(parts):
                if on_logits is not None and len(part):
                    on_logits(Piece(row, start, start + len(part), start), logits[row, pads[row] :])

    def _padded(self, texts: list[Tensor], least: int) -> tuple[Tensor, list[int]]:
        """Texts of unequal lengths as one batch with padding on the left."""
        longest = max([least, *(len(text) for text in texts)])
        ids = torch.zeros(len(texts), longest, dtype=torch.int64)
        for row, text in enumerate(texts):
            ids[row, longest - len(text) :] = text
        return ids, [longest - len(text) for text in texts]

    def _feed(self, state: State, ids: Tensor, pads: list[int], texts: list[Tensor], keep: int) -> Tensor:
        """Run [B, n] tokens on top of the rows' windows; logits [B, keep or n, V]."""
        state.make_room(ids.shape[1], pads, self._reach)
        step = WindowStep(state.window, self.fot.mem_layers, state)
        logits = self.decoder.logits(ids.to(self.device), step, keep)
        state.window.advance(ids.shape[1])
        state.texts = [torch.cat([old, new]) for old, new in zip(state.texts, texts, strict=True)]
        return logits

    # --- many calls ---

    def generate(self, inputs: Tensor | None = None, *, recall: Recall | None = None, **kwargs: Any) -> Any:
        """Hugging Face's `generate`; `recall` says what may be remembered and how the memory is asked.

        With `past_key_values=State` it goes on from there: give the whole conversation, or only what the state has not
        seen. Without, the sessions of the call are closed at its end.
        """
        state = kwargs.pop("past_key_values", None)
        if kwargs.get("use_cache") is False:
            raise InvalidArgument("generate needs use_cache=True: without it every step would load the prompt again")
        if kwargs.get("assistant_model") is not None or kwargs.get("prompt_lookup_num_tokens"):
            raise InvalidArgument("assisted generation takes tokens back, which a memory cannot; leave it off")
        if state is not None and recall is not None:
            state.recall = recall
        keeps = bool(kwargs.get("return_dict_in_generate"))
        own = self.start(recall) if state is None else None
        try:
            with torch.no_grad():
                return super().generate(inputs, past_key_values=own or state, **kwargs)
        except BaseException:
            keeps = False
            raise
        finally:
            if own is not None and not keeps:
                own.close()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: State | None = None,
        attention_mask: Tensor | None = None,
        is_first_iteration: bool | None = False,
        use_cache: bool | None = True,
        logits_to_keep: int = 1,
        **_: Any,
    ) -> dict[str, Any]:
        """The tokens the state has not seen; asked by transformers' generate."""
        fresh = 1
        if is_first_iteration or past_key_values is None:
            seen = past_key_values.texts if past_key_values is not None else []
            fresh = input_ids.shape[1] - _repeated(input_ids, attention_mask, seen)
        return {
            "input_ids": input_ids[:, -fresh:],
            "attention_mask": None if attention_mask is None else attention_mask[:, -fresh:],
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> Any:
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for one in criteria:
            if isinstance(one, MaxLengthCriteria):
                # It would warn that the text is longer than the window: that is what the memory is for.
                one.max_position_embeddings = None
        return criteria

    # --- letting go ---

    @contextmanager
    def off(self) -> Iterator[PreTrainedModel]:
        """The untouched transformers model for a while."""
        with self.decoder.off() as base:
            yield base

    def detach(self) -> PreTrainedModel:
        """Give the transformers model back as it was; this FotModel is done. Harmless twice."""
        self.decoder.detach()
        return self.base

    def close(self) -> None:
        """Detach, and close the memory if `from_pretrained` opened it. Harmless twice."""
        self.decoder.detach()
        if self._reader is not None:
            self._reader.close()
        if self._owns_memory and self.memory is not None:
            self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        layers = list(self.fot.mem_layers)
        return f"<FotModel {type(self.base).__name__}, memory layers {layers}, {self.memory!r}>"


def spec_of(
    base: PreTrainedModel, fot: FotConfig, name: str | None = None, index: IndexPolicy | None = None
) -> MemorySpec:
    """What a memory of this model's keys and values must be. Raises InvalidArgument without memory layers.

    `name` stands for the model in the fingerprint, by default the last part of its path or hub id.
    """
    decoder = Decoder(base, fot.window)
    _check_layers(decoder, fot)
    return _spec(decoder, fot, name, index)


def _spec(decoder: Decoder, fot: FotConfig, name: str | None, index: IndexPolicy | None = None) -> MemorySpec:
    base = decoder.base
    called = name or str(base.config._name_or_path or "").rstrip("/").rsplit("/", 1)[-1] or type(base).__name__
    return MemorySpec(
        fingerprint=fingerprint(base, fot.mem_layers, called),
        layers=fot.mem_layers,
        kv_heads=decoder.kv_heads,
        head_dim=decoder.head_dim,
        dtype=fot.mem_dtype,
        index=index or IndexPolicy(),
    )


def check_spec(have: MemorySpec, want: MemorySpec) -> None:
    """Raise WrongModel or InvalidArgument unless a memory is one of this model's."""
    # The name is for people: the same weights under another path are the same model.
    have.check_model(replace(want.fingerprint, model=have.fingerprint.model, revision=have.fingerprint.revision))
    if (have.layers, have.kv_heads, have.head_dim) != (want.layers, want.kv_heads, want.head_dim):
        raise InvalidArgument(
            f"the memory keeps layers {list(have.layers)} of {have.kv_heads} heads of {have.head_dim}; the model has "
            f"memory layers {list(want.layers)} of {want.kv_heads} heads of {want.head_dim}: open it with mem_layers="
            f"{list(have.layers)}, or use another memory"
        )


def _check_layers(decoder: Decoder, fot: FotConfig) -> None:
    unknown = [layer for layer in fot.mem_layers if not 0 <= layer < decoder.layers]
    if unknown:
        raise InvalidArgument(f"mem_layers {unknown} are not layers of the model, which has 0 to {decoder.layers - 1}")


def _check(decoder: Decoder, fot: FotConfig, memory: Memory | None) -> None:
    _check_layers(decoder, fot)
    if fot.mem_layers and memory is None:
        raise InvalidArgument("memory layers need a memory: give memory=':memory:', a folder or grpc://host:port")
    if memory is not None and fot.mem_layers and memory.spec.layers != fot.mem_layers:
        raise InvalidArgument(
            f"the memory keeps layers {list(memory.spec.layers)}, the model was given mem_layers="
            f"{list(fot.mem_layers)}; they must be the same"
        )
    if fot.mem_layers and decoder.softcap is not None:
        raise UnsupportedModel(
            "attention scores are capped in this architecture, which a memory cannot do for its keys"
        )
    for layer in fot.mem_layers:
        width = decoder.sliding(layer)
        if width is not None and width < max(fot.window, fot.last_context_length):
            raise InvalidArgument(
                f"layer {layer} sees only {width} tokens back, less than the window of {fot.window}: tokens would be "
                "in neither window nor memory. Choose a smaller window or a layer that sees everything"
            )
    if fot.self_extend is not None:
        _check_self_extend(decoder, fot, fot.self_extend)


def _check_self_extend(decoder: Decoder, fot: FotConfig, extend: SelfExtend) -> None:
    if all(decoder.sliding(layer) is not None for layer in range(decoder.layers)):
        raise InvalidArgument(
            "every layer of this model slides over a part of the window, so Self-Extend changes nothing: load it with "
            "config.sliding_window = None"
        )
    if fot.mem_layers:
        longest = max(fot.window, fot.last_context_length)
        check_reach(extend, decoder.trained_length, longest)
        if (told := advice(extend, decoder.trained_length, longest)) is not None:
            _LOG.warning(told)


def _policies(decoder: Decoder, fot: FotConfig) -> list[Policy]:
    policies = []
    for layer in range(decoder.layers):
        extend = fot.self_extend if decoder.sliding(layer) is None else None
        if extend is not None and extend.scale_base is None:
            extend = replace(extend, scale_base=decoder.trained_length)
        rotates = fot.mem_positionals or layer not in fot.mem_layers
        policies.append(Policy(decoder.rope(layer), fot, extend, rotates))
    return policies


def _config(base: PreTrainedModel, fields: dict[str, Any]) -> FotConfig:
    """FotConfig with lengths that suit the model, where nothing says otherwise."""
    trained = int(getattr(base.config.get_text_config(decoder=True), "max_position_embeddings", _DEFAULT_WINDOW))
    fields = dict(fields)
    window = fields.setdefault("window", min(trained, _DEFAULT_WINDOW))
    fields.setdefault("last_context_length", max(1, window // 2))
    for name, kind in (("mem_dtype", DType), ("overflow", Overflow), ("cut", Cut)):
        if name in fields:
            fields[name] = kind(fields[name])
    return FotConfig(**fields)


def _checked(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, list[int]]:
    """Token ids [B, T] and each row's padding. Raises InvalidArgument unless padding is on the left only."""
    if input_ids.ndim != 2 or input_ids.shape[1] < 1 or input_ids.is_floating_point():
        raise InvalidArgument(f"input_ids must be whole numbers [batch, tokens ≥ 1], got {list(input_ids.shape)}")
    batch, total = input_ids.shape
    if attention_mask is None:
        return input_ids, [0] * batch
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < total:
        raise InvalidArgument(
            f"attention_mask must be [{batch}, ≥ {total}] with 0 on padding, got {list(attention_mask.shape)}"
        )
    real = attention_mask[:, -total:] != 0
    pads = (~real).sum(1)
    if not bool((real == (torch.arange(total, device=real.device) >= pads[:, None])).all()):
        raise InvalidArgument("padding must stand on the left of every row: set tokenizer.padding_side = 'left'")
    return input_ids, pads.tolist()


def _repeated(input_ids: Tensor, attention_mask: Tensor | None, seen: Sequence[Tensor]) -> int:
    """How many of the first columns the state has seen already, because the whole conversation was given."""
    if not seen or not any(len(text) for text in seen):
        return 0
    real = [row if attention_mask is None else row[attention_mask[i] != 0] for i, row in enumerate(input_ids.cpu())]
    longer = all(len(row) > len(text) for row, text in zip(real, seen, strict=False))
    if len(real) != len(seen) or not longer:
        return 0
    if not all(bool((row[: len(text)] == text).all()) for row, text in zip(real, seen, strict=True)):
        return 0
    left = {len(row) - len(text) for row, text in zip(real, seen, strict=True)}
    return input_ids.shape[1] - max(left)
