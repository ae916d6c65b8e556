"""What the trials share: models on disk, and commands without what takes long and has tests of its own."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from snp_llm.cli import estimates
from snp_llm.evaluate import material
from tests.adversarial.fresh import loader
from tests.adversarial.trials import Trials
from tests.conftest import save_model, small_model


@pytest.fixture(scope="session")
def model_of(tokenizer, tmp_path_factory) -> Callable[[str], Path]:
    """A folder with a small model of a family; to be copied."""
    home, made = tmp_path_factory.mktemp("models"), {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = save_model(small_model(family, torch.float32), tokenizer, home / family)
            # As transformers reads it beside this family: of Qwen2 it changes the rules, whatever the files say.
            AutoTokenizer.from_pretrained(made[family]).save_pretrained(made[family])
        return made[family]

    return make


@pytest.fixture(scope="session")
def fresh() -> Iterator[Callable[[Path], str]]:
    with loader() as load:
        yield load


@pytest.fixture
def trials(tmp_path, fresh, quick_prunes, monkeypatch) -> Iterator[Trials]:
    monkeypatch.setattr(estimates, "matmul_rates", lambda _device, dtypes: dict.fromkeys(dtypes, 1e9))
    monkeypatch.setattr(material, "prefill_times", lambda models, *_, **__: [[1.0] for _ in models])
    before = os.getcwd()
    yield Trials(tmp_path / "place", fresh)
    os.chdir(before)
