"""Publishing a checkpoint on the hub: the card, the files that a checkpoint may hold and no others, one commit.

The hub client finds the token itself (`HF_TOKEN`, or the file of `hf auth login`): it is not an argument here, so it can
stand in no call, log or error.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub import errors as hub

from orthokv.checkpoint.card import model_card, without_paths
from orthokv.checkpoint.read import read_checkpoint
from orthokv.files.digests import SUMS, read_sums, verify_files
from orthokv.files.reading import read_json
from orthokv.models.source import INDEX, first_line
from orthokv.spec.errors import InvalidCheckpoint, InvalidSetting, PushFailed
from orthokv.spec.hub_ids import is_repository
from orthokv.spec.names import (
    CARD,
    CONFIG,
    MODEL_SETTINGS,
    PROFILE_JSON,
    PROFILE_TENSORS,
    TENSORS,
    TOKENIZER_FILES,
)

TEMPLATE = "chat_template.jinja"
_OWN = frozenset({CONFIG, TENSORS, PROFILE_JSON, PROFILE_TENSORS, CARD})
_BASE = frozenset({*MODEL_SETTINGS, *TOKENIZER_FILES, INDEX, TEMPLATE})
_WEIGHTS = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
_BRANCH = re.compile(r"[A-Za-z0-9][\w.-]{0,127}", re.ASCII)
# What a loader might read of a repository. Others, such as a LICENSE or pictures, may stay there.
_LOADED = (".json", ".safetensors", ".jinja", ".model", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".py")


@dataclass(frozen=True)
class Prepared:
    """What will be sent: by name a file of the folder, or bytes that were written for the hub."""

    repo_id: str
    title: str
    files: dict[str, Path | bytes]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by name."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


@dataclass(frozen=True)
class Pushed:
    """`commit` is the hash (40 hex digits) of the commit that holds the checkpoint, `url` shows it."""

    repo_id: str
    revision: str
    commit: str
    url: str


def push(folder: Path, repo_id: str, *, private: bool = False, revision: str = "main") -> Pushed:
    """Publish a checkpoint as a hub repository; pushed again unchanged, no new commit is made.

    Args:
        repo_id: `owner/name`; made where it is missing.
        private: make the repository private. One that exists must be private already.
        revision: a branch, made where it is missing.

    Raises:
        InvalidSetting: `repo_id` or `revision` is not a name that the hub takes.
        InvalidCheckpoint: the folder is not a sound checkpoint, or lists files of other kinds.
        PushFailed: the hub refuses or cannot be reached, or the repository holds another model.
    """
    return upload(prepare(folder, repo_id), private=private, revision=revision)


def prepare(folder: Path, repo_id: str) -> Prepared:
    """Verify a checkpoint and write what is different on the hub; nothing is asked of the network.

    Different are the card, which loads the repository instead of a folder, and the names of local models and texts,
    of which only the last part is published. Files that `SHA256SUMS` does not list are never sent.

    Raises:
        InvalidSetting, InvalidCheckpoint: as `push`.
    """
    if not is_repository(repo_id):
        raise InvalidSetting(f"{repo_id!r} is not the id of a hub repository: owner/name")
    if not folder.is_dir():
        raise InvalidCheckpoint(f"{folder} is not a folder")
    sums = read_sums(folder)
    # Before the digests: a foreign list may name files outside of the folder.
    full = read_json(folder / CONFIG).get("form") == "full" if CONFIG in sums else False
    for name in sums:
        known = name in _OWN or (full and (name in _BASE or _WEIGHTS.fullmatch(name)))
        if not known:
            raise InvalidCheckpoint(f"{SUMS} lists {name!r}: no file that a checkpoint may hold")
        if (folder / name).is_symlink():
            raise InvalidCheckpoint(f"{name} is a link, not a file of the checkpoint")
    verify_files(folder)
    config = without_paths(read_checkpoint(folder).config)
    written = {
        CONFIG: _json(config),
        PROFILE_JSON: _json(without_paths(read_json(folder / PROFILE_JSON))),
        CARD: model_card(config, repo_id=repo_id).encode(),
    }
    digests = {**sums, **{name: hashlib.sha256(content).hexdigest() for name, content in written.items()}}
    written[SUMS] = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()
    files = {name: written.get(name, folder / name) for name in sorted({*digests, SUMS})}
    kept = 100 * float(config["cache"]["kept"])
    return Prepared(repo_id, f"OrthoKV checkpoint, {kept:.1f} % of the cache kept", files)


def upload(prepared: Prepared, *, private: bool = False, revision: str = "main") -> Pushed:
    """Send what `prepare` made, as one commit upon the state of the branch that was looked at.

    Raises:
        InvalidSetting, PushFailed: as `push`.
    """
    if not _BRANCH.fullmatch(revision):
        raise InvalidSetting(f"{revision!r} is not the name of a branch")
    repo_id = prepared.repo_id
    with _hub_errors(repo_id):
        api = HfApi(token=True)  # required: found by the client, or LocalTokenNotFoundError
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise PushFailed(f"{repo_id} exists and is public: make it private there, or choose another name")
        if revision != "main":
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        found = api.model_info(repo_id, revision=revision)
        there = {sibling.rfilename for sibling in found.siblings or ()}
        if strange := sorted(name for name in there - set(prepared.files) if name.endswith(_LOADED)):
            raise PushFailed(
                f"{repo_id} holds files of something else ({strange[0]}): choose another repository or branch"
            )
        operations = [CommitOperationAdd(name, content) for name, content in prepared.files.items()]
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=prepared.title,
            revision=revision,
            parent_commit=found.sha,
        )
    return Pushed(repo_id, revision, commit.oid, commit.commit_url)


def _json(described: dict[str, object]) -> bytes:
    return (json.dumps(described, indent=1) + "\n").encode()


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Turn what the hub client raises into one sentence of ours: no header and no body of a request is in it."""
    try:
        yield
    except PushFailed:
        raise
    except hub.LocalTokenNotFoundError as error:
        raise PushFailed("the hub needs a token: set HF_TOKEN, or log in with `hf auth login`") from error
    except hub.OfflineModeIsEnabled as error:
        raise PushFailed("the hub client is offline: HF_HUB_OFFLINE is set") from error
    except Exception as error:
        # The client wraps an upload's error.
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__) is not None:
            chain.append(cause)
        for found in chain:
            if isinstance(found, hub.HfHubHTTPError):
                raise PushFailed(_refusal(repo_id, found.response.status_code)) from error
            if isinstance(found, httpx2.TransportError):
                raise PushFailed(f"the hub cannot be reached ({type(found).__name__})") from error
        raise PushFailed(f"the hub client gave up: {first_line(error)}") from error


def _refusal(repo_id: str, status: int) -> str:
    match status:
        case 401:
            return "the hub does not accept the token (401): set HF_TOKEN, or log in with `hf auth login`"
        case 403:
            return f"the token may not write to {repo_id} (403)"
        case 409 | 412:
            return f"{repo_id} was changed by somebody else meanwhile ({status}): push again"
        case _:
            return f"the hub answers with status {status} for {repo_id}"
