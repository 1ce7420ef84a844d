"""Rules, alerts and the dashboard name series that the server has; the alerts fire when they should."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from dockerfile import arguments

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
    links = re.findall(r"runbook_url: (.+)", alerts)
    assert links == [f'"{{{{ $externalLabels.runbooks }}}}#{name.lower()}"' for name in names]
    headings = re.findall(r"^### (\w+)\n\S", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert sorted(headings) == sorted(names)


def test_compose_serves_the_page_that_the_alerts_link_to():
    (page,) = re.findall(r'runbooks: "(\S+)"', (PROMETHEUS / "prometheus.yaml").read_text())
    port, path = re.fullmatch(r"http://localhost:(\d+)/(\S+)", page).groups()
    compose = (ROOT / "docker" / "compose.yaml").read_text()
    assert f'"127.0.0.1:{port}:{port}"' in compose.split("\n  docs:\n")[1].split("\n\n")[0]
    assert path == "operations.html" and (ROOT / "docs" / "operations.md").exists()
    assert f'"{port}"' in arguments("Dockerfile.docs", "CMD")[0]


def test_the_autoscaler_asks_for_series_that_exist_by_names_that_the_adapter_gives():
    adapter = (PROMETHEUS / "adapter.yaml").read_text()
    asked = set(re.findall(r"seriesQuery: '(\w+)\{", adapter))
    assert asked and asked <= known()
    joined = re.findall(r"=~\"(\w+)_\((\w+)\|(\w+)\)\"", adapter)
    assert {f"{start}_{end}" for start, *ends in joined for end in ends} <= known() and joined
    given = (asked - {"lowkey_requests_running"}) | set(re.findall(r"as: (\w+)", adapter))
    template = (ROOT / "deploy" / "helm" / "lowkey" / "templates" / "hpa.yaml").read_text()
    assert set(re.findall(r"metric: \{name: (\w+)\}", template)) == given


@pytest.mark.skipif(
    shutil.which("amtool") is None, reason="needs amtool (apt install prometheus-alertmanager)"
)
@pytest.mark.parametrize(("severity", "receiver"), [("page", "pages"), ("ticket", "tickets")])
def test_alertmanager_tells_pages_from_tickets(severity, receiver):
    config = ROOT / "deploy" / "alertmanager" / "alertmanager.yaml"
    for command in (
        ["check-config", str(config)],
        ["config", "routes", "test", f"--config.file={config}", f"severity={severity}", "alertname=X"],
    ):
        done = subprocess.run(["amtool", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() == receiver
    assert f"severity: {severity}" in (PROMETHEUS / "alerts.yaml").read_text()


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
    served = tomllib.loads((ROOT / "docker" / "config" / "lowkey.toml").read_text())["variants"]
    assert set(served) == {"dense", "reduced"}


def test_the_chart_sets_variables_that_the_server_reads():
    from server.settings import Settings

    template = (ROOT / "deploy" / "helm" / "lowkey" / "templates" / "deployment.yaml").read_text()
    used = {name.lower() for name in re.findall(r"LOWKEY_([A-Z_]+)", template)}
    assert used and used <= set(Settings.model_fields), used - set(Settings.model_fields)
