import gc
import weakref

import pytest
import torch
from transformers import Cache

from snp_llm.models import blocks as running
from snp_llm.models.anatomy import find_blocks
from snp_llm.models.blocks import capture_calls, fixed_output, input_of, output_of, run_block
from snp_llm.models.calls import move, with_first_tensor
from tests.conftest import OPT_VARIANTS, small_opt
from tests.differing import DIFFERING, differing_model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", OPT_VARIANTS)
def test_running_captured_blocks_one_by_one_is_the_model(variant, attention):
    model = small_opt(**OPT_VARIANTS[variant])
    model.set_attn_implementation(attention)
    blocks = find_blocks(model)
    tokens = torch.randint(2048, (3, 20))
    hidden, calls = capture_calls(model, blocks, tokens)
    assert len(calls) == 3 and "position_ids" in calls[0].kwargs
    states = model(tokens, output_hidden_states=True).hidden_states
    assert torch.equal(hidden, states[0])
    for index, (block, call) in enumerate(zip(blocks, calls, strict=True)):
        hidden = run_block(block, hidden, call)
        if index < 2:  # the last one is recorded after the final norm
            assert torch.equal(hidden, states[index + 1])


def test_capture_leaves_the_model_as_it_was():
    model = small_opt()
    tokens = torch.randint(2048, (1, 8))
    before = model(tokens).logits
    capture_calls(model, find_blocks(model), tokens)
    assert torch.equal(model(tokens).logits, before)


def test_inputs_and_outputs_inside_a_block():
    model = small_opt()
    block = find_blocks(model)[0]
    hidden, calls = capture_calls(model, find_blocks(model), torch.randint(2048, (2, 8)))
    whole = run_block(block, hidden, calls[0])
    inner = input_of(block.fc2, block, hidden, calls[0]).reshape(2, 8, 64)
    attended = output_of(block.self_attn, block, hidden, calls[0])
    assert inner.min() >= 0  # after the ReLU
    assert torch.equal(run_block(block, hidden, calls[0]), whole)  # no hook was left behind
    torch.testing.assert_close(hidden + attended[0] + block.fc2(inner), whole)
    with fixed_output(block.self_attn, with_first_tensor(attended, torch.zeros_like(attended[0]))):
        without = input_of(block.fc2, block, hidden, calls[0]).reshape(2, 8, 64)
    assert torch.equal(without, block.fc1(block.final_layer_norm(hidden)).relu())
    assert torch.equal(run_block(block, hidden, calls[0]), whole)


def test_move_keeps_structure():
    value = {"a": (torch.ones(2), None), "b": [3, {"c": torch.zeros(1)}]}
    moved = move(value, torch.device("meta"))
    assert moved["a"][0].is_meta and moved["a"][1] is None and moved["b"][1]["c"].is_meta and moved["b"][0] == 3


@pytest.mark.parametrize(
    "model_type", ["granitemoehybrid", *(pytest.param(t, marks=pytest.mark.exhaustive) for t in DIFFERING)]
)
def test_blocks_are_called_without_a_cache(model_type):
    """Whichever of the models around them takes the word for it: a block with one would see the windows before."""
    model = differing_model(model_type, use_cache=True)
    _, calls = capture_calls(model, find_blocks(model), torch.randint(3, 2048, (1, 8)))
    assert not any(isinstance(value, Cache) for call in calls for value in (*call.args, *call.kwargs.values()))


def test_what_a_form_that_fails_has_made_is_gone_with_it():
    """Of a model whose blocks give tuples every call fails once: on a device its tensors would pile up."""
    made = []

    def run() -> int:
        values = torch.zeros(3)
        made.append(weakref.ref(values))
        if len(made) == 1:
            raise ValueError("a tuple was expected")
        return 7

    gc.disable()
    try:
        assert running._run_past(torch.nn.ModuleList(), lambda _index, hidden: hidden, run) == 7
        assert [values() for values in made] == [None, None]
    finally:
        gc.enable()
