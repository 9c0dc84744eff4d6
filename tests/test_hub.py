"""Rewards and their bases from a Hub on loopback, through the real client and the real Auto classes."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import pytest
import tiny
import torch
from datasets import Dataset
from huggingface_hub import constants
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from peft import LoraConfig

from prt_hf import PRTConfig, PRTTrainer, RewardModel
from prt_hf.backbones import Batch

COMMIT = "c0ffee" * 6 + "beef"


class Hub(BaseHTTPRequestHandler):
    """Read-only: repositories are folders, each with one commit, on `main`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    root: Path
    asked: list

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path = unquote(self.path.partition("?")[0]).strip("/")
        self.asked.append(path)
        parts = path.removeprefix("api/models/").split("/")
        folder = self.root / "/".join(parts[:2])
        revision = parts[3] if len(parts) > 3 else "main"
        if not folder.is_dir():
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", COMMIT):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        if path.startswith("api/models/"):
            if parts[2:3] == ["tree"]:
                sizes = [(name, (folder / name).stat().st_size) for name in files]
                entries = [{"type": "file", "path": name, "size": size, "oid": "0" * 40} for name, size in sizes]
                return self.answer(200, {}, json.dumps(entries).encode(), body)
            info = {"id": "/".join(parts[:2]), "sha": COMMIT, "private": False, "tags": []}
            info["siblings"] = [{"rfilename": name} for name in files]
            return self.answer(200, {}, json.dumps(info).encode(), body)
        name = "/".join(parts[4:])
        if name not in files:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = (folder / name).read_bytes()
        etag = hashlib.sha1(content).hexdigest()
        return self.answer(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, content, body)

    def answer(self, status, headers, content=b"", body=True):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder whose sub-folders are the repositories `user/name`."""
    handler = type("Handler", (Hub,), {"root": tmp_path / "hub", "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", endpoint)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # made once, for the endpoint of then
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def repositories(hub):
    """`me/base` and `me/reward`, which names it at its commit; and the rewards that it gives."""
    base = tiny.llama(1)
    base.save_pretrained(hub.root / "me" / "base")
    tiny.tokenizer().save_pretrained(hub.root / "me" / "base")
    torch.manual_seed(0)
    reward = RewardModel.from_base("me/base", peft_config=LoraConfig(init_lora_weights=False))
    reward.save_pretrained(hub.root / "me" / "reward")
    return reward.network.eval()(tiny.prompts()).logits


def test_a_reward_and_its_base_come_from_the_hub(hub, repositories, monkeypatch):
    entries = json.loads((hub.root / "me" / "reward" / "prt_config.json").read_text())
    assert (entries["reward_base"]["id"], entries["reward_base"]["revision"]) == ("me/base", COMMIT)
    assert json.loads((hub.root / "me" / "reward" / "adapter_config.json").read_text())["revision"] == COMMIT
    hub.asked.clear()
    reward = RewardModel.from_pretrained("me/reward")
    torch.testing.assert_close(reward(input_ids=tiny.prompts()), repositories)
    assert not [path for path in hub.asked if path.startswith("me/base/resolve/main")], "the base is pinned"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again = RewardModel.from_pretrained("me/reward", revision=COMMIT)
    torch.testing.assert_close(again(input_ids=tiny.prompts()), repositories)


def test_the_hubs_errors_reach_the_user(repositories):
    with pytest.raises(RepositoryNotFoundError):
        RewardModel.from_pretrained("me/nothing")
    with pytest.raises(RevisionNotFoundError):
        RewardModel.from_pretrained("me/reward", revision="v9")


def test_a_reward_of_the_hub_is_tuned_on(hub, repositories, tmp_path, monkeypatch):
    """And its states are stored by the commit of their backbone, so that no weights are asked for again."""
    rows = Dataset.from_list([{"input_ids": list(range(index, index + 9))} for index in range(3, 15)])
    shared = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_steps": 2}
    args = PRTConfig(str(tmp_path / "out"), learning_rate=1e-2, **shared)
    trainer = PRTTrainer("me/reward", args, None, rows, rows)
    logits = tiny.llama(1)(tiny.prompts()).logits
    torch.testing.assert_close(trainer.reward(input_ids=tiny.prompts()), repositories)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert trainer.reward.config.source_backbone.revision == COMMIT
    assert torch.equal(trainer.backbones[0].logits(Batch({"input_ids": tiny.prompts()}, None)), logits)

    tiny.gpt2(2).save_pretrained(hub.root / "me" / "other")
    tiny.tokenizer().save_pretrained(hub.root / "me" / "other")
    args = PRTConfig(
        str(tmp_path / "out"), precompute_backbone=True, backbone_cache_dir=str(tmp_path / "states"), **shared
    )
    first = PRTTrainer("me/reward", args, None, rows, rows, backbone="me/other").evaluate()["eval_loss"]
    monkeypatch.setattr("prt_hf.backbones.load_pretrained", None)
    again = PRTTrainer("me/reward", args, None, rows, rows, backbone="me/other")
    assert again.evaluate()["eval_loss"] == pytest.approx(first, rel=1e-6)
    again.train()
    assert again.reward.config.source_backbone.id == "me/other"
    assert again.reward.config.source_backbone.revision == COMMIT
