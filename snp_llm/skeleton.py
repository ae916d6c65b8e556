"""A model's shapes from its config alone, on the meta device. Reads no weights and no tokenizer."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from snp_llm.checkpoint import TINY_OPT, check_config, is_hub_id
from snp_llm.data import BUNDLED
from snp_llm.errors import SnpError


def load_config(name: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a hub id, a local folder (of which `config.json` is enough) or the bundled model.

    Raises:
        SnpError: not found, or not a model that can be pruned.
    """
    path = str(BUNDLED / TINY_OPT) if name == TINY_OPT else name
    if not Path(path).exists() and not is_hub_id(name):
        raise SnpError(f"model {name}: no such folder, and not a hub id (user/name) or the bundled {TINY_OPT!r}.")
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        raise SnpError(f"model {name}: no config.json in that folder; expected a model in the Hugging Face format.")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and the hub client raise dozens of kinds
        if "trust_remote_code" in str(error):
            raise SnpError(
                f"model {name}: needs Python code from its own repository, which is not run unasked. If you have read "
                "that code and trust it, allow it with --trust-remote-code."
            ) from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise SnpError(f"model {name}: its config cannot be loaded. {lines[0][:300]}") from error
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
