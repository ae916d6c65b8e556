"""Classifiers of full size with random weights, pruned from end to end: seconds and memory.

    python benchmarks/vision/full_size.py resnet-50 deit-small vgg-16 --num-samples 32

Random weights and white noise cost what trained ones and photographs do. Every model goes through `snp-llm prune` in a
process of its own, whose largest resident memory is printed with the seconds of each phase.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessor

import snp_llm  # noqa: F401 - makes VGG known

MODELS = {
    "resnet-50": ("resnet", {"depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048]}),
    "deit-small": (
        "deit",
        {
            "hidden_size": 384,
            "num_attention_heads": 6,
            "intermediate_size": 1536,
            "architectures": ["DeiTForImageClassification"],
        },
    ),
    "vgg-16": ("vgg_bn", {}),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=MODELS)
    parser.add_argument("--num-samples", default="32")
    parser.add_argument("--sparsity", default="0.4")
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in args.models:
        with tempfile.TemporaryDirectory() as work:
            folder, out = Path(work) / name, Path(work) / "out"
            model_type, values = MODELS[name]
            torch.manual_seed(0)
            model = AutoModelForImageClassification.from_config(
                AutoConfig.for_model(model_type, num_labels=1000, image_size=224, **values)
            )
            model.save_pretrained(folder)
            ViTImageProcessor(size={"height": 224, "width": 224}).save_pretrained(folder)
            del model
            command = [sys.executable, "-m", "snp_llm.prune", str(folder), "--output", str(out), "--no-eval", "--quiet"]
            command += ["--calibration", "noise", "--num-samples", args.num_samples, "--sparsity", args.sparsity]
            start = time.time()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                return 1
            report = json.loads((out / "prune_report.json").read_text(encoding="utf-8"))
            print(
                f"{name}: {report['sparsity']['achieved']:.3f} removed in {time.time() - start:.0f} s, at most "
                f"{usage.ru_maxrss / 1e6:.2f} GB; {json.dumps(report['seconds'])}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
