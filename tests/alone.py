"""Processes that this package is not imported in, for tests of what it leaves behind: forks of one that has imported
torch and transformers, which takes longer than all that the tests do there.

    python tests/alone.py        one JSON request a line on stdin, one answer a line on stdout
"""

import io
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen
from types import SimpleNamespace
from typing import Any

# Logits of every model in a folder, on the tokens that are there, beside each.
RELOAD = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
tokens = torch.load(sys.argv[1] + "/tokens.pt")
for folder in sorted(Path(sys.argv[1]).iterdir()):
    if folder.is_dir():
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        torch.save(model(tokens).logits.detach(), folder / "logits.pt")
assert "snp_llm" not in sys.modules
"""


def serve() -> None:
    from transformers import AutoModelForCausalLM, Trainer  # noqa: F401 - the forks need them

    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)


def run(code: str, arguments: list[str], cwd: str, given: str) -> dict[str, Any]:
    """Exit code, stdout and stderr of a program's text in a fork, with what it is given on stdin."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        child = os.fork()
        if not child:
            sys.stdin = io.StringIO(given)
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            os._exit(execute(code, arguments, cwd))
        status = os.waitpid(child, 0)[1]
        stdout.seek(0)
        stderr.seek(0)
        return {"returncode": os.waitstatus_to_exitcode(status), "stdout": stdout.read(), "stderr": stderr.read()}


def execute(code: str, arguments: list[str], cwd: str) -> int:
    from transformers import dynamic_module_utils

    os.chdir(cwd)
    with tempfile.TemporaryDirectory() as modules:  # where no code of earlier models is
        dynamic_module_utils.HF_MODULES_CACHE = modules
        sys.argv = ["-c", *arguments]
        try:
            exec(compile(code, "-c", "exec"), {"__name__": "__main__"})
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
            return 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    return 0


class Alone:
    """The other end of `serve`."""

    def __init__(self, process: "Popen[str]") -> None:
        self.process = process

    def __call__(
        self, code: str, *arguments: str | Path, cwd: str | Path = ".", given: str = ""
    ) -> "CompletedProcess[str]":
        """A program's text run with arguments in a folder, and what it is given on stdin."""
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {"code": code, "arguments": [*map(str, arguments)], "cwd": str(Path(cwd).absolute()), "given": given}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return CompletedProcess([], **json.loads(self.process.stdout.readline()))


class Fork:
    """A fork in place of the process that `checkpoint.fresh_process` starts; it runs when it is waited for."""

    def __init__(self, alone: Callable[[], Alone], command: list[str], *, cwd: Path, **_pipes: Any) -> None:
        self.alone, self.command, self.cwd = alone, command[2:], cwd
        self.stdin = SimpleNamespace(write=self.take, close=lambda: None)
        self.given = ""

    def take(self, text: str) -> None:
        self.given += text

    def wait(self) -> int:
        done = self.alone()(*self.command, cwd=self.cwd, given=self.given)
        (self.cwd / "stderr").write_text(done.stderr)
        return done.returncode

    def kill(self) -> None:
        pass

    def communicate(self) -> None:
        pass


@contextmanager
def processes() -> Iterator[Alone]:
    """Starts a process that serves, and stops it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with Popen([sys.executable, __file__], stdin=PIPE, stdout=PIPE, text=True, env=environment) as process:
        yield Alone(process)
        assert process.stdin is not None
        process.stdin.close()


if __name__ == "__main__":
    serve()
