"""Claims about what docs/serving.md offers beside the server: clients' lines are answered, unit and container start what there is, and the
board asks for metrics that are told."""

from __future__ import annotations

import configparser
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from eyas.commands.parser import parser
from eyas.serve.metrics import Metrics
from tests.serve.serving import listening

ROOT = Path(__file__).parents[2]
SERVING = ROOT / "examples" / "serving"
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE.split("## Clients")[1].split("\n## ")[0], re.S)


def exposed() -> set[str]:
    """The names that /metrics tells."""
    found = set()
    for family in Metrics("m").registry.collect():
        ends = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}[family.type]
        found |= {family.name + end for end in ends}
    return found


def asked_for(text: str) -> set[str]:
    return set(re.findall(r"\beyas:\w+", text))


def test_every_metric_of_the_board_and_of_the_page_is_one_that_is_told():
    board = json.loads((SERVING / "grafana.json").read_text(encoding="utf-8"))
    lines = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(lines) > 12 and all(asked_for(line) <= exposed() for line in lines)
    assert asked_for(json.dumps(board["templating"])) <= exposed() and asked_for(PAGE) <= exposed()
    assert len(asked_for(PAGE)) >= 8 and "eyas:tau" not in exposed()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places)


def test_the_unit_starts_the_server_and_waits_for_it_to_drain():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment]
    unit.read(SERVING / "eyas.service", encoding="utf-8")
    service = unit["Service"]
    _, *words = shlex.split(service["ExecStart"])
    options = parser().parse_args(words)
    assert options.command == "serve" and float(service["TimeoutStopSec"]) > options.drain
    assert "EYAS_CACHE=" in service["Environment"] and "EYAS_API_KEYS" in PAGE and unit["Install"]["WantedBy"]


def test_the_container_starts_the_server_with_what_the_project_has():
    text = (SERVING / "Containerfile").read_text(encoding="utf-8")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    known = {"FROM", "RUN", "COPY", "USER", "ENV", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT"}
    assert {word for word, _ in lines} <= known and lines[0][0] == "FROM"
    told = dict(lines)
    program, *words = json.loads(told["ENTRYPOINT"])
    options = parser().parse_args(words)
    assert program == "eyas" and options.command == "serve" and str(options.port) == told["EXPOSE"]
    assert "serve = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8") and "[serve]" in text
    for command in re.findall(r"-f (\S+)", text):
        assert (ROOT / command).exists()


@pytest.fixture(scope="module")
def address(engine):
    with listening(engine, "--served-model-name", "eyas") as found:
        yield found


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_the_lines_for_clients_are_answered(number, address, capsys):
    text = SNIPPETS[number]
    for module in re.findall(r"^(?:from|import) (\w+)", text, re.M):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    exec(compile(text.replace("http://127.0.0.1:8000/", address), "docs/serving.md", "exec", dont_inherit=True), {})
    assert capsys.readouterr().out.strip()
