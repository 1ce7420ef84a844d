"""The Dockerfiles and compose.yaml: lint, schema, and that they fit each other, the project and what they mount."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from dockerfile import DOCKER, ROOT, arguments, environment

from lowkey import __version__
from server.settings import Settings

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FILES = ("Dockerfile", "Dockerfile.cpu")
GIVEN = {"LOWKEY_MODELS": "/srv/models", "GRAFANA_PASSWORD": "secret"}


def interpolated():
    """compose.yaml as docker compose reads it: ${NAME:-default}, ${NAME:?needed}."""

    def value(match):
        given = GIVEN.get(match[1])
        assert given is not None or match[2] == "-", f"{match[1]} is needed: {match[3]}"
        return given or match[3]

    return re.sub(r"\$\{(\w+):([-?])([^}]*)\}", value, (DOCKER / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def services(check):
    answer = check("compose", given=interpolated())
    assert answer["errors"] == []
    return answer["services"]


@pytest.mark.slow
def test_hadolint_finds_nothing(tools):
    done = subprocess.run(
        [tools / "hadolint", *sorted(DOCKER.glob("Dockerfile*"))], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", FILES)
def test_an_image_has_the_whole_project_and_its_pinned_torch(file):
    copied = [c.split() for c in arguments(file, "COPY") if not c.startswith("--from")]
    sources = {source for *sources, _ in copied for source in sources}
    assert all((ROOT / source).exists() for source in sources)
    assert set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) <= sources
    (torch,) = {t for run in arguments(file, "RUN") for t in re.findall(r"torch==\S+", run)}
    assert torch in (ROOT / "constraints.txt").read_text().split()
    assert all(
        "--constraint constraints.txt" in run for run in arguments(file, "RUN") if "pip install" in run
    )
    extras = {e for run in arguments(file, "RUN") for e in re.findall(r"'\.\[(\w+)\]'", run)}
    assert extras <= set(PROJECT["project"]["optional-dependencies"])


@pytest.mark.parametrize("file", FILES)
def test_an_image_runs_unprivileged_and_asks_the_port_that_it_serves(file):
    values = environment(file)
    settings = {k.removeprefix("LOWKEY_").lower() for k in values if k.startswith("LOWKEY_")}
    assert settings and settings <= set(Settings.model_fields)
    (health,) = arguments(file, "HEALTHCHECK")
    assert arguments(file, "EXPOSE") == [values["LOWKEY_PORT"]]
    assert f"http://127.0.0.1:{values['LOWKEY_PORT']}/health" in health
    assert arguments(file, "USER") == ["10001:10001"] and "--uid 10001" in " ".join(arguments(file, "RUN"))
    written = {values["HOME"], *json.loads(arguments(file, "VOLUME")[0])}
    (made,) = re.findall(
        r"install --directory --owner=lowkey --group=lowkey ([\w/ ]+)", " ".join(arguments(file, "RUN"))
    )
    assert written <= set(made.split())


def test_the_two_images_differ_in_the_device_only():
    """One that is changed and the other forgotten."""
    same = ("COPY", "VOLUME", "USER", "WORKDIR", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT", "CMD")
    for instruction in same:
        cuda, cpu = (arguments(file, instruction) for file in FILES)
        assert cuda == cpu, instruction


@pytest.mark.slow
def test_a_field_that_compose_does_not_know_is_found(check):
    wrong = interpolated().replace("shm_size:", "shm_sizes:")
    (error,) = check("compose", given=wrong)["errors"]
    assert "shm_sizes" in error


def test_the_page_gives_compose_all_that_it_needs():
    """Each command reads compose.yaml anew, and refuses it while a variable is missing: they have to be kept."""
    (written,) = re.findall(
        r"printf '(.*)' .* > docker/\.env\)$", (ROOT / "docs" / "operations.md").read_text(), re.M
    )
    needed = re.findall(r"\$\{(\w+):\?", (DOCKER / "compose.yaml").read_text())
    assert set(re.findall(r"([A-Z_]+)=%s", written)) == set(needed)
    assert "/docker/.env\n" in (ROOT / ".gitignore").read_text()


@pytest.mark.slow
def test_compose_fits_what_it_mounts(services):
    for name, service in services.items():
        for mount in service.get("volumes", []):
            if isinstance(mount, dict) and mount["type"] == "bind" and mount["source"] not in GIVEN.values():
                assert (DOCKER / mount["source"]).exists(), (name, mount)
    ports = {name: service["ports"][0] for name, service in services.items()}
    assert all(str(port).startswith("127.0.0.1:") for port in ports.values()), "nothing open to the network"
    scraped = re.findall(
        r'job_name: lowkey\s+static_configs: \[\{targets: \["(\w+):(\d+)"\]',
        (ROOT / "deploy/prometheus/prometheus.yaml").read_text(),
    )
    source = (ROOT / "deploy/grafana/provisioning/datasources/prometheus.yaml").read_text()
    asked = re.findall(r'url: "http://(\w+):(\d+)"', source)
    assert len(scraped) == len(asked) == 1
    told = re.findall(
        r'alertmanagers:\s+- static_configs: \[\{targets: \["(\w+):(\d+)"\]',
        (ROOT / "deploy/prometheus/prometheus.yaml").read_text(),
    )
    assert len(told) == 1
    for name, port in (*scraped, *asked, *told):
        assert str(ports[name]).endswith(f":{port}")
    assert environment("Dockerfile.cpu")["LOWKEY_PORT"] == scraped[0][1]


@pytest.mark.slow
def test_compose_starts_what_the_image_is_made_for(services):
    lowkey = services["lowkey"]
    targets = {m["target"] if isinstance(m, dict) else m.split(":")[1] for m in lowkey["volumes"]}
    assert set(json.loads(arguments("Dockerfile.cpu", "VOLUME")[0])) <= targets
    config = Path(json.loads(arguments("Dockerfile.cpu", "CMD")[0])[1])
    (mounted,) = [m for m in lowkey["volumes"] if isinstance(m, dict) and m["target"] == str(config.parent)]
    # A file that is mounted by itself stays what it was when somebody puts another one in its place.
    assert (DOCKER / mounted["source"]).is_dir() and (DOCKER / mounted["source"] / config.name).exists()
    assert (DOCKER.parent / lowkey["build"]["dockerfile"]).exists() and lowkey["read_only"] is True
    settings = Settings(variants={"x": "y"})
    grace = int(re.fullmatch(r"(\d+)s", lowkey["stop_grace_period"])[1])
    assert grace >= settings.drain_delay_s + settings.drain_s + 10
    names = {k.removeprefix("LOWKEY_").lower() for k in lowkey["environment"]}
    assert names <= set(Settings.model_fields)


@pytest.mark.parametrize(("device", "file"), [("cpu", "Dockerfile.cpu"), ("cuda", "Dockerfile")])
def test_make_builds_and_pushes_the_image_that_chart_and_compose_ask_for(device, file):
    def steps(*arguments):
        command = ["make", "--dry-run", "--no-print-directory", *arguments, f"DEVICE={device}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    image = f"lowkey:{__version__}-{device}"
    assert steps("image") == [f"docker build --file docker/{file} --tag {image} ."]
    assert steps("push", "REGISTRY=registry.example/ml")[-1] == f"docker push registry.example/ml/{image}"
    assert f"{__version__}-{device}" in (DOCKER / "compose.yaml").read_text()


def test_what_an_image_copies_reaches_the_builder():
    """.dockerignore lets nothing through that it does not name."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*"
    for file in DOCKER.glob("Dockerfile*"):
        copied = [c.split() for c in arguments(file.name, "COPY") if not c.startswith("--from")]
        assert {source for *sources, _ in copied for source in sources} <= {i.lstrip("!") for i in ignored}


def test_the_chart_is_of_this_version():
    chart = (ROOT / "deploy" / "helm" / "lowkey" / "Chart.yaml").read_text()
    assert f"appVersion: {__version__}\n" in chart
