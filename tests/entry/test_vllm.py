"""Compact models in vLLM, which has an environment of its own: skipped wherever vLLM is not installed."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from snp_llm.engines.vllm_plugin import CLASSES
from snp_llm.models.families.decoders import find_family
from snp_llm.models.outline import structure_of
from snp_llm.models.registry import pruned_config_class

ENGINE = Path(__file__).parent.parent.parent / "benchmarks" / "vllm_engine.py"
pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: pip install 'snp-llm[vllm]'"),
]
BASE = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 2, "intermediate_size": 512}
HEAD = {**GROUPED, "head_dim": 64}
OPT = {"ffn_dim": 512, "word_embed_proj_dim": 256}
TYPES = {
    "llama": HEAD,
    "mistral": {**HEAD, "sliding_window": None},
    "qwen2": GROUPED,
    "qwen3": HEAD,
    "phi3": GROUPED,
    "granite": HEAD,
    "gemma": HEAD,
    "ministral3": HEAD,
    "ernie4_5": HEAD,
    "exaone4": GROUPED,
    "glm4": HEAD,
    "nemotron": HEAD,
    "apertus": GROUPED,
    "opt": OPT,
}


def save(folder: Path, kind: str, heads: tuple[int, ...] = (1, 2, 2), ffn: tuple[int, ...] = (512, 384, 200)) -> Path:
    """A random model with widths of its own in every block."""
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**BASE, **TYPES[kind]}))
    structure = structure_of(dense)
    (part,) = structure["parts"]
    query_key, key_value_key = part["attention"]["keys"]
    layers = {}
    for index, (count, width) in enumerate(zip(heads, ffn, strict=True)):
        layers[str(index)] = {query_key: 2 * count, part["ffn"]["key"]: width}
        if key_value_key:
            layers[str(index)][key_value_key] = count
    values = {key: value for key, value in dense.config.to_dict().items() if key != "model_type"}
    if find_family(dense.config).head_dim_key:  # as the config of a pruned model says it
        values["head_dim"] = part["attention"]["size"]
    config = pruned_config_class(kind)(**{**values, "pruned_layers": layers, "pruned_structure": structure})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if (parameter.dim() == 2 and "embed" not in name) or name.endswith("bias"):
            parameter.normal_(0, 0.06)
    model.save_pretrained(folder / kind)
    return folder / kind


def served(*options: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ENGINE), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def answers(request, tmp_path_factory):
    """What one process says of models of all types that are asked for, one after the other: it starts slowly."""
    work, chosen = tmp_path_factory.mktemp("vllm"), (getattr(item, "callspec", None) for item in request.session.items)
    return served(*(save(work, spec.params["kind"]) for spec in chosen if spec is not None and "kind" in spec.params))


@pytest.mark.parametrize("kind", TYPES)
def test_answers_are_those_of_transformers(kind, answers):
    lines = [line for line in answers.stdout.splitlines() if f"(snp_{kind})" in line]
    assert len(lines) == 1 and lines[0].startswith("ok: "), (lines, answers.stderr[-1500:])


def test_answers_over_http_are_those_of_transformers(tokenizer, tmp_path):
    folder = save(tmp_path, "llama")
    tokenizer.save_pretrained(folder)
    run = served("--http", folder)
    assert run.returncode == 0, (run.stdout, run.stderr[-1500:])
    assert run.stdout.splitlines()[-1].startswith("ok: ")


def test_every_class_has_a_test():
    classes = {AutoModelForCausalLM._model_mapping[pruned_config_class(kind)].__name__ for kind in TYPES}
    assert classes == set(CLASSES)


def test_two_devices_give_the_same(tmp_path):
    run = served(save(tmp_path, "llama", heads=(2, 2, 2)), "--tensor-parallel-size", "2")
    assert run.returncode == 0, (run.stdout.splitlines()[-1:], run.stderr[-1500:])


def test_what_does_not_split_is_refused_in_words(tmp_path):
    run = served(save(tmp_path, "llama", ffn=(512, 383, 200)), "--tensor-parallel-size", "2")
    assert "block 0: 2 query heads, 1 KV heads and 512" not in run.stdout + run.stderr  # a head for both
    assert "block 1: 4 query heads, 2 KV heads and 383 FFN channels do not split evenly" in run.stdout + run.stderr


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"num_attention_heads": 2}, "blocks 0 and 1: 4 and 2 query heads with 2 KV heads in both"),
        ({"num_attention_heads": 0, "num_key_value_heads": 0}, "block 1: has no attention"),
        ({"intermediate_size": 0}, "block 1: has no FFN"),
    ],
)
def test_what_has_no_place_is_refused_in_words(changed, says):
    from snp_llm.engines.vllm_models import check_widths

    config = AutoConfig.for_model("llama", **{**BASE, **HEAD})
    config.pruned_structure = structure_of(AutoModelForCausalLM.from_config(config))
    config.pruned_layers = {"1": changed}
    with pytest.raises(ValueError, match=says):
        check_widths(config, 1)
