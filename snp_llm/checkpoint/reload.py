"""Loads a saved model as a user would and writes its logits. Run as text by `checkpoint.fresh_process`; must not know
the rest of the package. Gets the folder and a device as JSON in a line of its input, once it has read its libraries."""

import json
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file

given, result, auto_class, reader, options = sys.argv[1:]
loader = getattr(transformers, auto_class)
line = sys.stdin.readline()
if not line:  # whoever wanted to know is gone
    sys.exit(1)
folder, device = json.loads(line)
# On the CPU the weights stay on disk but for the layer that is being computed: a large model need not fit into memory.
on_disk = {"device_map": {"": "disk"}, "offload_folder": f"{result}.offloaded"}
model = loader.from_pretrained(
    folder, trust_remote_code=True, dtype="auto", **(on_disk if device == "cpu" else {"device_map": {"": device}})
)
model.eval()
torch.set_float32_matmul_precision("highest")  # whatever the environment says, as in the process that asks
for module in model.modules():  # Llama 4 sends its tokens where the embeddings' weight is, before that has been read
    hook = getattr(module, "_hf_hook", None)
    if isinstance(module, torch.nn.Embedding) and hook is not None:
        hook.pre_forward(module)
getattr(transformers, reader).from_pretrained(folder)
assert not any(name.split(".")[0] == "snp_llm" for name in sys.modules), "the package was imported"
tokens = load_file(given)["tokens"].to(device)
with torch.no_grad():
    save_file({"logits": model(tokens, **json.loads(options)).logits.cpu().contiguous()}, result)
