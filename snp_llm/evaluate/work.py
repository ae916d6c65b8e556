"""FLOPs and bytes that a pass of a cell takes. Times nothing."""

from transformers import PreTrainedModel

from snp_llm.evaluate.cells import Cell
from snp_llm.models.anatomy import find_blocks, find_sites
from snp_llm.models.families.decoders import find_family
from snp_llm.models.size import model_size


def cell_flops(model: PreTrainedModel, cell: Cell) -> float:
    """FLOPs of a prompt or of one step, for one sequence; the head runs on one token of either."""
    head = head_weights(model)
    linear = model_size(model, 1).flops - 4.0 * attention_channels(model) - 2.0 * head
    attended = 4.0 * attention_channels(model)
    if cell.kind == "prefill":
        return cell.length * (linear + attended * (cell.length + 1) / 2) + 2.0 * head
    return linear + attended * (cell.length + cell.new_tokens / 2) + 2.0 * head


def head_weights(model: PreTrainedModel) -> int:
    """Weights of the LM head, tied or not."""
    head = model.get_output_embeddings()
    return 0 if head is None else int(head.weight.numel())


def attention_channels(model: PreTrainedModel) -> int:
    """Channels of all blocks' attention, whose scores cost FLOPs that are no weights'."""
    family = find_family(model.config)
    sites = find_sites(find_blocks(model), family)
    return sum(site.channels for site in sites if site.heads is not None)


def weights_read(model: PreTrainedModel) -> float:
    """Bytes of weights that one step reads: all, without an embedding that is only looked up."""
    size = model_size(model, 1)
    tied = model.get_output_embeddings() is not None and (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    looked_up = 0 if tied else sum(p.numel() for p in model.get_input_embeddings().parameters())
    return size.bytes * (1 - looked_up / size.parameters)
