"""Weights that wait in their files: the same model, without ever being all in memory."""

import gc
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM

from snp_llm import checkpoint
from snp_llm.checkpoint.journal import Journal
from snp_llm.models.anatomy import find_blocks
from snp_llm.models.logits import logits_block_by_block
from snp_llm.models.offload import copy_unhooked, disk_index, fingerprint, on_device
from snp_llm.models.size import model_size
from snp_llm.pruning.pipeline import prune
from tests.conftest import save_model, small_model, small_opt, small_recipe
from tests.differing import differing_model
from tests.families import every_family

TOKENS = torch.randint(3, 2048, (3, 24), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def is_on_disk(module):
    return any(parameter.is_meta for parameter in module.parameters())


@every_family()
def test_a_model_on_disk_is_pruned_as_one_in_memory(model_type, tokenizer, tmp_path):
    """Its checkpoint in several shards, its result saved from disk to disk."""
    small_model(model_type).save_pretrained(tmp_path / "dense", max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path / "dense")
    recipe = small_recipe(sparsity=0.3, round_to=4)
    models = []
    for name, where in (("memory", None), ("disk", tmp_path / "scratch")):
        dense, _ = checkpoint.load(str(tmp_path / "dense"), "auto", on_disk=where)
        pruned = prune(dense, tokenizer, recipe)
        checkpoint.save(pruned.model, tokenizer, tmp_path / name)
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / name))
        assert is_on_disk(dense) == (where is not None)
        assert model_size(pruned.model, 24) == model_size(models[-1], 24)
    assert torch.equal(models[0](TOKENS).logits, models[1](TOKENS).logits)


@pytest.mark.parametrize("model_type", ["opt", "qwen3_moe"])
def test_tied_tensors_stay_tied(model_type, tokenizer, tmp_path):
    """Also where the model runs as a whole first, being of no family that is known well."""
    tied = (small_model if model_type == "opt" else differing_model)(model_type, tie_word_embeddings=True)
    save_model(tied, tokenizer, tmp_path / "dense")
    dense, _ = checkpoint.load(str(tmp_path / "dense"), "auto", on_disk=tmp_path / "scratch")
    size = model_size(dense, 24)
    assert is_on_disk(dense) and prune(dense, tokenizer, small_recipe())
    assert model_size(dense, 24) == size and dense.lm_head.weight is dense.get_input_embeddings().weight


@every_family()
def test_weights_of_a_finished_block_go_at_once(model_type, tokenizer, tmp_path, monkeypatch):
    """And not when Python next looks for modules that refer to themselves."""
    weights = []

    def copied(block):
        copy = copy_unhooked(block)
        weights.extend(weakref.ref(parameter) for parameter in copy.parameters())
        return copy

    monkeypatch.setattr("snp_llm.pruning.sequential.copy_unhooked", copied)
    save_model(small_model(model_type), tokenizer, tmp_path / "dense")
    dense, _ = checkpoint.load(str(tmp_path / "dense"), "auto", on_disk=tmp_path / "scratch")
    gc.disable()
    try:
        prune(dense, tokenizer, small_recipe(), journal=Journal(tmp_path / "journal"))
        assert weights and not [weight for weight in weights if weight() is not None]
    finally:
        gc.enable()


@every_family()
def test_block_by_block_gives_the_models_own_logits(model_type, tokenizer, tmp_path):
    model = small_model(model_type)
    expected = model(TOKENS, use_cache=False).logits
    torch.testing.assert_close(logits_block_by_block(model, TOKENS), expected, rtol=1e-9, atol=1e-9)
    save_model(model, tokenizer, tmp_path)
    on_disk, _ = checkpoint.load(str(tmp_path), "auto", on_disk=tmp_path / "scratch")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)(TOKENS, use_cache=False).logits
    torch.testing.assert_close(logits_block_by_block(on_disk, TOKENS), loaded, rtol=1e-9, atol=1e-9)
    assert is_on_disk(on_disk)


def test_one_block_is_in_memory_at_a_time_and_tied_embeddings_stay_tied(tokenizer, tmp_path):
    save_model(small_opt(), tokenizer, tmp_path)
    model, _ = checkpoint.load(str(tmp_path), "float64", on_disk=tmp_path / "scratch")
    blocks = find_blocks(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    with on_device(blocks[1], CPU), on_device(blocks[1], CPU):
        assert [is_on_disk(block) for block in blocks] == [True, False, True]
        assert blocks[1].fc1.weight.dtype == torch.float64  # asked for, whatever the file has
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with pytest.raises(ZeroDivisionError), on_device(blocks[0], CPU):
        raise ZeroDivisionError
    assert is_on_disk(blocks[0])
    # As it is, transformers runs it too, reading layer by layer.
    assert torch.equal(
        model(TOKENS).logits, AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float64")(TOKENS).logits
    )


def test_weights_that_are_in_no_safetensors_file(tokenizer, tmp_path):
    model = small_opt()
    save_model(model, tokenizer, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    on_disk, _ = checkpoint.load(str(tmp_path), "auto", on_disk=tmp_path / "scratch")
    assert is_on_disk(on_disk) and all("scratch" in e["safetensors_file"] for e in disk_index(on_disk).values())
    torch.testing.assert_close(logits_block_by_block(on_disk, TOKENS), model(TOKENS, use_cache=False).logits)


def test_a_fingerprint_changes_with_any_of_its_files(tokenizer, tmp_path):
    save_model(small_opt(), tokenizer, tmp_path)
    prints = [fingerprint(checkpoint.load(str(tmp_path), "auto", on_disk=tmp_path / "s")[0]) for _ in range(2)]
    assert prints[0] == prints[1]
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert fingerprint(checkpoint.load(str(tmp_path), "auto", on_disk=tmp_path / "s")[0]) != prints[0]
    assert fingerprint(small_opt()) == fingerprint(small_opt())  # in memory there is nothing to look at
