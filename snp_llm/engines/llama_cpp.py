"""What llama.cpp says with a GGUF file, beside what torch says with the model that it was made of."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from snp_llm.engines.extras import needed

PACKAGE = "xllamacpp"

# Words, digits, accents, scripts and signs, so that another tokenizer would show.
SAID = "Prune first, then serve:\n\n\tdef f(x): return x ** 2  # 3.14159, naïve café, 東京, 🙂's and we'll see\n"


@torch.no_grad()
def difference(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> float:
    """The largest difference of a log-probability of the next token, over the largest logit: after tokens, and after a
    text that llama.cpp cuts into tokens itself.

    Its server gives no logits; log-probabilities of all tokens are the same up to a constant.

    Args:
        model: that the file was made of.
        tokenizer: its.
        path: of the file.
    """
    llama = needed(PACKAGE, "gguf")
    ids = tokenizer(SAID)["input_ids"]
    parameters = llama.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.n_gpu_layers = len(ids) + 8, 1, 0
    parameters.cache_type_k = parameters.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    # Which would round to float16.
    parameters.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.verbosity, parameters.warmup = -1, False
    server = llama.Server(parameters)
    worst = 0.0
    for prompt, tokens in ((ids[: len(ids) // 2], ids[: len(ids) // 2]), (SAID, ids)):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].double()
        asked = {"prompt": prompt, "n_predict": 1, "n_probs": len(logits), "cache_prompt": False, "ignore_eos": True}
        answer = server.handle_completions(asked)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        found = torch.full_like(logits, float("nan"))
        for entry in answer:
            found[entry["id"]] = entry["logprob"]
        known = ~found.isnan()  # what the vocabulary is padded with it leaves out
        apart = (logits.log_softmax(0) - found)[known].abs().max() / logits.abs().max()
        worst = max(worst, float(apart) if len(answer) >= len(tokenizer) else float("inf"))
    return worst
