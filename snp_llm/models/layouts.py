"""How widths are written down: which config can hold them, and the model built from that config. Knows no files."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from snp_llm.models import modeling_snp
from snp_llm.models.anatomy import blocks_path, find_blocks, find_sites
from snp_llm.models.families.decoders import FFN_KEYS, find_family
from snp_llm.models.families.family import PRUNED, Family
from snp_llm.models.offload import disk_index, read_tensor, wait_on_disk
from snp_llm.models.registry import auto_class, dense_type, is_own, pruned_config_class
from snp_llm.models.site import Heads, Site, consumers_of, projecting
from snp_llm.models.structure import find_attention, find_ffn
from snp_llm.models.text_part import parts_of, text_config, text_values
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
        model = auto_class(config).from_config(config, attn_implementation=dense.config._attn_implementation)
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
    if _says_tied(dense) and not _says_tied(model):
        log.warning("the config says that the head is tied to the embeddings, the checkpoint has its own: it is kept")
    if dense.generation_config is not None:
        model.generation_config = _stock_generation(dense.generation_config)
    return model.eval().requires_grad_(False)


def config_for(dense: PreTrainedModel, family: Family, pruned_blocks: nn.ModuleList) -> PretrainedConfig:
    """The config that describes the pruned blocks; a plain one wherever that can hold their widths."""
    widths = [block_widths(block) for block in pruned_blocks]
    heads, ffn = ({w for w in some if w is not None} for some in zip(*widths, strict=True))
    if len(heads) <= 1 and len(ffn) <= 1:
        plain = plain_config(dense, family, next(iter(heads), None), next(iter(ffn), None))
        if plain is not None and (family.checked or builds(plain, widths)):
            return plain
    values, structure = _plain_values(dense), structure_of(dense)
    if family.head_dim_key and heads:
        text_values(dense.config, values)[family.head_dim_key] = next(iter(heads)).size
    overrides = {}
    for part in structure["parts"]:
        for index in part["of"]:
            dense_widths = _keys(family, *part_widths(part))
            new = _keys(family, *widths[index])
            if changed := {key: count for key, count in new.items() if count != dense_widths[key]}:
                overrides[str(index)] = changed
    overrides = {index: overrides[index] for index in sorted(overrides, key=int)}
    described = {"pruned_layers": overrides, "pruned_structure": structure, "auto_map": _auto_map(dense)}
    return pruned_config_class(dense_type(dense.config))(**{**values, **described})


def _auto_map(dense: PreTrainedModel) -> dict[str, str]:
    name = f"{modeling_snp.__name__.rpartition('.')[2]}.Snp{type(dense).__name__.removeprefix('Snp')}"
    return dict.fromkeys(modeling_snp.auto_classes(dense_type(dense.config)), name)


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
            blocks = find_blocks(auto_class(config).from_config(config))
        return [block_widths(block) for block in blocks] == list(widths)
    except Exception:  # whatever the class says of values that do not fit together
        return False


def plain_config(
    dense: PreTrainedModel, family: Family, heads: Heads | None, ffn: int | None
) -> PretrainedConfig | None:
    """The stock config for the same widths in every block that has such, or None where there is none."""
    model_type = family.model_type if heads is None else plain_type(dense, family, heads)
    if model_type is None or (family.ffn_key is None and ffn not in (None, *_dense_channels(dense))):
        return None
    whole = _plain_values(dense)
    values = text_values(dense.config, whole)
    if heads is not None and family.head_dim_key and _loses_heads(dense, family, heads):
        values[family.head_dim_key] = heads.size
    values.update({key: count for key, count in _keys(family, heads, ffn).items() if key in values})
    if model_type != family.model_type:
        known = AutoConfig.for_model(model_type).to_dict()
        for key in values.keys() - known.keys():
            del values[key]
        values["sliding_window"] = None
    if values is whole:
        return AutoConfig.for_model(model_type, **values)
    values["model_type"] = model_type
    return AutoConfig.for_model(dense_type(dense.config), **whole)


def _dense_channels(dense: PreTrainedModel) -> set[int | None]:
    return {part_widths(part)[1] for part in structure_of(dense)["parts"]}


def plain_type(dense: PreTrainedModel, family: Family, heads: Heads) -> str | None:
    """The model_type of the stock config that can say these heads, or None.

    A config that ties the head dimension to the number of heads cannot lose heads. One that wants head counts to divide
    the hidden size (Llama) is replaced by one that computes the same and does not (Mistral, without a sliding window),
    unless there are biases, for which that has no place.
    """
    if _loses_heads(dense, family, heads) and (family.head_dim_key is None or not family.checked):
        return None
    if not family.divides_hidden or text_config(dense.config).hidden_size % heads.query == 0:
        return family.model_type
    return None if _has_biases(dense, family) else family.substitute


def possible_types(dense: PreTrainedModel, layout: str) -> tuple[str, ...]:
    """Every model_type that a pruned model's config may have in a layout."""
    own, substitute = dense_type(dense.config), find_family(dense.config).substitute
    if layout == "compact":
        return f"{PRUNED}{own}", own
    return (own, substitute) if substitute and text_config(dense.config) is dense.config else (own,)


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
    known = AutoConfig.for_model(dense_type(dense.config))
    return {**_known_values(dense.config, known), "tie_word_embeddings": _says_tied(dense) and _is_tied(dense)}


def _known_values(config: PretrainedConfig, stock: PretrainedConfig) -> dict[str, Any]:
    known = {*stock.to_dict(), *KNOWN_WHEREVER}
    values = {
        key: value
        for key, value in config.to_dict().items()
        if key not in PRIVATE_KEYS and (key in known or value is None or isinstance(value, int | float))
    }
    for key, part in parts_of(config).items():
        values[key] = {**_known_values(part, type(part)()), "model_type": part.model_type}
    return values


def _says_tied(model: PreTrainedModel) -> bool:
    """Whether a config says that the head is the embeddings."""
    return bool(getattr(model.config, "tie_word_embeddings", False))


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


def _loses_heads(dense: PreTrainedModel, family: Family, heads: Heads) -> bool:
    text = text_config(dense.config)
    return any(getattr(text, key, None) != count for key, count in _keys(family, heads, None).items())


def _has_biases(dense: PreTrainedModel, family: Family) -> bool:
    block = find_blocks(dense)[0]
    sites = find_sites(nn.ModuleList([block]), family)
    made = [module for site in sites for _, module in projecting(block, site)]
    read = [module for site in sites for module in consumers_of(block, site)]
    return any(module.bias is not None for module in (*made, *read))
