"""How many inputs there are in all; that each is tried is counted where that is done."""

import pytest

from tests.adversarial import (
    test_configs,
    test_paths,
    test_recipes,
    test_reports,
    test_texts,
    test_tokenizers,
    test_weights,
)

pytestmark = pytest.mark.exhaustive
KINDS = (test_configs, test_weights, test_tokenizers, test_texts, test_recipes, test_reports, test_paths)


def test_a_thousand_inputs():
    assert sum(kind.COUNT for kind in KINDS) >= 1000
