"""No network but for a Hub on loopback, few threads, one tokenizer."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_XET_LOG_DEST"] = os.devnull  # rather than the user's cache
os.environ["HF_XET_CLIENT_RETRY_BASE_DELAY"] = "10ms"

import gc
import socket
from types import SimpleNamespace

import pytest
import tiny
import torch
from huggingface_hub import close_session, constants
from loopback_cas import local_cas_available
from loopback_hub import LoopbackHub

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def loopback_only():
    """Any connection that would leave the machine fails the test that tries it."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests may not connect to {address}")
        return connect(self, address)

    socket.socket.connect = guarded
    yield
    socket.socket.connect = connect


@pytest.fixture(scope="session")
def tokenizer():
    return tiny.tokenizer()


@pytest.fixture
def hub(request, tmp_path, monkeypatch):
    """A Hub of this test alone, which the client speaks to as the user "me"; processes started by the test do so too.

    With `@pytest.mark.parametrize("hub", ["lfs", "xet"], indirect=True)`, over each transport of large files.
    """
    transport = getattr(request, "param", "lfs")
    if transport == "xet" and not local_cas_available():
        pytest.skip("this hf_xet does not store into folders")
    with LoopbackHub(tmp_path / "hub", transport) as hub:
        _connect(hub, monkeypatch)
        yield hub
        close_session()


def _connect(hub, monkeypatch):
    """What huggingface_hub read from the environment when it was imported is set to what it would read now."""
    for name, value in hub.environment.items():
        monkeypatch.setenv(name, value)
    for name in ("HF_OIDC_RESOURCE", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    home = hub.environment["HF_HOME"]
    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": home,
        "HF_HUB_CACHE": hub.environment["HF_HUB_CACHE"],
        "HF_TOKEN_PATH": f"{home}/token",
        "HF_STORED_TOKENS_PATH": f"{home}/stored_tokens",
        "AGENT_HARNESSES_PATH": f"{home}/agent_harnesses.json",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": hub.transport != "xet",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.endpoint)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # made once, for the endpoint of then
    unhurried = SimpleNamespace(sleep=lambda seconds: None)  # between the client's attempts
    monkeypatch.setattr("huggingface_hub.utils._http.time", unhurried)
    monkeypatch.setattr("huggingface_hub.file_download.time", unhurried)


def pytest_configure(config):
    for kind in ("generate", "slow", "timeout", "torch_compile_test", "flash_attn_test", "flash_attn_3_test"):
        config.addinivalue_line("markers", f"{kind}: of transformers, see test_generation_mixin.py")
    for kind in ("flash_attn_4_test", "torch_export_test", "onnx_export_test", "executorch_export_test"):
        config.addinivalue_line("markers", f"{kind}: of transformers, see test_generation_mixin.py")


def pytest_collection_finish(session):
    """Every `train` collects garbage; what was imported is none, and looking through it takes longer than training."""
    gc.collect()
    gc.freeze()
