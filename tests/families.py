"""Small tokenizers with the relations of real model families, and PRT across them by brute force in float64."""

import string
from dataclasses import dataclass

import tiny
import torch
from tokenizers import Tokenizer, models
from transformers import AddedToken, LogitsProcessor, PreTrainedTokenizerFast

LETTERS = [*string.ascii_lowercase, *string.digits, *"<>|/_ "]
PIECES = [*LETTERS, *(f"{first}{second}" for first in "abcde" for second in "vwxyz")]
ADDED = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|reserved_0|>", "<|reserved_1|>"]
ROLES = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}


def tokenizer(before=(), after=ADDED, pieces=PIECES, **roles):
    """Added tokens `before` and `after` the ordinary ones, which are letters and some pairs of letters."""
    names = [*before, *pieces, *after]
    backend = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in (*before, *after)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **ROLES | roles)


REWARD = tokenizer()
BACKBONES = {
    "identical": tokenizer(),
    "extended": tokenizer(after=[*ADDED, "<think>", "</think>", "<|tool|>"]),
    "renamed": tokenizer(
        after=["<pad>", "<bos>", "<|end|>", "<|person|>", "<|reserved_0|>", "<think>"], eos_token="<|end|>"
    ),
    "moved": tokenizer(before=["<pad>", "<bos>", "<eos>", "[A]", "[B]"], after=["<|user|>"]),
    "reduced": tokenizer(after=ADDED[:4]),
}


def build(kind, model=tiny.llama, seed=0, **config):
    """A model with a head for the tokens of a backbone, padded to a multiple of 8."""
    tokens = BACKBONES[kind]
    return model(seed, vocab_size=-(-len(tokens) // 8) * 8, pad_token_id=tokens.pad_token_id, **config)


@dataclass
class BruteForce(LogitsProcessor):
    """The neutral rule, written out: one row at a time, every token by its name, nothing cached."""

    network: torch.nn.Module
    backbone: PreTrainedTokenizerFast
    reward: PreTrainedTokenizerFast = None
    strength: float = 1.0
    mask: torch.Tensor = None
    token_map: dict = None
    prompt: torch.Tensor = None  # of the reward, and how many of the backbone's tokens it stands for
    length: int = 0

    def __post_init__(self):
        self.reward = self.reward or REWARD
        ours, theirs = self.reward.get_vocab(), self.backbone.get_vocab()
        token_map = self.token_map or {}
        self.pairs = {theirs[name]: ours[name] for name in ours.keys() & theirs if name not in token_map.values()}
        roles = [(getattr(self.backbone, role), getattr(self.reward, role)) for role in ("eos_token", *ROLES)]
        others = [(new, old) for new, _ in roles for _, old in roles if theirs[new] == ours[old]]
        for new, old in [*roles, *others]:
            is_new = new not in ours and theirs[new] not in self.pairs
            if is_new and old not in theirs and ours[old] not in self.pairs.values() and old not in token_map.values():
                self.pairs[theirs[new]] = ours[old]
        self.pairs |= {theirs[new]: ours[old] for new, old in token_map.items()}
        self.names = {index: name for name, index in theirs.items()}

    def read(self, ids):
        """The reward's tokens for the backbone's."""
        found = []
        for index in ids:
            if index in self.pairs:
                found.append(self.pairs[index])
            elif index == self.backbone.pad_token_id:
                found.append(self.reward.pad_token_id)
            elif self.names[index] not in (self.backbone.eos_token, self.backbone.bos_token):
                found += self.reward.encode(self.names[index], add_special_tokens=False)
        return found

    def rewards(self, ids):
        """r for the backbone's tokens after one row of them, NaN where neutral; None where nothing can be read."""
        text = self.read(ids) if self.prompt is None else self.prompt.tolist() + self.read(ids[self.length :])
        if not text:
            return None
        with torch.no_grad():
            logits = self.network(torch.tensor([text])).logits[0, -1].double()
        found = torch.full((len(self.names),), torch.nan, dtype=torch.float64)
        for new, old in self.pairs.items():
            found[new] = logits[old]
        return found

    def log_probs(self, ids, scores):
        """log pi after one row, from the backbone's logits."""
        probs = scores[: len(self.names)].double().softmax(-1)
        rewards = self.rewards(ids)
        if rewards is None:
            return probs.log()
        scored = ~rewards.isnan()
        weights = torch.where(scored, probs * (self.strength * rewards.nan_to_num()).exp(), 0.0)
        return torch.where(scored, weights / weights.sum() * probs[scored].sum(), probs).log()

    def __call__(self, input_ids, scores):
        output = torch.full_like(scores, -torch.inf)
        for row, ids in enumerate(input_ids.tolist()):
            if self.mask is not None:
                seen = self.mask[row * len(self.mask) // len(input_ids)].tolist()
                ids = [index for position, index in enumerate(ids) if position >= len(seen) or seen[position]]
            output[row, : len(self.names)] = self.log_probs(ids, scores[row]).float()
        return output
