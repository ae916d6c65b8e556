"""A pruned model in engines that are not ours: ONNX Runtime, transformers from a GGUF, and llama.cpp.

    python benchmarks/engines.py FOLDER --llama-cpp CHECKOUT

Each gets the folder's weights in its own format and has to compute the logits that torch does: as a graph and, of types
that `snp-llm export` writes, as a GGUF by its writers, and with `--llama-cpp` as a GGUF by llama.cpp's own converter,
which also has to read the tokenizer.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from snp_llm import checkpoint
from snp_llm.engines import gguf, llama_cpp, onnx
from snp_llm.engines.extras import is_there
from snp_llm.models.registry import dense_type
from snp_llm.runtime.errors import SnpError

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Check:
    """What was compared, and the largest difference of a logit relative to the largest; zero for what is exact."""

    text: str
    difference: float

    @property
    def passed(self) -> bool:
        return self.difference <= TOLERANCE

    def __str__(self) -> str:
        return f"{'ok' if self.passed else 'DISAGREES'}: {self.text}: {self.difference:.1e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama-cpp", type=Path, default=None, metavar="CHECKOUT", help="with convert_hf_to_gguf.py")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        checks = check_engines(args.folder, Path(work))
        if args.llama_cpp is not None:
            checks += check_converter(args.folder, Path(work) / "converted.gguf", args.llama_cpp)
    print("\n".join(map(str, checks)))
    return 0 if all(check.passed for check in checks) else 1


def check_engines(folder: Path, work: Path) -> list[Check]:
    """The files that this package writes, in the engines that are installed.

    Args:
        folder: a model with its tokenizer.
        work: where the files go.
    """
    model, tokenizer = checkpoint.load(str(folder), "float32")
    try:
        onnx.write_onnx(model, work)
        checks = [Check("onnxruntime, logits of four shapes", onnx.difference(model, work))]
    except SnpError as error:  # torch traces no mixtures of experts
        checks = [Check(str(error), float("inf"))]
    if dense_type(model.config) not in gguf.KNOWN:
        return checks
    path = work / "model.gguf"
    gguf.write_gguf(model, folder, path, "f32")
    faults = gguf.differences(model, path, "f32")
    checks.append(Check("; ".join(faults[:3]) or "GGUF read back, tensors and metadata", float(len(faults))))
    # transformers knows the file only as Llama, whose config refuses heads that do not divide the hidden size
    if gguf.architecture(model) == "llama" and model.config.hidden_size % model.config.num_attention_heads == 0:
        ids = onnx.examples(model)[0]
        expected, found = (m(ids, use_cache=False).logits.double() for m in (model, load_gguf(path)))
        difference = float((expected - found).abs().max() / expected.abs().max())
        checks.append(Check(f"GGUF in transformers {transformers.__version__}, logits", difference))
    if is_there(llama_cpp.PACKAGE):
        checks.append(Check("llama.cpp, log-probabilities", llama_cpp.difference(model, tokenizer, path)))
    return checks


def check_converter(folder: Path, path: Path, checkout: Path) -> list[Check]:
    """Converts the folder with llama.cpp's own script, tokenizer included, and runs the file.

    Args:
        folder: as for `check_engines`.
        path: of the new file.
        checkout: of llama.cpp; its script needs sentencepiece, whatever the tokenizer.
    """
    script, package = checkout / "convert_hf_to_gguf.py", checkout / "gguf-py"
    found = subprocess.run(
        [sys.executable, str(script), str(folder), "--outfile", str(path), "--outtype", "f32"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    if found.returncode != 0:
        reason = (found.stderr.strip().splitlines() or [f"exit code {found.returncode}"])[-1]
        return [Check(f"{script.name}: {reason}", float("inf"))]
    if not is_there(llama_cpp.PACKAGE):
        return [Check(f"{script.name}: written; not run, {llama_cpp.PACKAGE} is not installed", 0.0)]
    model, tokenizer = checkpoint.load(str(folder), "float32")
    return [Check(f"{script.name}, llama.cpp, log-probabilities", llama_cpp.difference(model, tokenizer, path))]


def load_gguf(path: Path) -> PreTrainedModel:
    """A GGUF file through transformers, float32. One loaded without `dequantize` could not be saved."""
    return (
        AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=transformers.GgufConfig(gguf_file=path.name, dequantize=True),
            dtype=torch.float32,
        )
        .eval()
        .requires_grad_(False)
    )


if __name__ == "__main__":
    sys.exit(main())
