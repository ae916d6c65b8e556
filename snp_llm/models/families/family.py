"""What a family of models is: where it keeps what is pruned. Knows no model."""

from dataclasses import dataclass
from typing import Literal

EVERYWHERE = ("transformers", "vLLM", "llama.cpp")


@dataclass(frozen=True)
class Family:
    """Where a family keeps what is pruned; what is not said here is as in Llama.

    Attributes:
        name: as users know it.
        model_type: `config.model_type`.
        blocks: path of the list of decoder blocks, from the model. All other paths start at a block.
        attention: the attention module.
        qkv: its in-projections, as many as `qkv_layout` says.
        qkv_layout: "separate" query, key and value projections; "fused" into one, [q; k; v]; "interleaved" in one, q, k
            and v of the first head, then of the second.
        attention_out: its out-projection.
        head_dim: attribute of the attention module that holds the channels of one head.
        joint_norms: norms over all heads at once. Where a block has them its heads stay, since removing one changes
            what the others are divided by.
        ffn_in: in-projections of the FFN: one, (gated) two, or two fused as [gate; up].
        ffn_out: out-projection of the FFN.
        heads_key, kv_heads_key, ffn_key: config keys of head counts and FFN width; no `kv_heads_key` without groups.
        head_dim_key: config key that keeps the head dimension when heads go; None where the config cannot say it.
        divides_hidden: whether its config refuses head counts that do not divide the hidden size.
        needs_bos: whether its models are lost in a window of text that does not start with BOS.
        substitute: model_type of a plain config that computes the same but takes more head counts.
        engines: what loads the plain config with another FFN width.
        head_engines: what loads it with fewer heads as well.
    """

    name: str
    model_type: str
    blocks: str = "model.layers"
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qkv_layout: Literal["separate", "fused", "interleaved"] = "separate"
    attention_out: str = "self_attn.o_proj"
    head_dim: str = "head_dim"
    joint_norms: tuple[str, ...] = ()
    ffn_in: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    ffn_out: str = "mlp.down_proj"
    heads_key: str = "num_attention_heads"
    kv_heads_key: str | None = "num_key_value_heads"
    ffn_key: str = "intermediate_size"
    head_dim_key: str | None = "head_dim"
    divides_hidden: bool = False
    needs_bos: bool = False
    substitute: str | None = None
    engines: tuple[str, ...] = EVERYWHERE
    head_engines: tuple[str, ...] = EVERYWHERE

    @property
    def pruned_type(self) -> str:
        """`model_type` of the model with widths of its own in every block."""
        return f"snp_{self.model_type}"
