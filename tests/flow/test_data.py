import json

import datasets
import pytest
import torch

from snp_llm.data.sources import NAMED, Dataset, both_of, check_dataset, mixture
from snp_llm.data.windows import calibration_windows, evaluation_windows, mixed_windows, split_windows, windows_of
from snp_llm.runtime.errors import SnpError


def calibrate(tokenizer, name, split=None, column="text", **overrides):
    values = {"num_samples": 4, "seq_len": 16, "seed": 0, **overrides}
    return calibration_windows(tokenizer, Dataset(name, split, column), **values)


def evaluate(tokenizer, name, split=None, column="text", **overrides):
    return evaluation_windows(tokenizer, Dataset(name, split, column), **{"seq_len": 16, **overrides})


@pytest.fixture
def texts():
    return [f"The sentence number {i} has a tail of {i * 7} words or so." for i in range(40)]


def write(path, texts):
    if path.suffix == ".txt":
        path.write_text("\n\n".join(texts))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"id": i, "text": t}) + "\n" for i, t in enumerate(texts)))
    else:
        datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_local_files_are_joined_and_tokenised_once(ending, texts, tmp_path, tokenizer):
    windows = evaluate(tokenizer, write(tmp_path / f"data.{ending}", texts))
    ids = tokenizer("\n\n".join(texts))["input_ids"]
    assert windows.tokens.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert windows.description == f"data.{ending}, {len(ids) // 16} windows of 16 tokens"


def test_blank_lines_and_line_ends_of_a_text_file_are_kept(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(" = Title = \n\n one line \n two lines \n" * 20)
    windows = evaluate(tokenizer, str(tmp_path / "a.txt"))
    assert tokenizer.decode(windows.tokens[0][1:]).startswith(" = Title = \n\n one line \n two")


def test_calibration_draws_different_windows_of_the_same_text(texts, tmp_path, tokenizer):
    path = write(tmp_path / "data.txt", texts)
    everything = {tuple(w) for w in evaluate(tokenizer, path).tokens.tolist()}
    first, again, other = (calibrate(tokenizer, path, seed=s) for s in (0, 0, 1))
    assert first.digest == again.digest != other.digest
    drawn = [tuple(w) for w in first.tokens.tolist()]
    assert len(set(drawn)) == 4 and set(drawn) <= everything


def test_several_texts_give_their_shares_in_a_drawn_order(texts, tmp_path, tokenizer):
    one, other = (write(tmp_path / f"{name}.txt", texts[at:]) for name, at in (("one", 0), ("other", 20)))
    values = {"num_samples": 8, "seq_len": 16, "seed": 3}
    mixed = mixed_windows(tokenizer, Dataset(f"{one}=3,{other}"), **values)
    parts = [calibrate(tokenizer, name, **{**values, "num_samples": n}) for name, n in ((one, 6), (other, 2))]
    drawn = mixed.tokens.tolist()
    assert sorted(drawn) == sorted([*parts[0].tokens.tolist(), *parts[1].tokens.tolist()])
    assert drawn[:6] != parts[0].tokens.tolist()
    assert mixed.description == "one.txt and other.txt, 8 windows of 16 tokens: 6 of one.txt, 2 of other.txt"
    assert mixed_windows(tokenizer, Dataset(one), **values).digest == calibrate(tokenizer, one, **values).digest
    with pytest.raises(SnpError, match="expected a window or more of each of 2 texts, got 1 window"):
        mixed_windows(tokenizer, Dataset(f"{one},{other}"), **{**values, "num_samples": 1})


def test_a_file_may_have_commas_in_its_name(texts, tmp_path):
    path = write(tmp_path / "a,b=2.txt", texts)
    assert mixture(Dataset(path)) == [(Dataset(path), 1.0)]
    assert mixture(Dataset("wikitext2, c4=0.5")) == [(Dataset("wikitext2"), 1 / 1.5), (Dataset("c4"), 0.5 / 1.5)]


@pytest.mark.parametrize("name", ["wikitext2,", "wikitext2,c4=0", "wikitext2,c4=x", "=1,c4", "wikitext2,c4=-1"])
def test_shares_that_are_none(name):
    with pytest.raises(SnpError, match="each with a share above 0"):
        check_dataset(Dataset(name), "calibration")


def test_short_text_gives_fewer_windows_and_says_so(texts, tmp_path, tokenizer):
    windows = calibrate(tokenizer, write(tmp_path / "data.txt", texts[:3]), num_samples=100)
    assert len(windows.tokens) < 100 and "(100 asked for, the text holds no more)" in windows.description


@pytest.mark.parametrize(
    ("drawn", "wanted", "kept"),
    [(160, 128, 128), (48, 16, 16), (33, 1, 1), (100, 128, 75), (20, 16, 15), (2, 8, 1), (34, 2, 2)],
)
def test_as_many_windows_are_calibrated_on_as_were_asked_for(drawn, wanted, kept):
    """Whatever is held out beside them; of a short text at least a quarter is, and the rest is said to be less."""
    windows = windows_of(torch.arange(drawn)[:, None], "a text", "once")
    rest, held = split_windows(windows, wanted, 32)
    assert torch.cat([rest.tokens, held.tokens]).equal(windows.tokens) and len(rest.tokens) == kept
    assert (f"({wanted} asked for)" in rest.description) == (kept < wanted)


def test_too_little_text_for_one_window(tmp_path, tokenizer):
    path = write(tmp_path / "data.txt", ["Too short."])
    for read in (calibrate, evaluate):
        with pytest.raises(SnpError, match=r"data.txt: expected at least one window of 16 tokens, got \d tokens"):
            read(tokenizer, path)


def test_random_ids_cover_the_vocabulary_but_no_special_tokens(tokenizer):
    windows = calibrate(tokenizer, "random", num_samples=200, seq_len=64)
    assert windows.tokens.min() >= 4 and windows.tokens.max() < 2048
    assert len(windows.tokens.unique()) > 1900
    assert windows.digest == calibrate(tokenizer, "random", num_samples=200, seq_len=64).digest


def test_bundled_texts_are_disjoint(tokenizer):
    train, test = calibrate(tokenizer, "bundled"), evaluate(tokenizer, "bundled", seq_len=256)
    assert train.description.startswith("bundled (train)") and len(test.tokens) >= 50
    assert evaluate(tokenizer, "bundled", split="train").digest != test.digest
    with pytest.raises(SnpError, match="unknown split 'dev'; expected one of train, test"):
        evaluate(tokenizer, "bundled", split="dev")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wikitext", "unknown dataset 'wikitext'; expected .* Did you mean 'wikitext2'"),
        ("nowhere.txt", "dataset nowhere.txt: no such file"),
        ("someone/nothing", "dataset someone/nothing cannot be read: .* Check the name, the split and the network"),
    ],
)
def test_unknown_datasets(name, message, tokenizer):
    with pytest.raises(SnpError, match=message):
        calibrate(tokenizer, name)


def test_a_missing_column_lists_what_is_there(texts, tmp_path, tokenizer):
    path = write(tmp_path / "data.jsonl", texts)
    with pytest.raises(SnpError, match="expected a text column 'body'; its columns are id, text.*--text-column"):
        calibrate(tokenizer, path, column="body")


def test_damaged_files_are_one_line(tmp_path, tokenizer):
    (tmp_path / "bad.parquet").write_bytes(b"not parquet at all" * 10)
    with pytest.raises(SnpError, match="bad.parquet cannot be read"):
        calibrate(tokenizer, str(tmp_path / "bad.parquet"))


def test_records_without_text_are_left_out_and_counted(texts, tmp_path, tokenizer, caplog):
    """Null is none; an empty text is one, as in WikiText's blank lines, and is joined like any other."""
    file = tmp_path / "data.jsonl"
    rows = [row for text in texts for row in (None, text, "")]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    windows = evaluate(tokenizer, str(file))
    ids = tokenizer("\n\n".join(row for row in rows if row is not None))["input_ids"]
    assert windows.tokens.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert "40 of 120 records hold no text and were left out" in caplog.text
    file.write_text("".join(json.dumps({"text": None}) + "\n" for _ in texts))
    with pytest.raises(SnpError, match="expected at least one window of 16 tokens, got [012] tokens"):
        evaluate(tokenizer, str(file))
    assert "40 of 40 records hold no text" in caplog.text


def test_a_json_file_is_a_list_of_records_or_one_a_line(texts, tmp_path, tokenizer):
    rows = [{"text": text, "id": i} for i, text in enumerate(texts)]
    plain = evaluate(tokenizer, write(tmp_path / "plain.jsonl", texts))
    for content in (json.dumps(rows), " \n" + json.dumps(rows, indent=1), "\n\n".join(map(json.dumps, rows))):
        (tmp_path / "data.json").write_text(content)
        assert evaluate(tokenizer, str(tmp_path / "data.json")).digest == plain.digest
    (tmp_path / "data.jsonl").write_text(json.dumps(rows[0]) + "\n\n" + '{"text": "a"\n')
    with pytest.raises(SnpError, match="data.jsonl: expected JSON, line 3 is none"):
        evaluate(tokenizer, str(tmp_path / "data.jsonl"))


@pytest.mark.parametrize("value", [5, 1.5, True, ["a"], {"a": 1}])
def test_a_record_that_holds_something_else_is_named(value, texts, tmp_path, tokenizer):
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"id": i, "text": value}) + "\n" for i, _ in enumerate(texts)))
    with pytest.raises(SnpError, match="expected text in column 'text', record 1 has .*--text-column"):
        evaluate(tokenizer, str(file))


def test_folders_that_the_dataset_library_saved(texts, tmp_path, tokenizer, caplog):
    one = datasets.Dataset.from_dict({"text": [*texts, None]})
    one.save_to_disk(tmp_path / "one")
    two = {"train": one, "test": datasets.Dataset.from_dict({"text": texts[:30]})}
    datasets.DatasetDict(two).save_to_disk(tmp_path / "two")
    plain = evaluate(tokenizer, write(tmp_path / "plain.jsonl", texts))
    assert evaluate(tokenizer, str(tmp_path / "one")).digest == plain.digest
    assert "1 of 41 records hold no text" in caplog.text
    assert evaluate(tokenizer, str(tmp_path / "two"), split="train").digest == plain.digest
    assert evaluate(tokenizer, str(tmp_path / "two")).description.startswith("two (test), ")
    with pytest.raises(SnpError, match="unknown split 'dev'; expected one of train, test"):
        evaluate(tokenizer, str(tmp_path / "two"), split="dev")
    (tmp_path / "three").mkdir()
    with pytest.raises(SnpError, match="three: is a folder without state.json or dataset_dict.json"):
        evaluate(tokenizer, str(tmp_path / "three"))
    (tmp_path / "three/state.json").write_text("{")
    with pytest.raises(SnpError, match="three cannot be read: .* Check the file"):
        evaluate(tokenizer, str(tmp_path / "three"))


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet", "json"])
@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"{", b"[" * 10_000, b"null", b"\n\n", b'{"text": "a"}\n{'])
def test_files_of_anything_are_one_line(content, ending, tmp_path, tokenizer):
    file = tmp_path / f"data.{ending}"
    file.write_bytes(content)
    if ending == "txt" and content.startswith(b"["):
        assert calibrate(tokenizer, str(file)).tokens.numel()  # text like any other
        return
    with pytest.raises(SnpError) as refused:
        calibrate(tokenizer, str(file))
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 700


@pytest.mark.parametrize("name", NAMED)
def test_named_datasets_ask_the_hub_for_the_right_thing(name, monkeypatch, tokenizer, texts):
    """The hub is not reached; what is checked is the request, the split and the joining."""
    asked = []

    def load(path, **options):
        asked.append((path, options))
        column = NAMED[name].column
        return datasets.Dataset.from_dict({column: texts}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    windows = evaluate(tokenizer, name)
    calibrate(tokenizer, name)
    (path, evaluation), (_, calibration) = asked
    assert path == {"wikitext2": "Salesforce/wikitext", "c4": "allenai/c4", "ptb": "ptb-text-only/ptb_text_only"}[name]
    assert evaluation["split"] == ("validation" if name == "c4" else "test") and calibration["split"] == "train"
    assert evaluation["streaming"]
    joined = {"wikitext2": "\n\n", "c4": " ", "ptb": " "}[name].join(texts)
    ids = tokenizer(joined)["input_ids"]
    assert torch.equal(windows.tokens.flatten(), torch.tensor(ids[: len(ids) // 16 * 16]))


def test_a_hub_dataset_with_a_configuration(monkeypatch, tokenizer, texts):
    asked = []

    def load(path, **options):
        asked.append((path, options))
        return datasets.Dataset.from_dict({"body": texts}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load)
    windows = calibrate(tokenizer, "user/corpus:en", split="dev", column="body")
    assert asked == [("user/corpus", {"split": "dev", "streaming": True, "name": "en"})]
    assert windows.description.startswith("user/corpus:en (dev), 4 windows")


def test_only_as_much_is_read_as_the_windows_need(monkeypatch, tokenizer):
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield {"text": "word " * 100}

    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_options: endless())
    calibrate(tokenizer, "user/endless")
    assert read * 500 <= 2 * 32 * 4 * 16 + 500


@pytest.mark.parametrize(
    ("calibration", "evaluation", "same"),
    [
        (("notes.txt", None), ("./notes.txt", "test"), "./notes.txt"),
        (("wikitext2,notes.txt=2", None), ("notes.txt", None), "notes.txt"),
        (("wikitext2", None), ("wikitext2", None), None),
        (("wikitext2", "test"), ("wikitext2", None), "wikitext2"),
        (("Salesforce/wikitext:wikitext-2-raw-v1", "test"), ("wikitext2", None), "wikitext2"),
        (("bundled", None), ("bundled", None), None),
        (("bundled", "test"), ("bundled", None), "bundled"),
        (("user/a", "test"), ("user/b", "test"), None),
        (("random", None), ("notes.txt", None), None),
    ],
)
def test_a_text_that_is_calibrated_on_and_measured_by_is_known(calibration, evaluation, same, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("A text.")
    assert both_of(Dataset(*calibration), Dataset(*evaluation)) == same
