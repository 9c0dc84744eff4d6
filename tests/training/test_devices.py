"""Two processes on two devices do what one process does: data parallel, and with sharded networks."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accelerate
import devices_script
import pytest
import safetensors.torch
import tiny
import torch
import torch.distributed as dist
from packaging.version import Version
from test_trainer import config, texts  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import StateDictType, fully_shard

from prt_hf import PRTTrainer, RewardModel, UnsupportedError
from prt_hf.networks.identity import reference_to
from prt_hf.networks.lm_head import why_not_projected
from prt_hf.reward.backbones import Backbone
from prt_hf.training.sharding import check_fsdp, name_blocks, sharded

pytestmark = pytest.mark.xdist_group("devices")  # every launch once

# As `accelerate launch` sets it.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
MODES = {"ddp": {}, "fsdp": FSDP, "zero3": {"DS_ACCELERATOR": "cpu"}}
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")


def launch(mode, folder, **environment):
    """Both processes end with a failed one, so that none waits for it."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    variables = {"MODE": mode, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"} | MODES[mode] | environment
    return subprocess.run(
        [*command, str(root / "tests" / "devices_script.py"), str(folder)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One for each mode and one for a single process, with models to load."""
    root = tmp_path_factory.mktemp("devices")
    for name in (*MODES, "alone"):
        for model in (tiny.llama(1), tiny.gpt2(2)):
            model.save_pretrained(root / name / model.config.model_type)
            tiny.tokenizer().save_pretrained(root / name / model.config.model_type)
    return root


@pytest.fixture(scope="module")
def alone(folders):
    """Figures of one process with batches twice as large."""
    return {name: devices_script.trained(name, folders / "alone", scale=2)[1] for name in devices_script.CASES}


@pytest.fixture(scope="module")
def outcome(request, folders, alone):
    mode = request.param
    if mode == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    if mode == "fsdp" and Version(accelerate.__version__) < Version("1.15"):
        pytest.skip("refused, see test_fsdp_as_rewards_need_it")
    if mode != "ddp":  # sharded networks only read states
        shutil.copytree(folders / "alone" / "states", folders / mode / "states")
    process = launch(mode, folders / mode)
    assert process.returncode == 0, process.stderr[-6000:]
    return json.loads((folders / mode / "outcome.json").read_text()) | {"folder": folders / mode}


@pytest.mark.parametrize("outcome", MODES, indirect=True)
def test_processes_do_together_what_one_does(outcome, alone, folders):
    assert outcome["figures"].keys() >= alone.keys() - {"bfloat16", "from disk", *devices_script.IMAGE_MODELS}
    if rounded := outcome["figures"].pop("bfloat16", None):
        for figure in ("loss", "eval_loss"):
            assert rounded[figure] == pytest.approx(alone["bfloat16"][figure], rel=0.02)
    for name, figures in outcome["figures"].items():
        for figure, value in figures.items():
            assert value == pytest.approx(alone[name][figure], rel=1e-5, abs=1e-6), f"{name}: {figure}"
        ours, theirs = (
            {path.name: path for path in (folder / name).iterdir() if path.is_file()}
            for folder in (outcome["folder"], folders / "alone")
        )
        assert ours.keys() == theirs.keys(), name
        (file,) = ours.keys() & set(WEIGHTS)
        torch.testing.assert_close(
            *(safetensors.torch.load_file(files[file]) for files in (ours, theirs)), atol=1e-5, rtol=1e-4, msg=name
        )
        given, expected = (json.loads(files["prt_config.json"].read_text()) for files in (ours, theirs))
        for reference in ("reward_base", "source_backbone"):
            assert given[reference]["weights"] == expected[reference]["weights"], f"{name}: taken of whole weights"


@pytest.mark.parametrize("outcome", ["ddp"], indirect=True)
def test_processes_share_the_computation_of_states(outcome, folders, monkeypatch):
    rows = 2 * (16 + 11)  # of two backbones
    probes = 2 * 2  # one row of every data set, to see what states look like
    assert sum(outcome["computed"]) == rows + 2 * probes and min(outcome["computed"]) > probes + rows // 3
    plans = [sorted((folder / "states").rglob("plan.json")) for folder in (outcome["folder"], folders / "alone")]
    assert [plan.parent.name for plan in plans[0]] == [plan.parent.name for plan in plans[1]]
    for both in zip(*plans, strict=True):
        files = (sorted(plan.parent.glob("states-*")) for plan in both)
        ours, theirs = (torch.cat([safetensors.torch.load_file(file)["states"] for file in blocks]) for blocks in files)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(Backbone, "states", None)
    devices_script.made("stored states", outcome["folder"])  # another run reads them


@pytest.mark.parametrize("outcome", ["fsdp", "zero3"], indirect=True)
def test_networks_in_parts(outcome):
    assert outcome["computed"] == [0, 0]
    assert "A sharded backbone cannot compute states" in outcome["refusal"]
    assert "remedy: make the trainer once without sharding" in outcome["refusal"]
    assert outcome["are_blocks_in_parts"] == [True, True]
    full = RewardModel.from_pretrained(outcome["folder"] / "full reward")
    assert type(full.network).__name__ == "LlamaForCausalLM"
    checkpoint = outcome["folder"] / "resumed" / "checkpoint-2"
    RewardModel.from_pretrained(checkpoint, base_model=tiny.llama(1))
    if (weights := checkpoint / "pytorch_model_fsdp.bin").exists():
        assert all(".lora_" in name for name in torch.load(weights))


def test_heads_that_are_divided_again_after_a_pass():
    """As accelerate does before it put the last layers together: logits are made as usual."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, mesh = tiny.llama(1), init_device_mesh("cpu", (1,))
        fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert "head that is sharded" in why_not_projected(model, {"input_ids": tiny.prompts()})
    finally:
        dist.destroy_process_group()


# What would not be sharded is refused


def test_fsdp_that_would_not_run(config, tokenizer, monkeypatch):  # noqa: F811
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UnsupportedError, match="(?s)would not be sharded.*found: .*NO on cpu.*fsdp_version: 2"):
        PRTTrainer(tiny.llama(1), config(), None, texts(), processing_class=tokenizer)


def test_fsdp_as_rewards_need_it(monkeypatch):
    monkeypatch.setattr("accelerate.__version__", "1.15.0")
    plugin = SimpleNamespace(state_dict_type=StateDictType.SHARDED_STATE_DICT)
    accelerator = SimpleNamespace(is_fsdp2=True, state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(UnsupportedError, match="(?s)saved in shards.*FULL_STATE_DICT.*found: SHARDED_STATE_DICT"):
        check_fsdp(SimpleNamespace(fsdp=True), accelerator)
    plugin.state_dict_type = StateDictType.FULL_STATE_DICT
    check_fsdp(SimpleNamespace(fsdp=True), accelerator)
    monkeypatch.setattr("accelerate.__version__", "1.14.0")
    with pytest.raises(UnsupportedError, match="(?s)accelerate 1.15 or newer.*found: 1.14.0"):
        check_fsdp(SimpleNamespace(fsdp=True), accelerator)


def test_backbones_that_stay_whole(monkeypatch):
    monkeypatch.setattr("prt_hf.training.sharding.fsdp2_prepare_model", lambda accelerator, network: network)
    plugin = SimpleNamespace(
        auto_wrap_policy="policy", transformer_cls_names_to_wrap=["Block"], cpu_ram_efficient_loading=True
    )
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(UnsupportedError, match="(?s)whole of LlamaForCausalLM.*21 whole on every device"):
        sharded(tiny.llama(1), accelerator)
    assert (plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap) == ("policy", ["Block"])


def test_networks_that_accelerate_cannot_divide():
    plugin = SimpleNamespace(cpu_ram_efficient_loading=True)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(UnsupportedError, match="(?s)needs the input embeddings.*found: ResNetForImage"):
        name_blocks(tiny.resnet(), accelerator)
    with pytest.raises(UnsupportedError, match="(?s)ZeroShot.* also has saved buffers.*: false.*classifier.weight"):
        name_blocks(devices_script.zero_shot(), accelerator)
    model = tiny.vit()
    blocks = set(model._no_split_modules)
    name_blocks(model, accelerator)
    assert blocks - model._no_split_modules == {"ViTEmbeddings"} and model._no_split_modules == {"ViTLayer"}


def test_models_that_were_loaded_in_parts():
    model = tiny.llama(1)
    model.lm_head.weight.ds_id = 0  # DeepSpeed's mark
    with pytest.raises(UnsupportedError, match="(?s)loaded in shards.*load it before `PRTConfig` is made"):
        reference_to(model)
