"""Where BOS stands in the windows that a model is calibrated and measured on."""

import hashlib
import json
import math

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from snp_llm import SnpError, load_recipe, prune
from snp_llm.cli.parse import evaluate_main, prune_main
from snp_llm.data.sources import BUNDLED, Dataset
from snp_llm.data.windows import calibration_windows, evaluation_text, evaluation_windows, split_windows
from snp_llm.evaluate.perplexity import Sliding, perplexity, strided_perplexity
from snp_llm.models.text import resolve_bos
from snp_llm.pruning.identity import identity
from tests.conftest import save_model, small_model, small_opt, small_recipe
from tests.entry.test_cli import QUICK, refuse
from tests.families import every_family

BOS = 0
GEMMAS = ["gemma", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text", "vaultgemma"]


def make_tokenizer(kind):
    """The bundled one with a BOS of its own that it "adds" or only "has", or with "none"."""
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "tiny-opt", bos_token=None if kind == "none" else "<s>")
    single = "<s> $A" if kind == "adds" else "$A"
    special = [("<s>", BOS)] if kind == "adds" else []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"The sentence number {i} has a tail of {i * 7} words or so." for i in range(60)))
    return path


def expected_windows(tokenizer, kind, bos, text, length):
    """In plain Python: the ids of the text itself, what stands before them, and how they are cut."""
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    if bos == "always":
        room = length - 1
        return [[BOS, *ids[at : at + room]] for at in range(0, len(ids) - room + 1, room)]
    if bos == "once" and kind == "adds":
        ids = [BOS, *ids]
    return [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]


@pytest.mark.parametrize("bos", ["always", "once", "never"])
@pytest.mark.parametrize("kind", ["adds", "has", "none"])
def test_windows_are_what_the_text_and_bos_make_by_hand(kind, bos, text):
    tokenizer = make_tokenizer(kind)
    shared = {"seq_len": 16, "bos": bos}

    def all_of_them():
        return (
            evaluation_windows(tokenizer, Dataset(str(text)), **shared),
            calibration_windows(tokenizer, Dataset(str(text)), num_samples=10_000, seed=0, **shared),
        )

    if kind == "none" and bos == "always":
        with pytest.raises(SnpError, match="--bos always: expected a tokenizer with a BOS token.* Use --bos once"):
            all_of_them()
        return
    expected = expected_windows(tokenizer, kind, bos, text, 16)
    evaluation, calibration = all_of_them()
    assert evaluation.tokens.tolist() == expected
    assert sorted(calibration.tokens.tolist()) == sorted(expected)
    for windows in (evaluation, calibration):
        assert windows.digest == hashlib.sha256(windows.tokens.numpy().tobytes()).hexdigest()
        said = windows.description.partition(f"{len(expected)} windows of 16 tokens")[2].partition(" (")[0]
        assert said == {"always": ", each after BOS", "once": "", "never": ", without BOS"}[bos]


def test_a_text_that_spells_bos_out_at_its_start_does_not_double_it(text):
    tokenizer = make_tokenizer("adds")
    text.write_text("<s>" + text.read_text())
    always = evaluation_windows(tokenizer, Dataset(str(text)), seq_len=16, bos="always")
    assert (always.tokens == BOS).sum(dim=1).tolist() == [1] * len(always.tokens)
    never = evaluation_windows(tokenizer, Dataset(str(text)), seq_len=16, bos="never")
    assert not (never.tokens == BOS).any()


def test_random_ids_follow_bos_too():
    tokenizer = make_tokenizer("adds")
    draw = {"num_samples": 30, "seq_len": 12, "seed": 3}
    always, once, never = (
        calibration_windows(tokenizer, Dataset("random"), bos=bos, **draw) for bos in ("always", "once", "never")
    )
    assert always.tokens.shape == once.tokens.shape == (30, 12) and torch.equal(once.tokens, never.tokens)
    assert (always.tokens[:, 0] == BOS).all() and not (always.tokens[:, 1:] == BOS).any()
    assert not (once.tokens == BOS).any()


@every_family()
def test_auto_is_before_every_window_for_gemma_and_as_in_published_numbers_for_all_others(model_type):
    model = small_model(model_type)
    assert resolve_bos("auto", model, make_tokenizer("adds")) == ("always" if model_type in GEMMAS else "once")
    for kind in ("has", "none"):  # as the tokenizer does
        assert resolve_bos("auto", model, make_tokenizer(kind)) == "once"
    for bos in ("always", "once", "never"):
        assert resolve_bos(bos, model, make_tokenizer("adds")) == bos


def test_the_protocol_of_published_opt_perplexities_is_unchanged(text, tokenizer, tmp_path, capsys):
    """One tokenisation of the whole text, cut as it is; OPT's tokenizer begins it with </s>."""
    folder = save_model(small_opt(), tokenizer, tmp_path / "opt")
    assert evaluate_main([str(folder), "--dataset", str(text), "--seq-len", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["models"][0]
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    assert windows[0, 0] == tokenizer.bos_token_id and not (windows[1:] == tokenizer.bos_token_id).any()
    assert found["perplexity"] == pytest.approx(perplexity(small_opt(), windows))
    assert found["sha256"] == hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    assert found["text"] == f"text.txt, {len(windows)} windows of 32 tokens, {windows.numel():,} tokens"


def test_a_run_belongs_to_the_text_with_its_bos(monkeypatch):
    """What the blocks are calibrated on, for every value; an interrupted run does not go on with another one."""
    model, tokenizer = small_model("gemma2", torch.float32), make_tokenizer("adds")
    seen = []
    monkeypatch.setattr("snp_llm.pruning.pipeline.capture", lambda *given: seen.append(given[1]) or pytest.fail("seen"))
    identities = {}
    for bos in ("auto", "always", "once", "never"):
        recipe = small_recipe(bos=bos, seed=5, allocation="uniform", metric="error", reference="self")
        with pytest.raises(pytest.fail.Exception, match="seen"):
            prune(model, tokenizer, recipe)
        starts = (seen[-1][:, 0] == BOS).tolist()
        assert seen[-1].shape == (6, 32)
        if bos in ("auto", "always"):
            assert all(starts)
        else:
            assert sum(starts) <= (bos == "once")
        windows = calibration_windows(
            tokenizer,
            Dataset("bundled"),
            num_samples=6,
            seq_len=32,
            seed=5,
            bos=resolve_bos(bos, model, tokenizer),
        )
        assert torch.equal(windows.tokens, seen[-1])
        identities[bos] = identity(model, tokenizer, windows, recipe)
    assert identities["auto"] == identities["always"]
    assert identities["always"] != identities["once"] and identities["always"] != identities["never"]


@pytest.mark.parametrize(
    "bos", [None, *(pytest.param(b, marks=pytest.mark.exhaustive) for b in ("once", "always", "never"))]
)
def test_prune_and_eval_say_which_was_used(bos, tmp_path, capsys, quick_prunes):
    tokenizer = make_tokenizer("adds")
    folder = save_model(small_model("gemma", torch.float32), tokenizer, tmp_path / "gemma")
    assert AutoTokenizer.from_pretrained(folder)("x")["input_ids"][0] == BOS
    text = tmp_path / "text.txt"
    text.write_text((BUNDLED / "evaluation.txt").read_text()[:4000])
    options = [] if bos is None else ["--bos", bos]
    used = bos or "always"
    quick = ["--allocation", "uniform", "--metric", "error", "--quiet", "--eval-dataset", str(text), *options]
    assert prune_main([str(folder), "--output", str(tmp_path / "out"), *QUICK, *quick]) == 0
    report = json.loads((tmp_path / "out/prune_report.json").read_text())
    remark = {"always": ", each after BOS", "once": "", "never": ", without BOS"}[used]
    for named in (report["calibration"]["text"], report["evaluation"]):
        assert named.endswith(f" windows of 32 tokens{remark}")
    assert load_recipe(tmp_path / "out/recipe.yaml").bos == used
    windows = evaluation_windows(tokenizer, Dataset(str(text)), seq_len=32, bos=used)
    assert report["dense"]["perplexity"] == pytest.approx(
        perplexity(small_model("gemma", torch.float32), windows.tokens), rel=1e-4
    )
    capsys.readouterr()
    measured = [str(folder), str(tmp_path / "out"), "--dataset", str(text), "--seq-len", "32", "--json", *options]
    assert evaluate_main(measured) == 0
    found = json.loads(capsys.readouterr().out)["models"]
    assert {model["sha256"] for model in found} == {windows.digest}
    assert found[0]["text"] == f"{windows.description}, {windows.tokens.numel():,} tokens"
    assert found[0]["perplexity"] == pytest.approx(report["dense"]["perplexity"], rel=1e-4)
    if used == "always":
        assert evaluate_main([*measured, "--stride", "8"]) == 0
        found = json.loads(capsys.readouterr().out)["models"][0]
        assert "windows of 32 that begin every 8, each after BOS, " in found["text"]
        refuse(capsys, [*measured, "--stride", "32"], "--stride: expected at most the 31 tokens", evaluate_main)


def test_always_is_refused_without_a_bos_token(tmp_path, capsys):
    folder = save_model(small_opt(), make_tokenizer("none"), tmp_path / "opt")
    for main in (prune_main, evaluate_main):
        refuse(capsys, [str(folder), "--bos", "always"], "--bos always", main)
    assert [path.name for path in tmp_path.iterdir()] == ["opt"]


@pytest.mark.parametrize(
    ("length", "seq_len", "stride"), [(50, 16, 4), (50, 16, 15), (47, 16, 5), (15, 16, 3), (9, 16, 2)]
)
def test_sliding_windows_after_bos_are_what_each_token_gets_by_itself(length, seq_len, stride):
    """The oracle runs one forward pass for every token, on BOS and what its window holds before it."""
    model = small_opt(torch.float64)
    tokens = torch.randint(3, 2048, (length,), generator=torch.Generator().manual_seed(2))
    total = 0.0
    for at in range(length):
        window = next(w for w in range(length) if w * stride + seq_len - 1 > at)
        before = torch.cat([torch.tensor([BOS]), tokens[window * stride : at]])
        total -= model(before[None]).logits[0, -1].float().log_softmax(0)[tokens[at]].item()
    for batch_size in (1, 3):
        value, counted = strided_perplexity(model, tokens, Sliding(seq_len, stride, BOS), batch_size=batch_size)
        assert counted == length and value == pytest.approx(math.exp(total / length), rel=1e-6)


def test_windows_held_out_of_a_draw_keep_what_is_said_of_bos(text):
    text = text.rename(text.with_name("one, two.txt"))
    draw = {"num_samples": 8, "seq_len": 12, "seed": 3, "bos": "always"}
    rest, held = split_windows(calibration_windows(make_tokenizer("adds"), Dataset(str(text)), **draw), 6, 2)
    assert rest.description == "one, two.txt, 6 windows of 12 tokens, each after BOS, 2 more held out"
    assert held.description == "one, two.txt, 2 windows of 12 tokens, each after BOS"
    assert (torch.cat([rest.tokens, held.tokens])[:, 0] == BOS).all()


def test_sliding_texts_with_another_bos_are_other_tokens():
    digests = [
        evaluation_text(make_tokenizer(kind), Dataset("bundled"), bos=bos).digest
        for kind, bos in [("adds", "always"), ("adds", "once"), ("has", "once")]
    ]
    assert len(set(digests)) == 3
    assert digests[2] == evaluation_text(make_tokenizer("adds"), Dataset("bundled"), bos="never").digest
