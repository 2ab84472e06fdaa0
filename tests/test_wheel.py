"""What is published works outside of a checkout: built, installed beside torch, run."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import fusion

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


def python(*arguments: object, cwd: Path, **environment: str) -> str:
    """Run this interpreter away from the checkout, and return what it says."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COVERAGE"))}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{arguments}: {done.stderr[-2000:]}{done.stdout[-2000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, and the wheel that is built from it."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    python("-m", "build", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="session")
def wheel(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of an environment that has the wheel and, beside it, what it depends on.

    The packages of this environment are on its path; the checkout, which one of them may lead to,
    is not.
    """
    folder = tmp_path_factory.mktemp("environment")
    python("-m", "venv", "--without-pip", folder, cwd=folder)
    paths = {"base": str(folder), "platbase": str(folder)}
    packages = Path(sysconfig.get_path("purelib", "venv", paths))
    own = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    (packages / "beside.pth").write_text("\n".join(sorted(own)))
    scripts = Path(sysconfig.get_path("scripts", "venv", paths))
    python(
        "-m", "pip", "--python", scripts / "python", "install", "--quiet", "--no-deps",
        "--disable-pip-version-check", wheel, cwd=folder,
    )  # fmt: skip
    return scripts


@pytest.fixture
def run(installed: Path, tmp_path: Path):
    """Run a command of that environment in an empty folder."""

    def start(name: str, *arguments: str) -> str:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        done = subprocess.run(
            [str(installed / name), *arguments],
            cwd=tmp_path, env=kept | {"FUSION_CACHE": str(tmp_path / "cache")},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return start


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_has_every_module_and_every_yaml_file(wheel) -> None:
    # The folder config/ becomes fusion/config/.
    files = [(ROOT / "fusion", file) for file in (ROOT / "fusion").rglob("*")]
    files += [(ROOT, file) for file in (ROOT / "config").rglob("*")]
    here = {
        f"fusion/{file.relative_to(folder).as_posix()}"
        for folder, file in files
        if file.is_file() and "__pycache__" not in file.parts
    }
    packed = set(contents(wheel))
    assert {"fusion/py.typed", "fusion/config/fusion_bench.yaml"} <= here
    assert here - packed == set()
    assert {name for name in packed if not name.startswith("fusion/")} == {
        f"fusion_cnn-{fusion.__version__}.dist-info/{name}"
        for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    }


def test_the_source_distribution_builds_the_wheel_of_the_checkout(built, wheel, tmp_path) -> None:
    """The wheel in ``built`` comes from the source distribution, this one from the checkout."""
    python("-m", "build", "--wheel", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (direct,) = tmp_path.glob("*.whl")
    assert contents(direct) == contents(wheel)
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tests/conftest.py", "docs/conf.py", "scripts/test", "CHANGELOG.md"} <= names
    assert not any("__pycache__" in name or name.startswith("docs/_build") for name in names)


def test_the_command_runs_under_both_its_names(run, tmp_path) -> None:
    assert "modelpool" in run("fusion_bench", "--help")
    assert run("fusion", "--version") == f"fusion_bench {fusion.__version__}\n"
    words = ["method=ties_merging", "modelpool=digits_tasks", "taskpool=digits_tasks"]
    run("fusion_bench", *words, "fast_dev_run=true", "output_path=run")
    assert {"merged.safetensors", "report.json", "README.md"} <= {
        file.name for file in (tmp_path / "run").iterdir()
    }


def test_python_finds_the_wheel_and_not_the_checkout(run, installed) -> None:
    code = (
        "import fusion; print(fusion.__file__); print(len(fusion.methods())); "
        "print(*fusion.load_modelpool('digits_tasks'))"
    )
    where, methods, experts = run("python", "-c", code).splitlines()
    assert Path(where).is_relative_to(installed.parent)
    assert int(methods) > 20
    assert experts == "digit parity below_five quarter_turn"
