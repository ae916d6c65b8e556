"""What `snp-llm recover` is asked. Knows no models."""

import re
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import tyro

from snp_llm.recipe.checks import check_output_name, check_settings, flag
from snp_llm.recipe.recipe import Bos, Device, Text
from snp_llm.runtime.errors import SnpError, shown

COUNTED = ("tokens", "images")  # what a budget may be of

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}

LEARNING_RATES = {("blocks", "adamw"): 1e-4, ("blocks", "sgd"): 1e-2, ("lora", "adamw"): 1e-3, ("lora", "sgd"): 1e-1}

# What the bits of a recovered model do not depend on.
ASIDE = ("folder", "dense", "output", "overwrite", "resume", "save_every", "dense_logits", "eval", "eval_dataset")


@dataclass(frozen=True)
class RecoverRecipe:
    """Train a pruned model for a while to say what the dense one says, by the KL divergence of their logits, and keep
    the best state on held-out text, which is never worse than before."""

    folder: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FOLDER")]]
    """What `snp-llm prune` wrote. It is left as it is."""
    dense: Annotated[str | None, tyro.conf.arg(metavar="MODEL")] = None
    """The dense model: hub id, local folder, or the bundled `tiny-opt`. Default: what FOLDER was made from."""
    tokens: Annotated[str | None, tyro.conf.arg(metavar="4M")] = None
    """Tokens to train on, those counted again that are seen again. Default for models of texts: 1M."""
    images: Annotated[str | None, tyro.conf.arg(metavar="20K")] = None
    """Images to train on, likewise. Default for models of images: 20K."""
    minutes: float | None = None
    """Train for so long; with --tokens or --images until the first of both is used up."""
    train: Literal["blocks", "lora"] = "blocks"
    """blocks: all weights of the blocks. lora: low-rank changes of their projections, added to these at the end; needs
    `pip install 'snp-llm[recover]'`."""
    lora_rank: int = 16
    """Rank of the changes that --train lora makes."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd with momentum 0.9; both without weight decay, gradients of norm 1 at most."""
    learning_rate: float | None = None
    """At its highest, after the warm-up; from there it falls as a cosine. Default: 1e-4 for AdamW and 1e-2 for SGD,
    with --train lora 1e-3 and 1e-1."""
    warmup: float = 0.05
    """Share of the training in which the learning rate rises to that."""
    batch_size: int | None = None
    """Windows, or images, a step. Default: 8 windows, 64 images."""
    micro_batch: int | None = None
    """Of these so many at a time, which saves memory. Default: 2 windows, or all images, since their batch norms see no
    more."""
    hidden_weight: float = 0.0
    """Adds so many times the relative squared difference of hidden states, mean over blocks, to the divergence."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """In which products are computed; weights that are trained stay in float32. auto: bfloat16 on a GPU, float32
    elsewhere."""
    gradient_checkpointing: bool = False
    """Keep one block's activations at a time and compute them twice."""
    dense_top_k: int | None = None
    """Compute the dense model's logits before the training, and keep the K largest of each position and what all others
    have together, so that both models need not be in memory. Default: both are, and all logits count."""
    dense_logits: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where these logits are kept for other runs; a folder that has them already is read. Default: they go in the
    end."""
    calibration: Text | None = None
    """Text or images to train on, as for prune. Default: what FOLDER was calibrated on."""
    calibration_split: Text | None = None
    """Default: the training split."""
    text_column: str | None = None
    """Column that holds the text, for datasets that are not known by name. Default: that of the pruning."""
    image_column: str | None = None
    """Column that holds the images, where a model classifies those. Default: that of the pruning."""
    label_column: str | None = None
    """Column that holds their classes, which are for evaluation alone. Default: that of the pruning."""
    num_samples: int | None = None
    """Windows, or images, to draw; they come again and again until the budget is used up. Default: as many as it holds,
    of images, and where it is in minutes, at most 4,096."""
    held_out: int = 32
    """Windows, or images, more, on which the divergence is judged. Ten times as many images."""
    seq_len: int | None = None
    """Tokens a window. Default: as FOLDER was calibrated."""
    bos: Bos | None = None
    """As for prune. Default: as FOLDER was calibrated."""
    seed: int = 0
    """Draws the windows and their order."""
    eval: bool = True
    """Measure perplexity, or accuracy, of the dense model, and of the pruned one before and after."""
    eval_dataset: Text | None = None
    """As for prune. Default: what FOLDER was evaluated on."""
    eval_split: Text | None = None
    """Default: the test split."""
    device: Device = "auto"
    """auto: cuda, else mps, else cpu."""
    output: Annotated[str | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where the recovered model goes. Default: FOLDER-recovered."""
    overwrite: bool = False
    """Replace an existing output folder, once its successor has been verified, and forget an unfinished run."""
    resume: bool = False
    """Go on with an unfinished run of the same command, from where it was interrupted."""
    save_every: float = 60.0
    """Seconds after which an unfinished run writes down where it is; at most a twentieth of the time is spent on it. 0:
    after every step."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.output is not None:
            check_output_name(self.output)
        if self.tokens is not None and self.images is not None:
            raise SnpError("--tokens and --images: expected one of them, got both.")
        if self.dense_logits is not None and self.dense_top_k is None:
            raise SnpError("--dense-logits: expected together with --dense-top-k.")
        if self.hidden_weight and self.dense_top_k is not None:
            raise SnpError("--hidden-weight: needs the dense model in memory; expected no --dense-top-k beside it.")
        for name in COUNTED:
            self.amount(name)

    def amount(self, counted: str) -> int | None:
        """The budget in tokens or images; None where it has none in these.

        Raises:
            SnpError: not a number.
        """
        text = getattr(self, counted)
        if text is None:
            return None
        found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-zA-Z]?)", text.strip())
        amount = round(float(found[1]) * SUFFIXES.get(found[2].upper(), 0)) if found else 0
        if not 0 < amount < 2**53:
            raise SnpError(f"{flag(counted)}: expected a number such as 500K, 4M or 4000000, got {shown(text)}.")
        return amount

    @property
    def highest_rate(self) -> float:
        """The learning rate after the warm-up."""
        usual = LEARNING_RATES[self.train, self.optimizer]
        return usual if self.learning_rate is None else self.learning_rate

    def as_dict(self) -> dict[str, Any]:
        """All settings by name."""
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """Settings that the bits of the result depend on."""
        return {name: value for name, value in self.as_dict().items() if name not in ASIDE}
