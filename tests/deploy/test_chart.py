"""The Helm chart: lint, the Kubernetes schemas, and that its parts fit each other and the server."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from dockerfile import environment as environment_of_image

from lowkey import __version__
from server.settings import Settings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "lowkey"

FULL = {
    "replicas": 3,
    "image": {"repository": "registry.example/lowkey", "tag": "special"},
    "imagePullSecrets": [{"name": "registry"}],
    "apiKeysSecret": "lowkey-keys",
    "models": {"existingClaim": "models"},
    "cache": {"existingClaim": "cache"},
    "states": {"existingClaim": "states"},
    "gpu": {"count": 2},
    "nodeSelector": {"gpu": "h100"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    "podAnnotations": {"a": "b"},
    "priorityClassName": "high",
    "service": {"type": "LoadBalancer", "port": 80},
    "drain": {"delaySeconds": 20, "seconds": 300},
    "metrics": {
        "serviceMonitor": True,
        "prometheusRule": True,
        "labels": {"release": "kube-prometheus-stack"},
        "runbooks": "https://docs.example/operations.html",
    },
    "ingress": {"enabled": True, "className": "nginx", "host": "lowkey.example", "tlsSecret": "lowkey-tls"},
    "networkPolicy": {
        "enabled": True,
        "from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}}}],
        "egress": [{"ports": [{"port": 443, "protocol": "TCP"}]}],
    },
    "autoscaling": {"enabled": True, "minReplicas": 2, "maxReplicas": 9},
}
MINIMAL = {"models": {"existingClaim": "models"}}
CASES = {"minimal": MINIMAL, "full": FULL, "host path": {"models": {"hostPath": "/srv/models"}}}
NEEDS_MORE = {"ServiceMonitor", "PrometheusRule", "HorizontalPodAutoscaler", "Ingress", "NetworkPolicy"}
"""Kinds that a cluster may have no use for, or no schema."""


@pytest.fixture(scope="module", params=CASES)
def rendered(request, check):
    answer = check("chart", str(CHART), given=json.dumps(CASES[request.param]))
    assert answer["errors"] == []
    return answer


def manifest(rendered, kind):
    (found,) = [m for m in rendered["manifests"] if m["kind"] == kind]
    return found


def container(rendered):
    (only,) = manifest(rendered, "Deployment")["spec"]["template"]["spec"]["containers"]
    return only


def environment(rendered):
    return {e["name"]: e["value"] for e in container(rendered)["env"]}


def test_lint_and_schemas_find_nothing(rendered):
    assert rendered["lint"] == []
    assert set(rendered["unknown"]) <= {"ServiceMonitor", "PrometheusRule"}, (
        "kinds of the Prometheus operator"
    )


def test_names_fit(rendered):
    deployment, service = manifest(rendered, "Deployment"), manifest(rendered, "Service")
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"]
    selectors = [deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"]]
    selectors += [
        m["spec"].get("selector", m["spec"].get("podSelector"))["matchLabels"]
        for m in rendered["manifests"]
        if m["kind"] in ("PodDisruptionBudget", "ServiceMonitor", "NetworkPolicy")
    ]
    assert all(selector and selector.items() <= labels.items() for selector in selectors)
    ports = {p["name"] for p in container(rendered)["ports"]}
    assert {p["targetPort"] for p in service["spec"]["ports"]} <= ports
    mounts = {m["name"] for m in container(rendered)["volumeMounts"]}
    assert mounts == {v["name"] for v in pod["spec"]["volumes"]}


def test_probes_ask_for_paths_that_answer_without_a_key(rendered):
    public = Settings(variants={"x": "y"}).public_paths
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        get = container(rendered)[probe]["httpGet"]
        assert get["path"] in public and get["port"] == "http"
    assert container(rendered)["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert container(rendered)["livenessProbe"]["httpGet"]["path"] == "/health"


def test_a_pod_is_killed_after_it_has_drained_and_leaves_after_it_is_known_to(rendered):
    values, spec = environment(rendered), manifest(rendered, "Deployment")["spec"]["template"]["spec"]
    delay, drain = float(values["LOWKEY_DRAIN_DELAY_S"]), float(values["LOWKEY_DRAIN_S"])
    assert spec["terminationGracePeriodSeconds"] >= delay + drain + 10
    readiness = container(rendered)["readinessProbe"]
    assert delay > readiness["periodSeconds"] * readiness["failureThreshold"]


def test_the_server_takes_what_the_chart_gives_it(rendered, tmp_path):
    config = tmp_path / "lowkey.toml"
    text = manifest(rendered, "ConfigMap")["data"]["lowkey.toml"]
    models = tmp_path / "models"  # the server looks whether they are there
    for path in re.findall(r'"/models/(\w+)"', text):
        (models / path).mkdir(parents=True)
        for file in ("config.json", "model.safetensors", "tokenizer.json"):
            (models / path / file).touch()
    config.write_text(text.replace("/models/", f"{models}/"))
    values = environment(rendered)
    keys = values.pop("LOWKEY_API_KEYS_FILE", None)
    if keys is not None:
        mounts = {m["name"]: m["mountPath"] for m in container(rendered)["volumeMounts"]}
        assert Path(keys) == Path(mounts["keys"]) / "keys"
        (tmp_path / "keys").write_text('someone = "0123456789abcdef0123456789abcdef"\n')
        values["LOWKEY_API_KEYS_FILE"] = str(tmp_path / "keys")
    assert container(rendered)["args"] == ["--config", "/etc/lowkey/lowkey.toml"]
    done = subprocess.run(
        [Path(sys.executable).parent / "lowkey-serve", "--config", config, "--check-config"],
        env={**os.environ, **values},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    settings = json.loads(done.stdout)
    assert set(settings["variants"]) == {"dense", "reduced"}
    assert settings["port"] == container(rendered)["ports"][0]["containerPort"]


def test_gpus_and_pull_secrets_arrive(check):
    full = check("chart", str(CHART), given=json.dumps(FULL))
    assert container(full)["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert container(full)["image"] == "registry.example/lowkey:special"
    assert manifest(full, "PodDisruptionBudget")["spec"]["minAvailable"] == 1


def render(check, **values):
    return check("chart", str(CHART), given=json.dumps({**MINIMAL, **values}))


@pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (1, "cuda")])
def test_the_image_is_by_default_the_one_that_make_builds(check, gpus, device):
    assert container(render(check, gpu={"count": gpus}))["image"] == f"lowkey:{__version__}-{device}"


def test_the_documented_installation_is_one(check):
    page = (ROOT / "docs" / "operations.md").read_text()
    (command,) = re.findall(r"^ +helm install lowkey (deploy/helm/lowkey(?:.*\\\n)*.*)$", page, re.MULTILINE)
    chart, *options = command.replace("\\\n", " ").split()
    assert ROOT / chart == CHART and set(options[::2]) == {"--set"}
    values = {}
    for option in [*options[1::2], "gpu.count=1"]:  # and with what the next paragraph says
        name, _, value = option.partition("=")
        *tables, last = name.split(".")
        table = values
        for each in tables:
            table = table.setdefault(each, {})
        table[last] = int(value) if value.isdigit() else value
    answer = check("chart", str(CHART), given=json.dumps(values))
    assert answer["errors"] == [] and answer["lint"] == []
    # What is pushed, and the Secret and the claim that are made before.
    image = f"{values['image']['repository']}:{__version__}-cuda"
    assert container(answer)["image"] == image
    assert f"make push REGISTRY={values['image']['repository'].removesuffix('/lowkey')} " in page
    assert f"kubectl create secret generic {values['apiKeysSecret']} --from-file=keys=keys.toml" in page
    (manifests,) = re.findall(r"<<'EOF'\n(.*?)\n +EOF\n", page, re.DOTALL)
    assert f"metadata: {{name: {values['models']['existingClaim']}}}" in manifests
    assert check("kubernetes", given=textwrap.dedent(manifests)) == {"errors": [], "unknown": []}


def test_what_a_cluster_may_lack_is_off(check):
    assert not {m["kind"] for m in render(check)["manifests"]} & NEEDS_MORE
    assert {m["kind"] for m in render(check, **FULL)["manifests"]} >= NEEDS_MORE


def test_hub_ids_need_no_models(check):
    given = json.dumps({"config": '[variants]\ndense = "fla-hub/delta_net-1.3B-100B"\n'})
    assert check("chart", str(CHART), given=given)["errors"] == []


def test_the_operator_knows_every_field(check):
    theirs = [manifest(render(check, **FULL), kind) for kind in ("ServiceMonitor", "PrometheusRule")]
    assert check("operator", given=json.dumps(theirs))["errors"] == []
    theirs[0]["spec"]["endpoints"][0]["intervall"] = "15s"
    theirs[1]["spec"]["groups"][0]["rules"] = "none"
    misspelt, wrong = check("operator", given=json.dumps(theirs))["errors"]
    assert misspelt == "unknown: spec.endpoints.0.intervall" and "rules" in wrong


def test_prometheus_finds_monitor_and_rules_by_their_labels(check):
    full = render(check, **FULL)
    for kind in ("ServiceMonitor", "PrometheusRule"):
        assert manifest(full, kind)["metadata"]["labels"]["release"] == "kube-prometheus-stack"


def test_the_rules_are_those_that_promtool_tests_and_link_to_their_runbook(check):
    page = FULL["metrics"]["runbooks"]
    groups = manifest(render(check, **FULL), "PrometheusRule")["spec"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    files = "".join(
        (ROOT / "deploy" / "prometheus" / f"{name}.yaml").read_text() for name in ("rules", "alerts")
    )
    names = [rule.get("alert") or rule["record"] for rule in rules]
    assert names == re.findall(r"- (?:alert|record): (\S+)", files)
    for rule in rules:
        if "alert" in rule:
            assert rule["annotations"]["runbook_url"] == f"{page}#{rule['alert'].lower()}"
            assert "externalLabels" not in json.dumps(rule)
    assert "{{ $labels.instance }}" in json.dumps(rules), "Prometheus' own templates are left alone"


def test_the_autoscaler_has_the_say_about_replicas(check):
    full = render(check, **FULL)
    deployment, scaler = manifest(full, "Deployment"), manifest(full, "HorizontalPodAutoscaler")["spec"]
    assert "replicas" not in deployment["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 9)
    assert manifest(full, "PodDisruptionBudget")["spec"]["minAvailable"] == 1
    assert manifest(render(check), "Deployment")["spec"]["replicas"] == 1


def test_nothing_that_needs_no_key_is_open_to_the_internet(check):
    rule = manifest(render(check, **FULL), "Ingress")["spec"]
    (http,) = [r["http"] for r in rule["rules"]]
    assert [(p["path"], p["pathType"]) for p in http["paths"]] == [("/v1", "Prefix")]
    assert rule["tls"] == [{"hosts": ["lowkey.example"], "secretName": "lowkey-tls"}]
    page = {**FULL["ingress"], "paths": ["/v1", "/"]}
    rule = manifest(render(check, **{**FULL, "ingress": page}), "Ingress")["spec"]
    assert rule["rules"][0]["http"]["paths"][1]["pathType"] == "Exact", "the page, and not all there is"


def test_a_policy_lets_the_namespace_in_unless_it_is_told_whom(check):
    policy = manifest(render(check, networkPolicy={"enabled": True}), "NetworkPolicy")["spec"]
    (rule,) = policy["ingress"]
    assert rule["from"] == [{"podSelector": {}}] and policy["egress"] == []
    assert [p["port"] for p in rule["ports"]] == [p["name"] for p in container(render(check))["ports"]]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    full = manifest(render(check, **FULL), "NetworkPolicy")["spec"]
    assert full["ingress"][0]["from"] == FULL["networkPolicy"]["from"]


def test_compiled_kernels_may_outlive_the_pod(check):
    def cache(values):
        spec = manifest(check("chart", str(CHART), given=json.dumps(values)), "Deployment")["spec"][
            "template"
        ]["spec"]
        (volume,) = [v for v in spec["volumes"] if v["name"] == "cache"]
        return volume

    assert cache(FULL)["persistentVolumeClaim"] == {"claimName": "cache"}
    assert cache(MINIMAL)["emptyDir"] == {"sizeLimit": "20Gi"}
    (kept,) = [
        m
        for m in container(check("chart", str(CHART), given=json.dumps(MINIMAL)))["volumeMounts"]
        if m["name"] == "cache"
    ]
    assert Path(environment_of_image("Dockerfile")["TRITON_CACHE_DIR"]).is_relative_to(kept["mountPath"])


def test_one_replica_does_not_keep_its_node_from_being_drained(check):
    alone = check("chart", str(CHART), given=json.dumps(MINIMAL))
    assert "PodDisruptionBudget" not in {m["kind"] for m in alone["manifests"]}


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"replicas": "two"}, "replicas"),
        ({"replcas": 2}, "replcas"),
        ({"models": {"hostPath": "models"}}, "hostPath"),
        ({"cache": {"sizeLimit": "lots"}}, "sizeLimit"),
        ({"ingress": {"enabled": True}}, "host"),
        ({}, "models.existingClaim"),
    ],
)
def test_wrong_values_are_refused_by_name(check, values, word):
    (error,) = check("chart", str(CHART), given=json.dumps(values))["errors"]
    assert word in error


def test_the_schemas_do_refuse(check, tmp_path):
    """The check above can fail: a manifest with a misspelt field is found."""
    broken = tmp_path / "lowkey"
    subprocess.run(["cp", "-rL", CHART, broken], check=True)
    template = broken / "templates" / "deployment.yaml"
    template.write_text(template.read_text().replace("readinessProbe:", "readynessProbe:"))
    errors = check("chart", str(broken), given=json.dumps(MINIMAL))["errors"]
    assert errors and all("readynessProbe" in e for e in errors)
