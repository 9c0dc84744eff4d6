"""A model repository of the loopback Hub: files, commits and what points at them, without HTTP."""

import hashlib
import re
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timezone

import yaml

MAIN = "refs/heads/main"
_LARGE_NAME = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|onnx|gguf|npz|zip|pkl|parquet)$|(^|/)tokenizer\.json$")
_LARGE_SIZE = 10_000_000
_COMMIT = re.compile(r"[0-9a-f]{5,40}")
_CARD_METADATA = re.compile(r"\s*---\r?\n(.*?)\n---", re.DOTALL)
_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n"


def is_large(path: str, size: int) -> bool:
    """Whether the Hub keeps a file outside git, as LFS or Xet."""
    return size > _LARGE_SIZE or _LARGE_NAME.search(path) is not None


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def card_metadata(card: str) -> dict:
    match = _CARD_METADATA.match(card)
    return (yaml.safe_load(match[1]) or {}) if match else {}


@dataclass
class File:
    """A file of one commit. A large one is known by its `sha256`, and its content (None here) lies in a store."""

    size: int
    content: bytes | None = None
    sha256: str | None = None
    xet_hash: str | None = None

    @property
    def pointer(self) -> bytes:
        """What git keeps of a large file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def oid(self) -> str:
        """The hash that git gives it."""
        content = self.content if self.sha256 is None else self.pointer
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def listed(self, path: str) -> dict:
        """As the Hub lists it."""
        entry = {"type": "file", "path": path, "oid": self.oid, "size": self.size}
        if self.sha256:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": len(self.pointer)}
        return entry | ({"xetHash": self.xet_hash} if self.xet_hash else {})


@dataclass
class Commit:
    parent: str | None
    files: dict[str, File]
    author: str
    title: str
    message: str = ""
    date: str = field(default_factory=_now)

    @property
    def card(self) -> dict:
        """What its model card says in YAML."""
        readme = self.files.get("README.md")
        return card_metadata(readme.content.decode()) if readme else {}


@dataclass
class Proposal:
    """A pull request."""

    author: str
    title: str
    date: str = field(default_factory=_now)


class Repository:
    """Commits by hash, and `refs` (refs/heads/main, refs/tags/v1, refs/pr/1) that name some of them."""

    def __init__(self, repo_id: str, private: bool = False, gated: bool = False):
        self.id, self.private, self.gated = repo_id, private, gated
        self.owner = repo_id.partition("/")[0]
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.proposals: dict[str, Proposal] = {}  # by their refs
        first = File(len(_ATTRIBUTES), _ATTRIBUTES)
        self.commit(MAIN, Commit(None, {".gitattributes": first}, self.owner, "initial commit"))

    def commit(self, ref: str, commit: Commit) -> str:
        """Add a commit, and let `ref` name it."""
        oid = secrets.token_hex(20)
        self.commits[oid] = commit
        self.refs[ref] = oid
        return oid

    def propose(self, oid: str, author: str, title: str) -> int:
        """Open a pull request that begins at a commit, and number it."""
        number = len(self.proposals) + 1
        self.refs[f"refs/pr/{number}"] = oid
        self.proposals[f"refs/pr/{number}"] = Proposal(author, title)
        return number

    def resolve(self, revision: str) -> str:
        """The commit of a branch, tag, ref or (short) hash.

        Raises:
            KeyError: it names none.
        """
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return self.refs[ref]
        found = [oid for oid in self.commits if oid.startswith(revision)] if _COMMIT.fullmatch(revision) else []
        if len(found) != 1:
            raise KeyError(revision)
        return found[0]

    def branch(self, revision: str) -> str:
        """The ref of a branch or pull request, which commits can be added to.

        Raises:
            KeyError: it is none.
        """
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        if ref not in self.refs or ref.startswith("refs/tags/"):
            raise KeyError(revision)
        return ref

    def history(self, revision: str) -> list[tuple[str, Commit]]:
        """Hashes and commits, the newest first."""
        oid, commits = self.resolve(revision), []
        while oid is not None:
            commits.append((oid, self.commits[oid]))
            oid = self.commits[oid].parent
        return commits

    def named(self, kind: str) -> list[dict]:
        """The refs of a kind (heads, tags, pr) as the Hub lists them."""
        prefix = f"refs/{kind}/"
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
            for ref, oid in self.refs.items()
            if ref.startswith(prefix)
        ]
