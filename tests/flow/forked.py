"""Runs `snp-llm prune` in processes of its own, for tests that kill them: this one imports torch, its forks are quick.

    python -m tests.flow.forked        one JSON request a line on stdin, one answer a line on stdout

Nothing is computed here, so that no thread pool is lost in a fork. Reloading what was saved in yet another process, and
report.html, are left out: they take longer than all the rest, and there are other tests for them.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any


def serve() -> None:
    import datasets  # noqa: F401 - the forks need it

    from snp_llm.cli import prune
    from tests.quick import with_few_steps, without_page, without_reloading

    without_reloading(setattr)
    without_page(setattr)
    with_few_steps(setattr)
    prune.refuse_what_cannot_fit = lambda *_: None  # or no disk would ever be full
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)


def run(
    arguments: list[str],
    kill_after: float | None = None,
    die_at: tuple[str, int] | None = None,
    die_by: int = signal.SIGKILL,
    die_later: float = 0.0,
    ranks: int = 1,
    doomed: int = 0,
) -> dict[str, Any]:
    """Exit codes of the ranks, what they wrote to stderr, and how long it took.

    Args:
        arguments: of `snp-llm prune`.
        kill_after: seconds until SIGKILL.
        die_at: a phase, and the blocks done in it after which a process kills itself; ("saving", 0) for the beginning
            of that.
        die_by: the signal for that.
        die_later: seconds from then.
        ranks: processes that prune together.
        doomed: the one that is killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start, codes = time.monotonic(), {}
    with tempfile.TemporaryFile("w+") as stderr:
        children = {}
        for rank in range(ranks):
            doom = (die_at if rank == doomed else None, die_by, die_later)
            children[fork(arguments, stderr.fileno(), rank, ranks, port, *doom)] = rank
        while len(codes) < ranks:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child:
                codes[children[child]] = os.waitstatus_to_exitcode(status)
            elif kill_after is not None and time.monotonic() - start > kill_after:
                for child, rank in children.items():
                    if rank == doomed:
                        os.kill(child, signal.SIGKILL)
                kill_after = None
            time.sleep(0.001)
        stderr.seek(0)
        text = stderr.read()
    return {"codes": [codes[rank] for rank in range(ranks)], "stderr": text, "seconds": time.monotonic() - start}


def fork(
    arguments: list[str],
    stderr: int,
    rank: int,
    ranks: int,
    port: int,
    die_at: tuple[str, int] | None,
    die_by: int,
    die_later: float,
) -> int:
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(stderr, 2)
    if ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    from snp_llm import checkpoint
    from snp_llm.checkpoint.journal import Journal
    from snp_llm.cli.parse import prune_main

    if die_at is not None:
        save_state, save = Journal.save_state, checkpoint.save

        def die(place: tuple[str, int]) -> None:
            if place == tuple(die_at) and die_later:
                timer = threading.Timer(die_later, os.kill, (os.getpid(), die_by))
                timer.daemon = True
                timer.start()
            elif place == tuple(die_at):
                os.kill(os.getpid(), die_by)

        def save_state_and_die(journal: Journal, done: int, *rest: Any, **options: Any) -> None:
            save_state(journal, done, *rest, **options)
            die((journal.folder.name, done))

        def die_and_save(*rest: Any, **options: Any) -> None:
            die(("saving", 0))
            save(*rest, **options)

        Journal.save_state, checkpoint.save = save_state_and_die, die_and_save
    code = prune_main(arguments)
    sys.stderr.flush()
    os._exit(code)


class Runner:
    """The other end of `serve`."""

    def __init__(self, process: Popen[str]) -> None:
        self.process = process

    def __call__(self, *arguments: str | Path, **options: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"arguments": [*map(str, arguments)], **options}), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


@contextmanager
def runner() -> Iterator[Runner]:
    """Starts a process that serves, and stops it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "tests.flow.forked"]
    root = Path(__file__).parents[2]
    with Popen(command, stdin=PIPE, stdout=PIPE, text=True, cwd=root, env=environment) as process:
        yield Runner(process)
        assert process.stdin is not None
        process.stdin.close()


if __name__ == "__main__":
    serve()
