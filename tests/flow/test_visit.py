"""The visit to the dense model: gradients against autograd on the whole model, curves against their definition."""

import pytest
import torch
from torch.nn import functional

from snp_llm.checkpoint.journal import Journal
from snp_llm.models.anatomy import find_anatomy, find_blocks
from snp_llm.models.families.decoders import find_family
from snp_llm.models.projections import projection
from snp_llm.pruning.run import Run, resolve
from snp_llm.pruning.sensitivity import gradient_windows, visit_dense, visit_passes
from snp_llm.pruning.statistics import enough_windows
from snp_llm.runtime.device import Clock
from tests.conftest import small_model, small_recipe
from tests.families import IN_FLOAT32, every_family

TOKENS = torch.randint(3, 2048, (5, 24), generator=torch.Generator().manual_seed(0))


def visit(model, **overrides):
    recipe = resolve(small_recipe(**overrides), model)
    anatomy = find_anatomy(model)
    run = Run(recipe, Clock(torch.device("cpu")), Journal())
    return anatomy.sites, visit_dense(anatomy, TOKENS, run)


@every_family(*IN_FLOAT32)
def test_gradient_moments_are_those_of_a_backward_pass_through_the_whole_model(model_type):
    model = small_model(model_type)
    model.requires_grad_(True)
    sites, found = visit(model, batch_size=2)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    _family, outputs = find_family(model.config), {}
    blocks = find_blocks(model)
    for site in sites:

        def keep(_module, _inputs, output, name=site.name):
            output.retain_grad()
            outputs[name] = output

        projection(blocks[site.block], site.path).register_forward_hook(keep)
    logits = model(TOKENS, use_cache=False).logits[:, :-1]
    functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum").backward()
    for site, curves in zip(sites, found, strict=True):
        gradient = outputs[site.name].grad
        gradient = gradient.reshape(-1, gradient.shape[-1])
        expected = gradient.T @ gradient / TOKENS.numel()
        torch.testing.assert_close(
            curves.gradient.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max())
        )
        assert (
            curves.loss.shape == (site.units + 1,)
            and curves.loss[-1] == 0
            and (curves.loss[:-1] >= 0).all()
            and curves.loss[0] > 0
        )
        assert curves.energy[-1] == 1


def test_batch_size_does_not_matter():
    for a, b in zip(visit(small_model("llama"))[1], visit(small_model("llama"), batch_size=1)[1], strict=True):
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-4, atol=1e-12)


def test_without_gradients_the_model_is_visited_once_forwards():
    _, found = visit(small_model("llama"), allocation="variance", metric="error")
    assert all(c.gradient is None and c.loss is None and c.energy is not None for c in found)
    _, found = visit(small_model("llama"), allocation="uniform")
    assert all(c.gradient is not None and c.loss is None and c.energy is None for c in found)


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"allocation": "uniform", "metric": "error"}, 0),
        ({"allocation": "uniform", "ordering": "zca"}, 0),  # no metric in it
        ({"allocation": "uniform", "ordering": "obs"}, 1),
        ({"allocation": "variance", "ordering": "zca"}, 1),
        ({"allocation": "loss", "metric": "error"}, 2),
    ],
)
def test_the_model_is_visited_only_where_something_needs_it(settings, passes):
    assert visit_passes(small_recipe(**settings)) == passes


def test_a_wide_site_is_visited_with_enough_windows_and_no_more():
    model = small_model("llama")
    seen = []
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _m, _i, output: seen.append(len(output)))
    visit(model, allocation="variance", metric="error", batch_size=1)  # 64 channels x 16 tokens are more than there are
    assert sum(seen) == len(TOKENS)


def test_gradients_are_read_from_no_more_tokens_than_said(monkeypatch):
    model = small_model("llama")
    monkeypatch.setattr("snp_llm.pruning.sensitivity.GRADIENT_TOKENS", 4 * TOKENS.shape[1])
    seen = []
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _m, _i, output: seen.append(len(output)))
    visit(model, batch_size=1, allocation="uniform")
    assert sum(seen) == 2 * 4  # there and back
    visit(model, batch_size=1, measured_cuts=0)
    assert sum(seen) == 4 * 4 + len(TOKENS)  # and once for curves


def test_gradients_take_tokens_by_outputs_and_curves_by_the_widest_site():
    assert [gradient_windows(hidden, 512) for hidden in (512, 4096, 8192)] == [8, 64, 64]
    assert gradient_windows(16, 512) == gradient_windows(16, 100_000) == 4
    assert [enough_windows(widest, 512) for widest in (1, 1024, 16_384)] == [8, 32, 512]
