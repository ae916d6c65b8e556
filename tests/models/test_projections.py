"""Every kind of layer as a matrix, against the layer itself."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from snp_llm.models.projections import inputs_as_rows, outputs_as_rows, weight_of, with_rows, with_weight

LAYERS = {
    "linear": (nn.Linear(6, 5), (3, 7, 6)),
    "without bias": (nn.Linear(6, 5, bias=False), (3, 7, 6)),
    "conv1d": (Conv1D(5, 6), (3, 7, 6)),
    "convolution": (nn.Conv2d(6, 5, 3, padding=1), (3, 6, 8, 7)),
    "strides": (nn.Conv2d(6, 5, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), (3, 6, 9, 8)),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    module, shape = LAYERS[request.param]
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.double(), torch.randn(shape, dtype=torch.float64)


@torch.no_grad()
def test_a_layer_is_its_matrix(layer):
    module, x = layer
    rows = inputs_as_rows(module, x)
    expected = rows @ weight_of(module).T + (0 if module.bias is None else module.bias)
    torch.testing.assert_close(outputs_as_rows(module, module(x)), expected)


@torch.no_grad()
def test_of_rows_and_columns_a_part_is_left(layer):
    module, x = layer
    rows, inputs = torch.tensor([4, 0]), torch.tensor([1, 5])
    part = outputs_as_rows(module, module(x))[..., rows]
    torch.testing.assert_close(outputs_as_rows(fewer := with_rows(module, rows), fewer(x)), part)
    size = weight_of(module).shape[1] // 6
    columns = torch.cat([torch.arange(i * size, (i + 1) * size) for i in inputs])
    narrow = with_weight(module, weight_of(module)[:, columns], module.bias)
    axis = 1 if isinstance(module, nn.Conv2d) else 2
    zeroed = torch.zeros_like(x).index_copy(axis, inputs, x.index_select(axis, inputs))
    torch.testing.assert_close(narrow(x.index_select(axis, inputs)), module(zeroed))


NORMS = [
    (nn.BatchNorm2d(5), (3, 5, 4, 4)),
    (nn.BatchNorm1d(5), (3, 5)),
    (nn.BatchNorm2d(5, affine=False), (2, 5, 3, 3)),
]


@torch.no_grad()
@pytest.mark.parametrize(("norm", "shape"), NORMS)
def test_a_norm_goes_along(norm, shape):
    for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2)
    norm.eval()
    x, rows = torch.randn(shape), torch.tensor([3, 1])
    fewer = with_rows(norm, rows)
    torch.testing.assert_close(fewer(x[:, rows]), norm(x)[:, rows])
    assert fewer.num_features == 2 and norm.num_features == 5  # the old one is left as it was
