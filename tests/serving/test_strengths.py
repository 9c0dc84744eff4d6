"""Strengths of single requests, by the interfaces of both of vLLM's runners; V2 itself runs on GPUs only."""

from types import SimpleNamespace

import numpy as np
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

from prt_hf.functional import combine
from prt_hf.serving import strength as strengths_of

BACKBONE, FIRST, SECOND = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
DEFAULT = (0.7, -0.4)


def steps(vllm_config):
    return strengths_of.Steps(vllm_config, list(DEFAULT), size=6)


def expected(row, strengths):
    rewards = sum(value * reward[row, :6] for value, reward in zip(strengths, (FIRST, SECOND), strict=True))
    return (BACKBONE[row, :6].log_softmax(-1) + rewards).log_softmax(-1)


def asked(strengths):
    return SamplingParams(extra_args={"prt_strength": strengths})


def test_v1_gives_rows_their_strengths_before_the_step():
    config = SimpleNamespace(model_config=object())
    model = steps(config)
    processor = strengths_of.RequestStrengthsV1Of2(config, None, False)
    added = [(row, params, [], []) for row, params in enumerate([SamplingParams(), asked([0, 2]), asked([1, 1])])]
    processor.update_state(BatchUpdate(3, [], added, []))
    logits = model.combine(BACKBONE.clone(), [FIRST, SECOND])
    for row, strengths in enumerate([DEFAULT, (0, 2), (1, 1), DEFAULT]):
        torch.testing.assert_close(logits[row], expected(row, strengths))
    # A prompt that is scored in the same step has rows of its own.
    torch.testing.assert_close(model.combine(BACKBONE.clone(), [FIRST, SECOND])[1], expected(1, DEFAULT))
    processor.update_state(BatchUpdate(2, [0], [], [(2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    for _ in range(2):
        logits = model.combine(BACKBONE.clone(), [FIRST, SECOND])
        for row, strengths in enumerate([(1, 1), (0, 2), DEFAULT]):
            torch.testing.assert_close(logits[row], expected(row, strengths))
        processor.update_state(None)


def test_v2_changes_rows_once_they_are_there():
    """Slot 7 has two rows, as with drafts; slot 3 has none of its own any more; what is masked stays so."""
    config = SimpleNamespace(model_config=object())
    model = steps(config)
    processor = strengths_of.RequestStrengthsV2Of2(config, None)
    assert [processor.add_request(slot, params) for slot, params in ((7, asked([0, 2])), (3, asked([1, 1])))] == [
        True
    ] * 2
    assert not processor.add_request(3, SamplingParams())
    raw = model.combine(BACKBONE.clone(), [FIRST, SECOND])
    chosen_from = raw.clone()
    chosen_from[1, 4] = -torch.inf
    slots = torch.tensor([3, 7, 7, 5])
    context = LogitsContext(slots, slots[[0, 1, 3]], np.array([3, 7, 5]), *[torch.zeros(4)] * 3, np.zeros(3))
    processor.apply(chosen_from, context)
    for row, strengths in enumerate([DEFAULT, (0, 2), (0, 2), DEFAULT]):
        torch.testing.assert_close(raw[row], expected(row, strengths))
    assert chosen_from[1, 4] == -torch.inf
    torch.testing.assert_close(chosen_from[2].log_softmax(-1), expected(2, (0, 2)))


def test_a_strength_alone_is_that_of_the_only_reward():
    processor = strengths_of.RequestStrengthsV1Of1
    processor.validate_params(asked(0.5))
    assert strengths_of.read(asked(0.5)) == (0.5,) and strengths_of.read(SamplingParams()) is None
    assert processor is strengths_of.RequestStrengthsV1Of1


def test_the_last_strength_is_for_the_reward_that_a_request_names():
    """Rows 0 and 2 name one, of strength 2; before the step (V1) and after it (V2)."""
    config = SimpleNamespace(model_config=object())
    model = strengths_of.Steps(config, [0.7], size=6)
    named_strengths = torch.tensor([2.0, torch.nan, 2.0, torch.nan])
    model.next_rows = {2: (0.0, 0.5), 3: (1.0, 0.5)}
    logits = model.combine(BACKBONE.clone(), [FIRST, SECOND], named_strengths)
    for row, strengths in enumerate([(0.7, 2.0), (0.7, 0.0), (0.0, 0.5), (1.0, 0.0)]):
        torch.testing.assert_close(logits[row], expected(row, strengths))
    chosen_from = logits.clone()
    model.change(chosen_from, {0: (1.0, 1.0), 1: (1.0, 1.0)})
    for row, strengths in enumerate([(1.0, 1.0), (1.0, 0.0)]):
        torch.testing.assert_close(logits[row], expected(row, strengths))
        torch.testing.assert_close(chosen_from[row].log_softmax(-1), expected(row, strengths))


def test_neutral_tokens_keep_their_probability_at_all_strengths():
    """Token 5 is neutral to the first reward, 0 and 5 to the second; the strengths of rows 1 and 2 are changed."""
    config = SimpleNamespace(model_config=object())
    neutral = [torch.tensor([5]), torch.tensor([0, 5])]
    log_backbone = BACKBONE[:, :6].log_softmax(-1)

    def log_probs(row, strengths):
        found = log_backbone[row]
        for reward, value, tokens in zip((FIRST, SECOND), strengths, neutral, strict=True):
            found = combine(found, reward[row], value, torch.arange(6).index_fill(0, tokens, -1))
        return found

    model = steps(config)
    model.next_rows = {1: (0, 2)}  # as V1 does
    first = model.combine(BACKBONE.clone(), [FIRST, SECOND], None, neutral).clone()
    for row, strengths in enumerate([DEFAULT, (0, 2), DEFAULT, DEFAULT]):
        torch.testing.assert_close(first[row], log_probs(row, strengths))
    raw = model.combine(BACKBONE.clone(), [FIRST, SECOND], None, neutral)
    chosen_from = raw + 0.5
    chosen_from[1, 4] = -torch.inf
    model.change(chosen_from, {1: (0, 2), 2: (1, 1)})  # as V2 does
    for row, strengths in enumerate([DEFAULT, (0, 2), (1, 1), DEFAULT]):
        torch.testing.assert_close(raw[row], log_probs(row, strengths))
    torch.testing.assert_close(chosen_from[2], log_probs(2, (1, 1)) + 0.5)
    assert chosen_from[1, 4] == -torch.inf
    torch.testing.assert_close(raw[:, 5], log_backbone[:, 5])
