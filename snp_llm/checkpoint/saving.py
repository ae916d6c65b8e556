"""A pruned model into a folder, reloaded in a fresh process and compared with what was loaded."""

import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snp_llm.checkpoint.loading import explained, find_model
from snp_llm.checkpoint.readers import reader_for
from snp_llm.checkpoint.tokenizer import carry_over, without_code
from snp_llm.models.anatomy import block_prefixes, find_blocks
from snp_llm.models.calls import without_cache
from snp_llm.models.config_file import config_for_both, tokenizer_for_both
from snp_llm.models.layouts import needs_code
from snp_llm.models.logits import logits_block_by_block
from snp_llm.models.offload import complete_index, disk_index, on_device, read_tensor
from snp_llm.models.registry import auto_class
from snp_llm.models.segments import Segments
from snp_llm.models.surgery import NoBlock
from snp_llm.models.task import task_of
from snp_llm.runtime.device import exact_products
from snp_llm.runtime.errors import SnpError

log = logging.getLogger(__name__)

LARGEST_SHARD = "500MB"  # a shard is in host memory while it is written

# Largest difference of a logit after reloading, relative to the largest logit. The same kernels on the same device give
# the same bits; what is allowed for is a different choice of kernel, at the precision of the type.
LOGIT_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}

CPU = torch.device("cpu")

RELOAD = Path(__file__).with_name("reload.py")


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path | str, *, tokenizer_of: str | None = None
) -> None:
    """Saves config, safetensors, generation config, tokenizer, and the modelling file where the config needs one.

    Args:
        model: pruned.
        tokenizer: its.
        folder: to write into.
        tokenizer_of: the model whose tokenizer and processor files are carried over as they are; None: the tokenizer's
            are written anew.
    """
    folder = Path(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
        # Of a type that transformers does not know it would turn back the names of parts alone, which 4 cannot read.
        stock = not needs_code(model.config)
        model.save_pretrained(folder, max_shard_size=LARGEST_SHARD, save_original_format=stock)
    _rewrite(folder / "config.json", config_for_both)
    if tokenizer_of is None:
        tokenizer.save_pretrained(folder)
        without_code(folder)
        _rewrite(folder / "tokenizer_config.json", tokenizer_for_both)
    else:
        carry_over(reader_for(model.config).files(find_model(tokenizer_of), tokenizer), folder)


def _rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if file.exists():
        values = change(json.loads(file.read_text(encoding="utf-8")))
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        file.write_text(text, encoding="utf-8", errors="backslashreplace")  # halves of characters, as JSON escapes them


@dataclass
class FreshProcess:
    """A process that has never imported this package, and loads a saved model once it is told where that is.

    Attributes:
        process: that runs.
        scratch: folder of what goes in and comes out.
        device: that it computes on.
    """

    process: "subprocess.Popen[str]"
    scratch: Path
    device: torch.device = CPU

    def load(self, folder: Path, tokens: Tensor, device: torch.device = CPU) -> None:
        """Lets it compute logits with what is in a folder, while this process goes on.

        Args:
            folder: of the saved model.
            tokens: to compute logits of, (batch, T), int64.
            device: to compute on.
        """
        assert self.process.stdin is not None
        self.device = device
        save_file({"tokens": tokens.contiguous()}, self.scratch / "tokens.safetensors")
        with suppress(BrokenPipeError):  # what ended it comes out with the logits
            self.process.stdin.write(json.dumps([str(folder.absolute()), device.type]) + "\n")
            self.process.stdin.close()

    def logits(self) -> Tensor:
        """Logits of the saved model, as soon as they are there.

        Raises:
            SnpError: it does not load.
        """
        if self.process.wait() != 0:
            said = (self.scratch / "stderr").read_text(encoding="utf-8", errors="replace")
            reason = (said.strip().splitlines() or ["no message"])[-1]
            raise SnpError(f"the saved model does not load in a fresh process: {reason[:300]}")
        return load_file(self.scratch / "logits.safetensors")["logits"]


@contextmanager
def fresh_process(dense: PreTrainedModel) -> Iterator[FreshProcess]:
    """Starts the process that will load a saved model. It reads its libraries while the model is not there yet.

    Args:
        dense: as it was loaded; says by which Auto class.
    """
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        arguments = [
            *(str(scratch / f"{n}.safetensors") for n in ("tokens", "logits")),
            *(auto_class(dense.config).__name__, task_of(dense.config).reader, json.dumps(without_cache(dense))),
        ]
        with open(scratch / "stderr", "wb") as said:
            # The code goes in as text and the process starts elsewhere, so that neither can be found through the path.
            process = subprocess.Popen(
                [sys.executable, "-c", RELOAD.read_text(), *arguments],
                cwd=scratch,
                env={**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=said,
                text=True,
            )
        try:
            yield FreshProcess(process, scratch)
        finally:
            process.kill()
            process.communicate()


def compare(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    folder: Path,
    tokens: Tensor,
    fresh: FreshProcess,
    gone: Sequence[int] = (),
) -> float:
    """Compares a reloaded folder's logits with those of the loaded model with the pruned blocks in place of its own.

    What a config does not say of the model that it was made for shows there.

    Args:
        dense: as it was loaded.
        pruned: whose blocks were saved.
        folder: where.
        tokens: to compare logits on, (batch, T), int64.
        fresh: has been told to load it. What a GPU has no room for, or is not shared for, is tried again on the CPU.
        gone: numbers of the dense model's blocks that the pruned one does not have.

    Returns:
        The largest difference of a logit, relative to the largest logit; both are computed on the same kind of device.

    Raises:
        SnpError: the folder does not load, or its logits differ by more than rounding.
    """
    try:
        reloaded = fresh.logits()
    except SnpError as error:
        if fresh.device.type == "cpu":
            raise
        log.info("%s Once more, on the CPU.", error)
        with fresh_process(dense) as again:
            again.load(folder, tokens)
            return compare(dense, pruned, folder, tokens, again, gone)
    logits = expected_logits(dense, pruned, tokens, fresh.device, gone)
    difference = float((logits.double() - reloaded.double()).abs().max() / logits.double().abs().max())
    if not difference <= LOGIT_TOLERANCE[pruned.dtype]:
        raise SnpError(
            f"the saved model computes something else after reloading: logits differ by {difference:.1e} of the "
            f"largest, expected at most {LOGIT_TOLERANCE[pruned.dtype]:.0e}."
        )
    return difference


@exact_products()  # as in the fresh process
def expected_logits(
    dense: PreTrainedModel, pruned: PreTrainedModel, tokens: Tensor, device: torch.device, gone: Sequence[int] = ()
) -> Tensor:
    """Logits of the loaded model with the pruned blocks, or with the pruned tensors in all of its layers."""
    blocks = find_blocks(pruned)
    if not isinstance(blocks, Segments):
        if gone:
            left = iter(blocks)
            blocks = nn.ModuleList(NoBlock() if i in gone else next(left) for i in range(len(find_blocks(dense))))
        return logits_block_by_block(dense, tokens, blocks, device)
    with torch.no_grad(), on_device(dense, device), on_device(pruned, device):
        found: Tensor = functional_call(dense, dict(pruned.state_dict()), (tokens.to(device),)).logits
    return found.cpu()


def verify(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    folder: Path,
    tokens: Tensor,
    device: torch.device = CPU,
    gone: Sequence[int] = (),
) -> float:
    """Checks a folder against what was loaded: everything but the blocks to the bit, and the logits as `compare` does.

    Raises:
        SnpError: the folder does not load, holds other weights, or its logits differ by more than rounding.
    """
    check_kept(dense, folder)
    with fresh_process(dense) as fresh:
        fresh.load(folder, tokens, device)
        return compare(dense, pruned, folder, tokens, fresh, gone)


def check_kept(dense: PreTrainedModel, folder: Path) -> None:
    """Raises SnpError unless a folder holds every tensor outside the blocks as it was loaded, to the bit."""
    with tempfile.TemporaryDirectory() as scratch, explained(str(folder), "the saved model "):
        found: Any = auto_class(dense.config).from_pretrained(
            folder, dtype="auto", output_loading_info=True, device_map={"": "disk"}, offload_folder=scratch
        )
        saved, info = found
        complete_index(saved)
        prefixes, blocks = block_prefixes(dense), find_blocks(dense)
        inside = {prefix + k for prefix, block in zip(prefixes, blocks, strict=True) for k in block.state_dict()}
        loaded, kept = (
            {name: (tensor, index.get(name)) for name, tensor in model.state_dict().items() if name not in inside}
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


def folder_bytes(folder: Path) -> int:
    """Bytes of the weight files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
