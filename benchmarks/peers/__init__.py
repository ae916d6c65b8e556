"""Published one-shot structured pruning methods, written from their papers, to measure this package against.

One file a method. A method is a function `(dense model, calibration tokens, sparsity, seed) -> pruned model`; `prepare`
gives the same in two steps, so that several sparsities share what they have in common.
"""

from . import (
    flap,
    grasprune,
    llm_pruner,
    magnitude,
    modegpt,
    osscar,
    random_units,
    rcpu,
    shortgpt,
    slicegpt,
    two_stage,
    wanda,
)
from .common import Method
from .snp import make_methods

PEERS: dict[str, Method] = {
    method.name: method
    for module in (
        random_units,
        magnitude,
        llm_pruner,
        wanda,
        flap,
        rcpu,
        shortgpt,
        two_stage,
        grasprune,
        osscar,
        modegpt,
        slicegpt,
    )
    for method in module.METHODS
}
NAMES = (*PEERS, "snp")

__all__ = ["NAMES", "PEERS", "Method", "make_methods"]
