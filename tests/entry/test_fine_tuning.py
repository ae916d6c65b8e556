"""Tools for fine-tuning take compact models as they take dense ones: adapters, trainers, wrappers, other heads."""

import copy
from functools import partial

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from snp_llm import prune
from tests.conftest import small_model, small_recipe

TOKENS = torch.arange(3, 43).view(2, 20)
SETTINGS = {"max_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}


@pytest.fixture(scope="module")
def llama(tokenizer):
    """A compact Llama, as `prune` gives it; tests that change it take a copy."""
    recipe = small_recipe(sparsity=0.3, round_to=4, num_samples=2)
    model = prune(small_model("llama", torch.float32), tokenizer, recipe).model
    assert model.config.model_type == "snp_llama"
    return model


@pytest.fixture
def model(llama):
    return copy.deepcopy(llama)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
def test_other_heads_load_the_pruned_body(model, auto, tmp_path):
    model.save_pretrained(tmp_path / "pruned")
    other, info = auto.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not {name for name in info["missing_keys"] if not name.startswith("score")}
    with torch.no_grad():
        assert torch.equal(other.eval().base_model(TOKENS)[0], model.base_model(TOKENS)[0])
    other.save_pretrained(tmp_path / "again")
    again = auto.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    other.config.pad_token_id = again.config.pad_token_id = 0
    with torch.no_grad():
        assert torch.equal(again(TOKENS)[0], other(TOKENS)[0])


def test_peft_finds_the_usual_targets(model):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    assert adapted.peft_config["default"].target_modules == {"q_proj", "v_proj"}  # as of the dense type
    widths = {m.lora_B["default"].weight.shape[0] for n, m in adapted.named_modules() if n.endswith("v_proj")}
    assert widths == {block.self_attn.v_proj.out_features for block in model.model.layers}


def rows():
    return [{"input_ids": row, "labels": row} for row in TOKENS]


def test_trainer_trains_with_activation_checkpointing(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.requires_grad_(True)
    found = []
    for checkpointing in (False, True):
        own = copy.deepcopy(model)
        arguments = TrainingArguments(output_dir=str(tmp_path), gradient_checkpointing=checkpointing, **SETTINGS)
        Trainer(own, arguments, train_dataset=rows()).train()
        found.append(own.state_dict())
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(found[0][name], before[name])
    assert all(torch.allclose(found[0][n], found[1][n], atol=1e-6) for n in before)
    own.save_pretrained(tmp_path / "tuned")
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
        assert torch.equal(loaded(TOKENS).logits, own.eval()(TOKENS).logits)


def test_supervised_fine_tuning_of_trl(model, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    texts = Dataset.from_dict({"text": ["The value of the expression is true.", "Otherwise it is false."] * 2})
    settings = trl.SFTConfig(output_dir=str(tmp_path), max_length=16, bf16=False, **SETTINGS)
    model.requires_grad_(True)
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    trl.SFTTrainer(model, args=settings, train_dataset=texts, processing_class=tokenizer).train()
    assert not torch.equal(model.model.layers[0].mlp.down_proj.weight, before)


def test_a_compiled_model_computes_the_same(model):
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(TOKENS, use_cache=False).logits, model(TOKENS).logits, atol=1e-5)


def test_blocks_are_what_is_wrapped_for_sharding(model):
    from accelerate import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin(fsdp_version=1, auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(model)
    wraps = partial(plugin.auto_wrap_policy, recurse=False, nonwrapped_numel=10**9)
    assert [module for module in model.modules() if wraps(module)] == [*model.model.layers]
