"""Streams that hold more than hidden states: embeddings of every block, keys and values for later ones, several states
of a token. What a model computes as a whole is what its blocks have to, run one at a time."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from snp_llm.models.anatomy import find_anatomy, find_blocks
from snp_llm.models.blocks import capture_calls, input_gradient, loss_gradient, run_block
from snp_llm.models.carried import stream_channels
from snp_llm.models.logits import logits_block_by_block
from snp_llm.models.window import capture_window
from tests.families import FAMILY_CONFIGS, OWN_EMBEDDINGS, SHARED_KEYS

TOKENS = torch.randint(3, 1900, (3, 24), generator=torch.Generator().manual_seed(0))
SHARED = {**SHARED_KEYS, **OWN_EMBEDDINGS}
CONFIGS = {
    "gemma4_text": SHARED,
    "gemma3n_text": {**SHARED, "altup_num_inputs": 3, "activation_sparsity_pattern": [0.9, 0.0, 0.0, 0.0, 0.0, 0.0]},
}


@pytest.fixture(params=CONFIGS)
def model(request):
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **{**FAMILY_CONFIGS[request.param], **CONFIGS[request.param]})
    made = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        parameter.normal_(0.2 if "norm" in name else 0.0, 0.3 if parameter.dim() > 1 else 0.1)
    return made


def test_blocks_one_at_a_time_compute_what_the_model_does(model):
    wanted = model(TOKENS).logits
    torch.testing.assert_close(logits_block_by_block(model, TOKENS), wanted, rtol=1e-10, atol=1e-10)
    assert (wanted[0] - wanted[1]).abs().max() > 1e-3


def test_gradients_are_those_of_the_whole_model_also_through_keys_that_later_blocks_read(model):
    blocks = find_blocks(model)
    _, calls = capture_window(model, blocks, TOKENS[:1])
    stream = [capture_calls(model, blocks, TOKENS)[0]]
    assert stream[0].shape[-1] == stream_channels(blocks, model.config.hidden_size)
    for block, call in zip(blocks, calls, strict=True):
        stream.append(run_block(block, stream[-1], call))
    gradient, found = loss_gradient(model, blocks, TOKENS, stream[-1]), []
    for index in reversed(range(len(blocks))):
        down = blocks[index].mlp.down_proj
        gradient = input_gradient(blocks[index], stream[index], calls[index], gradient, {down: found.append})
    whole = {}

    def watch(index, output):
        if not output.requires_grad:
            output.requires_grad_()
        output.register_hook(lambda gradient: whole.update({index: gradient}))

    for index, block in enumerate(blocks):
        block.mlp.down_proj.register_forward_hook(lambda _m, _x, output, index=index: watch(index, output))
    logits = model(TOKENS).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum").backward()
    for index, got in enumerate(reversed(found)):
        assert (got - whole[index]).abs().max() < 1e-5 * whole[index].abs().max()  # the loss is in float32


def test_attention_stays_where_other_blocks_read_its_keys_and_an_ffn_whose_channels_depend_on_all(model):
    anatomy = find_anatomy(model)
    assert [site.block for site in anatomy.sites if site.kind == "attention"] == [0, 1]
    ffns = [site for site in anatomy.sites if site.kind == "ffn"]
    assert len(ffns) == 6
    staying = [site.block for site in ffns if not site.prunable]
    assert staying == ([0] if model.config.model_type == "gemma3n_text" else [])
