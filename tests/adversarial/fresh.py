"""Loads models in processes that never import this package: this one imports torch, its forks are quick.

    python -m tests.adversarial.fresh      one folder as JSON a line on stdin, SHA-256 of its logits a line on stdout

Nothing is computed here, so that no thread pool is lost in a fork.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

WINDOWS, LENGTH, LEAST, MOST = 2, 12, 3, 2048  # tokens that every model of these tests has embeddings for


def logits(folder: Path) -> Tensor:
    """What transformers computes of a folder that it finds a model in."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokens = torch.randint(LEAST, MOST, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(tokens).logits.contiguous()


def digest(values: Tensor) -> str:
    return hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()


def serve() -> None:
    for line in sys.stdin:
        if not (child := os.fork()):
            print(digest(logits(Path(json.loads(line)))), flush=True)
            assert "snp_llm" not in sys.modules
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            print("failed", flush=True)


@contextmanager
def loader() -> Iterator[Callable[[Path], str]]:
    """Starts a process that serves, and stops it; called with a folder it gives the digest."""
    root = Path(__file__).parents[2]
    with Popen(
        [sys.executable, "-m", "tests.adversarial.fresh"], stdin=PIPE, stdout=PIPE, text=True, cwd=root
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        stdin, stdout = server.stdin, server.stdout

        def load(folder: Path) -> str:
            print(json.dumps(str(folder)), file=stdin, flush=True)
            return stdout.readline().strip()

        yield load
        stdin.close()


if __name__ == "__main__":
    serve()
