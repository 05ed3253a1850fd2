"""A loopback stand-in of the Hub's HTTP API: what huggingface_hub asks for when it reads and when it pushes.

Reached through HF_ENDPOINT (with HF_HUB_DISABLE_XET=1: uploads then go the LFS way). A commit is one request, as on
the Hub; what was uploaded before it is not public. Faults are laid in the way with `fail`.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

TOKEN = "hf_" + "GoodTokenForTheStandIn0123456789ab"


@dataclass
class Repo:
    """One repository: its files, its commits (message, paths), and who may see it."""

    kind: str
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)
    private: bool = False
    gated: bool = False

    @property
    def sha(self) -> str:
        return hashlib.sha1(str((len(self.commits), sorted(self.files))).encode()).hexdigest()


@dataclass
class Fault:
    """What goes wrong with requests like METHOD /path, and how often."""

    pattern: str
    how: str
    """a status ("503"), or "break" (the connection ends after half of the request), "lose" (done, but the answer is lost)"""
    times: int
    headers: dict[str, str]


class HubStandIn:
    """The server; `with HubStandIn() as hub` starts it on a free port of the loopback interface."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.may_write = True
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, name, files, *, kind="models", **more):
        """Put a repository there: {path: bytes}."""
        self.repos[kind, name] = Repo(
            kind, dict(files), [("initial commit", sorted(files))], **more
        )

    def fail(self, pattern, how, *, times=1, **headers):
        """Let the next `times` requests that match `pattern` ("PUT /lfs/...") fail."""
        self.faults.append(
            Fault(pattern, str(how), times, {k.replace("_", "-"): v for k, v in headers.items()})
        )

    def reset(self) -> None:
        """Forget faults and requests, and everything that was pushed."""
        self.faults.clear()
        self.requests.clear()
        self.blobs.clear()
        self.may_write = True
        for key in [key for key in self.repos if key[1].startswith("me/")]:
            del self.repos[key]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStandIn

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        url = urlparse(self.path)
        self.path_only, self.query = unquote(url.path), parse_qs(url.query)
        line = f"{self.command} {self.path_only}"
        self.hub.requests.append(line)
        fault = next((f for f in self.hub.faults if f.times and re.search(f.pattern, line)), None)
        if fault is not None:
            fault.times -= 1
            if fault.how == "break":
                return self._break()
        self.body = self._read_body()
        if fault is not None and fault.how != "lose":
            return self._send(
                int(fault.how), {"error": f"made to fail with {fault.how}"}, **fault.headers
            )
        self.lose = fault is not None
        for pattern, method in ROUTES:
            found = re.fullmatch(pattern, line)
            if found:
                return getattr(self, method)(**found.groupdict())
        self._send(404, {"error": f"no such route: {line}"})

    def _read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _break(self) -> None:
        """Read half of what comes and end the connection with a reset."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _send(self, status: int, content=b"", **headers) -> None:
        if getattr(self, "lose", False):
            return self._break_now()
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers.setdefault("Content-Type", "application/json")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _break_now(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    # --- who asks

    def _token(self):
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _repo(self, kind: str, name: str):
        """Return the repository, or answer as the Hub does where it may not be seen."""
        token = self._token()
        if token is not None and token != TOKEN:
            self._send(
                401,
                {"error": "Invalid username or password."},
                X_Error_Message="Invalid credentials in Authorization header",
            )
            return None
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and token != TOKEN):
            self._send(
                404 if token else 401,
                {"error": "Repository not found"},
                X_Error_Code="RepoNotFound",
                X_Error_Message="Repository not found",
            )
            return None
        return repo

    # --- reading

    def whoami(self):
        if self._token() != TOKEN:
            return self._send(
                401,
                {"error": "Invalid credentials"},
                X_Error_Message="Invalid credentials in Authorization header",
            )
        self._send(200, {"type": "user", "name": "me", "auth": {"type": "access_token"}})

    def info(self, kind, name, revision=None):
        repo = self._repo(kind, name)
        if repo is None:
            return
        if revision not in (None, "main", repo.sha):
            return self._send(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        siblings = [{"rfilename": path} for path in sorted(repo.files)]
        answer = {"id": name, "sha": repo.sha, "private": repo.private, "gated": "manual" if repo.gated else False,
                  "siblings": siblings, "tags": [], "downloads": 0, "likes": 0, "lastModified": "2026-11-23T00:00:00.000Z"}  # fmt: skip
        if kind == "models":
            answer["modelId"] = name
        self._send(200, answer)

    def tree(self, kind, name, revision, folder=""):
        repo = self._repo(kind, name)
        if repo is None:
            return
        folder = (folder or "").strip("/")
        inside = [
            path for path in sorted(repo.files) if not folder or path.startswith(folder + "/")
        ]
        if folder and not inside:
            return self._send(404, {"error": "not found"}, X_Error_Code="EntryNotFound")
        self._send(200, [_entry(path, repo.files[path]) for path in inside])

    def paths_info(self, kind, name, revision):
        repo = self._repo(kind, name)
        if repo is None:
            return
        wanted = json.loads(self.body or b"{}").get("paths", [])
        self._send(200, [_entry(path, repo.files[path]) for path in wanted if path in repo.files])

    def resolve(self, name, revision, path, kind):
        repo = self._repo("datasets" if kind else "models", name)
        if repo is None:
            return
        if repo.gated:
            return self._send(
                403 if self._token() else 401,
                {"error": "gated"},
                X_Error_Code="GatedRepo",
                X_Error_Message="Access to this repository is restricted.",
            )
        content = repo.files.get(path)
        if content is None:
            return self._send(
                404,
                {"error": "Entry not found"},
                X_Error_Code="EntryNotFound",
                X_Repo_Commit=repo.sha,
            )
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X_Repo_Commit": repo.sha,
            "Accept_Ranges": "bytes",
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self._send(200, content, **headers)
        first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(206, content[first : last + 1], **headers)

    # --- pushing

    def create(self):
        if self._token() != TOKEN:
            return self._send(
                401,
                {"error": "Invalid username or password."},
                X_Error_Message="Invalid credentials in Authorization header",
            )
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not name.startswith("me/") or not self.hub.may_write:
            return self._send(
                403,
                {"error": "no right"},
                X_Error_Message="You don't have the rights to create a model under this namespace",
            )
        if ("models", name) in self.hub.repos:
            return self._send(
                409,
                {
                    "error": "You already created this model repo",
                    "url": f"{self.hub.endpoint}/{name}",
                },
            )
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos["models", name] = Repo("models", private=private)
        self._send(200, {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name})

    def validate_yaml(self):
        self._send(200, {"errors": [], "warnings": []})

    def preupload(self, kind, name, revision):
        repo = self._repo(kind, name)
        if repo is None:
            return
        answer = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith((".safetensors", ".gguf")) or file["size"] > 10_000_000
            known = repo.files.get(file["path"])
            oid = (
                None
                if known is None
                else hashlib.sha256(known).hexdigest()
                if large
                else _git_oid(known)
            )
            answer.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": oid,
                }
            )
        self._send(200, {"files": answer})

    def lfs_batch(self, name):
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}", "header": {}}
                }
            objects.append(entry)
        self._send(
            200,
            {"transfer": "basic", "objects": objects},
            Content_Type="application/vnd.git-lfs+json",
        )

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._send(400, {"error": "the content has another hash"})
        self.hub.blobs[oid] = self.body
        self._send(200)

    def commit(self, kind, name, revision):
        repo = self._repo(kind, name)
        if repo is None:
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        files: dict[str, bytes] = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile" and value["oid"] in self.hub.blobs:
                files[value["path"]] = self.hub.blobs[value["oid"]]
            else:
                return self._send(
                    400, {"error": f"cannot commit {line['key']} {value.get('path')}"}
                )
        repo.files.update(files)
        repo.commits.append((lines[0]["value"]["summary"], sorted(files)))
        self._send(
            200,
            {
                "success": True,
                "commitOid": repo.sha,
                "commitUrl": f"{self.hub.endpoint}/{name}/commit/{repo.sha}",
            },
        )


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
    if path.endswith((".safetensors", ".gguf", ".parquet")):
        entry["lfs"] = {
            "oid": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "pointerSize": 134,
        }
    return entry


_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
ROUTES = [
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate_yaml"),
    (rf"GET /api/(?P<kind>models|datasets)/{_NAME}", "info"),
    (rf"GET /api/(?P<kind>models|datasets)/{_NAME}/revision/(?P<revision>[^/]+)", "info"),
    (
        rf"GET /api/(?P<kind>models|datasets)/{_NAME}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?",
        "tree",
    ),
    (rf"POST /api/(?P<kind>models|datasets)/{_NAME}/paths-info/(?P<revision>[^/]+)", "paths_info"),
    (rf"POST /api/(?P<kind>models|datasets)/{_NAME}/preupload/(?P<revision>[^/]+)", "preupload"),
    (rf"POST /api/(?P<kind>models|datasets)/{_NAME}/commit/(?P<revision>[^/]+)", "commit"),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", "lfs_batch"),
    (r"PUT /lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
    (
        rf"(?:GET|HEAD) /(?P<kind>datasets/)?{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        "resolve",
    ),
]
