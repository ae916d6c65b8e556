"""The only place that knows module names and config keys of a model family.

To add a family: one entry in `FAMILIES` and one line in the parametrised tests.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from snp_llm.errors import SnpError


@dataclass(frozen=True)
class Family:
    """Where a family keeps what is pruned. Paths of modules are relative to the block unless said otherwise.

    Attributes:
        name: as users know it.
        model_types: `config.model_type` of the models it covers.
        blocks: the list of decoder blocks, from the model.
        attention: the attention module.
        query, key, value, attention_out: its projections.
        head_count: attribute of the attention module that holds its number of heads.
        ffn_in: in-projections of the FFN, one or (gated) two.
        ffn_out: out-projection of the FFN.
        heads_key, ffn_key: config keys of the number of heads and of the FFN width.
        pruned_type: `model_type` of the self-contained model with a width per block.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    attention: str
    query: str
    key: str
    value: str
    attention_out: str
    head_count: str
    ffn_in: tuple[str, ...]
    ffn_out: str
    heads_key: str
    ffn_key: str
    pruned_type: str


FAMILIES = (
    Family(
        name="OPT",
        model_types=("opt", "snp_opt"),
        blocks="model.decoder.layers",
        attention="self_attn",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        attention_out="self_attn.out_proj",
        head_count="num_heads",
        ffn_in=("fc1",),
        ffn_out="fc2",
        heads_key="num_attention_heads",
        ffn_key="ffn_dim",
        pruned_type="snp_opt",
    ),
)


@dataclass(frozen=True)
class Site:
    """One out-projection whose inputs are pruned.

    Attributes:
        block: index of the decoder block.
        kind: "attention" or "ffn".
        in_projections: paths of the linears whose rows are the units' channels.
        out_projection: path of the linear whose columns are.
        units: how many there are now.
        unit_size: channels a unit has.
        cost: linear-weight parameters of one unit: its rows in every in-projection and its columns.
    """

    block: int
    kind: str
    in_projections: tuple[str, ...]
    out_projection: str
    units: int
    unit_size: int
    cost: int

    @property
    def name(self) -> str:
        return f"block {self.block} {self.out_projection}"


def find_family(config: PretrainedConfig) -> Family:
    """The family of a model, by its config's `model_type`, never by its name.

    Raises:
        SnpError: an encoder-only, encoder-decoder or otherwise unsupported architecture.
    """
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    supported = ", ".join(t for f in FAMILIES for t in f.model_types[:1])
    raise SnpError(f"model_type {config.model_type!r} is not supported; expected a decoder-only model: {supported}.")


def find_blocks(model: PreTrainedModel, family: Family) -> nn.ModuleList:
    """The decoder blocks, checked to have the family's layout.

    Raises:
        SnpError: a module that the family's entry names is missing.
    """
    try:
        blocks = model.get_submodule(family.blocks)
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            for path in (family.query, family.key, family.value, family.attention_out, *family.ffn_in, family.ffn_out):
                linear(block, path)
    except AttributeError as error:
        raise SnpError(f"{type(model).__name__} does not have the layout of {family.name}: {error}.") from error
    return blocks


def linear(block: nn.Module, path: str) -> nn.Linear:
    """A projection of a block.

    Raises:
        SnpError: something else is at that path.
    """
    module = block.get_submodule(path)
    if not isinstance(module, nn.Linear):
        raise SnpError(f"{path}: expected a plain linear layer, got {type(module).__name__}.")
    return module


def embedding_rows(model: PreTrainedModel) -> int:
    """Token ids that the model has an embedding for."""
    return int(next(model.get_input_embeddings().parameters()).shape[0])


def find_sites(blocks: nn.ModuleList, family: Family) -> list[Site]:
    """Attention and FFN site of every block, in the order in which they are pruned.

    Everything is read off the modules, so a model that was pruned before is an input like any other.
    """
    sites = []
    for index, block in enumerate(blocks):
        heads = int(getattr(block.get_submodule(family.attention), family.head_count))
        sites += [
            _site(block, index, "attention", (family.query, family.key, family.value), family.attention_out, heads),
            _site(block, index, "ffn", family.ffn_in, family.ffn_out, None),
        ]
    return sites


def _site(
    block: nn.Module, index: int, kind: str, in_projections: tuple[str, ...], out_projection: str, units: int | None
) -> Site:
    out = linear(block, out_projection)
    units = units or out.in_features
    size = out.in_features // units
    cost = size * (out.out_features + sum(linear(block, path).in_features for path in in_projections))
    return Site(index, kind, in_projections, out_projection, units, size, cost)
