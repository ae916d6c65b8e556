"""What a model takes up: parameters, bytes, FLOPs a token. Runs nothing."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from snp_llm.models.anatomy import find_blocks, find_sites
from snp_llm.models.families.decoders import find_family
from snp_llm.models.projections import Projection


@dataclass(frozen=True)
class ModelSize:
    """What a model takes up.

    Attributes:
        parameters: all, tied ones once.
        block_linear: weights of the decoder blocks' linears, which is what sparsity is a fraction of.
        bytes: of all parameters in their dtypes, tied ones once: the safetensors files less their headers.
        flops: a token at prefill: two for every weight of a linear, LM head included, and four for every attention
            channel and position attended to, of which a causal window of T tokens has (T + 1) / 2 on average.
    """

    parameters: int
    block_linear: int
    bytes: int
    flops: float


def model_size(model: PreTrainedModel, seq_len: int) -> ModelSize:
    """Sizes of a model of a supported family; works on the meta device too."""
    family = find_family(model.config)
    blocks = find_blocks(model)
    unique = {id(p): p for p in model.parameters()}.values()
    linear = sum(linear_weights(block) for block in blocks)
    attended = sum(s.channels for s in find_sites(blocks, family) if s.heads is not None)
    return ModelSize(
        parameters=sum(p.numel() for p in unique),
        block_linear=linear,
        bytes=sum(p.numel() * p.element_size() for p in unique),
        flops=2.0 * linear_weights(model) + 4.0 * attended * (seq_len + 1) / 2,
    )


def linear_weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, Projection))
