"""A pruned block as a whole: its parameters move a little towards what the dense model has behind it.

Least squares repairs one matrix at a time. What the matrices of a block, and the non-linearity between them, could do
together it leaves undone; steps of Adam on the block's squared error do some of that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snp_llm.models.blocks import run_with
from snp_llm.models.calls import move
from snp_llm.pruning.run import Run
from snp_llm.pruning.statistics import held_out
from snp_llm.pruning.stream import Stream
from snp_llm.recipe.recipe import Recipe
from snp_llm.runtime import ranks
from snp_llm.runtime.batches import in_batches
from snp_llm.runtime.device import ran_out, rough_products
from snp_llm.runtime.errors import SnpError, reason

TOKENS = 65_536  # at most, that blocks are refined on

TOKENS_A_STEP = 256  # at least

RATE = 1e-3  # of Adam, at its highest, for `MOST_STEPS` and more

BETAS = (0.9, 0.95)

WARM = 0.1  # of all steps, in which the rate rises; after them it falls to zero, as a cosine does

FEWEST_STEPS, MOST_STEPS = 30, 400  # that are worth it, where as many are taken as the rest of a run has time for

WORTH, PATIENCE = 0.01, 4  # share of a block's error that refining it should take off; blocks in a row that may miss it

STATE = 7  # copies of a block's parameters in float32: those that move, gradients, two moments, and three states

SHARES = (0.25, 0.5, 0.75, 1.0)  # of the way that the parameters have gone, from which held-out windows choose


def refined_windows(recipe: Recipe, windows: int, seq_len: int) -> int:
    """The first so many of all calibration windows are what blocks are refined on, those held out among them."""
    return min(windows, max(2, TOKENS // seq_len)) if recipe.refine_steps else 0


def gains_nothing(refinements: Sequence[float | None]) -> bool:
    """Whether refining has stopped to pay: the last `PATIENCE` blocks that were refined each kept more than `1 - WORTH`
    of their error.

    On a model of 135M parameters refining took two fifths of a run and 0.2 % off the errors of nearly all blocks.

    Args:
        refinements: of the sites before, in their order; None where no block was refined.
    """
    last = [share for share in refinements if share is not None][-PATIENCE:]
    return len(last) == PATIENCE and min(last) > 1 - WORTH


def refine_block(block: nn.Module, stream: Stream, behind: Stream, run: Run) -> float:
    """Moves the parameters of a block, in place, towards what the dense model has behind it.

    The error of a token is that of the stream behind the block, relative to that stream: `||f(h) - t||^2 / ||t||^2`.
    Steps are taken in float32 at least, on windows drawn from those that are not held out; on a GPU products of a step
    are in TF32, of half precision's mantissa, those that errors are compared by are not. Of the way from the first
    state to the last a share is kept, that which errs least on the held-out windows: nothing, if none errs less.

    Args:
        block: cut and repaired, on the compute device.
        stream: the hidden states h before it; left as they are.
        behind: t, of as many of the first windows as it is refined on.
        run: of this phase.

    Returns:
        Error on the held-out windows after the refinement over that before it, at most 1.

    Raises:
        SnpError: a device has no memory left for that.
    """
    try:
        return _refined(block, stream, behind, run)
    except (RuntimeError, SnpError) as error:
        cause = error if isinstance(error, RuntimeError) else error.__cause__
        if not isinstance(cause, RuntimeError) or not ran_out(cause):
            raise
        said = f"block {stream.index}: no memory left to refine it ({reason(cause)[:200]}). Use --refine none."
        raise SnpError(said) from error


def _refined(block: nn.Module, stream: Stream, behind: Stream, run: Run) -> float:
    task = _Task(block, stream, behind, run.clock.device)
    held, steps = held_out(behind.total), run.recipe.refine_steps or 0
    fitted, judged = (~held).nonzero()[:, 0], held.nonzero()[:, 0].tolist()
    dtype = torch.promote_types(behind.hidden.dtype, torch.float32)
    moving = {n: p.detach().to(dtype, copy=True) for n, p in block.named_parameters() if p.is_floating_point()}
    if not judged or not moving:
        return 1.0
    own = {name: weight.clone() for name, weight in moving.items()}
    adam = torch.optim.Adam([weight.requires_grad_() for weight in moving.values()], lr=1.0, betas=BETAS)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: rate(step, steps))
    draw = torch.Generator().manual_seed(run.recipe.seed + stream.index)
    before = task.error(own, judged)
    least, best = before, own
    coming: list[int] = []
    size = steps_windows(stream.hidden.shape[1])
    for _ in range(steps):
        while len(coming) < size:
            coming += fitted[torch.randperm(len(fitted), generator=draw)].tolist()
        some, coming = coming[:size], coming[size:]
        with rough_products(run.clock.device):
            gradients = task.gradient(moving, some)
        for weight, gradient in zip(moving.values(), gradients, strict=True):
            weight.grad = gradient
        adam.step()
        schedule.step()
    for share in SHARES:
        state = {name: weight.lerp(moving[name].detach(), share) for name, weight in own.items()}
        error = task.error(state, judged)
        if error < least:
            least, best = error, state
    rounded = {name: best[name].to(weight.dtype) for name, weight in block.named_parameters() if name in best}
    error = task.error({name: weight.to(dtype) for name, weight in rounded.items()}, judged)
    if not error < before:
        return 1.0
    rounded = ranks.from_rank(ranks.owner(stream.index), lambda: rounded)
    with torch.no_grad():
        for name, weight in block.named_parameters():
            if name in rounded:
                weight.copy_(rounded[name])
    return error / before


def steps_windows(seq_len: int) -> int:
    """Windows of a step."""
    return -(-TOKENS_A_STEP // seq_len)


def refine_tokens(steps: int, windows: int, seq_len: int) -> float:
    """How many tokens pass forward through a block while it is refined, the way back counted as two of them.

    Args:
        steps: to be taken.
        windows: that it is refined on, those held out among them.
        seq_len: tokens a window has.
    """
    looks = (len(SHARES) + 2) * float(held_out(windows).sum())
    return (3 * steps * steps_windows(seq_len) + looks) * seq_len


def rate(step: int, steps: int) -> float:
    """Learning rate of a step, counted from 0: fewer steps have to be smaller, for what the first of them spoil is made
    good by those that follow."""
    highest = RATE * min(1.0, steps / MOST_STEPS) ** 0.5
    return highest * min(1.0, (step + 1) / (WARM * steps)) * (1 + math.cos(math.pi * step / steps)) / 2


@dataclass(frozen=True)
class _Task:
    """What a block should do.

    Attributes:
        block: as it is; other weights take the place of its own.
        stream: before it.
        behind: what it should put out.
        device: to compute on.
    """

    block: nn.Module
    stream: Stream
    behind: Stream
    device: torch.device

    def error(self, weights: dict[str, Tensor], windows: Sequence[int]) -> float:
        """Mean error of a token over these of all windows."""
        total = torch.zeros((), dtype=torch.float64)
        mine = self._mine(windows)
        with torch.no_grad():
            for _, found in in_batches(len(mine), self.stream.batch, lambda at: self._errors(weights, mine[at])):
                total += found.cpu()
        ranks.add_up([total])
        return float(total) / len(windows)

    def gradient(self, weights: dict[str, Tensor], windows: Sequence[int]) -> list[Tensor]:
        """Gradient of that error by each of the weights."""

        def of(at: slice) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                errors = self._errors(weights, mine[at]) / len(windows)
                return torch.autograd.grad(errors, [*weights.values()], materialize_grads=True)

        mine, total = self._mine(windows), [torch.zeros_like(weight) for weight in weights.values()]
        for _, found in in_batches(len(mine), self.stream.batch, of):
            torch._foreach_add_(total, [*found])
        ranks.add_up(total)
        return total

    def _mine(self, windows: Sequence[int]) -> list[int]:
        """Those of all windows that are this rank's, counted from its first."""
        here = self.behind.windows
        return [window - here.start for window in windows if window in here]

    def _errors(self, weights: dict[str, Tensor], windows: list[int]) -> Tensor:
        """Sum over windows of the mean error of their tokens."""
        dtype = next(iter(weights.values())).dtype
        hidden, wanted = (move(s.hidden[windows], self.device).to(dtype) for s in (self.stream, self.behind))
        output = run_with(self.block, weights, hidden, self.stream.call)
        lost, whole = (output - wanted).square().sum(-1), wanted.square().sum(-1)
        return (lost / whole.clamp(min=torch.finfo(dtype).tiny)).mean(-1).sum()
