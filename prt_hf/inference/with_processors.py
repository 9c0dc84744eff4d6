"""Generation of a PRT model by its backbone with logits processors.

Speculative decoding verifies with the backbone alone, and a reward that reads rows of other lengths than the backbone
(other tokens, a prompt of its own) cannot share the steps of one cache with it.
"""

import copy
import weakref
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import BaseStreamer
from transformers.generation.utils import GenerateOutput
from transformers.utils import ModelOutput

from ..errors import UnsupportedError
from ..functional import strength_of_rows
from ..vocabulary import OTHER
from .context import Prompt
from .logits_processor import PRTLogitsProcessor
from .speculative import speculative_decoding

if TYPE_CHECKING:
    from .causal_lm import PRTForCausalLM

# Their caches follow the text by its content, so they are kept from call to call; copies and pickles leave them out.
_PROCESSORS: "weakref.WeakKeyDictionary[PRTForCausalLM, list[PRTLogitsProcessor]]" = weakref.WeakKeyDictionary()


def generate_with_processors(
    model: "PRTForCausalLM",
    inputs: torch.LongTensor | None,
    generation_config: GenerationConfig | None,
    prompts: Sequence[Prompt | None],
    speculation: dict | None,
    *,
    assistant_model: PreTrainedModel | None = None,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_strings: str | list[str] | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    **kwargs,
) -> torch.LongTensor | GenerateOutput:
    """Let the backbone of a PRT model generate under its defaults, with a processor for each reward before all others.

    Args:
        model: the PRT model.
        inputs: the prompts, `(batch_size, sequence_length)`.
        generation_config: by default the model's.
        prompts: what each reward reads in the place of `inputs`, or None.
        speculation: options of [`speculative_decoding`], which decodes; None to decode in the ordinary way.
        assistant_model: drafts; a full reward's source backbone if speculative.
        streamer: as for `generate`.
        tokenizer: for `stop_strings`; by default the model's.
        stop_strings: as for `generate`.
        stopping_criteria: as for `generate`.
        **kwargs: as for `generate`.
    """
    if kwargs.get("inputs_embeds") is not None:
        raise UnsupportedError(
            "A reward has embeddings of its own, and cannot read the backbone's.",
            expected="`input_ids`",
            found="`inputs_embeds`",
        )
    backbone = copy.copy(model.backbone)  # on the very same modules
    backbone.generation_config = copy.deepcopy(model.generation_config)
    generation_config = copy.deepcopy(generation_config or model.generation_config)
    kwargs = generation_config.update(**kwargs)
    stopping_criteria = StoppingCriteriaList(stopping_criteria or ())
    stop_strings = stop_strings or generation_config.stop_strings or model.generation_config.stop_strings
    if stop_strings:
        # transformers keeps the tokenizer from a `custom_generate`, and cannot make these without it.
        stopping_criteria.append(StopStringCriteria(tokenizer or model.processing_class, stop_strings))
        generation_config.stop_strings = backbone.generation_config.stop_strings = None
    # Taken out while they are in use: another thread makes its own.
    rewards = _PROCESSORS.pop(model, None) if assistant_model is None else None
    if rewards is None:
        rewards = _processors(model, None if speculation is None else assistant_model)
    for reward, strength, prompt in zip(rewards, model.strengths, prompts, strict=True):
        reward.strength, reward.prompt, reward.attention_mask = strength, prompt, kwargs.get("attention_mask")
    if speculation is None:
        if kwargs.get("output_logits", generation_config.output_logits):
            raise UnsupportedError(
                "The logits of the backbone are not those of the PRT model.",
                expected="`output_scores`, which are log pi of every step after the processors",
                found="`output_logits`, with a reward that reads other tokens or a prompt of its own",
            )
        others = backbone._get_logits_processor
        in_order = sorted(rewards, key=lambda reward: reward.match.kind == OTHER)  # as a forward pass adds them
        backbone._get_logits_processor = lambda *args, **given: LogitsProcessorList(
            [*in_order, *others(*args, **given)]
        )
        if assistant_model is not None:
            kwargs["assistant_model"] = assistant_model
        if tokenizer is not None:
            kwargs["tokenizer"] = tokenizer
    else:
        kwargs["custom_generate"] = partial(speculative_decoding, rewards=rewards, streamer=streamer, **speculation)
    output = backbone.generate(
        inputs, generation_config, stopping_criteria=stopping_criteria, streamer=streamer, **kwargs
    )
    if assistant_model is None:
        _PROCESSORS[model] = rewards
    if isinstance(output, ModelOutput) and output.get("scores") is not None:
        output.scores = tuple(each[:, : model.config.vocab_size] for each in output.scores)  # as of this model
    return output


def add_rewards_across(
    model: "PRTForCausalLM",
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.LongTensor | None,
    positions: torch.LongTensor,
    log_probs: torch.Tensor,
) -> torch.Tensor:
    """Return log-probabilities with the rewards of a PRT model that have another vocabulary than the backbone.

    Args:
        model: the PRT model.
        input_ids: `(batch_size, sequence_length)`.
        attention_mask (*optional*): of the same shape, 0 at padding.
        position_ids (*optional*): refused if a row holds several documents.
        positions: of the tokens after which log-probabilities are wanted, `(n,)`, in ascending order.
        log_probs: with all other rewards, `(batch_size, n, vocab_size)`.

    Raises:
        UnsupportedError: the model is in training mode, the mask says more than what is padding, or a row holds several
            documents.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if model.training or mask.shape != input_ids.shape:
        raise UnsupportedError(
            "A reward of another vocabulary scores texts, and is not tuned there.",
            expected="evaluation mode, and a mask of the shape of the tokens",
            found=f"training={model.training}, a mask of shape {tuple(mask.shape)}",
            remedy="tune the reward on a backbone with its own vocabulary",
        )
    if position_ids is not None and bool((position_ids != mask.cumsum(1) - 1)[mask.bool()].any()):
        raise UnsupportedError(
            "A reward of another vocabulary reads a row as one text.",
            expected="one document in each row",
            found="`position_ids` that start anew",
        )
    processors = _PROCESSORS.pop(model, None) or _processors(model)
    rows = []
    for row, (ids, is_text) in enumerate(zip(input_ids, mask, strict=True)):
        found = log_probs[row]
        for processor, match, strength in zip(processors, model.matches, model.strengths, strict=True):
            if match.is_across:
                processor.strength = strength_of_rows(strength, len(input_ids))[row].item()
                found = processor.score(ids, is_text, positions, found)
        rows.append(found)
    _PROCESSORS[model] = processors
    return torch.stack(rows)


def _processors(model: "PRTForCausalLM", assistant_model: PreTrainedModel | None = None) -> list[PRTLogitsProcessor]:
    """Return a processor for each reward of a PRT model."""
    processors = [
        PRTLogitsProcessor(
            reward,
            model.processing_class,
            token_map=match.tokens and match.tokens.renamed,
            source_backbone=assistant_model,
            across_vocabularies=match.is_across,
        )
        for reward, match in zip(model.rewards, model.matches, strict=True)
    ]
    model.train(model.training)  # processors put networks into evaluation mode
    return processors
