"""A stand-in for the Hugging Face Hub: an HTTP server with the answers that huggingface_hub needs.

Repositories are folders; a revision is a commit, ``main`` or a tag. Uploads are kept in memory.
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
from unittest import mock


@dataclass
class Hub:
    """What the server has and what it was asked.

    Attributes:
        repos: name -> commit -> folder; the last commit is ``main``.
        tags: (name, tag) -> commit.
        gated: names whose files need a login.
        requests: ``"GET /api/models/..."`` in order.
        uploads: name -> path -> contents, of commits that were made.
        created: the bodies of requests that create a repository.
    """

    repos: dict[str, dict[str, Path]] = field(default_factory=dict)
    tags: dict[tuple[str, str], str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    uploads: dict[str, dict[str, bytes]] = field(default_factory=dict)
    created: list[dict] = field(default_factory=list)
    token: str | None = None  # required for uploads
    address: str = ""

    def commit_of(self, repo: str, revision: str) -> str | None:
        commits = self.repos[repo]
        if revision == "main":
            return list(commits)[-1]
        revision = self.tags.get((repo, revision), revision)
        return revision if revision in commits else None

    def downloads(self) -> list[str]:
        """The names of the files that were downloaded."""
        found = (re.match(r"GET .*/resolve/[^/]+/(.*)", request) for request in self.requests)
        return [match[1] for match in found if match]


def commit(number: int) -> str:
    """A commit hash."""
    return hashlib.sha1(str(number).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, data: object, status: int = 200) -> None:
        self._send(status, json.dumps(data).encode(), Content_Type="application/json")

    def _fail(self, status: int, code: str) -> None:
        self._send(status, b"{}", X_Error_Code=code, X_Error_Message=code)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.path == "/api/whoami-v2":
            return self._json({"name": "me", "type": "user", "auth": {}})
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^?]+))?(\?.*)?", self.path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        match = api or file
        if match is None or match[1] not in self.hub.repos:
            return self._fail(401, "RepoNotFound")
        sha = self.hub.commit_of(match[1], match[2] or "main")
        if sha is None:
            return self._fail(404, "RevisionNotFound")
        folder = self.hub.repos[match[1]][sha]
        if api:
            names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*"))
            siblings = [{"rfilename": name} for name in names]
            return self._json({"id": match[1], "sha": sha, "siblings": siblings, "private": False})
        if match[1] in self.hub.gated:
            return self._fail(403, "GatedRepo")
        path = folder / match[3]
        if not path.is_file():
            return self._fail(404, "EntryNotFound")
        contents = path.read_bytes()
        etag = f'"{hashlib.sha256(contents).hexdigest()}"'
        self._send(200, contents, ETag=etag, X_Repo_Commit=sha)

    def do_PUT(self) -> None:
        self.hub.requests.append(f"PUT {self.path}")
        self.hub.uploads.setdefault("", {})[self.path.rpartition("/")[2]] = self._body()
        self._send(200)

    def do_POST(self) -> None:
        self.hub.requests.append(f"POST {self.path}")
        body = self._body()
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._fail(401, "")
        if self.path == "/api/repos/create":
            self.hub.created.append(json.loads(body))
            return self._json({"url": f"{self.hub.address}/me/repo"})
        if self.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in files
            ]
            return self._json({"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            href = f"{self.hub.address}/lfs/"
            objects = [
                {**item, "actions": {"upload": {"href": href + item["oid"]}}}
                for item in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            repo = re.match(r"/api/models/([^/]+/[^/]+)/commit/", self.path)[1]
            large = self.hub.uploads.pop("", {})
            files = self.hub.uploads.setdefault(repo, {})
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = large[value["oid"]]
            url = f"{self.hub.address}/{repo}/commit/{commit(1)}"
            return self._json({"success": True, "commitOid": commit(1), "commitUrl": url})
        self._send(404)


@contextmanager
def serve() -> Iterator[Hub]:
    """Run the server; ``HF_ENDPOINT`` for child processes is the hub's ``address``."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def connected(address: str, cache: Path, offline: bool = False) -> Iterator[None]:
    """Let huggingface_hub in this process use a server and an empty cache."""
    from huggingface_hub import constants

    values = {
        "ENDPOINT": address,
        "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": offline,
        "HF_HUB_DISABLE_XET": True,
        "HF_TOKEN_PATH": str(cache / "token"),
    }
    # versions before 0.30 have no HF_HUB_DISABLE_XET
    values = {name: value for name, value in values.items() if hasattr(constants, name)}
    with mock.patch.multiple(constants, **values):
        yield
