"""ShortGPT: the blocks that turn the stream least go.

X. Men, M. Xu, Q. Zhang, B. Wang, H. Lin, Y. Lu, X. Han, W. Chen, "ShortGPT: Layers in Large Language Models are More
Redundant Than You Expect", arXiv 2403.03853. Whole blocks go, so that few sparsities can be met.
"""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from snp_llm.models.surgery import NoBlock

from .common import Method, Prune, Pruned, model_sites
from .widths import block_influence


def prepare(dense: PreTrainedModel, tokens: Tensor, _seed: int) -> Prune:
    count = len(model_sites(dense)[1])
    order = torch.argsort(block_influence(dense, tokens), stable=True)

    def prune(sparsity: float) -> Pruned:
        gone = order[: round(sparsity * count)].tolist()
        model = copy.deepcopy(dense)
        blocks = model_sites(model)[1]
        for index in gone:
            blocks[index] = NoBlock()
        return Pruned(model, len(gone) / count)  # blocks are alike

    return prune


METHODS = (Method("shortgpt", "ShortGPT", "Men et al., arXiv 2403.03853", prepare),)
