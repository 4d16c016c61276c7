"""What a training is told: TOML read into frozen values, every key checked before work starts.

Paths of what is read stand relative to the TOML file; `out` is relative to where the command runs.
"""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from memory_service.errors import InvalidArgument
from model_worker.settings import FotConfig
from model_worker.training.shapes import Shape

Value = TypeVar("Value")
Table = Mapping[str, Any]
_NOTHING: Table = MappingProxyType({})


class Kind(StrEnum):
    """Who updates the matrices inside layers; everything else is AdamW's."""

    MUON = "muon"
    ADAMW = "adamw"


class Precision(StrEnum):
    """What the model computes in; weights and optimizers are float32."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Recipe(StrEnum):
    """How the positions of a window are sampled."""

    CREAM = "cream"
    POSE = "pose"
    RANDPOS = "randpos"


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A checkpoint to go on from, or the fields of a transformers LlamaConfig to start from scratch."""

    path: Path | None = None
    tokenizer: Path | None = None  # A folder or tokenizer.json; None: the checkpoint's, or ids without words.
    llama: Table = field(default_factory=dict)

    def __post_init__(self) -> None:
        _need(
            self.path is None or not self.llama,
            f"[model] has a path, so the fields {sorted(self.llama)} come from its config.json: leave them out",
        )
        _need(self.path is not None or bool(self.llama), '[model] needs path = "…" or the fields of a LlamaConfig')


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """LoRA by peft (Hu et al., 2106.09685), merged into the weights at export."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __post_init__(self) -> None:
        _need(self.rank >= 1, f"[lora] rank must be ≥ 1, got {self.rank}")
        _need(0 <= self.dropout < 1, f"[lora] dropout must be 0 or more and below 1, got {self.dropout}")
        _need(bool(self.targets), "[lora] targets must name at least one projection, such as q_proj")


@dataclass(frozen=True, slots=True)
class PositionsConfig:
    """Positions of the window as CREAM, PoSE or RandPos sample them; `options` are the sampler's own."""

    recipe: Recipe
    factor: int
    options: Table = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """Optimizers and the course of the learning rate."""

    kind: Kind = Kind.MUON
    muon_lr: float = 0.02
    muon_weight_decay: float = 0.1
    muon_momentum: float = 0.95
    adamw_lr: float = 2e-3
    adamw_weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0  # The longest gradient, by its norm.
    warmup: int = 100  # Steps.
    decay_fraction: float = 0.3  # The last share of all steps.
    decay_to: float = 0.02  # Of the learning rate.

    def __post_init__(self) -> None:
        for name in ("muon_lr", "adamw_lr", "clip"):
            _need(getattr(self, name) > 0, f"[optimizer] {name} must be above 0, got {getattr(self, name)}")
        for name in ("decay_fraction", "decay_to", "muon_momentum"):
            _need(0 <= getattr(self, name) <= 1, f"[optimizer] {name} must be 0 to 1, got {getattr(self, name)}")
        _need(self.warmup >= 0, f"[optimizer] warmup must be ≥ 0 steps, got {self.warmup}")


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Which source of batches, and what it is told."""

    source: str
    options: Table = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Level:
    """A stage of the curriculum: which batches, until they are answered well enough."""

    shapes: tuple[Shape, ...]
    until_accuracy: float | None = None  # None: until the training ends.
    min_steps: int = 40
    max_steps: int | None = None  # Then up it goes anyway.
    smoothing: float = 0.95  # Of the exponential mean of the answer accuracy.
    lr: float = 1.0  # A factor.
    temperatures: tuple[float, ...] = (1.0,)  # One a step: the memory layers' queries are scaled by it.
    earlier: float = 0.0  # Share of batches from earlier levels.

    def __post_init__(self) -> None:
        _need(bool(self.shapes), "[[level]] needs shapes = [{…}, …], at least one")
        _need(all(shape.weight > 0 for shape in self.shapes), "[[level]] shapes need a weight above 0")
        _need(self.until_accuracy is None or 0 < self.until_accuracy < 1, "[[level]] until_accuracy must lie in 0 to 1")
        _need(0 <= self.earlier < 1, f"[[level]] earlier must be 0 or more and below 1, got {self.earlier}")
        _need(0 <= self.smoothing < 1, f"[[level]] smoothing must be 0 or more and below 1, got {self.smoothing}")
        _need(self.lr > 0, f"[[level]] lr must be above 0, got {self.lr}")
        _need(bool(self.temperatures) and min(self.temperatures) > 0, "[[level]] temperatures must be numbers above 0")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """A whole training."""

    steps: int
    out: Path
    model: ModelConfig
    data: DataConfig
    levels: tuple[Level, ...]
    seed: int = 0
    dtype: Precision = Precision.FLOAT32
    device: str = "cpu"
    threads: int | None = None  # None: as torch decides.
    accumulate: int = 1  # Batches of one step, one after another.
    gradient_checkpointing: bool = False  # Less RAM, a third more time.
    snapshot_every: int | None = None  # Steps; None: only at the end and when stopped.
    log_every: int = 20
    fot: Table = field(default_factory=dict)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig | None = None
    positions: PositionsConfig | None = None

    def __post_init__(self) -> None:
        _need(self.steps >= 1, f"steps must be ≥ 1, got {self.steps}")
        _need(self.seed >= 0, f"seed must be ≥ 0, got {self.seed}")
        _need(self.accumulate >= 1, f"accumulate must be ≥ 1, got {self.accumulate}")
        _need(self.snapshot_every is None or self.snapshot_every >= 1, "snapshot_every must be ≥ 1 step")
        _need(self.log_every >= 1, f"log_every must be ≥ 1 step, got {self.log_every}")
        _need(bool(self.levels), "a training needs at least one [[level]]")
        for number, level in enumerate(self.levels[:-1]):
            _need(
                level.until_accuracy is not None or level.max_steps is not None,
                f"[[level]] {number} never ends: give it until_accuracy or max_steps, as every level but the last",
            )
        _known(self.fot, [one.name for one in fields(FotConfig)], "[fot]")

    def described(self) -> dict[str, Any]:
        """Everything that decides what is trained, as JSON values; where it runs and what it prints is left out."""
        plain = json.loads(json.dumps(_plain(self)))
        for name in _INDIFFERENT:
            plain.pop(name)
        # What was read is told by its digest (`initial.Start.described`); where it lay says nothing elsewhere.
        for name in ("path", "tokenizer"):
            place = getattr(self.model, name)
            plain["model"][name] = None if place is None else place.resolve().name
        return dict(plain)


# Results do not depend on these; or, as with threads, only in the last bits, and a machine may lack them on resume.
_INDIFFERENT = ("out", "device", "threads", "snapshot_every", "log_every")


def read(path: str | Path, **overrides: Any) -> TrainConfig:
    """The training that a TOML file describes; overrides that are None change nothing. Raises InvalidArgument."""
    path = Path(path)
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgument(f"no training configuration can be read at {str(path)!r}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"{path} is no TOML: {error}") from None
    config = of_tables(told, path.resolve().parent)
    return replace(config, **{name: value for name, value in overrides.items() if value is not None})


def of_tables(told: Table, folder: Path) -> TrainConfig:
    """The training that TOML's tables describe; what it reads lies relative to `folder`. Raises InvalidArgument."""
    told = dict(told)
    model = dict(_table(told, "model"))
    data = dict(_table(told, "data"))
    positions = told.pop("positions", None)
    levels = told.pop("level", [])
    _need(isinstance(levels, list), "levels of the curriculum are written [[level]], with two brackets")
    lora = told.pop("lora", None)
    path, tokenizer = (model.pop(name, None) for name in ("path", "tokenizer"))
    source = data.pop("source", None)
    _need(isinstance(source, str), '[data] needs source = "…", the name of a source of batches')
    if "paths" in data:  # Of the source documents: read, so relative to the file like all that is read.
        named = [data["paths"]] if isinstance(data["paths"], str) else data["paths"]
        _need(isinstance(named, list), f"[data]: paths must be a list of files and folders, got {named!r}")
        data["paths"] = [str(_beside(folder, one)) for one in named]
    made: dict[str, Any] = {
        "model": ModelConfig(_beside(folder, path), _beside(folder, tokenizer), model),
        "data": DataConfig(source, data),
        "levels": tuple(_level(level, number) for number, level in enumerate(levels)),
        "fot": told.pop("fot", {}),
        "optimizer": _made(OptimizerConfig, told.pop("optimizer", {}), "[optimizer]"),
        "lora": None if lora is None else _made(LoraConfig, lora, "[lora]"),
        "positions": None if positions is None else _positions(positions),
    }
    return _made(TrainConfig, {**told, **made}, "the top of the file", ready=made, shown=_TOP)


_TOP = ("model", "data", "level", "fot", "optimizer", "lora", "positions")


def _level(told: Table, number: int) -> Level:
    told = dict(told)
    where = f"[[level]] {number}"
    shapes = told.pop("shapes", [])
    _need(isinstance(shapes, list), f"{where}: shapes is a list of tables, [{{documents = 8, …}}]")
    made = {"shapes": tuple(_made(Shape, shape, f"{where} shapes") for shape in shapes)}
    return _made(Level, {**told, **made}, where, ready=made)


def _positions(told: Table) -> PositionsConfig:
    options = dict(told)
    recipe, factor = options.pop("recipe", None), options.pop("factor", None)
    made = {"recipe": recipe, "factor": factor, "options": options}
    return _made(PositionsConfig, made, "[positions]", ready={"options": options})


def _made(kind: type[Value], told: object, where: str, *, ready: Table = _NOTHING, shown: Sequence[str] = ()) -> Value:
    """A dataclass from a table: unknown keys, wrong types and missing keys are told by their names."""
    if not isinstance(told, Mapping):
        raise InvalidArgument(f"{where} must be a table of keys, got {told!r}")
    known = {one.name: one for one in fields(kind)}  # type: ignore[arg-type]  # it is a dataclass
    settable = [name for name in known if name not in ready]
    _known({name: value for name, value in told.items() if name not in ready}, [*settable, *shown], where)
    hints = get_type_hints(kind)
    given = {
        name: value if name in ready else _read(value, hints[name], f"{where}: {name}") for name, value in told.items()
    }
    for name, one in known.items():
        missing = one.default is MISSING and one.default_factory is MISSING and name not in given
        _need(not missing, f"{where} lacks {name}")
    return kind(**given)


def _read(value: Any, hint: Any, where: str) -> Any:
    """A TOML value as the type a field wants. Raises InvalidArgument naming the key and what it takes."""
    if get_origin(hint) in (UnionType, Union):
        hint = next(one for one in get_args(hint) if one is not NoneType)
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        _need(isinstance(value, list | tuple), f"{where} must be a list, got {value!r}")
        if kinds[-1] is not Ellipsis:
            _need(len(value) == len(kinds), f"{where} must be a list of {len(kinds)}, got {value!r}")
        return tuple(_read(one, kinds[0], where) for one in value)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        allowed = [str(one) for one in hint]
        _need(value in allowed, f"{where} must be one of {', '.join(allowed)}, got {value!r}")
        return hint(value)
    if hint is Path:
        _need(isinstance(value, str), f"{where} must be a path in quotes, got {value!r}")
        return Path(value)
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        _need(number, f"{where} must be a number, got {value!r}")
        return float(value)
    right = isinstance(value, hint) and not (hint is int and isinstance(value, bool))
    _need(right, f"{where} must be {_WORDS.get(hint, hint.__name__)}, got {value!r}")
    return value


_WORDS = {int: "a whole number", bool: "true or false", str: "text in quotes"}


def _known(told: Table, known: Sequence[str], where: str) -> None:
    for name in told:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, cutoff=0.75)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise InvalidArgument(f"{where} has a key {name!r} that nothing reads: {hint}")


def _table(told: dict[str, Any], name: str) -> Table:
    _need(name in told, f"the configuration lacks its section [{name}]")
    table = told.pop(name)
    _need(isinstance(table, Mapping), f"{name} must be a section, [{name}]")
    return dict(table)


def _beside(folder: Path, path: object) -> Path | None:
    if path is None:
        return None
    _need(isinstance(path, str), f"a path is text in quotes, got {path!r}")
    return folder / str(path)


def _plain(value: Any) -> Any:
    """Dataclasses, paths and tuples as JSON has them."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "__dataclass_fields__"):
        return {one.name: _plain(getattr(value, one.name)) for one in fields(value)}
    return value


def _need(right: bool, otherwise: str) -> None:
    if not right:
        raise InvalidArgument(otherwise)
