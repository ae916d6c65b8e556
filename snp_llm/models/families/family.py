"""What modules cannot say of a type of model: its config's keys, and what loads a config with other widths."""

from dataclasses import dataclass
from typing import Literal

# What differs in the blocks of a type: nothing; some have other mixers than attention; heads share a latent vector;
# some have experts.
Kind = Literal["dense", "hybrid", "MLA", "mixture", "wrapper"]
EVERYWHERE = ("transformers", "vLLM", "llama.cpp")
VLLM = ("transformers", "vLLM")
HERE = ("transformers",)
READ = ""  # a config key that the table does not name


@dataclass(frozen=True)
class Family:
    """A type of model: what neither its modules nor the names of its config's keys say.

    Attributes:
        name: as users know it.
        model_type: `config.model_type`.
        heads_key, kv_heads_key, ffn_key: config keys of head counts and FFN width, read off the config where the table
            says nothing; no `kv_heads_key` without groups, no `ffn_key` where the width follows from something else.
        head_dim_key: config key that keeps the head dimension when heads go; None where the config cannot say it.
        heads_stay: why heads cannot go; empty where they can.
        divides_hidden: whether its config refuses head counts that do not divide the hidden size.
        kind: what its blocks may have beside attention and FFN, or instead; "wrapper": a text model with towers.
        stays: what is left as it is beside embeddings, norms and head, in words. Unless that is nothing and the type is
            dense, keys are read off every model, and cuts are tried.
        uniform: what a plain config can hold other widths of, where that is tried.
        needs_bos: whether its models are lost in a window of text that does not start with BOS.
        substitute: model_type of a plain config that computes the same but takes more head counts.
        engines: what loads the plain config with another FFN width.
        head_engines: what loads it with fewer heads as well.
        checked: whether it has an entry in the table of families, and all tests are run on it.
    """

    name: str
    model_type: str
    heads_key: str = READ
    kv_heads_key: str | None = READ
    ffn_key: str | None = READ
    head_dim_key: str | None = "head_dim"
    heads_stay: str = ""
    divides_hidden: bool = False
    kind: Kind = "dense"
    stays: str = ""
    uniform: tuple[str, ...] = ("heads", "FFN")
    needs_bos: bool = False
    substitute: str | None = None
    engines: tuple[str, ...] = HERE
    head_engines: tuple[str, ...] = HERE
    checked: bool = True

    @property
    def alike(self) -> bool:
        """Whether what the table says of config keys holds for all blocks of its models; else every model is tried."""
        return self.checked and self.kind == "dense" and not self.stays


PRUNED = "snp_"  # what the type of a model with widths of its own begins with
