"""Rules, alerts and the dashboard name series that the server has; the alerts fire when they should."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from server.metrics import Metrics

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"


def known() -> set[str]:
    """Every sample name that the server may expose."""
    names = set()
    for family in Metrics().registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        names |= {family.name + suffix for suffix in suffixes}
    return names


def named(text: str) -> set[str]:
    return set(re.findall(r"\blowkey_[a-z0-9_]+", text))


@pytest.mark.parametrize("file", ["prometheus/rules.yaml", "prometheus/alerts.yaml", "grafana/lowkey.json"])
def test_every_series_exists(file):
    text = (ROOT / "deploy" / file).read_text()
    used = named(text)
    assert used and used <= known(), used - known()


def test_the_recording_rules_that_alerts_read_exist():
    defined = set(re.findall(r"record: (\S+)", (PROMETHEUS / "rules.yaml").read_text()))
    used = set(re.findall(r"\blowkey:[a-z0-9_:]+", (PROMETHEUS / "alerts.yaml").read_text()))
    assert used and used <= defined


def test_every_panel_asks_something_of_the_chosen_variants():
    panels = json.loads((ROOT / "deploy" / "grafana" / "lowkey.json").read_text())["panels"]
    queries = [t["expr"] for panel in panels if panel["type"] != "row" for t in panel["targets"]]
    assert len(queries) > 20 and all('variant=~"$variant"' in q for q in queries)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (apt install prometheus)")
def test_the_alerts_fire_when_they_should():
    result = subprocess.run(
        ["promtool", "test", "rules", "tests.yaml"], cwd=PROMETHEUS, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_compose_serves_the_variants_that_it_describes():
    served = tomllib.loads((ROOT / "docker" / "lowkey.toml").read_text())["variants"]
    assert set(served) == {"dense", "reduced"}


def test_the_chart_sets_variables_that_the_server_reads():
    from server.settings import Settings

    template = (ROOT / "deploy" / "helm" / "lowkey" / "templates" / "deployment.yaml").read_text()
    used = {name.lower() for name in re.findall(r"LOWKEY_([A-Z_]+)", template)}
    assert used and used <= set(Settings.model_fields), used - set(Settings.model_fields)
