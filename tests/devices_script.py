"""Trains in each of `CASES`, in one process or in several, and writes down what came out: see test_devices.py."""

import json
import os
import sys
from pathlib import Path

import tiny
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from peft import LoraConfig
from tiny import images, texts
from torch.distributed.fsdp import FSDPModule

from prt_hf import PRTConfig, PRTTrainer, UnsupportedError, zero_shot_classifier
from prt_hf.networks.identity import weights_digest_of_model
from prt_hf.reward.backbones import Backbone

FIGURES = ("loss", "backbone_loss", "grad_norm", "accuracy", "reward_accuracy", "reward_entropy", "reward_abs", "kl")
ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def adapter(**changes):
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"]} | changes)


def another(folder):
    """Of another architecture than the reward."""
    return tiny.gpt2(2)


def of_all_layers():
    return LoraConfig(r=4, target_modules="all-linear", exclude_modules=["classifier"])


def zero_shot():
    words = dict(zip(["w3", "w4", "w5", "w6"], tiny.COLOURS, strict=True))
    tokenizer = tiny.tokenizer(changed=words, padding_side="right")
    return zero_shot_classifier(tiny.clip(1), tiny.COLOURS, ["w40 {} w90 <eos>"], tokenizer)


# What the trainer gets: the adapter, the backbone, arguments.
CASES = {
    "own base": (adapter(), None, {}),
    "shared trunk": (adapter(layers_to_transform=[1]), None, {}),
    "another backbone": (adapter(target_modules=["q_proj", "lm_head"]), another, {}),
    "full reward": (None, None, {}),
    "several backbones": (adapter(), lambda folder: [None, tiny.gpt2(2)], {}),
    "accumulation": (adapter(), None, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "checkpointing": (adapter(), None, {"gradient_checkpointing": True}),
    "resumed": (adapter(), another, {"save_strategy": "steps", "save_steps": 2}),
    "stored states": (adapter(), lambda folder: [None, tiny.gpt2(2)], {"precompute_backbone": True}),
    "bfloat16": (adapter(layers_to_transform=[1]), None, {"bf16": True}),
    "from disk": (adapter(), lambda folder: str(folder / "gpt2"), {}),
    "images": (of_all_layers(), None, {}),
    "zero-shot": (of_all_layers(), lambda folder: tiny.vit(2), {}),
}
IMAGE_MODELS = {"images": lambda: tiny.vit(1), "zero-shot": zero_shot}


def made(name, folder, scale=1, **changes):
    """
    Args:
        scale: of the batches, so that one process does what several do.
    """
    peft_config, backbone, arguments = CASES[name]
    arguments = {
        "backbone_cache_dir": str(folder / "states"),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "save_strategy": "no",
    } | (arguments | changes)
    arguments |= {key: scale * size for key, size in arguments.items() if "batch_size" in key}
    args = PRTConfig(
        output_dir=str(folder / name),
        learning_rate=1e-2,
        max_steps=3,  # of 8 rows: the last one begins another epoch
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        entropy_coef=0.01,
        **arguments,
    )
    model = str(folder / "llama") if name == "from disk" else IMAGE_MODELS.get(name, lambda: tiny.llama(1))()
    rows = images if name in IMAGE_MODELS else texts
    torch.manual_seed(0)
    return PRTTrainer(
        model,
        args,
        train_dataset=rows(16),
        eval_dataset=rows(11, seed=1),
        processing_class=None if name in ("from disk", *IMAGE_MODELS) else tiny.tokenizer(),
        backbone=backbone and backbone(folder),
        peft_config=peft_config,
    )


def trained(name, folder, scale=1, **changes):
    """Trains, evaluates and saves."""
    trainer = made(name, folder, scale, **changes)
    trainer.train()
    if name == "resumed":
        trainer = made(name, folder, scale, **changes)
        trainer.train(resume_from_checkpoint=str(folder / name / "checkpoint-2"))
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    figures = {figure: [entry[figure] for entry in entries] for figure in FIGURES}
    metrics = trainer.evaluate()
    trainer.save_model()
    figures |= {f"eval_{figure}": metrics[f"eval_{figure}"] for figure in FIGURES if figure != "grad_norm"}
    return trainer, figures


def let_fsdp_run_on_cpus():
    """accelerate runs FSDP on accelerators only, and on CPUs, without a word, DDP."""
    start = PartialState.__init__

    def patched(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if self._shared_state.get("distributed_type") == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = patched


def main(mode, folder):
    if mode == "fsdp":
        let_fsdp_run_on_cpus()
    changes = {"deepspeed": ZERO3} if mode == "zero3" else {}
    computed = []  # the rows that a backbone reads for stored states
    states = Backbone.states
    Backbone.states = lambda self, batch: (computed.append(len(batch.labels)), states(self, batch))[1]
    outcome = {"figures": {}}
    # See test_models_that_were_loaded_in_parts.
    left_out = {"bfloat16", "from disk", *IMAGE_MODELS} if mode == "zero3" else set()
    for name in [name for name in CASES if name not in left_out]:
        if mode == "fsdp":  # see test_networks_that_accelerate_cannot_divide
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = str(name != "zero-shot").lower()
        trainer, outcome["figures"][name] = trained(name, folder, **changes)
        if mode == "ddp":
            digests = gather_object([weights_digest_of_model(trainer.model)])
            assert len(digests) == 2 and digests[0] == digests[1], f"{name}: the processes have parted"
    outcome["computed"] = gather_object([sum(computed)])
    if mode != "ddp":
        try:
            made("stored states", folder, backbone_cache_dir=str(folder / "nothing here"), **changes)
        except UnsupportedError as error:
            outcome["refusal"] = str(error)
        blocks = made("another backbone", folder, **changes).backbone.transformer.h
        outcome["are_blocks_in_parts"] = [
            isinstance(block, FSDPModule) or all(hasattr(value, "ds_id") for value in block.parameters())
            for block in blocks
        ]
    if trainer.accelerator.is_main_process:
        (folder / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(os.environ["MODE"], Path(sys.argv[1]))
