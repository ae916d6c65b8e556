"""Models as GGUF files, whole and quantised, in llama.cpp: size, perplexity, tokens a second; torch beside them.

    pip install 'snp-llm[gguf]' llama-cpp-python
    python benchmarks/quantised.py DENSE PRUNED --text wiki.test.raw --csv quantised.csv

Every folder is written as `snp-llm export --to gguf` does, in float32, and quantised from that by llama.cpp itself. Of
each file the same windows are scored, cut from tokens that transformers' tokenizer made. Models take turns, so that
drift of the machine cancels; one thread.
"""

import argparse
import csv
import ctypes
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
import transformers

from snp_llm import checkpoint
from snp_llm.engines import gguf
from snp_llm.models.calls import with_cache

KINDS = {
    "f32": None,
    "bf16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}
PROMPT, NEW = 128, 32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--turns", type=int, default=5, help="of timed runs, after one that is not counted")
    parser.add_argument("--csv", type=Path, default=None)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    torch.set_num_threads(1)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    runners: dict[tuple[str, str], Any] = {}
    with tempfile.TemporaryDirectory() as work:
        for folder in args.folders:
            model, tokenizer = checkpoint.load(folder, "float32")
            texts = {file.name: windows(tokenizer, file, args.windows, args.seq_len) for file in args.text}
            whole = Path(work) / f"{Path(folder).name}-f32.gguf"
            gguf.write_gguf(model, Path(folder), whole, "f32")
            loaded = Torch(model)
            size = sum(p.numel() * 4 for p in {id(p): p for p in model.parameters()}.values())
            runners[folder, "torch f32"] = loaded
            rows[folder, "torch f32"] = {"bytes": size, **{f"ppl {n}": loaded.perplexity(w) for n, w in texts.items()}}
            for name, kind in KINDS.items():
                path = whole if kind is None else quantised(whole, name, kind)
                runner = runners[folder, name] = Llama(path, max(args.seq_len, PROMPT + NEW))
                found = {f"ppl {n}": runner.perplexity(w) for n, w in texts.items()}
                rows[folder, name] = {"bytes": path.stat().st_size, **found}
                print(folder, name, rows[folder, name], file=sys.stderr, flush=True)
        for key, times in in_turns(runners, args.turns).items():
            rows[key].update(times)
    report([{"model": Path(folder).name, "as": name, **row} for (folder, name), row in rows.items()], args.csv)
    return 0


@llama_cpp.llama_log_callback
def quiet(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    """Nothing of what llama.cpp says."""


def windows(tokenizer: Any, file: Path, count: int, length: int) -> list[list[int]]:
    """The first windows of a text, which is tokenised once."""
    ids = tokenizer(file.read_text(encoding="utf-8")[: 12 * count * length])["input_ids"]
    if len(ids) < count * length:
        raise SystemExit(f"{file}: expected {count * length} tokens, got {len(ids)}")
    return [ids[at : at + length] for at in range(0, count * length, length)]


def quantised(whole: Path, name: str, kind: int) -> Path:
    """The file that llama.cpp makes of another one."""
    path = whole.with_name(whole.name.replace("f32", name))
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = kind, 1
    if llama_cpp.llama_model_quantize(bytes(whole), bytes(path), ctypes.byref(options)):
        raise SystemExit(f"{whole}: llama.cpp cannot quantise it to {name}")
    return path


class Llama:
    """A GGUF file in llama.cpp, on one thread of the CPU."""

    def __init__(self, path: Path, length: int) -> None:  # of its longest text
        self.model = llama_cpp.llama_model_load_from_file(bytes(path), llama_cpp.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"{path}: llama.cpp does not load it")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = length
        options.n_threads = options.n_threads_batch = 1
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        self.words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(length, 0, 1)

    def run(self, tokens: Sequence[int], start: int = 0, every: bool = False) -> np.ndarray:
        """Logits after all tokens, (T, vocabulary), or after the last one, (vocabulary,)."""
        if start == 0:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self.batch.n_tokens = len(tokens)
        for at, token in enumerate(tokens):
            self.batch.token[at], self.batch.pos[at] = token, start + at
            self.batch.n_seq_id[at], self.batch.seq_id[at][0] = 1, 0
            self.batch.logits[at] = every or at == len(tokens) - 1
        if llama_cpp.llama_decode(self.context, self.batch):
            raise SystemExit("llama.cpp cannot run the tokens")
        count = len(tokens) if every else 1
        found = np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), (count, self.words))
        return found if every else found[0]

    def perplexity(self, texts: list[list[int]]) -> float:
        """`exp` of the mean negative log-likelihood of tokens 2 to T of every window."""
        return perplexity([torch.from_numpy(self.run(window, every=True).copy()) for window in texts], texts)

    def answer(self, prompt: list[int], count: int) -> None:
        """Reads a prompt and writes an answer."""
        token = int(self.run(prompt).argmax())
        for at in range(count):
            token = int(self.run([token], len(prompt) + at).argmax())


class Torch:
    """A model in transformers, on one thread of the CPU."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self.model = model

    @torch.no_grad()
    def perplexity(self, texts: list[list[int]]) -> float:
        """As that of `Llama`."""
        return perplexity([self.model(torch.tensor([w]), use_cache=False).logits[0] for w in texts], texts)

    @torch.no_grad()
    def answer(self, prompt: list[int], count: int) -> None:
        """Reads a prompt and writes an answer."""
        out = self.model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
        for _ in range(count):
            token = out.logits[:, -1:].argmax(-1)
            out = self.model(token, **with_cache(self.model, out.past_key_values))


def perplexity(logits: list[torch.Tensor], texts: list[list[int]]) -> float:
    """From logits of windows, each (T, vocabulary), and their tokens."""
    losses = [
        torch.nn.functional.cross_entropy(rows[:-1].double(), torch.tensor(window[1:]))
        for rows, window in zip(logits, texts, strict=True)
    ]
    return math.exp(torch.stack(losses).mean())


def in_turns(runners: dict[tuple[str, str], Any], turns: int) -> dict[tuple[str, str], dict[str, float]]:
    """Tokens a second of a prompt, and of the answer to it: medians, the first turn not counted."""
    prompt = list(range(100, 100 + PROMPT))
    times: dict[tuple[str, str], list[tuple[float, float]]] = {key: [] for key in runners}
    for _ in range(1 + turns):
        for key, runner in runners.items():
            started = time.perf_counter()
            runner.answer(prompt, 0)
            first = time.perf_counter() - started
            runner.answer(prompt, NEW)
            times[key].append((first, time.perf_counter() - started - 2 * first))
    return {
        key: {
            "prefill": PROMPT / statistics.median(first for first, _ in found[1:]),
            "decode": NEW / statistics.median(rest for _, rest in found[1:]),
        }
        for key, found in times.items()
    }


def report(rows: list[dict[str, Any]], file: Path | None) -> None:
    """The rows as a table on stdout, and as a file."""
    columns = list(rows[0])
    print(*("| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)), sep="\n")
    for row in rows:
        shown = [
            f"{v / 1e6:,.1f} MB" if k == "bytes" else f"{v:,.2f}" if isinstance(v, float) else str(v)
            for k, v in row.items()
        ]
        print("| " + " | ".join(shown) + " |")
    if file is not None:
        with file.open("w", newline="", encoding="utf-8") as opened:
            writer = csv.DictWriter(opened, columns)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
