"""Saved folders in transformers 4, in an environment of its own: the same logits as in transformers 5."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from snp_llm import checkpoint, prune
from snp_llm.data.sources import BUNDLED
from tests.conftest import small_model, small_recipe
from tests.entry.test_readme import ROOT
from tests.families import IN_BOTH, every_family
from tests.models.test_config_file import TYPES, rope_overrides

PYTHON = ROOT / ".venv-transformers-4/bin/python"
TEXT = "The value <tool> of x"
# Runs in either version.
READ = """
import json, sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

root, version = Path(sys.argv[1]), transformers.__version__[0]
tokens, found, said = load_file(root / "tokens.safetensors")["tokens"], {}, {}
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", trust_remote_code=folder.name.endswith("-compact"), attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            found[folder.name] = model(tokens, use_cache=False).logits.float().contiguous()
        read = AutoTokenizer.from_pretrained(folder)
        given = read(sys.argv[2], return_tensors="pt")
        ids = model.generate(**given, max_new_tokens=6, do_sample=False, pad_token_id=1, eos_token_id=0)
        said[folder.name] = [str(model.dtype), sorted(given), ids.tolist(), read.bos_token, read.all_special_tokens]
    except Exception as error:
        said[folder.name] = f"{type(error).__name__}: {error}"
save_file(found, root / f"logits-{version}.safetensors")
(root / f"said-{version}.json").write_text(json.dumps(said))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Logits and words of both versions, by folder: every family, pruned and with every kind of rotary embedding."""
    if not PYTHON.exists():
        pytest.skip("no environment with transformers 4: make venv-transformers-4")
    root = tmp_path_factory.mktemp("folders")
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "tiny-opt")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<tool>"]})
    for model_type in IN_BOTH:
        for rope_type in TYPES:
            if (overrides := rope_overrides(model_type, rope_type)) is None:
                continue
            overrides |= {"vocab_size": 2050}
            if rope_type == "dynamic":  # it scales beyond the positions alone
                overrides |= {"max_position_embeddings": 32}
            dense = small_model(model_type, torch.float32, **overrides)
            checkpoint.save(dense, tokenizer, root / f"{model_type}-{rope_type}")
            if rope_type == "default":
                for layout in ("uniform", "compact"):
                    recipe = small_recipe(sparsity=0.25, round_to=4, layout=layout, num_samples=2)
                    pruned = prune(dense, tokenizer, recipe).model
                    checkpoint.save(pruned, tokenizer, root / f"{model_type}-{layout}")
                tied = not dense.config.tie_word_embeddings
                other = small_model(model_type, torch.bfloat16, tie_word_embeddings=tied, **overrides)
                checkpoint.save(other, tokenizer, root / f"{model_type}-tied-{tied}")
    shutil.copytree(BUNDLED / "tiny-opt", root / "opt-bundled")
    rope = {**rope_overrides("llama", "longrope")["rope_parameters"], "factor": 3.0}  # not the ratio of the positions
    own_factor = small_model("llama", torch.float32, vocab_size=2050, rope_parameters=rope)
    checkpoint.save(own_factor, tokenizer, root / "llama-factor")
    save_file(
        {"tokens": torch.randint(3, 2048, (2, 48), generator=torch.Generator().manual_seed(0))},
        root / "tokens.safetensors",
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(root.parent / "modules")}
    environment.pop("PYTHONPATH", None)
    for python in (PYTHON, sys.executable):
        run = subprocess.run(
            [str(python), "-c", READ, str(root), TEXT], cwd=root, env=environment, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
    return {
        version: (
            load_file(root / f"logits-{version}.safetensors"),
            json.loads((root / f"said-{version}.json").read_text()),
        )
        for version in "45"
    }


@pytest.mark.exhaustive
@every_family(among=IN_BOTH)
def test_every_folder_computes_the_same_in_both(model_type, results):
    (four, said_by_four), (five, said_by_five) = results["4"], results["5"]
    names = [name for name in said_by_five if name.rpartition("-")[0].removesuffix("-tied") == model_type]
    assert len(names) >= 4 and set(names) <= set(five)
    for name in names:
        kind = name.removeprefix(f"{model_type}-")
        if model_type == "olmo2" and kind in ("yarn", "llama3", "longrope"):
            assert "`rope_scaling`" in said_by_four[name]  # refused, not computed wrongly
        elif name == "gpt_neox-compact":
            assert "expected transformers 5" in said_by_four[name]
        else:
            assert said_by_four[name] == said_by_five[name], name
            close = 2e-2 if "tied" in kind else 1e-5  # those are in bfloat16
            difference = float((four[name] - five[name]).abs().max() / five[name].abs().max())
            print(f"{name}: {difference:.1e}")
            assert difference <= close, name
