"""What review would otherwise have to watch: sizes, paths, docstrings, layers, exported names."""

import ast
import importlib
import re
import subprocess
import tomllib
import types
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
SHIPPED = ("jaxlightning", "callbacks", "albert_task")
# Put together here, so that this file does not find itself.
MACHINE = re.compile(
    r"(?<![\w.~<])/(?:" + "|".join(["home", "root", "Users", "work", "farm"]) + "/)"
)
REGISTRY = re.compile("|".join([r"py" + r"pi\.org", r"python" + r"hosted\.org"]))


@cache
def sources():
    """The text files of the repository, those not committed yet included."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    texts = {}
    for name in filter(None, listed.split("\0")):
        try:
            texts[name] = (ROOT / name).read_text()
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue
    return texts


@cache
def shipped():
    """Syntax trees of the modules that are installed, by path."""
    return {
        name: ast.parse(text)
        for name, text in sources().items()
        if name.endswith(".py") and name.startswith(tuple(f"{root}/" for root in SHIPPED))
    }


def names_at_the_top(tree):
    """The names that a module binds by `import`, `def`, `class` and `=`, with their nodes."""
    bound = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name: node for alias in node.names}
        elif isinstance(node, ast.Assign):
            bound |= {t.id: node for t in node.targets if isinstance(t, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            bound[node.target.id] = node
    return bound


def declared_all(tree):
    node = names_at_the_top(tree).get("__all__")
    return None if node is None else ast.literal_eval(node.value)


def exports():
    """`(package, name)` of everything that the packages' `__init__` files offer."""
    for package in PACKAGES:
        module = importlib.import_module(package)
        tree = ast.parse(Path(module.__file__).read_text())
        names = declared_all(tree)
        if names is None:
            names = [
                alias.asname
                for node in tree.body
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
                if alias.asname == alias.name
            ]
        yield from ((package, name) for name in names)


def test_no_file_is_long():
    long = {n: t.count("\n") for n, t in sources().items() if n.endswith(".py")}
    assert {name: lines for name, lines in long.items() if lines > 500} == {}
    assert sources()["jaxlightning/__init__.py"].count("\n") <= 60


@pytest.mark.parametrize("pattern", [MACHINE, REGISTRY], ids=["path", "registry"])
def test_nothing_of_one_machine_is_named(pattern):
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in sources().items()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_every_module_says_what_it_is():
    silent = [name for name, tree in shipped().items() if ast.get_docstring(tree) is None]
    assert silent == []


def test_every_public_name_has_a_docstring():
    silent = []
    for package, name in exports():
        thing = getattr(importlib.import_module(package), name)
        if isinstance(thing, types.GenericAlias) or not hasattr(thing, "__qualname__"):
            continue  # a constant or an alias of a type
        source = Path(importlib.import_module(thing.__module__).__file__)
        node = names_at_the_top(ast.parse(source.read_text())).get(thing.__qualname__)
        # Not `__doc__`, which dataclasses fill in.
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is None:
            silent.append(f"{package}.{name}")
    assert silent == []


def test_exports_exist_and_are_exact():
    for name, tree in shipped().items():
        bound, listed = names_at_the_top(tree), declared_all(tree)
        if listed is not None:
            assert len(set(listed)) == len(listed), name
            assert set(listed) <= set(bound), name
        if not name.endswith("__init__.py"):
            continue
        offered = {
            alias.asname or alias.name: alias
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and node.module != "__future__"
            for alias in node.names
        }
        public = {alias for alias in offered if not alias.startswith("_")}
        if listed is None:  # then `as` is what declares a name to checkers
            assert {n for n in public if offered[n].asname != n} == set(), name
        else:
            assert set(listed) == public, name


def test_the_core_knows_neither_callbacks_nor_tasks():
    for name, tree in shipped().items():
        if not name.startswith("jaxlightning/"):
            continue
        for node in tree.body:
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            else:
                continue
            for module in modules:
                assert not module.startswith(("callbacks", "jaxlightning.callbacks")), name
                assert not module.startswith("albert_task"), name


def test_every_test_checks_something():
    idle = []
    for name, text in sources().items():
        if not re.fullmatch(r"tests/(.*/)?test_\w+\.py", name):
            continue
        tree = ast.parse(text)
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        helpers = {node.name for node in functions if checks(node, set())}
        for node in functions:
            if node.name.startswith("test_") and not checks(node, helpers):
                idle.append(f"{name}: {node.name}")
    assert idle == []


def checks(function, helpers):
    """Whether a function asserts, expects an error or a warning, or uses what does."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert | ast.Raise):
            return True
        name = getattr(node, "attr", getattr(node, "id", ""))
        if name in {"raises", "warns"} | helpers or name.startswith("assert_"):
            return True
    return False
