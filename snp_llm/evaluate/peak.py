"""`python -m snp_llm.evaluate.peak`, run by `bench`: memory of one model in a process of its own. Times nothing."""

import gc
import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from snp_llm import checkpoint
from snp_llm.evaluate.cells import Cell
from snp_llm.evaluate.speed import INPUTS, PASSES, decode
from snp_llm.runtime.device import ran_out
from snp_llm.runtime.errors import SnpError


def main() -> int:
    """Loads a model and runs the cells that stdin lists; the result is the last line on stdout."""
    asked: dict[str, Any] = json.load(sys.stdin)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = torch.device(asked["device"])
    before = resident_peak()
    try:
        model, _ = checkpoint.load(asked["model"], asked["dtype"], trust_remote_code=asked["trust_remote_code"])
        module: nn.Module = model
        module.to(device)
        gc.collect()
        loaded = resident_peak()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for fields in asked["cells"]:
            cell = Cell(**fields)
            given = INPUTS[cell.kind](model, cell, device)
            if cell.kind == "decode":
                decode(model, given, cell.new_tokens, device)
            else:
                PASSES[cell.kind](model, given)
    except SnpError as error:
        print(json.dumps({"error": str(error)}))
        return 0
    except RuntimeError as error:
        if not ran_out(error):
            raise
        print(json.dumps({"error": f"out of memory: {str(error).splitlines()[0]}"}))
        return 0
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    result = {"libraries": before, "loaded": loaded, "host": resident_peak(), "device": on_device}
    print(json.dumps(result))
    return 0


def resident_peak() -> int:
    """Most memory that this process has held, in bytes.

    `getrusage` counts that of the parent in, from before this program took the process over; Linux tells it apart.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    sys.exit(main())
