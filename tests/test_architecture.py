"""Who may import whom, and how long a file may get: rules that no single test of a package would notice."""

import ast
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("lowkey", "modeling", "pruning", "server", "loadtest")
MAX_LINES = 450

MODEL_CODE = {"torch", "triton", "fla"}
"""What the API process never loads: it stays light and never waits for a device."""

FORBIDDEN = {
    # folder -> modules that nothing in it may import, at module level or inside a function
    "lowkey": {"modeling", "pruning", "server", "loadtest", "torch", "transformers"},
    "modeling": {"pruning", "server", "loadtest", "transformers"},
    "pruning": {"server", "loadtest", "transformers"},
    "server": {"pruning", "loadtest", "transformers"},
    "server/wire": {*MODEL_CODE, "server.api", "server.engine"},
    "server/engine": {"server.api"},
    "server/text": {*MODEL_CODE, "server.api", "server.engine", "fastapi", "starlette", "uvicorn"},
    "server/api": {*MODEL_CODE, "server.engine"},
    "loadtest": {"modeling", "pruning", "server", "torch", "transformers"},
}


def python_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def imports(source: str, package: str) -> Iterator[str]:
    """Absolute names of everything that a module of `package` (dotted) imports, and of what it takes from a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)  # which may be modules, too


def test_imports_are_found_in_every_form():
    source = (
        "import a.b, c\nfrom d.e import f\ndef g():\n    from . import h\n    from ..i import j\n    import k"
    )
    assert set(imports(source, "x.y")) == {*("a.b", "c", "d.e", "d.e.f", "x.y", "x.y.h", "x.i", "x.i.j", "k")}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_import_arrows(folder):
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in python_files(folder)
        for name in imports(file.read_text(), ".".join(file.relative_to(ROOT).parent.parts))
        if any(f"{name}.".startswith(f"{forbidden}.") for forbidden in FORBIDDEN[folder])
    ]
    assert not wrong


def modules() -> dict[str, Path]:
    """Every module of the packages by its dotted name."""
    found = {}
    for file in python_files(*PACKAGES):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def import_graph() -> dict[str, set[str]]:
    """Which of our modules each of them imports, wherever it does: at module level, in a function, for types alone."""
    files = modules()
    graph: dict[str, set[str]] = {}
    for name, file in files.items():
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        graph[name] = set()
        for target in imports(file.read_text(), package):
            module = target if target in files else target.rpartition(".")[0]
            # `from package import module` says the package as well, whose own contents nobody asks for then.
            if module in files and module != name and not name.startswith(f"{target}."):
                graph[name].add(module)
    return graph


def level_of(graph: dict[str, set[str]], package: str) -> dict[str, set[str]]:
    """The same between the children of one package ("" for the packages themselves)."""
    depth = len(package.split(".")) + 1 if package else 1
    level: dict[str, set[str]] = {}
    for name, used in graph.items():
        inside = [n for n in (name, *used) if not package or n.startswith(f"{package}.")]
        if name not in inside:
            continue
        child, *others = (".".join(n.split(".")[:depth]) for n in inside)
        level.setdefault(child, set()).update(other for other in others if other != child)
    return level


def test_circles_are_found():
    graph = {"a.b": {"a.c.d"}, "a.c.d": set(), "a.c.e": {"a.b"}, "f": {"a.b"}}
    assert list(TopologicalSorter(graph).static_order())[-1] in ("f", "a.c.e")
    with pytest.raises(CycleError):
        list(TopologicalSorter(level_of(graph, "a")).static_order())


def test_no_module_imports_itself_by_way_of_others():
    TopologicalSorter(import_graph()).prepare()


@pytest.mark.parametrize(
    "package", ["", *(name for name, file in modules().items() if file.name == "__init__.py")]
)
def test_no_circle_among_what_a_package_is_made_of(package):
    TopologicalSorter(level_of(import_graph(), package)).prepare()


def test_no_file_is_too_long_to_read_in_one_sitting():
    lengths = {file: len(file.read_text().splitlines()) for file in python_files(*PACKAGES, "tests")}
    assert not {str(file.relative_to(ROOT)): n for file, n in lengths.items() if n > MAX_LINES}


def test_tests_are_no_packages():
    assert not list((ROOT / "tests").rglob("__init__.py")), (
        "importlib mode needs none, and one breaks `support`"
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_says_that_it_is_typed(package):
    assert (ROOT / package / "py.typed").exists()


def test_every_package_that_exists_is_in_the_wheel():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(wheel["packages"]) >= {name for name in PACKAGES if (ROOT / name / "__init__.py").exists()}
