"""How widths are written down: which config can hold them, and the model built from that config. Knows no files."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from snp_llm.models.families import Family, find_sites
from snp_llm.models.modeling_snp_opt import SnpOPTConfig, SnpOPTForCausalLM

PRUNED_CLASSES: dict[str, tuple[type[PretrainedConfig], type[PreTrainedModel]]] = {
    "snp_opt": (SnpOPTConfig, SnpOPTForCausalLM),
}
for _config_class, _model_class in PRUNED_CLASSES.values():  # so that, with snp_llm imported, no remote code is needed
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    AutoModelForCausalLM.register(_config_class, _model_class, exist_ok=True)


def needs_code(config: PretrainedConfig) -> bool:
    """Whether a model of this config carries its own modelling file."""
    return config.model_type in PRUNED_CLASSES


def assemble(dense: PreTrainedModel, family: Family, pruned_blocks: nn.ModuleList) -> PreTrainedModel:
    """The pruned model: dense embeddings, norms and head around the pruned blocks, rebuilt from its own config.

    Building every module anew from the config, and loading strictly, proves that the config describes the weights.
    Tensors are shared with the arguments, not copied.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(dense, family, pruned_blocks))
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
    model.generation_config = copy.deepcopy(dense.generation_config)
    return model.eval().requires_grad_(False)


def _config(dense: PreTrainedModel, family: Family, pruned_blocks: nn.ModuleList) -> PretrainedConfig:
    """The config that describes the pruned blocks; the family's plain one wherever that can hold their widths."""
    keys = {"attention": family.heads_key, "ffn": family.ffn_key}
    widths: list[dict[str, int]] = [{} for _ in pruned_blocks]
    for site in find_sites(pruned_blocks, family):
        widths[site.block][keys[site.kind]] = site.units
    values: dict[str, Any] = dense.config.to_dict()
    for key in ("pruned_layers", "auto_map", "model_type", "architectures", "transformers_version"):
        values.pop(key, None)
    heads, ffn = ({w[key] for w in widths} for key in keys.values())
    if heads == {values[family.heads_key]} and len(ffn) == 1:
        return AutoConfig.for_model(family.model_types[0], **{**values, family.ffn_key: ffn.pop()})
    overrides = {
        str(i): changed
        for i, w in enumerate(widths)
        if (changed := {key: value for key, value in w.items() if value != values[key]})
    }
    return PRUNED_CLASSES[family.pruned_type][0](**{**values, "pruned_layers": overrides})
