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
from tests.flow.test_multimodal import cut
from tests.models.test_config_file import TYPES, rope_overrides
from tests.wrappers import WRAPPERS, small_wrapper

PYTHON = ROOT / ".venv-transformers-4/bin/python"
pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="no environment with transformers 4: make venv-transformers-4"
)
# 4 lacks the others, or computes something else of them (PaliGemma, VipLlava), saved by transformers 5 itself as well.
WRAPPERS_IN_BOTH = (
    *("gemma3", "llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "mistral3", "idefics3", "smolvlm"),
    *("internvl", "aya_vision", "got_ocr2"),
)
TEXT = "The value <tool> of x"
# Runs in either version.
READ = """
import json, sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

auto = getattr(transformers, sys.argv[3])
root, version = Path(sys.argv[1]), transformers.__version__[0]
tokens, found, said = load_file(root / "tokens.safetensors")["tokens"], {}, {}
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    try:
        model = auto.from_pretrained(
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
    return in_both(root, "AutoModelForCausalLM")


def in_both(root, auto):
    """Logits and words of both versions, by folder in `root`."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(root.parent / "modules")}
    environment.pop("PYTHONPATH", None)
    for python in (PYTHON, sys.executable):
        command = [str(python), "-c", READ, str(root), TEXT, auto]
        run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
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


@pytest.mark.exhaustive
def test_models_that_read_images_compute_the_same_in_both(tmp_path, monkeypatch):
    root, tokenizer = tmp_path / "folders", AutoTokenizer.from_pretrained(BUNDLED / "tiny-opt")
    root.mkdir()
    tokens = torch.randint(3, 1900, (2, 48), generator=torch.Generator().manual_seed(0))
    save_file({"tokens": tokens}, root / "tokens.safetensors")
    for model_type in WRAPPERS_IN_BOTH:
        text = WRAPPERS[model_type][0]["text_config"]
        if model_type != "gemma3":  # a base that is no default
            rope = {"rope_type": "default", **text.get("rope_parameters", {}), "rope_theta": 500.0}
            monkeypatch.setitem(text, "rope_parameters", rope)
        dense = small_wrapper(model_type)
        checkpoint.save(dense, tokenizer, root / f"{model_type}-dense")
        for layout in ("uniform", "compact"):
            checkpoint.save(cut(dense, tokenizer, layout=layout).model, tokenizer, root / f"{model_type}-{layout}")
    found = in_both(root, "AutoModelForImageTextToText")
    (four, _), (five, _) = found["4"], found["5"]
    assert set(four) == set(five) and len(five) == 3 * len(WRAPPERS_IN_BOTH)
    for name, logits in five.items():
        assert (four[name] - logits).abs().max() <= 1e-5 * logits.abs().max(), name
