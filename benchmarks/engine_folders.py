"""Folders for engines.py and vllm_engine.py: random models, pruned by the real command into plain configs.

    python benchmarks/engine_folders.py OUTPUT seed_oss bamba --tokenizer-from ggml-vocab-gpt-2.gguf

Of each type come OUTPUT/TYPE-dense, OUTPUT/TYPE-ffn and, where a plain config can say it, OUTPUT/TYPE-heads, which has
fewer heads as well; of a mixture of experts OUTPUT/TYPE-channels, whose experts are narrower, and OUTPUT/TYPE-fewer;
of each OUTPUT/TYPE-shorter, of half as many blocks. Without names, of all types. The sizes are such that engines'
kernels take them. llama.cpp's converter only takes tokenizers that it knows, and llama.cpp's sources bring GPT-2's as a
GGUF; without one it is the tokenizer of the bundled model.
"""

import argparse
import math
import sys
from pathlib import Path

import gguf
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from snp_llm.cli.parse import prune_main
from snp_llm.data.sources import BUNDLED

BASE = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
}
QUICK = ("--layout", "uniform", "--calibration", "bundled", "--no-eval", "--quiet")
SMALL = ("--num-samples", "8", "--seq-len", "64")
WAYS = {
    "ffn": ("--ffn-sparsity", "0.3", "--head-sparsity", "0"),
    "heads": ("--ffn-sparsity", "0.3", "--head-sparsity", "0.5"),
    "shorter": ("--sparsity", "0.5", "--depth", "only"),
}
OF_EXPERTS = {
    "channels": ("--ffn-sparsity", "0.25", "--head-sparsity", "0", "--experts", "channels"),
    "fewer": ("--ffn-sparsity", "0.25", "--head-sparsity", "0", "--experts", "whole"),
    "shorter": ("--sparsity", "0.5", "--depth", "only", "--experts", "whole"),
}
HEAD = {"head_dim": 64}
FOUR = {"num_hidden_layers": 4}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 64, "mamba_d_state": 32, "mamba_n_groups": 1, "mamba_expand": 2}
DELTA = {
    **HEAD,
    **FOUR,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
# As published models are, which llama.cpp takes for granted: a token's experts with weights that add up to one, or do
# not, and in OLMoE as many key-value heads as query heads.
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
MIXTURES: dict[str, dict] = {
    "qwen3_moe": {**HEAD, **EXPERTS, "moe_intermediate_size": 128, "norm_topk_prob": True},
    "qwen2_moe": {**EXPERTS, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 256},
    "mixtral": {**HEAD, "intermediate_size": 128, "num_local_experts": 8, "sliding_window": None},
    "olmoe": {**EXPERTS, "intermediate_size": 128, "num_key_value_heads": 4},
    "granitemoe": {"intermediate_size": 128, "num_local_experts": 8},
    "phimoe": {"intermediate_size": 128, "num_local_experts": 8, "sliding_window": None},
    "gpt_oss": {**HEAD, "intermediate_size": 128, "num_local_experts": 8, "num_experts_per_tok": 2},
}
TYPES: dict[str, dict] = {
    **MIXTURES,
    "llama": {},
    "qwen3": HEAD,
    "gpt_neox": {},
    "olmo2": {},
    "smollm3": {},
    "gemma2": HEAD,
    "starcoder2": {"sliding_window": None},
    "olmo": {},
    "olmo3": {},
    "glm4": HEAD,
    "seed_oss": HEAD,
    "arcee": HEAD,
    "nemotron": HEAD,
    "exaone4": {},
    "cohere": {},
    "cohere2": {},
    "helium": HEAD,
    "ernie4_5": HEAD,
    "apertus": {},
    "hunyuan_v1_dense": HEAD,
    "ministral3": HEAD,
    "phi": {},
    "falcon": {},
    "gpt_bigcode": {},
    "gptj": {"rotary_dim": 32},
    "lfm2": {**FOUR, "layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False, "conv_dim": 256},
    "granitemoehybrid": {
        **FOUR,
        **MAMBA,
        "layer_types": ["mamba", "attention"] * 2,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 512,
    },
    "bamba": {**FOUR, **MAMBA, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**HEAD, "mamba_d_ssm": 256, "mamba_n_heads": 4, "mamba_d_state": 32, "mamba_n_groups": 1},
    "jamba": {
        **FOUR,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "num_experts": 1,
        "use_mamba_kernels": False,
    },
    "nemotron_h": {
        **HEAD,
        **FOUR,
        "hybrid_override_pattern": "M-*-",
        "mamba_num_heads": 8,
        "mamba_head_dim": 64,
        "ssm_state_size": 32,
        "n_groups": 1,
    },
    "qwen3_5_text": DELTA,
    "olmo_hybrid": DELTA,
    "recurrent_gemma": {**FOUR, "block_types": ["recurrent", "attention"]},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--tokenizer-from", type=Path, default=None, metavar="GGUF")
    args = parser.parse_args()
    tokenizer = (
        tokenizer_of(args.tokenizer_from)
        if args.tokenizer_from
        else AutoTokenizer.from_pretrained(BUNDLED / "tiny-opt")
    )
    for model_type in args.types or TYPES:
        dense = save_dense(args.output / f"{model_type}-dense", model_type, tokenizer)
        for name, asked in (OF_EXPERTS if model_type in MIXTURES else WAYS).items():
            code = prune_main([str(dense), *QUICK, *SMALL, *asked, "--output", f"{args.output}/{model_type}-{name}"])
            print(f"{model_type}-{name}: {'made' if code == 0 else 'not made'}", file=sys.stderr)
    return 0


def save_dense(folder: Path, model_type: str, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A random model of a type, with a tokenizer."""
    ends = {f"{name}_token_id": tokenizer.eos_token_id for name in ("bos", "eos", "pad")}
    vocabulary = 64 * math.ceil(len(tokenizer) / 64)  # engines pad some types' vocabularies
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**BASE, "vocab_size": vocabulary, **ends, **TYPES[model_type]})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            parameter.normal_(0, 0.06)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tokenizer_of(path: Path) -> PreTrainedTokenizerFast:
    """GPT-2's kind of tokenizer out of a GGUF."""
    fields = gguf.GGUFReader(path).fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    made = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, pairs))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end = tokens[fields["tokenizer.ggml.eos_token_id"].contents()]
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=end, eos_token=end)


if __name__ == "__main__":
    sys.exit(main())
