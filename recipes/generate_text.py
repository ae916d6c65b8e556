"""Writes a text that a model makes up, to calibrate on: `--calibration wikitext2=3,made-up.txt`.

    python recipes/generate_text.py HuggingFaceTB/SmolLM2-135M --tokens 65536 --output made-up.txt

Documents begin with BOS and are sampled as they come, at temperature 1 from all tokens: what the model holds likely is
what it was trained on, and a pruned model should keep that beside the one text that is at hand. Some generated text
may repeat what the model was trained on. Needs `torch` and `transformers` only; the same seed and machine give the same
text.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="hub id or local folder")
    parser.add_argument("--tokens", type=int, default=65536, help="in all")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a document")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(device).eval()
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    start = torch.full((args.batch_size, 1), begin, device=device)
    lengths = {"max_new_tokens": args.seq_len, "min_new_tokens": args.seq_len, "pad_token_id": begin}
    texts: list[str] = []
    while len(texts) * args.seq_len < args.tokens:
        mask = torch.ones_like(start)
        made = model.generate(
            start, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **lengths
        )
        texts += tokenizer.batch_decode(made, skip_special_tokens=True)
        print(f"{min(args.tokens, len(texts) * args.seq_len):,} of {args.tokens:,} tokens", flush=True)
    args.output.write_text("\n\n".join(texts), encoding="utf-8")


if __name__ == "__main__":
    main()
