"""Speculative decoding with the source PRT model as the drafter: the same text, with fewer passes of the backbone.

The source backbone with the reward drafts (for a reward adapter, one pass of its base gives both), one pass of the
backbone verifies all drafts, and the rewards at the drafts are known by then. The output depends on the backbone with
the reward alone: greedy tokens are its own, samples follow its distribution (Leviathan et al. 2023, Algorithm 1).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation import (
    BaseStreamer,
    GenerateDecoderOnlyOutput,
    GenerationMode,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from ..errors import PRTValueError, UnsupportedError
from ..networks.anatomy import CACHE, context_length
from ..networks.mixed_pass import Pass
from .logits_processor import PRTLogitsProcessor
from .probe import behaviour_of
from .state import RECORDS_PAST, REMEMBERED, switching_length

START = 4  # drafts in the first round
LONGEST = 16
_STATEFUL = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)


@dataclass
class SpeculativeOutput(GenerateDecoderOnlyOutput):
    """The output of `generate(..., return_dict_in_generate=True)`, with counts of drafts.

    Args:
        num_drafted (`int`): drafted tokens.
        num_accepted (`int`): drafted tokens that were kept.
        num_rounds (`int`): passes of the backbone.
    """

    num_drafted: int | None = None
    num_accepted: int | None = None
    num_rounds: int | None = None


@torch.no_grad()
def speculative_decoding(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    num_draft_tokens: int | None = None,
    streamer: BaseStreamer | None = None,
    rewards: Sequence[PRTLogitsProcessor] = (),
    **model_kwargs,
) -> torch.LongTensor | SpeculativeOutput:
    """Decode as the `custom_generate` of a backbone, one prompt at a time.

    Use: `backbone.generate(..., logits_processor=[p], custom_generate=speculative_decoding)`. Every option of greedy
    decoding and sampling holds: processors, warpers and stopping criteria see each token and its prefix as in ordinary
    decoding. Processors that count their calls are refused.

    Args:
        model: the backbone.
        input_ids: the prompt, `(1, sequence_length)`.
        logits_processor: with a [`PRTLogitsProcessor`], whose reward drafts, unless `rewards` has one.
        stopping_criteria: as `generate` makes them.
        generation_config: as `generate` makes it.
        num_draft_tokens (`int`, *optional*): most tokens to draft in a round, 16 by default; below it, the number
            follows the accepted ones.
        streamer: transformers passes none to a `custom_generate`; set it with
            `custom_generate=functools.partial(speculative_decoding, streamer=streamer)`.
        rewards: processors that come before those of `logits_processor`, and get the backbone's mask.
        **model_kwargs: the mask, positions and cache.

    Returns:
        `torch.LongTensor` of shape `(1, sequence_length)`, or [`SpeculativeOutput`] with `return_dict_in_generate`.

    Raises:
        PRTValueError: no [`PRTLogitsProcessor`] to draft with, or an unusable number of drafts.
        UnsupportedError: several rows, beams, classifier-free guidance, no cache, or one that cannot be cropped.
    """
    first, others = LogitsProcessorList(rewards), logits_processor
    drafters = [processor for processor in [*first, *others] if isinstance(processor, PRTLogitsProcessor)]
    longest = LONGEST if num_draft_tokens is None else num_draft_tokens
    _check(model, input_ids, model_kwargs.get(CACHE), generation_config, drafters, longest)
    for processor in others:
        if isinstance(processor, _STATEFUL):
            raise UnsupportedError(
                f"{type(processor).__name__} counts its calls, and drafts that are not kept would count.",
                expected="processors that look at the tokens alone",
                remedy="generate without speculation",
            )
    size = drafters[0].match.size
    mask = model_kwargs.get("attention_mask")
    for reward in rewards:
        reward.attention_mask = torch.ones_like(input_ids) if mask is None else mask
    networks = [model, *(drafter.reward.network for drafter in drafters)]
    limit = min([generation_config.max_length, *filter(None, map(context_length, networks))])
    switch = switching_length(model.config)  # all tokens of one pass are read with the same frequencies
    if switch is not None and limit > switch and not RECORDS_PAST:
        raise UnsupportedError(
            "Before transformers 5.18, drafts cannot be verified where a longrope model switches its frequencies.",
            expected=f"texts of at most {switch} tokens (original_max_position_embeddings), or a newer transformers",
            found=f"texts of up to {limit} tokens",
            remedy="generate without speculation",
        )
    drafter = drafters[0].drafter()
    first, others = (
        LogitsProcessorList(drafter if processor is drafters[0] else processor for processor in processors)
        for processors in (first, others)
    )
    verifier = _Verifier(model, model_kwargs)
    if chunk := generation_config.prefill_chunk_size:
        for end in range(verifier.cache.get_seq_length() + chunk, input_ids.shape[1], chunk):
            verifier(input_ids[:, :end], 1)
    wanted = {"scores": generation_config.output_scores, "logits": generation_config.output_logits}
    records = {name: () for name, asked in wanted.items() if asked and generation_config.return_dict_in_generate}
    drafted = accepted = rounds = 0
    draft_length = min(START, longest)
    is_done = False
    while not is_done:
        length = input_ids.shape[1]
        count = max(0, min(draft_length, limit - length - 1))
        if switch is not None and length <= switch:
            count = min(count, switch - length)
        tokens, chances = input_ids, []
        for _ in range(count):
            source = drafter.source_logits(tokens).to(tokens.device)
            token, chance = _draw(others(tokens, first(tokens, source)), generation_config.do_sample)
            tokens = torch.cat([tokens, token], 1)
            chances.append(chance)
        verified = verifier(tokens, count + 1)
        is_draft = True
        for index in range(count + 1):
            prefix, draft = tokens[:, : length + index], tokens[:, length + index : length + index + 1]
            logits = first(prefix, verified[:, index].to(tokens.device, torch.float32, copy=True))[:, :size]
            scores = others(prefix, logits.clone())
            if index == count:
                (token, _), is_draft = _draw(scores, generation_config.do_sample), False
            else:
                token, is_draft = _verify(scores, draft, chances[index])
            input_ids = torch.cat([input_ids, token], 1)
            for name, values in (("scores", scores), ("logits", logits)):
                if name in records:
                    records[name] += (values,)
            accepted += is_draft
            if streamer is not None:
                streamer.put(token[0].cpu())
            is_done = bool(stopping_criteria(input_ids, records.get("scores")).all())
            if is_done or not is_draft:
                break
        # The last token has not been read yet, whether it was drafted or not.
        verifier.keep(input_ids.shape[1] - 1)
        drafted, rounds = drafted + count, rounds + 1
        matches = input_ids.shape[1] - length - 1
        draft_length = min(longest, draft_length + 2 if matches == count else matches + 1)
    if streamer is not None:
        streamer.end()
    if not generation_config.return_dict_in_generate:
        return input_ids
    return SpeculativeOutput(
        sequences=input_ids,
        scores=records.get("scores"),
        logits=records.get("logits"),
        num_drafted=drafted,
        num_accepted=accepted,
        num_rounds=rounds,
        **{CACHE: verifier.cache},
    )


class _Verifier:
    """The backbone with its cache: logits for the last tokens of a text, whose end may be taken back."""

    def __init__(self, model: PreTrainedModel, model_kwargs: dict):
        self.model = model
        self.cache = model_kwargs[CACHE]
        self.cache.activate_past_recording()
        self._kwargs = model_kwargs
        self._length = self.cache.get_seq_length()

    def __call__(self, tokens: torch.LongTensor, count: int) -> torch.FloatTensor:
        """Return the logits after the last `count` tokens, `(1, count, vocab_size)`."""
        inputs = self.model.prepare_inputs_for_generation(
            tokens,
            next_sequence_length=tokens.shape[1] - self._length,
            is_first_iteration=self._length == 0,
            **self._kwargs | self._extended(tokens.shape[1]) | {CACHE: self.cache},
        )
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = count
        output = self.model(**inputs, return_dict=True)
        if output[CACHE] is not self.cache:  # begun anew, as some do where their frequencies switch
            self.cache = output[CACHE]
            self.cache.activate_past_recording()
        self._length = tokens.shape[1]
        return output.logits[:, -count:]

    def keep(self, length: int) -> None:
        """Take back all but the first tokens; without any, windows are still cut to their size."""
        self.cache.crop(length - self._length)
        self._length = length

    def _extended(self, length: int) -> dict:
        """Return the prompt's mask and positions, extended to the text so far."""
        extended = {}
        if (mask := self._kwargs.get("attention_mask")) is not None:
            more = mask.new_ones(1, max(0, length - mask.shape[1]))
            extended["attention_mask"] = torch.cat([mask, more], 1)[:, :length]
        if (positions := self._kwargs.get("position_ids")) is not None:
            more = torch.arange(1, max(0, length - positions.shape[-1]) + 1, device=positions.device)
            extended["position_ids"] = torch.cat([positions, positions[..., -1:] + more], -1)[..., :length]
        return extended


def _draw(scores: torch.FloatTensor, do_sample: bool) -> tuple[torch.LongTensor, torch.FloatTensor | None]:
    """Choose a token of shape `(1, 1)`; also return the distribution that it was drawn from, None if greedy."""
    if not do_sample:
        return scores.argmax(-1, keepdim=True), None
    chances = scores.softmax(-1)
    return torch.multinomial(chances, 1), chances


def _verify(
    scores: torch.FloatTensor, draft: torch.LongTensor, chances: torch.FloatTensor | None
) -> tuple[torch.LongTensor, bool]:
    """Return the token to emit, and whether it is the draft."""
    if chances is None:
        token = scores.argmax(-1, keepdim=True)
        return token, bool(token == draft)
    wanted = scores.softmax(-1)
    if bool(torch.rand_like(wanted[:, :1]) * chances.gather(1, draft) < wanted.gather(1, draft)):
        return draft, True
    rest = (wanted - chances).clamp(min=0)
    # All of it is 0 only if the two distributions differ by rounding alone.
    return torch.multinomial(rest if bool(rest.any()) else wanted, 1), False


def _check(
    model: PreTrainedModel,
    input_ids: torch.LongTensor,
    cache: Cache | None,
    generation_config: GenerationConfig,
    drafters: Sequence[PRTLogitsProcessor],
    longest: int,
) -> None:
    """Refuse what cannot be decoded speculatively, see [`speculative_decoding`]."""
    if not drafters:
        raise PRTValueError(
            "There is no PRTLogitsProcessor to draft with.",
            expected="a PRTLogitsProcessor in `logits_processor`",
            found="none",
            remedy="logits_processor=[reward.processor(backbone)] beside `custom_generate`",
        )
    if not isinstance(longest, int) or longest < 1:
        raise PRTValueError("`num_draft_tokens` is not usable.", expected="1 or more", found=repr(longest))
    # Longer drafts would be forgotten before they are verified.
    if longest >= REMEMBERED:
        raise PRTValueError("`num_draft_tokens` is too large.", expected=f"below {REMEMBERED}", found=str(longest))
    mode = generation_config.get_generation_mode()
    if len(input_ids) > 1 or mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UnsupportedError(
            "Speculative decoding is for one text at a time.",
            expected="one prompt, greedy decoding or sampling",
            found=f"{len(input_ids)} rows, {mode.value}",
            remedy="generate without it, or prompt by prompt",
        )
    if type(cache) is not DynamicCache or not behaviour_of(Pass(model)).rewinds:
        raise UnsupportedError(
            "The backbone's cache cannot take drafts back.",
            expected="a dynamic cache of attention layers that several tokens at once are added to and cropped from",
            found="no cache" if cache is None else f"{type(cache).__name__} of {type(model).__name__}",
            remedy="generate without speculation",
        )
    if cache.get_seq_length() >= input_ids.shape[1]:
        raise UnsupportedError(
            "The rewards have to read all tokens that the backbone's cache holds.",
            expected=f"all tokens of the text, including those in `{CACHE}`",
            found=f"{input_ids.shape[1]} tokens, and {cache.get_seq_length()} in the cache",
        )
    if generation_config.output_hidden_states or generation_config.output_attentions:
        raise UnsupportedError(
            "Hidden states and attentions are not collected in speculative decoding.",
            expected="at most `output_scores` and `output_logits`",
        )
