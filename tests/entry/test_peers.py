"""The published methods do what their papers say, on small models, and the runner that compares them resumes."""

import copy
import csv
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.peers import NAMES, PEERS, flap, magnitude, make_methods, osscar, slicegpt, wanda
from benchmarks.peers.common import least_squares, model_sites
from benchmarks.peers.measure import Quality
from benchmarks.peers.report import Row, choose
from benchmarks.peers.widths import uniform_widths
from snp_llm import Recipe
from snp_llm.data.sources import BUNDLED, Dataset
from snp_llm.data.windows import calibration_windows
from snp_llm.linalg.units import unit_channels
from snp_llm.models.blocks import capture_calls, input_of
from snp_llm.models.projections import projection
from snp_llm.models.size import model_size
from snp_llm.pruning.pipeline import plan
from tests.conftest import save_model, small_model, small_opt

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
TOKENS = torch.randint(2048, (8, 32), generator=torch.Generator().manual_seed(1))
SETTINGS = {"model": "small", "calibration": "bundled", "num_samples": 8, "seq_len": 32, "batch_size": 4}
# FFNs wide enough for a budget to be met, and the families' own tied or untied heads.
MODELS = {
    "opt": lambda dtype=torch.float32: small_model("opt", dtype, ffn_dim=256),
    "llama": lambda dtype=torch.float32: small_model("llama", dtype, intermediate_size=256),
}


def random_problem(units, unit_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = units * unit_size
    X = torch.randn(3 * n, n, generator=generator, dtype=torch.float64)
    X = X @ torch.randn(n, n, generator=generator, dtype=torch.float64)
    return torch.randn(5, n, generator=generator, dtype=torch.float64), X.T @ X


def exact_objective(W, gram, kept):
    """`tr((W - W') G (W - W')^T)` of the least-squares W' on the kept channels."""
    new = torch.zeros_like(W)
    new[:, kept] = W @ gram[:, kept] @ torch.linalg.inv(gram[kept][:, kept])
    return float((((W - new) @ gram) * (W - new)).sum())


def channels_without(units, unit_size, gone):
    return unit_channels(torch.tensor([u for u in range(units) if u not in gone]), unit_size)


@pytest.mark.parametrize("model_type", ["opt", pytest.param("llama", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", [name for name in (*NAMES, "ours") if not re.search("influence|middle", name)])
def test_a_method_removes_what_was_asked_for_and_leaves_the_dense_model_alone(name, model_type, tokenizer):
    dense = MODELS[model_type]()
    before = copy.deepcopy(dense.state_dict())
    tokens, methods = TOKENS, PEERS
    if name not in PEERS:
        methods = {method.name: method for method in make_methods(tokenizer, SETTINGS, {"ours": {}})}
        tokens = calibration_windows(tokenizer, Dataset("bundled"), num_samples=8, seq_len=32, seed=0).tokens
    prune = methods[name].prepare(dense, tokens, 0)
    for sparsity in (0.2, 0.4):
        result = prune(sparsity)
        assert result.achieved == pytest.approx(sparsity, abs=0.3 if name == "shortgpt" else 0.02)
        if not name.startswith(("slicegpt", "modegpt", "shortgpt")):
            kept = model_size(result.model, 1).block_linear / model_size(dense, 1).block_linear
            assert result.achieved == pytest.approx(1 - kept)
        assert torch.isfinite(result.model(TOKENS).logits).all()
    assert all(torch.equal(before[key], value) for key, value in dense.state_dict().items())


@pytest.mark.parametrize("name", ["random", "osscar", "slicegpt"])
def test_the_plain_signature_gives_the_same_model(name):
    dense = MODELS["opt"]()
    expected = PEERS[name].prepare(dense, TOKENS, 3)(0.3).model(TOKENS).logits
    torch.testing.assert_close(PEERS[name](dense, TOKENS, 0.3, 3)(TOKENS).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("model_type", MODELS)
def test_uniform_widths_are_the_packages(model_type, sparsity, tokenizer):
    dense = MODELS[model_type]()
    recipe = Recipe(model="small", sparsity=sparsity, ordering="zca", allocation="uniform", calibration="bundled")
    expected = [width for _, width in plan(dense, tokenizer, recipe)]
    assert uniform_widths(model_sites(dense)[2], sparsity) == expected


def exact_norms(model):
    """Llama's norms compute in float32 whatever the model; torch's own do not."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "variance_epsilon"):
            norm = nn.RMSNorm(module.weight.shape[0], eps=module.variance_epsilon, dtype=module.weight.dtype)
            norm.weight = module.weight
            model.set_submodule(name, norm)
    return model


@pytest.mark.parametrize("model_type", MODELS)
def test_slicegpt_with_nothing_sliced_is_the_dense_model(model_type):
    dense = exact_norms(MODELS[model_type](torch.float64))
    rotated = slicegpt.slice_model(dense, TOKENS, dense.config.hidden_size)
    assert not torch.allclose(rotated.get_input_embeddings().weight, dense.get_input_embeddings().weight)
    torch.testing.assert_close(rotated(TOKENS).logits, dense(TOKENS).logits, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", MODELS)
def test_slicegpt_counts_the_parameters_that_it_has(model_type, tied):
    dense = small_model(model_type, torch.float32, tie_word_embeddings=tied)
    d, rows = dense.config.hidden_size, dense.config.vocab_size
    for width in (10, 30, d):
        model = slicegpt.slice_model(dense, TOKENS, width)
        held = sum(p.numel() for p in model.parameters())
        shift = int(model_type == "opt")  # the last norm's, in the head
        if tied:  # held as two tensors; stored as one between two rotations where that is smaller
            held -= max(0, rows * (2 * width + shift) - (rows * d + 2 * d * width + d * shift))
        assert slicegpt.sliced_parameters(dense, width) == held


def test_slicegpt_refuses_a_stream_that_it_does_not_know():
    with pytest.raises(slicegpt.SnpError, match="slicegpt: expected a pre-norm"):
        PEERS["slicegpt"](small_opt(do_layer_norm_before=False), TOKENS, 0.3)


@pytest.mark.parametrize("unit_size", [1, 2])
def test_osscar_greedy_is_brute_force_greedy(unit_size):
    W, gram = random_problem(7, unit_size)
    table = osscar.start(W, gram, unit_size)
    gone = []
    for width in range(6, 0, -1):
        osscar.remove_greedily(table, width)
        left = [u for u in range(7) if u not in gone]
        costs = {u: exact_objective(W, gram, channels_without(7, unit_size, [*gone, u])) for u in left}
        gone.append(min(costs, key=costs.__getitem__))
        assert sorted(gone) == (~table.kept).nonzero().squeeze(1).tolist()
        assert table.objective == pytest.approx(costs[gone[-1]])
        kept = channels_without(7, unit_size, gone)
        torch.testing.assert_close(table.V[:, kept], least_squares(W, gram, kept))


def test_osscar_local_search_never_raises_the_objective_and_often_lowers_it():
    lowered = 0
    for seed in range(20):
        unit_size = 1 + seed % 2
        W, gram = random_problem(12, unit_size, seed)
        table = osscar.start(W, gram, unit_size)
        osscar.remove_greedily(table, 5)
        greedy = table.objective
        swaps = osscar.swap_while_better(table, 50)
        gone = (~table.kept).nonzero().squeeze(1).tolist()
        assert len(gone) == 7 and table.objective <= greedy
        assert table.objective == pytest.approx(exact_objective(W, gram, channels_without(12, unit_size, gone)))
        assert (table.objective < greedy) == (swaps > 0)
        lowered += swaps > 0
    assert lowered > 2


def test_least_squares_is_lstsq():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(50, 9, generator=generator, dtype=torch.float64)
    W = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    kept = torch.tensor([0, 3, 4, 8])
    expected = torch.linalg.lstsq(X[:, kept], X @ W.T).solution.T
    torch.testing.assert_close(least_squares(W, X.T @ X, kept), expected)


@pytest.mark.parametrize("model_type", MODELS)
def test_flap_keeps_the_mean_output(model_type):
    """At the first site that was cut, whose inputs no cut has changed, the mean over calibration tokens is dense's."""
    dense = MODELS[model_type](torch.float64)
    pruned = PEERS["flap"](dense, TOKENS, 0.5)
    before, after = (model_sites(model)[2] for model in (dense, pruned))
    path = next(old.path for old, new in zip(before, after, strict=True) if new.units < old.units)
    outputs = []
    for model in (dense, pruned):
        _, blocks, _ = model_sites(model)
        hidden, calls = capture_calls(model, blocks, TOKENS)
        out = projection(blocks[0], path)
        outputs.append(out(input_of(out, blocks[0], hidden, calls[0])))
    assert (outputs[0] - outputs[1]).abs().mean() > 1e-3
    torch.testing.assert_close(outputs[1].mean((0, 1)), outputs[0].mean((0, 1)), rtol=1e-9, atol=1e-9)


def test_flap_scores_and_threshold():
    W = torch.tensor([[1.0, 0.0, 2.0, 1.0], [0.0, 3.0, 0.0, 1.0]])
    variance = torch.tensor([4.0, 1.0, 0.5, 2.0])
    fluctuation = torch.tensor([4.0, 9.0, 2.0, 4.0])
    standard = (fluctuation - 4.75) / fluctuation.std()
    expected = torch.stack([standard[:2].mean(), standard[2:].mean()])
    torch.testing.assert_close(flap.unit_scores(W, variance, 2), expected)
    sites = model_sites(MODELS["opt"]())[2]
    scores = [torch.linspace(-3.0, 3.0, site.units) + (site.kind == "ffn") for site in sites]
    kept = flap.choose_units(scores, sites, 0.3)
    removed = sum((site.units - len(units)) * site.cost for site, units in zip(sites, kept, strict=True))
    assert removed / sum(site.parameters for site in sites) == pytest.approx(0.3, abs=0.02)
    threshold = min(score[units].min() for score, units in zip(scores, kept, strict=True))
    gone = [score[~torch.isin(torch.arange(len(score)), u)] for score, u in zip(scores, kept, strict=True)]
    assert threshold >= max(score.max() for score in gone)


def test_flap_leaves_no_site_empty(caplog):
    sites = model_sites(MODELS["opt"]())[2]
    scores = [torch.arange(float(site.units)) - (1000 if site.block == 0 else 0) for site in sites]
    kept = flap.choose_units(scores, sites, 0.6)
    assert [units.tolist() for units in kept[:2]] == [[sites[0].units - 1], [sites[1].units - 1]]
    assert len(kept[2]) == 1 and len(kept[3]) > 1
    assert "3 sites would have lost every unit" in caplog.text


def test_magnitude_and_wanda_scores_by_hand():
    dense = MODELS["llama"](torch.float64)
    _family, blocks, (attention, ffn, *_) = model_sites(dense)
    block, size, group = blocks[0], attention.heads.size, attention.heads.query // attention.heads.key_value
    module = block.self_attn
    for unit in range(attention.units):
        queries = slice(unit * group * size, (unit + 1) * group * size)
        keys = slice(unit * size, (unit + 1) * size)
        parts = [module.q_proj.weight[queries], module.k_proj.weight[keys], module.v_proj.weight[keys]]
        parts.append(module.o_proj.weight[:, queries])
        expected = torch.cat([part.reshape(-1) for part in parts]).norm()
        torch.testing.assert_close(magnitude.unit_norms(block, attention)[unit], expected)
    mlp = block.mlp
    expected = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T], 1).norm(dim=1)
    torch.testing.assert_close(magnitude.unit_norms(block, ffn), expected)

    W, norms = torch.tensor([[1.0, -2.0, 0.0, 3.0], [-1.0, 1.0, 4.0, 0.0]]), torch.tensor([1.0, 2.0, 0.5, 10.0])
    assert wanda.unit_scores(W, norms, 1).tolist() == [2.0, 6.0, 2.0, 30.0]
    assert wanda.unit_scores(W, norms, 2).tolist() == [8.0, 32.0]


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("peers_runner", BENCHMARKS / "peers.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "peers_runner", module)  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_the_runner_writes_everything_and_resumes(runner, tokenizer, tmp_path, capsys):
    folder = save_model(small_opt(ffn_dim=256, max_position_embeddings=128), tokenizer, tmp_path / "small-opt")
    texts = [tmp_path / name for name in ("calibration.txt", "wiki.txt")]
    for text, source in zip(texts, ("calibration", "evaluation"), strict=True):
        text.write_text((BUNDLED / f"{source}.txt").read_text()[:20000])
    arguments = [str(folder), "--calibration", str(texts[0]), "--validation", f"held={texts[1]}@first"]
    arguments += ["--evaluation", f"wikitext={texts[1]}@second", "--methods", "random-*,slicegpt,ours-*"]
    arguments += ["--ours", "plain:allocation=uniform,absorb_bias=false", "--seeds", "0,1", "--questions", "3"]
    arguments += ["--num-samples", "4", "--seq-len", "32", "--max-windows", "4", "--work", str(tmp_path / "work")]
    arguments += ["--output", str(tmp_path), "--name", "small", "--sparsities"]
    assert runner.main([*arguments, "0.2"]) == 0
    assert "stored" not in capsys.readouterr().out
    assert runner.main([*arguments, "0.2,0.9"]) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r", stored$", out, re.M)) == 11 and len(re.findall(r", measured$", out, re.M)) == 10

    rows = list(csv.DictReader((tmp_path / "small.csv").open()))
    expected = [
        "dense",
        *(name for name in ("random", "random-ffn", "slicegpt", "ours", "ours-plain") for _ in range(4)),
    ]
    assert [row["method"] for row in rows] == expected
    for row in rows:
        assert row["failed"] or abs(float(row["achieved"]) - float(row["sparsity"])) < 0.05
        assert row["failed"] or float(row["perplexity evaluation wikitext"]) > 0 <= float(row["answered wikitext"])
    report = (tmp_path / "small.md").read_text()
    assert report.startswith("    python benchmarks/peers.py small-opt --calibration calibration.txt --validation held")
    assert "evaluation wikitext=wiki.txt@second" in report and report.count("| ours / best peer |") == 2
    assert report.count("| method | 20 % | 90 % |") == 6 and "±" in report and "arXiv 2401.15024" in report
    assert "| (1) |" in report and "(1) " in report and "|  |" not in report
    for file in ("small.csv", "small.md"):
        assert str(tmp_path) not in (tmp_path / file).read_text()
    assert runner.main([*arguments, "0.2", "--redraw"]) == 0
    assert (tmp_path / "small.png").read_bytes()[:4] == b"\x89PNG"


def test_the_setting_with_the_lowest_validation_perplexity_counts(runner):
    def row(method, seed, validation, evaluation):
        found = {"validation a": Quality(validation, 0, 0), "evaluation a": Quality(evaluation, 0, 0)}
        return Row(method, "family", 0.3, seed, 0.3, 1.0, found)

    rows = [
        row("one", 0, 10, 5),
        row("one", 1, 12, 5),
        row("two", 0, 9, 50),
        row("two", 1, 11, 50),
        row("three", 0, 1, 1),
    ]
    assert [r.method for r in choose(rows)["family"][0.3]] == ["two", "two"]


def test_validation_on_what_is_calibrated_on_is_refused(runner, opt_folder, tmp_path):
    arguments = [str(opt_folder), "--calibration", "bundled", "--validation", f"a={BUNDLED / 'calibration.txt'}"]
    arguments += ["--evaluation", f"b={BUNDLED / 'evaluation.txt'}", "--num-samples", "64", "--seq-len", "32"]
    with pytest.raises(SystemExit, match="--validation a: has windows that are calibrated on"):
        runner.main([*arguments, "--methods", "random", "--max-windows", "500", "--output", str(tmp_path)])


def test_an_unknown_method_is_refused(runner, capsys):
    with pytest.raises(SystemExit):
        runner.main(["small", "--methods", "random,osccar"])
    assert "unknown method 'osccar'" in capsys.readouterr().err
