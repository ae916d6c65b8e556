"""The shapes that a run's memory and work follow from."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from snp_llm.linalg.allocation import NEEDS_CURVES
from snp_llm.models.anatomy import embedding_rows, find_blocks, find_sites
from snp_llm.models.families.decoders import find_family
from snp_llm.models.site import Site
from snp_llm.models.size import ModelSize, model_size
from snp_llm.pruning.sensitivity import gradient_windows
from snp_llm.pruning.statistics import enough_windows
from snp_llm.recipe.recipe import Recipe
from snp_llm.runtime.device import device_name

SHARE_OF_GRAM = 9 / 16  # of the products of a Gram matrix, those that are computed


@dataclass(frozen=True)
class Shapes:
    """Everything that the sums need.

    Attributes:
        size: of the dense model.
        sites: of one block each: the widest attention and the widest FFN.
        all_sites: of all blocks.
        blocks: how many.
        block_bytes: of the largest block.
        rest_bytes: of embeddings, norms and head.
        hidden: d.
        vocabulary: rows of the head.
        query_heads: of the widest attention.
        kv_channels: of keys in the widest attention.
        item: bytes of a weight.
        dtype: of the weights.
        eager: whether attention scores are materialised.
        device: kind.
        windows, seq_len, batch: of calibration.
        reference_windows: those with a reference, of the first ones; 0 without a reference.
        curve_windows, gradient_windows: of the visit, 0 where it reads no such thing.
    """

    size: ModelSize
    sites: tuple[Site, Site]
    all_sites: Sequence[Site]
    blocks: int
    block_bytes: int
    rest_bytes: int
    hidden: int
    vocabulary: int
    query_heads: int
    kv_channels: int
    item: int
    dtype: torch.dtype
    eager: bool
    device: str
    windows: int
    seq_len: int
    batch: int
    reference_windows: int
    curve_windows: int
    gradient_windows: int

    @property
    def widths(self) -> tuple[int, int]:
        """Channels of the out-projections' inputs."""
        return self.sites[0].channels, self.sites[1].channels

    @property
    def ungated(self) -> bool:
        """Whether the FFN has a single in-projection, of the width of its out-projection."""
        return self.sites[1].parameters == 2 * self.hidden * self.widths[1]


def read_shapes(model: PreTrainedModel, recipe: Recipe) -> Shapes:
    assert recipe.seq_len is not None
    family = find_family(model.config)
    blocks = find_blocks(model)
    sites = find_sites(blocks, family, recipe.head_unit)
    attention = max(sites[::2], key=lambda s: s.parameters)
    ffn = max(sites[1::2], key=lambda s: s.parameters)
    heads = attention.heads
    assert heads is not None
    size = model_size(model, recipe.seq_len)
    enough = enough_windows(max(s.channels for s in sites), recipe.seq_len)
    hidden = int(model.config.hidden_size)
    curves = enough if recipe.allocation in NEEDS_CURVES else 0
    referred = enough if recipe.reference != "self" else 0
    gradients = gradient_windows(hidden, recipe.seq_len) if recipe.needs_gradients else 0
    each = [_bytes(block) for block in blocks]
    return Shapes(
        size=size,
        sites=(attention, ffn),
        all_sites=sites,
        blocks=len(blocks),
        block_bytes=max(each),
        rest_bytes=size.bytes - sum(each),
        hidden=hidden,
        vocabulary=embedding_rows(model),
        query_heads=heads.query,
        kv_channels=heads.key_value * heads.size,
        item=model.dtype.itemsize,
        dtype=model.dtype,
        eager=model.config._attn_implementation == "eager",
        device=device_name(recipe.device),
        windows=recipe.num_samples,
        seq_len=recipe.seq_len,
        batch=min(recipe.batch_size, recipe.num_samples),
        reference_windows=min(referred, recipe.num_samples),
        curve_windows=min(curves, recipe.num_samples),
        gradient_windows=min(gradients, recipe.num_samples),
    )


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
