"""What of a model's blocks no site is in, and therefore stays as it is, in words. Cuts nothing."""

from collections import Counter

from torch import nn

from snp_llm.models.anatomy import Anatomy
from snp_llm.models.experts import of_experts
from snp_llm.models.projections import Projection, bias_of, weight_of


def what_stays(anatomy: Anatomy) -> list[str]:
    """A line about mixers (state spaces, convolutions, linear attention, attention that is not known), and one about
    experts that only some tokens come by, where there are any."""
    blocks, lines = anatomy.blocks, []
    found: Counter[tuple[str, str]] = Counter()
    for index in range(len(blocks)):
        found.update((name, type(module).__name__) for name, module in mixers(anatomy, index))
    if found:
        named = (f"{name} ({kind}) in {n} of {len(blocks)} blocks" for (name, kind), n in found.items())
        lines.append(f"neither an attention nor an FFN that is known, stays as it is: {', '.join(named)}")
    cut = any(site.mixture is not None for site in anatomy.sites)
    if (experts := expert_parameters(blocks)) and not cut:
        share = experts / sum(parameter.numel() for parameter in anatomy.model.parameters())
        lines.append(
            f"experts stay as they are, {100 * share:.1f} % of all parameters; sparsity is a share of the other linear "
            "weights of the blocks"
        )
    return lines


def expert_parameters(blocks: nn.ModuleList) -> int:
    """Parameters of experts that only some tokens come by."""
    return sum(parameter.numel() for name, parameter in blocks.named_parameters() if of_experts(name))


def has_more(anatomy: Anatomy, index: int) -> bool:
    """Whether a block adds more to the stream than its sites put out: what a mixer does, or experts."""
    block = anatomy.blocks[index]
    gone = [m for m in block.modules() if isinstance(m, Projection) and not weight_of(m).numel()]
    if any((bias := bias_of(m)) is not None and bias.numel() for m in gone):  # of an attention or an FFN: it is left
        return True
    return bool(mixers(anatomy, index)) or any(of_experts(name) for name, _ in block.named_parameters())


def mixers(anatomy: Anatomy, index: int) -> list[tuple[str, nn.Module]]:
    """The modules right below a block that project or convolve, and hold no site and no experts.

    An attention or FFN that has gone is none: there is nothing left that projects.
    """
    here = anatomy.sites_of(index)
    cut = {path for site in here for path in (*site.consumers, *(producer.path for producer in site.producers))}
    shared = {site.shared for site in anatomy.sites if site.shared is not None}
    cut |= {producer.path for one in shared for block, producer in one.producers if block == index}
    return [
        (name, child)
        for name, child in anatomy.blocks[index].named_children()
        if not any(path == name or path.startswith(f"{name}.") for path in cut)
        and any(isinstance(m, Projection | nn.Conv1d) and m.weight.numel() for m in child.modules())
        and not any(of_experts(f"{name}.{path}") for path, _ in child.named_modules())
    ]
