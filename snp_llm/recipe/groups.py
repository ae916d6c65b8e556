"""Which settings of a recipe belong together, and what depends on which of them. Knows their names alone."""

from snp_llm.recipe.budget import GOALS

AMOUNT = ("sparsity", *GOALS, "latency_table")

SPLIT = ("ffn_sparsity", "head_sparsity")

METHOD = (
    *("ordering", "metric", "allocation", "measured_cuts", "reference", "reference_weight", "dampening", "refine"),
    *("absorb_bias", "norm_statistics", "head_unit", "experts", "expert_score", "depth", "depth_score"),
    *("layout", "round_to", "for_"),
)

# A run knows it by its tokens or pixels, not by its name.
TEXT = ("calibration", "calibration_split", "text_column", "image_column", "label_column", "bos")

WINDOWS = ("num_samples", "seq_len", "seed")

ROUNDING = ("dtype", "batch_size", "device")  # sums in another order or type differ in their last bits

PLACES = ("model", "hidden_device", "save_every")  # of weights and hidden states, whose bits are the same anywhere

EVALUATION = ("eval", "eval_dataset", "eval_split", "shown_images", "shown_texts")

# Of one run, not of its result. Kept, they would overwrite, upload or trust by surprise when it is repeated.
ONCE = ("output", "trust_remote_code", "push_to_hub", "private", "overwrite", "resume", "dry_run")

GROUPS = {
    "budget": AMOUNT + SPLIT,
    "method": METHOD,
    "calibration": TEXT + WINDOWS,
    "compute": ROUNDING + PLACES,
    "output": EVALUATION + ONCE,
}

# What the bits of a pruned model depend on, besides what is in its dense model and its text.
IDENTITY = AMOUNT + SPLIT + METHOD + WINDOWS + ROUNDING

# What makes two runs different methods, and not points of one line, where they are compared.
LINE = SPLIT + METHOD + TEXT + WINDOWS + ("dtype",)
