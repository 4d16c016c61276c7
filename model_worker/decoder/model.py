"""A decoder with a memory: windows of a long input go to the memory, and memory layers attend to it.

    with FotModel.from_pretrained("path", memory="./corpus", mem_layers=(6, 12, 18)) as model:
        model.generate(**tokenizer("…", return_tensors="pt"), max_new_tokens=20)

B batch rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, PreTrainedModel
from transformers.generation import MaxLengthCriteria
from transformers.modeling_outputs import CausalLMOutputWithPast

from memory_service import FailedPrecondition, IndexPolicy, InvalidArgument, Memory, MemorySpec
from model_worker.decoder.feeding import Feeder, Slice
from model_worker.decoder.fitting import check_fit, check_spec, config_of, policies_of, spec_for, spec_of, try_out
from model_worker.decoder.inputs import checked, unseen
from model_worker.decoder.state import State
from model_worker.decoder.window import Window
from model_worker.hf import checkpoint
from model_worker.hf.decoder import Decoder
from model_worker.recall.reader import Reader
from model_worker.settings import FotConfig, Recall

LEASE_S = 3600.0


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
        try_out(self.decoder)
        self.fot = fot
        self.base = base
        self.memory = memory
        self.recall = recall or Recall()
        self._lease_s = lease_s
        self._owns_memory = owns_memory
        check_fit(self.decoder, fot, memory)
        self._spec = spec_for(self.decoder, fot, name) if fot.mem_layers else None
        if memory is not None and self._spec is not None:
            check_spec(memory.spec, self._spec)
        self.policies = policies_of(self.decoder, fot)
        self._reader = Reader(memory) if memory is not None and fot.mem_layers else None
        self._generations: dict[tuple[tuple[str, Any], ...], GenerationConfig] = {}
        self._feeder = Feeder(self.decoder, fot, self.policies)
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
        fot = config_of(base, {**kept, **given})
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

    def start(self, recall: Recall | None = None, reader: Reader | None = None) -> State:
        """A state for a batch: pass it as `past_key_values`, close it when done. `reader` is by default the model's."""
        window = Window(self.policies, self.device)
        return State(self.fot, window, reader or self._reader, recall or self.recall, self._lease_s)

    def reader_of(self, memory: Memory) -> Reader:
        """A reader of another memory of this model's kind, for `start`; close it when done. Raises WrongModel."""
        check_spec(memory.spec, self.spec)
        return Reader(memory)

    @torch.no_grad()
    def slices(self, state: State, ids: Sequence[int], allowed: Callable[[], int]) -> Iterator[Slice]:
        """Feed the tokens of one row piece by piece, each of about as many tokens as `allowed` says when it begins.

        What `forward` would do at once, for who has other work in between; raises what it raises.
        """
        state.begin(1)
        yield from self._guarded(state, self._feeder.slices(state, ids, allowed))

    def _guarded(self, state: State, slices: Iterator[Slice]) -> Iterator[Slice]:
        try:
            yield from slices
        except BaseException:
            state.fail()
            raise

    def fits(self, tokens: int) -> bool:
        """Whether a text of so many tokens can be read by `read` together with others."""
        return self._feeder.fits(tokens)

    @torch.no_grad()
    def read(self, states: Sequence[State], ids: Sequence[Sequence[int]]) -> tuple[State, Tensor]:
        """Feed texts that `fits`, one for each state of one row, together: the rows as one state, logits [B, V].

        The states are empty then, whatever happens; what goes wrong with one row is kept in its line.
        """
        together = self.start()
        try:
            for state in states:
                state.begin(1)
                together.admit(state)
            return together, self._feeder.texts(together, ids)
        except BaseException:
            together.close()
            raise

    @torch.no_grad()
    def step(self, state: State, ids: Sequence[int]) -> Tensor:
        """Logits [B, V] after one more token of every row; `forward` with less around it."""
        state.begin(len(ids))
        try:
            return self._feeder.step(state, ids)
        except BaseException:
            state.fail()
            raise

    def scorers(
        self, prompt_tokens: int, max_new_tokens: int, settings: Mapping[str, Any]
    ) -> tuple[LogitsProcessorList, frozenset[int]]:
        """What `generate` with these settings puts between logits and choice, and the tokens that end its text."""
        name = tuple(sorted(settings.items()))
        if name not in self._generations:
            config, _ = self._prepare_generation_config(None, **settings)
            self._prepare_special_tokens(config, device=self.device)
            self._generations[name] = config
        config = copy.copy(self._generations[name])
        config.max_length = prompt_tokens + max_new_tokens
        ends = config._eos_token_tensor
        processors = self._get_logits_processor(config, input_ids_seq_length=prompt_tokens, device=str(self.device))
        return processors, frozenset([] if ends is None else ends.tolist())

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
        ids, pads = checked(input_ids, attention_mask)
        own = past_key_values is None
        state = self.start(recall) if past_key_values is None else past_key_values
        if recall is not None:
            state.recall = recall
        try:
            state.begin(len(ids))
            logits = self._feeder.run(state, ids, pads, logits_to_keep, bool(use_cache))
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
        given = inputs if inputs is not None else kwargs.get("input_ids")
        if given is not None and kwargs.get("attention_mask") is None:
            # Else transformers would take the padding token for padding wherever it stands.
            kwargs["attention_mask"] = torch.ones_like(given)
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
            fresh = input_ids.shape[1]
            fresh_tokens = unseen(
                input_ids, attention_mask, past_key_values.texts if past_key_values is not None else []
            )
            if fresh_tokens is not None:
                fresh = int(fresh_tokens.max())
                # What a row with less to say has said before stands where padding would.
                attention_mask = (torch.arange(fresh, device=input_ids.device) >= fresh - fresh_tokens[:, None]).long()
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
