"""Dense and pruned model, each as it is and with int8 weights: bytes, perplexity, prefill speed. Needs torchao.

python benchmarks/int8.py opt-7m opt-7m-snp-30 --evaluation wikitext=DATA/wiki.test.raw
"""

import argparse
import copy
import statistics
import time

import torch
from torch import nn
from transformers import PreTrainedModel

from snp_llm import checkpoint, perplexity
from snp_llm.data.sources import Dataset
from snp_llm.data.windows import evaluation_windows


def quantised(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with int8 weights, a scale for every row, in all linear layers but the head."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    found, head = copy.deepcopy(model), model.get_output_embeddings()
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head}
    quantize_(found, Int8WeightOnlyConfig(), filter_fn=lambda _module, name: name in names)
    return found


def bytes_of(model: PreTrainedModel) -> int:
    """Bytes of all parameters, tied ones once, as they are stored: int8 values and their scales."""
    total = 0
    for parameter in model.parameters():
        inner = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else []
        tensors = [getattr(parameter, name) for name in inner] or [parameter]
        total += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
    return total


@torch.no_grad()
def seconds(models: list[PreTrainedModel], tokens: torch.Tensor, repeats: int) -> list[float]:
    """Median seconds of a pass of each model over tokens, the models taking turns."""
    taken: list[list[float]] = [[] for _ in models]
    for turn in range(repeats + 1):
        for model, own in zip(models, taken, strict=True):
            start = time.perf_counter()
            model(tokens, use_cache=False)
            own += [time.perf_counter() - start] if turn else []
    return [statistics.median(own) for own in taken]


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense")
    parser.add_argument("pruned", nargs="+")
    parser.add_argument("--evaluation", nargs="+", default=["bundled=bundled"], metavar="NAME=TEXT")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    models, names = [], []
    for name in (arguments.dense, *arguments.pruned):
        model, tokenizer = checkpoint.load(name, "auto")
        models += [model, quantised(model)]
        names += [name, f"{name}, int8"]
    texts = dict(text.split("=", 1) for text in arguments.evaluation)
    options = {"seq_len": arguments.seq_len, "max_windows": arguments.max_windows}
    windows = {label: evaluation_windows(tokenizer, Dataset(text), **options) for label, text in texts.items()}
    times = seconds(models, next(iter(windows.values())).tokens[:1], arguments.repeats)
    print(f"| | MB | {' | '.join(f'perplexity, {label}' for label in windows)} | prefill, tokens a second |")
    print(f"|---|---:|{'---:|' * len(windows)}---:|")
    for name, model, took in zip(names, models, times, strict=True):
        figures = [f"{perplexity(model, found.tokens):,.2f}" for found in windows.values()]
        print(f"| {name} | {bytes_of(model) / 1e6:,.2f} | {' | '.join(figures)} | {arguments.seq_len / took:,.0f} |")


if __name__ == "__main__":
    main()
