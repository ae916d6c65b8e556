"""A pruned model trained to say what the dense one says, wherever the dense one's logits come from."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from snp_llm.checkpoint.journal import Journal
from snp_llm.models.anatomy import find_blocks
from snp_llm.models.calls import without_cache
from snp_llm.models.segments import find_segments
from snp_llm.models.task import task_of
from snp_llm.models.text_part import text_config
from snp_llm.recipe.checks import flag
from snp_llm.recipe.recovery import COUNTED, RecoverRecipe
from snp_llm.recovery.schedule import Budget
from snp_llm.recovery.teacher import WINDOWS_A_FILE, Stored, Teacher, as_input, live
from snp_llm.recovery.train import Material, Progress, Training, train
from snp_llm.recovery.trained import inside, train_blocks, train_lora, with_checkpoints
from snp_llm.runtime.device import hand_back
from snp_llm.runtime.errors import SnpError

USUAL_BUDGET = {"token": 10**6, "image": 20_000}

DRAWN = 4096  # windows or images, where nothing says how many are needed


@dataclass(frozen=True)
class Tools:
    """What a recovery uses and leaves no trace of in its result.

    Attributes:
        device: to compute on.
        journal: keeps what has been done.
        on_step: called with a line of text after each judgement.
        folder: takes the dense model's logits, where they are computed before.
        identity: what these depend on.
    """

    device: torch.device
    journal: Journal
    on_step: Callable[[str], None]
    folder: Path
    identity: dict[str, Any]


@dataclass(frozen=True)
class Recovered:
    """What a training came to.

    Attributes:
        state: tensors of the blocks by name, in the type that they are saved in; empty where nothing got better.
        progress: where it ended.
        after: held-out divergence of what is saved, nats a position; at most `progress.before`.
    """

    state: dict[str, Tensor]
    progress: Progress
    after: float


def budget_of(recipe: RecoverRecipe, item: str) -> Budget:
    """How long a training of a model is, of texts (item "token") or images ("image").

    Raises:
        SnpError: the budget is in what the model does not read.
    """
    own, other = (f"{item}s", *(name for name in COUNTED if name != f"{item}s"))
    if getattr(recipe, other) is not None:
        raise SnpError(f"{flag(other)}: this model reads {own}; expected {flag(own)}.")
    items = recipe.amount(own)
    if items is None and recipe.minutes is None:
        items = USUAL_BUDGET[item]
    return Budget(items, recipe.minutes and 60 * recipe.minutes)


def check_dense(dense: PreTrainedModel, pruned: PreTrainedModel, recipe: RecoverRecipe) -> None:
    """Raises SnpError if what a dense model says cannot be compared with what a pruned one says."""
    found, own = (_classes(model) for model in (dense, pruned))
    if found != own:
        raise SnpError(
            f"--dense: puts out {found:,} logits, the pruned model {own:,}; expected the model that it was made from."
        )
    streams = [(len(find_blocks(m)), getattr(text_config(m.config), "hidden_size", 0)) for m in (dense, pruned)]
    if recipe.hidden_weight and streams[0] != streams[1]:
        (blocks, width), (left, narrow) = streams
        raise SnpError(
            f"--hidden-weight: expected the dense model's {blocks} blocks, behind each of which states are compared, "
            f"on a stream of {width:,}; the pruned model has {left}, on one of {narrow:,}. Leave it out."
        )


def _classes(model: PreTrainedModel) -> int:
    """How many logits a position, or an image, has."""
    head: Any = model.get_output_embeddings()
    return len(head.weight) if head is not None else int(model.config.num_labels or 0)


def windows_wanted(recipe: RecoverRecipe, item: str, length: int) -> tuple[int, int]:
    """How many windows of so many tokens, or images, are trained on, and how many are held out."""
    budget = budget_of(recipe, item)
    if item == "image":
        return recipe.num_samples or min(budget.items or DRAWN, DRAWN), 10 * recipe.held_out
    return recipe.num_samples or (-(-budget.items // length) if budget.items else DRAWN), recipe.held_out


def recover(
    model: PreTrainedModel,
    load_dense: Callable[[], PreTrainedModel],
    windows: tuple[Tensor, int],
    recipe: RecoverRecipe,
    dtype: torch.dtype,
    tools: Tools,
) -> Recovered:
    """Trains the blocks of a pruned model.

    Args:
        model: pruned, in float32 where blocks are trained; changed in place, and of no use afterwards.
        load_dense: gives the dense model; called where its logits are not there yet, and let go once they are.
        windows: tokens or pixels, (windows, ...), and how many of the last of them are held out.
        recipe: settings.
        dtype: in which the weights are saved.
        tools: of the run.

    Raises:
        SnpError: settings or models that do not fit together; out of the journal's or the disk's reach.
    """
    task = task_of(model.config)
    material = Material(*windows, task.losses, task.item)
    if material.trained < 1:
        raise SnpError(f"calibration: expected more than {material.held_out} windows, the held-out ones; got no more.")
    budget = budget_of(recipe, task.item)
    if recipe.hidden_weight and find_segments(model) is not None:
        raise SnpError("--hidden-weight: a convolutional network's stream loses channels; expected 0.")
    teacher = _teacher(load_dense, material, recipe, tools)
    if recipe.gradient_checkpointing:
        with_checkpoints(model)
    on(model, tools.device)
    trained = train_blocks(model) if recipe.train == "blocks" else train_lora(model, recipe.lora_rank, recipe.seed)
    training = Training(trained, teacher, material, recipe, tools.device, tools.journal)
    progress = train(training, budget, tools.on_step)
    if progress.best >= progress.before:
        return Recovered({}, progress, progress.before)
    trained.merge()
    return _rounded(training, progress, dtype)


def on(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """The same model, on a device."""
    module: nn.Module = model
    module.to(device)
    return model


def _rounded(training: Training, progress: Progress, dtype: torch.dtype) -> Recovered:
    """The blocks as they are saved, judged once more: rounding may cost more than a short training has gained."""
    model = training.trained.model
    names = inside(model)
    own = {name: tensor for name, tensor in model.state_dict().items() if name in names}
    state = {n: t.to("cpu", dtype if t.is_floating_point() else t.dtype, copy=True) for n, t in own.items()}
    model.load_state_dict(state, strict=False)
    after = training.judge()
    return Recovered(state, progress, after) if after < progress.before else Recovered({}, progress, progress.before)


def _teacher(
    load_dense: Callable[[], PreTrainedModel], material: Material, recipe: RecoverRecipe, tools: Tools
) -> Teacher:
    """The dense model on the device, or what was or is now written of it."""
    if recipe.dense_top_k is None:
        return live(on(load_dense(), tools.device), hidden=recipe.hidden_weight > 0)
    stored = Stored(Path(recipe.dense_logits or tools.folder), recipe.dense_top_k, tools.identity)
    if not all(stored.has(number) for number in range(0, len(material.windows), WINDOWS_A_FILE)):
        dense = on(load_dense(), tools.device)
        options = without_cache(dense)

        def compute(windows: Tensor) -> Tensor:
            with torch.no_grad():
                found: Tensor = dense(as_input(windows.to(tools.device), dense), **options).logits
            return found

        stored.write(material.windows, compute, tools.on_step)
        del dense
        hand_back(tools.device)
    return stored.teacher(tools.device)
