"""Helm, and schemas of Kubernetes, the Prometheus operator and compose, for tests that run in another environment: JSON
in, JSON out.

python tools.py chart DIRECTORY < VALUES       findings of `helm lint --strict`, manifests, errors
python tools.py kubernetes < YAML               errors in manifests
python tools.py operator < MANIFESTS            errors in manifests of the Prometheus operator
python tools.py compose < TEXT                 services, or the error
"""

import json
import sys
from typing import Any

VERSIONS = ("1.28.0", "1.37.0")
"""The oldest Kubernetes that the chart takes, and the newest whose schemas the package has."""


def chart(directory: str, values: dict[str, Any]) -> dict[str, Any]:
    import helm_python
    import yaml

    with helm_python.Chart.load(directory) as loaded:
        try:
            loaded.validate_schema(values)
            rendered = loaded.render(values, name="blue", namespace="serving", is_install=True)
        except helm_python.HelmError as e:
            return {"errors": [str(e)]}
    documents = [
        doc
        for name, text in rendered.items()
        if name.endswith(".yaml")
        for doc in yaml.safe_load_all(text)
        if isinstance(doc, dict)
    ]
    lint = helm_python.lint(directory, values, strict=True, namespace="serving")
    findings = [m["error"] for m in lint["messages"] if m["severity"] > 1] + lint["errors"]
    return {**kubernetes(documents), "lint": findings, "manifests": documents}


def kubernetes(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors in manifests, and kinds that Kubernetes has no schema for."""
    import kubernetes_validate

    errors, unknown = [], []
    for doc in documents:
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(doc, version, strict=True)
            except kubernetes_validate.SchemaNotFoundError:
                unknown.append(doc["kind"])
            except kubernetes_validate.ValidationError as e:
                errors.append(f"{version} {doc['kind']}: {e.message} at {list(e.path)}")
    return {"errors": errors, "unknown": unknown}


def operator(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """The models take fields that they do not know, and leave them out again: so all that went in must come out."""
    from cloudcoil.models.prometheus_operator import v1
    from pydantic import ValidationError

    errors = []
    for given in manifests:
        try:
            taken = getattr(v1, given["kind"]).model_validate(given)
        except ValidationError as e:
            errors.append(str(e))
            continue
        known = taken.model_dump(mode="json", by_alias=True, exclude_unset=True)
        errors += [f"unknown: {path}" for path in _missing(given["spec"], known["spec"], "spec")]
    return {"errors": errors}


def _missing(given: Any, known: Any, path: str) -> list[str]:
    """Paths of what is in `given` and not in `known`."""
    if isinstance(given, dict):
        return [
            missing
            for name, value in given.items()
            for missing in (
                _missing(value, known[name], f"{path}.{name}") if name in known else [f"{path}.{name}"]
            )
        ]
    if isinstance(given, list):
        pairs = enumerate(zip(given, known, strict=True))
        return [missing for i, (a, b) in pairs for missing in _missing(a, b, f"{path}.{i}")]
    return []


def compose(text: str) -> dict[str, Any]:
    import yaml
    from compose_spec import PyCompose

    try:
        PyCompose.from_yaml(text).validate()
    except ValueError as e:
        return {"errors": [str(e)]}
    return {"errors": [], "services": yaml.safe_load(text)["services"]}


if __name__ == "__main__":
    given = sys.stdin.read()
    match sys.argv[1:]:
        case ["chart", directory]:
            answer = chart(directory, json.loads(given))
        case ["kubernetes"]:
            import yaml

            answer = kubernetes(list(yaml.safe_load_all(given)))
        case ["operator"]:
            answer = operator(json.loads(given))
        case ["compose"]:
            answer = compose(given)
    print(json.dumps(answer))
