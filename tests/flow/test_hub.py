"""Uploads to a small server on loopback that speaks the few endpoints of the Hub that are used."""

import base64
import hashlib
import html
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest

from snp_llm import checkpoint, prune
from snp_llm.checkpoint import contents, hub
from snp_llm.cli.parse import prune_main, push_main
from snp_llm.models.size import model_size
from snp_llm.report import card as model_cards
from snp_llm.report import facts, page
from snp_llm.runtime.errors import SnpError
from tests.conftest import small_opt, small_recipe

TOKEN = "hf_averysecrettoken"
WHOAMI = {"name": "ada", "orgs": [{"name": "engines"}], "auth": {"accessToken": {"role": "write"}}}
NAME = "ada/small-pruned"
QUICK = ["--calibration", "bundled", "--num-samples", "4", "--seq-len", "32", "--no-eval"]


class FakeHub(BaseHTTPRequestHandler):
    """One user, any number of repositories; `server.failing` maps patterns of `METHOD path` to a status."""

    def parse_request(self):
        """Every request is noted, and refused where the test says so, before it can do anything."""
        if not super().parse_request():
            return False
        self.server.seen.append((self.command, self.path.split("?")[0], self.headers.get("Authorization")))
        for pattern, status in self.server.failing.items():
            if re.match(pattern, f"{self.command} {self.path}"):
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                said = f"not for {self.headers.get('Authorization')}"  # some proxies are as careless
                self.answer({"error": said}, status, {"X-Error-Message": said})
                return False
        return True

    def do_GET(self):
        if self.path == "/api/whoami-v2":
            return self.answer(self.server.whoami)
        repository = self.server.repositories.get("/".join(self.path.split("/")[3:5]))
        if repository is None:
            return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": name} for name in repository["files"]]
        return self.answer({"id": NAME, "private": repository["private"], "siblings": siblings, "sha": "0" * 40})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if name in self.server.repositories else 200
            private = asked.get("visibility") == "private" or asked.get("private") is True
            self.server.repositories.setdefault(name, {"private": private, "files": {".gitattributes": b""}, "sent": 0})
            return self.answer({"url": f"{self.server.url}/{name}"}, status)
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if self.path.endswith("/preupload/main"):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": modes})
        if self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**file, "actions": {"upload": {"href": f"{self.server.url}/lfs/{file['oid']}?signature=s3cret"}}}
                for file in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        assert self.path == f"/api/models/{NAME}/commit/main"
        repository = self.server.repositories[NAME]
        repository["sent"] += 1
        for line in body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "file":
                repository["files"][value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                repository["files"][value["path"]] = self.server.objects[value["oid"]]
            elif key == "deletedFile":
                del repository["files"][value["path"]]
        return self.answer({"commitUrl": f"{self.server.url}/{NAME}/commit/0", "commitOid": "0" * 40})

    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.objects[hashlib.sha256(body).hexdigest()] = body
        self.answer({})

    def answer(self, content, status=200, headers=()):
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**dict(headers), "Content-Length": len(data)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_args):
        pass


@pytest.fixture
def server(monkeypatch):
    """A Hub on loopback, with this process's client logged in to it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.whoami, server.repositories, server.objects, server.seen, server.failing = WHOAMI, {}, {}, [], {}
    connect(monkeypatch, server.url)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


def connect(monkeypatch, url):
    """What HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_DISABLE_XET and HF_TOKEN say; all but the last are read at import."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("time.sleep", lambda _seconds: None)  # the client waits between its attempts


@pytest.fixture(scope="module")
def finished(tokenizer, tmp_path_factory):
    """A finished output folder, written once."""
    folder = tmp_path_factory.mktemp("finished") / "small pruned"
    dense = small_opt()
    pruned = prune(dense, tokenizer, small_recipe(model="ada/small"))
    checkpoint.save(pruned.model, tokenizer, folder)
    figures = [facts.Measured(model_size(m, 32), 1, 2.0, None) for m in (dense, pruned.model)]
    more = {"command": "snp-llm prune ada/small", "evaluation": "bundled (test), 3 windows of 32 tokens"}
    summary = facts.build_report(pruned, *figures, more)
    facts.write_report(summary, folder)
    model_cards.write_card(summary, pruned.model.config, "ada/small", folder)
    page.write_page(folder)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / finished.name)


def bytes_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fails(capsys, arguments, message, command=push_main):
    """Runs a command that must fail with one line, the token nowhere in it."""
    assert command([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("snp-llm: error: ")]
    assert len(errors) == 1 and err.rstrip().endswith(errors[0]) and "Traceback" not in err
    assert TOKEN not in out + err and re.search(message, errors[0]), errors[0]
    return errors[0]


def test_everything_arrives_in_one_commit(server, folder, capsys):
    before = bytes_in(folder)
    assert push_main([str(folder), NAME]) == 0
    out, err = capsys.readouterr()
    assert out == f"{folder} -> {server.url}/{NAME}\n" and re.fullmatch(r"uploading \d files, [\d.]+ MB, to .*\n", err)
    repository = server.repositories[NAME]
    del repository["files"][".gitattributes"]
    assert repository["files"] == before and repository["sent"] == 1 and not repository["private"]
    assert bytes_in(folder) == before
    # The token reaches the hub's own endpoints, not the place where large files are stored, and nothing else.
    own = {authorization for _, path, authorization in server.seen if NAME in path or path == "/api/repos/create"}
    storage = {authorization for _, path, authorization in server.seen if path.startswith("/lfs/")}
    assert own == {f"Bearer {TOKEN}"} and storage == {None}
    assert TOKEN not in out + err and not any(TOKEN.encode() in data for data in before.values())


def test_private(server, folder, capsys):
    assert push_main([str(folder), NAME, "--private"]) == 0
    assert server.repositories[NAME]["private"]
    assert push_main([str(folder), NAME, "--private"]) == 0  # again, onto what is private already


def test_a_public_repository_does_not_become_private_and_is_refused(server, folder, capsys):
    server.repositories[NAME] = {"private": False, "files": {}, "sent": 0}
    retry = re.escape(f"retry with: snp-llm push '{folder}' {NAME} --private")
    fails(capsys, [folder, NAME, "--private"], f"expected a private repository, found a public one.*{retry}$")
    assert server.repositories[NAME]["files"] == {}


def test_weights_of_an_earlier_model_are_removed(server, folder):
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", hub.INDEX, "notes.md"]
    server.repositories[NAME] = {"private": False, "files": dict.fromkeys(names, b"old"), "sent": 0}
    assert hub.push(folder, NAME, private=False) == f"{server.url}/{NAME}"
    assert set(server.repositories[NAME]["files"]) == {*bytes_in(folder), "notes.md"}


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ("POST /api/repos/create", 401, "the hub answered 401, .*`hf auth login`"),
        ("POST /api/repos/create", 403, r"the hub answered 403, .*not for Bearer \*\*\*.* Use a token that may write"),
        ("POST .*/preupload", 403, "the hub answered 403"),
        ("POST .*/objects/batch", 500, "the hub answered 500"),
        ("PUT /lfs/", 500, "the hub answered 500"),
        ("PUT /lfs/", 403, "the hub answered 403"),
        ("POST .*/commit/main", 503, "the hub answered 503"),
    ],
)
def test_a_failed_upload_leaves_the_folder_and_says_how_to_retry(server, folder, capsys, request_, status, message):
    server.failing[request_] = status
    before = bytes_in(folder)
    error = fails(capsys, [folder, NAME], message)
    assert f"push {folder}: not uploaded to {server.url}/{NAME}: " in error and "s3cret" not in error
    assert error.endswith(f". {folder} is intact; retry with: snp-llm push '{folder}' {NAME}")
    assert bytes_in(folder) == before
    assert set(server.repositories.get(NAME, {"files": {}})["files"]) <= {".gitattributes"}
    server.failing.clear()
    assert push_main([str(folder), NAME]) == 0
    assert before.items() <= server.repositories[NAME]["files"].items()


def test_no_connection(monkeypatch, folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    connect(monkeypatch, f"http://127.0.0.1:{port}")
    before = bytes_in(folder)
    fails(capsys, [folder, NAME], f"http://127.0.0.1:{port}/{NAME}: .*[Rr]efused. .* is intact; retry with: ")
    assert bytes_in(folder) == before


def test_no_token(server, monkeypatch, tmp_path, folder, capsys):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    fails(capsys, [folder, NAME], "no token. Log in with `hf auth login`, or set HF_TOKEN. .*retry with: ")
    assert server.seen == []


def test_the_token_of_the_hubs_own_login(server, monkeypatch, tmp_path, folder):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("hf_fromlogin\n")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    hub.push(folder, NAME, private=False)
    assert ("POST", "/api/repos/create", "Bearer hf_fromlogin") in server.seen


def test_no_traceback_holds_the_token(server, folder):
    server.failing["POST /api/repos/create"] = 403
    with pytest.raises(SnpError) as caught:
        hub.push(folder, NAME, private=False)
    assert TOKEN not in "".join(traceback.format_exception(caught.value))


def test_an_interrupted_upload_says_how_to_retry(server, monkeypatch, folder, capsys):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", interrupt)
    fails(capsys, [folder, NAME], f"interrupted. .* is intact; retry with: snp-llm push '{re.escape(str(folder))}'")


# --- what is uploaded ------------------------------------------------------------------------------------------------


def test_only_parts_of_a_model_are_uploaded(server, folder, caplog):
    (folder / "vocab.tiktoken").write_bytes(b"IQ== 0")  # as some tokenizers have their vocabulary
    parts = bytes_in(folder)
    assert contents.PAGE in parts
    (folder / ".git").mkdir()
    strangers = [
        ".env",
        ".git/config.json",
        "pytorch_model.bin",
        "optimizer.pt",
        "state.pkl",
        "README.md~",
        "x.tmp",
        "x.html",
    ]
    for name in strangers:
        (folder / name).write_text("private")
    with caplog.at_level(logging.WARNING, logger="snp_llm"):
        hub.push(folder, NAME, private=False)
    assert set(server.repositories[NAME]["files"]) == {*parts, ".gitattributes"}
    assert all(name in caplog.text for name in strangers) and "not part of a model, left out" in caplog.text


@pytest.mark.parametrize("name", ["config.json", "README.md", contents.REPORT, "model.safetensors"])
def test_an_unfinished_folder_is_refused(server, folder, capsys, name):
    (folder / name).unlink()
    fails(capsys, [folder, NAME], f"expected a finished output of `snp-llm prune`; {name} missing")
    assert server.seen == []


def test_a_missing_shard_is_noticed(server, folder, capsys):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / hub.INDEX).write_text(json.dumps(index))
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    fails(capsys, [folder, NAME], "; model-00002-of-00002.safetensors missing")
    (folder / hub.INDEX).write_text("{}")
    fails(capsys, [folder, NAME], "index.json does not list weight files")
    fails(capsys, [folder / "nowhere", NAME], "no such folder")
    assert server.seen == []


BAD_NAMES = [
    "small",
    "ada/",
    "/small",
    "a/b/c",
    "ada/small pruned",
    "ada/-x",
    "ada/x..y",
    "ada/x.git",
    "ada/" + 97 * "x",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_bad_names(server, folder, capsys, name):
    fails(capsys, [folder, name], "expected user/name, .* got ")
    fails(capsys, ["tiny-opt", "--push-to-hub", name], "--push-to-hub: expected user/name, .* got ", prune_main)
    assert server.seen == []


# --- prune --push-to-hub ---------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_prune_and_push_in_a_real_process(server, opt_folder, tmp_path):
    """Through the environment alone: HF_ENDPOINT and HF_TOKEN."""
    out = tmp_path / "out"
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "snp_llm.prune", str(opt_folder), "--output", str(out), *QUICK]
    command += ["--push-to-hub", NAME, "--private"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith(f"{out} -> {server.url}/{NAME}\n") and "seconds spent pruning" in run.stdout
    repository, written = server.repositories[NAME], bytes_in(out)
    assert repository["private"] and written.keys() <= repository["files"].keys()
    changed = {name for name, data in written.items() if repository["files"][name] != data}
    assert changed == {"README.md", "prune_report.json", "recipe.yaml", "report.html"}  # in which paths of ours stand
    assert not any(str(tmp_path.parent).encode() in data for data in repository["files"].values())
    assert f"--push-to-hub {NAME} --private" in written["README.md"].decode()
    assert TOKEN not in run.stdout + run.stderr and not any(TOKEN.encode() in data for data in written.values())
    assert re.search(r"^uploading \d+ files, ", run.stderr, re.M) and "%|" not in run.stderr  # bars are for terminals


@pytest.mark.exhaustive
def test_a_push_that_fails_after_pruning_leaves_the_model(server, opt_folder, tmp_path, capsys):
    server.failing["POST /api/repos/create"] = 500
    out = tmp_path / "out"
    assert prune_main([str(opt_folder), "--output", str(out), *QUICK, "--push-to-hub", NAME]) == 2
    printed, err = capsys.readouterr()
    assert "seconds spent pruning" in printed and (out / "model.safetensors").exists()
    assert err.splitlines()[-1].endswith(f"{out} is intact; retry with: snp-llm push {out} {NAME}")


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ({**WHOAMI, "auth": {"accessToken": {"role": "read"}}}, "the token may only read"),
        ({**WHOAMI, "name": "grace"}, "expected a repository of grace or engines"),
    ],
)
def test_a_token_that_may_not_write_there_is_refused_before_any_work(server, tmp_path, capsys, user, message):
    server.whoami = user
    arguments = ["./nowhere", "--output", tmp_path / "out", "--push-to-hub", NAME]
    fails(capsys, arguments, f"--push-to-hub {NAME}: no access to {server.url}: {message}.*pruned.$", prune_main)


def test_organisations_and_fine_grained_tokens_pass(server):
    hub.check_access("engines/small")
    hub.check_access("Ada/small")
    server.whoami = {"name": "grace", "auth": {"accessToken": {"role": "fineGrained"}}}
    hub.check_access(NAME)


def test_access_is_checked_before_any_work(server, monkeypatch, tmp_path, capsys):
    arguments = ["./nowhere", "--output", tmp_path / "out", "--push-to-hub", NAME]
    server.failing["GET /api/whoami-v2"] = 401
    fails(capsys, arguments, "no access to .*the hub answered 401, .*`hf auth login`.* Nothing was pruned", prune_main)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    fails(capsys, arguments, "offline mode", prune_main)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    fails(capsys, arguments, "no token", prune_main)
    fails(capsys, ["tiny-opt", "--private"], "--private: expected together with --push-to-hub", prune_main)


def test_no_path_of_this_machine_goes_along(tmp_path, monkeypatch):
    """Whatever the settings and the command say, as text, JSON and HTML; names on the Hub and weights stay."""
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    secret = f"{tmp_path}/texts of a/client & co.txt"
    text = f"{tmp_path}/texts/client&co.txt"
    command = f"snp-llm prune models/mine --calibration '{text}' --output=../out --latency-table ~/t.json"
    recipe = {"model": "models/mine", "calibration": secret, "eval_dataset": "user/dataset", "output": "/data/out"}
    (tmp_path / "prune_report.json").write_text(json.dumps({"recipe": recipe, "command": command, "kind": "a/b"}))
    (tmp_path / "README.md").write_text(f"Made with `{command}` from facebook/opt-125m, [a](/link).")
    (tmp_path / "report.html").write_text(
        f"<code>{html.escape(command)}</code></div><img src='data:image/png;base64,/9j/'>"
    )
    local = hub.local_names(tmp_path)
    for name in ("prune_report.json", "README.md", "report.html"):
        text = hub.public(tmp_path / name, local).decode()
        for path in (str(tmp_path), "models/mine", "~/", "../", "/data/"):
            assert path not in text, (name, path)
        assert "mine" in text
    assert "facebook/opt-125m" in hub.public(tmp_path / "README.md", local).decode()
    assert "image/png;base64,/9j/" in hub.public(tmp_path / "report.html", local).decode()
    assert "user/dataset" in hub.public(tmp_path / "prune_report.json", local).decode()
    (tmp_path / "model.safetensors").write_bytes(b"/data/out")
    assert hub.public(tmp_path / "model.safetensors", local) == tmp_path / "model.safetensors"
