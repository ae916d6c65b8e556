"""`report.html`: made by prune and by report, from new and old reports, safe, and shown by a real browser."""

import json
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from unittest import mock

import pytest

from snp_llm.checkpoint.contents import PAGE, REPORT
from snp_llm.cli.main import main
from snp_llm.cli.parse import prune_main
from snp_llm.cli.report import write_page
from snp_llm.models.size import model_size
from snp_llm.pruning.pipeline import prune
from snp_llm.report import compare, page, read
from snp_llm.report.facts import Measured, build_report, write_report
from snp_llm.runtime.errors import SnpError
from tests.browser import CHROMIUM, start_browser
from tests.conftest import save_model, small_opt, small_recipe
from tests.quick import without_reloading

QUICK = ["--calibration", "bundled", "--eval-dataset", "bundled", "--num-samples", "4", "--seq-len", "32"]
VOID = {"meta", "link", "br", "img", "input", "hr"}
NEWER = ("curve", "heads", "predicted_loss", "predicted_error", "reference_weight", "dampening", "seconds")


class Reader(HTMLParser):
    """Tags with their attributes, the text, and whether every element is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer):
    """Two prunings of one model: one by the command line, whose page failed, one by hand."""
    folder = tmp_path_factory.mktemp("runs")
    dense = save_model(small_opt(), tokenizer, folder / "small-opt")
    options = ["--sparsity", "0.2", "--output", str(folder / "pruned-0.2"), "--round-to", "4", *QUICK]
    with pytest.MonkeyPatch.context() as patch:
        without_reloading(patch.setattr)
        patch.setattr(page, "make_page", mock.Mock(side_effect=RuntimeError("no fonts\nat all")))
        assert prune_main([str(dense), *options]) == 0
    assert (folder / "pruned-0.2/model.safetensors").exists() and not (folder / "pruned-0.2" / PAGE).exists()

    report_02 = json.loads((folder / "pruned-0.2" / REPORT).read_text())
    known = report_02["dense"]["perplexity"]
    pruned = prune(small_opt(), tokenizer, small_recipe(model=str(dense), sparsity=0.4, round_to=4, num_samples=4))
    sizes = [model_size(model, 32) for model in (small_opt(), pruned.model)]
    figures = [
        Measured(size, size.bytes, *more) for size, more in zip(sizes, ((known, 9.0), (1.1 * known, 11.0)), strict=True)
    ]
    (folder / "pruned-0.4").mkdir()
    facts = {"evaluation": report_02["evaluation"], "command": "snp-llm prune"}
    write_report(build_report(pruned, *figures, facts), folder / "pruned-0.4")
    found = [folder / "pruned-0.2", folder / "pruned-0.4"]
    for run in found:
        page.write_page(run)
    return found


def copy_of(run, tmp_path, change=lambda report: None, name="copy"):
    """A folder with the report alone, changed."""
    report = json.loads((run / REPORT).read_text())
    change(report)
    (tmp_path / name).mkdir()
    (tmp_path / name / REPORT).write_text(json.dumps(report))
    return tmp_path / name


def test_the_page_says_what_was_done(runs):
    text = (runs[0] / PAGE).read_text()
    reader, report = Reader(text), json.loads((runs[0] / REPORT).read_text())
    assert "small-opt, " in reader.text and f"{report['pruned']['size']['parameters']:,}" in reader.text
    assert report["calibration"]["sha256"] in reader.text and "trust_remote_code=True" in reader.text
    for words in ("--sparsity", "factorisation", "What these numbers do not say", "torch", report["evaluation"]):
        assert words in reader.text, words
    pictures = reader.of("svg")
    assert len(pictures) >= 10 and all(len(svg["aria-label"]) > 20 for svg in pictures)
    assert len({i for _, a in reader.tags if (i := a.get("id"))}) == len([a for _, a in reader.tags if a.get("id")])
    assert all("scope" in attributes for attributes in reader.of("th"))
    assert PAGE in (runs[0] / "README.md").read_text()


def test_the_page_can_neither_fetch_nor_run_anything(runs):
    reader = Reader((runs[0] / PAGE).read_text())
    (policy,) = [m["content"] for m in reader.of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert not {"script", "iframe", "img", "link", "object", "embed", "image", "form"} & {tag for tag, _ in reader.tags}
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "src"]
        for name in ("href", "xlink:href"):
            assert tag == "a" or attributes.get(name, "#").startswith("#")
    assert not re.search(r"@import|@font-face|url\((?!#)", (runs[0] / PAGE).read_text())


def test_curves_are_the_factorisations(runs):
    report = json.loads((runs[1] / REPORT).read_text())
    curves = [(site, site["curve"]) for site in report["sites"] if site["curve"]]
    assert curves
    for site, curve in curves:
        size = 8 if site["kind"] == "attention" else 1
        assert curve["cut"] == size * site["units_after"] and curve["cut"] in curve["channels"]
        assert curve["channels"][0] == 1 and curve["channels"][-1] == size * site["units_before"]
        assert len(curve["channels"]) <= 129 and len({len(curve[k]) for k in curve if k != "cut"}) == 1
        assert curve["error"] == sorted(curve["error"], reverse=True) and curve["error"][-1] == 0
        assert curve["spectrum"] == sorted(curve["spectrum"], reverse=True)
        assert sorted(curve["variance"], reverse=True) == curve["spectrum"]  # so few channels are all there
        at = curve["error"][curve["channels"].index(curve["cut"])]
        assert at == pytest.approx(site["predicted_error"], rel=1e-3, abs=1e-12)


def test_untrusted_text_stays_text(runs, tmp_path):
    evil = "<script>alert('1')</script>\"><img src=http://x.example/y onerror=alert(2)>"

    def poison(report):
        report["recipe"]["model"] = "a/" + evil.replace("/", "")
        report["command"] = report["evaluation"] = report["device"] = report["calibration"]["text"] = evil
        report["versions"][evil] = evil
        report["tasks"] = {evil: [{evil: evil}]}
        for site in report["sites"]:
            site["site"] += evil
            site["unit"] = evil + "$\\frac{$ \ud800 \x01"

    folder = copy_of(runs[0], tmp_path, poison)
    (folder / "bench.json").write_text(json.dumps({evil: [evil], "rows": [{evil: 1.5}]}))
    text = page.write_page(folder).read_text()
    reader = Reader(text)
    assert not {"script", "img"} & {tag for tag, _ in reader.tags} and "<script" not in text
    assert evil in reader.text
    assert not [a for _, a in reader.tags if any(name.startswith("on") for name in a)]


def test_reports_of_older_versions_make_a_page(runs, tmp_path):
    def age(report):
        for key in ("predicted_perplexity_ratio", "trials", "command", "evaluation", "device", "versions"):
            report.pop(key, None)
        for site in report["sites"]:
            for key in NEWER:
                site.pop(key, None)

    reader = Reader(page.write_page(copy_of(runs[0], tmp_path, age)).read_text())
    assert "holds no curves" in reader.text and "kept no predictions" in reader.text
    assert "does not hold the command" in reader.text and len(reader.of("svg")) == 2


def test_what_was_not_measured_is_said(runs, tmp_path):
    def forget(report):
        for model in ("dense", "pruned"):
            report[model]["perplexity"] = report[model]["speed"] = None
        report["sparsity"]["target"] = 0.9
        report["trials"] = [{"sparsity": 0.45, "perplexity_rise": 0.0123}]
        report["recipe"] |= {"layout": "padded", "target_params": "0.7x"}

    text = Reader(page.write_page(copy_of(runs[0], tmp_path, forget)).read_text()).text
    assert "Perplexity was not measured." in text and "Speed was not measured." in text
    assert "90 % were asked for" in text and "speed not measured" in text
    for words in ("+1.23 %", "saves nothing", "--target-params 0.7x asked for"):
        assert words in text, words


def test_measurements_of_other_commands_are_shown(runs, tmp_path):
    folder = copy_of(runs[0], tmp_path, lambda report: report.update(tasks={"arc": {"acc": 0.25}}))
    rows = [{"phase": "prefill", "batch": 1, "speed": {"dense": 10.0, "pruned": 12.5}}]
    (folder / "bench.json").write_text(json.dumps({"device": "cpu", "rows": rows}))
    text = Reader(page.write_page(folder).read_text()).text
    for words in ("Measured speed", "speed, pruned", "12.5", "Tasks", "arc, acc", "0.25"):
        assert words in text
    assert "Generation, larger batches" not in text and "none of which was measured" not in text


def test_the_benchmark_is_a_table(runs, tmp_path):
    folder = copy_of(runs[0], tmp_path)
    times = {"seconds": 0.1, "low": 0.1, "high": 0.2}
    cell = {
        "cell": {"kind": "prefill", "batch": 8, "length": 512, "new_tokens": 0},
        "dense": {**times, "per_second": 40960.4},
        "pruned": {**times, "per_second": 51200.0},
        "speedup": 1.25,
        "speedup_low": 1.2,
        "speedup_high": 1.3,
        "flops_ratio": 0.75,
        "bytes_ratio": 0.8,
    }
    bench = {"device": "cpu", "compile": False, "cells": [cell], "odd_widths": 3}
    (folder / "bench.json").write_text(json.dumps(bench))
    text = Reader(page.write_page(folder).read_text()).text
    for words in (
        "prefill, 8 \N{MULTIPLICATION SIGN} 512",
        "40,960",
        "51,200",
        "1.25",
        "1.20 to 1.30",
        "0.750",
        "odd widths",
        "device",
    ):
        assert words in text, words
    del cell["dense"]
    (folder / "bench.json").write_text(json.dumps(bench))
    with pytest.raises(SnpError, match="be understood"):
        page.write_page(folder)


def test_several_runs_are_compared(runs, capsys):
    before = {f: f.stat().st_mtime_ns for run in runs for f in run.iterdir() if f.name != PAGE}
    assert main_of("report", *map(str, runs)) == 0
    assert capsys.readouterr().out.split() == [str(run / PAGE) for run in runs]
    for run in runs:
        reader = Reader((run / PAGE).read_text())
        assert "Perplexity against sparsity" in reader.text and "Perplexity against speed" in reader.text
        assert all(other.name in reader.text for other in runs) and "own run is in bold" in reader.text
    assert before == {f: f.stat().st_mtime_ns for f in before}
    assert not [file for run in runs for file in run.iterdir() if file.name.startswith(".")]


def test_methods_are_lines_of_their_own(runs, tmp_path):
    other = copy_of(runs[1], tmp_path, lambda report: report["recipe"].update(allocation="uniform"))
    text = page.make_page(read.read_run(runs[0]), [read.read_run(other)])
    assert "allocation uniform" in text and "allocation loss" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"resume": True, "save_every": 0.0, "overwrite": True, "output": "elsewhere", "push_to_hub": "ada/small"},
        {"device": "cuda", "hidden_device": "disk", "batch_size": 1, "model": "elsewhere/small-opt"},
        {"sparsity": None, "target_latency": "0.7x", "latency_table": "times.json", "eval_split": "validation"},
    ],
)
def test_how_a_run_went_is_no_method_of_its_own(changes, runs, tmp_path):
    other = copy_of(runs[1], tmp_path, lambda report: report["recipe"].update(changes))
    reports = [json.loads((run / REPORT).read_text()) for run in (runs[1], other)]
    assert compare._methods(reports) == ["", ""]


def test_steps_that_follow_from_the_sparsity_are_no_method_of_their_own(runs, tmp_path):
    def reports(*settings):
        base = json.loads((runs[1] / REPORT).read_text())
        return [{**base, "recipe": {**base["recipe"], "sparsity": s, "refine": steps}} for s, steps in settings]

    assert compare._methods(reports((0.2, 50), (0.3, 54))) == ["", ""]
    assert compare._methods(reports((0.2, 50), (0.3, "none"))) == ["refine some", "refine none"]
    assert compare._methods(reports((0.2, 50), (0.2, 400))) == ["refine 50", "refine 400"]


def test_runs_that_cannot_be_compared_are_refused(runs, tmp_path):
    other = copy_of(runs[1], tmp_path, lambda report: report.update(evaluation="another text"))
    with pytest.raises(SnpError, match="expected the evaluation text of pruned-0.2, bundled .*; got another text"):
        page.write_page(runs[0], [other])
    other = copy_of(runs[1], tmp_path, lambda r: r["dense"]["size"].update(parameters=1), name="smaller")
    with pytest.raises(SnpError, match="expected the dense model of pruned-0.2"):
        page.write_page(runs[0], [other])
    other = copy_of(runs[1], tmp_path, lambda report: report["dense"].update(perplexity=3.0), name="other-windows")
    with pytest.raises(SnpError, match="expected the dense model's perplexity of pruned-0.2, .*; got 3"):
        page.write_page(runs[0], [other])


def test_bad_folders_are_one_line(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / REPORT).write_text("{")
    lacking = copy_of(runs[0], tmp_path, lambda report: report.pop("sites"), name="lacking")
    odd = copy_of(runs[0], tmp_path, lambda report: report.update(versions=["1"]), name="odd")
    strange = copy_of(runs[0], tmp_path, lambda report: report.update(sites=[1]), name="strange")
    for arguments, message in (
        ([], "expected at least one folder"),
        ([tmp_path / "empty"], "found no prune_report.json"),
        ([tmp_path / "nowhere"], "found no prune_report.json"),
        ([tmp_path / "broken"], "cannot be read"),
        ([lacking], "'sites' is missing"),
        ([strange], "be understood"),
        ([odd], "be understood"),
    ):
        assert main_of("report", *map(str, arguments)) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "empty" / PAGE).exists()
    whole = copy_of(runs[0], tmp_path, name="whole")
    before = sorted(whole.iterdir())
    assert main_of("report", str(whole), str(strange)) == 2  # no page is written where one of them fails
    assert sorted(whole.iterdir()) == before and not (strange / PAGE).exists()


@pytest.mark.parametrize("failure", [RuntimeError("no fonts\nat all"), SnpError("odd"), OSError(28, "disk full")])
def test_a_failed_page_is_a_warning(failure, runs, tmp_path, caplog):
    folder = copy_of(runs[0], tmp_path)
    with mock.patch.object(page, "make_page", side_effect=failure):
        write_page(folder)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "\n" not in record.message
    assert record.message.startswith(f"{folder} is complete but for {PAGE} (")
    assert record.message.endswith(f"later: snp-llm report {folder}")
    write_page(folder)
    assert (folder / PAGE).exists()


def test_an_interrupt_during_the_page_says_that_the_model_is_there(runs, tmp_path):
    folder = copy_of(runs[0], tmp_path)
    with (
        mock.patch.object(page, "make_page", side_effect=KeyboardInterrupt),
        pytest.raises(SnpError, match=f"interrupted; {folder} is complete but for"),
    ):
        write_page(folder)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_it_in_both_themes_and_on_a_phone(runs, tmp_path):
    shots = os.environ.get("SNP_LLM_SHOTS")  # a folder to look at them in
    text_height = "Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"
    sizes = "[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect()).map(r => [r.width, r.height])"
    # Text of a figure that sticks out of it is cut off.
    cut_off = """[...document.querySelectorAll('svg')].flatMap(svg => {
        const all = svg.getBoundingClientRect();
        return [...svg.querySelectorAll('text')].filter(t => {
            const r = t.getBoundingClientRect();
            return r.left < all.left - 1 || r.right > all.right + 1 || r.top < all.top - 1 || r.bottom > all.bottom + 1;
        }).map(t => t.textContent);
    })"""
    page.write_page(runs[1], [runs[0]])
    inks = set()
    with start_browser(tmp_path / "profile") as browser:
        for width, theme in ((1200, "light"), (1200, "dark"), (390, "light"), (390, "dark")):
            browser.open(runs[1] / PAGE, width=width, theme=theme)
            assert browser.fetched() == [(runs[1] / PAGE).as_uri()] and browser.complaints() == []
            found = browser.evaluate(sizes)
            assert len(found) >= 12 and all(w > 280 and h > 150 for w, h in found)
            assert browser.evaluate("document.documentElement.scrollWidth") == width
            assert browser.evaluate(text_height) > 9 and browser.evaluate(cut_off) == []
            style = "getComputedStyle(document.querySelector('svg text')).fill"
            inks.add((theme, browser.evaluate(style)))
            browser.photograph(tmp_path / f"{width}-{theme}.png")
            assert (tmp_path / f"{width}-{theme}.png").read_bytes()[:4] == b"\x89PNG"
            if shots:
                browser.photograph(Path(shots) / f"{width}-{theme}.png")
    assert len(inks) == 2  # dark ink on light, light ink on dark


def main_of(*arguments):
    with mock.patch.object(sys, "argv", ["snp-llm", *arguments]):
        return main()
