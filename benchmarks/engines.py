"""A pruned model in engines that are not ours: ONNX Runtime, transformers from a GGUF, and llama.cpp.

    python benchmarks/engines.py FOLDER --tokenizer-from dense.gguf --llama-cpp CHECKOUT

Each gets the folder's weights in its own format and has to compute the logits that torch does: of Llama and Mistral as
a GGUF by gguf_export.py, and with `--llama-cpp` as one by llama.cpp's own converter, which also has to read the
tokenizer. Tokens are drawn at random here; benchmarks/real_model.py brings text.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf_export
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

TOLERANCE = 1e-3
SHAPES = ((2, 128), (1, 7), (3, 40))  # the first is what is exported; the others show that nothing is baked in
LLAMA_CPP_PROMPTS = 4
SAID = "Prune first, then serve:\n\n\tdef f(x): return x ** 2  # 3.14159, naïve café, 東京, 🙂's and we'll see\n"


@dataclass(frozen=True)
class Check:
    """What was compared, and the largest difference of a logit relative to the largest; zero for what is exact."""

    text: str
    difference: float

    @property
    def passed(self) -> bool:
        return self.difference <= TOLERANCE

    def __str__(self) -> str:
        return f"{'ok' if self.passed else 'DISAGREES'}: {self.text}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer-from", type=Path, default=None, metavar="GGUF")
    parser.add_argument("--llama-cpp", type=Path, default=None, metavar="CHECKOUT", help="with convert_hf_to_gguf.py")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(args.folder)
    tokens = torch.randint(config.vocab_size, (4, 128), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as work:
        checks: list[Check] = []
        if config.model_type in gguf_export.KNOWN:
            checks = check_engines(args.folder, tokens, Path(work), args.tokenizer_from)
        if args.llama_cpp is not None:
            checks += check_converter(args.folder, tokens, Path(work) / "converted.gguf", args.llama_cpp)
    print("\n".join(str(check) for check in checks))
    return 0 if all(check.passed for check in checks) else 1


def check_engines(folder: Path, tokens: Tensor, work: Path, tokenizer_from: Path | None = None) -> list[Check]:
    """All engines that are installed; llama.cpp needs a tokenizer in the file, so it is left out without one.

    Args:
        folder: Llama or Mistral model with a plain config.
        tokens: at least 4 windows of 128, (windows, T), int64.
        work: where the files go.
        tokenizer_from: a GGUF with the model's tokenizer.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    checks = check_onnx(model, tokens, work / "model.onnx")
    path = work / "model.gguf"
    gguf_export.write_gguf(model, path, tokenizer_from)
    checks += check_gguf(model, tokens, path)
    if tokenizer_from is not None and find_spec("xllamacpp"):
        checks.append(check_llama_cpp(model, tokens, path))
    return checks


def check_converter(folder: Path, tokens: Tensor, path: Path, llama_cpp: Path) -> list[Check]:
    """Converts the folder with llama.cpp's own script, tokenizer included, and runs the file.

    Args:
        folder, tokens: as for `check_engines`.
        path: of the new file.
        llama_cpp: a checkout; its script needs sentencepiece, whatever the tokenizer.
    """
    script, package = llama_cpp / "convert_hf_to_gguf.py", llama_cpp / "gguf-py"
    found = subprocess.run(
        [sys.executable, str(script), str(folder), "--outfile", str(path), "--outtype", "f32"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    if found.returncode != 0:
        reason = (found.stderr.strip().splitlines() or [f"exit code {found.returncode}"])[-1]
        return [Check(f"{script.name}: {reason}", float("inf"))]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    checks = check_gguf(model, tokens, path) if model.config.model_type in gguf_export.KNOWN else []
    if find_spec("xllamacpp"):
        ids = AutoTokenizer.from_pretrained(folder)(SAID, return_tensors="pt")["input_ids"]
        checks += [check_llama_cpp(model, tokens, path), check_llama_cpp(model, ids, path, SAID)]
    return [Check(f"{script.name}, {check.text}", check.difference) for check in checks]


class Logits(nn.Module):
    """Token ids in, logits out, which is all that the exported graph has."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids, use_cache=False).logits


def check_onnx(model: PreTrainedModel, tokens: Tensor, path: Path) -> list[Check]:
    """Exports to ONNX with free batch and length, and runs the file in onnxruntime."""
    import onnx
    import onnxruntime

    sizes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens", min=2, max=4096)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Logits(model).eval(),
            (pick(tokens, SHAPES[0]),),
            path,
            input_names=["input_ids"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": sizes},
            dynamo=True,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(ids: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])

    exporter = f"torch {torch.__version__} to onnx {onnx.__version__}"
    return [compare(f"onnxruntime {onnxruntime.__version__} ({exporter})", model, run, tokens, s) for s in SHAPES]


def check_gguf(model: PreTrainedModel, tokens: Tensor, path: Path) -> list[Check]:
    """Reads the file back with the gguf package, then loads it with transformers, which undoes the row order."""
    faults, tensors, keys = gguf_export.check_gguf(model, path)
    shown = "; ".join(faults[:3]) or f"{tensors} tensors equal to the bit, {keys} metadata keys equal"
    checks = [Check(f"gguf reader: {shown}", float(len(faults)))]
    heads = gguf_export.metadata(model.config)["llama.attention.head_count"][0]
    if model.config.hidden_size % heads:  # transformers knows the file only as Llama, whose config refuses the count
        return checks
    reloaded = load_gguf(path)
    label = f"GGUF in transformers {transformers.__version__}"
    return [*checks, compare(label, model, lambda ids: reloaded(ids, use_cache=False).logits, tokens, SHAPES[0])]


def load_gguf(path: Path) -> PreTrainedModel:
    """A GGUF file through transformers, float32. One loaded without `dequantize` could not be saved."""
    return AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=transformers.GgufConfig(gguf_file=path.name, dequantize=True),
        dtype=torch.float32,
    ).eval()


def check_llama_cpp(model: PreTrainedModel, tokens: Tensor, path: Path, said: str | None = None) -> Check:
    """Runs the file in llama.cpp, CPU and float32 throughout, and compares log-probabilities of the next token.

    Its server gives no logits; log-probabilities of the whole vocabulary are the same up to a constant.

    Args:
        model: what the file was made of.
        tokens: prompts, (windows, T), int64.
        path: of the file.
        said: the text that is the only prompt, for llama.cpp to make tokens of.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = tokens.shape[1] + 8, 1, 0
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it would use float16
    params.verbosity, params.warmup = -1, False
    server = xllamacpp.Server(params)
    difference = 0.0
    for window in tokens[:LLAMA_CPP_PROMPTS]:
        with torch.no_grad():
            logits = model(window[None], use_cache=False).logits[0, -1]
        answer = server.handle_completions(
            {"prompt": said or window.tolist(), "n_predict": 1, "n_probs": len(logits), "cache_prompt": False}
        )
        found = torch.full_like(logits, float("nan"))
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        difference = max(difference, relative(logits.log_softmax(0), found, logits.abs().max()))
    count, length = min(LLAMA_CPP_PROMPTS, len(tokens)), tokens.shape[1]
    prompts = f"a text that it cut into tokens itself ({length})" if said else f"{count} prompts of {length}"
    return Check(
        f"llama.cpp (xllamacpp {xllamacpp.__version__}): log-probabilities of all {len(logits):,} tokens after "
        f"{prompts} differ by {difference:.1e} of the largest logit",
        difference,
    )


@torch.no_grad()
def compare(
    engine: str, model: PreTrainedModel, run: Callable[[Tensor], Tensor], tokens: Tensor, shape: tuple[int, int]
) -> Check:
    """An engine's logits against torch's on the first tokens of some windows."""
    ids = pick(tokens, shape)
    expected = model(ids, use_cache=False).logits
    found = run(ids)
    difference = relative(expected, found, expected.abs().max())
    same = float((expected.argmax(-1) == found.argmax(-1)).double().mean())
    text = f"{engine}: logits of {shape[0]} x {shape[1]} tokens differ by {difference:.1e} of the largest"
    return Check(f"{text}, {100 * same:.4g} % of the most likely tokens are the same", difference)


def relative(expected: Tensor, found: Tensor, scale: Tensor) -> float:
    """The largest difference over a scale; infinite if anything is missing."""
    value: Any = (expected.double() - found.double()).abs().max() / scale.double()
    return float(value) if torch.isfinite(value) else float("inf")


def pick(tokens: Tensor, shape: tuple[int, int]) -> Tensor:
    return tokens[: shape[0], : shape[1]].contiguous()


if __name__ == "__main__":
    sys.exit(main())
