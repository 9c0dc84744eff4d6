"""A Hugging Face Hub on loopback: models only, in memory, spoken to by the real huggingface_hub client over HTTP.

Large files lie on another origin (`localhost` beside 127.0.0.1) that refuses the token, as the Hub's storage does.
"""

import base64
import hashlib
import json
import re
import secrets
import time
from pathlib import Path
from urllib.parse import parse_qs

import yaml
from loopback_accounts import Accounts, named_by
from loopback_cas import TOKEN, LocalCas
from loopback_repository import Commit, File, Repository, card_metadata, is_large
from loopback_server import Answer, Call, Refused, ranged, route

_MODEL_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


class LoopbackHub(Accounts):
    """A Hub whose `requests` are recorded, which can be let `fail`, and whose repositories can be seen and filled.

    Args:
        folder: for what Xet uploads, and for the caches of the `environment` that points another process to this Hub.
        transport: of large files, "lfs" or "xet".

    While `storage_full` is set, uploads of large files fail, over either transport.
    """

    def __init__(self, folder: Path, transport: str = "lfs"):
        super().__init__()
        self.folder, self.transport = folder, transport
        self.storage_full = False
        self._storage = f"http://localhost:{self.port}/storage"
        self._signature = secrets.token_hex(8)
        self._large: dict[str, bytes] = {}  # by sha256
        self.environment = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_CACHE": str(folder / "cache"),
            "HF_TOKEN": self.token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": str(int(transport != "xet")),
        }

    def put(
        self,
        repo_id: str,
        content: dict[str, bytes] | str | Path,
        revision: str = "main",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Add files, or those of a folder, to a branch in one commit, without HTTP.

        A repository that does not exist is made, `private` or `gated`.

        Returns:
            the commit.
        """
        if not isinstance(content, dict):
            root = Path(content)
            paths = [path for path in root.rglob("*") if path.is_file()]
            content = {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}
        with self.lock:
            repository = self.repositories.setdefault(repo_id, Repository(repo_id, private, gated))
            ref = repository.branch(revision)
            files = {path: self._stored(repository, path, data) for path, data in content.items()}
            parent = repository.resolve(ref)
            files = repository.commits[parent].files | files
            return repository.commit(ref, Commit(parent, files, repository.owner, "put"))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The content of all files, but for the `.gitattributes` that every repository begins with."""
        with self.lock:
            repository = self.repositories[repo_id]
            files = repository.commits[repository.resolve(revision)].files
            return {path: self._content(repository, file) for path, file in files.items() if path != ".gitattributes"}

    @route("GET", "/api/agent-harnesses")
    def _agent_harnesses(self, call: Call) -> Answer:
        """The client asks once per process, to say which agent runs it."""
        return Answer({"standardEnvVars": [], "harnesses": {}})

    @route("GET", "/api/models/ID(?:/revision/REV)?")
    def _info(self, call: Call, repo_id: str, revision: str | None) -> Answer:
        repository = self._visible(call, repo_id)
        oid = named_by(repository.resolve, revision or "main")
        commit = repository.commits[oid]
        card, siblings = commit.card, []
        for path, file in sorted(commit.files.items()):
            details = {"size": file.size, "blobId": file.oid}
            if file.sha256:
                details["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": len(file.pointer)}
            siblings.append({"rfilename": path} | (details if "blobs" in call.query else {}))
        info = {"id": repo_id, "modelId": repo_id, "author": repository.owner, "sha": oid, "lastModified": commit.date}
        info |= {"private": repository.private, "gated": repository.gated, "disabled": False, "siblings": siblings}
        info |= {"cardData": card, "tags": card.get("tags", [])}
        info |= {name: card[name] for name in ("library_name", "pipeline_tag") if name in card}
        return Answer(info)

    @route("GET", "/api/models/ID/tree/REV(?:/PATH)?")
    def _tree(self, call: Call, repo_id: str, revision: str, folder: str | None) -> Answer:
        repository = self._readable(call, repo_id)
        oid = named_by(repository.resolve, revision)
        recursive = call.query.get("recursive", [""])[0].lower() in ("true", "1")
        prefix = f"{folder}/" if folder else ""
        folders, files = set(), []
        for path, file in sorted(repository.commits[oid].files.items()):
            if not path.startswith(prefix):
                continue
            below = path.removeprefix(prefix).split("/")[:-1]
            depths = range(1, len(below) + 1) if recursive else range(1, 2)
            folders |= {prefix + "/".join(below[:depth]) for depth in depths if below}
            if recursive or not below:
                files.append(file.listed(path))
        if folder and not folders and not files:
            raise _no_entry(folder, oid)
        return Answer([{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)] + files)

    @route("POST", "/api/models/ID/paths-info/REV")
    def _paths_info(self, call: Call, repo_id: str, revision: str) -> Answer:
        repository = self._readable(call, repo_id)
        files = repository.commits[named_by(repository.resolve, revision)].files
        asked = parse_qs(call.body.decode()).get("paths", [])
        return Answer([files[path].listed(path) for path in asked if path in files])

    @route("GET", "/api/models/ID/refs")
    def _refs(self, call: Call, repo_id: str) -> Answer:
        repository = self._visible(call, repo_id)
        refs = {"branches": repository.named("heads"), "tags": repository.named("tags"), "converts": []}
        return Answer(refs | ({"pullRequests": repository.named("pr")} if "include_prs" in call.query else {}))

    @route("POST DELETE", "/api/models/ID/branch/REV")
    def _branch(self, call: Call, repo_id: str, name: str) -> Answer:
        return self._change_ref(call, repo_id, f"refs/heads/{name}", call.json().get("startingPoint") or "main")

    @route("POST DELETE", "/api/models/ID/tag/REV")
    def _tag(self, call: Call, repo_id: str, name_or_start: str) -> Answer:
        name = call.json()["tag"] if call.method == "POST" else name_or_start
        return self._change_ref(call, repo_id, f"refs/tags/{name}", name_or_start)

    @route("GET", "/api/models/ID/commits/REV")
    def _commits(self, call: Call, repo_id: str, revision: str) -> Answer:
        repository = self._visible(call, repo_id)
        return Answer(
            [
                {"id": oid, "title": commit.title, "message": commit.message, "date": commit.date}
                | {"authors": [{"user": commit.author}]}
                for oid, commit in repository.history(named_by(repository.resolve, revision))
            ]
        )

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, call: Call) -> Answer:
        """Of all the Hub's rules, those that a reward's card could break: the syntax, and ids of base models."""
        try:
            metadata, problem = card_metadata(call.json()["content"]), None
        except yaml.YAMLError as error:
            metadata, problem = {}, f"Invalid YAML: {error}"
        bases = metadata.get("base_model") or []
        for base in [bases] if isinstance(bases, str) else bases:
            if not _MODEL_ID.fullmatch(base):
                problem = f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.'
        if problem and call.headers.get("accept") == "text/plain":  # so asks ModelCard.validate
            return Answer(problem.encode(), 400)
        return Answer({"errors": [{"message": problem}] if problem else [], "warnings": []}, 400 if problem else 200)

    @route("POST", "/api/models/ID/preupload/REV")
    def _preupload(self, call: Call, repo_id: str, revision: str) -> Answer:
        repository = self._pushable(call, repo_id, revision)
        known = repository.commits[named_by(repository.resolve, revision)].files
        files = []
        for file in call.json()["files"]:
            path = file["path"]
            mode = "lfs" if is_large(path, file["size"]) else "regular"
            oid = {"oid": known[path].sha256 or known[path].oid} if path in known else {}
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | oid)
        return Answer({"files": files})

    @route("POST", "/api/models/ID/commit/REV")
    def _commit(self, call: Call, repo_id: str, revision: str) -> Answer:
        repository = self._pushable(call, repo_id, revision)
        parent = named_by(repository.resolve, revision)
        header, *operations = (json.loads(line) for line in call.body.splitlines() if line)
        header, files = header["value"], dict(repository.commits[parent].files)
        expected = header.get("parentCommit")
        if expected and not parent.startswith(expected):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        for operation in operations:
            self._apply(operation["key"], operation["value"], repository, files)
        commit = Commit(parent, files, self._logged_in(call)[0], header["summary"], header.get("description", ""))
        answer, ref = {}, None
        if "create_pr" in call.query:
            number = repository.propose(parent, commit.author, commit.title)
            answer, ref = {"pullRequestUrl": f"{self.endpoint}/{repo_id}/discussions/{number}"}, f"refs/pr/{number}"
        oid = repository.commit(ref or named_by(repository.branch, revision), commit)
        return Answer(answer | {"commitOid": oid, "commitUrl": f"{self.endpoint}/{repo_id}/commit/{oid}"})

    @route("POST", "/api/models/ID/discussions")
    def _open_pull_request(self, call: Call, repo_id: str) -> Answer:
        repository = self._uploadable(call, repo_id)
        author, _ = self._logged_in(call)
        return Answer({"num": repository.propose(repository.resolve("main"), author, call.json()["title"])})

    @route("GET", r"/api/models/ID/discussions/(\d+)")
    def _pull_request(self, call: Call, repo_id: str, number: str) -> Answer:
        proposal = self._visible(call, repo_id).proposals[f"refs/pr/{number}"]
        about = {"title": proposal.title, "num": int(number), "author": {"name": proposal.author}, "status": "draft"}
        about |= {"createdAt": proposal.date, "repo": {"name": repo_id, "type": "model"}, "isPullRequest": True}
        return Answer(about | {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "events": []})

    @route("POST", r"/ID\.git/info/lfs/objects/batch")
    def _lfs_batch(self, call: Call, repo_id: str) -> Answer:
        self._uploadable(call, repo_id)
        objects = []
        for wanted in call.json()["objects"]:
            upload = {"href": f"{self._storage}/{wanted['oid']}?signature={self._signature}"}
            verify = {"href": f"{self.endpoint}/{repo_id}.git/info/lfs/objects/verify"}
            actions = {} if wanted["oid"] in self._large else {"actions": {"upload": upload, "verify": verify}}
            objects.append({"oid": wanted["oid"], "size": wanted["size"]} | actions)
        return Answer({"transfer": "basic", "objects": objects})

    @route("POST", r"/ID\.git/info/lfs/objects/verify")
    def _lfs_verify(self, call: Call, repo_id: str) -> Answer:
        self._uploadable(call, repo_id)
        uploaded = call.json()
        if len(self._large.get(uploaded["oid"], b"")) != uploaded["size"]:
            raise Refused(404, f"{uploaded['oid']} is not stored with this size")
        return Answer({})

    @route("GET", "/api/models/ID/xet-(read|write)-token/REV")
    def _xet_token(self, call: Call, repo_id: str, right: str, revision: str) -> Answer:
        if self.transport != "xet":
            raise Refused(404, "This Hub has no Xet storage")
        if right == "read":
            url = self._cas(self._readable(call, repo_id)).url
        else:
            url = self._cas(self._pushable(call, repo_id, revision)).url
            if self.storage_full:
                url = LocalCas(Path("/dev/null/full")).url  # where no folder can be made
        expires = int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": TOKEN, "X-Xet-Token-Expiration": str(expires)}
        return Answer({"casUrl": url, "accessToken": TOKEN, "exp": expires}, headers=headers)

    @route("PUT GET HEAD", "/storage/([0-9a-f]{64})")
    def _store(self, call: Call, sha256: str) -> Answer:
        if call.query.get("signature") != [self._signature] or "authorization" in call.headers:
            raise Refused(403, "Storage takes signed addresses and no other credentials")
        if call.method != "PUT":
            return ranged(call, self._large[sha256], {"ETag": f'"{sha256}"'})
        if self.storage_full:
            raise Refused(507, "Insufficient storage")
        if hashlib.sha256(call.body).hexdigest() != sha256:
            raise Refused(400, "BadDigest")
        self._large[sha256] = call.body
        return Answer()

    @route("GET HEAD", "/ID/resolve/REV/PATH")
    def _resolve(self, call: Call, repo_id: str, revision: str, path: str) -> Answer:
        repository = self._readable(call, repo_id)
        oid = named_by(repository.resolve, revision)
        file = repository.commits[oid].files.get(path)
        if file is None:
            raise _no_entry(path, oid)
        headers = {"X-Repo-Commit": oid, "ETag": f'"{file.oid}"'}
        if file.sha256 is None:
            return ranged(call, file.content, headers)
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        headers["Location"] = f"{self._storage}/{file.sha256}?signature={self._signature}"
        if file.xet_hash:
            token_url = f"{self.endpoint}/api/models/{repo_id}/xet-read-token/{oid}"
            headers |= {"X-Xet-Hash": file.xet_hash, "Link": f'<{token_url}>; rel="xet-auth"'}
        return Answer(b"Found. Redirecting", 302, headers)

    def _change_ref(self, call: Call, repo_id: str, ref: str, start: str) -> Answer:
        repository = self._writable(call, repo_id)
        if call.method == "DELETE":
            named_by(repository.resolve, ref)
            del repository.refs[ref]
            return Answer()
        if ref in repository.refs:
            raise Refused(409, f"Reference already exists: {ref}")
        repository.refs[ref] = named_by(repository.resolve, start)
        return Answer(status=201)

    def _apply(self, kind: str, change: dict, repository: Repository, files: dict[str, File]):
        """One line of a commit, after its header."""
        path = change["path"]
        if kind == "file":
            content = base64.b64decode(change["content"])
            files[path] = File(len(content), content)
        elif kind == "lfsFile":
            files[path] = self._uploaded(repository, change["oid"])
        elif kind == "deletedFile":
            if files.pop(path, None) is None:
                raise Refused(404, f"There is no {path}", "EntryNotFound")
        elif kind == "deletedFolder":
            for inside in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[inside]
        else:
            raise NotImplementedError(kind)

    def _uploaded(self, repository: Repository, sha256: str) -> File:
        if sha256 in self._large:
            return File(len(self._large[sha256]), sha256=sha256)
        found = self._cas(repository).find(sha256) if self.transport == "xet" else None
        if found is None:
            raise Refused(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        return File(found[1], sha256=sha256, xet_hash=found[0])

    def _stored(self, repository: Repository, path: str, content: bytes) -> File:
        if not is_large(path, len(content)):
            return File(len(content), content)
        sha256 = hashlib.sha256(content).hexdigest()
        if self.transport == "xet":
            self._cas(repository).write(content)
        else:
            self._large[sha256] = content
        return self._uploaded(repository, sha256)

    def _content(self, repository: Repository, file: File) -> bytes:
        if file.sha256 is None:
            return file.content
        return self._cas(repository).read(file.sha256) if file.xet_hash else self._large[file.sha256]

    def _cas(self, repository: Repository) -> LocalCas:
        return LocalCas(self.folder / "xet" / repository.id)


def _no_entry(path: str, commit: str) -> Refused:
    return Refused(404, f"{path} does not exist", "EntryNotFound", {"X-Repo-Commit": commit})
