"""A cut in each kind of block before the work: whether the units that stay compute what they did. Keeps nothing."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from snp_llm.linalg.units import deal_from_groups, unit_channels
from snp_llm.models.anatomy import Anatomy, find_blocks
from snp_llm.models.blocks import arrived_at, capture_calls, run_block, watch_outputs
from snp_llm.models.calls import BlockCall, without_cache
from snp_llm.models.experts import experts_module, put_together
from snp_llm.models.layouts import assemble
from snp_llm.models.logits import logits_block_by_block
from snp_llm.models.offload import copy_unhooked, on_device, same_tensors
from snp_llm.models.site import Site, block_dtype, consumers_of, site_bias, site_weight
from snp_llm.models.surgery import NoBlock, prune_site
from snp_llm.pruning.taps import inputs_at
from snp_llm.runtime.errors import SnpError, reason

log = logging.getLogger(__name__)

TOKENS = 64  # that are tried

# In names of what two blocks may differ in: their number, and widths, which their weights' shapes prove.
MAY_DIFFER = ("idx", "index", "layer_id", "intermediate", "head", "groups", "ffn", "inner", "features", "nx", "nf")

# Largest difference of what arrives at a consumer, relative to the largest value. Fewer rows may take another kernel.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@torch.no_grad()
def try_cuts(anatomy: Anatomy, tokens: Tensor, kinds: Sequence[str]) -> None:
    """Cuts the first unit of every kind of site off a copy, in every kind of block, and compares what others give.

    That shows whether rows were told apart rightly: a layout that only looks like one that is known gives something
    else, or does not run.

    Args:
        anatomy: of the dense model; left as it was.
        tokens: a text, (windows, T), int64.
        kinds: of site that may be cut.

    Raises:
        SnpError: the units of a site are not what they were taken for; blocks cannot be run one at a time.
    """
    if not kinds:
        return
    model, blocks, seen = anatomy.model, anatomy.blocks, set[str]()
    _try_blocks(model, tokens[:1, :TOKENS])
    hidden, calls = capture_calls(model, blocks, tokens[:1, :TOKENS])
    for index, block in enumerate(blocks):
        here = [site for site in anatomy.sites_of(index) if site.prunable and site.kind in kinds]
        sites = [site for site in here if site.units > site.step]
        shape = repr([(site.path, site.units, site.heads, site.producers) for site in sites])
        if not sites or shape in seen:
            continue
        seen.add(shape)
        with on_device(block, torch.device("cpu")):
            for site in sites:
                tried = _try if site.mixture is None else _try_experts
                difference = tried(block, site, hidden.cpu(), calls[index])
                if not difference <= TOLERANCE[model.dtype]:
                    raise SnpError(
                        f"{site.name}: with the first of its {site.units} {site.unit} taken away, the others give "
                        f"something else (by {difference:.1e} of the largest value); expected the same. What looks "
                        f"like a layout that is known is another one: {anatomy.family.model_type} is not supported."
                    )
    if anatomy.family.checked:
        return
    log.warning(
        "model_type %s has no entry in the table of families: sites (%s) were told by the names and shapes of their "
        "projections, and a cut of each was tried",
        anatomy.family.model_type,
        " and ".join(kinds),
    )


@torch.no_grad()
def try_dropped(anatomy: Anatomy, tokens: Tensor) -> Anatomy:
    """The anatomy in which attentions and FFNs may go as a whole where their block computes without them what it does
    if they add nothing: not all blocks take what stands in their place.

    Args:
        anatomy: of the dense model; left as it was.
        tokens: a text, (windows, T), int64.
    """
    model, blocks = anatomy.model, anatomy.blocks
    stay: dict[str, str] = {}  # by what blocks have to be alike in
    hidden, calls = capture_calls(model, blocks, tokens[:1, :TOKENS])
    for index, block in enumerate(blocks):
        for site in anatomy.sites_of(index):
            if not site.droppable or site.whole_block or (like := _likeness(site)) in stay:
                continue
            with on_device(block, torch.device("cpu")):
                stay[like] = _kept_since(block, site, hidden.cpu(), calls[index])
            if stay[like]:
                log.warning("%s: %s, and is not dropped as a whole", site.name, stay[like])
    sites = [replace(s, droppable=s.droppable and not stay.get(_likeness(s), "")) for s in anatomy.sites]
    return replace(anatomy, sites=tuple(sites))


def _likeness(site: Site) -> str:
    return repr((site.kind, site.path, site.module, site.units, site.heads))


def _kept_since(block: nn.Module, site: Site, hidden: Tensor, call: BlockCall) -> str:
    """Why a block cannot be without a site; empty where it can."""
    silent, without, none = copy_unhooked(block), copy_unhooked(block), torch.arange(0)
    for consumer in consumers_of(silent, site):
        consumer.weight = nn.Parameter(torch.zeros_like(consumer.weight), requires_grad=False)
    try:
        prune_site(without, site, none, site_weight(without, site)[:, :0], site_bias(without, site))
        wanted, found = (run_block(one, hidden, call).double() for one in (silent, without))
    except Exception as error:  # what its block makes of what it returns
        return f"its block does not run without it ({reason(error)})"
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    return "" if difference <= TOLERANCE[block_dtype(block)] else f"without it its block differs by {difference:.1e}"


@torch.no_grad()
def try_without(anatomy: Anatomy, tokens: Tensor, gone: Sequence[int]) -> None:
    """Compares the dense model run without some of its blocks with one that is built from a config with fewer.

    What a type's blocks do may follow from their number: which of them attend to a window, or leave positions out.

    Args:
        anatomy: of the dense model; left as it was.
        tokens: a text, (windows, T), int64.
        gone: numbers of these blocks.

    Raises:
        SnpError: the config says something else of the blocks that stay.
    """
    if not gone:
        return
    model, text = anatomy.model, tokens[:1, :TOKENS]
    left = nn.ModuleList(NoBlock() if index in gone else block for index, block in enumerate(anatomy.blocks))
    wanted = logits_block_by_block(model, text, left).double()
    try:
        short = assemble(model, anatomy.family, left)
        difference = float((logits_block_by_block(short, text) - wanted).abs().max() / wanted.abs().max())
        said = f"logits differ by {difference:.1e} of the largest"
        staying = [block for block in left if not isinstance(block, NoBlock)]
        for old, new in zip(staying, find_blocks(short), strict=True):
            if other := _unlike(old, new):
                difference, said = math.inf, f"{other} of a block changes"
    except Exception as error:  # tensors that do not fit, a config that its class refuses
        difference, said = math.inf, f"it cannot be built ({reason(error)})"
    if not difference <= TOLERANCE[model.dtype]:
        raise SnpError(
            f"--depth: without blocks {', '.join(map(str, gone))} the config of a {model.config.model_type} cannot say "
            f"what the others are: {said}; expected the same. Use --depth never."
        )


def _unlike(old: nn.Module, new: nn.Module) -> str:
    """The first number, flag or word in which two blocks differ that should not; empty where none does."""
    others = dict(new.named_modules())
    for path, module in old.named_modules():
        values = vars(others[path])
        for key, value in vars(module).items():
            plain = isinstance(value, bool | int | float | str) and key != "training" and not key.startswith("_")
            if plain and not any(word in key for word in MAY_DIFFER) and values.get(key) != value:
                return f"{path}.{key}".strip(".")
    return ""


def _try_blocks(model: PreTrainedModel, window: Tensor) -> None:
    """Raises SnpError if blocks run one at a time, on two texts, do not compute what the model does.

    Some are given more than hidden states: embeddings of the text for every block, or keys and values of earlier ones.
    """
    texts = torch.cat([window, window.flip(1)])
    home = next(model.get_input_embeddings().parameters()).device
    texts = texts.to("cpu" if home.type == "meta" else home)
    try:
        with same_tensors(model):
            wanted = model(texts, **without_cache(model)).logits.cpu().double()
    except AttributeError as error:  # of its own code
        raise SnpError(
            f"{type(model).__name__} does not run over a text in transformers {transformers.__version__}, dense or "
            f"pruned: {reason(error)}. Use another version."
        ) from error
    try:
        difference = float((logits_block_by_block(model, texts) - wanted).abs().max() / wanted.abs().max())
        said = f"differ by {difference:.1e} of the largest"
    except Exception as error:  # shapes that are not those of hidden states
        difference, said = math.inf, f"cannot be computed ({reason(error)})"
    if not difference <= TOLERANCE[model.dtype]:
        raise SnpError(
            f"model_type {model.config.model_type!r} is not supported: with its blocks run one at a time, logits "
            f"{said}; expected the same. Its blocks depend on more than what the one before puts out."
        )


def _try_experts(block: nn.Module, site: Site, hidden: Tensor, call: BlockCall) -> float:
    """Largest difference, relative to the largest value, of what the experts put out taken apart and together."""
    assert site.mixture is not None
    found: list[Tensor] = []
    module = experts_module(block, site.mixture)
    with watch_outputs({module: found.append}):
        run_block(block, hidden, call)
    came = arrived_at(site.mixture, block, hidden, call)
    wanted = found[0].reshape(-1, found[0].shape[-1])
    if site.mixture.scaled:
        wanted = wanted.view(site.mixture.count, -1, wanted.shape[-1]).sum(0)
    difference = put_together(block, site.mixture, came) - wanted
    return float(difference.abs().max() / wanted.abs().max().clamp(min=1e-30))


def _try(block: nn.Module, site: Site, hidden: Tensor, call: BlockCall) -> float:
    """Largest difference, relative to the largest value, of what arrives at a site's consumer after a cut."""
    order = torch.arange(site.units).flip(0)
    order = deal_from_groups(order, site.groups) if site.groups else order
    kept = order[: site.units - site.step].sort().values
    channels = unit_channels(kept, site.unit_size)
    narrow = copy_unhooked(block)
    W = site_weight(narrow, site)
    prune_site(narrow, site, kept, W[:, channels.to(W.device)], site_bias(narrow, site))
    try:
        (before,), (after,) = (inputs_at(b, [site], hidden, call) for b in (block, narrow))
    except Exception as error:  # shapes that do not fit together any more
        raise SnpError(
            f"{site.name}: does not run with the first of its {site.units} {site.unit} taken away ({reason(error)}); "
            "what looks like a layout that is known is another one."
        ) from error
    if before is None or after is None:  # no token comes by
        return 0.0
    wanted = before[..., channels]
    return float((after.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-30))
