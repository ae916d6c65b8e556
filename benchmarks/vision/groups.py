"""One group of a ResNet's layers pruned at a time: what each can lose, with all others as they were.

    python benchmarks/vision/groups.py resnet-fmnist --calibration train.parquet --evaluation test.parquet

Groups are the stages, the inner widths of all blocks, and the streams between them. In each the same share of channels
goes everywhere. Top-1 as it comes out of the cut, and with the statistics of all batch norms estimated again.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from unittest import mock

import transformers
from compare import METHODS, estimate_again, pruned_by

from snp_llm import checkpoint
from snp_llm.data.images import calibration_images, labelled_batches
from snp_llm.data.pictures import Pictures
from snp_llm.evaluate.accuracy import accuracy
from snp_llm.evaluate.material import form_of
from snp_llm.models.anatomy import Anatomy, find_anatomy
from snp_llm.models.segments import Segments
from snp_llm.models.site import Site
from snp_llm.models.size import model_size
from snp_llm.pruning.widths import plan
from snp_llm.recipe.recipe import Recipe

STEP = 8  # channels, in multiples of which a group goes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--share", type=float, default=0.5, help="of a group's channels that goes")
    parser.add_argument("--methods", default="ours,zca uniform,SAW")
    parser.add_argument("--groups", help="those of them, with commas; all where not said")
    parser.add_argument("--num-samples", type=int, default=256)
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("snp_llm").setLevel(logging.ERROR)
    model, processor = checkpoint.load(args.model, "auto")
    form, before = form_of(model.config, processor, model.dtype), model_size(model, 1)
    test = list(labelled_batches(form, Pictures(args.evaluation), batch_size=250)[0])
    images = calibration_images(form, Pictures(args.calibration), num_samples=args.num_samples, seed=0).tokens
    names = args.methods.split(",")
    print(f"| {100 * args.share:g} % of | weights gone | FLOPs gone | {' | '.join(f'{n} | +BN' for n in names)} |")
    print("|---|" + "---:|" * (2 + 2 * len(names)), flush=True)
    anatomy = find_anatomy(model)
    for group in args.groups.split(",") if args.groups else ("all", "inner", "streams", *stages(anatomy)):
        widths = [width(site, args.share if group in groups_of(anatomy, site) else 0.0) for site in anatomy.sites]
        row, size = [], before
        for name in names:
            settings = {**METHODS[name].settings, "absorb_bias": METHODS[name].shifted}
            recipe = Recipe(args.model, calibration=args.calibration, num_samples=args.num_samples, **settings)
            with mock.patch.object(plan, "coupled_plan", lambda *_, widths=widths: widths):
                pruned, again = pruned_by(METHODS[name], model, processor, recipe)
            size = model_size(pruned, 1)
            row.append(f"{accuracy([pruned], test)[0].top1:.2f}")
            estimate_again(again, images)
            row.append(f"{accuracy([again], test)[0].top1:.2f}")
        gone = (1 - size.block_linear / before.block_linear, 1 - size.flops / before.flops)
        print(f"| {group} | {' | '.join(f'{100 * g:.1f} %' for g in gone)} | {' | '.join(row)} |", flush=True)
    return 0


def stages(anatomy: Anatomy) -> list[str]:
    """Names of the stages, with their streams."""
    return list(dict.fromkeys(g for site in anatomy.sites for g in groups_of(anatomy, site) if g.startswith("stage")))


def groups_of(anatomy: Anatomy, site: Site) -> tuple[str, ...]:
    """Groups that a site is in: a stream belongs to the stage that puts it out."""
    assert isinstance(anatomy.blocks, Segments)
    if site.shared is not None:
        return ("all", "streams", site.shared.name)
    prefix = anatomy.blocks.prefixes[site.block]
    return ("all", "inner", f"stage {int(prefix.split('.')[3]) + 1}") if ".stages." in prefix else ("all", "inner")


def width(site: Site, share: float) -> int:
    """Units that are left of a site."""
    return max(STEP, round((1 - share) * site.units / STEP) * STEP) if share else site.units


if __name__ == "__main__":
    sys.exit(main())
