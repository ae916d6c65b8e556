"""Trains a small Qwen3-MoE, `tiny-moe`, to measure the cutting of experts on; its weights are not redistributed.

    python recipes/train_tiny_moe.py --corpus train.txt.gz --tokenizer models/opt-7m --output tiny-moe --minutes 50

The corpus is any English text, documents separated by `<|doc|>`; the tokenizer comes from any folder that has one. Four
blocks of width 256 with 16 experts of 192 channels, two of them at work for a token: 12 million parameters, of which
one core learns from a few million tokens in an hour. That is little: with `--embeddings MODEL` it starts from those of
a model of the same width and tokenizer, and learns the rest alone. The learning rate follows the clock, so that the
time given is the time taken; the model so far is saved every few minutes. Needs `torch` and `transformers` only.
"""

import argparse
import gzip
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

WINDOW = 256


def read_tokens(corpus: Path, tokenizer) -> torch.Tensor:
    """All documents as one stream of token ids, int64, each document begun as the tokenizer begins a text."""
    opener = gzip.open if corpus.suffix == ".gz" else open
    with opener(corpus, "rt", encoding="utf-8") as file:
        documents = [text for document in file.read().split("<|doc|>") if (text := document.strip())]
    return torch.tensor([token for ids in tokenizer(documents)["input_ids"] for token in ids])


def build(vocabulary: int) -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=vocabulary,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            num_experts=16,
            num_experts_per_tok=2,
            moe_intermediate_size=192,
            intermediate_size=256,
            norm_topk_prob=True,
            output_router_logits=True,
            router_aux_loss_coef=0.01,
            max_position_embeddings=512,
            tie_word_embeddings=True,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--embeddings", help="folder of a model whose embeddings are taken")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokens = read_tokens(args.corpus, tokenizer)
    model = build(len(tokenizer)).train()
    if args.embeddings is not None:
        known = AutoModelForCausalLM.from_pretrained(args.embeddings).get_input_embeddings()
        model.get_input_embeddings().load_state_dict(known.state_dict())
    print(f"{len(tokens):,} tokens, {model.num_parameters():,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.05)

    def save() -> None:
        model.config.output_router_logits = False  # the loss of evenly chosen experts is of no use after training
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
        model.config.output_router_logits = True

    start = saved = time.time()
    step, running = 0, 0.0
    while (spent := (time.time() - start) / (60 * args.minutes)) < 1:
        rate = args.rate * min((step + 1) / 100, 1.0) * max(1 - spent, 0.02)
        for group in optimizer.param_groups:
            group["lr"] = rate
        offsets = torch.randint(len(tokens) - WINDOW, (args.batch,))
        batch = torch.stack([tokens[o : o + WINDOW] for o in offsets])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        step += 1
        if step % 100 == 0:
            print(f"step {step}: loss {running:.3f}, {time.time() - start:.0f} s", flush=True)
        if time.time() - saved > 240:
            save()
            saved = time.time()
    save()


if __name__ == "__main__":
    main()
