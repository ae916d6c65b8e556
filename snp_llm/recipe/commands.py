"""What the commands beside `prune` are asked, and how all of them talk. Knows no models."""

import logging
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from snp_llm.recipe.checks import check_repo_id, check_settings, flag
from snp_llm.recipe.recipe import SPARSITY, Bos, Depth, Device, Dtype, Experts, HiddenDevice, Text
from snp_llm.runtime.errors import SnpError


@dataclass(frozen=True)
class EvaluationRecipe:
    """Perplexity by the protocol that pruning papers use, and zero-shot tasks, of one model or several side by side; of
    models that classify images their accuracy."""

    models: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODEL [MODEL ...]")]]
    """Hub ids, local folders, or the bundled `tiny-opt`; ratios are to the first."""
    dataset: Text | None = None
    """wikitext2, c4, ptb, a hub dataset (user/name or user/name:config), a .txt, .jsonl or .parquet file, or `bundled`.
    Default: wikitext2; bundled for the bundled model. For models of images: a folder of image files in folders by
    class, a .parquet file, or a hub dataset."""
    split: Text | None = None
    """Default: the test split."""
    text_column: str = "text"
    """Column that holds the text, for datasets that are not known by name."""
    image_column: str = "image"
    """Column that holds the images, for models of those."""
    label_column: str = "label"
    """Column that holds their classes."""
    seq_len: int | None = None
    """Tokens a window. Default: the models' maximum, at most 2048."""
    stride: int | None = None
    """Windows begin so many tokens apart and overlap; in each only the tokens count that no earlier one held. Default:
    windows that do not overlap."""
    max_windows: int | None = None
    """Measure on the first windows, or images, only."""
    bos: Bos = "auto"
    """As for prune: where BOS stands in the text that perplexity is measured on."""
    perplexity: bool = True
    """Measure it; --no-perplexity with --tasks for tasks alone."""
    tasks: Annotated[str | None, tyro.conf.arg(metavar="A,B")] = None
    """Tasks of lm-evaluation-harness, by their names there, run as well. Needs `pip install 'snp-llm[eval]'`."""
    include_path: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of further task files (.yaml) for --tasks."""
    limit: int | None = None
    """Run every task on its first examples only."""
    num_fewshot: int | None = None
    """Examples shown before each question. Default: what the task says, mostly none."""
    save: bool = False
    """Record the results in prune_report.json of every MODEL that is an output folder of `snp-llm prune`."""
    batch_size: int = 8
    """Windows run through the model at a time."""
    device: Device = "auto"
    """auto: cuda, else mps, else cpu."""
    dtype: Dtype = "auto"
    """Type of the weights. auto: as in the checkpoint."""
    trust_remote_code: bool = False
    """Allow Python code in MODEL's repository to run."""

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.models:
            raise SnpError("snp-llm eval: expected at least one MODEL, got none.")
        if self.tasks is None:
            for name in ("include_path", "limit", "num_fewshot"):
                if getattr(self, name) is not None:
                    raise SnpError(f"{flag(name)}: expected together with --tasks.")
            if not self.perplexity:
                raise SnpError("--no-perplexity: expected together with --tasks, else there is nothing to measure.")
        elif not self.task_names:
            raise SnpError("--tasks: expected names with commas between them, got none.")

    @property
    def task_names(self) -> list[str]:
        """Names of the tasks that `--tasks` lists."""
        return [name.strip() for name in (self.tasks or "").split(",") if name.strip()]


@dataclass(frozen=True)
class ReportRecipe:
    """Make report.html of finished output folders, or make it anew, from the JSON files in them."""

    folders: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="FOLDER")]]
    """What `snp-llm prune` wrote. With several of the same dense model, every page shows all of them side by side."""

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.folders:
            raise SnpError("snp-llm report: expected at least one folder that `snp-llm prune` wrote.")


@dataclass(frozen=True)
class PushRecipe:
    """Upload a finished output folder to the Hugging Face Hub, with the token of `hf auth login` or HF_TOKEN."""

    folder: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FOLDER")]]
    """What `snp-llm prune` wrote. It is left as it is."""
    repo_id: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="USER/NAME")]]
    """Repository on the Hub; made if it does not exist."""
    private: bool = False
    """Make the repository a private one. One that exists and is public is refused then."""

    def __post_init__(self) -> None:
        check_settings(self)
        check_repo_id("snp-llm push", self.repo_id)


@dataclass(frozen=True)
class ExportRecipe:
    """Write a model as a file of another engine, and compare what that says there with what it says here."""

    folder: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FOLDER")]]
    """What `snp-llm prune` wrote, or any model that it takes."""
    to: Literal["gguf", "onnx"]
    """gguf: for llama.cpp, models like Llama in every layout; pip install 'snp-llm[gguf]'. onnx: for ONNX Runtime,
    tokens or pixels to logits; pip install 'snp-llm[onnx]'."""
    output: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Where it goes. Default: FOLDER.gguf, or the folder FOLDER-onnx."""
    dtype: Literal["f32", "f16", "bf16"] = "f32"
    """Type of the matrices in a GGUF file; llama-quantize makes smaller ones of it."""
    with_cache: bool = False
    """An ONNX graph of a model of texts that also takes keys and values of the tokens before and puts out those of all,
    to write token by token. Default: logits of whole texts."""
    overwrite: bool = False
    """Replace a GGUF file that is there."""
    trust_remote_code: bool = False
    """Allow Python code in FOLDER to run."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.with_cache and self.to != "onnx":
            raise SnpError(f"--with-cache: expected --to onnx, got --to {self.to}; llama.cpp has a cache of its own.")


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
        """Log level, as `logging` counts."""
        level: int = getattr(logging, self.log_level.upper())
        return max(level, logging.WARNING) if self.quiet else level


@dataclass(frozen=True)
class FamiliesRecipe:
    """Types of models that all tests are run on: what can go in each, which layouts there are, what loads them."""


@dataclass(frozen=True)
class InspectRecipe:
    """What a model is made of, what pruning can give, and what that takes; from its config alone, without weights."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """Hub id, local folder (`config.json` is enough), an output of `snp-llm prune`, or the bundled `tiny-opt`."""
    sparsity: float = SPARSITY
    """For which sizes and the resources of a prune are given."""
    head_unit: Literal["kv_group", "query"] = "kv_group"
    """As for prune: which heads go together."""
    experts: Experts = "never"
    """As for prune: whether experts that only some tokens come by lose channels, go, or both."""
    depth: Depth = "never"
    """As for prune: whether whole blocks may go."""
    num_samples: int = 128
    """As for prune: calibration windows."""
    seq_len: int | None = None
    """As for prune: tokens a window. Default: the model's maximum, at most 2048."""
    batch_size: int = 8
    """As for prune: windows run through a block at a time."""
    hidden_device: HiddenDevice = "auto"
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
    """Hub id or local folder of the model that is compared with it."""
    batch_sizes: tuple[int, ...] = (1, 8)
    """Windows, or images, at a time."""
    prompt_lengths: tuple[int, ...] = (128, 512)
    """Tokens of a prompt; of models of texts alone."""
    new_tokens: int = 16
    """Tokens decoded after a prompt, one at a time; 0 for none; likewise."""
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
