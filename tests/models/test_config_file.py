"""What is added to config.json for transformers 4, and that transformers 5 reads the same as without it.

That transformers 4 computes the same from it is tested in tests/entry/test_transformers_4.py.
"""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from snp_llm import checkpoint
from snp_llm.data.sources import BUNDLED
from snp_llm.models.config_file import config_for_both, tokenizer_for_both
from snp_llm.models.registry import pruned_config_class
from tests.conftest import small_model
from tests.families import FAMILY_CONFIGS, IN_BOTH, every_family

THETA = 500_000.0
PARTIAL = {"gpt_neox": 0.5, "stablelm": 0.5}
TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def rope_overrides(model_type, rope_type):
    """Config values for a rotary embedding of some type, or None if the family has none of the kind."""
    if model_type in ("opt", "gpt2"):
        return {} if rope_type == "default" else None
    if model_type == "phi3" and rope_type not in ("default", "longrope"):
        return None
    head = FAMILY_CONFIGS[model_type].get("head_dim", 8)
    pairs = int(head * PARTIAL.get(model_type, 1)) // 2
    scaling = {
        "default": {},
        "linear": {"factor": 4},
        "dynamic": {"factor": 4.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16.0},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        "longrope": {
            "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
            "long_factor": [2.0 + 0.3 * i for i in range(pairs)],
            "original_max_position_embeddings": 16,
        },
    }
    rope = {"rope_type": rope_type, "rope_theta": THETA, **scaling[rope_type]}
    if model_type in PARTIAL:
        rope["partial_rotary_factor"] = PARTIAL[model_type]
    if model_type == "gemma3_text":
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 777.0}}
    original = {"original_max_position_embeddings": 16} if (model_type, rope_type) == ("phi3", "longrope") else {}
    return {"rope_parameters": rope, **original}


def with_rope(model_type, rope_type):
    overrides = rope_overrides(model_type, rope_type)
    if overrides is None:
        pytest.skip("no such rotary embedding")
    return AutoConfig.for_model(model_type, **{**FAMILY_CONFIGS[model_type], **overrides})


def reload(values, folder):
    (folder / "config.json").write_text(json.dumps(values))
    return AutoConfig.from_pretrained(folder).to_dict()


@pytest.mark.parametrize("rope_type", TYPES)
@every_family(among=IN_BOTH)
def test_transformers_5_reads_what_it_did(model_type, rope_type, tmp_path):
    config = with_rope(model_type, rope_type)
    config.dtype = torch.bfloat16
    values = json.loads(config.to_json_string())
    added = config_for_both(values)
    before, after = reload(values, tmp_path), reload(added, tmp_path)
    # What may be there twice: the family's own words of transformers 4, which say what is there already.
    if (model_type, rope_type) in [("phi3", "longrope"), ("olmo2", "linear"), ("olmo2", "dynamic")]:
        assert after["rope_parameters"].pop("type") == rope_type
    elif rope_type == "longrope":
        assert after.pop("original_max_position_embeddings") == 16
    assert after == before
    assert config_for_both(added) == added  # saved, loaded and saved again, it is still the same
    assert {key: added[key] for key in values} == values


@every_family("opt", "gpt2", among=IN_BOTH)
def test_the_rotary_base_stands_where_transformers_4_looks(model_type):
    added = config_for_both(json.loads(with_rope(model_type, "default").to_json_string()))
    assert added["rotary_emb_base" if model_type == "gpt_neox" else "rope_theta"] == THETA
    assert "rope_scaling" not in added
    if model_type in PARTIAL:
        assert added["rotary_pct" if model_type == "gpt_neox" else "partial_rotary_factor"] == PARTIAL[model_type]
    if model_type == "gemma3_text":
        assert added["rope_local_base_freq"] == 777.0


def test_widths_of_their_own_change_nothing_about_it(tmp_path):
    for model_type in IN_BOTH:
        pruned_type, config_class = f"snp_{model_type}", pruned_config_class(model_type)
        plain = with_rope(model_type, "default")
        values = {**json.loads(plain.to_json_string()), "model_type": pruned_type}
        expected = config_for_both({**values, "model_type": plain.model_type})
        assert config_for_both(values) == {**expected, "model_type": pruned_type}
        assert config_class.from_dict(config_for_both(values)).to_dict() == config_class.from_dict(values).to_dict()


def test_a_scaling_factor_that_transformers_4_does_not_read_becomes_the_gain_that_it_does(tmp_path):
    rope = {**rope_overrides("llama", "longrope")["rope_parameters"], "factor": 3.0}
    values = json.loads(small_model("llama", rope_parameters=rope).config.to_json_string())
    gain = config_for_both(values)["rope_scaling"]["attention_factor"]
    before, after = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**v)).model.rotary_emb.attention_scaling
        for v in (values, config_for_both(values))
    )
    assert gain == before == after
    assert "attention_factor" not in config_for_both({**values, "max_position_embeddings": 48})["rope_scaling"]


def test_a_local_rope_that_transformers_4_cannot_scale_fails_there():
    rope = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    values = {"model_type": "gemma3_text", "rope_parameters": {"full_attention": rope, "sliding_attention": rope}}
    assert config_for_both(values)["rope_local_base_freq"] is None


def test_the_class_and_the_special_tokens_of_a_tokenizer_have_names_that_both_know(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "tiny-opt")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<tool>", "<é>"]})
    checkpoint.save(small_model("llama", torch.float32, vocab_size=2050), tokenizer, tmp_path)
    text = (tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")
    saved = json.loads(text)
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast" and "<é>" in text
    assert saved["model_input_names"] == tokenizer.model_input_names
    assert saved["additional_special_tokens"] == ["<tool>", "<é>"] and "extra_special_tokens" not in saved
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer) and again.extra_special_tokens == tokenizer.extra_special_tokens
    probe = "The value <tool> of <é>\n\n"
    assert again(probe)["input_ids"] == tokenizer(probe)["input_ids"]
    assert again.decode(again(probe)["input_ids"], skip_special_tokens=True) == tokenizer.decode(
        tokenizer(probe)["input_ids"], skip_special_tokens=True
    )
    own = {"tokenizer_class": "GemmaTokenizer", "extra_special_tokens": {"image_token": "<image>"}}
    assert tokenizer_for_both(own) == own


def test_a_saved_folder_names_its_type_twice(tmp_path, tokenizer):
    checkpoint.save(small_model("qwen2", torch.bfloat16), tokenizer, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["dtype"] == values["torch_dtype"] == "bfloat16"
    assert AutoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16
