import torch

from snp_llm.linalg.units import deal_from_groups


def test_every_round_takes_the_best_unit_left_in_each_group():
    order = torch.tensor([5, 4, 0, 3, 1, 2])  # groups: 0 1 2, 3 4 5
    assert deal_from_groups(order, 2).tolist() == [0, 5, 1, 4, 2, 3]


def test_dealing_from_one_group_is_the_order_itself():
    order = torch.randperm(7)
    assert torch.equal(deal_from_groups(order, 1), order)


def test_every_multiple_of_the_groups_is_even():
    order = deal_from_groups(torch.randperm(12), 3)
    for width in (3, 6, 9, 12):
        assert torch.bincount(order[:width] // 4, minlength=3).tolist() == [width // 3] * 3
