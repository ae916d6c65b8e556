"""What is installed is whole: built from a copy of the sources, as `pip install .` does."""

import ast
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from snp_llm.runtime.version import __version__

ROOT = Path(__file__).parent.parent.parent
EXTRAS = {"bench", "docs", "eval", "gguf", "onnx", "recover", "test", "vision", "vllm"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    if find_spec("setuptools") is None or Version(version("setuptools")) < Version("77"):
        pytest.skip("setuptools 77, which builds the package, is not installed")
    sources = tmp_path_factory.mktemp("sources") / "snp"  # a build leaves its traces there
    sources.mkdir()
    for path in ROOT.iterdir():
        if path.name in {"snp_llm", "LICENSE", "NOTICE", "README.md", "pyproject.toml", "MANIFEST.in"}:
            (shutil.copytree if path.is_dir() else shutil.copy)(path, sources / path.name)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    run = subprocess.run([*command, "-w", str(target), str(sources)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (path,) = target.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_every_file_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("snp_llm/")}
        assert archive.testzip() is None
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "snp_llm").rglob("*") if path.is_file()}
    assert names == {name for name in files if "__pycache__" not in name}
    assert {
        "snp_llm/py.typed",
        "snp_llm/data/bundled/tiny-opt/model.safetensors",
        "snp_llm/data/bundled/evaluation.txt",
    } <= names


def test_the_metadata_is_whole(wheel, metadata):
    assert metadata["Name"] == "snp-llm" and metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0" and metadata.get_all("License-File") == ["LICENSE", "NOTICE"]
    assert metadata["Description-Content-Type"] == "text/markdown" and "# snp-llm" in metadata.get_payload()
    assert set(metadata.get_all("Provides-Extra")) == EXTRAS
    with zipfile.ZipFile(wheel) as archive:
        (points,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "snp-llm = snp_llm.cli.main:main" in points
    if find_spec("twine") is not None:
        command = [sys.executable, "-m", "twine", "check", "--strict", str(wheel)]
        assert subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.exhaustive
def test_the_package_runs_from_the_wheel(wheel, tmp_path):
    """Unpacked elsewhere, without the checkout on the path."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; import snp_llm\n"
        "assert Path(snp_llm.__file__).is_relative_to(sys.argv[1])\n"
        "from snp_llm import Recipe, checkpoint, prune\n"
        "model, tokenizer = checkpoint.load('tiny-opt', 'auto')\n"
        "recipe = Recipe('tiny-opt', calibration='bundled', num_samples=2, seq_len=32, allocation='uniform',\n"
        "                ordering='variance', metric='error', reference='self')\n"
        "pruned = prune(model, tokenizer, recipe)\n"
        "print(sum(len(r.kept) for r in pruned.sites))\n"
    )
    command = [sys.executable, "-I", "-c", code, str(tmp_path / "site")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and int(run.stdout) > 0, run.stderr


def core(metadata) -> list[Requirement]:
    """What is required without any extra."""
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    return [requirement for requirement in requirements if requirement.marker is None]


def test_the_oldest_versions_are_the_lower_bounds(metadata):
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    bounds = {requirement.name: str(requirement.specifier) for requirement in core(metadata)}
    assert bounds.pop("torch").startswith(">=")  # not pinned: where one is there it is kept
    assert {name: f">={version}" for name, version in oldest.items()} == bounds


def test_what_is_imported_is_required(metadata):
    """Every package that a module imports at its top is required itself, not by way of another."""
    imported: set[str] = set()
    for path in {*(ROOT / "snp_llm").rglob("*.py")} - {ROOT / "snp_llm/engines/vllm_models.py"}:  # vLLM imports that
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(str(node.module))
    packages = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
    packages = {{"yaml": "pyyaml"}.get(name, name) for name in packages if not name.startswith("snp_")}
    assert packages <= {requirement.name for requirement in core(metadata)}
