"""Files for other engines: refused in words, read back to the bit, and run where the engine is installed."""

import copy
import re

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from snp_llm import checkpoint
from snp_llm.cli.parse import export_main
from snp_llm.engines import gguf
from snp_llm.models.anatomy import find_anatomy, find_blocks
from snp_llm.models.layouts import assemble
from snp_llm.models.site import site_weight
from snp_llm.models.surgery import prune_site
from snp_llm.pruning.pipeline import prune
from tests.conftest import small_opt, small_recipe

SHAPE = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS = {
    "llama": {"head_dim": 16},
    "llama scaled": {"head_dim": 16, "rope_parameters": LLAMA3},
    "llama tied": {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral": {"head_dim": 32, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "seed_oss": {"head_dim": 16},
}


def small(kind: str, **more):
    """A random model whose attention and FFN both show in its logits."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.split()[0], **{**SHAPE, **KINDS.get(kind, {}), **more})
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.model.layers.parameters():
        parameter.normal_(0, 0.2) if parameter.dim() == 2 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def folder(tokenizer, tmp_path):
    """Saves a pruned model of a kind, with widths of its own in every block."""

    def save(kind: str, layout: str = "compact"):
        model = small(kind)
        recipe = small_recipe(sparsity=0.4, round_to=4, layout=layout)
        checkpoint.save(prune(model, tokenizer, recipe).model, tokenizer, tmp_path / "pruned")
        return tmp_path / "pruned"

    return save


def export(capsys, *arguments) -> tuple[int, str]:
    code = export_main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out + said.err


def test_rows_in_the_order_of_llama_cpp_rotate_to_the_same_scores():
    size, rows = 8, torch.randn(2 * 8, 5, dtype=torch.float64)
    x, angles = torch.randn(5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    halves = (rows @ x).reshape(2, size)
    first, second = halves[:, :4], halves[:, 4:]
    rotated = torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], 1)
    pairs = (gguf.interleaved(rows, size) @ x).reshape(2, size)
    even, odd = pairs[:, 0::2], pairs[:, 1::2]
    found = torch.empty_like(pairs)
    found[:, 0::2], found[:, 1::2] = even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()
    assert torch.allclose(found, gguf.interleaved(rotated.reshape(-1, 1), size).reshape(2, size), atol=1e-12)


def test_factors_of_scaled_positions_give_the_models_own_frequencies():
    model = small("llama scaled")
    plain = 10_000.0 ** -(torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / gguf.rope_factors(model), model.model.rotary_emb.inv_freq, rtol=1e-6)
    assert gguf.rope_factors(small("llama")) is None


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: small_opt(), "opt is not among"),
        (lambda: small("mistral", sliding_window=64), "sliding window"),
        (lambda: small("llama", hidden_act="gelu"), "activation is gelu"),
        (lambda: small("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "length"),
        (
            lambda: small("llama", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
            "scales attention too",
        ),
    ],
)
def test_what_a_gguf_file_cannot_say_is_refused_before_it_is_written(model, says, tokenizer, tmp_path, capsys):
    checkpoint.save(model(), tokenizer, tmp_path / "model")
    code, said = export(capsys, tmp_path / "model", "--to", "gguf")
    assert code == 2 and says in said and "--layout uniform" in said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_package_that_is_not_there_is_named_with_what_installs_it(folder, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    code, said = export(capsys, folder("llama"), "--to", "gguf")
    assert code == 2 and "pip install 'snp-llm[gguf]'" in said


def test_other_bad_input_is_refused(folder, tmp_path, capsys):
    path = folder("llama")
    (tmp_path / "there.gguf").write_text("")
    for arguments, says in (
        ((path, "--to", "gguf", "--output", tmp_path / "there.gguf"), "is there already"),
        ((path, "--to", "gguf", "--output", tmp_path / "no" / "file.gguf"), "expected a folder"),
        ((path, "--to", "onnx", "--output", path), "is there already"),
        ((path, "--to", "onnx", "--dtype", "f16"), "--dtype f16"),
        ((path, "--to", "coreml"), "expected one of gguf, onnx"),
        ((path, "--to", "gguf", "--with-cache"), "expected --to onnx"),
        ((path,), "--to"),
        ((tmp_path / "nothing", "--to", "gguf"), "nothing"),
    ):
        code, said = export(capsys, *arguments)
        assert code == 2 and says in said, said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["compact", "uniform"])
def test_a_gguf_file_is_the_model_and_llama_cpp_says_what_it_says(kind, layout, folder, capsys):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    path = folder(kind, layout)
    for dtype in ("f32", "f16", "bf16"):
        code, said = export(capsys, path, "--to", "gguf", "--dtype", dtype, "--overwrite")
        assert code == 0, said
        assert "run in llama.cpp" in said and ("deci" in said) == (layout == "compact")
    assert float(re.search(r"differs by (\S+)", export(capsys, path, "--to", "gguf", "--overwrite")[1])[1]) < 1e-4


def halved(kind: str, *, first: int):
    """A model without the attention of one block and the FFN of the next."""
    model = small(kind)
    anatomy, blocks = find_anatomy(model), [*find_blocks(model)]
    for site in anatomy.sites:
        if (site.block, site.kind) in ((first, "attention"), (first + 1, "ffn")):
            block = blocks[site.block] = copy.deepcopy(blocks[site.block])
            prune_site(block, site, torch.arange(0), site_weight(block, site)[:, :0], None)
    return assemble(model, anatomy.family, nn.ModuleList(blocks))


def test_blocks_that_lost_half_of_them_run_in_llama_cpp(tokenizer, tmp_path, capsys):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    for name, kind, first, says in (
        ("ours", "llama", 1, ""),
        ("first", "llama", 0, "the first block has no attention left"),
        ("biases", "llama tied", 1, "left its bias"),
    ):
        checkpoint.save(halved(kind, first=first), tokenizer, tmp_path / name)
        code, said = export(capsys, tmp_path / name, "--to", "gguf")
        assert code == (2 if says else 0) and says in said, said
        assert says or float(re.search(r"differs by (\S+)", said)[1]) < 1e-4


def test_a_file_of_another_model_is_noticed(folder, tmp_path):
    pytest.importorskip("gguf")
    path = folder("llama")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    gguf.write_gguf(model, path, tmp_path / "one.gguf", "f32")
    assert gguf.differences(model, tmp_path / "one.gguf", "f32") == []
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-6
    assert gguf.differences(model, tmp_path / "one.gguf", "f32") == ["blk.1.ffn_up.weight: values differ"]
    model.config.rms_norm_eps = 1e-3
    assert len(gguf.differences(model, tmp_path / "one.gguf", "f32")) == 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("cache", [[], ["--with-cache"]], ids=["whole", "by_the_token"])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_an_onnx_graph_says_what_the_model_says(kind, cache, folder, tokenizer, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    path = tmp_path / "pruned"
    if kind == "opt":
        checkpoint.save(prune(small_opt(), tokenizer, small_recipe(sparsity=0.4, round_to=4)).model, tokenizer, path)
    else:
        folder(kind)
    code, said = export(capsys, path, "--to", "onnx", *cache)
    assert code == 0 and float(re.search(r"differs by (\S+)", said)[1]) < 1e-4, said
    assert {"model.onnx", "config.json", "tokenizer.json"} <= {
        file.name for file in (tmp_path / "pruned-onnx").iterdir()
    }


def test_a_cache_of_another_kind_is_refused(tokenizer, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    checkpoint.save(small("mistral", sliding_window=8), tokenizer, tmp_path / "model")
    code, said = export(capsys, tmp_path / "model", "--to", "onnx", "--with-cache")
    assert code == 2 and "DynamicSlidingWindowLayer" in said
