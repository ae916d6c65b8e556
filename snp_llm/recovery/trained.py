"""Which tensors of a pruned model are trained, and how: all of its blocks, or low-rank changes of their projections."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from snp_llm.models.anatomy import block_prefixes, find_blocks
from snp_llm.models.projections import Projection
from snp_llm.models.segments import Segments
from snp_llm.runtime import ranks
from snp_llm.runtime.errors import SnpError


@dataclass(frozen=True)
class Trained:
    """A model that is being trained.

    Attributes:
        model: whole, changed in place.
        parameters: that are trained, float32, by name.
        statistics: running ones of batch norms in the blocks, by name.
        norms: these batch norms.
        merge: puts what was trained into the model's own weights, once.
    """

    model: PreTrainedModel
    parameters: dict[str, nn.Parameter]
    statistics: dict[str, Tensor]
    norms: tuple[nn.Module, ...]
    merge: Callable[[], object]

    def state(self) -> dict[str, Tensor]:
        """Copies of all that training changes, on the CPU."""
        found = {**self.parameters, **self.statistics}
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in found.items()}

    def put_back(self, state: dict[str, Tensor]) -> None:
        """Makes it what it was at a `state`."""
        found = {**self.parameters, **self.statistics}
        with torch.no_grad():
            for name, tensor in state.items():
                found[name].copy_(tensor)

    @contextmanager
    def with_batch_statistics(self) -> Iterator[None]:
        """Batch norms in training mode, and nothing else: no dropout, since the dense model has none either."""
        for norm in self.norms:
            norm.train()
        try:
            yield
        finally:
            for norm in self.norms:
                norm.eval()

    def agree(self) -> None:
        """Gives all ranks the sum of their gradients and the mean of their running statistics."""
        if ranks.rank_count() == 1:
            return
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        ranks.add_up([p.grad for p in self.parameters.values() if p.grad is not None])
        running = [tensor for tensor in self.statistics.values() if tensor.is_floating_point()]
        ranks.add_up(running)
        for tensor in running:
            tensor.div_(ranks.rank_count())


def inside(model: PreTrainedModel) -> set[str]:
    """Names of the tensors in the blocks of a model."""
    pairs = zip(block_prefixes(model), find_blocks(model), strict=True)
    return {prefix + name for prefix, block in pairs for name in block.state_dict()}


def train_blocks(model: PreTrainedModel) -> Trained:
    """All floating-point parameters of the blocks, which are in float32."""
    model.eval().requires_grad_(False)
    names = inside(model)
    parameters = {n: p for n, p in model.named_parameters() if n in names and p.is_floating_point()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    norms = tuple(
        module for block in find_blocks(model) for module in block.modules() if isinstance(module, _BatchNorm)
    )
    kept = {id(buffer) for norm in norms for buffer in norm.buffers()}
    statistics = {name: buffer for name, buffer in model.named_buffers() if id(buffer) in kept}
    return Trained(model, parameters, statistics, norms, lambda: None)


def train_lora(model: PreTrainedModel, rank: int, seed: int) -> Trained:
    """Low-rank changes of every projection in the blocks, through peft; the weights themselves stay in their type.

    Raises:
        SnpError: peft is not there.
    """
    if find_spec("peft") is None:
        raise SnpError("--train lora: needs peft, which is not here. Install it: pip install 'snp-llm[recover]'.")
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    model.eval().requires_grad_(False)
    names = inside(model)
    targets = [n for n, m in model.named_modules() if isinstance(m, Projection) and f"{n}.weight" in names]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, lora_dropout=0.0)
        adapted = LoraModel(model, config, "default")
    adapted.eval()
    parameters = {}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
            parameters[name] = parameter
    return Trained(model, parameters, {}, (), adapted.merge_and_unload)


def with_checkpoints(model: PreTrainedModel) -> None:
    """Lets every block of a model keep its inputs alone, and compute what is inside again for the gradient.

    Raises:
        SnpError: the model's blocks have batch norms, which would count everything twice.
    """
    blocks = find_blocks(model)
    if isinstance(blocks, Segments):
        raise SnpError(
            "--gradient-checkpointing: expected a model of transformer blocks; a convolutional network's batch norms "
            "would count every image twice. Use a smaller --batch-size."
        )
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
