"""How widths are written down: which config can hold them, and the model built from that config. Knows no files."""

import logging

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from snp_llm.models import modeling_snp
from snp_llm.models.anatomy import block_prefixes, blocks_path, find_blocks
from snp_llm.models.depth import shortened
from snp_llm.models.families.decoders import find_family
from snp_llm.models.families.family import PRUNED, Family
from snp_llm.models.offload import disk_index, wait_on_disk
from snp_llm.models.outline import block_widths, part_widths, structure_of, width_keys
from snp_llm.models.plain import known_values, plain_config, says_tied, stays_tied
from snp_llm.models.registry import (
    architectures,
    auto_class,
    dense_type,
    is_own,
    pruned_class_name,
    pruned_config_class,
)
from snp_llm.models.segment_configs import segments_config
from snp_llm.models.segments import Segments
from snp_llm.models.surgery import NoBlock
from snp_llm.models.text_part import parts_of, text_config, text_values
from snp_llm.models.trial_config import builds
from snp_llm.runtime.errors import SnpError

log = logging.getLogger(__name__)


KERNEL_MULTIPLE = 64  # FFN widths that the kernels of other engines like

FEWEST_STEPS = 16  # of that size in a whole FFN, or rounding is finer

SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


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

    Blocks that have gone, `NoBlock`, are left out.
    Building every module anew from the config, and loading strictly, proves that the config describes the weights.
    Tensors are shared with the arguments, not copied; those on disk stay there.
    """
    if len(kept := [i for i, block in enumerate(pruned_blocks) if not isinstance(block, NoBlock)]) < len(pruned_blocks):
        dense, pruned_blocks = shortened(dense, kept), nn.ModuleList(pruned_blocks[i] for i in kept)
    config = config_for(dense, family, pruned_blocks)
    config.architectures = architectures(config, dense)
    parts = {key: part._attn_implementation for key, part in parts_of(dense.config).items()}
    with torch.device("meta"):
        model = auto_class(config).from_config(
            config, attn_implementation={"": dense.config._attn_implementation, **parts}
        )
    blocks, prefixes = find_blocks(dense), block_prefixes(dense)
    inside = {prefix + k for prefix, block in zip(prefixes, blocks, strict=True) for k in block.state_dict()}
    state: dict[str, Tensor] = {k: v for k, v in dense.state_dict().items() if k not in inside}
    for prefix, block in zip(prefixes, pruned_blocks, strict=True):
        state.update({prefix + k: v for k, v in block.state_dict().items()})
    model.load_state_dict(state, assign=True, strict=True)
    model.tie_weights()
    # Buffers that are not saved (rotary frequencies) are not in the state either, and still on meta.
    for name, buffer in dense.named_buffers():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if getattr(module, attribute, buffer).is_meta:  # one for a kind of block that has gone is no longer there
            setattr(module, attribute, buffer)
    index = {k: v for k, v in disk_index(dense).items() if k not in inside}
    for prefix, block in zip(prefixes, pruned_blocks, strict=True):
        index.update({prefix + k: v for k, v in disk_index(block).items()})
    if index:
        wait_on_disk(model, index)
        model.hf_device_map = {"": "disk", "-": "cpu"}  # for save_pretrained, which before 5.15 asks for two places
    if says_tied(dense) and not says_tied(model):
        log.warning("the config says that the head is tied to the embeddings, the checkpoint has its own: it is kept")
    if getattr(dense, "generation_config", None) is not None:  # classifiers have none
        model.generation_config = _stock_generation(dense.generation_config)
    return model.eval().requires_grad_(False)


def config_for(dense: PreTrainedModel, family: Family, pruned_blocks: nn.ModuleList) -> PretrainedConfig:
    """The config that describes the pruned blocks; a plain one wherever that can hold their widths."""
    if isinstance(blocks := find_blocks(dense), Segments):
        return segments_config(dense, blocks, pruned_blocks)
    widths, structure = [block_widths(block) for block in pruned_blocks], structure_of(dense)
    plain = plain_config(dense, family, widths)
    if plain is not None and (family.alike or builds(plain, dense, blocks_path(dense), pruned_blocks)):
        return plain
    values, heads = known_values(dense), next((heads for heads, *_ in widths if heads is not None), None)
    text = text_values(dense.config, values)
    if family.head_dim_key and heads and not isinstance(text.get(family.head_dim_key), int):
        text[family.head_dim_key] = heads.size
    overrides = {}
    for part in structure["parts"]:
        for index in part["of"]:
            dense_widths = width_keys(family, *part_widths(part))
            new = width_keys(family, *widths[index])  # nothing of an attention that has gone
            if changed := {key: new.get(key, 0) for key, count in dense_widths.items() if new.get(key, 0) != count}:
                overrides[str(index)] = changed
    overrides = {index: overrides[index] for index in sorted(overrides, key=int)}
    described = {"pruned_layers": overrides, "pruned_structure": structure, "auto_map": _auto_map(dense)}
    tied = {"tie_word_embeddings": stays_tied(dense)}
    return pruned_config_class(dense_type(dense.config))(**{**values, **tied, **described})


def _auto_map(dense: PreTrainedModel) -> dict[str, str]:
    module, own = modeling_snp.__name__.rpartition(".")[2], dense_type(dense.config)
    whole = dict.fromkeys(modeling_snp.auto_classes(own), f"{module}.{pruned_class_name(dense)}")
    parts = {auto: f"{module}.{name}" for auto, name in modeling_snp.other_auto_classes(f"{PRUNED}{own}").items()}
    return {**parts, **whole}


def possible_types(dense: PreTrainedModel, layout: str) -> tuple[str, ...]:
    """Every model_type that a pruned model's config may have in a layout."""
    own, substitute = dense_type(dense.config), find_family(dense.config).substitute
    if layout == "compact":
        return f"{PRUNED}{own}", own
    return (own, substitute) if substitute and text_config(dense.config) is dense.config else (own,)


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
