"""What pyproject.toml lists, what is on disk and what the wheel holds are the same."""

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import EntryPoint, distribution
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
ROOT = Path(__file__).resolve().parent.parent


def packages(root: Path) -> dict[str, str]:
    """Package name to folder, as pyproject.toml maps them."""
    tool = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    return {name: tool["package-dir"][name] for name in tool["packages"]}


def missing_packages(root: Path) -> list[str]:
    """Folders of modules that no wheel would hold, and listed packages that lack a file."""
    listed = packages(root)
    top = {folder.split("/")[0] for folder in listed.values()}
    found = {str(p.parent.relative_to(root)) for t in top for p in (root / t).rglob("*.py")}
    found |= {p.parent.name for p in root.glob("*/__init__.py")}
    problems = [f"{folder}/ isn't listed" for folder in sorted(found - set(listed.values()))]
    for folder in listed.values():
        for name in ("__init__.py", "py.typed"):
            if not (root / folder / name).is_file():
                problems.append(f"{folder}/{name} is missing")
    return problems


def missing_from_wheel(wheel: Path, root: Path) -> list[str]:
    """Modules and data files on disk that `wheel` lacks, and those it holds that aren't on disk."""
    wanted = {
        f"{package.replace('.', '/')}/{path.name}"
        for package, folder in packages(root).items()
        for path in (root / folder).iterdir()
        if path.suffix in (".py", ".typed", ".j2")
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    return sorted(wanted ^ held)


def unresolved(entry_points) -> list[str]:
    """The entry points that name no callable."""
    problems = []
    for entry in entry_points:
        try:
            if not callable(entry.load()):
                problems.append(f"{entry.value} isn't callable")
        except (ImportError, AttributeError) as error:
            problems.append(f"{entry.value}: {error}")
    return problems


@pytest.fixture
def planted(tmp_path):
    """A tree like this repository with nothing wrong in it yet."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for folder in packages(ROOT).values():
        (tmp_path / folder).mkdir()
        for name in ("__init__.py", "py.typed", "module.py"):
            (tmp_path / folder / name).touch()
    return tmp_path


def fake_wheel(root: Path) -> Path:
    wheel = root / "fake.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for package, folder in packages(root).items():
            for path in (root / folder).iterdir():
                archive.writestr(f"{package.replace('.', '/')}/{path.name}", "")
    return wheel


def test_package_list_equals_disk():
    assert missing_packages(ROOT) == []


@pytest.mark.parametrize("extra", ["device/sub/module.py", "shared/__init__.py"])
def test_unlisted_folder_is_found(planted, extra):
    assert missing_packages(planted) == []
    (planted / extra).parent.mkdir()
    (planted / extra).touch()
    assert missing_packages(planted) == [f"{Path(extra).parent}/ isn't listed"]


def test_missing_marker_is_found(planted):
    (planted / "device" / "py.typed").unlink()
    assert missing_packages(planted) == ["device/py.typed is missing"]


@pytest.mark.slow
def test_wheel_holds_every_module(tmp_path):
    tree = tmp_path / "tree"  # a copy: setuptools packs leftovers of a build folder
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for folder in packages(ROOT).values():
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, tree]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert missing_from_wheel(wheel, tree) == []


def test_module_missing_from_wheel_is_found(planted):
    wheel = fake_wheel(planted)
    assert missing_from_wheel(wheel, planted) == []
    (planted / "host" / "new.py").touch()
    (planted / "kernels" / "module.py").unlink()
    assert missing_from_wheel(wheel, planted) == [
        "edgesolve/host/new.py",
        "edgesolve/kernels/module.py",
    ]


@pytest.mark.host
def test_entry_points_resolve():
    ours = list(distribution("edgesolve").entry_points)
    assert {"console_scripts", "edgesolve.commands"} <= {entry.group for entry in ours}
    assert unresolved(ours) == []


@pytest.mark.parametrize("value", ["edgesolve.kernels.prox:no_such", "edgesolve.nowhere:main"])
def test_entry_point_to_nothing_is_found(value):
    assert len(unresolved([EntryPoint("planted", value, "edgesolve.commands")])) == 1
