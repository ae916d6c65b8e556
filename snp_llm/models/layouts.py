"""How widths are written down: which config can hold them, and the model built from that config. Knows no files."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from snp_llm.models import modeling_snp
from snp_llm.models.anatomy import blocks_path, find_blocks, find_sites
from snp_llm.models.families.decoders import FFN_KEYS, find_family
from snp_llm.models.families.family import PRUNED, Family
from snp_llm.models.offload import disk_index, read_tensor, wait_on_disk
from snp_llm.models.registry import is_own, pruned_config_class
from snp_llm.models.site import Heads, Site, consumers_of, projecting
from snp_llm.models.structure import find_attention, find_ffn
from snp_llm.runtime.errors import SnpError

log = logging.getLogger(__name__)


KERNEL_MULTIPLE = 64  # FFN widths that the kernels of other engines like

FEWEST_STEPS = 16  # of that size in a whole FFN, or rounding is finer

# Of a pruned or loaded model alone; they say nothing about the shapes.
PRIVATE_KEYS = ("pruned_layers", "pruned_structure", "auto_map", "model_type", "architectures", "transformers_version")

SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")

KNOWN_WHEREVER = ("layer_types",)  # what transformers reads of any config, whether its class declares it or not


def needs_code(config: PretrainedConfig) -> bool:
    """Whether a model of this config carries its own modelling file."""
    return str(config.model_type).startswith(PRUNED)


def check_code(model: PreTrainedModel) -> None:
    """Raises SnpError if a model runs code of its own, which a pruned one would lose.

    That is built from the classes of transformers and of this package, whatever the loaded one has been built from.
    """
    for kind in (type(model), type(model.config)):
        if not is_own(kind):
            raise SnpError(
                f"{kind.__name__}: is code of the model's own ({kind.__module__}), which a pruned model would lose; "
                "expected a class of transformers. Without --trust-remote-code the class that is known here for "
                f"model_type {model.config.model_type!r} is loaded, if that is what you want."
            )


def assemble(dense: PreTrainedModel, family: Family, pruned_blocks: nn.ModuleList) -> PreTrainedModel:
    """The pruned model: dense embeddings, norms and head around the pruned blocks, rebuilt from its own config.

    Building every module anew from the config, and loading strictly, proves that the config describes the weights.
    Tensors are shared with the arguments, not copied; those on disk stay there.
    """
    config = config_for(dense, family, pruned_blocks)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=dense.config._attn_implementation)
    prefix = blocks_path(dense) + "."
    state: dict[str, Tensor] = {k: v for k, v in dense.state_dict().items() if not k.startswith(prefix)}
    state.update({prefix + k: v for k, v in pruned_blocks.state_dict().items()})
    model.load_state_dict(state, assign=True, strict=True)
    model.tie_weights()
    # Buffers that are not saved (rotary frequencies) are not in the state either, and still on meta.
    for name, buffer in dense.named_buffers():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if getattr(module, attribute).is_meta:
            setattr(module, attribute, buffer)
    index = {k: v for k, v in disk_index(dense).items() if not k.startswith(prefix)}
    index.update({prefix + k: v for k, v in disk_index(pruned_blocks).items()})
    if index:
        wait_on_disk(model, index)
        model.hf_device_map = {"": "disk", "-": "cpu"}  # for save_pretrained, which before 5.15 asks for two places
    if dense.config.tie_word_embeddings and not model.config.tie_word_embeddings:
        log.warning("the config says that the head is tied to the embeddings, the checkpoint has its own: it is kept")
    if dense.generation_config is not None:
        model.generation_config = _stock_generation(dense.generation_config)
    return model.eval().requires_grad_(False)


def config_for(dense: PreTrainedModel, family: Family, pruned_blocks: nn.ModuleList) -> PretrainedConfig:
    """The config that describes the pruned blocks; a plain one wherever that can hold their widths."""
    widths, structure = [block_widths(block) for block in pruned_blocks], structure_of(dense)
    plain = plain_config(dense, family, widths)
    if plain is not None and (family.checked or builds(plain, widths)):
        return plain
    values = _plain_values(dense)
    sizes = {now[0].size for now in widths if now[0] is not None}
    if family.head_dim_key and len(sizes) == 1:
        values[family.head_dim_key] = sizes.pop()
    overrides = {}
    for part in structure["parts"]:
        for index in part["of"]:
            dense_widths = _keys(family, *part_widths(part))
            new = _keys(family, *widths[index])
            if changed := {key: count for key, count in new.items() if count != dense_widths[key]}:
                overrides[str(index)] = changed
    overrides = {index: overrides[index] for index in sorted(overrides, key=int)}
    described = {"pruned_layers": overrides, "pruned_structure": structure}
    return pruned_config_class(family.model_type)(**{**values, **described})


def structure_of(model: PreTrainedModel) -> dict[str, Any]:
    """Where a model that no block of has been pruned has heads and channels, for readers without this package.

    Returns:
        `blocks`, the path of the list of blocks, and `parts`: for blocks that are alike their numbers (`of`), and of
        attention and FFN, where there are any: the config keys of their widths, these widths, the rows that each of
        these has in every tensor, and the path of the out-projection. That of a model that was pruned is the one which
        it came with.
    """
    known: dict[str, Any] | None = getattr(model.config, "pruned_structure", None)
    if known is not None:
        return known
    family = find_family(model.config)
    parts: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for index, block in enumerate(find_blocks(model)):
        part: dict[str, Any] = {}
        if (attention := find_attention(block)) is not None:
            part["attention"] = {
                "keys": [family.heads_key, family.kv_heads_key],
                "heads": [attention.heads.query, attention.heads.key_value],
                "size": attention.heads.size,
                "module": attention.module,
                "rows": {rows.path: [rows.query, rows.key_value] for rows in attention.rows},
                "out": attention.out,
            }
        if (ffn := find_ffn(block)) is not None:
            key = family.ffn_key or FFN_KEYS[0]
            part["ffn"] = {"key": key, "width": ffn.channels, "rows": dict(ffn.rows), "out": ffn.out}
        parts.setdefault(repr(part), (part, []))[1].append(index)
    return {"blocks": blocks_path(model), "parts": [{"of": of, **part} for part, of in parts.values()]}


modeling_snp.DESCRIBE["model"] = structure_of


def block_widths(block: nn.Module) -> tuple[Heads | None, int | None]:
    """Heads and FFN channels of a block, where it has them."""
    attention, ffn = find_attention(block), find_ffn(block)
    return None if attention is None else attention.heads, None if ffn is None else ffn.channels


def part_widths(part: dict[str, Any]) -> tuple[Heads | None, int | None]:
    """Heads and FFN channels of the blocks that a part of `structure_of` describes, where they have them."""
    attention, ffn = part.get("attention"), part.get("ffn")
    heads = None
    if attention is not None:
        query, key_value = attention["heads"]
        heads = Heads(query, key_value, attention["size"])
    return heads, None if ffn is None else ffn["width"]


def builds(config: PretrainedConfig, widths: Sequence[tuple[Heads | None, int | None]]) -> bool:
    """Whether transformers makes blocks of these widths of a config."""
    try:
        with torch.device("meta"):
            blocks = find_blocks(AutoModelForCausalLM.from_config(config))
        return [block_widths(block) for block in blocks] == list(widths)
    except Exception:  # whatever the class says of values that do not fit together
        return False


def plain_config(
    dense: PreTrainedModel, family: Family, widths: Sequence[tuple[Heads | None, int | None]]
) -> PretrainedConfig | None:
    """The stock config that says the widths of all blocks, or None where there is none.

    Widths that are still those of the dense model in every block may differ from block to block, as there.
    """
    was = {index: part_widths(part) for part in structure_of(dense)["parts"] for index in part["of"]}
    some_heads = {now for now, _ in widths} if any(now != was[i][0] for i, (now, _) in enumerate(widths)) else {None}
    some_ffn = {now for _, now in widths} if any(now != was[i][1] for i, (_, now) in enumerate(widths)) else {None}
    if len(some_heads) > 1 or len(some_ffn) > 1:
        return None
    heads, ffn = some_heads.pop(), some_ffn.pop()
    model_type = family.model_type if heads is None else plain_type(dense, family, heads)
    if model_type is None or (family.ffn_key is None and ffn is not None):
        return None
    values = _plain_values(dense)
    if heads is not None:
        values |= _keys(family, heads, None)
        if family.head_dim_key:
            values[family.head_dim_key] = heads.size
    if ffn is not None and family.ffn_key is not None:
        values[family.ffn_key] = ffn * _values_a_channel(dense, family)
    if model_type != family.model_type:
        known = AutoConfig.for_model(model_type).to_dict()
        values = {key: value for key, value in values.items() if key in known}
        values["sliding_window"] = None
    return AutoConfig.for_model(model_type, **values)


def _values_a_channel(dense: PreTrainedModel, family: Family) -> int:
    """What the config counts for a channel: 2 where it says the rows of gate and up together."""
    said = getattr(dense.config, family.ffn_key or "", None) or 0
    widths = {part_widths(part)[1] for part in structure_of(dense)["parts"]}
    return 2 if any(width and said == 2 * width for width in widths) else 1


def plain_type(dense: PreTrainedModel, family: Family, heads: Heads) -> str | None:
    """The model_type of the stock config that can say these heads, or None.

    A config that ties the head dimension to the number of heads cannot lose heads. One that wants head counts to divide
    the hidden size (Llama) is replaced by one that computes the same and does not (Mistral, without a sliding window),
    unless there are biases, for which that has no place.
    """
    if heads in _dense_heads(dense):
        return family.model_type
    if family.head_dim_key is None or not family.checked:
        return None
    if not family.divides_hidden or dense.config.hidden_size % heads.query == 0:
        return family.model_type
    return None if _has_biases(dense, family) else family.substitute


def possible_types(dense: PreTrainedModel, layout: str) -> tuple[str, ...]:
    """Every model_type that a pruned model's config may have in a layout."""
    family = find_family(dense.config)
    if layout == "compact":
        return family.pruned_type, family.model_type
    return (family.model_type, family.substitute) if family.substitute else (family.model_type,)


def uniform_widths(dense: PreTrainedModel, family: Family, site: Site) -> tuple[int, ...]:
    """The widths of an attention site that a plain config can hold in every block, ascending, without "all units"."""
    return tuple(
        width
        for width in range(site.step, site.units, site.step)
        if plain_type(dense, family, site.heads_after(width)) is not None
    )


def _plain_values(dense: PreTrainedModel) -> dict[str, Any]:
    """What a stock config knows of the dense model's, with embeddings tied only where they are.

    Keys that no stock class declares may name code that a reader would fetch and run, which takes text: numbers among
    them are kept, since transformers reads some (a head dimension), all else is dropped.
    """
    known = {*AutoConfig.for_model(find_family(dense.config).model_type).to_dict(), *KNOWN_WHEREVER}
    values = {
        key: value
        for key, value in dense.config.to_dict().items()
        if key not in PRIVATE_KEYS and (key in known or value is None or isinstance(value, int | float))
    }
    return {**values, "tie_word_embeddings": dense.config.tie_word_embeddings and _is_tied(dense)}


def _stock_generation(config: GenerationConfig) -> GenerationConfig:
    """What the stock class knows of a generation config, in a form that it saves.

    Settings of sampling have no effect without sampling, and many models ship so; transformers refuses to save them.
    """
    known, values = GenerationConfig().to_dict(), config.to_dict()
    idle = () if values.get("do_sample") else SAMPLING_KEYS
    kept = GenerationConfig(**{key: value for key, value in values.items() if key in known and key not in idle})
    try:
        kept.validate(strict=True)
    except ValueError as error:
        log.warning("the generation config is left out, transformers finds it wrong: %s", " ".join(str(error).split()))
        return GenerationConfig()
    return kept


def _is_tied(model: PreTrainedModel) -> bool:
    """Whether the head is the embeddings: one tensor, or two that hold the same."""
    head, embeddings = (next(find().parameters()) for find in (model.get_output_embeddings, model.get_input_embeddings))
    if head is embeddings:
        return True
    index, names = disk_index(model), {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}
    values = [read_tensor(index[names[id(p)]], p) if p.is_meta else p.detach() for p in (head, embeddings)]
    return torch.equal(*values)


def _keys(family: Family, heads: Heads | None, ffn: int | None) -> dict[str, int]:
    keys = {} if heads is None else {family.heads_key: heads.query}
    if heads is not None and family.kv_heads_key:
        keys[family.kv_heads_key] = heads.key_value
    return keys if ffn is None else {**keys, family.ffn_key or FFN_KEYS[0]: ffn}


def _dense_heads(dense: PreTrainedModel) -> set[Heads | None]:
    return {part_widths(part)[0] for part in structure_of(dense)["parts"]}


def _has_biases(dense: PreTrainedModel, family: Family) -> bool:
    block = find_blocks(dense)[0]
    sites = find_sites(nn.ModuleList([block]), family)
    made = [module for site in sites for _, module in projecting(block, site)]
    read = [module for site in sites for module in consumers_of(block, site)]
    return any(module.bias is not None for module in (*made, *read))
