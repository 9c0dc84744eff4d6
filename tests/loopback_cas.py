"""The Xet side of the loopback Hub: hf_xet itself, storing into a folder instead of a server (`local://`).

A folder serves one repository. The commit that follows an upload names its files by sha256; which Xet hash those have
is written in the shards that hf_xet stored (https://huggingface.co/docs/xet/en/shard).
"""

import struct
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_HEADER = _RECORD = 48
_BOOKEND = b"\xff" * 32
_HAS_VERIFICATION, _HAS_METADATA = 0x80000000, 0x40000000
TOKEN = "xet-token"


@cache
def local_cas_available() -> bool:
    """Whether hf_xet is installed and stores into folders."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            cas = LocalCas(Path(folder))
            cas.write(b"probe")
            return len(list(cas.stored())) == 1
    except Exception:  # an hf_xet without the scheme, or with another interface
        return False


class LocalCas:
    """The content-addressed store of one repository."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.url = f"local://{folder}"

    def stored(self) -> Iterator[tuple[str, str, int]]:
        """Sha256, Xet hash and size of all files."""
        for shard in self.folder.rglob("shards/*.mdb"):
            yield from _files_of_shard(shard.read_bytes())

    def find(self, sha256: str) -> tuple[str, int] | None:
        """The Xet hash and the size of a file."""
        return next(((xet_hash, size) for known, xet_hash, size in self.stored() if known == sha256), None)

    def write(self, content: bytes):
        import hf_xet

        with hf_xet.XetSession().new_upload_commit(**self._connection()) as commit:
            commit.start_upload_bytes(content, sha256=hf_xet.COMPUTE_SHA256)

    def read(self, sha256: str) -> bytes:
        import hf_xet

        xet_hash, size = self.find(sha256)
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "content"
            with hf_xet.XetSession().new_file_download_group(**self._connection()) as group:
                group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), str(target))
            return target.read_bytes()

    def _connection(self) -> dict:
        return {"endpoint": self.url, "token": TOKEN, "token_expiry_unix_secs": int(time.time()) + 3600}


def _files_of_shard(shard: bytes) -> Iterator[tuple[str, str, int]]:
    """Per file: a record with its hash, flags and count of segments; the segments; for each of these its verification,
    if there is one; its metadata with the sha256, if there is one. All records have 48 bytes.
    """
    position = _HEADER
    while shard[position : position + 32] != _BOOKEND:
        xet_hash = _hash(shard, position)
        flags, segments = struct.unpack_from("<II", shard, position + 32)
        position += _RECORD
        size = sum(struct.unpack_from("<I", shard, position + _RECORD * index + 36)[0] for index in range(segments))
        position += _RECORD * segments * (2 if flags & _HAS_VERIFICATION else 1)
        if flags & _HAS_METADATA:
            yield _hash(shard, position), xet_hash, size
            position += _RECORD


def _hash(shard: bytes, position: int) -> str:
    """Four little-endian words, written as one hexadecimal number."""
    return "".join(f"{word:016x}" for word in struct.unpack_from("<4Q", shard, position))
