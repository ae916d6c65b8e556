"""SliceGPT: every half-block's stream is rotated onto its principal directions, and the last of them are sliced off.

S. Ashkboos, M. L. Croci, M. Gennari do Nascimento, T. Hoefler, J. Hensman, "SliceGPT: Compress Large Language Models by
Deleting Rows and Columns", arXiv 2401.15024. LayerNorm becomes RMSNorm: its scale and shift go into the projections
that read it, its subtraction of the mean into those that write the stream. Rotations of their own before attention and
before the FFN put a matrix Q on every skip connection. Those count here: a sparsity means as many parameters in the
whole model as a peer has that removes that fraction of the block-linear ones.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from snp_llm.models.anatomy import find_blocks
from snp_llm.models.blocks import capture_calls
from snp_llm.models.calls import first_tensor
from snp_llm.models.families.decoders import find_family
from snp_llm.models.projections import projection
from snp_llm.models.size import model_size
from snp_llm.runtime.errors import SnpError

from .common import BATCH, Method, Names, Prune, Pruned, names_of


@dataclass(frozen=True)
class Stream:
    """What reads or writes the residual stream besides a family's projections.

    Attributes:
        attention_norm, ffn_norm: before each half of a block, as paths in it.
        final_norm: before the LM head, as a path in the model.
        positions: embedding of positions that is added to that of tokens, or None.
    """

    attention_norm: str
    ffn_norm: str
    final_norm: str
    positions: str | None = None


STREAMS = {
    "opt": Stream(
        "self_attn_layer_norm",
        "final_layer_norm",
        "model.decoder.final_layer_norm",
        positions="model.decoder.embed_positions",
    ),
    "llama": Stream("input_layernorm", "post_attention_layernorm", "model.norm"),
}


@dataclass(frozen=True)
class Norm:
    """A LayerNorm or RMSNorm in numbers: `x / rms(x) * weight + bias`, of x less its mean where `centred`."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    centred: bool


class UnitNorm(nn.Module):
    """RMSNorm without weights, over `d` directions of which only the first are still there."""

    def __init__(self, d: int, eps: float) -> None:
        super().__init__()
        self.d, self.eps = d, eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) / self.d + self.eps)).to(x.dtype)


class SlicedBlock(nn.Module):
    """A decoder block without norm weights; with `shortcuts`, its stream changes its basis in either half.

    Attributes:
        block: the projections, the attention module and the activation function of the dense block.
        shortcuts: Q on the skip connection around attention and around the FFN, or None for the identity.
    """

    def __init__(self, block: nn.Module, names: Names, norms: tuple[UnitNorm, UnitNorm]) -> None:
        super().__init__()
        self.block, self.names = block, names
        self.attention_norm, self.ffn_norm = norms
        self.shortcuts = nn.ParameterList()

    def attend(self, hidden: Tensor, **call: Any) -> Tensor:
        """What attention adds to the stream."""
        call = {name: value for name, value in call.items() if name != "use_cache"}
        return first_tensor(self.block.get_submodule(self.names.attention)(self.attention_norm(hidden), **call))

    def feed(self, hidden: Tensor) -> Tensor:
        """What the FFN adds to the stream."""
        x, (parent, _, _) = self.ffn_norm(hidden), self.names.ffn_out.rpartition(".")
        if parent:
            return self.block.get_submodule(parent)(x)
        inner = projection(self.block, self.names.ffn_in[0])(x)
        return projection(self.block, self.names.ffn_out)(self.block.activation_fn(inner))

    def forward(self, hidden: Tensor, **call: Any) -> Tensor:
        around_attention, around_ffn = self.shortcuts
        hidden = hidden @ around_attention + self.attend(hidden, **call)
        return hidden @ around_ffn + self.feed(hidden)


def stream_of(model: PreTrainedModel) -> Stream:
    """Raises SnpError for models whose stream is not that of a pre-norm OPT or Llama."""
    family = find_family(model.config)
    embeds = model.get_input_embeddings().weight.shape[1]
    if (
        family.model_type not in STREAMS
        or not getattr(model.config, "do_layer_norm_before", True)
        or getattr(model.config, "_remove_final_layer_norm", False)
        or embeds != model.config.hidden_size
    ):
        raise SnpError(
            f"slicegpt: expected a pre-norm model of {', '.join(STREAMS)} with unprojected embeddings, got "
            f"model_type {model.config.model_type!r}."
        )
    return STREAMS[family.model_type]


def read_norm(norm: nn.Module) -> Norm:
    centred = isinstance(norm, nn.LayerNorm)
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    weight, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
    return Norm(
        None if weight is None else weight.detach().double(),
        None if bias is None else bias.detach().double(),
        float(eps or torch.finfo(torch.float32).eps),
        centred,
    )


def read_from(reader: nn.Linear, norm: Norm) -> None:
    """Lets a projection that reads a norm take over its scale and shift, in place."""
    W = reader.weight.detach().double()
    if norm.bias is not None:
        shift = W @ norm.bias
        _set(reader, bias=shift if reader.bias is None else reader.bias.detach().double() + shift)
    if norm.weight is not None:
        _set(reader, W * norm.weight)


def write_centred(writer: nn.Linear) -> None:
    """Takes the mean over directions off what a projection writes into the stream, in place."""
    W = writer.weight.detach().double()
    bias = None if writer.bias is None else writer.bias.detach().double()
    _set(writer, W - W.mean(0), bias=None if bias is None else bias - bias.mean())


def _set(module: nn.Module, weight: Tensor | None = None, *, bias: Tensor | None = None) -> None:
    old = module.weight
    if weight is not None:
        module.weight = nn.Parameter(weight.to(old.device, old.dtype).contiguous(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.to(old.device, old.dtype).contiguous(), requires_grad=False)


def absorb_norms(model: PreTrainedModel) -> list[SlicedBlock]:
    """Rewrites a model without norm weights and with a stream whose mean over directions is zero where it has to be.

    It puts out what it did. Works in place. The LM head becomes a tensor of its own, and blocks can be run by halves.

    Args:
        model: a copy of the dense one.
    """
    stream = stream_of(model)
    blocks = find_blocks(model)
    final = read_norm(model.get_submodule(stream.final_norm))
    d = model.config.hidden_size
    sliced = []
    for index, block in enumerate(blocks):
        names = names_of(block)
        norms = [read_norm(block.get_submodule(path)) for path in (stream.attention_norm, stream.ffn_norm)]
        for paths, norm in zip((names.qkv, names.ffn_in), norms, strict=True):
            for path in paths:
                read_from(projection(block, path), norm)
        for path in (names.attention_out, names.ffn_out):
            if final.centred:
                write_centred(projection(block, path))
        for path in (stream.attention_norm, stream.ffn_norm):
            block.set_submodule(path, nn.Identity())
        sliced.append(SlicedBlock(block, names, (UnitNorm(d, norms[0].eps), UnitNorm(d, norms[1].eps))))
        blocks[index] = sliced[-1]
    old = model.get_output_embeddings()
    head = nn.Linear(d, old.weight.shape[0], bias=False, device=old.weight.device, dtype=old.weight.dtype)
    head.weight = old.weight  # shared with the embedding where it is tied; replaced, not changed, by the next line
    head.bias = old.bias
    read_from(head, final)
    model.set_output_embeddings(head)
    model.set_submodule(stream.final_norm, UnitNorm(d, final.eps))
    for embedding in _embeddings(model, stream):
        if final.centred:
            W = embedding.weight.detach().double()
            _set(embedding, W - W.mean(1, keepdim=True))
    return sliced


def _embeddings(model: PreTrainedModel, stream: Stream) -> list[nn.Module]:
    positions = [model.get_submodule(stream.positions)] if stream.positions else []
    return [model.get_input_embeddings(), *positions]


def principal_directions(signals: list[Tensor], width: int) -> Tensor:
    """The first `width` eigenvectors of `sum x^T x`, largest eigenvalue first, (d, width), float64."""
    covariance = sum(torch.einsum("bti,btj->ij", x, x).double() for x in signals)
    assert isinstance(covariance, Tensor)
    return torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :width]


@torch.no_grad()
def slice_model(dense: PreTrainedModel, tokens: Tensor, width: int) -> PreTrainedModel:
    """A model whose stream has `width` directions; the dense one, rotated, if that is all of them.

    The rotation of each half-block is the PCA of what its norm gives on the calibration text, with everything before
    it already sliced.

    Args:
        dense: left as it is.
        tokens: calibration windows, (N, T).
        width: directions to keep, 1 to hidden_size.
    """
    model = copy.deepcopy(dense)
    stream = stream_of(model)
    sliced = absorb_norms(model)
    final_norm = model.get_submodule(stream.final_norm)
    captured = [capture_calls(model, nn.ModuleList(sliced), batch) for batch in tokens.split(BATCH)]
    hidden = [first for first, _ in captured]  # one (batch, T, d) a batch, in the dense basis throughout

    def rotate(norm: nn.Module) -> Tensor:
        Q = principal_directions([norm(x) for x in hidden], width)
        projection = (Q @ Q.T).to(hidden[0].dtype)
        for b, x in enumerate(hidden):
            hidden[b] = x @ projection
        return Q

    Q = rotate(sliced[0].attention_norm)
    for embedding in _embeddings(model, stream):
        _set(embedding, embedding.weight.detach().double() @ Q)
    followers = [*(block.attention_norm for block in sliced[1:]), final_norm]
    for index, (block, after) in enumerate(zip(sliced, followers, strict=True)):
        names = block.names
        for b, x in enumerate(hidden):
            hidden[b] = x + block.attend(x, **captured[b][1][index].kwargs)
        Q_ffn = rotate(block.ffn_norm)
        for b, x in enumerate(hidden):
            hidden[b] = x + block.feed(x)
        Q_after = rotate(after)
        for paths, out, enter, leave in (
            (names.qkv, names.attention_out, Q, Q_ffn),
            (names.ffn_in, names.ffn_out, Q_ffn, Q_after),
        ):
            for path in paths:
                reader = projection(block.block, path)
                _set(reader, reader.weight.detach().double() @ enter)
            writer = projection(block.block, out)
            bias = None if writer.bias is None else leave.T @ writer.bias.detach().double()
            _set(writer, leave.T @ writer.weight.detach().double(), bias=bias)
            block.shortcuts.append(nn.Parameter((enter.T @ leave).to(writer.weight), requires_grad=False))
        Q = Q_after
    head = model.get_output_embeddings()
    _set(head, head.weight.detach().double() @ Q)
    return model.eval()


def sliced_parameters(dense: PreTrainedModel, width: int) -> int:
    """Parameters of `slice_model(dense, _, width)`, Q on the skip connections included.

    Where embedding and LM head were one tensor, slicing needs one each. The same function can be stored with that
    tensor kept whole between Q of the first and of the last stream; the smaller of the two counts.
    """
    stream = stream_of(dense)
    blocks = find_blocks(dense)
    total = 0
    for block in blocks:
        names = names_of(block)
        for paths, norm in ((names.qkv, stream.attention_norm), (names.ffn_in, stream.ffn_norm)):
            shifts = read_norm(block.get_submodule(norm)).bias is not None
            for path in paths:
                reader = projection(block, path)
                total += reader.weight.shape[0] * (width + int(shifts or reader.bias is not None))
        for path in (names.attention_out, names.ffn_out):
            written = projection(block, path)
            total += width * (written.weight.shape[1] + int(written.bias is not None))
        total += 2 * width**2
    tokens, *positions = (embedding.weight for embedding in _embeddings(dense, stream))
    total += sum(weight.shape[0] * width for weight in positions)
    rows, d = tokens.shape
    head, shifts = dense.get_output_embeddings(), read_norm(dense.get_submodule(stream.final_norm)).bias is not None
    apart = (rows + head.weight.shape[0]) * width + head.weight.shape[0] * int(shifts or head.bias is not None)
    if head.weight is not tokens:
        return total + apart
    return total + min(apart, tokens.numel() + 2 * d * width + d * int(shifts))


def prepare(dense: PreTrainedModel, tokens: Tensor, _seed: int) -> Prune:
    size, d = model_size(dense, 1), dense.config.hidden_size
    counts = {width: sliced_parameters(dense, width) for width in range(1, d + 1)}

    def prune(sparsity: float) -> Pruned:
        target = size.parameters - sparsity * size.block_linear
        width = min(counts, key=lambda w: abs(counts[w] - target))
        achieved = (size.parameters - counts[width]) / size.block_linear
        return Pruned(slice_model(dense, tokens, width), achieved)

    return prune


METHODS = (Method("slicegpt", "SliceGPT", "Ashkboos et al., arXiv 2401.15024", prepare),)
