"""transformers' own generation tests, which every generating model of the library passes, on a tiny PRT model.

They are no part of the installed package: `PRT_TRANSFORMERS` names a checkout of the transformers that is installed.
With `RUN_SLOW=1` and `-m ""`, also what it marks as slow: SDPA against eager attention, padding-free batches,
torch.export.
"""

import importlib
import os
import sys
import unittest
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from transformers import DynamicCache, GPT2Config, LlamaConfig, StaticCache

from prt_hf import PRTForCausalLM
from prt_hf.inference.cache import PRTCache
from prt_hf.inference.configuration import PRTModelConfig

CHECKOUT = os.environ.get("PRT_TRANSFORMERS")
if not CHECKOUT:
    pytest.skip("PRT_TRANSFORMERS names no transformers checkout", allow_module_level=True)
sys.path.insert(0, CHECKOUT)
pytest.importorskip("parameterized", reason="transformers' tests need parameterized")

test_utils = importlib.import_module("tests.generation.test_utils")


SKIPPED = {
    "a reward has embeddings of its own, and cannot read the backbone's": [
        "test_generate_from_inputs_embeds_0_greedy",
        "test_generate_from_inputs_embeds_1_beam_search",
        "test_generate_from_random_inputs_embeds",
        "test_generate_from_inputs_embeds_with_static_cache",
        "test_generate_continue_from_inputs_embeds",
    ],
    "of networks with recurrent layers, where neither the backbone nor the reward has any": [
        "test_recurrent_layers_mask_padding_on_continued_forward",
    ],
    "of checkpoints that predict several tokens at once": ["test_generate_with_mtp"],
}


class ModelTester:
    """What the mixin asks for configurations and inputs."""

    batch_size, seq_length = 3, 7

    def prepare_config_and_inputs_for_common(self):
        text = {"vocab_size": tiny.VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = PRTModelConfig(
            backbone_config=LlamaConfig(**text, **sizes, intermediate_size=64, num_key_value_heads=2),
            reward_configs=[GPT2Config(**text, n_embd=16, n_layer=1, n_head=2, n_positions=tiny.CONTEXT)],
        )
        input_ids = tiny.prompts(self.batch_size, self.seq_length)
        return config, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids).tril()}


def kind_of_parts(kind):
    """Return a class whose instances are the PRT caches with parts of a kind."""

    class Kind(type):
        def __instancecheck__(cls, cache):
            return isinstance(cache, PRTCache) and all(isinstance(part, kind) for part in cache.parts)

    return Kind(kind.__name__, (), {})


class Whole(PRTForCausalLM):
    """Saved with the weights of its random backbone, which a recipe names and does not hold."""

    def save_pretrained(self, folder):
        self.config.save_pretrained(folder)
        torch.save(self.state_dict(), Path(folder) / "weights.pt")

    @classmethod
    def from_pretrained(cls, folder, dtype, attn_implementation):
        config = PRTModelConfig.from_pretrained(folder)
        model = cls._from_config(config, dtype=dtype, attn_implementation=attn_implementation)
        model.load_state_dict(torch.load(Path(folder) / "weights.pt"))
        return model.eval()


class TestGeneration(test_utils.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = all_generative_model_classes = (PRTForCausalLM,)
    model_tester = ModelTester()
    has_attentions = test_torch_exportable = True

    def setUp(self):
        for kind in (DynamicCache, StaticCache):
            patched = mock.patch.object(test_utils, kind.__name__, kind_of_parts(kind))
            self.addCleanup(patched.stop)
            patched.start()

    def _prepare_for_class(self, inputs, model_class, **kwargs):
        return dict(inputs)

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        if not isinstance(past_key_values, PRTCache):
            return super()._check_past_key_values_for_generate(batch_size, past_key_values, seq_length, config)
        prt_config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        configs = [prt_config.backbone_config, *prt_config.reward_configs]
        for part, network in zip(past_key_values.parts, configs, strict=True):
            super()._check_past_key_values_for_generate(batch_size, part, seq_length, network)

    def _test_attention_implementation(self, attn_implementation):
        self.all_generative_model_classes = (Whole,)
        super()._test_attention_implementation(attn_implementation)

    def attention_mask_padding_matches_padding_free_with_position_ids(self, *args, **kwargs):
        self.all_generative_model_classes = (Whole,)
        super().attention_mask_padding_matches_padding_free_with_position_ids(*args, **kwargs)


def _skipped(reason):
    @unittest.skip(reason)
    def test(self):
        pass

    return test


for reason, names in SKIPPED.items():
    for name in names:
        assert hasattr(TestGeneration, name), name
        setattr(TestGeneration, name, _skipped(reason))
