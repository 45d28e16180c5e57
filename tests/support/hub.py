"""A stand-in for the model hub: the few HTTP endpoints that `huggingface_hub` uses to find, fetch and send files.

It serves what a test or a push puts into it and writes down every request, so that a test can claim what was not asked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import pytest
from huggingface_hub import constants


@dataclass
class Repo:
    """`files` by path. A gated repository shows its card and hides its files, as the real hub does."""

    files: dict[str, bytes]
    gated: bool = False
    branches: tuple[str, ...] = ("main",)
    private: bool = False
    others: dict[str, Repo] = field(default_factory=dict)
    """Branches that went their own way."""

    def at(self, revision: str) -> Repo | None:
        """What a branch or commit holds."""
        if revision in (*self.branches, self.commit):
            return self
        return next((r for name, r in self.others.items() if revision in (name, r.commit)), None)

    @property
    def commit(self) -> str:
        content = hashlib.sha1()
        for path, data in sorted(self.files.items()):
            content.update(path.encode() + data)
        return content.hexdigest()


@dataclass
class Hub:
    """`repos` by `owner/name` (data sets: `datasets/owner/name`); while `down`, it answers 503.

    Whoever writes needs `token`. `refusals` are statuses by the kind of request that they answer.
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    down: bool = False
    token: str = "hf_stand_in_token"
    refusals: dict[str, int] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files by their sha256."""

    def asked_for(self, suffix: str) -> list[str]:
        """Paths requested so far that end in `suffix`."""
        return [path for _, path in self.requests if path.endswith(suffix)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if self.hub.down:
            return self._refuse(503, "ServiceUnavailable")
        name = r"(?P<name>(?:datasets/)?[\w.-]+/[\w.-]+)"
        if (write := writing(self.command, path)) is not None:
            return self._write(write, body)
        if match := re.fullmatch(
            rf"/api/(?:models/)?{name}(?:/(?P<what>revision|tree|paths-info)/(?P<rest>.+))?", path
        ):
            return self._api(match["name"], match["what"], match["rest"], body)
        if match := re.fullmatch(rf"/{name}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", path):
            return self._file(match["name"], match["revision"], match["file"])
        return self._refuse(404, "RepoNotFound")

    def _api(self, name: str, what: str | None, rest: str | None, body: bytes) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._refuse(404, "RepoNotFound")
        revision, _, folder = (rest or "main").partition("/")
        private, gated, repo = repo.private, repo.gated, repo.at(revision)
        if repo is None:
            return self._refuse(404, "RevisionNotFound")
        if what in (None, "revision"):
            siblings = [{"rfilename": path} for path in repo.files]
            shown = {"id": name, "sha": repo.commit, "siblings": siblings, "gated": gated, "private": private}
            return self._json(shown)
        if repo.gated:
            return self._refuse(403, "GatedRepo")
        if what == "paths-info":
            form = parse_qs(body.decode())
            wanted = form.get("paths") or json.loads(body).get("paths", [])
            return self._json([self._entry(repo, path) for path in repo.files if path in wanted])
        prefix = f"{folder}/" if folder else ""
        below = [path for path in repo.files if path.startswith(prefix)]
        if prefix and not below:
            return self._refuse(404, "EntryNotFound", repo.commit)
        if "recursive=true" in self.path.lower():
            return self._json([self._entry(repo, path) for path in below])
        # One level: its files, and the folders that hold the rest.
        heads = {prefix + path.removeprefix(prefix).split("/")[0] for path in below}
        return self._json([self._entry(repo, path) for path in sorted(heads)])

    def _file(self, name: str, revision: str, path: str) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._refuse(404, "RepoNotFound")
        if repo.gated:
            return self._refuse(403, "GatedRepo")
        repo = repo.at(revision)
        if repo is None:
            return self._refuse(404, "RevisionNotFound")
        if path not in repo.files:
            return self._refuse(404, "EntryNotFound", repo.commit)
        data = repo.files[path]
        headers = {
            "X-Repo-Commit": repo.commit,
            "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if span is None:
            return self._send(200, data, headers)
        first, last = int(span[1]), min(int(span[2] or len(data) - 1), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return self._send(206, data[first : last + 1], headers)

    def _write(self, write: re.Match[str], body: bytes) -> None:
        kind, name = write.lastgroup or "", write.groupdict().get("name") or ""
        if kind == "object":  # a signed URL of a bucket: it takes the bytes from whoever knows it
            assert self.headers.get("Authorization") is None, "the token was sent to the store"
            assert hashlib.sha256(body).hexdigest() == write["object"], "not the file that was announced"
            self.hub.stored[write["object"]] = body
            return self._send(200, b"", {})
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._refuse(401, "")
        if (status := self.hub.refusals.get(kind)) is not None:
            return self._refuse(status, "")
        said = json.loads(body) if kind != "commit" else {}
        if kind == "create":
            created = f"{said['organization']}/{said['name']}"
            if created in self.hub.repos:
                return self._json({"error": "It exists.", "url": f"{self.hub.url}/{created}"}, status=409)
            # As the real hub, which begins every repository with this file.
            started = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}
            self.hub.repos[created] = Repo(started, private=said.get("visibility") == "private")
            return self._json({"url": f"{self.hub.url}/{created}"})
        if kind == "yaml":
            return self._json({"errors": [], "warnings": []})
        repo = self.hub.repos.get(name)
        if repo is None:
            return self._refuse(404, "RepoNotFound")
        if kind == "branch":
            if repo.at(write["branch"]) is not None:
                return self._refuse(409, "")
            repo.others[write["branch"]] = Repo(dict(repo.files))
            return self._json({})
        if kind == "batch":
            return self._json({"objects": [self._action(entry) for entry in said["objects"]]})
        target = repo.at(write[kind])
        if target is None:
            return self._refuse(404, "RevisionNotFound")
        if kind == "preupload":
            return self._json({"files": [_mode(target, entry["path"]) for entry in said["files"]]})
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, target.commit):
            return self._refuse(412, "")
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                target.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                target.files[value["path"]] = self.hub.stored[value["oid"]]
        self.hub.commits.append({"repo": name, "revision": write["commit"], **header})
        url = f"{self.hub.url}/{name}/commit/{target.commit}"
        return self._json({"commitUrl": url, "commitOid": target.commit})

    def _action(self, entry: dict[str, Any]) -> dict[str, Any]:
        if entry["oid"] in self.hub.stored:
            return entry
        href = f"{self.hub.url}/store/{entry['oid']}"
        return {**entry, "actions": {"upload": {"href": href, "header": {}}}}

    @staticmethod
    def _entry(repo: Repo, path: str) -> dict[str, Any]:
        if path not in repo.files:
            return {
                "type": "directory",
                "path": path,
                "size": 0,
                "oid": hashlib.sha1(path.encode()).hexdigest(),
            }
        data = repo.files[path]
        return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _json(self, value: object, *, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, commit: str | None = None) -> None:
        self._send(status, b"", {"X-Error-Code": code} | ({"X-Repo-Commit": commit} if commit else {}))

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
_WRITES = (
    ("POST", r"/api/repos/(?P<create>create)"),
    ("POST", r"/api/(?P<yaml>validate-yaml)"),
    ("POST", rf"/api/models/{_NAME}/branch/(?P<branch>[^/]+)"),
    ("POST", rf"/api/models/{_NAME}/preupload/(?P<preupload>[^/]+)"),
    ("POST", rf"/api/models/{_NAME}/commit/(?P<commit>[^/]+)"),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/(?P<batch>batch)"),
    ("PUT", r"/store/(?P<object>[0-9a-f]{64})"),
)


def writing(method: str, path: str) -> re.Match[str] | None:
    """The request that changes the hub, by its last group; None for one that reads."""
    matches = (re.fullmatch(pattern, path) for verb, pattern in _WRITES if verb == method)
    return next((match for match in matches if match is not None), None)


def _mode(repo: Repo, path: str) -> dict[str, Any]:
    """How a file is to be sent, and the id of what is there under its name."""
    large = path.endswith(".safetensors")
    data = repo.files.get(path)
    oid = None
    if data is not None:
        blob = b"blob %d\0" % len(data) + data
        oid = hashlib.sha256(data).hexdigest() if large else hashlib.sha1(blob).hexdigest()
    return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}


@contextmanager
def serve_hub(patch: pytest.MonkeyPatch, cache: Path) -> Iterator[Hub]:
    """A hub on a free port, taken for the real one until `patch` is undone; downloads go to `cache`."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_port}"
        patch.setattr(constants, "ENDPOINT", hub.url)
        files = "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + files)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        # Files go by the LFS protocol: that of Xet is a second store's.
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        # `datasets` has copies of its own, and asks a second server for exports unless told not to.
        patch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        patch.setattr(
            datasets.config,
            "HUB_DATASETS_URL",
            f"{hub.url}/datasets/{{repo_id}}/resolve/{{revision}}/{{path}}",
        )
        patch.setattr(datasets.config, "USE_PARQUET_EXPORT", False)
        # No test may read or fill the caches of whoever runs it.
        patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache / "datasets"))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
