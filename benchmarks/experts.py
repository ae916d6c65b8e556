"""Experts that go or get narrower: perplexity of each way at equal parameters, beside REAP, frequency and chance.

    python benchmarks/experts.py tiny-moe --calibration train.txt --texts wiki.test.raw heldout.txt --out experts.jsonl

The model is a mixture of experts, such as `recipes/train_tiny_moe.py` trains. Heads and all else stay; a share of the
experts' weights goes. Calibration is on windows of the first text, drawn anew for each seed; perplexity is of the first
windows of the others, whole texts tokenised once. Rows that are in the file already are not computed again; at the end
means over the seeds are printed.
"""

import argparse
import json
import logging
import statistics
from pathlib import Path
from typing import Any

import torch

from snp_llm import Recipe, checkpoint, prune
from snp_llm.evaluate.perplexity import perplexity

BARE = {"reference": "self", "allocation": "uniform", "metric": "error", "refine": "none"}
STEPS = 200  # of refinement
WHOLE = {"experts": "whole", "refine": "none"}
WAYS: dict[str, dict[str, Any]] = {
    "whole": WHOLE,
    "whole, as many in every block": {**WHOLE, "allocation": "uniform"},
    "whole, not repaired": {"experts": "whole", **BARE},
    "whole, by REAP": {"experts": "whole", "expert_score": "reap", **BARE},
    "whole, by REAP, repaired": {**WHOLE, "expert_score": "reap", "allocation": "uniform"},
    "whole, by frequency": {"experts": "whole", "expert_score": "frequency", **BARE},
    "whole, by chance": {"experts": "whole", "expert_score": "random", **BARE},
    "whole, refined": {"experts": "whole", "refine": STEPS},
    "channels": {"experts": "channels", "refine": "none"},
    "channels, refined": {"experts": "channels", "refine": STEPS},
    "both": {"experts": "both", "refine": "none"},
    "channels, by chance": {"experts": "channels", "ordering": "random", **BARE},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ways", nargs="+", default=[*WAYS])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=200, help="of each text")
    args = parser.parse_args()
    logging.disable(logging.WARNING)

    model, tokenizer = checkpoint.load(args.model, "float32")
    texts = {}
    for file in args.texts:
        ids = tokenizer(file.read_text(encoding="utf-8"), return_tensors="pt")["input_ids"][0]
        texts[file.name] = ids[: len(ids) // args.seq_len * args.seq_len].view(-1, args.seq_len)[: args.windows]

    def measured(found: Any) -> dict[str, float]:
        device = torch.device("cpu")
        return {name: perplexity(found, tokens, batch_size=8, device=device) for name, tokens in texts.items()}

    args.out.touch()
    rows = [json.loads(line) for line in args.out.read_text().splitlines()]
    known = {(row["way"], row["share"], row["seed"]) for row in rows}
    for way, share, seed in [("dense", 0.0, 0)] + [
        (w, s, n) for s in args.shares for n in args.seeds for w in args.ways
    ]:
        if (way, share, seed) in known:
            continue
        found, settings = model, {"parameters": model.num_parameters()}
        if way != "dense":
            recipe = Recipe(
                model=args.model,
                ffn_sparsity=share,
                head_sparsity=0.0,
                calibration=args.calibration,
                num_samples=args.num_samples,
                seq_len=args.seq_len,
                seed=seed,
                **WAYS[way],
            )
            found = prune(model, tokenizer, recipe).model
            settings = {"parameters": found.num_parameters()}
        row = {"way": way, "share": share, "seed": seed, **settings, **measured(found)}
        rows.append(row)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    print_means(rows, [*texts])


def print_means(rows: list[dict[str, Any]], texts: list[str]) -> None:
    """A table in Markdown: perplexities, mean and standard deviation over seeds."""
    print(f"| share | way | parameters | {' | '.join(texts)} |\n|---|---|---|{'---|' * len(texts)}")
    for share, way in dict.fromkeys((row["share"], row["way"]) for row in rows):
        here = [row for row in rows if (row["share"], row["way"]) == (share, way)]
        cells = []
        for text in texts:
            values = [row[text] for row in here]
            cells.append(f"{statistics.mean(values):.2f} ± {statistics.pstdev(values):.2f}")
        print(f"| {share:g} | {way} | {here[0]['parameters']:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
