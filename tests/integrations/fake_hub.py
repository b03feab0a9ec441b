"""A hub on loopback: as much of its interface as pushing and pulling a few files takes."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """Repositories in memory.

    Attributes:
        repos: for each name the files of its latest commit.
        created: what was sent to make each repository.
        commits: the messages of all commits.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.created: dict[str, dict[str, Any]] = {}
        self.commits: list[str] = []
        self.url = ""

    def commit_id(self, name: str) -> str:
        content = repr(sorted(self.repos[name].items())).encode()
        return hashlib.sha1(content).hexdigest()

    @contextmanager
    def serving(self) -> Iterator[Hub]:
        """Answer on a free port of 127.0.0.1 while the block runs."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = self.path.partition("?")[0].strip("/").split("/")
        if parts[1:] == ["repos", "create"]:
            asked = json.loads(data)
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.created.setdefault(name, asked)
            self.hub.repos.setdefault(name, {})
            self._send({"url": f"{self.hub.url}/{name}"})
        elif parts[1:] == ["validate-yaml"]:  # of a card
            self._send({"errors": [], "warnings": []})
        elif parts[4] == "preupload":
            files = json.loads(data)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self._send({"files": [{"path": f["path"]} | modes for f in files]})
        elif parts[4] == "commit":
            name = "/".join(parts[2:4])
            for line in data.splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    self.hub.commits.append(entry["value"]["summary"])
                elif entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.hub.repos[name][entry["value"]["path"]] = content
            commit = self.hub.commit_id(name)
            url = f"{self.hub.url}/{name}/commit/{commit}"
            self._send({"commitOid": commit, "commitUrl": url})
        else:
            self._missing()

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").split("/")
        api = parts[0] == "api"
        name = "/".join(parts[2:4] if api else parts[:2])
        files = self.hub.repos.get(name)
        if files is None:
            self._missing()
        elif api:
            siblings = [{"rfilename": path} for path in files]
            self._send({"id": name, "sha": self.hub.commit_id(name), "siblings": siblings})
        elif parts[2] == "resolve" and parts[4] in files:
            self._file(name, files[parts[4]])
        else:
            self._missing()

    do_HEAD = do_GET

    def _file(self, name: str, data: bytes) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.hub.commit_id(name))
        self._finish(data)

    def _send(self, answer: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self._finish(json.dumps(answer).encode())

    def _missing(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self._finish(b"")

    def _finish(self, data: bytes) -> None:
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
