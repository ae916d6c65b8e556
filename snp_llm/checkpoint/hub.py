"""Finished output folders onto the Hugging Face Hub. Never changes a folder, and never lets the token out: it comes
from the user's own login or HF_TOKEN, and goes into requests only."""

import html
import json
import logging
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from snp_llm.checkpoint.contents import BENCH, CARD, PAGE, PARTS, RECIPE, REPORT, read_report
from snp_llm.runtime.errors import SnpError
from snp_llm.runtime.json_files import read_json
from snp_llm.runtime.version import __version__

log = logging.getLogger("snp_llm")

LONGEST_SAID = 10_000  # characters of a command or a setting; what is longer is a picture

INDEX = "model.safetensors.index.json"

NEEDED = ("config.json", CARD, REPORT)  # beside the weights

SAID = (REPORT, BENCH, CARD, RECIPE, PAGE)  # files in which a command may stand as it was typed

# A path of this machine in a command or a setting: absolute, from home, or from where the command was typed.
LOCAL = re.compile(r"""(?:(?<=[\s"'=,(])|^)(?:~|\.{1,2})?[/\\][^\s"'=,;)]*|\b[A-Za-z]:\\[^\s"'=,;)]*""")

ADVICE = {
    401: "Log in again with `hf auth login`, or set HF_TOKEN to a valid token",
    403: "Use a token that may write there",
}


def check_access(repo_id: str) -> None:
    """Raises SnpError if an upload is bound to fail, in one small request, before hours are spent on the model."""
    with _client(f"--push-to-hub {repo_id}: no access to", "", "Nothing was pruned.") as api:
        user = api.whoami()
        role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
        if role == "read":
            raise SnpError("the token may only read. Use one that may write")
        owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs") or [])]
        # The reach of a fine-grained token is its own matter; a plain one writes wherever its user is a member.
        if role == "write" and repo_id.split("/")[0].lower() not in [owner.lower() for owner in owners]:
            raise SnpError(f"expected a repository of {' or '.join(owners)}, whose token this is")


def push(folder: Path, repo_id: str, *, private: bool) -> str:
    """Upload a finished output folder in one commit, so that nobody meets half a model there.

    Args:
        folder: what `snp-llm prune` wrote.
        repo_id: user/name; made if it does not exist.
        private: only its owners may see it. Otherwise the owner's default, which is public for users.

    Returns:
        The repository's address.

    Raises:
        SnpError: the folder is not a finished output, or the upload failed; then with the command to retry.
    """
    files = model_files(folder)
    command = shlex.join(["snp-llm", "push", str(folder), repo_id, *(["--private"] if private else [])])
    remedy = f"{folder} is intact; retry with: {command}"
    try:
        with _client(f"push {folder}: not uploaded to", f"/{repo_id}", remedy) as api:
            return _upload(api, folder, files, repo_id, private=private)
    except KeyboardInterrupt:
        raise SnpError(f"push {folder}: interrupted. {remedy}") from None


def _upload(api: HfApi, folder: Path, files: list[Path], repo_id: str, *, private: bool) -> str:
    url = api.create_repo(repo_id, private=private or None, exist_ok=True)
    there = api.model_info(repo_id)
    if private and not there.private:  # it existed before: asking for a private one does not change that
        raise SnpError("expected a private repository, found a public one. Make it private there, or name another")
    new = {file.relative_to(folder).as_posix(): file for file in files}
    old = [sibling.rfilename for sibling in there.siblings or []]
    # Weights of an earlier model, sharded differently, could be loaded in place of the new ones.
    stale = [name for name in old if name not in new and (fnmatch(name, "*.safetensors") or name == INDEX)]
    size, local = sum(file.stat().st_size for file in files), local_names(folder)
    log.info(f"uploading {len(files)} files, {size / 1e6:,.1f} MB, to {url}")
    api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=public(file, local)) for name, file in new.items()),
            *(CommitOperationDelete(path_in_repo=name) for name in stale),
        ],
        commit_message=f"Pruned model, by snp-llm {__version__}",
    )
    return str(url)


def local_names(folder: Path) -> list[str]:
    """Paths of this machine that a folder's reports name, the longest first."""
    found: set[str] = set()

    def look(value: Any) -> None:
        if isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                look(inner)
        elif isinstance(value, str) and len(value) <= LONGEST_SAID:
            found.update(LOCAL.findall(value))
            there = re.findall(r"""[^\s"'=,;()]+[/\\][^\s"'=,;()]+""", value)  # no hub id, where it is a file here
            found.update(name for name in there if os.path.exists(name))

    for name in (REPORT, BENCH):
        if (folder / name).is_file():
            look(json.loads((folder / name).read_text(encoding="utf-8")))
    return sorted(found - {"/", "./", "../", "~/", "\\"}, key=len, reverse=True)


def public(file: Path, local: list[str]) -> Path | bytes:
    """What is uploaded of a file: of those in which commands stand the text with last names in place of paths."""
    if file.name not in SAID or not local:
        return file
    text = before = file.read_text(encoding="utf-8")
    for path in local:
        name = re.split(r"[/\\]", path.rstrip("/\\"))[-1]
        for spelt in {path, html.escape(path), json.dumps(path)[1:-1]}:
            text = text.replace(spelt, name)
    return file if text == before else text.encode()


def model_files(folder: Path) -> list[Path]:
    """The files of a finished output folder; what else lies there is named in a log line and left out.

    Raises:
        SnpError: the folder is not a finished output.
    """
    if not folder.is_dir():
        raise SnpError(f"push {folder}: no such folder; expected an output of `snp-llm prune`.")
    _check_missing(folder, {name for name in NEEDED if not (folder / name).is_file()})
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    files = [file for file in found if _is_part(file.relative_to(folder))]
    names = {file.relative_to(folder).as_posix() for file in files}
    weights = {"model.safetensors"}
    if INDEX in names:
        index = read_json(folder / INDEX, f"push {folder}: expected {INDEX} to list weight files")
        listed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
            raise SnpError(f"push {folder}: {INDEX} does not list weight files. Prune again.")
        weights = set(listed.values())
    _check_missing(folder, weights - names)
    read_report(folder)
    for file in files:
        if file.suffix == ".json":
            read_json(file, f"push {folder}: expected JSON in {file.relative_to(folder)}")
    if others := [file.relative_to(folder).as_posix() for file in found if file not in files]:
        log.warning(f"push {folder}: not part of a model, left out: {', '.join(others)}")
    return files


def _check_missing(folder: Path, missing: set[str]) -> None:
    if missing:
        raise SnpError(
            f"push {folder}: expected a finished output of `snp-llm prune`; {', '.join(sorted(missing))} missing. "
            "Prune again."
        )


def _is_part(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and any(fnmatch(path.name, pattern) for pattern in PARTS)


@contextmanager
def _client(failed: str, path: str, remedy: str) -> Iterator[HfApi]:
    """The hub's client with the user's token. Any failure inside becomes `failed`, the address, why, and `remedy`."""
    api = HfApi()
    try:
        api.token = get_token()
        if api.token is None:
            raise SnpError("no token. Log in with `hf auth login`, or set HF_TOKEN")
        yield api
    except Exception as error:  # the client, its transport and its threads raise dozens of kinds
        reason = _reason(error)
        if api.token:  # a server may quote it back
            reason = reason.replace(str(api.token), "***")
        # Not `from error`: a traceback would print what was just cut out.
        raise SnpError(f"{failed} {api.endpoint}{path}: {reason[:400]}. {remedy}") from None


def _reason(error: BaseException) -> str:
    """Reason of a failure in one line: what the hub answered, or else the first cause."""
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = " ".join((error.server_message or error.response.reason_phrase).split()).rstrip(".")
        advice = f". {ADVICE[status]}" if status in ADVICE else ""
        return f"the hub answered {status}, {said}{advice}"
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
