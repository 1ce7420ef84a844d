"""Who may import whom, and how long a file may get: rules that no single test of a package would notice."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("lowkey", "modeling", "pruning", "server", "loadtest")
MAX_LINES = 450

FORBIDDEN = {
    # folder -> top-level modules that nothing in it may import, at module level or inside a function
    "lowkey": {"modeling", "pruning", "server", "loadtest", "torch", "transformers"},
    "modeling": {"pruning", "server", "loadtest", "transformers"},
    "pruning": {"server", "loadtest", "transformers"},
    "server": {"pruning", "loadtest", "transformers"},
    "server/api": {"torch", "triton", "fla"},
    "loadtest": {"modeling", "pruning", "server", "torch", "transformers"},
}


def python_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def imports(source: str, package: str) -> Iterator[str]:
    """Absolute names of everything that a module of `package` (dotted) imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])])


def test_imports_are_found_in_every_form():
    source = (
        "import a.b, c\nfrom d.e import f\ndef g():\n    from . import h\n    from ..i import j\n    import k"
    )
    assert set(imports(source, "x.y")) == {"a.b", "c", "d.e", "x.y", "x.i", "k"}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_import_arrows(folder):
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in python_files(folder)
        for name in imports(file.read_text(), ".".join(file.relative_to(ROOT).parent.parts))
        if name.partition(".")[0] in FORBIDDEN[folder]
    ]
    assert not wrong


def test_no_file_is_too_long_to_read_in_one_sitting():
    lengths = {file: len(file.read_text().splitlines()) for file in python_files(*PACKAGES, "tests")}
    assert not {str(file.relative_to(ROOT)): n for file, n in lengths.items() if n > MAX_LINES}


def test_tests_are_no_packages():
    assert not list((ROOT / "tests").rglob("__init__.py")), (
        "importlib mode needs none, and one breaks `support`"
    )


def test_every_package_that_exists_is_in_the_wheel():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(wheel["packages"]) >= {name for name in PACKAGES if (ROOT / name / "__init__.py").exists()}
