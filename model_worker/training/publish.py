"""What a training shows of itself whenever it saves: the model, its card, the curves."""

from __future__ import annotations

from collections.abc import Sequence

from model_worker.hf.longllama import fot_json
from model_worker.training import card, curves, metrics
from model_worker.training.config import TrainConfig
from model_worker.training.export import export
from model_worker.training.initial import Start
from model_worker.training.record import Record, final_figures, machine
from model_worker.training.snapshots import Snapshot

MODEL = "model"  # The folder of the checkpoint, in a training's folder.


def publish(
    config: TrainConfig, start: Start, snapshot: Snapshot, passed: Sequence[tuple[int, str]], processes: int
) -> None:
    """Write model/ and curves.png into the training's folder, in place of older ones."""
    rows = metrics.read(config.out)
    record = Record(
        config=snapshot.config,
        fot=fot_json(start.fot),
        architecture=type(start.base).__name__,
        parameters=start.parameters,
        trained_parameters=sum(tensor.numel() for tensor in start.trained.values()),
        steps=snapshot.step,
        tokens=snapshot.tokens,
        seconds=snapshot.seconds,
        processes=processes,
        passed=list(passed),
        final=final_figures(rows),
        machine=machine(),
    )
    name = config.out.absolute().name
    weights = start.merged() if config.lora is not None else None
    with export(config.out / MODEL, start.base, start.fot, start.tokenizer_files, weights) as folder:
        record.write(folder)
        card.write_card(folder, name)
    curves.draw(rows, config.out / curves.NAME)
