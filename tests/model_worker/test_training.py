"""The training loop: what it minimises, that it learns, and that nothing but steps decides where it ends."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from memory_service.errors import DataLoss, FailedPrecondition, InvalidArgument
from model_worker.training import curves, metrics, snapshots
from model_worker.training.batches import source_of
from model_worker.training.initial import start
from model_worker.training.metrics import Row
from model_worker.training.run import TrainResult, train
from model_worker.training.shapes import Batch, Shape
from tests.model_worker.trainings import SMALL, Echo, small

TIMES = ("seconds", "tokens_per_s")


class Killed(Exception):
    """Stands for a process that ends at once."""


def killed_after(step: int) -> Callable[[Row], None]:
    def kill(row: Row) -> None:
        if row.step == step:
            raise Killed

    return kill


def rows(out: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says, but for how long it took."""
    return [{name: value for name, value in asdict(row).items() if name not in TIMES} for row in metrics.read(out)]


def assert_same_training(one: Path, other: Path) -> None:
    first, second = snapshots.read(one), snapshots.read(other)
    assert (first.step, first.tokens, first.curriculum) == (second.step, second.tokens, second.curriculum)
    for have, want in ((first.weights, second.weights), (first.optimizers, second.optimizers)):
        assert have.keys() == want.keys() and want
        for name, tensor in want.items():
            assert torch.equal(have[name], tensor), name
    models = [load_file(out / "model" / "model.safetensors") for out in (one, other)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])
    assert rows(one) == rows(other)


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than training here; test_curves looks at the pictures."""
    monkeypatch.setattr(curves, "draw", lambda rows, place: place)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(curves, "draw", lambda rows, place: place)
        out = tmp_path_factory.mktemp("trained") / "straight"
        train(small(out))
    return out


# --- resuming ---


def test_a_training_that_was_killed_and_resumed_is_bit_for_bit_the_one_that_ran_through(
    tmp_path: Path, straight: Path
) -> None:
    config = small(tmp_path / "broken", snapshot_every=3)
    with pytest.raises(Killed):
        train(config, on_step=killed_after(5))  # In the second level; the snapshot is of step 3, in the first.
    assert snapshots.read(config.out).step == 3
    result = train(config, resume=True)
    assert result.finished and result.steps == 10 and result.level == 1
    assert_same_training(config.out, straight)


def test_a_training_that_was_asked_to_stop_says_so_and_goes_on_where_it_was(tmp_path: Path, straight: Path) -> None:
    config = small(tmp_path / "stopped")
    asked = iter([False] * 5 + [True])
    first = train(config, stop=lambda: next(asked))
    assert (first.steps, first.finished) == (6, False)
    assert first.model.is_dir()
    assert train(config, resume=True).finished
    assert_same_training(config.out, straight)


def test_resuming_a_finished_training_changes_nothing_and_makes_its_model_anew(tmp_path: Path) -> None:
    config = small(tmp_path / "out", steps=2)
    done = train(config)
    files = (snapshots.NAME, metrics.NAME, "model/model.safetensors")
    before = [(config.out / name).read_bytes() for name in files]
    shutil.rmtree(config.out / "model")
    again = train(config, resume=True)
    assert again == replace(done, last=None)
    assert [(config.out / name).read_bytes() for name in files] == before


def test_a_training_with_dropout_resumes_exactly_too(tmp_path: Path) -> None:
    told = {"lora": {"rank": 2, "dropout": 0.3}, "steps": 5}
    train(small(tmp_path / "straight", **told))
    config = small(tmp_path / "broken", snapshot_every=2, **told)
    with pytest.raises(Killed):
        train(config, on_step=killed_after(3))
    train(config, resume=True)
    assert_same_training(config.out, tmp_path / "straight")


def test_another_configuration_is_refused_on_resume_and_every_difference_named(tmp_path: Path) -> None:
    train(small(tmp_path / "out", steps=2))
    other = small(tmp_path / "out", steps=4, optimizer={"warmup": 3, "muon_lr": 0.01})
    with pytest.raises(InvalidArgument, match=r"optimizer\.muon_lr was 0\.02 and is 0\.01; steps was 2 and is 4"):
        train(other, resume=True)


def test_where_it_writes_and_how_often_may_change_on_resume(tmp_path: Path) -> None:
    config = small(tmp_path / "out", snapshot_every=2)
    with pytest.raises(Killed):
        train(config, on_step=killed_after(3))
    (tmp_path / "out").rename(tmp_path / "moved")
    assert train(small(tmp_path / "moved", snapshot_every=5, log_every=1, threads=1), resume=True).finished


def test_weights_that_are_not_those_the_training_began_with_are_refused(tmp_path: Path) -> None:
    from tests.model_worker.tiny import save_tiny_llama

    checkpoint = save_tiny_llama(tmp_path / "checkpoint")
    told = {"model": {"path": str(checkpoint)}, "steps": 2, "fot": {"mem_layers": [1], "window": 36}}
    train(small(tmp_path / "out", **told))
    save_tiny_llama(checkpoint, seed=1)
    with pytest.raises(InvalidArgument, match=r"start\.weights"):
        train(small(tmp_path / "out", **told), resume=True)


def test_a_folder_that_holds_a_training_is_not_overwritten(tmp_path: Path) -> None:
    config = small(tmp_path / "out", steps=1)
    train(config)
    with pytest.raises(FailedPrecondition, match="--resume"):
        train(config)


def test_nothing_to_resume_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="nothing to resume"):
        train(small(tmp_path / "out"), resume=True)


def test_a_snapshot_that_was_cut_short_is_told(tmp_path: Path) -> None:
    config = small(tmp_path / "out", steps=1)
    train(config)
    place = config.out / snapshots.NAME
    place.write_bytes(place.read_bytes()[:-7])
    with pytest.raises(DataLoss, match="cannot be read"):
        train(config, resume=True)


def test_a_kill_while_a_snapshot_is_written_leaves_the_one_before(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path / "broken", snapshot_every=3)

    def half(tensors: dict[str, Any], place: Path, metadata: dict[str, str]) -> None:
        if '"step": 6' not in metadata["training"]:
            return whole(tensors, place, metadata)
        place.write_bytes(b"half a file")
        raise Killed

    whole = snapshots.save_file
    with monkeypatch.context() as patched:
        patched.setattr(snapshots, "save_file", half)
        with pytest.raises(Killed):
            train(config)
    assert snapshots.read(config.out).step == 3
    train(config, resume=True)
    assert_same_training(config.out, straight)


# --- what is minimised ---


def test_the_loss_is_the_weighted_mean_that_transformers_own_forward_gives(tmp_path: Path) -> None:
    config = small(tmp_path / "out", steps=1)
    result = train(config, source=Echo())
    batch = Echo().batch(0, config.levels[0].shapes[0])
    with torch.no_grad():
        logits = start(config).base(input_ids=batch.ids).logits
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    weights = batch.weights.flatten()
    assert result.last is not None
    assert result.last.loss == pytest.approx(float((nll * weights).sum() / weights.sum()), rel=1e-5)
    assert result.last.answer_loss == pytest.approx(float(nll.mean()), rel=1e-5)
    right = (logits.argmax(-1) == batch.targets).float().mean()
    assert result.last.answer_accuracy == pytest.approx(float(right))
    assert result.last.text_loss is None  # Everything was an answer.


class Alternating(Echo):
    """Batches in which all that is worth something has weight 3 in the even ones, 1 in the odd."""

    def batch(self, step: int, shape: Shape) -> Batch:
        made = super().batch(step, shape)
        return replace(made, weights=torch.full_like(made.weights, 3.0 if step % 2 == 0 else 1.0))


class Joined(Alternating):
    """Two batches of `Alternating` as one."""

    def batch(self, step: int, shape: Shape) -> Batch:
        parts = [super(Joined, self).batch(2 * step + half, shape) for half in (0, 1)]
        tensors = ("ids", "targets", "weights", "answers")
        whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in tensors}
        return Batch(**whole, reads=parts[0].reads + parts[1].reads)


def test_batches_one_after_another_train_as_one_large_batch_does(tmp_path: Path) -> None:
    apart = train(small(tmp_path / "apart", steps=2, accumulate=2), source=Alternating())
    together = train(small(tmp_path / "together", steps=2), source=Joined())
    assert apart.last is not None and together.last is not None
    assert apart.tokens == together.tokens
    assert apart.last.loss == pytest.approx(together.last.loss, rel=1e-5)
    have, want = (snapshots.read(tmp_path / name).weights for name in ("apart", "together"))
    for name, tensor in want.items():
        torch.testing.assert_close(have[name], tensor, atol=2e-4, rtol=0)


def losses(result: Path) -> list[float]:
    return [row.loss for row in metrics.read(result)]


def test_what_can_be_learnt_is_learnt(tmp_path: Path) -> None:
    optimizer = {"warmup": 3, "decay_fraction": 0.0, "adamw_lr": 0.03}
    result = train(small(tmp_path / "out", steps=25, optimizer=optimizer), source=Echo())
    assert losses(tmp_path / "out")[0] > 3.5  # ln 64 is 4.2
    assert result.last is not None and result.last.loss < 1.5
    assert result.last.answer_accuracy is not None and result.last.answer_accuracy > 0.8


def test_memory_of_the_other_windows_reaches_the_loss(tmp_path: Path) -> None:
    class Blind:
        """The dictionary, with nobody reading anybody."""

        def batch(self, step: int, shape: Shape) -> Batch:
            made = source_of("dictionary", None, 0).batch(step, shape)
            return replace(made, reads=((),) * len(made.ids))

    with_memory = train(small(tmp_path / "with", steps=1))
    without = train(small(tmp_path / "without", steps=1), source=Blind())
    assert with_memory.last is not None and without.last is not None
    assert with_memory.last.loss != without.last.loss


def test_a_temperature_changes_what_memory_layers_see(tmp_path: Path) -> None:
    def loss(temperature: float) -> float:
        level = [{"temperatures": [temperature], "shapes": [SMALL]}]
        last = train(small(tmp_path / str(temperature), steps=1, level=level)).last
        assert last is not None and last.temperature == temperature
        return last.loss

    assert loss(0.3) != loss(1.0)


# --- options ---


def test_gradient_checkpointing_changes_no_weight(tmp_path: Path) -> None:
    for name, on in (("with", True), ("without", False)):
        train(small(tmp_path / name, steps=2, gradient_checkpointing=on))
    have, want = (snapshots.read(tmp_path / name).weights for name in ("with", "without"))
    assert all(torch.equal(have[name], tensor) for name, tensor in want.items())


def test_bfloat16_computes_roughly_the_same_and_keeps_float32_weights(tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        train(small(tmp_path / dtype, steps=2, dtype=dtype), source=Echo())
    assert losses(tmp_path / "bfloat16") == pytest.approx(losses(tmp_path / "float32"), rel=0.02)
    assert losses(tmp_path / "bfloat16") != losses(tmp_path / "float32")
    weights = snapshots.read(tmp_path / "bfloat16").weights
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_sampled_positions_change_what_is_seen_and_are_the_same_after_a_resume(tmp_path: Path, straight: Path) -> None:
    told = {"positions": {"recipe": "cream", "factor": 4, "sigma": 2.0}, "steps": 5}
    train(small(tmp_path / "straight", **told))
    assert losses(tmp_path / "straight")[0] != losses(straight)[0]
    config = small(tmp_path / "broken", snapshot_every=2, **told)
    with pytest.raises(Killed):
        train(config, on_step=killed_after(3))
    train(config, resume=True)
    assert_same_training(config.out, tmp_path / "straight")


def test_positions_for_another_window_than_that_of_a_shape_are_refused(tmp_path: Path) -> None:
    level = [{"shapes": [{**SMALL, "window": 24}]}]
    config = small(tmp_path / "out", positions={"recipe": "pose", "factor": 2}, level=level)
    with pytest.raises(InvalidArgument, match="windows of 36 tokens"):
        train(config)


def test_a_batch_in_which_nothing_counts_is_refused(tmp_path: Path) -> None:
    class Worthless(Echo):
        def batch(self, step: int, shape: Shape) -> Batch:
            made = super().batch(step, shape)
            return replace(made, weights=torch.zeros_like(made.weights))

    with pytest.raises(InvalidArgument, match="step 0 has a weight"):
        train(small(tmp_path / "out"), source=Worthless())


def test_a_loss_that_is_no_number_ends_the_training_before_anything_is_kept(tmp_path: Path) -> None:
    class Broken(Echo):
        def batch(self, step: int, shape: Shape) -> Batch:
            made = super().batch(step, shape)
            return made if step < 3 else replace(made, weights=made.weights * torch.inf)

    config = small(tmp_path / "out", snapshot_every=2)
    with pytest.raises(FailedPrecondition, match="the loss of step 4 is"):
        train(config, source=Broken())
    assert snapshots.read(config.out).step == 2
    assert len(rows(config.out)) == 3


def test_two_trainings_do_not_share_a_folder(tmp_path: Path) -> None:
    config = small(tmp_path / "out", steps=2)

    def another(row: Row) -> None:
        with pytest.raises(FailedPrecondition, match="another process trains"):
            train(config)

    assert train(config, on_step=another).finished


@pytest.mark.gpu
def test_a_training_on_a_gpu_resumes_and_agrees_with_the_cpu(tmp_path: Path) -> None:
    train(small(tmp_path / "cpu"))
    config = small(tmp_path / "gpu", device="cuda", snapshot_every=3)
    with pytest.raises(Killed):
        train(config, on_step=killed_after(5))
    train(config, resume=True)
    assert losses(config.out) == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)


def test_training_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    result: TrainResult = train(small(tmp_path / "out", steps=1))
    assert result.steps == 1
    assert torch.equal(torch.rand(2), want)
