"""The Auto class that loads a model, and pruned models' classes made known to all. Imports none before it is asked."""

from collections import Counter
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from snp_llm.models import modeling_snp, modeling_snp_vgg
from snp_llm.models.families.family import PRUNED
from snp_llm.runtime.errors import SnpError

AUTO_CLASSES: tuple[Any, ...] = tuple(getattr(transformers, name) for name in modeling_snp.AUTO_CLASSES)


def dense_type(config: PretrainedConfig) -> str:
    """The `model_type` of the dense model that a config, of a pruned model or not, is made for."""
    return str(config.model_type).removeprefix(PRUNED)


def auto_class(config: PretrainedConfig) -> Any:
    """The Auto class that loads a whole model of a config, towers included.

    Raises:
        SnpError: no model that transformers lets write text or classify images has that type.
    """
    names = modeling_snp.auto_classes(dense_type(config))
    if not names:
        raise SnpError(
            f"model_type {config.model_type!r} is not supported; expected a decoder-only model that transformers knows "
            "as a causal language model, alone or with towers, or a classifier of images. `snp-llm families` lists "
            "those that are tested."
        )
    return getattr(transformers, names[0])


def register() -> None:
    """Lets Auto classes load pruned models of every type without remote code.

    They look classes up by name, in a module that they import then. `register` of theirs would want the classes, and
    with them the modelling code of all of transformers.
    """
    others = (getattr(transformers, name) for name in modeling_snp.OTHER_AUTO_CLASSES)
    for auto in (*AUTO_CLASSES, *others):
        models = auto._model_mapping
        users = Counter(name for name in models._model_mapping.values() if isinstance(name, str))
        for model_type, name in [*models._model_mapping.items()]:
            config_name = CONFIG_MAPPING_NAMES.get(model_type)
            if config_name is None or model_type.startswith(PRUNED):
                continue
            pruned, pruned_config = f"{PRUNED}{model_type}", f"Snp{config_name}"
            module = pruned.replace("-", "_")  # as transformers makes a module's name of it
            CONFIG_MAPPING._mapping[pruned] = models._config_mapping[pruned] = pruned_config
            models._reverse_config_mapping[pruned_config] = pruned
            if isinstance(name, str):
                shared = users[name] > 1 and not name.startswith(config_name.removesuffix("Config"))
                models._model_mapping[pruned] = f"Snp{name}Under{config_name}" if shared else f"Snp{name}"
            else:  # several classes of a type, such as DeiT with one head and with two
                models._model_mapping[pruned] = tuple(f"Snp{one}" for one in name)
            CONFIG_MAPPING._modules[module] = models._modules[module] = modeling_snp


def pruned_config_class(model_type: str) -> type[PretrainedConfig]:
    """The config class of pruned models of a type."""
    found: type[PretrainedConfig] = CONFIG_MAPPING[f"{PRUNED}{model_type}"]
    return found


def pruned_class_name(dense: PreTrainedModel) -> str:
    """The name of the class of pruned models that are made from a dense one, or from one pruned before."""
    name = auto_class(dense.config)._model_mapping._model_mapping[f"{PRUNED}{dense_type(dense.config)}"]
    return name if isinstance(name, str) else f"Snp{type(dense).__name__.removeprefix('Snp')}"


def architectures(config: PretrainedConfig, dense: PreTrainedModel) -> list[str] | None:
    """What a pruned model's config calls the class that Auto classes are to take, where its type has several."""
    names = auto_class(config)._model_mapping._model_mapping[config.model_type]
    if isinstance(names, str):
        return config.architectures
    own = type(dense).__name__.removeprefix("Snp")
    return [next(name for name in names if name.removeprefix("Snp") == own)]


def is_own(kind: type[PreTrainedModel] | type[PretrainedConfig]) -> bool:
    """Whether a class is of transformers, or one that this package derived from such a class."""
    return kind.__module__.startswith("transformers.models.") or kind.__module__ in (
        modeling_snp.__name__,
        modeling_snp_vgg.__name__,
    )


def register_vgg() -> None:
    """Lets Auto classes load VGGs, pruned or not, without remote code; transformers has none of its own."""
    models = transformers.AutoModelForImageClassification._model_mapping
    for config in (modeling_snp_vgg.SnpVggConfig, modeling_snp_vgg.VggConfig, modeling_snp_vgg.VggBnConfig):
        name, model_type = config.__name__, config.model_type
        CONFIG_MAPPING._mapping[model_type] = models._config_mapping[model_type] = name
        models._reverse_config_mapping[name] = model_type
        models._model_mapping[model_type] = modeling_snp_vgg.SnpVggForImageClassification.__name__
        CONFIG_MAPPING._modules[model_type] = models._modules[model_type] = modeling_snp_vgg


register()
register_vgg()
