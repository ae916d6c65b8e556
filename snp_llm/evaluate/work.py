"""FLOPs and bytes that a pass of a cell takes. Times nothing."""

from collections.abc import Callable

from transformers import PreTrainedModel

from snp_llm.evaluate.cells import Cell
from snp_llm.models.size import attention_channels, image_flops, mean_positions, model_size, text_weights, token_flops
from snp_llm.models.text_part import text_modules


def cell_flops(model: PreTrainedModel, cell: Cell) -> float:
    """FLOPs of a prompt or of one step, for one sequence, or of one image."""
    return FLOPS[cell.kind](model, cell)


def prompt_flops(model: PreTrainedModel, cell: Cell) -> float:
    """FLOPs of a prompt, whose last token alone goes through the head."""
    head = head_weights(model)
    weights, attended = text_weights(model) - head, attention_channels(model)
    return cell.length * token_flops(weights, attended, mean_positions(cell.length)) + 2.0 * head


def step_flops(model: PreTrainedModel, cell: Cell) -> float:
    """FLOPs of one step of decoding, in the middle of all."""
    return token_flops(text_weights(model), attention_channels(model), cell.length + cell.new_tokens / 2)


FLOPS: dict[str, Callable[[PreTrainedModel, Cell], float]] = {
    "prefill": prompt_flops,
    "decode": step_flops,
    "classify": lambda model, cell: image_flops(model, cell.length),
}


def bytes_read(model: PreTrainedModel, cell: Cell) -> float:
    """Bytes of weights that a step, or a batch of images, reads."""
    return float(model_size(model, 1).bytes) if cell.kind == "classify" else weights_read(model)


def head_weights(model: PreTrainedModel) -> int:
    """Weights of the LM head, tied or not."""
    head = model.get_output_embeddings()
    return 0 if head is None else int(head.weight.numel())


def weights_read(model: PreTrainedModel) -> float:
    """Bytes of weights that one step reads: all that texts go through, without an embedding that is only looked up."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embeddings.weight
    modules = text_modules(model) - (set() if tied else {*embeddings.modules()})
    read = {id(p): p for module in modules for p in module.parameters(recurse=False)}
    return float(sum(p.numel() * p.element_size() for p in read.values()))
