"""Loads a saved model as a user would and writes its logits. Run as text by `checkpoint.verify`; must not know the rest
of the package."""

import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

folder, given, result, auto_class = sys.argv[1:]
# The weights stay on disk but for the layer that is being computed: a large model need not fit into memory for this.
model = getattr(transformers, auto_class).from_pretrained(
    folder, trust_remote_code=True, dtype="auto", device_map={"": "disk"}, offload_folder=f"{result}.offloaded"
)
model.eval()
AutoTokenizer.from_pretrained(folder)
assert not any(name.split(".")[0] == "snp_llm" for name in sys.modules), "the package was imported"
tokens = load_file(given)["tokens"]
with torch.no_grad():
    save_file({"logits": model(tokens, use_cache=False).logits.contiguous()}, result)
