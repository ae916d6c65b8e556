"""Pruned models' classes, made known to transformers' Auto classes. Imports none of them before it is asked for."""

from collections import Counter

from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from snp_llm.models import modeling_snp
from snp_llm.models.families.family import PRUNED


def register() -> None:
    """Lets Auto classes load pruned models of every type without remote code.

    They look classes up by name, in a module that they import then. `register` of theirs would want the classes, and
    with them the modelling code of all of transformers.
    """
    models = AutoModelForCausalLM._model_mapping
    users = Counter(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() if isinstance(name, str))
    for model_type, name in [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()]:
        config_name = CONFIG_MAPPING_NAMES.get(model_type)
        if not isinstance(name, str) or config_name is None or model_type.startswith(PRUNED):
            continue
        pruned, pruned_config = f"{PRUNED}{model_type}", f"Snp{config_name}"
        module = pruned.replace("-", "_")  # as transformers makes a module's name of it
        CONFIG_MAPPING._mapping[pruned] = models._config_mapping[pruned] = pruned_config
        models._reverse_config_mapping[pruned_config] = pruned
        shared = users[name] > 1 and not name.startswith(config_name.removesuffix("Config"))
        models._model_mapping[pruned] = f"Snp{name}Under{config_name}" if shared else f"Snp{name}"
        CONFIG_MAPPING._modules[module] = models._modules[module] = modeling_snp


def pruned_config_class(model_type: str) -> type[PretrainedConfig]:
    """The config class of pruned models of a type."""
    found: type[PretrainedConfig] = CONFIG_MAPPING[f"{PRUNED}{model_type}"]
    return found


def is_own(kind: type[PreTrainedModel] | type[PretrainedConfig]) -> bool:
    """Whether a class is of transformers, or one that this package derived from such a class."""
    return kind.__module__.startswith("transformers.models.") or kind.__module__ == modeling_snp.__name__


register()
