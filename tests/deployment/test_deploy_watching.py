"""The alerts and the dashboard of deploy/ ask for figures that the services really give."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import promql_parser
import pytest
import yaml
from prometheus_client import generate_latest

from memory_service.server.metrics import Metrics
from model_worker.api.traffic import Traffic
from model_worker.serving.load import Load

DEPLOY = Path(__file__).parents[2] / "deploy"
ALERTS = yaml.safe_load((DEPLOY / "prometheus/alerts.yaml").read_text())
SCRAPE = yaml.safe_load((DEPLOY / "prometheus/scrape.yaml").read_text())
DASHBOARD = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
OF_PROMETHEUS = {"up"}
LABELS = {"job", "instance", "le", "method", "code", "pool", "limit", "outcome", "kind", "state"}


def expressions() -> Iterator[tuple[str, str]]:
    for group in ALERTS["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield f"{panel['id']} {panel['title']} {target['refId']}", target["expr"].replace("$__rate_interval", "5m")


EXPRESSIONS = dict(expressions())
every_expression = pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=list(EXPRESSIONS))


def selectors(node: Any) -> Iterator[promql_parser.VectorSelector]:
    """Every series an expression asks for."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for part in ("vector_selector", "expr", "lhs", "rhs"):
        if hasattr(node, part):
            yield from selectors(getattr(node, part))
    for argument in getattr(node, "args", []):
        yield from selectors(argument)


def names_given() -> set[str]:
    """Of all series that a memory service and a worker can have, by what their pages declare."""
    metrics = Metrics()
    metrics.watch_store(lambda: True, lambda: True, lambda: False, DEPLOY)
    idle = Load(**dict.fromkeys((field.name for field in fields(Load)), 0))
    page = generate_latest(metrics.registry).decode() + Traffic(1).page(idle)
    found = set(OF_PROMETHEUS)
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", page, re.MULTILINE):
        found |= {f"{name}_bucket", f"{name}_sum", f"{name}_count"} if kind == "histogram" else {name}
    return found


GIVEN = names_given()


@every_expression
def test_what_is_asked_for_is_given(expression: str) -> None:
    asked = list(selectors(promql_parser.parse(expression)))
    assert asked
    assert {one.name for one in asked} <= GIVEN
    assert {matcher.name for one in asked for matcher in one.matchers.matchers} <= LABELS
    assert set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", expression)))) <= LABELS


@every_expression
def test_jobs_are_those_that_are_scraped(expression: str) -> None:
    jobs = {job["job_name"] for job in SCRAPE["scrape_configs"]}
    asked = selectors(promql_parser.parse(expression))
    assert {m.value for one in asked for m in one.matchers.matchers if m.name == "job"} <= jobs


def test_a_figure_that_nobody_gives_is_noticed() -> None:
    (asked,) = selectors(promql_parser.parse("rate(fot_no_such_total[5m]) > 1"))
    assert asked.name == "fot_no_such_total"
    assert asked.name not in GIVEN


def test_every_figure_of_our_own_is_looked_at() -> None:
    asked = {one.name for expression in EXPRESSIONS.values() for one in selectors(promql_parser.parse(expression))}
    ours = {name for name in GIVEN if name.startswith("fot_") and not name.endswith("_created")}
    assert ours <= asked


def test_alerts_are_what_prometheus_reads() -> None:
    jsonschema.validate(ALERTS, json.loads((DEPLOY / "schemas/alerts.json").read_text()))
    names = [rule["alert"] for group in ALERTS["groups"] for rule in group["rules"]]
    assert len(names) == len(set(names))


def test_panels_stand_beside_each_other_and_are_numbered_once() -> None:
    panels = DASHBOARD["panels"]
    assert [number for number, count in Counter(panel["id"] for panel in panels).items() if count > 1] == []
    taken: Counter[tuple[int, int]] = Counter()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        taken.update((place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"]))
    assert max(taken.values()) == 1


def test_panels_ask_the_chosen_prometheus_and_variables_exist() -> None:
    variables = {one["name"] for one in DASHBOARD["templating"]["list"]}
    text = json.dumps(DASHBOARD)
    used = set(re.findall(r"\$\{?([a-z_]+)", text)) - {"__rate_interval", "__all"}
    assert used <= variables
    assert all(panel["type"] == "row" or panel["datasource"]["uid"] == "${datasource}" for panel in DASHBOARD["panels"])
