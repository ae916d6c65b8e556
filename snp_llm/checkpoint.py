"""Models from and to disk: load and check, save, reload in a fresh process and compare. Knows nothing of pruning."""

import json
import logging
import os
import pickle
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from snp_llm.data import BUNDLED
from snp_llm.errors import SnpError, reason
from snp_llm.measure import logits_block_by_block
from snp_llm.models.config_file import config_for_both, tokenizer_for_both
from snp_llm.models.families import embedding_rows, find_family
from snp_llm.models.layouts import needs_code
from snp_llm.models.on_disk import complete_index, disk_index, in_two_files, other_shapes, read_tensor
from snp_llm.tokenizer_files import carry_over, find_tokenizer_files, without_code

TINY_OPT = "tiny-opt"
LARGEST_SHARD = "500MB"  # a shard is in host memory while it is written
# Largest difference of a logit after reloading, relative to the largest logit. The same kernels on the same device give
# the same bits; what is allowed for is a different choice of kernel, at the precision of the type.
LOGIT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
RELOAD = Path(__file__).with_name("reload.py")
MODELING = Path(__file__).with_name("models")

log = logging.getLogger(__name__)


def load(
    name: str, dtype: str, *, trust_remote_code: bool = False, on_disk: Path | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model of a supported family and its tokenizer, on the CPU.

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
    with explained(name):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    check_config(name, config)
    check_own_code(name, config, trusted=trust_remote_code)
    with explained(name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
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
    return model.eval().requires_grad_(False), load_tokenizer(name, model, trust_remote_code=trust_remote_code)


def load_tokenizer(name: str, model: PreTrainedModel, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        SnpError: there is none, it cannot be loaded, or it is another model's.
    """
    path = find_model(name)
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


def find_model(name: str) -> str:
    """Where transformers finds a model: a hub id, or a folder.

    Raises:
        SnpError: neither.
    """
    path = str(BUNDLED / TINY_OPT) if name == TINY_OPT else name
    if not Path(path).exists() and not is_hub_id(name):
        raise SnpError(f"model {name}: no such folder, and not a hub id (user/name) or the bundled {TINY_OPT!r}.")
    return path


def is_hub_id(name: str) -> bool:
    """Whether a model's name means a repository on the Hub, not a folder."""
    return name.count("/") == 1 and name[0] not in "./~" and not Path(name).exists()


def check_config(name: str, config: PretrainedConfig) -> None:
    """Refuses what cannot be pruned, before any weight is read."""
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise SnpError(f"model {name}: {config.model_type} is an encoder-decoder; expected a decoder-only model.")
    if getattr(config, "quantization_config", None):
        raise SnpError(
            f"model {name}: the checkpoint is quantised; expected float weights. Prune the float model that it was "
            "made from, or dequantise it: from_pretrained(MODEL).dequantize().save_pretrained(FOLDER)."
        )
    if config.to_dict().get("per_layer_config"):  # as an attribute it is never empty
        raise SnpError(
            f"model {name}: its config differs from layer to layer (per_layer_config), which the modelling code of "
            f"{config.model_type} does not read; expected one config for all layers, or this package's pruned_layers."
        )
    find_family(config)


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, tokenizer_of: str | None = None
) -> None:
    """Config, safetensors, generation config, tokenizer, and the modelling file where the config needs one.

    Args:
        model: pruned.
        tokenizer: its.
        folder: to write into.
        tokenizer_of: the model whose tokenizer files are carried over as they are; None: they are written anew.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
        model.save_pretrained(folder, max_shard_size=LARGEST_SHARD)
    _rewrite(folder / "config.json", config_for_both)
    if tokenizer_of is None:
        tokenizer.save_pretrained(folder)
        without_code(folder)
        _rewrite(folder / "tokenizer_config.json", tokenizer_for_both)
    else:
        carry_over(find_tokenizer_files(find_model(tokenizer_of), tokenizer), folder)


def _rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if file.exists():
        values = change(json.loads(file.read_text(encoding="utf-8")))
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        file.write_text(text, encoding="utf-8", errors="backslashreplace")  # halves of characters, as JSON escapes them


def verify(dense: PreTrainedModel, pruned: PreTrainedModel, folder: Path, tokens: Tensor) -> float:
    """Reloads a folder in a fresh process that never imports this package, and compares it with what was loaded.

    Everything but the blocks has to be what was loaded to the bit, and the logits those of the loaded model with the
    pruned blocks in the place of its own: what a config does not say of the model that it was made for shows there.

    Args:
        dense: as it was loaded.
        pruned: whose blocks were saved.
        folder: where.
        tokens: to compare logits on, (batch, T), int64.

    Returns:
        The largest difference of a logit, relative to the largest logit; both are computed on the CPU.

    Raises:
        SnpError: the folder does not load, holds other weights, or its logits differ by more than rounding.
    """
    blocks = pruned.get_submodule(find_family(pruned.config).blocks)
    assert isinstance(blocks, nn.ModuleList)
    check_kept(dense, folder)
    with tempfile.TemporaryDirectory() as scratch:
        given, result = Path(scratch) / "tokens.safetensors", Path(scratch) / "logits.safetensors"
        save_file({"tokens": tokens.contiguous()}, given)
        # The code goes in as text and the process starts elsewhere, so that neither can be found through the path.
        process = subprocess.run(
            [sys.executable, "-c", RELOAD.read_text(), str(folder.absolute()), str(given), str(result)],
            cwd=scratch,
            env={**os.environ, "HF_MODULES_CACHE": str(Path(scratch) / "modules"), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        if process.returncode != 0:
            reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
            raise SnpError(f"the saved model does not load in a fresh process: {reason[:300]}")
        reloaded = load_file(result)["logits"]
    logits = logits_block_by_block(dense, tokens, blocks)
    difference = float((logits.double() - reloaded.double()).abs().max() / logits.double().abs().max())
    if not difference <= LOGIT_TOLERANCE[pruned.dtype]:
        raise SnpError(
            f"the saved model computes something else after reloading: logits differ by {difference:.1e} of the "
            f"largest, expected at most {LOGIT_TOLERANCE[pruned.dtype]:.0e}."
        )
    return difference


def check_kept(dense: PreTrainedModel, folder: Path) -> None:
    """Raises SnpError unless a folder holds every tensor outside the blocks as it was loaded, to the bit."""
    with tempfile.TemporaryDirectory() as scratch, explained(str(folder), "the saved model "):
        found: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True, device_map={"": "disk"}, offload_folder=scratch
        )
        saved, info = found
        complete_index(saved)
        prefix = find_family(dense.config).blocks + "."
        loaded, kept = (
            {name: (tensor, index.get(name)) for name, tensor in model.state_dict().items() if prefix not in name}
            for model, index in ((dense, disk_index(dense)), (saved, disk_index(saved)))
        )
        wrong = [*info["missing_keys"], *info["unexpected_keys"], *(loaded.keys() ^ kept.keys())]
        for name, (tensor, entry) in () if wrong else loaded.items():
            one, other = ((t.cpu() if e is None else read_tensor(e, t)) for t, e in ((tensor, entry), kept[name]))
            wrong += [] if torch.equal(one, other) else [name]
    if wrong:
        raise SnpError(
            f"the saved model is not the one that was loaded: {wrong[0]} differs. That is a fault of this program, or "
            "of the disk; nothing was kept. Please report it with the model's config.json."
        )


def check_own_code(name: str, config: PretrainedConfig, *, trusted: bool) -> None:
    """Says so if the modelling file that came with a pruned model is not the one that is used for it here.

    Raises:
        SnpError: it was trusted, so that it should be used.
    """
    if not needs_code(config):
        return
    for own in (MODELING / f"modeling_{config.model_type}.py", MODELING / "snp_blocks.py"):
        theirs = cached_file(find_model(name), own.name, _raise_exceptions_for_missing_entries=False)
        if theirs is None or Path(theirs).read_bytes() == own.read_bytes():
            continue
        if trusted:
            raise SnpError(
                f"model {name}: its {own.name} is not this version's, with which a model that is pruned again would be "
                "saved. Leave out --trust-remote-code to use this version's from the start."
            )
        log.warning("model %s: its %s is not this version's, which is used instead", name, own.name)


def folder_bytes(folder: Path) -> int:
    """Bytes of the weight files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


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
        raise SnpError(f"{what}{name}: {part}cannot be loaded. {reason(error)}") from error
