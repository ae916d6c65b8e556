"""MoDeGPT: pairs of matrices are decomposed together, by Nyström, by column selection and by SVD.

C.-H. Lin, S. Gao, J. S. Smith, A. Patel, S. Tuli, Y. Shen, H. Jin, Y.-C. Hsu, "MoDeGPT: Modular Decomposition for Large
Language Model Compression", arXiv 2408.09632. FFN channels with the largest ridge leverage scores stay and the
out-projection is refitted (Nyström); channels of queries and keys with the largest product of norms stay; values and
out-projection of a group become the best pair of lower rank. All statistics are the dense model's.

A narrower pair of an attention is written into the dense shape, with zeros in the place of what has gone, which puts
out the same; its parameters are counted as if it were cut. Channels of queries and keys that a rotary embedding turns
together go together.
"""

import copy
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from snp_llm.linalg.gram import Moments, add_moments, empty_moments, gram_matrix
from snp_llm.models.blocks import watch_inputs, watch_outputs
from snp_llm.models.projections import bias_of, projection, weight_of
from snp_llm.models.site import Site
from snp_llm.models.surgery import prune_site

from .common import BATCH, Method, Prune, Pruned, best_units, least_squares, model_sites, names_of, pruned
from .widths import INFLUENCE, TEMPERATURES, UNIFORM, Plan, block_influence, influence_shares, with_plans

DAMPENING = 1e-4  # of the mean of a Gram matrix's diagonal, added to all of it before it is inverted
REFERENCE = "Lin et al., arXiv 2408.09632"
NEAREST = 8  # ranks of a head are multiples of this


def leverage_scores(gram: Tensor) -> Tensor:
    """Ridge leverage `[C (C + I)^-1]_ii` of each channel, C scaled to a mean square of one, (n,)."""
    scaled = gram / gram.diagonal().mean()
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(scaled + identity, scaled).diagonal()


def nystrom(W: Tensor, gram: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Channels that stay, ascending, (width,), and `W C S (S^T C S)^-1` on them, (d_out, width).

    Args:
        W: out-projection weight, (d_out, n), float64.
        gram: C, of its inputs, (n, n), float64.
        width: channels to keep.
    """
    kept = best_units(leverage_scores(gram), width)
    ridge = gram.clone()
    ridge.diagonal().add_(DAMPENING * gram.diagonal().mean())
    return kept, least_squares(W, ridge, kept)


def best_pair(gram: Tensor, V: Tensor, W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`V'` (rank, d) and `W'` (d_out, rank) with the least `tr((WV - W'V') C (WV - W'V')^T)`.

    Args:
        gram: C, of the inputs, (d, d), float64.
        V: (s, d).
        W: (d_out, s).
        rank: at most s.
    """
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp(min=values[-1] * 1e-12).sqrt()  # C = root root^T
    U, S, Vh = torch.linalg.svd(W @ (V @ root), full_matrices=False)
    return (S[:rank, None] * Vh[:rank]) @ torch.linalg.pinv(root), U[:, :rank]


def selection_scores(queries: Tensor, keys: Tensor) -> Tensor:
    """`||C_q^1/2[:, i]|| ||C_k^1/2[:, i]||` of each channel of a head, from the diagonals of both, (s,)."""
    return queries.sqrt() * keys.sqrt()


@torch.no_grad()
def input_moments(dense: PreTrainedModel, modules: list[nn.Module], tokens: Tensor) -> list[Moments]:
    """Moments of what some projections of the dense model read, in one pass."""
    moments = [empty_moments(weight_of(m).shape[1], m.weight.dtype, m.weight.device) for m in modules]

    def add(index: int, x: Tensor) -> None:
        moments[index] = add_moments(moments[index], x)

    with watch_inputs({module: partial(add, index) for index, module in enumerate(modules)}):
        for batch in tokens.split(BATCH):
            dense.base_model(batch.to(dense.device), use_cache=False)
    return moments


@torch.no_grad()
def output_energies(dense: PreTrainedModel, modules: list[nn.Module], tokens: Tensor) -> list[Tensor]:
    """Sum of squares of every channel that some projections of the dense model put out, (d_out,), float64."""
    sums = [torch.zeros(len(weight_of(m)), dtype=torch.float64) for m in modules]

    def add(total: Tensor, x: Tensor) -> None:
        total += x.reshape(-1, x.shape[-1]).double().square().sum(0).to(total.device)

    with watch_outputs({module: partial(add, total) for module, total in zip(modules, sums, strict=True)}):
        for batch in tokens.split(BATCH):
            dense.base_model(batch.to(dense.device), use_cache=False)
    return sums


def prepare_ffn(dense: PreTrainedModel, tokens: Tensor, _seed: int, plan: Plan) -> Prune:
    """FFNs alone, by Nyström."""
    planned, (_, blocks, sites) = plan(dense, tokens), model_sites(dense)
    ffns = [site for site in sites if site.kind == "ffn"]
    moments = input_moments(dense, [projection(blocks[s.block], s.path) for s in ffns], tokens)

    def prune(sparsity: float) -> Pruned:
        model = copy.deepcopy(dense)
        _, new, _ = model_sites(model)
        widths = [w for site, w in zip(sites, planned(sparsity), strict=True) if site.kind == "ffn"]
        for site, seen, width in zip(ffns, moments, widths, strict=True):
            cut_ffn(new[site.block], site, gram_matrix(seen, centred=False), width)
        return pruned(dense, model)

    return prune


def cut_ffn(block: nn.Module, site: Site, gram: Tensor, width: int) -> None:
    if width < site.units:
        W = weight_of(projection(block, site.path)).double()
        kept, weight = nystrom(W, gram, width)
        prune_site(block, site, kept.cpu(), weight, bias_of(projection(block, site.path)))


def prepare_all(dense: PreTrainedModel, tokens: Tensor, _seed: int, *, temperature: float | None) -> Prune:
    """FFNs, queries with keys, and values with the out-projection, each losing the same share within a block."""
    _, blocks, sites = model_sites(dense)
    names = [names_of(block) for block in blocks]
    ffns = [site for site in sites if site.kind == "ffn"]
    moments = input_moments(dense, [projection(blocks[s.block], s.path) for s in ffns], tokens)
    reads = input_moments(dense, [projection(b, n.qkv[0]) for b, n in zip(blocks, names, strict=True)], tokens)
    qk = [projection(b, path) for b, n in zip(blocks, names, strict=True) for path in n.qkv[:2]]
    energies = output_energies(dense, qk, tokens)
    influence = None if temperature is None else block_influence(dense, tokens)
    rotary = bool(getattr(dense.config, "rope_parameters", None))

    def prune(sparsity: float) -> Pruned:
        model = copy.deepcopy(dense)
        _, new, _ = model_sites(model)
        shares = torch.full((len(blocks),), sparsity, dtype=torch.float64)
        if influence is not None and temperature is not None:
            shares = influence_shares(influence, temperature, sparsity)
        gone, owed = 0.0, 0.0
        for index, (attention, ffn) in enumerate(zip(sites[::2], sites[1::2], strict=True)):
            target = float(shares[index]) * (attention.parameters + ffn.parameters) + owed
            heads = attention.heads
            assert heads is not None
            rank = min(heads.size, max(NEAREST, NEAREST * round(heads.size * (1 - float(shares[index])) / NEAREST)))
            queries, keys = energies[2 * index : 2 * index + 2]
            narrow_queries(new[index], attention, (queries, keys), rank, rotary=rotary)
            narrow_values(new[index], attention, augmented(reads[index]), rank)
            lost = attention.parameters * (heads.size - rank) / heads.size
            width = ffn.units - max(0, round((target - lost) / ffn.cost))
            width = min(ffn.units, max(8, 8 * round(width / 8)))
            cut_ffn(new[index], ffn, gram_matrix(moments[index], centred=False), width)
            lost += (ffn.units - width) * ffn.cost
            gone, owed = gone + lost, target - lost
        return Pruned(model, gone / sum(site.parameters for site in sites))

    return prune


def augmented(moments: Moments) -> Tensor:
    """Gram matrix of inputs with a one behind them, for projections with a bias, (d + 1, d + 1), float64."""
    gram = gram_matrix(moments, centred=False)
    first = moments.first.double()[:, None]
    count = torch.full((1, 1), float(moments.tokens), dtype=gram.dtype, device=gram.device)
    return torch.cat([torch.cat([gram, first], 1), torch.cat([first.T, count], 1)])


def narrow_queries(block: nn.Module, site: Site, energies: tuple[Tensor, Tensor], rank: int, *, rotary: bool) -> None:
    """Zeroes channels of queries and keys, the same in all heads of a group, in place.

    Args:
        block: of the site.
        site: its attention.
        energies: sums of squares of what the projections of queries and of keys put out.
        rank: channels of a head that stay.
        rotary: whether channels i and i + size / 2 are turned together.
    """
    heads, (q, k, _) = site.heads, names_of(block).qkv
    assert heads is not None
    groups = heads.query // heads.key_value
    queries = energies[0].reshape(heads.key_value, groups, heads.size).sum(1)
    scores = selection_scores(queries, energies[1].reshape(heads.key_value, heads.size))
    if rotary:
        halves = scores.reshape(heads.key_value, 2, heads.size // 2).square().sum(1)
        kept = torch.stack([best_units(row, rank // 2) for row in halves])
        kept = torch.cat([kept, kept + heads.size // 2], 1)
    else:
        kept = torch.stack([best_units(row, rank) for row in scores])
    mask = torch.zeros(heads.key_value, heads.size).scatter_(1, kept.cpu(), 1.0)
    for path, rows in ((q, mask.repeat_interleave(groups, 0)), (k, mask)):
        _scale_rows(projection(block, path), rows.flatten())


def narrow_values(block: nn.Module, site: Site, gram: Tensor, rank: int) -> None:
    """Gives values and out-projection of every group the best pair of a lower rank, in place.

    Args:
        block: of the site.
        site: its attention.
        gram: `augmented`, of what the projection of values reads.
        rank: channels of a head that stay.
    """
    heads, names = site.heads, names_of(block)
    assert heads is not None
    value, out = projection(block, names.qkv[2]), projection(block, names.attention_out)
    V, W = weight_of(value).double(), weight_of(out).double()
    bias = bias_of(value)
    V = torch.cat([V, torch.zeros(len(V), 1, dtype=V.dtype) if bias is None else bias.double()[:, None]], 1)
    if bias is None:
        gram = gram.clone()
        gram[-1, :-1], gram[:-1, -1] = 0, 0
    new_V, new_W = torch.zeros_like(V), torch.zeros_like(W)
    groups, size = heads.query // heads.key_value, heads.size
    for unit in range(heads.key_value):
        rows = slice(unit * size, (unit + 1) * size)
        readers = [slice(h * size, (h + 1) * size) for h in range(unit * groups, (unit + 1) * groups)]
        stacked = torch.cat([W[:, columns] for columns in readers])  # (groups * d_out, size)
        narrow, wide = best_pair(gram, V[rows], stacked, rank)
        new_V[rows][:rank] = narrow
        for columns, part in zip(readers, wide.split(len(W)), strict=True):
            new_W[:, columns.start : columns.start + rank] = part
    value.weight = nn.Parameter(new_V[:, :-1].to(value.weight), requires_grad=False)
    out.weight = nn.Parameter(new_W.to(out.weight), requires_grad=False)
    if value.bias is not None:
        value.bias = nn.Parameter(new_V[:, -1].to(value.bias), requires_grad=False)


def _scale_rows(module: nn.Module, scale: Tensor) -> None:
    module.weight = nn.Parameter(module.weight.detach() * scale[:, None].to(module.weight), requires_grad=False)
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias.detach() * scale.to(module.bias), requires_grad=False)


ALL: tuple[tuple[str, float | None], ...] = (("", None), *((f"-influence-{t:g}", t) for t in TEMPERATURES))
METHODS = (
    *with_plans(
        "modegpt-ffn",
        "MoDeGPT, FFN alone",
        REFERENCE,
        prepare_ffn,
        {"": ("", UNIFORM["-ffn"][1])}
        | {
            suffix: (f", widths by influence / {suffix.rpartition('-')[2]}", plan)
            for suffix, (_, plan) in INFLUENCE.items()
        },
    ),
    *(
        Method(
            f"modegpt{suffix}",
            f"MoDeGPT{'' if t is None else f', widths by influence / {t:g}'}",
            REFERENCE,
            partial(prepare_all, temperature=t),
            "MoDeGPT",
        )
        for suffix, t in ALL
    ),
)
