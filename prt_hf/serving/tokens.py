"""Read and score the tokens of a backbone whose vocabulary is an update of a reward's."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..contract import TEXT_GENERATION
from ..networks.auto import load_processing_class
from ..reward.loading import load_saved_processing_class
from ..vocabulary import VocabularyContract, VocabularyMatch, unwrap_tokenizer

NEUTRAL = -1


@dataclass(frozen=True)
class ServedTokens:
    """The reward's token for each of the backbone's, in the few numbers that the engine's configuration has room for.

    There is one slot for each of the backbone's tokens in the engine's caches, so each is read as one token. One that
    the reward does not know is read as the last of those that `generate` of transformers reads in its place; where that
    leaves it out, as the token that pads or ends the reward's texts.

    Attributes:
        runs: `[length, first]` of runs of tokens whose ids follow each other in both vocabularies, in the backbone's
            order; `first` is the reward's id, or -1 for a run of neutral tokens.
        readings: the token that each neutral one is read as, in the backbone's order.
    """

    runs: list[list[int]]
    readings: list[int]

    @classmethod
    def of(cls, match: VocabularyMatch, reward: VocabularyContract) -> "ServedTokens | None":
        """Return the tokens of a match; None if all of the backbone's have the same ids in the reward.

        Args:
            match: of the reward's vocabulary with the backbone's.
            reward: the reward's contract.
        """
        columns = match.columns
        if columns is None or torch.equal(columns, torch.arange(match.size)):
            return None
        shifts = torch.where(columns < 0, -match.size - match.reward_size, columns - torch.arange(match.size))
        _, lengths = shifts.unique_consecutive(return_counts=True)
        firsts = columns[lengths.cumsum(0) - lengths]
        ends = [reward.added.get(reward.special_tokens.get(role)) for role in ("pad_token", "eos_token")]
        last_resort = next((token for token in ends if token is not None), 0)
        readings = [match.spelled[token] for token in (columns < 0).nonzero()[:, 0].tolist()]
        return cls(
            torch.stack([lengths, firsts], 1).tolist(),
            [spelled[-1] if spelled else last_resort for spelled in readings],
        )

    def columns(self) -> torch.LongTensor:
        """Return the reward's column for each of the backbone's, -1 for neutral ones."""
        lengths, firsts = torch.tensor(self.runs).T
        lengths, firsts, starts = (
            each.repeat_interleave(lengths) for each in (lengths, firsts, lengths.cumsum(0) - lengths)
        )
        places = torch.arange(len(firsts), device=firsts.device) - starts
        return torch.where(firsts < 0, NEUTRAL, firsts + places)

    def ids(self) -> torch.LongTensor:
        """Return the reward's token that each of the backbone's is read as."""
        columns = self.columns()
        readings = torch.tensor(self.readings, dtype=columns.dtype, device=columns.device)
        return columns.masked_scatter(columns < 0, readings)


def match_tokens(
    reward: VocabularyContract, folders: list[str], backbone: VocabularyContract, token_map: Mapping[str, str] | None
) -> ServedTokens | None:
    """Match a reward's tokens with the backbone's; return None if they are the same.

    Args:
        reward: its contract.
        folders: of the reward and of its base; the first that has a tokenizer has the reward's.
        backbone: the contract of the engine's tokenizer.
        token_map: the backbone's tokens -> the reward's, where names and roles do not tell.

    Raises:
        VocabularyMismatchError: another vocabulary, or a tokenizer that is not the reward's.
        PRTValueError: `token_map` names unknown tokens, or maps two onto one.
    """
    tokenizer = None
    if token_map or not reward.has_same_ids(backbone):
        tokenizer = unwrap_tokenizer(
            load_saved_processing_class(Path(folders[0]), TEXT_GENERATION)
            or load_processing_class(folders[-1], TEXT_GENERATION)
        )
    if tokenizer is not None:
        reward = reward.named_by(tokenizer)
    return ServedTokens.of(reward.check(backbone, token_map=token_map, tokenizer=tokenizer), reward)


class TokenReader(nn.Module):
    """Translates a step's tokens for a network, and its logits back into the backbone's columns.

    Attributes:
        neutral (`torch.LongTensor`, *optional*): the backbone's tokens that the reward does not score.
    """

    def __init__(self, tokens: ServedTokens, max_tokens: int):
        super().__init__()
        columns, ids = tokens.columns(), tokens.ids()
        neutral = (columns < 0).nonzero()[:, 0]
        self.register_buffer("_ids", ids.int(), persistent=False)
        self.register_buffer("_columns", columns.clamp(min=0), persistent=False)
        self.register_buffer("neutral", neutral if len(neutral) else None, persistent=False)
        # CUDA graphs read a network's tokens where they were when it was captured, as the engine's own always are.
        self.register_buffer("_read", torch.zeros(max_tokens, dtype=torch.int32), persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the reward's tokens for the backbone's, `(num_tokens,)`; the next call writes over them."""
        return torch.index_select(self._ids, 0, input_ids, out=self._read[: len(input_ids)])

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Return a network's logits in the backbone's columns; those of neutral tokens mean nothing.

        `(num_rows, reward_size)` -> `(num_rows, vocab_size)`.
        """
        return logits.index_select(-1, self._columns)
