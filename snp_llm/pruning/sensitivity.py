"""One visit to the dense model before the first cut: what every site's widths would cost, and the loss's gradients.

Knows blocks and sites, cuts nothing and chooses nothing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from snp_llm.linalg.allocation import NEEDS_CURVES
from snp_llm.models.anatomy import Anatomy
from snp_llm.models.blocks import frozen
from snp_llm.models.offload import on_device
from snp_llm.models.site import Site, outputs_of
from snp_llm.pruning.curves import HELD_OUT_OF, read_curves
from snp_llm.pruning.gradients import read_gradients
from snp_llm.pruning.measured import corrected, measure, measured_windows, measures
from snp_llm.pruning.run import Run
from snp_llm.pruning.statistics import enough_windows
from snp_llm.pruning.stream import Visit
from snp_llm.recipe.recipe import Recipe
from snp_llm.runtime import ranks
from snp_llm.runtime.device import hand_back

TOKENS_AN_OUTPUT = 8  # for each channel that a block puts out, from which gradients are read

GRADIENT_TOKENS = 32_768  # at most: what of these enters every block is kept for the way back

FEWEST_WINDOWS = 4  # at least, so that up to so many ranks read the same

IMAGES = 128  # at least, where what gradients of an image have in common counts as well


@dataclass(frozen=True)
class SiteCurves:
    """What the dense model says of a site.

    Attributes:
        energy: share of the latent energy at every width, (units + 1,); None where no curve was asked for.
        loss: predicted rise of the mean loss at every width, (units + 1,); None without gradients.
        order, rises: of units that several sites share, most important first, and what each of them, the last that has
            gone, adds to that loss, or to the relative error; (units,) both, None elsewhere. Whole experts have an
            order as well.
        read_gradient: reads F, second moment of the loss gradient at the site's output, (d_out, d_out), summed over as
            many positions as there is a loss for: a token of a text, an image with all of its positions.
        distances: of a whole block, where another score than the loss is asked for: how far it moves the stream, and it
            and each of the blocks behind it together; (1,) or as many as there are blocks.
        left: of channels of experts that may go, that loss by how many are left, (experts + 1, units + 1); None
            elsewhere.
    """

    energy: Tensor | None
    loss: Tensor | None
    order: Tensor | None
    rises: Tensor | None
    read_gradient: Callable[[], Tensor | None]
    distances: Tensor | None = None
    left: Tensor | None = None

    def lost(self, width: int, experts: int | None = None) -> float | None:
        """Predicted rise of the loss at a width, or where so many experts of that width are left; None if unknown."""
        curve = self.loss if experts is None or self.left is None else self.left[experts]
        return None if curve is None else float(curve[width])

    @property
    def gradient(self) -> Tensor | None:
        """F, read now, or None where none was asked for; without files, only on the rank that cuts the block."""
        return self.read_gradient()


def visit_passes(recipe: Recipe, sites: Sequence[Site] = ()) -> int:
    """How many times the dense model's blocks are visited before the first cut: for gradients, for curves, or both."""
    return recipe.needs_gradients + needs_curves(recipe, sites)


def needs_curves(recipe: Recipe, sites: Sequence[Site]) -> bool:
    """Whether widths follow from curves, or the order of units that several sites share."""
    return recipe.allocation in NEEDS_CURVES or any(site.kind == "stream" for site in sites)


def visit_windows(
    widest: int, hidden: int, seq_len: int, recipe: Recipe, sites: Sequence[Site] = ()
) -> tuple[int, int]:
    """Windows that a visit reads gradients from, and curves; none where the recipe does not need them.

    Args:
        widest: inputs of the widest site.
        hidden: channels that a block puts out.
        seq_len: tokens a window has.
        recipe: what is needed.
        sites: as of `needs_curves`.
    """
    gradients = gradient_windows(hidden, seq_len) if recipe.needs_gradients else 0
    return gradients, enough_windows(widest, seq_len) if needs_curves(recipe, sites) else 0


def gradient_windows(hidden: int, seq_len: int) -> int:
    """Windows that gradients are read from: of these there are moments over pairs of a block's output channels alone.

    Args:
        hidden: channels that a block puts out.
        seq_len: tokens a window has.
    """
    return max(FEWEST_WINDOWS, min(-(-TOKENS_AN_OUTPUT * hidden // seq_len), GRADIENT_TOKENS // seq_len))


def visit_dense(anatomy: Anatomy, tokens: Tensor, run: Run) -> list[SiteCurves]:
    """Curves and gradients of every site, in the order of `anatomy.sites`, each only where the recipe needs them.

    The model is visited block by block, on the first windows of the draw. For gradients there and back: forwards,
    keeping what enters each block, and backwards, where each block runs once more to pass the gradient on. For curves
    forwards, with one block's moments held at a time. Where there are gradients, losses are predicted on windows that
    are held out: on those that a repair was computed from its error looks smaller than it is, the more so the more
    channels a site has for its tokens.

    Args:
        anatomy: of the dense model; left as it was.
        tokens: calibration windows, (windows, T), int64.
        run: of this phase; its journal keeps curves and gradients.
    """
    sites, gradients, curves, cuts = anatomy.sites, *map(run.phase, ("gradients", "curves", "measured"))
    widest, hidden = max(s.load for s in sites), outputs_of(anatomy.blocks[sites[0].block], sites[0])
    read_back, read_once = visit_windows(widest, hidden, run.recipe.seq_len, run.recipe, sites)
    if any(site.spatial for site in sites):
        read_back = max(read_back, read_back and IMAGES)

    def first_windows(count: int, run: Run) -> Visit:
        return Visit(anatomy, tokens[: max(count, ranks.rank_count())], run)

    with frozen(anatomy.model), _at_hand(anatomy, run):
        if read_back:
            read_gradients(first_windows(read_back, gradients))
            hand_back(run.clock.device)  # states of so many windows wait in no later phase
        if read_once:
            read_curves(first_windows(read_once, curves), gradients.journal)
            hand_back(run.clock.device)
        if measures(anatomy, run.recipe):
            windows = measured_windows(first_windows(read_once, curves).tokens, one_of=HELD_OUT_OF)
            measure(Visit(anatomy, windows, cuts), curves.journal)
            hand_back(run.clock.device)
    losses = [curves.journal.get(site.block, f"{site.path} loss") for site in sites]
    predicted = [loss for loss in losses if loss is not None]
    if len(predicted) == len(sites):
        losses = [*corrected(predicted, [cuts.journal.get(0, site.name) for site in sites])]
    return [
        SiteCurves(
            energy=curves.journal.get(site.block, f"{site.path} energy"),
            loss=loss,
            order=curves.journal.get(site.block, f"{site.path} order"),
            rises=curves.journal.get(site.block, f"{site.path} rises"),
            read_gradient=partial(gradients.journal.get, site.block, site.path),
            left=curves.journal.get(site.block, f"{site.path} left"),
        )
        for site, loss in zip(sites, losses, strict=True)
    ]


@contextmanager
def _at_hand(anatomy: Anatomy, run: Run) -> Iterator[None]:
    """Has all blocks on a GPU where hidden states wait there too: a visit then reads weights once, not three times."""
    device = run.clock.device
    with ExitStack() as stack:
        if device.type != "cpu" and run.recipe.hidden_device == device.type:
            with run.clock.phase("loading"):
                for block in anatomy.blocks:
                    stack.enter_context(on_device(block, device))
        yield
