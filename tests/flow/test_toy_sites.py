"""Sites that no family has yet: experts, convolutions with norms, several consumers, whole modules and blocks.

Each is built by hand, goes through the same loop as heads and FFN channels do, and comes to what lstsq gives.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from snp_llm.checkpoint.journal import Journal
from snp_llm.models.anatomy import Anatomy, find_anatomy, make_site
from snp_llm.models.blocks import capture_calls, run_block
from snp_llm.models.calls import BlockCall
from snp_llm.models.modeling_snp import NoHeads
from snp_llm.models.projections import inputs_as_rows
from snp_llm.models.site import Heads, Producer, Rows, Site, site_bias, site_weight
from snp_llm.models.surgery import NoBlock, prune_site
from snp_llm.pruning.repair import DAMPENINGS
from snp_llm.pruning.run import Run, read_calibration, resolve
from snp_llm.pruning.sensitivity import visit_dense
from snp_llm.pruning.sequential import prune_blocks
from snp_llm.pruning.stream import Stream, capture
from snp_llm.pruning.widths.costs import sparsity_costs
from snp_llm.pruning.widths.plan import Removal, Removals, plan_widths
from snp_llm.runtime.batches import BatchSize
from snp_llm.runtime.device import Clock
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.storage import Storage
from tests.conftest import small_model, small_recipe

D, WIDTH, WINDOWS, T = 12, 8, 16, 10
CPU = torch.device("cpu")


class Experts(nn.Module):
    """Each token goes to one of three FFNs, the third of which gets few."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, 3)
        self.up = nn.ModuleList(nn.Linear(D, WIDTH) for _ in range(3))
        self.down = nn.ModuleList(nn.Linear(WIDTH, D) for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        chosen, output = (self.router(hidden) - hidden.new_tensor([0, 0, 1.0])).argmax(-1), hidden.clone()
        for expert, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            if (here := chosen == expert).any():
                output[here] += down(torch.relu(up(hidden[here])))
        return output


class Convolutions(nn.Module):
    """Three convolutions with batch norms, over windows as images."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 6, 3, padding=1), nn.Conv2d(6, 3, 1)]
        )
        self.norms = nn.ModuleList([nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(6)])

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden
        for conv, norm in zip(self.convs, self.norms, strict=False):
            x = torch.relu(norm(conv(x)))
        return hidden + self.convs[2](x)


class TwoReaders(nn.Module):
    """One projection whose output two others read, one of them through a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.one, self.other = nn.Linear(D, WIDTH), nn.Linear(WIDTH, D), nn.Linear(WIDTH, 5)
        self.back = nn.Linear(5, D)

    def forward(self, hidden: Tensor) -> Tensor:
        x = torch.tanh(self.make(hidden))
        return hidden + self.one(x) + self.back(torch.relu(self.other(x)))


def producer(path: str, width: int) -> Producer:
    return Producer(path, (Rows(width, 1),))


def experts(block: nn.Module) -> list[Site]:
    return [
        make_site(
            block,
            0,
            kind="experts",
            stage=0,
            units=WIDTH,
            module=None,
            routed=True,
            producers=(producer(f"up.{e}", WIDTH),),
            consumers=(f"down.{e}",),
        )
        for e in range(3)
    ]


def convolutions(block: nn.Module) -> list[Site]:
    return [
        make_site(
            block,
            0,
            kind="convolution",
            stage=stage,
            units=units,
            module=None,
            consumers=(f"convs.{stage + 1}",),
            producers=(producer(f"convs.{stage}", units), producer(f"norms.{stage}", units)),
        )
        for stage, units in enumerate((WIDTH, 6))
    ]


def two_readers(block: nn.Module) -> list[Site]:
    return [
        make_site(
            block,
            0,
            kind="hidden",
            stage=0,
            units=WIDTH,
            module=None,
            producers=(producer("make", WIDTH),),
            consumers=("one", "other"),
        )
    ]


TOYS = {"experts": (Experts, experts), "convolutions": (Convolutions, convolutions), "two": (TwoReaders, two_readers)}


def toy(name: str) -> tuple[Anatomy, Stream, Run]:
    make, sites = TOYS[name]
    block = make().double().eval().requires_grad_(False)
    for tensor in (*block.parameters(), *(b for b in block.buffers() if b.is_floating_point())):
        nn.init.uniform_(tensor, 0.1, 1.0) if tensor.dim() == 1 else nn.init.normal_(tensor, std=0.4)
    shape = (WINDOWS, 3, 5, 4) if name == "convolutions" else (WINDOWS, T, D)
    hidden = torch.randn(shape, dtype=torch.float64)
    anatomy = Anatomy(None, None, nn.ModuleList([block]), tuple(sites(block)))  # type: ignore[arg-type]
    stream = Stream(hidden, [BlockCall((), {})], range(WINDOWS), WINDOWS, BatchSize(4), Storage(CPU))
    recipe = small_recipe(reference="self", dampening=0.0, metric="error", ordering="obs", num_samples=WINDOWS)
    return anatomy, stream, Run(recipe, Clock(CPU), Journal())


def first_inputs(block: nn.Module, path: str, hidden: Tensor) -> Tensor:
    """What a module gets when a block runs, as rows of its matrix."""
    seen = []
    module = block.get_submodule(path)
    handle = module.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    block(hidden)
    handle.remove()
    return inputs_as_rows(module, seen[0])


@pytest.mark.parametrize("name", TOYS)
def test_every_site_comes_to_least_squares_on_what_arrives_there(name):
    anatomy, stream, run = toy(name)
    hidden, before = stream.hidden.clone(), anatomy.blocks[0]
    last = len(anatomy.stages(0)) - 1
    for stage, sites in enumerate(anatomy.stages(0)):
        widths = [site.units // 2 if site.stage <= stage else site.units for site in anatomy.sites]
        stream.hidden.copy_(hidden)
        (after,), results = prune_blocks(anatomy, stream, widths, lambda _site: None, run)
        torch.testing.assert_close(after(hidden), stream.hidden)
        for site in sites:
            (kept,) = (r.kept for r in results if r.site == site)
            assert len(kept) == site.units // 2
            X = first_inputs(before, site.consumers[0], hidden).flatten(0, -2)
            channels = torch.cat([torch.arange(u * site.unit_size, (u + 1) * site.unit_size) for u in kept])
            A = torch.cat([X[:, channels], torch.ones(len(X), 1, dtype=X.dtype)], 1)
            wanted = X @ site_weight(before, site).T + site_bias(before, site)
            expected = A @ torch.linalg.lstsq(A, wanted, driver="gelsd").solution
            got = X[:, channels] @ site_weight(after, site).T + site_bias(after, site)
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
            for made in site.producers:  # whose rows are those of the kept units
                new, old = after.get_submodule(made.path), before.get_submodule(made.path)
                torch.testing.assert_close(new.weight, old.weight[kept])
        before = after
    assert stage == last and all(len(r.kept) == r.site.units // 2 for r in results)


def test_the_parts_of_a_unit_are_counted():
    for make, sites in TOYS.values():
        block = make()
        for site in sites(block):
            narrow = copy.deepcopy(block)
            prune_one(narrow, site)
            count = sum(p.numel() for m in block.modules() if isinstance(m, nn.Linear | nn.Conv2d) for p in [m.weight])
            fewer = sum(p.numel() for m in narrow.modules() if isinstance(m, nn.Linear | nn.Conv2d) for p in [m.weight])
            assert count - fewer == site.cost


def prune_one(block: nn.Module, site: Site) -> None:
    kept = torch.arange(1, site.units)
    prune_site(block, site, kept, site_weight(block, site)[:, site.unit_size :], site_bias(block, site))


def test_an_expert_that_no_token_comes_by_is_named():
    anatomy, stream, run = toy("experts")
    anatomy.blocks[0].router.bias[2] = -1e3
    with pytest.raises(SnpError, match=r"block 0 down\.2: no calibration token came by"):
        prune_blocks(anatomy, stream, [4, 4, 4], lambda _site: None, run)


def test_held_out_tokens_of_experts_choose_their_repair():
    anatomy, stream, run = toy("experts")
    run = replace(run, recipe=replace(run.recipe, dampening=None))
    _, results = prune_blocks(anatomy, stream, [4, 4, 4], lambda _site: None, run)
    assert {r.dampening for r in results} <= set(DAMPENINGS) and all(0 < r.error < 1 for r in results)


def whole_sites(model, kind: str) -> Anatomy:
    """An anatomy in which attentions, FFNs or blocks are kept or go as a whole."""
    found = find_anatomy(model)
    if kind == "block":
        hidden = model.config.hidden_size
        sites = [
            Site(index, "block", 0, (), (), None, 1, hidden, parameters, parameters, droppable=True)
            for index in range(len(found.blocks))
            for parameters in [sum(s.parameters for s in found.sites_of(index))]
        ]
        return replace(found, sites=tuple(sites))
    whole = [
        replace(
            site,
            units=1,
            unit_size=site.channels,
            cost=site.parameters,
            droppable=True,
            heads=site.heads and Heads(site.heads.query, 1, site.heads.size),
            producers=tuple(Producer(p.path, tuple(Rows(r.count, r.count) for r in p.rows)) for p in site.producers),
        )
        for site in found.sites
        if site.kind == kind
    ]
    return replace(found, sites=tuple(whole))


@pytest.mark.parametrize("kind", ["attention", "ffn", "block"])
@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt_neox"])
def test_whole_modules_share_budgets_curves_and_the_loop(kind, model_type, tokenizer):
    model = small_model(model_type)
    anatomy = whole_sites(model, kind)
    recipe = resolve(small_recipe(sparsity=0.34, reference="self", num_samples=12), model, tokenizer)
    recipe = replace(recipe, sparsity=None)
    run = Run(recipe, Clock(CPU), Journal())
    windows = read_calibration(tokenizer, recipe, model)
    curves = visit_dense(anatomy, windows.tokens, run.phase("visit"))
    for found in curves:
        assert (
            found.loss.shape == (2,) and found.loss[0] > 0 and abs(float(found.loss[1])) < 1e-6 * float(found.loss[0])
        )
    whole = float(sum(site.parameters for site in anatomy.sites))
    one = max(site.parameters for site in anatomy.sites)
    removals = Removals(sparsity_costs(anatomy.sites, int(whole)), [Removal((kind,), float(one), whole)])
    widths = plan_widths(anatomy, curves, removals, recipe)
    cheapest = min(range(len(curves)), key=lambda i: float(curves[i].loss[0]))
    assert widths == [int(i != cheapest) for i in range(len(curves))]  # the one that costs the loss least
    stream = capture(anatomy, windows.tokens, run)
    pruned, _ = prune_blocks(anatomy, stream, widths, lambda i: curves[i].gradient, run)
    gone = pruned[anatomy.sites[cheapest].block]
    if kind == "block":
        assert isinstance(gone, NoBlock)
    elif kind == "attention":
        assert any(isinstance(module, NoHeads) for module in gone.modules())
    hidden, calls = capture_calls(model, anatomy.blocks, windows.tokens)
    for block, call in zip(pruned, calls, strict=True):
        hidden = run_block(block, hidden, call)
    torch.testing.assert_close(hidden, stream.hidden, rtol=1e-4, atol=1e-4)
