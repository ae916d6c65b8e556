"""What the README shows is what happens."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent.parent / "README.md").read_text()


@pytest.mark.slow
def test_the_python_example_runs(tmp_path):
    (example,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "import Recipe" in code]
    example = example.replace("sparsity=0.3", "sparsity=0.3, num_samples=4")
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    run = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "smaller/model.safetensors").exists()


def test_options_in_the_table_exist():
    run = subprocess.run([sys.executable, "-m", "snp_llm.prune", "--help"], capture_output=True, text=True)
    for option in set(re.findall(r"`(--[a-z-]+)", README)) - {"--help", "--dataset"}:
        assert option in run.stdout, option


def test_files_that_are_linked_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (Path(__file__).parent.parent.parent / target).exists(), target
