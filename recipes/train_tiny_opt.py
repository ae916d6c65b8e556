"""Trains the bundled model `tiny-opt`: tokenizer, weights and both config files.

    python recipes/train_tiny_opt.py --corpus train.txt.gz --output snp_llm/bundled/tiny-opt

The corpus is any English text, documents separated by `<|doc|>`; the bundled weights were trained on 28 MB of prose
(not redistributed) and, repeated ten times, the bundled calibration text, so that the demo's domain is not foreign.
The evaluation text was never seen. 2,400 steps of 24 x 256 tokens take about half an hour on two CPU cores with bf16
instructions; seed and step count make the run repeatable on one machine. Needs `torch` and `transformers` only.
"""

import argparse
import gzip
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

BUNDLED = Path(__file__).parent.parent / "snp_llm" / "bundled"
VOCABULARY, POSITIONS = 2048, 256


def read_documents(corpus: Path) -> list[str]:
    opener = gzip.open if corpus.suffix == ".gz" else open
    with opener(corpus, "rt", encoding="utf-8") as file:
        documents = file.read().split("<|doc|>")
    calibration = (BUNDLED / "calibration.txt").read_text(encoding="utf-8")
    return [d.strip() for d in documents if d.strip()] + [calibration] * 10


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with OPT's conventions: ids <s> 0, <pad> 1, </s> 2, <unk> 3; every text starts with </s>."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A $B", special_tokens=[("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        model_max_length=POSITIONS,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=BUNDLED / "tiny-opt")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    documents = read_documents(args.corpus)
    tokenizer = train_tokenizer(documents)
    streams = [torch.tensor(ids) for ids in tokenizer(documents)["input_ids"]]
    tokens = torch.cat(streams)
    print(f"{len(documents):,} documents, {len(tokens):,} tokens", flush=True)

    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        word_embed_proj_dim=128,
        num_hidden_layers=5,
        num_attention_heads=8,
        ffn_dim=512,
        max_position_embeddings=POSITIONS,
        dropout=0.0,
        attention_dropout=0.0,
    )
    model = OPTForCausalLM(config).train()
    print(f"{model.num_parameters():,} parameters", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.05)
    warmup = args.steps // 20

    def rate(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (args.steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    start, running = time.time(), 0.0
    for step in range(args.steps):
        offsets = torch.randint(len(tokens) - POSITIONS, (args.batch,))
        batch = torch.stack([tokens[o : o + POSITIONS] for o in offsets])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {running:.3f}, {time.time() - start:.0f} s", flush=True)

    model.eval().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
