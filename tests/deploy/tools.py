"""Helm, the Kubernetes schemas and compose-spec, for tests that run in another environment: JSON in, JSON out.

python tools.py chart DIRECTORY < VALUES       findings of `helm lint --strict`, manifests, errors
python tools.py compose < TEXT                 services, or the error
"""

import json
import sys
from typing import Any

VERSIONS = ("1.28.0", "1.37.0")
"""The oldest Kubernetes that the chart takes, and the newest whose schemas the package has."""


def chart(directory: str, values: dict[str, Any]) -> dict[str, Any]:
    import helm_python
    import kubernetes_validate
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
    errors, unknown = [], []
    for doc in documents:
        for version in VERSIONS:
            try:
                kubernetes_validate.validate(doc, version, strict=True)
            except kubernetes_validate.SchemaNotFoundError:
                unknown.append(doc["kind"])
            except kubernetes_validate.ValidationError as e:
                errors.append(f"{version} {doc['kind']}: {e.message} at {list(e.path)}")
    lint = helm_python.lint(directory, values, strict=True, namespace="serving")
    findings = [m["error"] for m in lint["messages"] if m["severity"] > 1] + lint["errors"]
    return {"errors": errors, "unknown": unknown, "lint": findings, "manifests": documents}


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
    answer = chart(sys.argv[2], json.loads(given)) if sys.argv[1] == "chart" else compose(given)
    print(json.dumps(answer))
