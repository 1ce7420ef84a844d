"""A real Prometheus with the project's configuration and rules scrapes a real server: every rule and every query of the
dashboard finds what it asks for, and an alert arrives at a real Alertmanager."""

import contextlib
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import httpx
import pytest
from live_server import CONTEXT, DEADLINE_S, ENDLESS, LiveServer, poll, write_variants

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
VARIANTS = {"dense", "reduced"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        shutil.which("prometheus") is None or shutil.which("prometheus-alertmanager") is None,
        reason="needs both (apt install prometheus prometheus-alertmanager)",
    ),
]

SHADOW = """
[[shadow]]
from = "dense"
to = "reduced"
fraction = 1.0
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    variants = "".join(f'{name} = "{path}"\n' for name, path in write_variants(folder).items())
    (folder / "lowkey.toml").write_text(f"[variants]\n{variants}{SHADOW}")
    server = LiveServer(folder / "log", "--config", str(folder / "lowkey.toml"))
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@contextlib.contextmanager
def running(folder, program, *arguments):
    """The address that one of Prometheus' programs listens on in this block."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
    with (folder / "log").open("wb") as log:
        command = [program, *arguments, f"--web.listen-address={address}"]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        poll(lambda: process.poll() is not None or ready(f"http://{address}"), f"{program} is ready")
        assert process.poll() is None, (folder / "log").read_text()
        yield address
    finally:
        process.terminate()
        process.wait(DEADLINE_S)


@pytest.fixture(scope="module")
def alertmanager(tmp_path_factory):
    """Its address."""
    folder = tmp_path_factory.mktemp("alertmanager")
    config = DEPLOY / "alertmanager" / "alertmanager.yaml"
    arguments = (f"--config.file={config}", f"--storage.path={folder / 'data'}", "--cluster.listen-address=")
    with running(folder, "prometheus-alertmanager", *arguments) as address:
        yield address


@pytest.fixture(scope="module")
def prometheus(server, alertmanager, tmp_path_factory):
    """Its URL. The configuration is deploy/prometheus's but for where the others are."""
    folder = tmp_path_factory.mktemp("prometheus")
    shutil.copytree(DEPLOY / "prometheus", folder / "etc")
    config = folder / "etc" / "prometheus.yaml"
    text = config.read_text()
    for name, place in {
        "lowkey:8000": server.url.removeprefix("http://"),
        "alertmanager:9093": alertmanager,
    }.items():
        assert text.count(f'"{name}"') == 1
        text = text.replace(f'"{name}"', f'"{place}"')
    config.write_text(text)
    arguments = (f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}")
    with running(folder, "prometheus", *arguments) as address:
        yield f"http://{address}"


def ready(url):
    try:
        return httpx.get(f"{url}/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def query(prometheus, expr):
    answer = httpx.get(f"{prometheus}/api/v1/query", params={"query": expr}, timeout=DEADLINE_S).json()
    assert answer["status"] == "success", answer
    return answer["data"]["result"]


def traffic(server):
    """A little of everything that is counted."""
    prompt = [1 + i % 90 for i in range(130)]
    for name in sorted(VARIANTS):
        for _ in range(3):
            server.events(model=name, prompt=prompt, max_tokens=12)
        too_long = {"model": name, "prompt": [1] * (CONTEXT + 1), "max_tokens": 1}
        assert server.http.post("/v1/completions", json=too_long).status_code == 400
    answer = server.http.post("/v1/compare", json={"prompt": "Once upon", "max_tokens": 8})
    assert answer.status_code == 200, answer.text


@pytest.fixture(scope="module")
def scraped(server, prometheus):
    """Prometheus after traffic, and after each engine died under a request and came back."""
    traffic(server)
    poll(lambda: len(query(prometheus, "lowkey_engine_up == 1")) == 2, "the first scrape")
    for name in sorted(VARIANTS):
        body = {"model": name, "prompt": "Once", "max_tokens": ENDLESS, "ignore_eos": True, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            pieces = response.iter_bytes()
            next(pieces)
            server.engines()[name].kill()
            assert b"error" in b"".join(pieces)
        ready = f"/ready?variant={name}"
        poll(lambda path=ready: server.http.get(path).status_code == 200, "it is back")
    # Rates need two samples of every series, recorded ones an evaluation (15 s) after that.
    names = re.findall(r"record: (\S+)", (DEPLOY / "prometheus" / "rules.yaml").read_text())
    missing = set(names)

    def all_there():
        traffic(server)
        missing.difference_update({name for name in missing if query(prometheus, name)})
        return not missing

    poll(all_there, f"all recorded series, {missing}", 3 * DEADLINE_S)
    return prometheus


def test_every_rule_is_healthy(scraped):
    groups = httpx.get(f"{scraped}/api/v1/rules", timeout=DEADLINE_S).json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) > 15
    assert [(r["name"], r["lastError"]) for r in rules if r["health"] != "ok"] == []


def test_the_target_is_up_and_no_recorded_series_is_empty(scraped):
    (up,) = query(scraped, 'up{job="lowkey"}')
    assert up["value"][1] == "1"
    for name in re.findall(r"record: (\S+)", (DEPLOY / "prometheus" / "rules.yaml").read_text()):
        labels = {series["metric"]["variant"] for series in query(scraped, name)}
        assert labels == ({"reduced"} if "shadow" in name else VARIANTS), name


def test_the_autoscaler_finds_a_number_of_requests(scraped):
    """What the adapter makes of its queries, by the labels that there are without Kubernetes."""
    adapter = (DEPLOY / "prometheus" / "adapter.yaml").read_text()
    series = re.findall(r"seriesQuery: '(\w+)", adapter)
    queries = re.findall(r"metricsQuery: (.+)", adapter)
    assert len(series) == len(queries) == 2
    for name, expr in zip(series, queries, strict=True):
        for part, value in {"GroupBy": "job", "LabelMatchers": 'job="lowkey"', "Series": name}.items():
            expr = expr.replace(f"<<.{part}>>", value)
        (found,) = query(scraped, expr)
        assert float(found["value"][1]) >= 0, expr


def test_an_alert_arrives_with_its_link(server, prometheus, alertmanager):
    config = server.log.with_name("lowkey.toml")
    good = config.read_text()

    def reload(text, says):
        already = len(server.log.read_text())
        config.write_text(text)
        server.process.send_signal(signal.SIGHUP)
        poll(lambda: says in server.log.read_text()[already:], f"the log says {says}")

    reload("port = ", "the old configuration stays")
    alerts = f"http://{alertmanager}/api/v2/alerts"
    try:
        (alert,) = poll(
            lambda: httpx.get(alerts, params={"filter": 'alertname="LowkeyReloadFailed"'}).json(), "it fires"
        )
    finally:
        reload(good, "SIGHUP: read aliases")
    assert [receiver["name"] for receiver in alert["receivers"]] == ["tickets"]
    assert alert["labels"].keys() == {"alertname", "job", "instance", "severity"}
    (page,) = re.findall(r'runbooks: "(\S+)"', (DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    assert alert["annotations"]["runbook_url"] == f"{page}#lowkeyreloadfailed"


def test_every_query_of_the_dashboard_finds_every_variant(scraped):
    api = f"{scraped}/api/v1"

    def ask(path, **parameters):
        answer = httpx.get(f"{api}/{path}", params=parameters, timeout=DEADLINE_S).json()
        assert answer["status"] == "success", (parameters, answer)
        return answer["data"]

    # What Grafana puts in place of its variables where "All" is chosen.
    of_lowkey = {"match[]": "lowkey_variant_info"}
    variables = {
        f"${name}": "|".join(ask(f"label/{name}/values", **of_lowkey)) for name in ("job", "variant")
    }
    variables |= {"$__rate_interval": "1m", "$__range": "600s"}
    panels = json.loads((DEPLOY / "grafana" / "lowkey.json").read_text())["panels"]
    drawn = [panel for panel in panels if panel["type"] != "row"]
    assert len(drawn) > 15
    now = time.time()
    for panel in drawn:
        for target in panel["targets"]:
            expr = target["expr"]
            for name, value in variables.items():
                expr = expr.replace(name, value)
            series = ask("query_range", query=expr, start=now - 600, end=now, step=5)["result"]
            finite = (s["metric"] for s in series if any(math.isfinite(float(v)) for _, v in s["values"]))
            labels = list(finite)
            compared = {each["baseline"] for each in labels if "baseline" in each}
            variants = {each["variant"] for each in labels if each.get("variant")}
            assert variants == ({"reduced"} if compared else VARIANTS), panel["title"]
            assert compared <= {"dense"}
