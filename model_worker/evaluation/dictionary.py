"""`fot eval dictionary`: look-up in a dictionary of up to 16M tokens and more, exactly and through indexes.

The task of section 4 of the Focused Transformer (Tworkowski et al., 2307.03170): definitions <k> k1 k2 k3 k4 <v> v1 v2
v3 v4 out of 64 tokens, in memory; questions <q> k1 k2 k3 k4 <v>, whose four values must follow. Here all keys of a
dictionary are different, which the paper does not say. Definitions are encoded in windows of whole records, each on its
own, and put as documents. Questions are drawn from all definitions in memory and asked in windows, 25 of them in the
paper's 256 tokens; as in the paper the right values stand in the window behind each question (teacher forcing). A token
is right if it is the likeliest one, a record if all four are; `greedy` also counts what the model says when it goes on
from its own tokens. The dictionary grows from size to size; every engine answers the same questions. Recall and mass
compare an index with the exact top k at the queries that predict values, mean over them and the query heads; seconds
are those of the calls to the memory, all queries of all windows, one engine after the other in one process;
ms_per_question is everything that answering one takes, the model's own work included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from memory_service import Engine
from memory_service.client import Client
from memory_service.errors import FailedPrecondition, InvalidArgument
from memory_service.index.factories import PARAMS, check_params, choose_factory, estimate_bytes, parse_factory
from model_worker.decoder.fitting import spec_of
from model_worker.evaluation import dictionary_scores as scores
from model_worker.evaluation.dictionary_memory import PATIENCE_S, Library, Player, free_bytes, library, peak_bytes
from model_worker.evaluation.dictionary_scores import Found
from model_worker.evaluation.dictionary_world import Questions, World
from model_worker.evaluation.place import Place
from model_worker.evaluation.report import Column, Report, nbytes, percent, size
from model_worker.settings import Recall
from model_worker.tasks import dictionary as task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZES = (4096, 65_536, 1 << 20)  # Tokens.
QUESTIONS = 550
TOP_K = 32
IN_PROCESS = Place(timeout_s=PATIENCE_S)
ENGINES = ("exact", "faiss:auto")
PROBES = (4, 16, 64)  # Lists visited, where an engine does not say.
REACH = (64, 256)  # efSearch of a graph, likewise.
DOCUMENT_TOKENS = 250_000
GRAPH_TOKENS = 1 << 20  # A graph of more takes hours to build.
_GROWTH = 2.5  # Lists that grow have half as much room again as they hold; those of fast scan are a copy of them.
_WORKING_BYTES = 2 << 30

COLUMNS = (
    Column("tokens"), Column("engine"), Column("setting"), Column("tokens_right", "tokens right", percent),
    Column("records_right", "records right", percent), Column("records_low", "95 % from", percent),
    Column("records_high", "to", percent), Column("recall", form=percent), Column("captured_mass", "mass", percent),
    Column("gap_p1", "gap, 1st pct"), Column("search_s", "search s"), Column("build_s", "build s"),
    Column("index_bytes", "index", nbytes), Column("refused"),
)  # fmt: skip

Tell = Callable[[int, int, str], None]  # Steps done, steps in all, what is done now.


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to search."""

    engine: Engine
    top_k: int
    search: Mapping[str, float] = field(default_factory=dict)
    factory: str | None = None  # Of the index.

    @property
    def name(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in self.search.items())

    @property
    def recall(self) -> Recall:
        """How the memory is asked."""
        return Recall(top_k=self.top_k, engine=self.engine, search=self.search)


@dataclass(frozen=True, slots=True)
class Contender:
    """An engine with the settings it is tried at."""

    name: str  # "exact", "dense" or "faiss:IVF1024,SQ8".
    settings: tuple[Setting, ...]

    @property
    def factory(self) -> str | None:
        return self.settings[0].factory


def contender(text: str, probes: Sequence[int] = PROBES, top_k: int = TOP_K, head_dim: int = 128) -> Contender:
    """An engine from "exact", "dense" or "faiss:FACTORY", with "?nprobe=16&candidates=64" behind it for one setting.

    Without, lists are searched at every number of `probes`. Raises InvalidArgument.
    """
    if text in ("exact", "dense"):
        return Contender(text, (Setting(Engine.EXACT, top_k if text == "exact" else 0),))
    kind, _, rest = text.partition(":")
    factory, asked, told = rest.partition("?")
    if kind != "faiss" or not factory:
        raise InvalidArgument(
            f"an engine is exact, dense or faiss: with a factory behind it, such as faiss:IVF4096,SQ8; got {text!r}"
        )
    if factory == "none":
        raise InvalidArgument("faiss:none is no index: say exact")
    usual = parse_factory(choose_factory(1 << 20, head_dim, factory), head_dim)
    if asked:
        ways = [_search_of(told, text)]
    elif usual.lists:
        ways = [{"nprobe": count} for count in probes]
    elif usual.codec.startswith("HNSW"):
        ways = [{"efSearch": reach} for reach in REACH]
    else:
        ways = [{}]
    return Contender(f"faiss:{factory}", tuple(Setting(Engine.INDEX, top_k, one, factory) for one in ways))


def contenders_of(engines: Sequence[str], probes: Sequence[int], top_k: int, head_dim: int) -> list[Contender]:
    """Each engine once with all its settings: what the others are compared with first, and each index built once."""
    settings: dict[str, dict[str, Setting]] = {}
    for text in engines:
        one = contender(text, probes, top_k, head_dim)
        settings.setdefault(one.name, {}).update({setting.name: setting for setting in one.settings})
    order = sorted(settings, key=lambda name: ("exact", "dense", name).index(name))
    return [Contender(name, tuple(settings[name].values())) for name in order]


def _search_of(told: str, text: str) -> dict[str, float]:
    search: dict[str, float] = {}
    for pair in told.split("&"):
        name, _, number = pair.partition("=")
        if not number.isdigit():
            raise InvalidArgument(f"{text!r}: behind ? stand {', '.join(PARAMS)} as in nprobe=16&candidates=64")
        search[name] = int(number)
    check_params(search)
    return search


def run(
    player: Player,
    place: Place = IN_PROCESS,
    *,
    sizes: Sequence[int] = SIZES,
    questions: int = QUESTIONS,
    engines: Sequence[str] = ENGINES,
    probes: Sequence[int] = PROBES,
    top_k: int = TOP_K,
    greedy: bool = False,
    document_tokens: int = DOCUMENT_TOKENS,
    seed: int = 0,
    tell: Tell = lambda *_: None,
) -> Report:
    """Ask every engine at every size. Raises InvalidArgument before any work, and what the memory raises."""
    if questions < 1 or top_k < 1 or not sizes or not engines:
        raise InvalidArgument("a dictionary needs at least one size, one engine, one question and a top_k of 1")
    if any(one < 1 for one in probes):
        raise InvalidArgument(f"probes are numbers of lists, at least 1; got {list(probes)}")
    window = player.fot.window
    if min(sizes) < window:
        raise InvalidArgument(f"a dictionary fills at least one window of {window} tokens, got {min(sizes)}")
    sizes = sorted(set(sizes))
    spec = spec_of(player.base, player.fot)
    contenders = contenders_of(engines, probes, top_k, spec.head_dim)
    world = World(sizes[-1] // window * player.in_window, player.in_window, seed)
    resident = world.records * task.RECORD * spec.bytes_per_token
    if not place.remote and resident + _WORKING_BYTES > free_bytes():
        raise InvalidArgument(
            f"{sizes[-1]:,} tokens take {nbytes(resident)} of RAM and there are {nbytes(free_bytes())}: give smaller "
            "sizes, or the address of a service"
        )
    rows: list[dict[str, Any]] = []
    with place.open(resident + (resident >> 4) + (64 << 20)) as client:
        study = _Study(player, client, world, contenders, sizes, questions, greedy, document_tokens, tell)
        rows += study.rows(local=not place.remote)
    settings = {
        **player.told(), "memory": place.target, "sizes": sizes, "questions": questions, "top_k": top_k,
        "engines": [one.name for one in contenders], "probes": list(probes), "greedy": greedy,
        "document_tokens": document_tokens, "seed": seed, "peak_rss_bytes": peak_bytes(),
    }  # fmt: skip
    return Report("dictionary", __doc__ or "", settings, rows, _figures(rows))


class _Study:
    """One dictionary's growth, and the engines at every size of it."""

    def __init__(
        self,
        player: Player,
        client: Client,
        world: World,
        contenders: Sequence[Contender],
        sizes: Sequence[int],
        questions: int,
        greedy: bool,
        document_tokens: int,
        tell: Tell,
    ):
        self._player, self._client, self._world, self._contenders = player, client, world, contenders
        self._sizes, self._questions, self._greedy, self._document_tokens = sizes, questions, greedy, document_tokens
        self._tell = tell
        self._done = 0
        self._total = len(sizes) * (1 + sum(len(one.settings) for one in contenders))

    def rows(self, local: bool) -> list[dict[str, Any]]:
        """`local`: the memory is in this process's RAM, so what does not fit there is left out."""
        found: list[dict[str, Any]] = []
        with library(self._player, self._client) as shelf:
            for tokens in self._sizes:
                found += self._size(shelf, tokens, local)
        return found

    def _size(self, shelf: Library, tokens: int, local: bool) -> list[dict[str, Any]]:
        records = tokens // self._player.fot.window * self._player.in_window
        label = size(tokens)
        before = shelf.tokens

        def encoded(_: int) -> None:
            stored = shelf.memory.info().tokens
            self._tell(self._done, self._total, f"{label}: {stored:,} tokens encoded")

        self._say(f"{label}: encoding")
        shelf.fill(self._world, records, self._document_tokens, encoded)
        self._done += 1
        questions = self._world.questions(records, self._questions)
        facts = {
            "size": tokens, "tokens": shelf.tokens, "added": shelf.tokens - before,
            "encoded_per_s": shelf.tokens / shelf.encoded_s, "stored_bytes": shelf.memory.stats().bytes,
            "asked": questions.count,
        }  # fmt: skip
        rows: list[dict[str, Any]] = []
        exact: Found | None = None
        for one in self._contenders:
            rows_here, found = self._contend(shelf, one, questions, exact, label, local)
            exact = found if one.name == "exact" else exact
            rows += [{**facts, **row} for row in rows_here]
        return rows

    def _contend(
        self, shelf: Library, one: Contender, questions: Questions, exact: Found | None, label: str, local: bool
    ) -> tuple[list[dict[str, Any]], Found | None]:
        """One engine at all its settings; and the keys found at the last."""
        build_s, built = 0.0, None
        if one.factory is not None:
            refused = self._refused(shelf, one.factory, local)
            if refused is None:
                words = f"{label}: building {one.factory}"
                self._say(words)
                try:
                    build_s = shelf.index(one.factory, lambda share: self._say(f"{words} {share:.0%}"))
                except (FailedPrecondition, InvalidArgument) as error:
                    refused = error.message
            if refused is not None:
                self._done += len(one.settings)
                return [{"engine": one.name, "setting": "", "refused": refused}], None
            built = shelf.memory.stats().index_bytes
        rows: list[dict[str, Any]] = []
        found: Found | None = None
        for setting in one.settings:
            words = f"{label}: asking {one.name} {setting.name}".rstrip()
            self._say(words)
            row, found = self._ask(shelf, setting, questions, exact, words)
            self._done += 1
            rows.append({"engine": one.name, "setting": setting.name, "build_s": build_s, "index_bytes": built, **row})
        return rows, found

    def _ask(
        self, shelf: Library, setting: Setting, questions: Questions, exact: Found | None, words: str
    ) -> tuple[dict[str, Any], Found | None]:
        asked = 0

        def answered(windows: int) -> None:
            nonlocal asked
            asked += windows * self._player.in_window
            self._say(f"{words}: {asked:,} of {questions.count:,} questions")

        started = time.perf_counter()
        answers = shelf.ask(questions, setting.recall, answered)
        wall_s = time.perf_counter() - started
        wanted = questions.wanted()
        tokens, records = scores.right(answers.predicted, wanted)
        queries = questions.ids.numel()
        row: dict[str, Any] = {
            "answered_by": answers.engine, "search": dict(setting.search), "top_k": setting.top_k,
            "tokens_right": tokens.value, "tokens_low": tokens.low, "tokens_high": tokens.high,
            "records_right": records.value, "records_low": records.low, "records_high": records.high,
            "tokens_found": tokens.found, "records_found": records.found,
            "slots_right": scores.slots(answers.predicted, wanted),
            "search_s": answers.seconds, "ms_per_query": 1000 * answers.seconds / queries, "queries": queries,
            "ms_per_question": 1000 * wall_s / questions.count,
        }  # fmt: skip
        if answers.found is not None:
            gap = scores.gap(answers.found, questions.defined())
            row |= {"defined_found": gap.found, "gap_mean": gap.mean, "gap_p1": gap.p1}
            against = answers.found if setting.engine is Engine.EXACT else exact
            if against is not None:
                kept = scores.kept(answers.found, against)
                row |= {"recall": kept.recall, "captured_mass": kept.mass, "mass_p10": kept.mass_p10}
        if self._greedy:
            said, whole = scores.right(shelf.greedy(questions, setting.recall, answers), wanted)
            row |= {"greedy_tokens_right": said.value, "greedy_records_right": whole.value}
        return row, answers.found

    def _refused(self, shelf: Library, factory: str, local: bool) -> str | None:
        """Why an index of this kind is not even tried, or None."""
        if factory.startswith("HNSW") and shelf.tokens > GRAPH_TOKENS:
            return f"a graph of more than {size(GRAPH_TOKENS)} keys takes hours to build"
        needed = int(_GROWTH * estimate_bytes(shelf.tokens, shelf.memory.spec, factory))
        if local and needed + _WORKING_BYTES // 4 > free_bytes():
            return f"takes about {nbytes(needed)} of RAM to build, and {nbytes(free_bytes())} are free"
        return None

    def _say(self, words: str) -> None:
        self._tell(self._done, self._total, words)


# --- What is quoted and drawn ---------------------------------------------------------------------------------------


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """By size: what exact search gets, and the fastest setting of an index that gets no fewer records right."""
    figures: dict[str, float] = {}
    for tokens in dict.fromkeys(int(row["size"]) for row in rows):
        here = [row for row in rows if row["size"] == tokens and not row.get("refused")]
        label = size(tokens).lower().replace(",", "")
        exact = next((row for row in here if row["engine"] == "exact"), None)
        best = best_index(here)
        for name, row in (("exact", exact), ("index", best)):
            if row is not None:
                figures |= {
                    f"token_{label}_{name}": row["tokens_right"],
                    f"record_{label}_{name}": row["records_right"],
                }
                figures[f"search_s_{label}_{name}"] = row["search_s"]
        if exact is not None:
            figures |= {f"gap_mean_{label}": exact["gap_mean"], f"gap_p1_{label}": exact["gap_p1"]}
        if best is not None:
            figures |= {f"build_s_{label}_index": best["build_s"], f"index_bytes_{label}": best["index_bytes"]}
        if exact is not None and best is not None:
            figures |= {f"recall_{label}_index": best["recall"], f"mass_{label}_index": best["captured_mass"]}
            figures[f"index_vs_exact_time_{label}"] = exact["search_s"] / best["search_s"]
    if rows:
        figures["encoded_tokens_per_s"] = rows[-1]["encoded_per_s"]
    return figures


def best_index(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Of one size's rows the fastest setting of an index with as many records right as exact search; else the best."""
    indexed = [row for row in rows if row["engine"].startswith("faiss:") and not row.get("refused")]
    if not indexed:
        return None
    goal = next((row["records_found"] for row in rows if row["engine"] == "exact"), 0)
    goal = min(goal, max(row["records_found"] for row in indexed))
    return min((row for row in indexed if row["records_found"] >= goal), key=lambda row: float(row["search_s"]))


def picture(report: Report) -> Figure:
    """Records right by size, a line for each engine at its best setting of the largest size."""
    from model_worker.evaluation.pictures import Axis, Line, lines

    asked = [row for row in report.rows if not row.get("refused")]
    series = []
    for engine in dict.fromkeys(row["engine"] for row in asked):
        mine = [row for row in asked if row["engine"] == engine]
        last = [row for row in mine if row["size"] == mine[-1]["size"]]
        setting = (best_index(last) or last[0])["setting"]
        points = [row for row in mine if row["setting"] == setting]
        name = f"{engine} {setting}".rstrip()
        ends = ([row["records_low"] for row in points], [row["records_high"] for row in points])
        x, y = [row["size"] for row in points], [row["records_right"] for row in points]
        series.append(Line(name, x, y, *ends, dashed=engine in ("exact", "dense")))
    lowest = min((row["records_low"] for row in asked), default=0.0)
    facts = f"{_subject(report)}, {asked[0]['asked']} questions a size, 95 % Wilson intervals"
    return lines(
        series, Axis("tokens of definitions in memory", "tokens", log=True),
        Axis("records right", "percent", lowest=max(-0.02, lowest - 0.1), highest=1.02),
        "Look-up in a dictionary of distinct keys", facts,
    )  # fmt: skip


def search_picture(report: Report) -> Figure:
    """Recall of the exact top k by time at the largest size: a line for each index, a point for exact search."""
    from model_worker.evaluation.pictures import Axis, Line, lines

    largest = max(row["size"] for row in report.rows)
    here = [row for row in report.rows if row["size"] == largest and row.get("recall") is not None]
    series = []
    for engine in dict.fromkeys(row["engine"] for row in here if row["engine"].startswith("faiss:")):
        mine = sorted((row for row in here if row["engine"] == engine), key=lambda row: float(row["search_s"]))
        series.append(Line(engine, [row["search_s"] for row in mine], [row["recall"] for row in mine]))
    exact = next((row for row in here if row["engine"] == "exact"), None)
    if exact is not None:
        series.append(Line("exact", [exact["search_s"]], [exact["recall"]], dashed=True))
    if not series:
        raise InvalidArgument("a picture of search needs engines that were compared with exact search")
    queries = here[0]["queries"]
    ticks = [digit * 10.0**power for power in range(-3, 5) for digit in (1, 2, 5)]
    seconds = [row["search_s"] for row in here]
    marks = [one for one in ticks if 0.7 * min(seconds) <= one <= 1.4 * max(seconds)]
    return lines(
        series, Axis(f"search time of {queries:,} queries", "seconds", log=True, marks=marks),
        Axis(f"recall of the exact top {report.settings['top_k']}", "percent", highest=1.02),
        f"What approximate search finds at {size(largest)} tokens", _subject(report),
    )  # fmt: skip


def _subject(report: Report) -> str:
    told = report.settings
    heads = f"{told['query_heads']} query heads over {told['kv_heads']} × {told['head_dim']}"
    return f"{told['model']}, {told['parameters'] / 1e6:.2f}M parameters, {heads}, top {told['top_k']}"
