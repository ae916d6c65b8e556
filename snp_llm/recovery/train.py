"""The loop: steps, judgements on held-out windows, the best state, and what an interrupted training goes on from."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from snp_llm.checkpoint.journal import Journal
from snp_llm.models.calls import without_cache
from snp_llm.recipe.recovery import RecoverRecipe
from snp_llm.recovery.divergence import divergence, hidden_difference
from snp_llm.recovery.schedule import Budget, Order, rate
from snp_llm.recovery.teacher import Teacher, as_input
from snp_llm.recovery.trained import Trained
from snp_llm.runtime import ranks
from snp_llm.runtime.errors import SnpError

log = logging.getLogger("snp_llm")

CHECKS = 20  # judgements of a training

PATIENCE = 10  # of them in a row without a better one, after which it stops

MOMENTUM = 0.9

LONGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class Material:
    """What is trained on and judged by.

    Attributes:
        windows: tokens or pixels of all windows, (windows, ...); the last of them are held out.
        held_out: how many.
        losses: how many positions some windows have logits at.
        item: what is counted, in the singular.
    """

    windows: Tensor
    held_out: int
    losses: Callable[[Tensor], int]
    item: str

    @property
    def each(self) -> str:
        """What is counted, with its article."""
        return f"{'an' if self.item == 'image' else 'a'} {self.item}"

    @property
    def trained(self) -> int:
        """How many windows are trained on."""
        return len(self.windows) - self.held_out


def in_float32(recipe: RecoverRecipe, device: torch.device) -> bool:
    """Whether products of both models are computed in float32, for which their weights have to be in that as well."""
    return recipe.precision == "float32" or (recipe.precision == "auto" and device.type != "cuda")


@dataclass
class Progress:
    """Where a training is.

    Attributes:
        step: that comes next.
        items: tokens or images that were trained on.
        seconds: that it took.
        checks: judgements so far, the one before the training not counted.
        idle: of them in a row without a better one.
        before: held-out divergence before the training, nats a position.
        best: the least since.
        history: a dict a judgement.
    """

    step: int = 0
    items: int = 0
    seconds: float = 0.0
    checks: int = 0
    idle: int = 0
    before: float = math.inf
    best: float = math.inf
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Training:
    """All that the loop needs.

    Attributes:
        trained: the model.
        teacher: what it is to say.
        material: windows.
        recipe: settings.
        device: that everything is on.
        journal: of the training.
    """

    trained: Trained
    teacher: Teacher
    material: Material
    recipe: RecoverRecipe
    device: torch.device
    journal: Journal

    def __post_init__(self) -> None:
        recipe, parameters = self.recipe, [*self.trained.parameters.values()]
        self.precise = in_float32(recipe, self.device)
        self.options = without_cache(self.trained.model)
        if recipe.hidden_weight:
            self.options["output_hidden_states"] = True
        settings: dict[str, Any] = {"lr": recipe.highest_rate, "weight_decay": 0.0}
        if recipe.optimizer == "adamw":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, **settings)
        else:
            self.optimizer = torch.optim.SGD(parameters, momentum=MOMENTUM, **settings)
        images = self.material.item == "image"
        self.batch = recipe.batch_size or (64 if images else 8)
        self.micro = recipe.micro_batch or (self.batch if images else 2)

    def loss(self, numbers: list[int], *, judged: bool = False) -> Tensor:
        """Summed divergence on windows, nats; while training with what hidden states add."""
        windows = self.material.windows[numbers].to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=not self.precise):
            targets = self.teacher(windows, numbers)
            found = self.trained.model(as_input(windows, self.trained.model), **self.options)
        loss = divergence(targets, found.logits)
        if self.recipe.hidden_weight and not judged:
            loss = loss + self.recipe.hidden_weight * hidden_difference(targets, tuple(found.hidden_states[1:-1]))
        return loss

    @torch.no_grad()
    def judge(self) -> float:
        """Mean divergence on the held-out windows, nats a position; ranks share them."""
        first = self.material.trained
        mine = [first + number for number in ranks.share(self.material.held_out)]
        total = torch.zeros((), dtype=torch.float64)
        for at in range(0, len(mine), self.micro):
            total += self.loss(mine[at : at + self.micro], judged=True).cpu().double()
        ranks.add_up([total])
        return total.item() / self.material.losses(self.material.windows[first:])

    def step(self, numbers: list[int], learning_rate: float) -> float:
        """One step on windows, which ranks share; returns their mean loss, nats a position."""
        mine = numbers[(share := ranks.share(len(numbers))).start : share.stop]
        count = self.material.losses(self.material.windows[numbers])
        total = torch.zeros((), dtype=torch.float64)
        with self.trained.with_batch_statistics():
            for at in range(0, len(mine), self.micro):
                loss = self.loss(mine[at : at + self.micro]) / count
                loss.backward()
                total += loss.detach().cpu().double()
        ranks.add_up([total])
        self.trained.agree()
        torch.nn.utils.clip_grad_norm_(self.trained.parameters.values(), LONGEST_GRADIENT)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total.item()

    def save(self, progress: Progress, best: dict[str, Tensor]) -> None:
        """Writes down where the training is, if it is time to."""
        if not self.journal.due():
            return
        tensors = {f"now {name}": tensor for name, tensor in self.trained.state().items()}
        tensors |= {f"best {name}": tensor for name, tensor in best.items()}
        for name, parameter in self.trained.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{key} {name}"] = value
        self.journal.put_alone(progress.step, tensors, asdict(progress))

    def restore(self) -> tuple[Progress, dict[str, Tensor]] | None:
        """What an interrupted training has written down, put in place: where it was, and its best state."""
        found = self.journal.alone()
        if found is None:
            return None
        tensors, facts = found
        kinds: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition(" ")
            kinds.setdefault(kind, {})[name] = tensor
        best = kinds.pop("best")
        self.trained.put_back(kinds.pop("now"))
        for kind, values in kinds.items():
            for name, value in values.items():
                parameter = self.trained.parameters[name]
                place = "cpu" if kind == "step" else parameter.device
                self.optimizer.state[parameter][kind] = value.to(place)
        return Progress(**facts), best


def train(training: Training, budget: Budget, on_step: Callable[[str], None]) -> Progress:
    """Trains a model until the budget is used up, or nothing gets better any more; it then is in its best state.

    The windows of a step, and with a budget of tokens or images everything else, follow from the recipe alone, so that
    an interrupted training goes on to the same bits.

    Args:
        training: all that is needed; its model is changed in place.
        budget: how long it is.
        on_step: called with a line of text after each judgement.

    Returns:
        Where it ended; `best` is never above `before`.
    """
    recipe, material, trained = training.recipe, training.material, training.trained
    order = Order(material.trained, training.batch, recipe.seed)
    found = training.restore()
    if found is None:
        progress, best = Progress(), trained.state()
        progress.before = progress.best = training.judge()
        if not math.isfinite(progress.before):
            raise SnpError("the pruned model's logits are not finite; expected a model that works. Evaluate it first.")
        on_step(f"held-out divergence {progress.before:.5f} nats {material.each} before the training")
    else:
        progress, best = found
    last = time.monotonic()
    while (used := budget.used(progress.items, progress.seconds)) < 1 and progress.idle < PATIENCE:
        numbers = order.at(progress.step)
        learning_rate = rate(used, recipe.highest_rate, recipe.warmup)
        loss = training.step(numbers, learning_rate)
        progress.step += 1
        progress.items += material.losses(material.windows[numbers])
        now = time.monotonic()
        progress.seconds, last = ranks.from_rank(0, lambda: progress.seconds + now - last), now  # noqa: B023
        used = budget.used(progress.items, progress.seconds)
        if int(used * CHECKS) > progress.checks:
            held_out = training.judge()
            if not math.isfinite(held_out):
                log.warning("the training went astray; its best state is kept. Try a smaller --learning-rate")
                break
            progress.checks, progress.idle = int(used * CHECKS), progress.idle + 1
            if held_out < progress.best:
                progress.best, progress.idle, best = held_out, 0, trained.state()
            facts = {"step": progress.step, "items": progress.items, "seconds": round(progress.seconds, 3)}
            facts |= {"learning_rate": learning_rate, "loss": loss, "held_out": held_out}
            progress.history.append(facts)
            on_step(said(progress, held_out, material))
        training.save(progress, best)
    trained.put_back(best)
    return progress


def said(progress: Progress, held_out: float, material: Material) -> str:
    """A judgement in a line."""
    speed = progress.items / progress.seconds if progress.seconds else 0.0
    return (
        f"{progress.items:,} {material.item}s, {speed:,.0f} a second: held-out divergence {held_out:.5f} nats "
        f"{material.each} "
        f"({progress.before:.5f} before, {progress.best:.5f} at best)"
    )
