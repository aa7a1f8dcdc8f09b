"""What is installed, under which name, and what importing it costs."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import jaxlightning
import jaxlightning.callbacks

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
HEAVY = ["tqdm", "tensorboardX", "datasets", "flax", "orbax", "safetensors", "tokenizers"]


def python(code, cwd):
    """Runs it in a new interpreter, with `cwd` first on the path as for a user's own script."""
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)


def folder_of(package):
    """A package's folder: that of its nearest parent in `package-dir`, and the rest."""
    mapped = SETUPTOOLS["package-dir"]
    head, tail = package, []
    while head not in mapped:
        head, _, last = head.rpartition(".")
        tail.insert(0, last)
    return "/".join([mapped[head], *tail])


def test_every_package_is_listed():
    roots = SETUPTOOLS["package-dir"].values()
    found = {
        path.parent.relative_to(ROOT).as_posix()
        for root in roots
        for path in (ROOT / root).rglob("__init__.py")
    }
    listed = [folder_of(package) for package in SETUPTOOLS["packages"]]
    assert len(set(listed)) == len(listed)
    assert set(listed) == found


def test_no_module_lies_in_a_folder_that_is_no_package():
    for root in SETUPTOOLS["package-dir"].values():
        for path in (ROOT / root).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


def test_nothing_hides_the_callbacks_folder():
    # Any folder of that name, even one that holds a stale `__pycache__` only, would be found first.
    assert not (ROOT / "jaxlightning" / "callbacks").exists()
    assert Path(jaxlightning.callbacks.__file__).parent == ROOT / "callbacks"


@pytest.mark.parametrize("statement", ["import callbacks", "from callbacks import *"])
def test_the_callbacks_folder_refuses_any_other_name(statement):
    done = python(statement, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.endswith(
        "ImportError: `callbacks` is the source folder of `jaxlightning.callbacks`: run "
        "`pip install -e .` and import it under that name.\n"
    )


def test_a_users_own_callbacks_module_is_not_shadowed(tmp_path):
    (tmp_path / "callbacks.py").write_text("import jaxlightning.callbacks\nMINE = True\n")
    code = "import callbacks, jaxlightning.callbacks as ours; print(callbacks.MINE, ours.__name__)"
    assert python(code, cwd=tmp_path).stdout.split() == ["True", "jaxlightning.callbacks"]


def test_type_information_is_shipped():
    for package in ("jaxlightning", "albert_task"):
        assert (ROOT / package / "py.typed").exists()
        assert "py.typed" in SETUPTOOLS["package-data"][package]
    assert "callbacks.pyi" in SETUPTOOLS["exclude-package-data"]["jaxlightning"]


def top_level_modules(imports, cwd):
    code = f"{imports}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = python(code, cwd)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What is loaded by those that `import jaxlightning` may import."""
    folder = tmp_path_factory.mktemp("plain")
    return top_level_modules("import jax, equinox, optax, numpy, jaxtyping", folder)


@pytest.mark.parametrize("module", ["jaxlightning", "jaxlightning.callbacks"])
def test_import_loads_nothing_heavy(module, plain, tmp_path):
    ours = top_level_modules(f"import {module}", tmp_path)
    assert {"jax", "equinox", "optax"} <= ours
    assert sorted(ours & set(HEAVY)) == []
    assert sorted(ours - plain - sys.stdlib_module_names) == ["jaxlightning"]


def test_importing_starts_no_backend(tmp_path):
    code = (
        "import jaxlightning, jaxlightning.callbacks\n"
        "import jax\n"
        "jax.config.update('jax_num_cpu_devices', 3)\n"  # refused once a backend is up
        "print(len(jax.local_devices(backend='cpu')))"
    )
    done = python(code, cwd=tmp_path)
    assert done.stdout.split() == ["3"], done.stderr
