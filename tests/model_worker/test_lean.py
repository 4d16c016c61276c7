"""The lean pass stores what transformers' own layers would, and stands back wherever it might not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from memory_service import DType, Memory, Partial
from model_worker.attention import strips
from model_worker.attention.room import Room
from model_worker.decoder import loading
from model_worker.decoder.loading import cut, load
from model_worker.decoder.model import FotModel, policies_of, spec_of
from model_worker.decoder.steps import Piece
from model_worker.hf import lean
from model_worker.hf.crew import Crew
from model_worker.hf.decoder import Decoder
from model_worker.hf.lean import lean_of
from model_worker.positions.rope import Rope, rotate
from model_worker.recall.reader import Promise
from model_worker.settings import FotConfig, SelfExtend
from tests.model_worker import oracle
from tests.model_worker.test_architectures import LLAMA3, YARN
from tests.model_worker.texts import padded, text
from tests.model_worker.tiny import ARCHITECTURES, FURTHER, tiny_model

FOT = FotConfig(mem_layers=(2,), window=24, last_context_length=12, mem_dtype=DType.F32, block_tokens=64)
SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "llama without groups": ("llama", {"num_key_value_heads": 4}),
    "llama with one key head": ("llama", {"num_key_value_heads": 1}),
    "llama with wide heads": ("llama", {"head_dim": 16}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama with a large epsilon": ("llama", {"rms_norm_eps": 0.1}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "llama llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama with tied weights": ("llama", {"tie_word_embeddings": True}),
    "mistral sliding over more than a window": ("mistral", {"sliding_window": 24}),
    "qwen2 sliding above": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}),
}


@dataclass
class Kept:
    """A store that keeps what it is given: keys and values [T, K, D] of every text, and in which order pieces came."""

    keys: dict[int, list[Tensor]] = field(default_factory=dict)
    values: dict[int, list[Tensor]] = field(default_factory=dict)
    order: list[Piece] = field(default_factory=list)

    def append(self, layer: int, pieces: Sequence[Piece], keys: Tensor, values: Tensor) -> None:
        for number, piece in enumerate(pieces):
            self.order.append(piece)
            for held, given in ((self.keys, keys), (self.values, values)):
                held.setdefault(piece.row, []).append(given[number, :, piece.kept].transpose(0, 1).clone())

    def attend(self, layer: int, pieces: Sequence[Piece], queries: Tensor, scale: float) -> Promise[Partial] | None:
        return None


@pytest.fixture(autouse=True)
def _short_texts_are_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lean, "_LEAST_TOKENS", 1)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def made(variant: str = "llama") -> PreTrainedModel:
    architecture, overrides = SERVED[variant]
    base = tiny_model(architecture, **overrides)
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):  # Zero, as they are made.
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return base


@contextmanager
def attached(base: PreTrainedModel, fot: FotConfig = FOT) -> Iterator[Decoder]:
    decoder = Decoder(base, fot.window)
    decoder.attach()
    yield decoder
    decoder.detach()


def pieces_of(texts: Sequence[Tensor], fot: FotConfig, overlap: int = 0) -> list[Piece]:
    return [piece for row, ids in enumerate(texts) for piece in cut(row, len(ids), fot.window, overlap)]


def stored(decoder: Decoder, texts: Sequence[Tensor], fot: FotConfig = FOT, overlap: int = 0) -> Kept:
    store = Kept()
    load(decoder, fot, policies_of(decoder, fot), pieces_of(texts, fot, overlap), texts, store)
    return store


def ordinarily(decoder: Decoder, texts: Sequence[Tensor], fot: FotConfig = FOT, overlap: int = 0) -> Kept:
    """What the layers themselves store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "lean_of", lambda *_: None)
        return stored(decoder, texts, fot, overlap)


def check_same(have: Kept, want: Kept) -> None:
    assert have.keys.keys() == want.keys.keys()
    for ours, theirs in ((have.keys, want.keys), (have.values, want.values)):
        for row, parts in theirs.items():
            torch.testing.assert_close(torch.cat(ours[row]), torch.cat(parts), atol=1e-5, rtol=1e-5)


def taken(decoder: Decoder, fot: FotConfig = FOT) -> bool:
    return lean_of(decoder, fot, 4096, fot.window) is not None


# --- It equals transformers' own pass -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", SERVED)
@pytest.mark.parametrize("overlap", [0, 7])
def test_it_stores_what_transformers_layers_would(variant: str, overlap: int) -> None:
    # Windows of one token, of all lengths up to a window's, and whole ones, side by side.
    texts = [text(1), text(24, seed=2), text(25, seed=3), text(131, seed=4)]
    with attached(made(variant)) as decoder:
        assert taken(decoder)
        check_same(stored(decoder, texts, overlap=overlap), ordinarily(decoder, texts, overlap=overlap))


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("overlap", [0, 7])
def test_any_layer_can_be_the_memory_layer(layer: int, overlap: int) -> None:
    texts, fot = [text(90), text(10, seed=2)], replace(FOT, mem_layers=(layer,))
    with attached(made("llama with biases")) as decoder:
        assert taken(decoder, fot)
        check_same(stored(decoder, texts, fot, overlap), ordinarily(decoder, texts, fot, overlap))


@torch.no_grad()
def test_windows_longer_than_a_strip_of_queries_are_the_same() -> None:
    texts, fot = [text(500), text(77, seed=2)], replace(FOT, window=200, block_tokens=1000)
    with attached(made(), fot) as decoder:
        assert taken(decoder, fot)
        check_same(stored(decoder, texts, fot, 70), ordinarily(decoder, texts, fot, 70))


@torch.no_grad()
def test_a_model_of_one_layer_is_tried_and_served() -> None:
    fot = replace(FOT, mem_layers=(0,))
    with attached(tiny_model(num_hidden_layers=1), fot) as decoder:
        assert taken(decoder, fot)
        check_same(stored(decoder, [text(60)], fot), ordinarily(decoder, [text(60)], fot))


@torch.no_grad()
def test_weights_changed_between_two_loads_are_the_ones_used() -> None:
    base = made()
    with attached(base) as decoder:
        before = stored(decoder, [text(60)])
        base.model.layers[0].self_attn.q_proj.weight.mul_(3)
        base.model.layers[1].post_attention_layernorm.weight.mul_(2)
        after = stored(decoder, [text(60)])
        check_same(after, ordinarily(decoder, [text(60)]))
    assert not torch.allclose(torch.cat(before.values[0]), torch.cat(after.values[0]), atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_changes_nothing(default: torch.dtype) -> None:
    with attached(made()) as decoder:
        want = ordinarily(decoder, [text(60)])
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            check_same(stored(decoder, [text(60)]), want)
        finally:
            torch.set_default_dtype(before)


@torch.no_grad()
def test_it_reads_the_model_and_changes_nothing() -> None:
    base = made("llama with biases")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with attached(base) as decoder:
        stored(decoder, [text(60)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_long_prompt_is_answered_as_by_the_oracle(
    mode: Callable[[], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, rows = made().requires_grad_(False), [text(205), text(60, seed=2), text(9, seed=3)]
    passes: list[object] = []
    monkeypatch.setattr(loading, "lean_of", lambda *args: passes.append(lean_of(*args)) or passes[-1])
    with Memory.open(":memory:", spec=spec_of(base, FOT)) as memory, FotModel(base, FOT, memory) as model, mode():
        out = model(**padded(rows), logits_to_keep=1).logits
    assert passes != [] and None not in passes
    for row, logits in zip(rows, out, strict=True):
        want, _ = oracle.expected(base, row, FOT)
        torch.testing.assert_close(logits[-1], want[-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (64, 64), (65, 70), (130, 131), (200, 200)])
@pytest.mark.parametrize("group", [1, 3])
def test_strips_are_causal_attention_of_the_newest_queries(queries: int, keys: int, group: int) -> None:
    dim, heads, generator = 8, 2, torch.Generator().manual_seed(keys)
    query = torch.randn(2, queries, heads, group, dim, generator=generator)
    key, value = torch.randn(2, 2, keys, heads, dim, generator=generator).unbind()
    angles = Rope(1 / 50 ** (torch.arange(dim // 2) / dim)).angles(torch.arange(keys + 3), torch.float32)
    pairs = strips.paired(dim)
    found = strips.causal(query[..., pairs], key[..., pairs], value, strips.turns(angles), Room())
    far = angles.cos[:keys], angles.sin[:keys]
    turned = rotate(key.transpose(1, 2), type(angles)(*far))  # [B, K, n, D]
    asked = rotate(query.flatten(2, 3).transpose(1, 2), type(angles)(*(x[-queries:] for x in far)))
    scores = asked @ turned.repeat_interleave(group, 1).mT
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    want = weights @ value.transpose(1, 2).repeat_interleave(group, 1)  # [B, H, m, D]
    torch.testing.assert_close(found.view(2, queries, -1, dim), want.transpose(1, 2), atol=1e-5, rtol=0)


# --- It stands back -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("architecture", sorted({*ARCHITECTURES, *FURTHER} - {"llama", "mistral", "qwen2"}))
def test_other_architectures_go_their_own_way(architecture: str) -> None:
    with attached(tiny_model(architecture)) as decoder:
        assert not taken(decoder)


@torch.no_grad()
@pytest.mark.parametrize(
    ("variant", "overrides", "fot"),
    [
        pytest.param("llama", {}, replace(FOT, mem_layers=(1, 3)), id="several memory layers"),
        pytest.param("llama", {}, replace(FOT, self_extend=SelfExtend(group=4, window=8)), id="Self-Extend"),
        pytest.param("mistral", {"sliding_window": 16}, FOT, id="layers below see less than a window"),
        pytest.param("llama", {}, replace(FOT, window=strips.LONGEST + 1), id="windows too long for a cache"),
        pytest.param("llama", {"hidden_act": "gelu"}, FOT, id="another feed-forward"),
    ],
)
def test_settings_it_does_not_know_go_the_ordinary_way(variant: str, overrides: dict[str, Any], fot: FotConfig) -> None:
    with attached(tiny_model(variant, **overrides), fot) as decoder:
        assert not taken(decoder, fot)


@torch.no_grad()
def test_neither_short_loads_nor_large_models_get_matrices_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    with attached(made()) as decoder:
        monkeypatch.setattr(lean, "_LEAST_TOKENS", 5000)
        assert lean_of(decoder, FOT, 4999, 24) is None
        assert lean_of(decoder, FOT, 5000, 24) is not None
        monkeypatch.setattr(lean, "_MOST_BYTES", 50_000)
        assert lean_of(decoder, FOT, 5000, 24) is None
        assert lean_of(decoder, replace(FOT, mem_layers=(0,)), 5000, 24) is not None


class Odd(nn.Linear):
    """A layer somebody put in place of another."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Quantised(Tensor):
    """Weights that say float32 and are not."""


def exchanged(base: PreTrainedModel) -> None:
    base.model.layers[1].mlp.up_proj = Odd(32, 64, bias=False)


def overridden(base: PreTrainedModel) -> None:
    norm = base.model.layers[0].input_layernorm
    norm.forward = lambda x: x


def hooked(base: PreTrainedModel) -> None:
    base.model.layers[1].self_attn.v_proj.register_forward_hook(lambda _, __, out: 2 * out)


def listened_to(base: PreTrainedModel) -> None:
    base.model.layers[2].register_forward_pre_hook(lambda *_: None)


def embedding_hooked(base: PreTrainedModel) -> None:
    base.model.embed_tokens.register_forward_hook(lambda _, __, out: 2 * out)


def stack_hooked(base: PreTrainedModel) -> None:
    base.model.register_forward_pre_hook(lambda *_: None)


def quantised(base: PreTrainedModel) -> None:
    linear = base.model.layers[0].mlp.down_proj
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Quantised), requires_grad=False)


def partly_double(base: PreTrainedModel) -> None:
    base.model.layers[1].input_layernorm.double()


def half(base: PreTrainedModel) -> None:
    base.to(torch.bfloat16)


def elsewhere(base: PreTrainedModel) -> None:
    base.model.layers[1].mlp.to("meta")


def pruned(base: PreTrainedModel) -> None:
    nn.utils.parametrize.register_parametrization(base.model.layers[0].mlp.gate_proj, "weight", nn.ReLU())


CHANGES = [
    exchanged, overridden, hooked, listened_to, embedding_hooked, stack_hooked, quantised, partly_double, half,
    elsewhere, pruned,
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_a_stack_that_was_changed_goes_the_ordinary_way(change: Callable[[PreTrainedModel], None]) -> None:
    base = made()
    with attached(base) as decoder:
        assert taken(decoder)
        change(base)
        assert not taken(decoder)


@torch.no_grad()
def test_what_a_hook_does_to_a_projection_reaches_the_memory() -> None:
    base = made()
    with attached(base) as decoder:
        plain = stored(decoder, [text(60)])
        hook = base.model.layers[2].self_attn.v_proj.register_forward_hook(lambda _, __, out: 2 * out)
        doubled = stored(decoder, [text(60)])
        hook.remove()
        assert taken(decoder)
    torch.testing.assert_close(torch.cat(doubled.values[0]), 2 * torch.cat(plain.values[0]), atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_hook_on_all_modules_is_a_hook() -> None:
    with attached(made()) as decoder:
        handle = nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
        try:
            assert not taken(decoder)
        finally:
            handle.remove()
        assert taken(decoder)


def test_where_gradients_may_be_wanted_the_ordinary_pass_runs() -> None:
    with attached(made()) as decoder:
        assert not taken(decoder)
        with torch.no_grad():
            assert taken(decoder)


@torch.no_grad()
def test_autocast_goes_the_ordinary_way() -> None:
    with attached(made()) as decoder:
        assert taken(decoder)
        with torch.autocast("cpu", torch.bfloat16):
            assert not taken(decoder)


@torch.no_grad()
def test_a_class_that_computes_something_else_fails_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 1.01 * feed(self, x))
    with attached(made()) as decoder:
        assert not taken(decoder)
        check_same(stored(decoder, [text(60)]), ordinarily(decoder, [text(60)]))
        decoder.detach()
        monkeypatch.undo()
        monkeypatch.setattr(lean, "_LEAST_TOKENS", 1)
        decoder.attach()
        assert taken(decoder)


# --- Passes side by side --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_passes_on_two_threads_store_the_same_in_the_same_order(
    mode: Callable[[], AbstractContextManager[None]], two_threads: None
) -> None:
    texts = [text(300, seed=seed) for seed in range(3)]
    heard: list[int] = []
    with attached(made()) as decoder, mode():
        assert taken(decoder)
        store = Kept()
        pieces = pieces_of(texts, FOT, 7)
        load(decoder, FOT, policies_of(decoder, FOT), pieces, texts, store, None, heard.append)
        check_nothing_is_left()
        torch.set_num_threads(1)
        check_same(store, ordinarily(decoder, texts, overlap=7))
    assert store.order == pieces
    assert sum(heard) == 900


def check_nothing_is_left() -> None:
    """No thread of ours, and torch's number of threads is what it was, here and in a new thread."""
    assert [one.name for one in threading.enumerate() if one.name.startswith("fot-load")] == []
    found = [torch.get_num_threads()]
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [2, 2]


@torch.no_grad()
@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_in_a_pass_reaches_the_caller(threads: int, two_threads: None) -> None:
    texts = [text(300), text(300, seed=2)]
    texts[1][170] = 10_000  # Not in the vocabulary.
    torch.set_num_threads(threads)
    with attached(made()) as decoder:
        assert taken(decoder)
        with pytest.raises(IndexError):
            stored(decoder, texts)
    torch.set_num_threads(2)
    check_nothing_is_left()


@torch.no_grad()
def test_an_error_of_the_store_stops_the_passes(two_threads: None) -> None:
    class Full(Kept):
        def append(self, layer: int, pieces: Sequence[Piece], keys: Tensor, values: Tensor) -> None:
            raise OSError("disk full")

    texts = [text(3000)]
    with attached(made()) as decoder, pytest.raises(OSError, match="disk full"):
        load(decoder, FOT, policies_of(decoder, FOT), pieces_of(texts, FOT), texts, Full())
    check_nothing_is_left()


def test_a_crew_gives_every_thread_its_own_room_and_share_of_torch(two_threads: None) -> None:
    both = threading.Barrier(2)

    def work(room: Room) -> tuple[int, str, int, bool]:
        both.wait(10)
        return id(room), threading.current_thread().name, torch.get_num_threads(), torch.is_grad_enabled()

    with Crew(5) as crew:
        assert crew.threads == 2
        found = [one.result() for one in [crew.submit(work), crew.submit(work)]]
    assert len({room for room, *_ in found}) == len({name for _, name, *_ in found}) == 2
    assert [rest for *_, threads, grad in found for rest in (threads, grad)] == [1, False, 1, False]
    check_nothing_is_left()


def test_a_crew_of_one_works_in_the_callers_thread(two_threads: None) -> None:
    with Crew(1) as crew:
        assert crew.submit(lambda _: threading.current_thread()).result() is threading.current_thread()


def test_a_crew_whose_threads_cannot_start_says_so_and_leaves_nothing(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = threading.Thread.start, []

    def second_fails(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", second_fails)
    with pytest.raises(RuntimeError, match="can't start"), Crew(2):
        pass
    monkeypatch.undo()
    check_nothing_is_left()


def test_a_room_keeps_one_memory_a_name() -> None:
    room = Room()
    first = room.take("a", 4, 3)
    assert room.take("a", 2, 2).data_ptr() == first.data_ptr() != room.take("b", 2, 2).data_ptr()
    assert room.take("a", 5, 3).shape == (5, 3)
