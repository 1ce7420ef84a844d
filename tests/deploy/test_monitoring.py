"""Rules, alerts and the dashboard name series that the server has; the alerts fire when they should."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from server.api.serving.metrics import Metrics
from server.hub.metrics import HubMetrics

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"


def known() -> set[str]:
    """Every sample name that the server may expose."""
    names = set()
    for family in [*Metrics().registry.collect(), *HubMetrics().registry.collect()]:
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


def test_every_alert_has_its_place_on_the_page_that_says_what_to_do():
    alerts = (PROMETHEUS / "alerts.yaml").read_text()
    names = re.findall(r"- alert: (\w+)", alerts)
    assert re.findall(r"runbook: (\S+)", alerts) == [f"docs/operations.md#{name.lower()}" for name in names]
    headings = re.findall(r"^### (\w+)\n\S", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(names)


def test_alerts_go_by_a_name_that_the_job_of_every_release_has():
    jobs = re.findall(r'job=~"([^"]+)"', (PROMETHEUS / "alerts.yaml").read_text())
    # What `lowkey.name` of the chart makes of a release's name is its service, and its job.
    for release, service in {"lowkey": "lowkey", "prod": "prod-lowkey", "my-lowkey-2": "my-lowkey-2"}.items():
        assert jobs and all(re.fullmatch(job, service) for job in jobs), release
    assert not any(re.fullmatch(job, "node-exporter") for job in jobs)


def test_every_panel_asks_something_of_the_chosen_variants():
    panels = json.loads((ROOT / "deploy" / "grafana" / "lowkey.json").read_text())["panels"]
    queries = [t["expr"] for panel in panels if panel["type"] != "row" for t in panel["targets"]]
    assert len(queries) > 20 and all(re.search(r'variant=~"\$variant\|?"', q) for q in queries)


@pytest.mark.slow
def test_the_dashboard_is_what_its_generator_writes(tools, tmp_path):
    grafana, made = ROOT / "deploy" / "grafana", tmp_path / "lowkey.json"
    subprocess.run([tools / "python", grafana / "generate.py", made], check=True, timeout=120)
    assert made.read_text() == (grafana / "lowkey.json").read_text()


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
