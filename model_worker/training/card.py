"""The model card, README.md: what a model is, how it was trained, what it scored, what it cannot do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_worker.training import record
from model_worker.training.record import Record

NAME = "README.md"


@dataclass(frozen=True, slots=True)
class Score:
    """A row of the card's table."""

    task: str  # "passkey, 262,144 tokens"
    score: str  # "100 % (200 of 200; 98.1 to 100 %)"
    command: str  # What prints it.


def write_card(
    folder: Path, name: str, scores: Sequence[Score] = (), limits: Sequence[str] = (), about: str = ""
) -> Path:
    """Write the card of the model in `folder` anew, from its training.json. Raises InvalidArgument without one."""
    place = folder / NAME
    place.write_text(card(record.read(folder), name, scores, limits, about), encoding="utf-8")
    return place


def card(told: Record, name: str, scores: Sequence[Score] = (), limits: Sequence[str] = (), about: str = "") -> str:
    """The card as Markdown."""
    parts = [_head(told), f"# {name}", about or _about(told), _use(told), _training(told), _levels(told)]
    parts += [_scores(scores), _limits(limits)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(told: Record) -> str:
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "pipeline_tag: text-generation",
            "tags:",
            "- focused-transformer",
            "- memory",
            "---",
        ]
    )


def _about(told: Record) -> str:
    layers = told.fot["mem_layers"]
    return (
        f"A {told.architecture} of {told.parameters:,} parameters, trained as a Focused Transformer (Tworkowski et "
        f"al., arXiv 2307.03170): its memory {_are('layer', layers)} to any number of earlier tokens, which it learnt "
        "to tell apart from those of other documents."
    )


def _are(noun: str, numbers: Sequence[int]) -> str:
    named = ", ".join(map(str, numbers))
    return f"{noun} {named} attends" if len(numbers) == 1 else f"{noun}s {named} attend"


def _use(told: Record) -> str:
    return "\n".join(
        [
            "## Use",
            "",
            "```python",
            "from model_worker import FotModel",
            "",
            'with FotModel.from_pretrained("this folder") as model:  # with a memory, in RAM',
            "    ...",
            "```",
            "",
            "Without a memory it is an ordinary checkpoint: `AutoModelForCausalLM.from_pretrained` loads it, for "
            f"contexts of up to {told.fot['window']:,} tokens.",
        ]
    )


def _training(told: Record) -> str:
    config, machine = told.config, told.machine
    data = config["data"]
    options = ", ".join(f"{name} = {value}" for name, value in sorted(data["options"].items()))
    start = (
        "from scratch" if not config["model"]["path"] else f"from the checkpoint {Path(config['model']['path']).name}"
    )
    if config["lora"]:
        start += f", by LoRA of rank {config['lora']['rank']}, merged"
    final = told.final
    facts = [
        ("start", start),
        ("data", f"source {data['source']}" + (f" ({options})" if options else "") + ", made on the fly"),
        ("steps", f"{told.steps:,} of {config['steps']:,}"),
        ("tokens", f"{told.tokens:,}"),
        ("time", f"{told.seconds / 60:,.1f} minutes of steps, {told.processes} {_processes(told.processes)}"),
        ("machine", f"{machine['cpu']}, {machine['threads']} of {machine['cores']} threads, torch {machine['torch']}"),
        ("trained parameters", f"{told.trained_parameters:,} of {told.parameters:,}"),
        ("optimizer", f"{config['optimizer']['kind']}, {config['dtype']}, seed {config['seed']}"),
        ("loss at the end", _number(final["loss"])),
        ("answer tokens right at the end", _percent(final["answer_accuracy"])),
    ]
    if final["text_loss"] is not None:
        facts.append(("text at the end", f"{_number(final['text_loss'])} nats a token"))
    rows = [f"| {name} | {value} |" for name, value in facts]
    note = (
        f"What is told of the end are means of the last {final['steps']:.0f} steps on training batches; more in "
        "`training.json`."
    )
    return "\n".join(["## Training", "", "| | |", "|---|---|", *rows, "", note])


def _processes(count: int) -> str:
    return "process" if count == 1 else "processes"


def _levels(told: Record) -> str:
    levels: Sequence[dict[str, Any]] = told.config["levels"]
    lines = ["## Curriculum", "", "| level | batches | ended |", "|---|---|---|"]
    for number, level in enumerate(levels):
        shapes = "; ".join(_shape(shape) for shape in level["shapes"])
        if number < len(told.passed):
            step, why = told.passed[number]
            ended = f"step {step:,}: {why}"
        else:
            ended = "with the training" if number == len(told.passed) else "not reached"
        lines.append(f"| {number} | {shapes} | {ended} |")
    return "\n".join(lines)


def _shape(shape: dict[str, Any]) -> str:
    return (
        f"{shape['documents']} documents x {shape['windows']} windows of {shape['window']}, groups of {shape['group']}"
    )


def _scores(scores: Sequence[Score]) -> str:
    if not scores:
        return "## Scores\n\nNot measured yet."
    rows = [f"| {one.task} | {one.score} | `{one.command}` |" for one in scores]
    return "\n".join(["## Scores", "", "| task | score | command |", "|---|---|---|", *rows])


def _limits(limits: Sequence[str]) -> str:
    if not limits:
        return (
            "## Limits\n\nNot measured yet. What a training batch never held (longer questions, other languages, other "
            "kinds of keys) should be expected to fail."
        )
    return "\n".join(["## Limits", "", *[f"- {one}" for one in limits]])


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"
