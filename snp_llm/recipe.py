"""All settings of a run, typed and checked in one frozen dataclass. Knows no models and no files."""

import os
import re
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import tyro

from snp_llm.errors import SnpError
from snp_llm.linalg.units import HeadUnit

Device = Literal["auto", "cuda", "mps", "cpu"]
Dtype = Literal["auto", "float32", "float16", "bfloat16", "float64"]
HiddenDevice = Literal["cuda", "mps", "cpu", "disk"]
Layout = Literal["uniform", "compact", "padded"]
Bos = Literal["auto", "always", "once", "never"]
Text = Annotated[str, tyro.conf.arg(metavar="NAME")]


BudgetKind = Literal["params", "size", "flops", "latency"]
SUFFIXES: dict[BudgetKind, dict[str, float]] = {
    "params": {"": 1, "K": 1e3, "M": 1e6, "B": 1e9},
    "size": {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30},
    "flops": {"": 1, "M": 1e6, "G": 1e9, "T": 1e12},
    "latency": {"S": 1, "MS": 1e-3, "US": 1e-6},
}


GOALS = (*(f"target_{kind}" for kind in SUFFIXES), "max_perplexity_increase")  # given instead of a sparsity


@dataclass(frozen=True)
class Budget:
    """What the pruned model may cost.

    Attributes:
        kind: parameters, bytes, FLOPs a token, or seconds of a window's prefill.
        amount: in that unit or, if `relative`, as a share of the dense model's.
    """

    kind: BudgetKind
    amount: float
    relative: bool


@dataclass(frozen=True)
class Recipe:
    """Remove FFN neurons and attention heads in one shot, repair by least squares, save a smaller model."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """Hub id, local folder, or the bundled `tiny-opt`."""
    output: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of the pruned model. Default: MODEL's own name, `-snp-` and the percentage, here."""
    sparsity: float = 0.3
    """Fraction of the decoder blocks' linear-weight parameters to remove, in [0, 1)."""
    ffn_sparsity: float | None = None
    """The same for FFN sites alone, a budget of their own."""
    head_sparsity: float | None = None
    """The same for attention sites alone, a budget of their own."""
    target_params: Annotated[str | None, tyro.conf.arg(metavar="1.0B")] = None
    """Parameters of the pruned model, instead of a sparsity: 900M, 1.0B, or 0.7x of the dense model's."""
    target_size: Annotated[str | None, tyro.conf.arg(metavar="2GB")] = None
    """Its size on disk: 800MB, 2GB, 1.5GiB, or 0.7x."""
    target_flops: Annotated[str | None, tyro.conf.arg(metavar="0.7x")] = None
    """Its FLOPs a token at prefill of a window: 1.2G, or 0.7x."""
    target_latency: Annotated[str | None, tyro.conf.arg(metavar="0.7x")] = None
    """Its time for prefill of one window on --device: 35ms, or 0.7x. Blocks are timed at several widths first."""
    latency_table: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Those times: read if the file is there, else written to it."""
    max_perplexity_increase: Annotated[str | None, tyro.conf.arg(metavar="5%")] = None
    """The largest sparsity, found by bisection, at which perplexity on held-out calibration text rises by no more."""
    steps: int = 1
    """Reach the target in so many rounds, each with statistics and gradients of its own."""
    ordering: Literal["zca", "zca-exact", "saw", "variance", "residual", "obs", "greedy", "random"] = "greedy"
    """Which units go first: the score that ranks them. zca is the paper's, by quadrature
    above 2,048 channels; zca-exact decomposes at every size."""
    metric: Literal["error", "loss"] = "loss"
    """In which obs and greedy measure what a removal costs. error: the out-projection's squared error. loss: that error
    weighted by the loss gradient's second moments."""
    allocation: Literal["uniform", "variance", "loss"] = "loss"
    """How many units each site keeps. loss: the widths of least predicted loss. variance: one threshold on the share of
    latent energy for all sites, the paper's. uniform: the same fraction everywhere."""
    target: Literal["self", "dense", "residual"] = "residual"
    """What an out-projection is repaired to give on the inputs it now gets. self: what it gave on them before the cut.
    dense: the dense model's output. residual: whatever makes the stream after it that of the dense model."""
    target_weight: float | None = None
    """Share of the way from self to that target, in [0, 1]. Default: at each site what held-out windows like best."""
    head_unit: HeadUnit = "kv_group"
    """Which heads go together. kv_group: a key-value head and all its query heads. query: query heads, evenly from
    every group; the only choice where there is one key-value head."""
    layout: Layout = "compact"
    """How the widths are written down. compact: its own in every block, with a modelling file. uniform: the same in
    every block, a plain config that other engines load. padded: zeros in the dense shape, for comparisons."""
    dampening: float | None = None
    """Added to each channel's energy, relative to it. Default: in every repair, what held-out windows like best; 0.1 in
    orderings and curves."""
    absorb_bias: bool = True
    """Move the mean of what is pruned into the out-projection's bias, where there is one."""
    round_to: int | None = None
    """FFN widths are multiples of this. Default: 64 for the uniform layout, unless the FFN is too small, else 8."""
    calibration: Text | None = None
    """wikitext2, c4, ptb, a hub dataset (user/name or user/name:config), a .txt, .jsonl or .parquet file, `random`
    token ids, or `bundled`. Default: wikitext2; bundled for the bundled model."""
    calibration_split: Text | None = None
    """Default: the training split."""
    text_column: str = "text"
    """Column that holds the text, for datasets that are not known by name."""
    num_samples: int = 128
    """Calibration windows."""
    seq_len: int | None = None
    """Tokens a window, for calibration and evaluation. Default: the model's maximum, at most 2048."""
    bos: Bos = "auto"
    """Where BOS stands, in calibration and evaluation. once: at the start of the whole text, if the tokenizer puts it
    there, as in published perplexities. always: before every window. never: nowhere. auto: always for models that are
    lost without it (Gemma) if their tokenizer adds it, else once."""
    batch_size: int = 8
    """Windows run through a block at a time."""
    seed: int = 0
    """Draws the calibration windows and the random ordering."""
    device: Device = "auto"
    """Where blocks are run. auto: cuda, else mps, else cpu."""
    hidden_device: HiddenDevice = "cpu"
    """Where the hidden states of all calibration tokens wait between blocks. disk: in memory maps beside the output."""
    dtype: Dtype = "auto"
    """Type of the weights, while running and saved. auto: as in the checkpoint."""
    eval: bool = True
    """Measure perplexity of the dense and the pruned model."""
    eval_dataset: Text | None = None
    """As for --calibration, without `random`. Default: wikitext2; bundled for the bundled model."""
    eval_split: Text | None = None
    """Default: the test split."""
    trust_remote_code: bool = False
    """Allow Python code in MODEL's repository to run."""
    push_to_hub: Annotated[str | None, tyro.conf.arg(metavar="USER/NAME")] = None
    """Upload the finished folder to this repository on the Hub, with the token of `hf auth login` or HF_TOKEN."""
    private: bool = False
    """That repository is private."""
    overwrite: bool = False
    """Replace an existing output folder, once its successor has been verified, and forget an unfinished run."""
    resume: bool = False
    """Go on with an unfinished run of the same command, from where it was interrupted."""
    save_every: float = 60.0
    """Seconds after which an unfinished run writes down its hidden states, to be resumed from there; at most a
    twentieth of the time is spent on it. 0: after every block, whatever it costs."""
    dry_run: bool = False
    """Print the planned widths and sizes; write nothing."""

    def __post_init__(self) -> None:
        for name in ("sparsity", "ffn_sparsity", "head_sparsity"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise SnpError(f"--{name.replace('_', '-')}: expected a fraction in [0, 1), got {value:g}.")
        if self.target_weight is not None and not 0 <= self.target_weight <= 1:
            raise SnpError(f"--target-weight: expected a share in [0, 1], got {self.target_weight:g}.")
        if self.dampening is not None and not 0 <= self.dampening < float("inf"):
            raise SnpError(f"--dampening: expected a finite number >= 0, got {self.dampening:g}.")
        goals = [f for f in GOALS if getattr(self, f) is not None]
        separate = [f for f in ("ffn_sparsity", "head_sparsity") if getattr(self, f) is not None]
        if len(goals) > 1 or (goals and separate):
            flags = " and ".join(f"--{f.replace('_', '-')}" for f in goals + separate)
            raise SnpError(f"{flags}: expected one budget, got {len(goals + separate)}. Leave out all but one.")
        _ = self.budget, self.perplexity_increase  # whether they can be read
        if self.latency_table is not None and self.target_latency is None:
            raise SnpError("--latency-table: expected together with --target-latency.")
        if self.steps > 1 and self.max_perplexity_increase is not None:
            raise SnpError(
                "--steps: expected 1 with --max-perplexity-increase, whose search prunes many times already."
            )
        for name in ("round_to", "num_samples", "batch_size", "seq_len", "steps"):
            value = getattr(self, name)
            if value is not None and value < (2 if name == "seq_len" else 1):
                raise SnpError(f"--{name.replace('_', '-')}: expected a positive number, got {value}.")
        if not self.save_every >= 0:
            raise SnpError(f"--save-every: expected seconds >= 0, got {self.save_every:g}.")
        if not 0 <= self.seed < 2**63:
            raise SnpError(f"--seed: expected an integer in [0, 2^63), got {self.seed}.")
        if self.push_to_hub is not None:
            _check_repo_id("--push-to-hub", self.push_to_hub)
        elif self.private:
            raise SnpError("--private: expected together with --push-to-hub USER/NAME.")

    @property
    def output_folder(self) -> str:
        name = os.path.basename(os.path.normpath(self.model))
        goal = next((f"{f.split('_')[1]}-{getattr(self, f)}" for f in GOALS if getattr(self, f) is not None), None)
        suffix = f"{100 * self.sparsity:g}" if goal is None else re.sub(r"[^\w.-]", "", goal)
        return self.output or f"{name}-snp-{suffix}"

    def sparsity_of(self, kind: str) -> float:
        """The sparsity asked for at sites of a kind, "attention" or "ffn"."""
        own = self.head_sparsity if kind == "attention" else self.ffn_sparsity
        return self.sparsity if own is None else own

    @property
    def sparsities(self) -> list[tuple[tuple[str, ...], float]]:
        """Kinds of site that share a budget, and its sparsity."""
        if self.ffn_sparsity is None and self.head_sparsity is None:
            return [(("attention", "ffn"), self.sparsity)]
        return [(("attention",), self.sparsity_of("attention")), (("ffn",), self.sparsity_of("ffn"))]

    @property
    def budget(self) -> Budget | None:
        """What the pruned model may cost, if that was said instead of a sparsity.

        Raises:
            SnpError: not an amount of that kind.
        """
        for kind, suffixes in SUFFIXES.items():
            text = getattr(self, f"target_{kind}")
            if text is None:
                continue
            if found := re.fullmatch(r"([0-9]*\.?[0-9]+(?:[eE][0-9]+)?)\s*([a-zA-Z]*)", text.strip()):
                amount, suffix = float(found[1]), found[2].upper()
                if suffix == "X" and 0 < amount <= 1:
                    return Budget(kind, amount, relative=True)
                if suffix in suffixes and amount > 0:
                    return Budget(kind, amount * suffixes[suffix], relative=False)
            units = ", ".join(repr(s) for s in suffixes)
            raise SnpError(
                f"--target-{kind}: expected a number with one of {units}, or a share of the dense model such as 0.7x; "
                f"got {text!r}."
            )
        return None

    @property
    def perplexity_increase(self) -> float | None:
        """The permitted rise of perplexity, relative.

        Raises:
            SnpError: not a percentage.
        """
        text = self.max_perplexity_increase
        if text is None:
            return None
        found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*%", text.strip())
        if not found or not 0 < float(found[1]) < 1000:
            raise SnpError(f"--max-perplexity-increase: expected a percentage such as 5%, got {text!r}.")
        return float(found[1]) / 100

    @property
    def holds_out(self) -> bool:
        """Whether anything is chosen by its error on held-out windows."""
        return self.dampening is None or (self.target != "self" and self.target_weight is None)

    @property
    def needs_gradients(self) -> bool:
        """Whether anything is weighed by the loss gradient."""
        return self.allocation == "loss" or (self.metric == "loss" and self.ordering in ("obs", "greedy"))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class EvaluationRecipe:
    """Perplexity by the protocol that pruning papers use, and zero-shot tasks, of one model or several side by side."""

    models: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="MODEL [MODEL ...]")]]
    """Hub ids, local folders, or the bundled `tiny-opt`; ratios are to the first."""
    dataset: Text | None = None
    """wikitext2, c4, ptb, a hub dataset (user/name or user/name:config), a .txt, .jsonl or .parquet file, or `bundled`.
    Default: wikitext2; bundled for the bundled model."""
    split: Text | None = None
    """Default: the test split."""
    text_column: str = "text"
    """Column that holds the text, for datasets that are not known by name."""
    seq_len: int | None = None
    """Tokens a window. Default: the models' maximum, at most 2048."""
    stride: int | None = None
    """Windows begin so many tokens apart and overlap; in each only the tokens count that no earlier one held. Default:
    windows that do not overlap."""
    max_windows: int | None = None
    """Measure on the first windows only."""
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
        if not self.models:
            raise SnpError("snp-llm eval: expected at least one MODEL, got none.")
        limits = (
            ("seq_len", 2),
            ("max_windows", 1),
            ("batch_size", 1),
            ("stride", 1),
            ("limit", 1),
            ("num_fewshot", 0),
        )
        for name, least in limits:
            value = getattr(self, name)
            if value is not None and value < least:
                raise SnpError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}.")
        if self.tasks is None:
            for name in ("include_path", "limit", "num_fewshot"):
                if getattr(self, name) is not None:
                    raise SnpError(f"--{name.replace('_', '-')}: expected together with --tasks.")
            if not self.perplexity:
                raise SnpError("--no-perplexity: expected together with --tasks, else there is nothing to measure.")
        elif not self.task_names:
            raise SnpError("--tasks: expected names with commas between them, got none.")

    @property
    def task_names(self) -> list[str]:
        return [name.strip() for name in (self.tasks or "").split(",") if name.strip()]


@dataclass(frozen=True)
class ReportRecipe:
    """Make report.html of finished output folders, or make it anew, from the JSON files in them."""

    folders: tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="FOLDER")]]
    """What `snp-llm prune` wrote. With several of the same dense model, every page shows all of them side by side."""

    def __post_init__(self) -> None:
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
    """It is private. A repository that exists and is public is refused then."""

    def __post_init__(self) -> None:
        _check_repo_id("snp-llm push", self.repo_id)


def _check_repo_id(where: str, value: str) -> None:
    parts = value.split("/")
    well_formed = all(re.fullmatch(r"\w([\w.-]{,94}\w)?", part, re.ASCII) for part in parts)
    if len(parts) != 2 or not well_formed or re.search(r"--|\.\.|\.git$", value):
        raise SnpError(
            f"{where}: expected user/name, of letters, digits, single `-` and `.` inside, and `_`; got {value!r}."
        )
