"""Files of finished folders that are read again, by report, push and eval --save, and tables of latencies."""

import json
import math
import random
import shutil

import pytest

from snp_llm.checkpoint import hub
from snp_llm.cli.parse import evaluate_main, prune_main, push_main, report_main
from tests.adversarial.trials import BUNDLED, CHEAP
from tests.adversarial.values import MISSING, changed, damaged, near, places
from tests.conftest import write_table

pytestmark = pytest.mark.exhaustive
REPORTED, PUSHED, SAVED, TABLES = 60, 120, 40, 50
COUNT = REPORTED + PUSHED + SAVED + TABLES
TIMES = {"seconds": 0.1, "low": 0.1, "high": 0.2}
CELL = {
    "cell": {"kind": "prefill", "batch": 8, "length": 16, "new_tokens": 0},
    "dense": {**TIMES, "per_second": 40960.4},
    "pruned": {**TIMES, "per_second": 51200.0},
    "speedup": 1.25,
    "speedup_low": 1.2,
    "speedup_high": 1.3,
    "flops_ratio": 0.75,
    "bytes_ratio": 0.8,
}
SPEEDS = {"device": "cpu", "compile": False, "cells": [CELL], "odd_widths": 3}


@pytest.fixture(scope="module")
def finished(model_of, tmp_path_factory):
    """A folder that prune wrote, with everything that other commands put there later."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    few = ("--num-samples", 2, "--seq-len", 16, *BUNDLED, "--eval-dataset", "bundled", "--quiet", "--round-to", 4)
    assert prune_main([str(word) for word in (model_of("opt"), "--output", folder, "--sparsity", 0.3, *few)]) == 0
    report = json.loads((folder / "prune_report.json").read_text())
    report["tasks"] = {"arc_easy": {"acc": 0.3, "acc_norm": 0.4, "acc_stderr": 0.01}}
    (folder / "prune_report.json").write_text(json.dumps(report))
    (folder / "bench.json").write_text(json.dumps(SPEEDS))
    return folder


def change(generator, file):
    """Changes a JSON file, and says how."""
    if generator.random() < 0.2:
        done, content = damaged(generator, file.read_bytes())
        file.write_bytes(content)
        return f"{file.name} {done}"
    values, done = json.loads(file.read_text()), []
    for _ in range(generator.choice((1, 1, 2))):
        everywhere = [*places(values)]
        near_the_top = [path for path in everywhere if len(path) < 3]
        path = generator.choice(generator.choice((everywhere, near_the_top)) or [("new",)])
        inner = values
        for key in path:
            inner = inner[key] if path != ("new",) else None
        value = near(generator, inner)
        values = changed(values, path, None if value is MISSING and path == ("new",) else value)
        done.append(f"{'.'.join(map(str, path))} = {'missing' if value is MISSING else repr(value)[:60]}")
    file.write_text(json.dumps(values))
    return f"{file.name}: {', '.join(done)}"


def test_pages(finished, trials):
    for seed in range(REPORTED):
        generator = random.Random(seed)
        folder = shutil.copytree(finished, trials.clean() / "out")
        name = generator.choice(("prune_report.json", "prune_report.json", "bench.json", "config.json"))
        done = change(generator, folder / name)
        others = [] if seed % 10 else [shutil.copytree(finished, trials.place / "other")]
        makes = ("out/report.html", "other/report.html")
        trials.run(f"{seed} {done}", report_main, [*others, folder, "--quiet"], makes=(), changes=makes)
    trials.check(REPORTED)


class Nowhere:
    """A hub that takes everything."""

    def __init__(self):
        self.endpoint, self.token = "https://nowhere", None

    def create_repo(self, repo_id, **_):
        return f"{self.endpoint}/{repo_id}"

    def model_info(self, _):
        return type("Info", (), {"private": True, "siblings": []})()

    def create_commit(self, *_, **__):
        return None


def test_uploads(finished, trials, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", Nowhere)
    monkeypatch.setattr(hub, "get_token", lambda: "hf_secret")
    for seed in range(PUSHED):
        generator = random.Random(seed)
        folder = shutil.copytree(finished, trials.clean() / "out")
        way = generator.randrange(8)
        files = sorted(file.name for file in folder.glob("*.json"))
        if way == 0:
            file = folder / generator.choice(sorted(file.name for file in folder.iterdir()))
            file.unlink()
            done = f"no {file.name}"
        elif way == 1:
            name = generator.choice((".secret", "pytorch_model.bin", "notes.txt", "sub/x.json", "a\nb.json", "link"))
            (folder / name).parent.mkdir(exist_ok=True)
            if name == "link":
                (folder / name).symlink_to(generator.choice(("nowhere", "link", "/etc/passwd", "..")))
            else:
                (folder / name).write_text(generator.choice(("{}", "", "{", '{"a": NaN}')))
            done = f"{name!r} more"
        elif way == 2:
            shards = generator.choice(
                ({}, [], {"a": "no.safetensors"}, {"a": 1}, {"a": "../x"}, {"a": "model.safetensors"})
            )
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
            done = f"an index of {shards}"
        else:
            done = change(generator, folder / generator.choice(files))
        trials.run(f"{seed} {done}", push_main, [folder, "user/name", "--quiet"], makes=())
    trials.check(PUSHED)


def test_saved_evaluations(finished, trials):
    for seed in range(SAVED):
        generator = random.Random(seed)
        folder = shutil.copytree(finished, trials.clean() / "out")
        (folder / "report.html").unlink(missing_ok=True)
        done = "nothing" if seed % 5 == 0 else change(generator, folder / "prune_report.json")
        few = ("--dataset", "bundled", "--seq-len", 16, "--max-windows", 1, "--save", "--quiet")
        made = {"makes": ("out/report.html",), "changes": ("out/prune_report.json",)}
        code = trials.run(f"{seed} {done}", evaluate_main, [folder, *few], **made)
        if code == 0:
            entries = json.loads((folder / "prune_report.json").read_text())["perplexities"]
            assert math.isfinite(entries[-1]["perplexity"])
    trials.check(SAVED)


def test_tables(model_of, trials):
    model = model_of("opt")
    budget = ("--target-latency", "0.8x", "--round-to", 4, *BUNDLED, *CHEAP)
    for seed in range(TABLES):
        generator = random.Random(seed)
        file = trials.clean() / "table.json"
        write_table(file, model, ffn_share=0.5)
        done = change(generator, file) if seed % 10 else "one that is there"
        arguments = [model, "--output", trials.place / "out", "--latency-table", file, *budget]
        trials.run(f"{seed} {done}", prune_main, arguments)
    trials.check(TABLES)
