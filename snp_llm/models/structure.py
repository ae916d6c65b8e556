"""Which modules of a block are its attention and its FFN, told by the names and shapes of their projections.

Two tables hold what attentions and FFNs look like. What is in neither stays as it is: convolutions, recurrences and
linear attention of hybrids, and whatever else a block has.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from snp_llm.models.experts import of_experts
from snp_llm.models.projections import Projection, weight_of
from snp_llm.models.site import Heads
from snp_llm.runtime.errors import SnpError

# Rows of in-projections: those of every head one below the other, all queries before keys before values in "parts" (in
# one projection, or one each), or the queries, key and value of a KV group together in "groups", or queries, values and
# keys of equally many heads, shard after shard, in "shards".
Order = Literal["parts", "groups", "shards"]


@dataclass(frozen=True)
class AttentionNames:
    """What the projections of an attention are called, within its module.

    Attributes:
        queries, keys, values: in-projections; one name where they are fused.
        out: names that the out-projection may have.
        order: of the rows.
    """

    queries: str
    keys: str
    values: str
    out: tuple[str, ...]
    order: Order = "parts"


ATTENTIONS = (
    AttentionNames("q_proj", "k_proj", "v_proj", ("o_proj", "out_proj", "dense", "Wo")),
    AttentionNames("q_proj.linear", "k_proj.linear", "v_proj.linear", ("o_proj.linear",)),
    AttentionNames("Wq", "Wk", "Wv", ("dense",)),
    AttentionNames("qkv_proj", "qkv_proj", "qkv_proj", ("o_proj", "out_proj")),
    AttentionNames("c_attn", "c_attn", "c_attn", ("c_proj",)),
    AttentionNames("Wqkv", "Wqkv", "Wqkv", ("out_proj", "Wo")),
    AttentionNames("query_key_value", "query_key_value", "query_key_value", ("dense",), "groups"),
    # Keys and values out of a latent vector that all heads share (MLA); queries too, or from the stream.
    AttentionNames("q_b_proj", "kv_b_proj", "kv_b_proj", ("o_proj",)),
    AttentionNames("q_proj", "kv_b_proj", "kv_b_proj", ("o_proj",)),
)
LATENT = ("q_a_proj", "kv_a_proj_with_mqa")  # what makes such vectors; they stay as they are
GATES = ("gate_proj", "g_proj", "q_gate_proj")  # on heads, or on all their channels

# In-projections of an FFN, and its out-projection. One whose rows are twice its channels has gate and up in it.
FFNS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("fc1",), "fc2"),
    (("fc_in",), "fc_out"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("input_linear",), "output_linear"),
    (("Wi",), "Wo"),
    (("0",), "2"),
)

HEAD_SIZES = ("v_head_dim", "head_dim", "head_size", "attn_head_size")  # attributes: channels of a head
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")  # attributes: query heads
SHARDS = "mp_num"  # attribute: shards of rows, whatever the number of heads
IN_GROUPS = "multi_query"  # attribute of attentions that may have one key and value for all queries, which come last
ELSEWHERE = ("cross", "encoder_attn")  # in the names of attentions to something else than the text


@dataclass(frozen=True)
class HeadRows:
    """An in-projection, or another tensor with rows for heads.

    Attributes:
        path: from the block.
        query: rows for every query head.
        key_value: rows for every key-value head.
        order: of the rows.
    """

    path: str
    query: int
    key_value: int
    order: Order = "parts"


@dataclass(frozen=True)
class Attention:
    """An attention in a block.

    Attributes:
        module: its path.
        rows: of all that has rows for heads.
        out: path of the out-projection.
        heads: how many, and channels of each in the out-projection.
        shards: of its rows, which must keep equally many heads; 0 where rows are not in "shards".
        stay: why its heads cannot go; empty where they can.
    """

    module: str
    rows: tuple[HeadRows, ...]
    out: str
    heads: Heads
    shards: int = 0
    stay: str = ""


@dataclass(frozen=True)
class Ffn:
    """An FFN in a block.

    Attributes:
        rows: paths of its in-projections, each with the rows that a channel has in it: two where gate and up are fused.
        out: path of the out-projection.
        channels: how many.
        stay: why they cannot go; empty where they can.
    """

    rows: tuple[tuple[str, int], ...]
    out: str
    channels: int
    stay: str = ""


def find_attention(block: nn.Module) -> Attention | None:
    """The attention of a block, or None where the block has another mixer.

    Raises:
        SnpError: there are several, or the shapes of their projections do not fit together.
    """
    found: dict[str, AttentionNames] = {}
    for path, module in block.named_modules():
        names = next((names for names in ATTENTIONS if _is(module, names)), None)
        if names is not None and not _strangers(module, names) and not any(word in path for word in ELSEWHERE):
            found[path] = names
    if not found or fills_keys(block) is not None:
        return None
    if len(found) > 1:
        raise SnpError(f"{', '.join(found)}: expected one attention in a block, got {len(found)}.")
    ((path, names),) = found.items()
    return _read_attention(block.get_submodule(path), path, names)


def fills_keys(block: nn.Module) -> Any | None:
    """The attention of a block, where later blocks read its keys and values; they need all of its heads."""
    for module in block.modules():
        if getattr(module, "store_full_length_kv", False) and getattr(module.config, "num_kv_shared_layers", 0):
            return module
    return None


def nearly_attentions(block: nn.Module) -> dict[str, list[str]]:
    """Modules of a block with the projections of an attention, and what else is in them, whose part is not known."""
    found = {}
    for path, module in block.named_modules():
        names = next((names for names in ATTENTIONS if _is(module, names)), None)
        if names is not None and (strangers := _strangers(module, names)):
            found[path] = strangers
    return found


def find_ffn(block: nn.Module) -> Ffn | None:
    """The FFN of a block, or None where it has none.

    Raises:
        SnpError: there are several, or the shapes of its projections do not fit together.
    """
    found = {}
    for path, module in block.named_modules():
        if of_experts(path):
            continue  # which `find_experts` reads
        names = next((names for names in FFNS if _has(module, *names[0], names[1])), None)
        children = [name for name, child in module.named_children() if isinstance(child, Projection)]
        if names is not None and (path == "" or {*children} == {*names[0], names[1]}):
            found[path] = names
    if not found:
        return None
    if len(found) > 1:
        raise SnpError(f"{', '.join(found)}: expected one FFN in a block, got {len(found)}.")
    ((path, (inwards, outwards)),) = found.items()
    module = block.get_submodule(path)
    channels = _columns(module, outwards)
    if not channels:
        return Ffn((), _join(path, outwards), 0)
    rows = tuple((_join(path, name), _rows(module, name) // channels) for name in inwards)
    for name, (inward, times) in zip(inwards, rows, strict=True):
        if times not in ((1,) if len(inwards) > 1 else (1, 2)) or times * channels != _rows(module, name):
            raise SnpError(
                f"{inward}: expected as many rows as {_join(path, outwards)} has columns, {channels:,}, or twice as "
                f"many in one projection for gate and up; got {_rows(module, name):,}. The config does not fit the "
                "weights, or this is no FFN that is known here."
            )
    more, stay = _other_channels(module, path, channels, {*inwards, outwards}) if path else ((), "")
    if getattr(module, "activation_sparsity", 0):
        stay = "which of them are on depends on the mean and the spread of all"
    return Ffn((*rows, *more), _join(path, outwards), channels, stay)


def _read_attention(module: nn.Module, path: str, names: AttentionNames) -> Attention:
    out = next(out for out in names.out if _has(module, out))
    columns, size = _columns(module, out), _head_size(module, out)
    ins = list(dict.fromkeys((names.queries, names.keys, names.values)))
    totals = {name: _rows(module, name) for name in ins}
    query = columns // size
    if len(ins) == 1:
        key_value = (totals[ins[0]] - columns) // (2 * size)
        fits = query * size == columns and columns + 2 * key_value * size == totals[ins[0]]
        per_head = {ins[0]: (size, 2 * size)}
    elif len(ins) == 2:  # keys and values in one, of as many heads
        key_value = query
        per_head = {ins[0]: (totals[ins[0]] // query, 0), ins[1]: (0, totals[ins[1]] // query)}
        fits = query * size == columns and all(total % query == 0 for total in totals.values())
    else:
        key_value = totals[names.values] // size
        counts = (query, key_value, key_value)
        fits = query * size == columns and key_value * size == totals[names.values]
        fits = (
            fits and key_value > 0 and all(totals[name] % count == 0 for name, count in zip(ins, counts, strict=True))
        )
        q, k, v = (totals[name] // max(1, count) for name, count in zip(ins, counts, strict=True))
        per_head = {ins[0]: (q, 0), ins[1]: (0, k), ins[2]: (0, v)}
        fits = fits and q in (k, 2 * k)  # twice with a gate in it
    if not fits or key_value < 1 or query % key_value:
        channels = totals[ins[0]] - columns if len(ins) == 1 else 2 * totals.get(names.values, 0)
        raise SnpError(
            f"{path}: expected query heads that split evenly into KV groups, got {columns:,} query and "
            f"{channels / 2:,.0f} key channels in heads of {size}. The config does not fit the weights."
        )
    heads, shards = Heads(query, key_value, size), getattr(module, SHARDS, 0)
    order: Order = "shards" if shards else "groups" if hasattr(module, IN_GROUPS) else names.order
    rows = [HeadRows(_join(path, name), *per_head[name], order) for name in ins]
    more, stay = _other_rows(module, path, heads, {*ins, out})
    if shards and query % shards:
        stay = f"they do not split evenly into the {shards} shards that its rows are in"
    return Attention(path, (*rows, *more), _join(path, out), heads, shards, stay)


def _other_channels(
    module: nn.Module, path: str, channels: int, known: set[str]
) -> tuple[tuple[tuple[str, int], ...], str]:
    """What else in an FFN has a value for every channel, and why channels cannot go if they cannot."""
    rows, stay = [], ""
    for name, child in module.named_modules():
        if name in known:
            continue
        for key, tensor in child.named_parameters(recurse=False):
            if tensor.dim() == 1 and len(tensor) == channels and name:
                stay = "a norm over all of them at once would change"
            elif tensor.dim() == 1 and len(tensor) == channels:
                rows.append((_join(path, key), 1))
    return tuple(rows), stay


def _other_rows(module: nn.Module, path: str, heads: Heads, known: set[str]) -> tuple[list[HeadRows], str]:
    """What else in an attention has rows for heads, and why they cannot go if they cannot."""
    rows, stay = [], ""
    counts = {heads.query: (1, 0), heads.query * heads.size: (heads.size, 0)}
    for name, child in module.named_modules():
        if isinstance(child, Projection):
            if name.rpartition(".")[2] in GATES and len(weight_of(child)) in counts:
                rows.append(HeadRows(_join(path, name), *counts[len(weight_of(child))]))
            continue
        for key, tensor in child.named_parameters(recurse=False):
            where = _join(path, _join(name, key))
            if tensor.dim() == 2 and tensor.shape[1] == heads.size:  # a norm with values of its own for every head
                rows.append(HeadRows(_join(path, name), *((1, 0) if name.startswith("q") else (0, 1))))
            elif not name and tensor.shape == (heads.query,):  # an attention sink
                rows.append(HeadRows(where, 1, 0))
            elif name and tensor.dim() == 1 and len(tensor) in _joint(heads):
                stay = "a norm over all of them at once would change"
            elif name and ".norms." in f"{name}.":
                stay = "every head has a norm of its own"
    return rows, stay


def _joint(heads: Heads) -> set[int]:
    """Lengths of a norm over the channels of all heads."""
    return {count * heads.size for count in (heads.query, heads.key_value) if count > 1}


def _strangers(module: nn.Module, names: AttentionNames) -> list[str]:
    """Projections and convolutions in an attention module whose part in it is not known: it is another mixer then."""
    known = {names.queries, names.keys, names.values, *names.out, *LATENT}
    return [
        name
        for name, child in module.named_modules()
        if isinstance(child, Projection | nn.Conv1d) and name not in known and name.rpartition(".")[2] not in GATES
    ]


def _head_size(module: nn.Module, out: str) -> int:
    for name in HEAD_SIZES:
        if isinstance(size := getattr(module, name, None), int):
            return size
    for name in HEAD_COUNTS:
        if isinstance(count := getattr(module, name, None), int):
            return _columns(module, out) // count
    raise SnpError(f"{type(module).__name__}: expected one of the attributes {', '.join(HEAD_SIZES)}; it has none.")


def _is(module: nn.Module, names: AttentionNames) -> bool:
    return _has(module, names.queries, names.keys, names.values) and any(_has(module, out) for out in names.out)


def _has(module: nn.Module, *names: str) -> bool:
    return all(isinstance(_child(module, name), Projection) for name in names)


def _child(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, or None: asked for of every module of large models, and mostly not there."""
    found: nn.Module | None = module
    for name in path.split("."):
        found = None if found is None else found._modules.get(name)
    return found


def _rows(module: nn.Module, name: str) -> int:
    return len(weight_of(module.get_submodule(name)))  # type: ignore[arg-type]


def _columns(module: nn.Module, name: str) -> int:
    return weight_of(module.get_submodule(name)).shape[1]  # type: ignore[arg-type]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
