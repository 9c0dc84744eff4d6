"""No network, few threads, one tokenizer."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import gc
import socket

import pytest
import tiny
import torch

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


def pytest_configure(config):
    for kind in ("generate", "slow", "timeout", "torch_compile_test", "flash_attn_test", "flash_attn_3_test"):
        config.addinivalue_line("markers", f"{kind}: of transformers, see test_generation_mixin.py")
    for kind in ("flash_attn_4_test", "torch_export_test", "onnx_export_test", "executorch_export_test"):
        config.addinivalue_line("markers", f"{kind}: of transformers, see test_generation_mixin.py")


def pytest_collection_finish(session):
    """Every `train` collects garbage; what was imported is none, and looking through it takes longer than training."""
    gc.collect()
    gc.freeze()
