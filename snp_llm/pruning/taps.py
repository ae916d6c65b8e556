"""What arrives at sites and what gradients come back to them, while a block runs. Knows no sums."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from snp_llm.models.blocks import input_gradient, inputs_of, run_block, watch_inputs
from snp_llm.models.calls import BlockCall
from snp_llm.models.experts import Arrived, experts_module, put_out, watch_arrivals
from snp_llm.models.projections import Projection, inputs_as_rows, outputs_as_rows, projection
from snp_llm.models.site import Site, consumers_of


def inputs_at(block: nn.Module, sites: Sequence[Site], hidden: Tensor, call: BlockCall) -> list[Tensor | None]:
    """What the consumers of a stage's sites get, (windows, T, channels) each; nothing is computed after the last.

    Args:
        block: that they are in.
        sites: of one stage.
        hidden: its input, (windows, T, d).
        call: its other arguments.

    Returns:
        One tensor a site, (tokens, channels) of a routed one, or None where no token came by. Of a whole block: what
        it adds to its input.
    """
    if not all(site.consumers for site in sites):
        return [_added(run_block(block, hidden, call), hidden)]
    readers = [projection(block, site.consumers[0]) for site in sites]
    inputs = inputs_of(readers, block, hidden, call)
    read = zip(sites, readers, inputs, strict=True)
    return [x if x is None else site_rows(site, reader, x) for site, reader, x in read]


def site_rows(site: Site, reader: Projection, inputs: Tensor) -> Tensor:
    """What the matrix of a site is multiplied with: inputs, patches of them or, where they are mixed, channels.

    Args:
        site: that the inputs arrive at.
        reader: its consumer.
        inputs: that it gets, (..., in), or (images, channels, height, width).
    """
    if site.taps:
        return inputs.reshape(len(inputs), site.units, -1).mT
    return inputs_as_rows(reader, inputs)


class Taps:
    """What the consumers of sites got in the last run of their block to its end."""

    def __init__(self, block: nn.Module, sites: Sequence[Site]) -> None:
        self.sites = [site for site in sites if site.mixture is None]
        self.readers = [projection(block, site.consumers[0]) if site.consumers else None for site in self.sites]
        self.arrived: dict[Site, Arrived] = {}
        self.seen: dict[nn.Module, Tensor] = {}

    def read(self, hidden: Tensor, output: Tensor) -> list[Tensor | None]:
        """As `inputs_at` has it, of the run that made `output` from `hidden`; it is then forgotten."""
        seen, self.seen = self.seen, {}
        found: list[Tensor | None] = []
        for site, reader in zip(self.sites, self.readers, strict=True):
            inputs = _added(output, hidden) if reader is None else seen.get(reader)
            found.append(inputs if reader is None or inputs is None else site_rows(site, reader, inputs))
        return found


@contextmanager
def tapped(block: nn.Module, sites: Sequence[Site]) -> Iterator[Taps]:
    """Lets taps see what arrives at sites, as long as the context lasts."""
    taps = Taps(block, sites)

    def keep(reader: nn.Module, values: Tensor) -> None:
        taps.seen[reader] = values.detach()

    with ExitStack() as stack:
        for site in sites:
            if site.mixture is not None:
                stack.enter_context(watch_arrivals(block, site.mixture, partial(taps.arrived.__setitem__, site)))
        stack.enter_context(watch_inputs({r: partial(keep, r) for r in taps.readers if r is not None}))
        yield taps


def gradients_at(
    block: nn.Module, sites: Sequence[Site], hidden: Tensor, call: BlockCall, gradient: Tensor
) -> tuple[Tensor, list[Tensor | None]]:
    """The gradient at a block's input, and those at the outputs of its sites' consumers, one beside the other.

    Args:
        block: that they are in.
        sites: of it.
        hidden: its input, (windows, T, d).
        call: its other arguments.
        gradient: at its output, (windows, T, d), where the block is.

    Returns:
        (windows, T, d), and for each site (..., d_out), or None where no token came by.
    """
    seen: dict[nn.Module, Tensor] = {}

    def keep(consumer: nn.Module, values: Tensor) -> None:
        seen[consumer] = values.detach()

    consumers = [_putting_out(block, site) for site in sites]
    watchers: dict[nn.Module, Callable[[Tensor], None]] = {
        consumer: partial(keep, consumer) for some in consumers for consumer in some
    }
    entering = input_gradient(block, hidden, call, gradient, watchers)

    def at(site: Site, some: Sequence[nn.Module]) -> Tensor | None:
        if not some:
            return gradient
        if site.mixture is not None:
            return put_out(site.mixture, seen[some[0]]) if some[0] in seen else None
        parts = [outputs_as_rows(consumer, seen[consumer]) for consumer in some if consumer in seen]  # type: ignore[arg-type]
        return None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    return entering, [at(site, some) for site, some in zip(sites, consumers, strict=True)]


def _putting_out(block: nn.Module, site: Site) -> Sequence[nn.Module]:
    """The modules whose outputs are those of a site: its consumers, or what adds up experts."""
    return consumers_of(block, site) if site.mixture is None else [experts_module(block, site.mixture)]


def _added(output: Tensor, hidden: Tensor) -> Tensor:
    return output - hidden.to(output.device)
