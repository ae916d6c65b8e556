"""FLOPs and bytes that a pass of a cell takes. Times nothing."""

from transformers import PreTrainedModel

from snp_llm.evaluate.cells import Cell
from snp_llm.models.anatomy import text_modules
from snp_llm.models.size import attention_channels, mean_positions, text_weights, token_flops


def cell_flops(model: PreTrainedModel, cell: Cell) -> float:
    """FLOPs of a prompt or of one step, for one sequence; the head runs on one token of either."""
    head = head_weights(model)
    weights, attended = text_weights(model) - head, attention_channels(model)
    if cell.kind == "prefill":
        return cell.length * token_flops(weights, attended, mean_positions(cell.length)) + 2.0 * head
    return token_flops(weights + head, attended, cell.length + cell.new_tokens / 2)


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
