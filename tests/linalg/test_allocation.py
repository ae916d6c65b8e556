import itertools
from dataclasses import replace

import pytest
import torch

from snp_llm.linalg.allocation import (
    SiteBudget,
    finest_step,
    linear_costs,
    loss,
    pooled_widths,
    total_cost,
    uniform,
    variance,
)
from snp_llm.runtime.errors import SnpError


def energy(*shares):
    curve = torch.tensor([0.0, *shares], dtype=torch.float64).cumsum(0)
    return curve / curve[-1]


def rise(*gains):
    """A loss curve from what each unit saves, the first unit first."""
    gains = torch.tensor([*gains, 0.0], dtype=torch.float64)
    return gains.flip(0).cumsum(0).flip(0)


def ffn(units=64, cost=10, multiple=8, minimum=8, energy=None, loss=None):
    loss = (1 - energy) if loss is None and energy is not None else loss
    return SiteBudget("ffn", units, linear_costs(units, cost), multiple, minimum, energy, loss)


def heads(units=8, cost=40, energy=None, loss=None):
    loss = (1 - energy) if loss is None and energy is not None else loss
    return SiteBudget("attention", units, linear_costs(units, cost), 1, 1, energy, loss)


def kept_fraction(sites, widths):
    return total_cost(sites, widths) / total_cost(sites)


@pytest.mark.parametrize("keep", [0.95, 0.7, 0.5, 0.3])
def test_uniform_gives_every_block_the_same_and_hits_the_total(keep):
    sites = [heads(cost=320), ffn(units=1024, cost=5)] * 3
    widths = uniform(sites, keep)
    assert widths[0] == widths[2] == widths[4] and widths[1] == widths[3] == widths[5]
    # Heads come in eighths of their third of the parameters; the FFN makes up for it to within its rounding.
    assert kept_fraction(sites, widths) == pytest.approx(keep, abs=0.5 * 8 * 5 / (8 * 320 + 1024 * 5))
    assert widths[1] % 8 == 0


def test_widths_round_to_the_multiple_or_stay_whole():
    assert uniform([ffn(units=100)], 0.999) == [100]
    assert uniform([ffn(units=100)], 0.5) == [48]


def test_uniform_refuses_to_empty_a_site():
    with pytest.raises(SnpError, match=r"leaves 0.4 of 8 units at every attention site; the minimum is 1"):
        uniform([heads()], 0.05)
    with pytest.raises(SnpError, match="minimum is 8"):
        uniform([ffn()], 0.05)


def test_variance_is_one_threshold_for_all_sites():
    generator = torch.Generator().manual_seed(0)

    def random_curve(n):
        return energy(*torch.rand(n, generator=generator, dtype=torch.float64).sort(descending=True).values)

    sites = [heads(energy=random_curve(8)), ffn(energy=random_curve(64)), ffn(energy=random_curve(64))]
    for keep in (0.9, 0.6, 0.4):
        widths = variance(sites, keep)
        # Some alpha explains all widths: each site's width reaches it and the next smaller permitted one does not.
        reached = [float(s.energy[w]) for s, w in zip(sites, widths, strict=True)]
        missed = [
            float(s.energy[max(x for x in s.widths() if x < w)]) if w > min(s.widths()) else 0.0
            for s, w in zip(sites, widths, strict=True)
        ]
        assert max(missed) <= min(r for r, s, w in zip(reached, sites, widths, strict=True) if w < s.units)
        assert kept_fraction(sites, widths) == pytest.approx(keep, abs=80 / 1600)


def test_variance_keeps_more_where_energy_is_spread():
    flat = energy(*[1.0] * 64)
    steep = energy(*[2.0**-i for i in range(64)])
    widths = variance([ffn(energy=flat), ffn(energy=steep)], 0.5)
    assert widths[0] > widths[1] >= 8


def test_variance_never_goes_below_the_minimum_and_says_what_is_possible():
    steep = energy(*[2.0**-i for i in range(64)])
    sites = [ffn(energy=steep), ffn(energy=steep)]
    assert variance(sites, 0.13) == [8, 8]
    with pytest.raises(SnpError, match="less than the 160 of every site at its minimum.*below 0.875"):
        variance(sites, 0.02)


def test_variance_needs_curves():
    with pytest.raises(SnpError, match="energy or loss curves"):
        variance([ffn()], 0.5)


@pytest.mark.parametrize("rule", [uniform, variance, loss])
def test_keeping_everything_keeps_everything(rule):
    sites = [heads(energy=energy(*[1.0] * 8)), ffn(units=60, energy=energy(*[1.0] * 60))]
    assert rule(sites, 1.0) == [8, 60]


@pytest.mark.parametrize("rule", [uniform, variance, loss])
def test_pooled_sites_of_a_kind_get_one_width_and_hit_the_total(rule):
    generator = torch.Generator().manual_seed(0)
    curves = [energy(*torch.rand(64, generator=generator).tolist()) for _ in range(3)]
    heads_curve = energy(*torch.rand(8, generator=generator).tolist())
    sites = [site for curve in curves for site in (heads(energy=heads_curve), ffn(energy=curve))]
    widths = pooled_widths(rule, sites, 0.7)
    assert len(set(widths[::2])) == len(set(widths[1::2])) == 1
    assert kept_fraction(sites, widths) == pytest.approx(0.7, abs=0.5 * 8 * 10 / (64 * 10 + 8 * 40))


def test_pooled_variance_reads_the_mean_curve():
    """One block needs its heads and one does not; together they lie between."""
    spread, peaked = energy(*[1] * 8), energy(1, *[0] * 7)
    flat = energy(*[1] * 64)
    pooled = pooled_widths(
        variance, [heads(energy=spread), ffn(energy=flat), heads(energy=peaked), ffn(energy=flat)], 0.5
    )
    alone = pooled_widths(variance, [heads(energy=peaked), ffn(energy=flat)], 0.5)
    assert alone[0] <= pooled[0] == pooled[2]


def test_pools_of_unequal_sites_keep_no_more_than_the_smallest_has():
    sites = [ffn(units=64, energy=energy(*[1] * 64)), ffn(units=32, energy=energy(*[1] * 32))]
    for rule in (uniform, variance, loss):
        assert pooled_widths(rule, sites, 1.0) == [32, 32]
        assert pooled_widths(rule, sites, 0.5) == [24, 24]


def test_only_permitted_widths_are_given():
    sites = [replace(heads(energy=energy(*[1] * 8)), permitted=(2, 6), minimum=2), ffn(energy=energy(*[1] * 64))]
    assert sites[0].widths() == [2, 6, 8]
    for rule in (uniform, variance, loss):
        assert rule(sites, 0.6)[0] in (2, 6, 8)


def random_sites(seed):
    """Sites of a few widths each, so that all choices can be tried."""
    generator = torch.Generator().manual_seed(seed)

    def gains(n):
        return rise(*torch.rand(n, generator=generator, dtype=torch.float64).sort(descending=True).values)

    return [heads(4, cost=30, loss=gains(4)), ffn(32, cost=5, loss=gains(32)), ffn(24, cost=7, loss=gains(24))]


@pytest.mark.parametrize("seed", range(8))
def test_loss_is_within_one_step_of_the_best_of_all_choices(seed):
    """Brute force. Between two of the hull's budgets nothing better than the next larger budget's best is possible."""
    sites = random_sites(seed)
    choices = [*itertools.product(*(s.widths() for s in sites))]

    def predicted(widths):
        return sum(float(s.loss[w]) for s, w in zip(sites, widths, strict=True))

    for keep in (0.8, 0.6, 0.45):
        widths, budget = loss(sites, keep), keep * total_cost(sites) + finest_step(sites) / 2
        assert total_cost(sites, widths) <= budget
        cheaper = min(predicted(c) for c in choices if total_cost(sites, c) <= budget)
        step = max(s.cost(s.multiple) for s in sites)
        smaller = min(predicted(c) for c in choices if total_cost(sites, c) <= budget - step)
        assert cheaper <= predicted(widths) <= smaller


def test_loss_is_exactly_the_best_where_curves_are_convex_and_steps_equal():
    generator = torch.Generator().manual_seed(0)
    curves = [rise(*torch.rand(6, generator=generator).double().sort(descending=True).values) for _ in range(3)]
    sites = [SiteBudget("ffn", 6, linear_costs(6, 2), 1, 1, None, curve) for curve in curves]
    for budget in range(6, 36, 2):
        found = loss(sites, budget / 36)
        best = min(
            (c for c in itertools.product(range(1, 7), repeat=3) if 2 * sum(c) <= budget),
            key=lambda c: sum(float(curve[w]) for curve, w in zip(curves, c, strict=True)),
        )
        assert found == [*best]


def test_loss_goes_by_what_a_unit_saves_for_its_cost():
    gains = [1.0] * 8
    dear = SiteBudget("attention", 8, linear_costs(8, 10), 1, 1, None, rise(*gains))
    cheap = replace(dear, costs=linear_costs(8, 1))
    assert loss([dear, cheap], 0.5) == [3, 8]


def test_loss_steps_over_widths_that_are_not_on_the_hull():
    """The second unit saves nothing without the third: the site keeps one or three, never two, while budget allows."""
    lump = SiteBudget("attention", 4, linear_costs(4, 1), 1, 1, None, rise(5.0, 0.0, 4.0, 0.1))
    other = SiteBudget("attention", 4, linear_costs(4, 1), 1, 1, None, rise(5.0, 1.0, 1.0, 1.0))
    assert loss([lump, other], 4 / 8) == [3, 1]
    assert loss([lump, other], 5 / 8) == [3, 2]


def test_costs_need_not_be_linear():
    """A step table, as latency has: only the widths before a step are worth their cost."""
    stairs = torch.tensor([0, 1, 1, 1, 1, 2, 2, 2, 2], dtype=torch.float64)
    sites = [SiteBudget("ffn", 8, stairs, 1, 1, energy(*[1] * 8), rise(*[1.0] * 8)) for _ in range(2)]
    assert sorted(loss(sites, 0.75)) == [4, 8]
    assert loss(sites, 0.5) == [4, 4]
    assert total_cost(sites, uniform(sites, 0.75)) <= 4
