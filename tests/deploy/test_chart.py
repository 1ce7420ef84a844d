"""The Helm chart: lint, the Kubernetes schemas, and that its parts fit each other and the server."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from dockerfile import environment as environment_of_image

from server.settings import Settings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "lowkey"

FULL = {
    "replicas": 3,
    "image": {"repository": "registry.example/lowkey", "tag": "cuda"},
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
    "metrics": {"serviceMonitor": True},
}
CASES = {"default": {}, "full": FULL, "host path": {"models": {"hostPath": "/srv/models"}}}


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
    assert set(rendered["unknown"]) <= {"ServiceMonitor"}, "kinds that Kubernetes has no schema for"


def test_names_fit(rendered):
    deployment, service = manifest(rendered, "Deployment"), manifest(rendered, "Service")
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"]
    selectors = [deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"]]
    selectors += [
        m["spec"]["selector"]["matchLabels"]
        for m in rendered["manifests"]
        if m["kind"] in ("PodDisruptionBudget", "ServiceMonitor")
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
    assert container(full)["image"] == "registry.example/lowkey:cuda"
    assert manifest(full, "PodDisruptionBudget")["spec"]["minAvailable"] == 1


def test_compiled_kernels_may_outlive_the_pod(check):
    def cache(values):
        spec = manifest(check("chart", str(CHART), given=json.dumps(values)), "Deployment")["spec"][
            "template"
        ]["spec"]
        (volume,) = [v for v in spec["volumes"] if v["name"] == "cache"]
        return volume

    assert cache(FULL)["persistentVolumeClaim"] == {"claimName": "cache"}
    assert cache({})["emptyDir"] == {"sizeLimit": "20Gi"}
    (kept,) = [
        m for m in container(check("chart", str(CHART), given="{}"))["volumeMounts"] if m["name"] == "cache"
    ]
    assert Path(environment_of_image("Dockerfile")["TRITON_CACHE_DIR"]).is_relative_to(kept["mountPath"])


def test_one_replica_does_not_keep_its_node_from_being_drained(check):
    alone = check("chart", str(CHART), given="{}")
    assert "PodDisruptionBudget" not in {m["kind"] for m in alone["manifests"]}


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"replicas": "two"}, "replicas"),
        ({"replcas": 2}, "replcas"),
        ({"models": {"hostPath": "models"}}, "hostPath"),
        ({"cache": {"sizeLimit": "lots"}}, "sizeLimit"),
    ],
)
def test_wrong_values_are_refused_by_name(check, values, word):
    (error,) = check("chart", str(CHART), given=json.dumps(values))["errors"]
    assert word in error


def test_the_schemas_do_refuse(check, tmp_path):
    """The check above can fail: a manifest with a misspelt field is found."""
    broken = tmp_path / "lowkey"
    subprocess.run(["cp", "-r", CHART, broken], check=True)
    template = broken / "templates" / "deployment.yaml"
    template.write_text(template.read_text().replace("readinessProbe:", "readynessProbe:"))
    errors = check("chart", str(broken), given="{}")["errors"]
    assert errors and all("readynessProbe" in e for e in errors)
