from collections import Counter
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

from snp_llm import Recipe, SnpError
from snp_llm.linalg.allocation import ALLOCATIONS
from snp_llm.linalg.ordering import ORDERINGS
from snp_llm.recipe.groups import GROUPS


def test_choices_are_what_the_algebra_offers():
    hints = get_type_hints(Recipe)
    assert set(get_args(hints["ordering"])) == set(ORDERINGS)
    assert set(get_args(hints["allocation"])) == set(ALLOCATIONS)


def test_every_setting_is_in_one_group():
    assert Counter(name for names in GROUPS.values() for name in names) == Counter(f.name for f in fields(Recipe))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sparsity": 1.0}, "--sparsity: expected a number from 0 to below 1, got 1"),
        ({"sparsity": -0.1}, "--sparsity"),
        ({"sparsity": float("nan")}, "--sparsity"),
        ({"ffn_sparsity": 1.5}, "--ffn-sparsity: .* got 1.5"),
        ({"head_sparsity": -1}, "--head-sparsity"),
        ({"dampening": -0.1}, "--dampening: expected a number from 0 to 1,000,000, got -0.1"),
        ({"dampening": float("nan")}, "--dampening"),
        ({"num_samples": 0}, "--num-samples: expected an integer from 1 to 2,147,483,647, got 0"),
        ({"seq_len": 1}, "--seq-len"),
        ({"batch_size": -3}, "--batch-size"),
        ({"round_to": 0}, "--round-to"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(SnpError, match=message):
        Recipe(model="m", **values)


def test_output_is_named_after_the_model():
    assert Recipe(model="facebook/opt-1.3b").output_folder == "opt-1.3b-snp-30"
    assert Recipe(model="./models/mine/", sparsity=0.125).output_folder == "mine-snp-12.5"
    assert Recipe(model="m", output="there").output_folder == "there"


def test_budgets():
    assert Recipe(model="m").sparsities == [(("attention", "ffn", "experts"), 0.3)]
    assert Recipe(model="m", ffn_sparsity=0.5).sparsities == [(("attention",), 0.3), (("ffn", "experts"), 0.5)]
