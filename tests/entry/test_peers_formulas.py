"""Formulas of the published methods, against brute force, dense algebra or an identity."""

import itertools

import pytest
import torch

from benchmarks.peers import PEERS, grasprune, llm_pruner, modegpt, rcpu, two_stage, widths
from benchmarks.peers.common import least_squares, model_sites
from benchmarks.peers.measure import CONTEXT, CONTINUATION, answered, dense_logits, make_questions, quality
from snp_llm import perplexity
from snp_llm.linalg.gram import add_moments, empty_moments
from snp_llm.models.blocks import capture_calls, run_block
from snp_llm.models.surgery import NoBlock
from tests.conftest import small_model

TOKENS = torch.randint(2048, (6, 24), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")


def model_of(model_type, dtype=torch.float64):
    wide = {"opt": {"ffn_dim": 256}, "llama": {"intermediate_size": 256}}[model_type] | {"num_hidden_layers": 3}
    return small_model(model_type, dtype, **wide)


def problem(n, d_out, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, n, generator=generator, dtype=torch.float64)
    X = X @ torch.randn(n, tokens, generator=generator, dtype=torch.float64)
    return torch.randn(d_out, n, generator=generator, dtype=torch.float64), X


def test_ffns_alone_meet_the_budget_and_leave_heads():
    sites = model_sites(model_of("llama"))[2]
    total = sum(site.parameters for site in sites)
    influence = torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64)
    for found in (widths.ffn_widths(sites, 0.3), widths.influence_widths(sites, 0.3, influence, 0.1)):
        assert all(w == s.units for s, w in zip(sites, found, strict=True) if s.kind == "attention")
        gone = sum((s.units - w) * s.cost for s, w in zip(sites, found, strict=True))
        assert gone / total == pytest.approx(0.3, abs=0.02)
    assert found[3] < found[5] < found[1]  # the second block turns the stream least
    with pytest.raises(widths.SnpError, match="where heads stay"):
        widths.ffn_widths(sites, 0.9)


def test_shares_follow_the_softmax_until_a_block_has_lost_most():
    influence = torch.tensor([0.1, 0.4, 0.2], dtype=torch.float64)
    weights = torch.softmax(-influence / 0.5, 0)
    torch.testing.assert_close(widths.influence_shares(influence, 0.5, 0.3), 0.9 * weights)
    steep = widths.influence_shares(influence, 0.05, 0.6)
    assert steep.mean() == pytest.approx(0.6) and steep[0] == pytest.approx(0.95)
    rest = torch.softmax(-influence[1:] / 0.05, 0)
    torch.testing.assert_close(steep[1:] / steep[1:].sum(), rest)


def test_block_influence_is_one_minus_the_cosine():
    dense = model_of("opt")
    states = dense(TOKENS, output_hidden_states=True).hidden_states
    expected = [1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in itertools.pairwise(states[:-1])]
    torch.testing.assert_close(widths.block_influence(dense, TOKENS)[: len(expected)], torch.stack(expected))


def test_shortgpt_without_a_block_is_the_model_that_steps_over_it():
    dense = model_of("llama")
    pruned = PEERS["shortgpt"](dense, TOKENS, 1 / 3)
    blocks = model_sites(dense)[1]
    (gone,) = (i for i, block in enumerate(pruned.model.layers) if isinstance(block, NoBlock))
    assert gone == int(widths.block_influence(dense, TOKENS).argmin())
    hidden, calls = capture_calls(dense, blocks, TOKENS)
    for index in set(range(len(blocks))) - {gone}:
        hidden = run_block(blocks[index], hidden, calls[index])
    torch.testing.assert_close(pruned(TOKENS).logits, dense.lm_head(dense.model.norm(hidden)))


def test_modegpt_leverage_and_nystrom():
    W, X = problem(9, 4, 40)
    C = X @ X.T
    scaled = C / C.diagonal().mean()
    expected = (scaled @ torch.linalg.inv(scaled + torch.eye(9, dtype=C.dtype))).diagonal()
    torch.testing.assert_close(modegpt.leverage_scores(C), expected)
    kept, weight = modegpt.nystrom(W, C, 5)
    assert set(kept.tolist()) == set(torch.topk(expected, 5).indices.tolist())
    exact = torch.linalg.lstsq(X[kept].T, (W @ X).T).solution.T
    torch.testing.assert_close(weight, exact, rtol=2e-2, atol=2e-2)


def test_modegpt_pair_is_the_best_of_its_rank():
    """Eckart-Young on the outputs themselves, and all of them at full rank."""
    generator = torch.Generator().manual_seed(0)
    V, W = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 7), (6, 4)))
    X = problem(7, 1, 50)[1]
    for rank in (1, 3, 4):
        narrow, wide = modegpt.best_pair(X @ X.T, V, W, rank)
        lost = torch.linalg.matrix_norm(W @ V @ X - wide @ narrow @ X)
        assert lost.item() == pytest.approx(torch.linalg.svdvals(W @ V @ X)[rank:].norm().item(), abs=1e-6)


@pytest.mark.parametrize("model_type", ["opt", "llama"])
def test_modegpt_with_nothing_narrowed_puts_out_the_same(model_type):
    dense = model_of(model_type)
    expected = dense(TOKENS).logits
    _, blocks, sites = model_sites(dense)
    site = sites[0]
    path = modegpt.names_of(blocks[0]).qkv[0]
    (reads,) = modegpt.input_moments(dense, [modegpt.projection(blocks[0], path)], TOKENS)
    modegpt.narrow_values(blocks[0], site, modegpt.augmented(reads), site.heads.size)
    energies = tuple(torch.ones(heads * site.heads.size) for heads in (site.heads.query, site.heads.key_value))
    modegpt.narrow_queries(blocks[0], site, energies, site.heads.size, rotary=model_type == "llama")
    torch.testing.assert_close(dense(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


def test_modegpt_keeps_rotary_pairs_together():
    dense = model_of("llama")
    _, blocks, (site, *_) = model_sites(dense)
    heads, scores = site.heads, torch.arange(1.0, 1000.0)
    energies = scores[: heads.query * heads.size], scores[: heads.key_value * heads.size]
    modegpt.narrow_queries(blocks[0], site, energies, heads.size // 2, rotary=True)
    rows = blocks[0].self_attn.k_proj.weight.abs().sum(1).reshape(heads.key_value, 2, heads.size // 2) > 0
    assert torch.equal(rows[:, 0], rows[:, 1]) and int(rows.sum()) == heads.key_value * heads.size // 2


def test_rcpu_is_the_best_rotation():
    W, X = problem(8, 5, 30)
    kept = torch.tensor([0, 2, 3, 6, 7])
    Y, Z = W @ X, W[:, kept] @ X[kept]
    found = rcpu.rotated(W, X @ X.T, kept, scaled=False)
    turn = found @ torch.linalg.pinv(W[:, kept])
    torch.testing.assert_close(turn @ turn.T, torch.eye(5, dtype=W.dtype))
    least, generator = (Y - found @ X[kept]).norm(), torch.Generator().manual_seed(3)
    for _ in range(200):
        step = 0.1 * torch.randn(5, 5, generator=generator, dtype=W.dtype)
        other = torch.linalg.matrix_exp(step - step.T) @ turn
        assert (Y - other @ Z).norm() >= least
    scaled = rcpu.rotated(W, X @ X.T, kept, scaled=True) @ X[kept]
    assert ((Y - scaled) * scaled).sum().item() == pytest.approx(0, abs=1e-6 * float(Y.square().sum()))


def test_llm_pruner_saliences_add_up_to_the_derivative_of_a_scale():
    """`sum w dL/dw` over a projection is the derivative of the loss by a factor on it."""
    dense = model_of("llama")
    found = llm_pruner.salience(dense, TOKENS)["model.layers.1.mlp.down_proj.weight"].sum()
    weight, losses = dense.model.layers[1].mlp.down_proj.weight, []
    for factor in (1 + 1e-2, 1 - 1e-2):
        weight.data *= factor
        logits = dense(TOKENS).logits[:, :-1].transpose(1, 2)
        losses.append(torch.nn.functional.cross_entropy(logits, TOKENS[:, 1:]).item())
        weight.data /= factor
    assert found.item() == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=1e-2)


def test_llm_pruner_leaves_the_first_and_last_blocks():
    dense = small_model("llama", torch.float32, intermediate_size=256, num_hidden_layers=8)
    pruned = PEERS["llm-pruner-middle"](dense, TOKENS, 0.3)
    before, after = (model_sites(model)[2] for model in (dense, pruned))
    whole = {s.block for s, t in zip(before, after, strict=True) if s.units == t.units and s.kind == "ffn"}
    assert whole == {0, 7}


def test_2ssp_by_brute_force():
    assert two_stage.attentions_to_remove(32, 3, 1, 0.5) == round(32 * 0.5**2)
    dense = model_of("opt")
    sites = model_sites(dense)[2]
    (ffn,) = (s for s in sites if s.kind == "ffn" and s.block == 1)
    hidden = []
    layer = dense.get_submodule(f"model.decoder.layers.1.{ffn.path}")
    handle = layer.register_forward_pre_hook(lambda _m, x: hidden.append(x[0]))
    dense(TOKENS)
    handle.remove()
    expected = hidden[0].reshape(len(TOKENS), -1, ffn.units).norm(dim=1).mean(0)
    torch.testing.assert_close(two_stage.channel_norms(dense, TOKENS)[1], expected)
    costs = []
    for block in range(3):
        silenced = model_of("opt")
        two_stage.drop_attention(silenced, block)
        costs.append(perplexity(silenced, TOKENS[:1]))
    assert two_stage.cheapest_attentions(dense, 1, TOKENS[:1]) == [costs.index(min(costs))]


def test_grasprune_budget_by_hand():
    scores = [torch.tensor([0.9, 0.1]), torch.tensor([0.8, 0.7, 0.2])]
    masks = grasprune.within_budget(scores, [3, 1], 5)
    assert [mask.tolist() for mask in masks] == [[True, False], [True, True, False]]
    masks = grasprune.within_budget([torch.tensor([0.1, 0.0]), scores[1]], [3, 1], 2)
    assert [mask.tolist() for mask in masks] == [[True, False], [True, True, False]]  # a site is never empty


@pytest.mark.parametrize("model_type", ["opt", "llama"])
def test_grasprune_folds_what_gates_do(model_type):
    dense = model_of(model_type)
    _, blocks, sites = model_sites(dense)
    gates = [torch.rand(s.units, generator=torch.Generator().manual_seed(i)).double() for i, s in enumerate(sites)]
    with grasprune.gated(dense, sites, gates):
        expected = dense(TOKENS).logits
    for site, gate in zip(sites, gates, strict=True):
        grasprune.fold(blocks[site.block], site, gate)
    torch.testing.assert_close(dense(TOKENS).logits, expected)


def test_quality_by_hand():
    dense, other = model_of("opt"), PEERS["magnitude"](model_of("opt"), TOKENS, 0.5)
    p, q = (model(TOKENS).logits[:, :-1].double().softmax(-1) for model in (dense, other))
    found = quality(other, dense_logits(dense, TOKENS, 4, CPU), TOKENS, 4, CPU)
    assert found.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-2)
    assert found.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert found.perplexity == pytest.approx(perplexity(other, TOKENS), rel=1e-6)
    same = quality(dense, dense_logits(dense, TOKENS, 4, CPU), TOKENS, 4, CPU)
    assert same.kl == pytest.approx(0, abs=1e-9) and same.agreement == 1


def test_questions_have_one_real_answer_each():
    text = torch.arange(2000)
    questions = make_questions(text, 10)
    for rows, answer in zip(questions.tokens, questions.answers, strict=True):
        real = torch.arange(int(rows[0, 0]), int(rows[0, 0]) + CONTEXT + CONTINUATION)
        assert [torch.equal(row, real) for row in rows].index(True) == answer
        assert sum(torch.equal(row, real) for row in rows) == 1
    dense = small_model("opt", torch.float32, max_position_embeddings=128)
    asked = make_questions(torch.randint(2048, (1500,), generator=torch.Generator().manual_seed(0)), 8)
    likely = []
    for rows in asked.tokens:
        loss = dense(rows).logits[:, CONTEXT - 1 : -1].log_softmax(-1).gather(2, rows[:, CONTEXT:, None])
        likely.append(int(loss.sum((1, 2)).argmax()))
    expected = sum(a == b for a, b in zip(likely, asked.answers.tolist(), strict=True)) / len(likely)
    assert answered(dense, asked, 2, CPU) == pytest.approx(expected)


def test_moments_of_inputs_are_those_of_the_inputs():
    dense = model_of("opt")
    module, seen = dense.model.decoder.layers[1].fc2, []
    handle = module.register_forward_pre_hook(lambda _m, x: seen.append(x[0]))
    dense(TOKENS)
    handle.remove()
    (found,) = modegpt.input_moments(dense, [module], TOKENS)
    expected = add_moments(empty_moments(256, torch.float64), seen[0])
    torch.testing.assert_close(found.second.tril(), expected.second.tril())
    torch.testing.assert_close(
        modegpt.output_energies(dense, [module], TOKENS)[0], module(seen[0]).square().reshape(-1, 48).sum(0)
    )
    assert least_squares(torch.eye(2).double(), torch.eye(2).double(), torch.tensor([0])).tolist() == [[1], [0]]
