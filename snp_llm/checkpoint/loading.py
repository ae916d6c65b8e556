"""Models from disk or the Hub: found, checked by their configs, loaded with what reads their inputs. Saves nothing."""

import logging
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from snp_llm.checkpoint.processor import load_processor
from snp_llm.checkpoint.timm_vgg import converted
from snp_llm.checkpoint.tokenizer import find_tokenizer_files
from snp_llm.data.sources import BUNDLED
from snp_llm.models import modeling_snp
from snp_llm.models.anatomy import embedding_rows, find_anatomy
from snp_llm.models.families.decoders import find_family
from snp_llm.models.layouts import needs_code
from snp_llm.models.offload import complete_index, in_two_files, other_shapes
from snp_llm.models.registry import auto_class
from snp_llm.models.task import task_of
from snp_llm.models.text_part import text_config
from snp_llm.recipe.recipe import TINY_OPT
from snp_llm.runtime.errors import SnpError, reason

log = logging.getLogger(__name__)

# Config keys with an entry for every layer, beside others that a type checks itself.
BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "num_attention_heads_per_layer", "no_rope_layers")

MODELING = Path(modeling_snp.__file__)

# By the method that a config names, the call of transformers that gives float weights back.
LOADED = "from_pretrained(MODEL, quantization_config={}(dequantize=True)).save_pretrained(FOLDER)"
DEQUANTISED = {
    "bitsandbytes": "from_pretrained(MODEL).dequantize().save_pretrained(FOLDER)",
    "higgs": "from_pretrained(MODEL).dequantize().save_pretrained(FOLDER)",
    "fp8": LOADED.format("FineGrainedFP8Config"),
    "mxfp4": LOADED.format("Mxfp4Config"),
}


def load(
    name: str, dtype: str, *, trust_remote_code: bool = False, on_disk: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of a supported family, and its tokenizer or image processor, on the CPU.

    Args:
        name: hub id, local folder, or `tiny-opt`.
        dtype: "auto" for the checkpoint's, or a torch dtype's name.
        trust_remote_code: whether code in its repository may run.
        on_disk: leave the weights in their files, from where blocks are read when their turn comes. This folder takes
            those that are in no safetensors file; it has to last as long as the model does.

    Raises:
        SnpError: not found, unsupported, quantised, or weights that do not fit the config.
    """
    path = find_model(name)
    if (Path(path) / "adapter_config.json").exists():
        raise SnpError(
            f"model {name}: is a LoRA adapter; expected a whole model. Merge it first: "
            "peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(MERGED)."
        )
    config = read_config(name, trust_remote_code=trust_remote_code)
    check_own_code(name, config, trusted=trust_remote_code)
    with explained(name):
        loaded: Any = auto_class(config).from_pretrained(
            path,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they come back in `info`, and are refused below with their names
            **({} if on_disk is None else {"device_map": {"": "disk"}, "offload_folder": str(on_disk)}),
        )
    model, info = loaded
    with explained(name):
        complete_index(model)
        mismatched, twice = sorted([*info["mismatched_keys"], *other_shapes(model)]), in_two_files(model)
    if mismatched:
        key, found, expected = mismatched[0]
        raise SnpError(
            f"model {name}: {len(mismatched)} tensors disagree with its config; {key} is {tuple(found)}, expected "
            f"{tuple(expected)}. The checkpoint is damaged, or its config.json is another model's."
        )
    if twice:
        raise SnpError(
            f"model {name}: two of its files hold {twice[0]}, with different values; expected every tensor once. "
            "Remove it from the file that model.safetensors.index.json does not name for it."
        )
    for verb, keys in (("lacks", info["missing_keys"]), ("has no place in its config for", info["unexpected_keys"])):
        if keys:
            raise SnpError(f"model {name}: the checkpoint {verb} {len(keys)} tensors, {sorted(keys)[0]} first.")
    load_reader = READERS[task_of(config).name]
    return model.eval().requires_grad_(False), load_reader(name, path, model, trust_remote_code=trust_remote_code)


def load_tokenizer(name: str, path: str, model: PreTrainedModel, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model, which transformers finds at a path.

    Raises:
        SnpError: there is none, it cannot be loaded, or it is another model's.
    """
    with explained(name, "tokenizer of "):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        missing = not find_tokenizer_files(path, tokenizer)
    if missing:
        raise SnpError(
            f"tokenizer of {name}: there is none; expected tokenizer.json, tokenizer.model or vocab.json beside the "
            "weights. Copy the tokenizer's files from the model that this one was made from."
        )
    rows = embedding_rows(model)
    # Embeddings are often padded to a round number, never to twice the vocabulary. Tokens that were added may lie past
    # them, as that for images does in models for text alone; they are an error where a text has them.
    ids = {id for token, id in tokenizer.get_vocab().items() if id < rows or token not in tokenizer.get_added_vocab()}
    if len(ids) < rows / 2 or max(ids) >= rows:
        raise SnpError(
            f"tokenizer of {name}: expected about {rows:,} tokens, as many as the model embeds, with ids below that; "
            f"it has {len(ids):,}, up to id {max(ids, default=-1):,}. They do not belong together."
        )
    return tokenizer


READERS: dict[str, Callable[..., Any]] = {"text": load_tokenizer, "images": load_processor}


def find_model(name: str) -> str:
    """Where transformers finds a model: a hub id, or a folder.

    Raises:
        SnpError: neither.
    """
    path = str(BUNDLED / TINY_OPT) if name == TINY_OPT else name
    if not Path(path).exists() and not is_hub_id(name):
        raise SnpError(f"model {name}: no such folder, and not a hub id (user/name) or the bundled {TINY_OPT!r}.")
    return converted(path) or path


def is_hub_id(name: str) -> bool:
    """Whether a model's name means a repository on the Hub, not a folder."""
    return name.count("/") == 1 and name[0] not in "./~" and not Path(name).exists()


def read_config(name: str, *, trust_remote_code: bool) -> PretrainedConfig:
    """What a model's `config.json` says.

    Raises:
        SnpError: not found, or not of a model that can be pruned.
    """
    path = find_model(name)
    with explained(name, part="its config "):
        values, _ = PretrainedConfig.get_config_dict(path)
        for part in (values, *(value for value in values.values() if isinstance(value, dict))):
            check_layers(name, part)
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    check_config(name, config)
    return config


def check_layers(name: str, values: dict[str, Any]) -> None:
    """Raises SnpError if what a config says layer by layer is not about as many layers as it has."""
    layers, later = values.get("num_hidden_layers"), values.get("num_nextn_predict_layers") or 0
    if isinstance(layers, bool) or not isinstance(layers, int) or not isinstance(later, int):
        return  # said in other words, or refused elsewhere
    for key in BY_LAYER:
        said = values.get(key)
        if isinstance(said, list) and len(said) not in (layers, layers + later):
            raise SnpError(
                f"model {name}: config {key}: expected {layers} entries, one for each of its num_hidden_layers, got "
                f"{len(said)}."
            )
    structure = values.get("pruned_structure") or {"parts": []}
    of = [index for part in structure["parts"] for index in part["of"]]
    for key, said in (("pruned_layers", values.get("pruned_layers") or {}), ("pruned_structure", of)):
        for index in map(str, said):  # of layers there may be said to be billions
            if not index.isdecimal() or int(index) >= layers or index != str(int(index)):
                raise SnpError(f"model {name}: config {key}: expected layers 0 to {layers - 1}, got {index}.")
    if structure["parts"] and (len(of) != layers or len(set(of)) != layers):
        raise SnpError(
            f"model {name}: config pruned_structure: expected every one of {layers} layers once, got {len(of)}."
        )


def check_config(name: str, config: PretrainedConfig) -> None:
    """Refuses what cannot be pruned, before any weight is read."""
    text: Any = text_config(config)
    if not isinstance(text, PretrainedConfig):  # a type that knows of no such key keeps it as it is
        raise SnpError(
            f"model {name}: config text_config: expected none, {config.model_type} has no text model inside of it."
        )
    if any(part.is_encoder_decoder or getattr(part, "add_cross_attention", False) for part in (config, text)):
        raise SnpError(f"model {name}: {config.model_type} is an encoder-decoder; expected a decoder-only model.")
    for said in (getattr(part, "quantization_config", None) for part in (config, text)):
        if said:
            raise SnpError(
                f"model {name}: the checkpoint is quantised; expected float weights. Prune the float model that it was "
                f"made from{way_back(said)}"
            )
    # As an attribute it is never empty. Types that read it have one of their own, as Gemma 4 does.
    if text.to_dict().get("per_layer_config") and not type(text)().to_dict().get("per_layer_config"):
        raise SnpError(
            f"model {name}: its config differs from layer to layer (per_layer_config), which the modelling code of "
            f"{config.model_type} does not read; expected one config for all layers, or this package's pruned_layers."
        )
    if not find_family(config).alike:  # whether its blocks are known shows in modules alone
        with torch.device("meta"):
            find_anatomy(auto_class(config).from_config(config))


def way_back(said: Any) -> str:
    """The end of a sentence: how the weights that a `quantization_config` is about become float ones again."""
    method = str(said.get("quant_method") if isinstance(said, dict) else said.quant_method.value)
    if method not in DEQUANTISED:
        return f"; of {method} no way back is known here."
    return f", or dequantise it: {DEQUANTISED[method]}, and save its tokenizer there too."


def check_own_code(name: str, config: PretrainedConfig, *, trusted: bool) -> None:
    """Says so if the modelling file that came with a pruned model is not the one that is used for it here.

    Raises:
        SnpError: it was trusted, so that it should be used.
    """
    if not needs_code(config):
        return
    names = (MODELING.name, f"modeling_{config.model_type}.py")  # of its own in every family, in earlier versions
    found = (cached_file(find_model(name), file, _raise_exceptions_for_missing_entries=False) for file in names)
    theirs = next((Path(file) for file in found if file), MODELING)
    if theirs.read_bytes() == MODELING.read_bytes():
        return
    if trusted:
        raise SnpError(
            f"model {name}: its {theirs.name} is not this version's, with which a model that is pruned again would be "
            "saved. Leave out --trust-remote-code to use this version's from the start."
        )
    log.warning("model %s: its %s is not this version's, which is used instead", name, theirs.name)


@contextmanager
def explained(name: str, what: str = "model ", part: str = "") -> Iterator[None]:
    """Turns whatever goes wrong in loading a model, or a part of it ("its config "), into one line."""
    try:
        yield
    except SnpError:
        raise
    except Exception as error:  # transformers, the hub client and safetensors raise dozens of kinds
        if isinstance(error, pickle.UnpicklingError):
            raise SnpError(
                f"{what}{name}: its weights are a pickle that is damaged or holds more than tensors, which might run "
                "code when loaded; expected safetensors. Convert them with software that you trust."
            ) from error
        if "trust_remote_code" in str(error):
            raise SnpError(
                f"{what}{name}: needs Python code from its own repository, which is not run unasked. If you have read "
                "that code and trust it, allow it with --trust-remote-code."
            ) from error
        here = f" There is no folder {name} here." if is_hub_id(name) else ""
        raise SnpError(f"{what}{name}: {part}cannot be loaded. {reason(error)}{here}") from error
