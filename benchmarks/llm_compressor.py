"""A folder quantised to four bits by llm-compressor, GPTQ or AWQ, with one scale for a group of values of a row.

    pip install llmcompressor
    python benchmarks/llm_compressor.py FOLDER --by gptq --text wiki.valid.tokens --output FOLDER-gptq
    python benchmarks/quantised.py FOLDER FOLDER-gptq --cells transformers:stored --text wiki.test.raw --work cells

On a CPU as well. The first windows of the text are what it calibrates on. Compact folders take what their dense type
does: AWQ has to be told which norm or projection is in front of which, and finds compact types under no name.
"""

import argparse
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.modifiers.transform.awq.mappings import AWQ_MAPPING_REGISTRY, default_mappings
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer

import snp_llm  # noqa: F401, lets transformers read compact folders

OPT = [
    AWQMapping(r"re:.*self_attn_layer_norm$", [f"re:.*{name}_proj$" for name in "qkv"]),
    AWQMapping(r"re:.*v_proj$", [r"re:.*out_proj$"]),
    AWQMapping(r"re:.*layers\.\d+\.final_layer_norm$", [r"re:.*fc1$"]),  # there is another behind the blocks
    AWQMapping(r"re:.*fc1$", [r"re:.*fc2$"]),
]


def main() -> None:
    """Quantises, and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--by", choices=("gptq", "awq"), default="gptq")
    parser.add_argument("--group", type=int, default=128, help="values of a row that share a scale")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--output", required=True)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    count, length = args.windows, args.seq_len
    ids = tokenizer(args.text.read_text(encoding="utf-8")[: 12 * count * length])["input_ids"]
    windows = [ids[at : at + length] for at in range(0, count * length, length)]
    weights = QuantizationArgs(num_bits=4, strategy="group", group_size=args.group)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    four_bits = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    dense = type(model).__name__.removeprefix("Snp")
    mappings = {"OPTForCausalLM": OPT, **AWQ_MAPPING_REGISTRY}.get(dense, default_mappings)
    awq = [AWQModifier(mappings=mappings), QuantizationModifier(**four_bits)]
    if not torch.accelerator.is_available():
        # AWQ, as of 0.14, pins memory for a GPU without looking for one.
        IntermediatesCache.pin_memory = lambda *_: None  # type: ignore[method-assign]
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_list([{"input_ids": w, "attention_mask": [1] * length} for w in windows]),
        recipe=GPTQModifier(**four_bits) if args.by == "gptq" else awq,
        num_calibration_samples=count,
        max_seq_length=length,
        output_dir=args.output,
    )


if __name__ == "__main__":
    main()
