"""How widths are written down: which config can hold them, and the model built from that config. Knows no files."""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from snp_llm.models import modeling_snp
from snp_llm.models.anatomy import find_blocks, find_sites, read_heads
from snp_llm.models.families.decoders import FAMILIES, find_family
from snp_llm.models.families.family import Family
from snp_llm.models.offload import disk_index, read_tensor, wait_on_disk
from snp_llm.models.projections import projection
from snp_llm.models.site import Heads, Site
from snp_llm.runtime.errors import SnpError

log = logging.getLogger(__name__)


def _pruned_classes(family: Family) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    model_class = getattr(modeling_snp, f"Snp{MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]}")
    return model_class.config_class, model_class


PRUNED_CLASSES = {family.pruned_type: _pruned_classes(family) for family in FAMILIES}

for _config_class, _model_class in PRUNED_CLASSES.values():  # so that, with snp_llm imported, no remote code is needed
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    AutoModelForCausalLM.register(_config_class, _model_class, exist_ok=True)

KERNEL_MULTIPLE = 64  # FFN widths that the kernels of other engines like

FEWEST_STEPS = 16  # of that size in a whole FFN, or rounding is finer

# Of a pruned or loaded model alone; they say nothing about the shapes.
PRIVATE_KEYS = ("pruned_layers", "auto_map", "model_type", "architectures", "transformers_version")

SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")

KNOWN_WHEREVER = ("layer_types",)  # what transformers reads of any config, whether its class declares it or not


def needs_code(config: PretrainedConfig) -> bool:
    """Whether a model of this config carries its own modelling file."""
    return config.model_type in PRUNED_CLASSES


def check_code(model: PreTrainedModel) -> None:
    """Raises SnpError if a model runs code of its own, which a pruned one would lose.

    That is built from the classes of transformers and of this package, whatever the loaded one has been built from.
    """
    ours = [kind for pair in PRUNED_CLASSES.values() for kind in pair]
    for kind in (type(model), type(model.config)):
        if not kind.__module__.startswith("transformers.models.") and kind not in ours:
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
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config_for(dense, family, pruned_blocks), attn_implementation=dense.config._attn_implementation
        )
    prefix = family.blocks + "."
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
    heads = [read_heads(block, family) for block in pruned_blocks]
    ffn = [site.units for site in find_sites(pruned_blocks, family) if site.kind == "ffn"]
    if len(set(heads)) == len(set(ffn)) == 1 and (plain := plain_config(dense, family, heads[0], ffn[0])) is not None:
        return plain
    values = _plain_values(dense)
    if family.head_dim_key:
        values[family.head_dim_key] = heads[0].size
    if values.get(family.ffn_key) is None:  # GPT-2 leaves its usual FFN width out
        values[family.ffn_key] = find_sites(find_blocks(dense, family), family)[1].units
    overrides = {
        str(i): changed
        for i, (h, f) in enumerate(zip(heads, ffn, strict=True))
        if (changed := {k: v for k, v in _keys(family, h, f).items() if v != values[k]})
    }
    return PRUNED_CLASSES[family.pruned_type][0](**{**values, "pruned_layers": overrides})


def plain_config(dense: PreTrainedModel, family: Family, heads: Heads, ffn: int) -> PretrainedConfig | None:
    """The stock config for the same widths in every block, or None where there is none."""
    model_type = plain_type(dense, family, heads)
    if model_type is None:
        return None
    values = _plain_values(dense)
    if family.head_dim_key and _loses_heads(dense, family, heads):
        values[family.head_dim_key] = heads.size
    values.update(_keys(family, heads, ffn))
    if model_type != family.model_type:
        known = AutoConfig.for_model(model_type).to_dict()
        values = {key: value for key, value in values.items() if key in known}
        values["sliding_window"] = None
    return AutoConfig.for_model(model_type, **values)


def plain_type(dense: PreTrainedModel, family: Family, heads: Heads) -> str | None:
    """The model_type of the stock config that can say these heads, or None.

    A config that ties the head dimension to the number of heads cannot lose heads. One that wants head counts to divide
    the hidden size (Llama) is replaced by one that computes the same and does not (Mistral, without a sliding window),
    unless there are biases, for which that has no place.
    """
    if _loses_heads(dense, family, heads) and family.head_dim_key is None:
        return None
    if not family.divides_hidden or dense.config.hidden_size % heads.query == 0:
        return family.model_type
    return None if _has_biases(find_blocks(dense, family), family) else family.substitute


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


def _keys(family: Family, heads: Heads, ffn: int) -> dict[str, int]:
    keys = {family.heads_key: heads.query, family.ffn_key: ffn}
    return {**keys, family.kv_heads_key: heads.key_value} if family.kv_heads_key else keys


def _loses_heads(dense: PreTrainedModel, family: Family, heads: Heads) -> bool:
    counts = _keys(family, heads, 0)
    return any(getattr(dense.config, key) != count for key, count in counts.items() if key != family.ffn_key)


def _has_biases(blocks: nn.ModuleList, family: Family) -> bool:
    paths = (*family.qkv, family.attention_out, *family.ffn_in, family.ffn_out)
    return any(projection(blocks[0], path).bias is not None for path in paths)
