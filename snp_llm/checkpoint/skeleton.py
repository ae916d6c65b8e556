"""A model's shapes from its config alone, on the meta device. Reads no weights and no tokenizer."""

import math
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel

from snp_llm.checkpoint.loading import explained, find_model, read_config
from snp_llm.checkpoint.readers import reader_for
from snp_llm.models.anatomy import blocks_path, find_anatomy, find_blocks
from snp_llm.models.families.decoders import EXPERT_KEYS
from snp_llm.models.layouts import needs_code
from snp_llm.models.registry import auto_class
from snp_llm.models.size import EXPERTS_A_TOKEN
from snp_llm.models.task import task_of
from snp_llm.models.text_part import text_config
from snp_llm.runtime.errors import SnpError, reason, shown

MOST_BLOCKS = 10_000  # that are built to look at their shapes


def load_config(name: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The config of a hub id, a local folder (of which `config.json` is enough) or the bundled model.

    Raises:
        SnpError: not found, or not a model that can be pruned.
    """
    path = find_model(name)
    if Path(path).is_file():
        raise SnpError(f"model {name}: is a file; expected a folder in the Hugging Face format, a hub id or tiny-opt.")
    if Path(path).is_dir() and not (Path(path) / "config.json").exists():
        adapter = (
            " It is a LoRA adapter: merge it into its model first." * (Path(path) / "adapter_config.json").exists()
        )
        raise SnpError(
            f"model {name}: no config.json in that folder; expected a model in the Hugging Face format.{adapter}"
        )
    config = read_config(name, trust_remote_code=trust_remote_code)
    with explained(name, part="its config "):
        check_values(name, config)
        reader_for(config).prepare(config, path)
    return config


def check_values(name: str, config: PretrainedConfig) -> None:
    """Refuses numbers that transformers takes and no model can have."""
    unbounded = {key for key, value in _numbers(type(config)().to_dict()) if value == math.inf}  # as mixers have them
    for key, value in _numbers(config.to_dict()):
        if not math.isfinite(value) and not (value == math.inf and key in unbounded):
            raise SnpError(f"model {name}: config {key}: expected a finite number, got {value}.")
        if ("dropout" in key or key.endswith("pdrop")) and not 0 <= value <= 1:
            raise SnpError(f"model {name}: config {key}: expected a probability from 0 to 1, got {shown(value)}.")
    for key, least, most in (
        ("num_hidden_layers", 1, MOST_BLOCKS),
        ("max_position_embeddings", 2, math.inf),
        ("vocab_size", 1, math.inf),
        ("hidden_size", 1, math.inf),
    ):
        value = getattr(text_config(config), key, least)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            limit = f" to {most:,}" if most < math.inf else " up"
            raise SnpError(f"model {name}: config {key}: expected an integer from {least}{limit}, got {shown(value)}.")
    _check_experts(name, text_config(config))


def _check_experts(name: str, config: PretrainedConfig) -> None:
    """Refuses routers that are to choose more experts than there are, which fails in the middle of their code."""
    counts, each = (
        next(((key, n) for key in keys if isinstance(n := getattr(config, key, None), int)), None)
        for keys in (EXPERT_KEYS[1], EXPERTS_A_TOKEN)
    )
    if counts is not None and each is not None and each[1] > counts[1] > 0:
        raise SnpError(
            f"model {name}: config {each[0]}: expected at most as many experts a token as {counts[0]} says that there "
            f"are, {counts[1]}, got {each[1]}."
        )


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """All numbers in nested values, each with the nearest key."""
    if isinstance(value, dict):
        for inner_key, inner in value.items():
            yield from _numbers(inner, str(inner_key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def load_skeleton(name: str, dtype: str = "auto", *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a config describes, its tensors without data, in the dtype that it would be loaded in.

    Raises:
        SnpError: not found, unsupported, or a config that no model can be built from or saved with.
    """
    config = load_config(name, trust_remote_code=trust_remote_code)
    wanted = getattr(torch, dtype) if dtype != "auto" else config.dtype or text_config(config).dtype or torch.float32
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tensors without elements, which are refused below
            model: PreTrainedModel = auto_class(config).from_config(
                config, dtype=wanted, trust_remote_code=trust_remote_code
            )
        for path, parameter in model.named_parameters():
            if not parameter.numel():
                if needs_code(config) and path.startswith(f"{blocks_path(model)}."):
                    continue  # an attention or an FFN of a pruned model that has gone
                shape = " x ".join(map(str, parameter.shape))
                raise SnpError(f"model {name}: by its config {path} is {shape}; expected widths of at least 1.")
        find_anatomy(model)
        run_dry(model)
        with tempfile.TemporaryDirectory() as scratch:
            model.config.save_pretrained(scratch)  # refuses values that loading takes
    except SnpError:
        raise
    except Exception as error:  # whatever transformers and torch say of values that do not fit together
        raise SnpError(
            f"model {name}: no model can be built from its config, or saved with it. {reason(error)}"
        ) from error
    return model


def run_dry(model: PreTrainedModel) -> None:
    """Runs a smallest input through shapes of the part to be pruned, which fails where values do not fit together.

    A model whose code asks for values, which shapes have not, is taken at its word. Most do for the sake of packed
    sequences, and only where no whole mask is given; a whole one that a model does not take (OPT) says nothing of its
    config either.
    """
    run = task_of(model.config).smallest
    for masked in (False, True):
        try:
            with torch.no_grad(), torch.device("meta"):
                run(model.eval(), masked)
            return
        except (RuntimeError, NotImplementedError) as error:
            # Grouped products of shapes want bfloat16; some turn a mask by its dimensions.
            if not any(word in str(error) for word in ("meta", "mat_a", "permute")):
                raise
        except (ValueError, TypeError, IndexError):
            if not masked:
                raise


def check_text_weights(name: str, model: PreTrainedModel) -> None:
    """Raises SnpError if a local folder holds a model's towers without its text model, by the headers of its files.

    Loaded, such a model would get random blocks first.

    Args:
        name: of the folder.
        model: its skeleton.
    """
    files = sorted(Path(find_model(name)).glob("*.safetensors"))
    if text_config(model.config) is model.config or not files:
        return
    wanted = {(f".0.{path}", tuple(p.shape)) for path, p in find_blocks(model)[0].named_parameters() if p.dim() > 1}
    for file in files:
        with explained(name), safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - no mapping
                shape = tuple(tensors.get_slice(key).get_shape())
                if any(key.endswith(end) and shape == known for end, known in wanted):
                    return
    raise SnpError(
        f"model {name}: its files hold no weights of the text model's blocks, such as {blocks_path(model)}"
        f"{min(end for end, _ in wanted)}; expected the whole model. Towers alone cannot be pruned."
    )


def check_reader(name: str, config: PretrainedConfig) -> None:
    """Raises SnpError if a local folder holds no tokenizer, or image processor, before its weights are read."""
    path, reader, auto = Path(find_model(name)), reader_for(config), task_of(config).reader
    if path.is_dir() and not any(any(path.glob(pattern)) for pattern in reader.patterns):
        raise SnpError(
            f"model {name}: no {reader.word} in that folder; expected {reader.usual} or another {reader.word}'s files "
            f"beside the weights. Save it there: {auto}.from_pretrained(ORIGINAL).save_pretrained(FOLDER)."
        )
