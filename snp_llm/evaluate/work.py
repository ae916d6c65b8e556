"""FLOPs and bytes that a pass of a cell takes. Times nothing."""

from transformers import PreTrainedModel

from snp_llm.evaluate.cells import Cell
from snp_llm.models.size import attention_channels, linear_weights, mean_positions, model_size, token_flops


def cell_flops(model: PreTrainedModel, cell: Cell) -> float:
    """FLOPs of a prompt or of one step, for one sequence; the head runs on one token of either."""
    head = head_weights(model)
    weights, attended = linear_weights(model) - head, attention_channels(model)
    if cell.kind == "prefill":
        return cell.length * token_flops(weights, attended, mean_positions(cell.length)) + 2.0 * head
    return token_flops(weights + head, attended, cell.length + cell.new_tokens / 2)


def head_weights(model: PreTrainedModel) -> int:
    """Weights of the LM head, tied or not."""
    head = model.get_output_embeddings()
    return 0 if head is None else int(head.weight.numel())


def weights_read(model: PreTrainedModel) -> float:
    """Bytes of weights that one step reads: all, without an embedding that is only looked up."""
    size = model_size(model, 1)
    tied = model.get_output_embeddings() is not None and (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    looked_up = 0 if tied else sum(p.numel() for p in model.get_input_embeddings().parameters())
    return size.bytes * (1 - looked_up / size.parameters)
