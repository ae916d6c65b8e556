"""All settings of a run, typed and checked in one frozen dataclass. Knows no models and no files."""

import os
import re
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

import tyro

from snp_llm.recipe.budget import GOALS, SUFFIXES, Budget, read_budget, read_rise
from snp_llm.recipe.checks import check_output_name, check_repo_id, check_settings, flag
from snp_llm.recipe.kernels import ROWS, Kernel
from snp_llm.runtime.errors import SnpError

HeadUnit = Literal["kv_group", "query"]

Experts = Literal["never", "channels", "whole", "both"]

ExpertScore = Literal["loss", "reap", "frequency", "random"]

Device = Literal["auto", "cuda", "mps", "cpu"]

Dtype = Literal["auto", "float32", "float16", "bfloat16", "float64"]

HiddenDevice = Literal["auto", "cuda", "mps", "cpu", "disk"]

Depth = Literal["never", "auto", "only"]

DepthScore = Literal["loss", "influence", "angular"]

Layout = Literal["uniform", "compact", "padded"]

Bos = Literal["auto", "always", "once", "never"]

Text = Annotated[str, tyro.conf.arg(metavar="NAME")]

SPARSITY = 0.3  # where nothing says what has to go

TINY_OPT = "tiny-opt"  # the model that comes with the package, as do texts for it


def usual_text(model: str) -> str:
    """Text that a model is calibrated and measured on where no other is named."""
    return "bundled" if model == TINY_OPT else "wikitext2"


@dataclass(frozen=True)
class Recipe:
    """Remove FFN neurons and attention heads in one shot, repair by least squares, save a smaller model."""

    model: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="MODEL")]]
    """Hub id, local folder, or the bundled `tiny-opt`."""
    output: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Folder of the pruned model. Default: MODEL's own name, `-snp-` and the percentage, here."""
    sparsity: float | None = None
    """Fraction of the decoder blocks' linear-weight parameters to remove, in [0, 1). Default: 0.3, unless another
    budget is given."""
    ffn_sparsity: float | None = None
    """Fraction of the FFN sites' parameters to remove, where these have a budget of their own."""
    head_sparsity: float | None = None
    """Fraction of the attention sites' parameters to remove, where these have a budget of their own."""
    target_params: Annotated[str | None, tyro.conf.arg(metavar="1.0B")] = None
    """Parameters of the pruned model, instead of a sparsity: 900M, 1.0B, or 0.7x of the dense model's."""
    target_size: Annotated[str | None, tyro.conf.arg(metavar="2GB")] = None
    """Size of the pruned model on disk: 800MB, 2GB, 1.5GiB, or 0.7x."""
    target_flops: Annotated[str | None, tyro.conf.arg(metavar="0.7x")] = None
    """FLOPs of the pruned model, a token, at prefill of a window: 1.2G, or 0.7x."""
    target_latency: Annotated[str | None, tyro.conf.arg(metavar="0.7x")] = None
    """Time of the pruned model for prefill of one window on --device: 35ms, or 0.7x. Blocks are timed at several widths
    first."""
    latency_table: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """Times of blocks for --target-latency: read if the file is there, else written to it."""
    max_perplexity_increase: Annotated[str | None, tyro.conf.arg(metavar="5%")] = None
    """The largest sparsity, found by bisection, at which perplexity on held-out calibration text rises by no more."""
    ordering: Literal["zca", "zca-exact", "saw", "variance", "residual", "obs", "greedy", "random"] = "greedy"
    """Which units go first: the score that ranks them. zca is the paper's, by quadrature
    above 512 channels; zca-exact decomposes at every size."""
    metric: Literal["error", "loss"] = "loss"
    """Measure in which obs and greedy count what a removal costs. error: the out-projection's squared error. loss: that
    error weighted by the loss gradient's second moments."""
    allocation: Literal["uniform", "variance", "loss"] = "loss"
    """How many units each site keeps. loss: the widths of least predicted loss. variance: one threshold on the share of
    latent energy for all sites, the paper's. uniform: the same fraction everywhere."""
    measured_cuts: int = 1
    """Cuts of every site, one site at a time, whose divergence from the dense model is measured to correct the losses
    that allocation loss predicts. 0: none."""
    reference: Literal["self", "dense", "residual"] = "residual"
    """What an out-projection is repaired to give on the inputs it now gets. self: what it gave on them before the cut.
    dense: the dense model's output. residual: whatever makes the stream after it that of the dense model."""
    reference_weight: float | None = None
    """Share of the way from self to that, in [0, 1]. Default: at each site what held-out windows like best."""
    head_unit: HeadUnit = "kv_group"
    """Which heads go together. kv_group: a key-value head and all its query heads. query: query heads, evenly from
    every group; the only choice where there is one key-value head."""
    experts: Experts = "never"
    """Whether experts that only some tokens come by lose anything. never: they stay, and sparsity does not count them.
    channels: each keeps as many as the others of its block, its own. whole: some go, with their rows of the router.
    both: some go, and the others lose channels, as the loss curves say is best. But for never, sparsity is a fraction
    of experts as well."""
    expert_score: ExpertScore = "loss"
    """Which experts go first as a whole: those of least predicted loss; reap: of least router weight times output norm;
    frequency: that fewest tokens come by; random."""
    depth: Depth = "never"
    """Whether whole blocks may go and, in the compact layout, all of an attention or an FFN. never: units of these
    alone. auto: as many as the loss curves say is best. only: nothing else; what stays keeps all units, and is
    repaired."""
    depth_score: DepthScore = "loss"
    """Which blocks go with --depth only: those of least predicted loss; influence: that turn the stream least, one by
    one; angular: the neighbours that together do."""
    layout: Layout = "compact"
    """How the widths are written down. compact: its own in every block, with a modelling file. uniform: the same in
    every block, a plain config that other engines load. padded: zeros in the dense shape, for comparisons."""
    dampening: float | None = None
    """Added to each channel's energy, relative to it. Default: in every repair, what held-out windows like best; 0.1 in
    orderings and curves."""
    refine: Annotated[int | Literal["auto", "none"], tyro.conf.arg(metavar="STEPS")] = "auto"
    """Steps by which each block as a whole is moved towards what the dense model has behind it, after its sites are
    cut and repaired. none: no step. auto: as many as take no longer than the rest of the run."""
    absorb_bias: bool = True
    """Move the mean of what is pruned into the out-projection's bias, where there is one."""
    norm_statistics: Literal["closed", "pass"] = "closed"
    """What batch norms take for mean and variance after a cut. closed: what follows from sums that are there. pass:
    what calibration images then bring, norm after norm."""
    round_to: int | None = None
    """FFN widths are multiples of this. Default: what --for needs; without it 64 for the uniform layout, unless the FFN
    is too small, else 8."""
    for_: Kernel | None = None
    """What the model will be quantised by: widths of FFNs and of all heads together are such that every row fits.
    gptq, awq, marlin, torchao (its int4): multiples of 128; bnb: 64; q8_0, q4_0: 32; q4_k_m: 256, the last three
    of llama.cpp."""
    calibration: Text | None = None
    """wikitext2, c4, ptb, a hub dataset (user/name or user/name:config), a .txt, .jsonl or .parquet file, a folder that
    `datasets` saved, `random` token ids, or `bundled`. Default: wikitext2; bundled for the bundled model. For models of
    images: a folder of image files, a .parquet file, such a folder or hub dataset, or `noise`."""
    calibration_split: Text | None = None
    """Default: the training split."""
    text_column: str = "text"
    """Column that holds the text, for datasets that are not known by name."""
    image_column: str = "image"
    """Column that holds the images, where a model classifies those."""
    label_column: str = "label"
    """Column that holds their classes, which are for evaluation alone."""
    num_samples: int = 128
    """Calibration windows, or images."""
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
    hidden_device: HiddenDevice = "auto"
    """Where the hidden states of all calibration tokens wait between blocks. auto: on a GPU if the estimate leaves room
    there, else on the CPU. disk: in memory maps beside the output."""
    dtype: Dtype = "auto"
    """Type of the weights, while running and saved. auto: as in the checkpoint."""
    eval: bool = True
    """Measure perplexity, or accuracy, of the dense and the pruned model."""
    eval_dataset: Text | None = None
    """As for --calibration, without `random` and `noise`. Default: wikitext2; bundled for the bundled model; for models
    of images the calibration images' other split."""
    eval_split: Text | None = None
    """Default: the test split."""
    shown_images: int = 8
    """Evaluation images that report.html shows with what both models say of them, where models classify images. They go
    wherever the folder goes; 0: none."""
    shown_texts: int = 3
    """Beginnings of sentences of the evaluation text that report.html shows with how both models go on. They go
    wherever the folder goes; 0: none."""
    trust_remote_code: bool = False
    """Allow Python code in MODEL's repository to run."""
    push_to_hub: Annotated[str | None, tyro.conf.arg(metavar="USER/NAME")] = None
    """Upload the finished folder to this repository on the Hub, with the token of `hf auth login` or HF_TOKEN."""
    private: bool = False
    """Make the repository of --push-to-hub a private one."""
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
        check_settings(self)
        goals = [f for f in GOALS if getattr(self, f) is not None]
        separate = [f for f in ("ffn_sparsity", "head_sparsity") if getattr(self, f) is not None]
        budgets = [*goals, *(["sparsity"] if self.sparsity is not None else []), *separate]
        if len(budgets) > (1 if goals else 2):
            flags = " and ".join(map(flag, budgets))
            raise SnpError(
                f"{flags}: expected one budget, got {len(budgets)}. Leave out all but one; what a recipe file says is "
                f"taken back with {flag(budgets[-1])} None."
            )
        _ = self.budget, self.perplexity_increase  # whether they can be read
        if self.round_to is not None and self.round_to % self.row:
            raise SnpError(
                f"--round-to {self.round_to}: expected a multiple of {self.row}, which --for {self.for_} needs. Leave "
                "one of them out."
            )
        if self.depth != "never":
            self._check_depth()
        if self.depth_score != "loss" and self.depth != "only":
            raise SnpError(f"--depth-score {self.depth_score}: expected together with --depth only.")
        if self.expert_score != "loss" and self.experts not in ("whole", "both"):
            raise SnpError(f"--expert-score {self.expert_score}: expected together with --experts whole or both.")
        if self.experts == "both" and self.allocation != "loss":
            raise SnpError(
                "--experts both: expected --allocation loss, whose curves weigh an expert against channels; got "
                f"{self.allocation}."
            )
        if self.latency_table is not None and self.target_latency is None:
            raise SnpError("--latency-table: expected together with --target-latency.")
        if self.output is not None:
            check_output_name(self.output)
        if self.push_to_hub is not None:
            check_repo_id("--push-to-hub", self.push_to_hub)
        elif self.private:
            raise SnpError("--private: expected together with --push-to-hub USER/NAME.")

    def _check_depth(self) -> None:
        """Raises SnpError where other settings leave no choice between blocks and widths."""
        if self.separate:
            raise SnpError(
                f"--depth {self.depth}: expected one budget for blocks and what is in them, got --ffn-sparsity or "
                "--head-sparsity. Use --sparsity."
            )
        if self.allocation != "loss":
            raise SnpError(
                f"--depth {self.depth}: expected --allocation loss, whose curves say what a block's absence costs; got "
                f"{self.allocation}."
            )
        if self.layout == "padded":
            raise SnpError(
                f"--depth {self.depth}: expected --layout compact or uniform; a block of zeros is still a block."
            )

    @property
    def output_folder(self) -> str:
        """What was asked for, or the model's own name and what the budget is."""
        if self.output is not None:
            return self.output
        goal = next((f"{f.split('_')[1]}-{getattr(self, f)}" for f in GOALS if getattr(self, f) is not None), None)
        if goal is not None:
            suffix = re.sub(r"[^\w.-]", "", goal)
        elif self.separate:
            parts = (("heads", "attention"), ("ffn", "ffn"))
            suffix = "-".join(f"{name}-{100 * self.sparsity_of(kind):g}" for name, kind in parts)
        else:
            suffix = f"{100 * self.sparsity_of('ffn'):g}"
        return f"{os.path.basename(os.path.abspath(self.model))}-snp-{suffix}"

    @property
    def separate(self) -> bool:
        """Whether FFN and attention have budgets of their own."""
        return self.ffn_sparsity is not None or self.head_sparsity is not None

    @property
    def common_sparsity(self) -> float | None:
        """Sparsity of sites whose kind has no budget of its own: that asked for, or the usual where nothing else is."""
        whole = self.budget is not None or self.max_perplexity_increase is not None
        both = self.ffn_sparsity is not None and self.head_sparsity is not None
        return SPARSITY if self.sparsity is None and not whole and not both else self.sparsity

    def sparsity_of(self, kind: str) -> float:
        """The sparsity asked for at sites of a kind, "attention" or "ffn"; under a budget in another currency, which
        alone decides about it, the usual one, as a guess."""
        own = self.head_sparsity if kind == "attention" else self.ffn_sparsity
        own = self.common_sparsity if own is None else own
        return SPARSITY if own is None else own

    @property
    def sparsities(self) -> list[tuple[tuple[str, ...], float]]:
        """Kinds of site that share a budget, and its sparsity."""
        if not self.separate:
            return [(("attention", "ffn", "experts"), self.sparsity_of("ffn"))]
        return [(("attention",), self.sparsity_of("attention")), (("ffn", "experts"), self.sparsity_of("ffn"))]

    @property
    def budget(self) -> Budget | None:
        """What the pruned model may cost, if that was said instead of a sparsity.

        Raises:
            SnpError: not an amount of that kind.
        """
        given = ((kind, getattr(self, f"target_{kind}")) for kind in SUFFIXES)
        return next((read_budget(kind, text) for kind, text in given if text is not None), None)

    @property
    def perplexity_increase(self) -> float | None:
        """The permitted rise of perplexity, relative.

        Raises:
            SnpError: not a percentage.
        """
        return None if self.max_perplexity_increase is None else read_rise(self.max_perplexity_increase)

    @property
    def refine_steps(self) -> int | None:
        """Steps of the refinement of a block, or None where they follow from the model.

        Raises:
            SnpError: not a number of steps.
        """
        if isinstance(self.refine, str):
            return {"auto": None, "none": 0}[self.refine]
        return self.refine

    @property
    def row(self) -> int:
        """What the length of every row is a multiple of."""
        return 1 if self.for_ is None else ROWS[self.for_]

    @property
    def holds_out(self) -> bool:
        """Whether anything is chosen by its error on held-out windows."""
        return self.dampening is None or (self.reference != "self" and self.reference_weight is None)

    @property
    def needs_gradients(self) -> bool:
        """Whether anything is weighed by the loss gradient."""
        return self.allocation == "loss" or (self.metric == "loss" and self.ordering in ("obs", "greedy"))

    def as_dict(self) -> dict[str, Any]:
        """All settings by name."""
        return asdict(self)


@dataclass(frozen=True)
class ResolvedRecipe(Recipe):
    """A recipe in which all is definite that depends on the model, as `pruning.run.resolve` makes it.

    Its sparsity is None only where the budget is another one.
    """

    calibration: str = field(kw_only=True)
    eval_dataset: str = field(kw_only=True)
    seq_len: int = field(kw_only=True)
    round_to: int = field(kw_only=True)
