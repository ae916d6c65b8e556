"""Models from and to disk: load and check, save, reload in a fresh process and compare. Knows nothing of pruning."""

import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from snp_llm import ranks
from snp_llm.data import BUNDLED
from snp_llm.errors import SnpError
from snp_llm.measure import logits_block_by_block
from snp_llm.models.config_file import config_for_both, tokenizer_for_both
from snp_llm.models.families import embedding_rows, find_family

TINY_OPT = "tiny-opt"
LARGEST_SHARD = "500MB"  # a shard is in host memory while it is written
# Largest difference of a logit after reloading, relative to the largest logit. The same kernels on the same device give
# the same bits; what is allowed for is a different choice of kernel, at the precision of the type.
LOGIT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
JOURNAL = "journal"  # what an unfinished run has done
DENSE = "dense"  # weights that are in no safetensors file
UNFINISHED = (JOURNAL, DENSE)  # parts of a temporary folder that do not belong to the finished one
RELOAD = Path(__file__).with_name("reload.py")

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
    if mismatched := sorted(info["mismatched_keys"]):
        key, found, expected = mismatched[0]
        raise SnpError(
            f"model {name}: {len(mismatched)} tensors disagree with its config; {key} is {tuple(found)}, expected "
            f"{tuple(expected)}. The checkpoint is damaged, or its config.json is another model's."
        )
    for verb, keys in (("lacks", info["missing_keys"]), ("has no place in its config for", info["unexpected_keys"])):
        if keys:
            raise SnpError(f"model {name}: the checkpoint {verb} {len(keys)} tensors, {sorted(keys)[0]} first.")
    with explained(name, "tokenizer of "):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if not trust_remote_code:  # else the pruned model, whose own code its users do trust, would point to that code
        tokenizer.init_kwargs.pop("auto_map", None)
    rows = embedding_rows(model)
    ids = set(tokenizer.get_vocab().values())
    # Embeddings are often padded to a round number, never to twice the vocabulary.
    if len(ids) < rows / 2 or max(ids) >= rows:
        raise SnpError(
            f"tokenizer of {name}: expected about {rows:,} tokens, as many as the model embeds, with ids below that; "
            f"it has {len(ids):,}, up to id {max(ids, default=-1):,}. They do not belong together."
        )
    return model.eval().requires_grad_(False), tokenizer


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


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Raises SnpError if the finished model could not be put there, before hours are spent on it."""
    if folder.exists() and not overwrite:
        raise SnpError(f"output {folder}: exists. Choose another --output, or replace it with --overwrite.")
    if folder.is_file():
        raise SnpError(f"output {folder}: is a file; expected a folder or nothing.")
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise SnpError(f"output {folder}: cannot be written ({error.strerror or error}).") from error


@contextmanager
def finished_folder(folder: Path, *, overwrite: bool, resume: bool = False) -> Iterator[Path]:
    """A temporary sibling of `folder` to write into, renamed to it when the context ends well, else removed.

    What the run has put into its `UNFINISHED` parts stays out of the finished folder. If there is something in them
    that a later run can go on from, the temporary folder outlives this one.

    Args:
        folder: to be.
        overwrite: replace it if it is there, and forget an unfinished run.
        resume: go on with an unfinished run, if there is one.

    Raises:
        SnpError: it cannot be written, or is being written by another process; an unfinished run is there, unasked for.
    """
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    if ranks.rank():  # rank 0 writes
        yield ranks.from_rank(0, lambda: partial)
        return
    try:
        with ExitStack() as stack:

            def open_it() -> Path:
                folder.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(partial))
                if partial.exists() and not resume:
                    if can_resume(partial) and not overwrite:
                        raise SnpError(
                            f"output {folder}: an unfinished run is there, in {partial.name}. Go on with it with "
                            "--resume, or forget it with --overwrite."
                        )
                    shutil.rmtree(partial)
                partial.mkdir(exist_ok=True)
                return partial

            try:
                ranks.from_rank(0, open_it)
                yield partial
                for file in partial.rglob("*"):  # safetensors makes its files readable by their owner only
                    file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
                partial.chmod(0o777 & ~_umask())
                if not overwrite:
                    check_output(folder, overwrite=False)
            except BaseException as error:
                # Of a mistake that shows before the first cut, the visit to the dense model is all that would be kept.
                if can_resume(partial, "[!v]*" if isinstance(error, SnpError) else "*"):
                    log.warning("the unfinished run is kept in %s; go on with --resume", partial)
                else:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
            _exchange(partial, folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SnpError(f"output {folder}: cannot be written ({reason}).") from error


def _exchange(partial: Path, folder: Path) -> None:
    """Puts a temporary folder in the place of the finished one, and only then removes what nobody needs any more."""
    rest = partial.with_name(f"{partial.name}.old")
    shutil.rmtree(rest, ignore_errors=True)
    rest.mkdir()
    for name in UNFINISHED:
        if (partial / name).exists():
            (partial / name).rename(rest / name)
    if folder.exists():
        folder.rename(rest / "replaced")
    partial.rename(folder)
    shutil.rmtree(rest)


def can_resume(partial: Path, phases: str = "*") -> bool:
    """Whether a temporary folder holds anything that a run can go on from, in phases of some names."""
    return any(partial.glob(f"{JOURNAL}/{phases}/state.json"))


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Keeps other processes from writing the same output; the lock ends with the process, however that ends."""
    file = partial.with_name(f"{partial.name}.lock")
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SnpError(
            f"output {partial.parent}: another run is writing {partial.name}. Wait for it or stop it."
        ) from None
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        lock.release()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Config, safetensors, generation config, tokenizer, and the modelling file where the config needs one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
        model.save_pretrained(folder, max_shard_size=LARGEST_SHARD)
    tokenizer.save_pretrained(folder)
    for name, for_both in (("config.json", config_for_both), ("tokenizer_config.json", tokenizer_for_both)):
        if (file := Path(folder) / name).exists():
            values = for_both(json.loads(file.read_text(encoding="utf-8")))
            file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def verify(model: PreTrainedModel, folder: Path, tokens: Tensor) -> float:
    """Reloads a folder in a fresh process that never imports this package, and compares logits, both on the CPU.

    Args:
        model: what was saved, on the CPU.
        folder: where.
        tokens: to compare on, (batch, T), int64.

    Returns:
        The largest difference of a logit, relative to the largest logit.

    Raises:
        SnpError: the folder does not load, or its logits differ by more than rounding.
    """
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
    logits = logits_block_by_block(model, tokens)
    difference = float((logits.double() - reloaded.double()).abs().max() / logits.double().abs().max())
    if not difference <= LOGIT_TOLERANCE[model.dtype]:
        raise SnpError(
            f"the saved model computes something else after reloading: logits differ by {difference:.1e} of the "
            f"largest, expected at most {LOGIT_TOLERANCE[model.dtype]:.0e}."
        )
    return difference


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
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise SnpError(f"{what}{name}: {part}cannot be loaded. {lines[0][:300]}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
