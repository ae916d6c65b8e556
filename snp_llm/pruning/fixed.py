"""Sites of a block that have been cut, while others come after: each puts out what was computed once. Cuts nothing."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snp_llm.linalg.units import unit_channels
from snp_llm.models.blocks import fixed_output, output_of
from snp_llm.models.calls import move, with_first_tensor
from snp_llm.models.projections import projection, weight_of
from snp_llm.models.site import Site
from snp_llm.pruning.result import SiteResult
from snp_llm.pruning.stream import Stream
from snp_llm.runtime.batches import in_batches
from snp_llm.runtime.storage import store


@dataclass
class FixedSite:
    """A site that has been cut, in a stage that others come after: what it puts out is computed once and kept.

    Attributes:
        module: whose output it is; nothing inside is run any more.
        form: what the module returns, with its hidden states left out.
        inputs: of the consumer before it was pruned, (windows, T, channels); None once outputs are known.
        outputs: of the pruned consumer, (windows, T, d).
        channels: of the inputs that were kept.
        out: the pruned consumer.
    """

    module: nn.Module
    form: Any
    inputs: Tensor | None
    outputs: Tensor
    channels: Tensor
    out: nn.Module

    def output(self, at: slice, device: torch.device) -> Tensor:
        """What the site puts out for the windows `at`."""
        if self.inputs is None:
            known: Tensor = move(self.outputs[at], device)
            return known
        output: Tensor = self.out(move(self.inputs[at], device)[..., self.channels])
        store(self.outputs, at, output)
        return output


def fix(block: nn.Module, result: SiteResult, form: Any, inputs: Tensor, stream: Stream) -> FixedSite:
    """What the later stages of a block need of a site that has just been cut."""
    site = result.site
    assert site.module is not None
    out = projection(block, site.consumers[0])
    channels = unit_channels(result.kept, site.unit_size).to(out.weight.device)
    return FixedSite(
        block.get_submodule(site.module), form, inputs, stream.room_for(len(weight_of(out))), channels, out
    )


def returned_form(block: nn.Module, site: Site, stream: Stream, fixed: Sequence[FixedSite]) -> Any:
    """What a site's module returns, a tensor or what else there is beside it, with its hidden states left out."""
    assert site.module is not None
    module = block.get_submodule(site.module)

    def returned(at: slice) -> Any:
        with fixing(fixed, at, next(block.parameters()).device):
            return output_of(module, block, stream.hidden[at], stream.call)

    _, found = next(in_batches(1, stream.batch, returned))
    return with_first_tensor(found, stream.hidden.new_empty(0))


@contextmanager
def fixing(fixed: Sequence[FixedSite], at: slice, device: torch.device) -> Iterator[list[Tensor]]:
    """Lets the sites that have been cut return what they do for the windows `at`; gives these outputs."""
    outputs: list[Tensor] = []
    with ExitStack() as stack:
        for site in fixed:  # each before the next: what it puts out may be what that computes from
            outputs.append(site.output(at, device))
            stack.enter_context(fixed_output(site.module, with_first_tensor(site.form, outputs[-1])))
        yield outputs
