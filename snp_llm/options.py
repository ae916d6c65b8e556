"""What the commands beside `prune`, `eval` and `push` are asked, and how all of them talk. Knows no models."""

import logging
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from snp_llm.recipe import SPARSITY, Device, Dtype, HiddenDevice, check_settings


@dataclass(frozen=True)
class Talk:
    """How a command talks: results on stdout, progress and remarks on stderr."""

    json: bool = False
    """Print the result as one JSON object instead of tables."""
    quiet: bool = False
    """No progress and no remarks: the result, warnings and errors."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least important kind of remark that is printed."""

    @property
    def level(self) -> int:
        """As `logging` counts."""
        level: int = getattr(logging, self.log_level.upper())
        return max(level, logging.WARNING) if self.quiet else level


@dataclass(frozen=True)
class InspectRecipe:
    """What a model is made of, what pruning can give, and what that takes; from its config alone, without weights."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """Hub id, local folder (`config.json` is enough), an output of `snp-llm prune`, or the bundled `tiny-opt`."""
    sparsity: float = SPARSITY
    """For which sizes and the resources of a prune are given."""
    head_unit: Literal["kv_group", "query"] = "kv_group"
    """As for prune: which heads go together."""
    num_samples: int = 128
    """As for prune: calibration windows."""
    seq_len: int | None = None
    """As for prune: tokens a window. Default: the model's maximum, at most 2048."""
    batch_size: int = 8
    """As for prune: windows run through a block at a time."""
    hidden_device: HiddenDevice = "cpu"
    """As for prune: where hidden states wait between blocks."""
    device: Device = "auto"
    """On which a prune would compute. Its speed is probed for a fifth of a second; of one that is not here only memory
    is estimated."""
    dtype: Dtype = "auto"
    """Type of the weights. auto: as in the checkpoint."""
    trust_remote_code: bool = False
    """Allow Python code in MODEL's repository to run."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class BenchRecipe:
    """Speed, memory and size of a dense and a pruned model side by side, the two taking turns so that drift cancels."""

    dense: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="DENSE")]]
    """Hub id, local folder, or the bundled `tiny-opt`."""
    pruned: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="PRUNED")]]
    """The same for the model that is compared with it."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Windows at a time."""
    prompt_lengths: tuple[int, ...] = (128, 512)
    """Tokens of a prompt."""
    new_tokens: int = 16
    """Tokens decoded after a prompt, one at a time; 0 for none."""
    repeats: int = 7
    """Timed passes of each model for every row, after a warm-up; medians count."""
    compile: bool = False
    """Run both through torch.compile first. Needs a C++ compiler on the CPU; the first pass takes minutes."""
    memory: bool = True
    """Measure peak memory too, each model in a fresh process."""
    save: bool = False
    """Write bench.json into PRUNED, an output folder of `snp-llm prune`, and a section into its model card."""
    device: Device = "auto"
    """auto: cuda, else mps, else cpu."""
    dtype: Dtype = "auto"
    """Type of the weights. auto: as in each checkpoint."""
    trust_remote_code: bool = False
    """Allow Python code in either repository to run."""

    def __post_init__(self) -> None:
        check_settings(self)
