"""Size, perplexity and speed of models, whole and quantised, in transformers, llama.cpp and vLLM: one table.

    pip install 'snp-llm[gguf]' llama-cpp-python torchao
    python benchmarks/quantised.py DENSE PRUNED --text wiki.test.raw prose.txt --work cells

A cell is a model of a type in an engine. Each runs in a process of its own, on one thread, `--turns` times in turns
with all others, so that drift of the machine cancels: speeds are medians, and beside each is the median of its ratio to
the first model's in the same turn. Cells are kept in `--work` as they come, and a run that was interrupted goes on.
llama.cpp gets what `snp-llm export --to gguf` writes, and quantises it itself. vLLM may live in an environment of its
own, whose interpreter `--vllm-python` names. All score the same windows, of tokens of transformers' tokenizer.
"""

import argparse
import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from snp_llm import checkpoint
from snp_llm.engines import gguf
from snp_llm.models.calls import with_cache

PROMPT, NEW, PASSES = 128, 32, 3
CELLS = ("transformers:bf16", "transformers:int8", "llama.cpp:bf16", "llama.cpp:q8_0", "llama.cpp:q4_k_m", "vllm:bf16")
GROUPS = (128, 64, 32)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", help="the first is what the others' speeds are set against")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--cells", nargs="+", default=CELLS, help=f"ENGINE:TYPE, of {', '.join(TYPES)}")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--work", type=Path, required=True, help="folder of finished cells and of GGUF files")
    parser.add_argument("--vllm-python", default=sys.executable)
    parser.add_argument("--run", metavar="CELL", help=argparse.SUPPRESS)  # what the process of a cell is told
    args = parser.parse_args()
    if args.run:
        print(json.dumps(measured(args)))
        return 0
    args.work.mkdir(parents=True, exist_ok=True)
    kept = args.work / "cells.jsonl"
    known = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    settings = [args.windows, args.seq_len, *map(str, args.text)]
    failed = set()
    for turn in range(args.turns):
        for folder in args.folders:
            for cell in args.cells:
                key = {"folder": folder, "cell": cell, "turn": turn, "settings": settings}
                if (folder, cell) in failed or any(key.items() <= row.items() for row in known):
                    continue
                found = in_a_process(args, folder, cell)
                if isinstance(found, str):
                    print(f"{folder} {cell}: {found}", file=sys.stderr, flush=True)
                    failed.add((folder, cell))
                    continue
                known.append({**key, **found})
                with kept.open("a") as file:
                    file.write(json.dumps(known[-1]) + "\n")
    report([row for row in known if row["settings"] == settings], args)
    return 1 if failed else 0


def in_a_process(args: argparse.Namespace, folder: str, cell: str) -> dict[str, Any] | str:
    """What a cell measures, or why it does not."""
    python = args.vllm_python if cell.startswith("vllm") else sys.executable
    options = ["--windows", str(args.windows), "--seq-len", str(args.seq_len), "--work", str(args.work)]
    command = [python, __file__, folder, "--run", cell, *options, "--text", *map(str, args.text)]
    done = subprocess.run(command, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes, perplexities, and tokens a second of a prompt and of the answer to it: medians after a first pass."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    kind = args.run.split(":")[1]
    folder = Path(args.folders[0])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = {file.name: windows(tokenizer, file, args.windows, args.seq_len) for file in args.text}
    runner = TYPES[args.run](folder, kind, max(args.seq_len, PROMPT + NEW), args.work)
    found = {"bytes": runner.bytes, **{name: runner.perplexity(text) for name, text in texts.items()}}
    prompt, prefill, decode = list(range(100, 100 + PROMPT)), [], []
    for _ in range(1 + PASSES):
        started = time.perf_counter()
        runner.answer(prompt, 1)
        first = time.perf_counter() - started
        runner.answer(prompt, 1 + NEW)
        prefill.append(PROMPT / first)
        decode.append(NEW / (time.perf_counter() - started - 2 * first))
    return {**found, "prefill": statistics.median(prefill[1:]), "decode": statistics.median(decode[1:])}


def windows(tokenizer: Any, file: Path, count: int, length: int) -> list[list[int]]:
    """The first windows of a text, which is tokenised once."""
    ids = tokenizer(file.read_text(encoding="utf-8")[: 12 * count * length])["input_ids"]
    if len(ids) < count * length:
        raise SystemExit(f"{file}: expected {count * length} tokens, got {len(ids)}")
    return [ids[at : at + length] for at in range(0, count * length, length)]


def perplexity(logits: list[Tensor], texts: list[list[int]]) -> float:
    """`exp` of the mean negative log-likelihood of tokens 2 to T of every window, from logits (T, vocabulary)."""
    losses = [
        nn.functional.cross_entropy(rows[:-1].double(), torch.tensor(window[1:]))
        for rows, window in zip(logits, texts, strict=True)
    ]
    return math.exp(torch.stack(losses).mean())


class Torch:
    """A model in transformers: in a type of torch's, with weights quantised in bfloat16, or as it is stored."""

    def __init__(self, folder: Path, kind: str, length: int, work: Path) -> None:
        if kind == "stored":
            self.model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        elif kind.startswith("bnb"):
            how = {"load_in_8bit": True} if kind == "bnb-int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
            config = transformers.BitsAndBytesConfig(**how, bnb_4bit_compute_dtype=torch.bfloat16)
            more: dict[str, Any] = {"quantization_config": config, "device_map": "cpu"}
            self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **more)
        else:
            self.model = checkpoint.load(str(folder), "float32" if kind == "f32" else "bfloat16")[0]
        if kind in ("int8", "int4"):
            quantise(self.model, kind)
        self.model.eval()
        self.bytes = sum(bytes_of(p) for p in {id(p): p for p in self.model.parameters()}.values())
        if kind == "stored":  # what loads it may have unpacked it
            self.bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    @torch.no_grad()
    def perplexity(self, texts: list[list[int]]) -> float:
        return perplexity([self.model(torch.tensor([w]), use_cache=False).logits[0] for w in texts], texts)

    @torch.no_grad()
    def answer(self, prompt: list[int], count: int) -> None:
        """Reads a prompt and writes an answer."""
        out = self.model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        for _ in range(count - 1):
            token = out.logits[:, -1:].argmax(-1)
            out = self.model(token, **with_cache(self.model, out.past_key_values))


def quantise(model: transformers.PreTrainedModel, kind: str) -> None:
    """Weights by torchao in all linear layers but the head: int8 with a scale a row, or int4 with one a group."""
    from torchao import quantization

    head = model.get_output_embeddings()
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    config = quantization.Int8WeightOnlyConfig()
    if kind == "int4":
        rows = {module.in_features for module in linear.values()}
        group = next((size for size in GROUPS if not any(row % size for row in rows)), None)
        if group is None:
            raise SystemExit(f"int4: no group of {GROUPS} divides all of {sorted(rows)}")
        granularity = quantization.PerGroup(group)
        config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity)
    quantization.quantize_(model, config, filter_fn=lambda _module, name: name in linear)


def bytes_of(parameter: Tensor) -> int:
    """As it is stored: values and scales."""
    if hasattr(parameter, "__tensor_flatten__"):
        parts = [getattr(parameter, name) for name in parameter.__tensor_flatten__()[0]]
    else:
        state = getattr(parameter, "quant_state", None)
        parts = [parameter, *([] if state is None else [state.absmax]), getattr(parameter, "SCB", None)]
    return sum(part.numel() * part.element_size() for part in parts if isinstance(part, Tensor))


class Llama:
    """A GGUF file in llama.cpp, in a type of its own."""

    def __init__(self, folder: Path, kind: str, length: int, work: Path) -> None:
        import llama_cpp

        self.lib = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda _level, _text, _data: None)
        llama_cpp.llama_log_set(self.quiet, None)
        llama_cpp.llama_backend_init()
        path = self.file(folder, kind, work)
        self.bytes = path.stat().st_size
        self.model = llama_cpp.llama_model_load_from_file(bytes(path), llama_cpp.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"{path}: llama.cpp does not load it")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = length
        options.n_threads = options.n_threads_batch = 1
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(length, 0, 1)

    def file(self, folder: Path, kind: str, work: Path) -> Path:
        """Written in float32, and by llama.cpp in the type from that, where it is not there yet."""
        whole, path = (work / f"{folder.name}-{name}.gguf" for name in ("f32", kind))
        if not whole.exists():
            gguf.write_gguf(checkpoint.load(str(folder), "float32")[0], folder, whole, "f32")
        if not path.exists():
            options = self.lib.llama_model_quantize_default_params()
            options.ftype, options.nthread = getattr(self.lib, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}"), 1
            if self.lib.llama_model_quantize(bytes(whole), bytes(path), ctypes.byref(options)):
                raise SystemExit(f"{whole}: llama.cpp cannot quantise it to {kind}")
        return path

    def run(self, tokens: Sequence[int], start: int = 0, every: bool = False) -> Tensor:
        """Logits after all tokens, (T, vocabulary), or after the last one, (vocabulary,)."""
        import numpy as np

        if start == 0:
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self.batch.n_tokens = len(tokens)
        for at, token in enumerate(tokens):
            self.batch.token[at], self.batch.pos[at] = token, start + at
            self.batch.n_seq_id[at], self.batch.seq_id[at][0] = 1, 0
            self.batch.logits[at] = every or at == len(tokens) - 1
        if self.lib.llama_decode(self.context, self.batch):
            raise SystemExit("llama.cpp cannot run the tokens")
        found = self.lib.llama_get_logits(self.context)
        logits = torch.from_numpy(np.ctypeslib.as_array(found, (len(tokens) if every else 1, self.words)))
        return logits.clone() if every else logits[0]

    def perplexity(self, texts: list[list[int]]) -> float:
        return perplexity([self.run(window, every=True) for window in texts], texts)

    def answer(self, prompt: list[int], count: int) -> None:
        """Reads a prompt and writes an answer."""
        token = int(self.run(prompt).argmax())
        for at in range(count - 1):
            token = int(self.run([token], len(prompt) + at).argmax())


class Vllm:
    """A model in vLLM."""

    def __init__(self, folder: Path, kind: str, length: int, work: Path) -> None:
        from vllm_engine import start

        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
        self.engine = start(folder, {"f32": "float32", "bf16": "bfloat16"}[kind], length=length + 1)
        self.bytes = sum(bytes_in(file, 2 if kind == "bf16" else 4) for file in folder.glob("*.safetensors"))

    def generate(self, prompts: list[list[int]], **sampling: Any) -> list[Any]:
        import vllm

        made = vllm.SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **sampling)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        found: list[Any] = self.engine.generate(given, made, use_tqdm=False)
        return found

    def perplexity(self, texts: list[list[int]]) -> float:
        scored = self.generate(texts, max_tokens=1, prompt_logprobs=0)
        losses = [
            -entry[token].logprob
            for window, request in zip(texts, scored, strict=True)
            for token, entry in zip(window[1:], request.prompt_logprobs[1:], strict=True)
        ]
        return math.exp(statistics.fmean(losses))

    def answer(self, prompt: list[int], count: int) -> None:
        """Reads a prompt and writes an answer."""
        self.generate([prompt], max_tokens=count)


def bytes_in(file: Path, each: int) -> int:
    """What the tensors of a safetensors file take where floats take so many bytes, and integers what they do there."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        tensors = [opened.get_slice(name) for name in opened.keys()]  # noqa: SIM118
    whole = {"I8": 1, "U8": 1, "I32": 4, "I64": 8}
    return sum(whole.get(tensor.get_dtype(), each) * math.prod(tensor.get_shape()) for tensor in tensors)


TYPES = {
    **{f"transformers:{kind}": Torch for kind in ("f32", "bf16", "int8", "int4", "bnb-int8", "bnb-nf4", "stored")},
    **{f"llama.cpp:{kind}": Llama for kind in ("f32", "bf16", "q8_0", "q4_0", "q4_k_m")},
    **{f"vllm:{kind}": Vllm for kind in ("f32", "bf16")},
}


def report(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """A Markdown table on stdout: a row for each cell."""
    texts = [file.name for file in args.text]
    found = {
        (folder, cell): [r for r in rows if (r["folder"], r["cell"]) == (folder, cell)]
        for folder in args.folders
        for cell in args.cells
    }
    print(f"| model | in | as | MB | {' | '.join(texts)} | prefill | | decode | |")
    print(f"|---|---|---|---:|{'---:|' * len(texts)}---:|---:|---:|---:|")
    for (folder, cell), turns in found.items():
        if not turns:
            continue
        figures = [f"{turns[0]['bytes'] / 1e6:,.1f}", *(f"{turns[0][text]:,.2f}" for text in texts)]
        dense = {row["turn"]: row for row in found[args.folders[0], cell]}
        for speed in ("prefill", "decode"):
            ratios = [row[speed] / dense[row["turn"]][speed] for row in turns if row["turn"] in dense]
            figures.append(f"{statistics.median(row[speed] for row in turns):,.0f}")
            figures.append(f"{statistics.median(ratios):.2f}" if ratios else "")
        print(f"| {' | '.join([Path(folder).name, *cell.split(':'), *figures])} |")


if __name__ == "__main__":
    sys.exit(main())
