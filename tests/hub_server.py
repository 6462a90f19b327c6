"""A stand-in of the hub's HTTP interface on 127.0.0.1, with faults to order.

It answers what a client of huggingface_hub's cache protocol asks: the listing of a revision with
sizes and hashes, and the files with HEAD, ETag, redirect to a "CDN" path and byte ranges.
"""

import hashlib
import json
import re
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Fault:
    """How the next requests of one file go wrong; each list is used up from the left.

    Attributes:
        cut_after: Close the connection after this many bytes of the body.
        status: Answer with this status; 200 means go on normally.
        flip: Serve the body with its first byte changed.
        ignore_range: Always answer 200 with the whole file.
        wrong_length: Announce and send this many bytes more than the listing says.
        stall_s: Wait this long before the first byte.
    """

    cut_after: list[int] = field(default_factory=list)
    status: list[int] = field(default_factory=list)
    flip: list[bool] = field(default_factory=list)
    ignore_range: bool = False
    wrong_length: int = 0
    stall_s: list[float] = field(default_factory=list)


class HubServer:
    """Serves repositories given as {repo id: {file name: bytes}}; use it as a context manager."""

    def __init__(self, repos: dict[str, dict[str, bytes]]) -> None:
        self.repos = repos
        self.faults: dict[str, Fault] = defaultdict(Fault)  # by file name; "" is the listing
        self.token: str | None = None  # where set, every request needs it
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers
        server = self

        class Handler(_Handler):
            hub = server

        self._http = _QuietServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.01}
        )
        port = self._http.server_address[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        self.cdn = f"http://localhost:{port}"  # another host to a client, as the hub's CDN is

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def listing(self, repo: str) -> dict:
        """What /api/models/REPO/revision/main?blobs=true answers; large files are .safetensors."""
        siblings = []
        for name, data in self.repos[repo].items():
            entry = {"rfilename": name, "size": len(data), "blobId": git_sha1(data)}
            if name.endswith(".safetensors"):
                entry["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return {"id": repo, "sha": COMMIT, "siblings": siblings}

    def gets(self, name: str) -> list[str | None]:
        """The Range headers of the GET requests that reached the bytes of a file."""
        return [
            headers.get("range")
            for method, path, headers in self.requests
            if method == "GET" and path.startswith("/cdn/") and path.endswith("/" + name)
        ]


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing when a client hangs up: half of the tests make it do so."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.hub.requests.append((self.command, path, headers))
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            if not path.startswith("/cdn/"):
                return self._plain(401, {"X-Error-Code": "GatedRepo"})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", path):
            return self._listing(*match.groups())
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*match.groups())
        if match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.+)", path):
            return self._file(*match.groups())
        return self._plain(404, {})

    def _listing(self, repo: str, revision: str) -> None:
        fault = self.hub.faults[""]
        if fault.status and (status := fault.status.pop(0)) != 200:
            return self._plain(status, {})
        if repo not in self.hub.repos:
            return self._plain(404, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", COMMIT):
            return self._plain(404, {"X-Error-Code": "RevisionNotFound"})
        return self._plain(200, {}, json.dumps(self.hub.listing(repo)).encode())

    def _resolve(self, repo: str, commit: str, name: str) -> None:
        data = self.hub.repos.get(repo, {}).get(name)
        if data is None or commit not in ("main", COMMIT):
            return self._plain(404, {"X-Error-Code": "EntryNotFound"})
        large = name.endswith(".safetensors")
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{git_sha1(data)}"',
            "Location": f"{self.hub.cdn}/cdn/{repo}/{name}",
        }
        if large:
            headers |= {"X-Linked-ETag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
        return self._plain(302, headers)

    def _file(self, repo: str, name: str) -> None:
        fault, data = self.hub.faults[name], self.hub.repos[repo][name]
        if fault.status and (status := fault.status.pop(0)) != 200:
            return self._plain(status, {})
        if fault.stall_s:
            time.sleep(fault.stall_s.pop(0))
        if fault.flip and fault.flip.pop(0):
            data = bytes([data[0] ^ 1]) + data[1:]
        data += b"x" * fault.wrong_length
        start = 0
        if (wanted := self.headers.get("Range")) and not fault.ignore_range:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if wanted and not fault.ignore_range else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{sha256(data)}"')
        if wanted and not fault.ignore_range:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        body = data[start:]
        if fault.cut_after:
            body = body[: fault.cut_after.pop(0)]
            self.close_connection = True
        try:
            self.wfile.write(body)
        except OSError:  # the client gave up: its right
            self.close_connection = True

    def _plain(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
