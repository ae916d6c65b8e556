"""A model's shapes from its config alone, on the meta device. Reads no weights and no tokenizer."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from snp_llm.checkpoint import check_config, explained, find_model
from snp_llm.errors import SnpError


def load_config(name: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a hub id, a local folder (of which `config.json` is enough) or the bundled model.

    Raises:
        SnpError: not found, or not a model that can be pruned.
    """
    path = find_model(name)
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        raise SnpError(f"model {name}: no config.json in that folder; expected a model in the Hugging Face format.")
    with explained(name, part="its config "):
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    check_config(name, config)
    return config


def load_skeleton(name: str, dtype: str = "auto", *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a config describes, its tensors without data, in the dtype that it would be loaded in.

    Raises:
        SnpError: not found, unsupported, or a config that no model can be built from.
    """
    config = load_config(name, trust_remote_code=trust_remote_code)
    wanted = getattr(torch, dtype) if dtype != "auto" else config.dtype or torch.float32
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=wanted, trust_remote_code=trust_remote_code
            )
    except Exception as error:
        raise SnpError(f"model {name}: no model can be built from its config. {str(error)[:300]}") from error
    return model.eval()
