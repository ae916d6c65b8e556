"""A compact model that is loaded, used like any other and saved by others' means still loads where it is alone."""

import json
import pickle
import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from snp_llm import checkpoint, prune
from snp_llm.models import modeling_snp
from snp_llm.models.registry import pruned_config_class
from tests.conftest import small_model, small_opt, small_recipe
from tests.families import every_family

FAMILIES = ("opt", "llama", "gpt2", "gpt_neox", "gemma3_text")
WAYS = ["save_pretrained", "trainer", "trained", *(["peft"] if find_spec("peft") else [])]
# Loads every folder in the first argument, saves it in several ways into the second, with the logits of what it saved.
SAVE = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
source, target, ways, imported = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(), sys.argv[4] == "imported"
if imported:
    import snp_llm
else:
    sys.modules["snp_llm"] = None  # any import of it would fail
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

tokens, logits = torch.arange(3, 43).view(2, 20), {}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=not imported)


def trainer(model, steps):
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    settings = {"max_steps": steps, "save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(output_dir=str(target / "runs" / folder.name), **settings)
    return Trainer(model, arguments, train_dataset=rows)


for folder in sorted(path for path in source.iterdir() if (path / "config.json").exists()):
    for way in ways:
        name, model = f"{folder.name}-{way}", load(folder)
        assert type(model).__module__.startswith("snp_llm." if imported else "transformers_modules."), type(model)
        if way == "save_pretrained":
            model.save_pretrained(target / name)
        elif way == "trainer":
            trainer(model, 1).save_model(str(target / name))
        elif way == "trained":
            run = trainer(model, 1)
            run.train()
            (target / "runs" / folder.name / "checkpoint-1").rename(target / name)
        else:
            from peft import LoraConfig, get_peft_model

            adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
            model = adapted.merge_and_unload()
            model.save_pretrained(target / name)
        with torch.no_grad():
            logits[name] = model.eval()(tokens).logits
save_file(logits, target / "logits.safetensors")
"""
LOAD = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file
sys.modules["snp_llm"] = None
from transformers import AutoModelForCausalLM

source, tokens = Path(sys.argv[1]), torch.arange(3, 43).view(2, 20)
for name, expected in load_file(source / "logits.safetensors").items():
    model = AutoModelForCausalLM.from_pretrained(source / name, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, expected, rtol=1e-5, atol=1e-5), name
    model.generate(tokens[:, :4], max_new_tokens=2, pad_token_id=1)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "families"),
    [
        ("imported", "remote", ("gemma3_text",)),
        pytest.param("imported", "remote", FAMILIES, marks=pytest.mark.exhaustive),
        pytest.param("remote", "imported", FAMILIES, marks=pytest.mark.exhaustive),
    ],
)
def test_saved_moved_and_saved_again_it_still_loads_alone(first, second, families, tokenizer, alone, tmp_path):
    def run(code, *arguments):
        done = alone(code, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]

    (tmp_path / "pruned").mkdir()
    for model_type in families:
        dense = small_opt() if model_type == "opt" else small_model(model_type, torch.float32)
        pruned = prune(dense, tokenizer, small_recipe(sparsity=0.3, round_to=4, num_samples=2)).model
        assert pruned.config.model_type == f"snp_{model_type}"
        checkpoint.save(pruned, tokenizer, tmp_path / "pruned" / model_type)
    (tmp_path / "once").mkdir()
    run(SAVE, tmp_path / "pruned", tmp_path / "once", " ".join(WAYS), first)
    shutil.rmtree(tmp_path / "pruned")
    (tmp_path / "once").rename(tmp_path / "moved")
    (tmp_path / "twice").mkdir()
    run(SAVE, tmp_path / "moved", tmp_path / "twice", "save_pretrained", second)
    once, twice = (load_file(tmp_path / folder / "logits.safetensors") for folder in ("moved", "twice"))
    assert len(once) == len(families) * len(WAYS)
    for name, logits in once.items():  # the second process found what the first one saved
        torch.testing.assert_close(twice[f"{name}-save_pretrained"], logits, rtol=1e-5, atol=1e-5)
    shutil.rmtree(tmp_path / "moved")
    shutil.copytree(tmp_path / "twice", tmp_path / "copied")
    shutil.rmtree(tmp_path / "twice")
    run(LOAD, tmp_path / "copied")


@every_family()
def test_every_pruned_model_takes_its_files_along_without_ever_being_saved_by_this_package(model_type, tmp_path):
    """The model as `prune` gives it, and its config alone."""
    config_class = pruned_config_class(model_type)
    model_class = AutoModelForCausalLM._model_mapping[config_class]
    dense = small_model(model_type, torch.float32)
    values = {k: v for k, v in dense.config.to_dict().items() if k not in ("model_type", "architectures")}
    model = model_class(config_class(**values, pruned_layers={}))
    model.save_pretrained(tmp_path / "model")
    model.config.save_pretrained(tmp_path / "config")
    module = model_class.__module__.rpartition(".")[2]
    for folder, names in (("model", {"AutoConfig", "AutoModelForCausalLM"}), ("config", {"AutoConfig"})):
        auto_map = json.loads((tmp_path / folder / "config.json").read_text())["auto_map"]
        assert names <= set(auto_map) and all(name.startswith(f"{module}.Snp") for name in auto_map.values())
        assert [file.name for file in (tmp_path / folder).glob("*.py")] == [f"{module}.py"]
    assert type(AutoConfig.from_pretrained(tmp_path / "model")) is config_class
    for kind in (config_class, model_class):
        assert pickle.loads(pickle.dumps(kind)) is kind


def test_names_of_no_class_are_none():
    for name in ("SnpNothing", "LlamaForCausalLM", "SnpAutoConfig", "Snp__version__", "__wrapped__"):
        assert not hasattr(modeling_snp, name)
