"""Turn the rows of `generate` into those that a reward reads: its own tokens, after its own prompt."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import PRTValueError
from ..vocabulary import VocabularyMatch
from ..vocabulary.translation import check_ids

logger = logging.get_logger(__name__)

Prompt = torch.LongTensor | Mapping[str, torch.Tensor]  # token ids, or with `attention_mask` as tokenizers return them


class Rows(NamedTuple):
    """Rows for the reward.

    Attributes:
        input_ids (`torch.LongTensor` of shape `(batch_size, reward_length)`): ending with the last token.
        attention_mask (`torch.LongTensor` of the same shape, *optional*): 0 at padding; None without any.
        is_empty (`torch.BoolTensor` of shape `(batch_size,)`, *optional*): rows without tokens for the reward.
    """

    input_ids: torch.LongTensor
    attention_mask: torch.LongTensor | None = None
    is_empty: torch.Tensor | None = None

    @classmethod
    def of(cls, input_ids: torch.LongTensor, attention_mask: torch.LongTensor) -> "Rows":
        """Return rows with their padding, wherever it was, moved to the left."""
        order = attention_mask.argsort(dim=1, stable=True)
        ids, mask = input_ids.gather(1, order), attention_mask.gather(1, order)
        width = max(1, int(mask.sum(1).max()))
        ids, mask = ids[:, -width:], mask[:, -width:].clone()
        is_empty = ~mask.bool().any(1)
        mask[is_empty, -1] = 1  # a position to compute at
        return cls(ids, None if bool(mask.all()) else mask, is_empty if bool(is_empty.any()) else None)


class _OfPrompts:
    """A value for the prompts of one call of `generate`, and the prompts that it was first used for."""

    def __init__(self, value: torch.LongTensor | None, mask: torch.LongTensor | None = None):
        self.value, self.mask = value, mask
        self.prompts: torch.LongTensor | None = None

    def copies(self, input_ids: torch.LongTensor, length: int | None, name: str) -> int:
        """Return how many rows `generate` has made of each prompt.

        Args:
            input_ids: the rows so far.
            length: of the prompts; None if it is that of the first rows.
            name: of the attribute, for the error.

        Raises:
            PRTValueError: the rows belong to other prompts.
        """
        rows, count = len(input_ids), len(self.value)
        if length is None:
            length = input_ids.shape[1] if self.prompts is None else self.prompts.shape[1]
        is_fitting = rows % count == 0 and input_ids.shape[1] >= length
        if is_fitting:
            start = input_ids[:, :length]
            if self.prompts is None and input_ids.shape[1] == length:  # else the text began under another value
                self.prompts = start[:: rows // count].clone()
            # Beams never leave their prompt, so row i still starts with prompt i // copies.
            is_fitting = self.prompts is not None and torch.equal(
                start, self.prompts.repeat_interleave(rows // count, 0)
            )
        if not is_fitting:
            raise PRTValueError(
                f"`{name}` belongs to other prompts than these.",
                expected=f"the rows of {count} prompts of {length} tokens",
                found=f"{rows} rows of {input_ids.shape[1]} tokens",
                remedy=f"set `processor.{name}` to that of these prompts, or to None",
            )
        return rows // count


class RewardContext:
    """The text of each row as the reward reads it.

    Args:
        tokenizer: the backbone's.
        match: of the backbone's vocabulary with the reward's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, match: VocabularyMatch):
        self._tokenizer, self._match = tokenizer, match
        self._warned_of_padding = self._warned_of_neutral = False
        self.attention_mask = self.prompt = None

    @property
    def attention_mask(self) -> torch.LongTensor | None:
        """`(batch_size, prompt_length)`, the mask given to `generate`; set it anew for other prompts."""
        return self._mask.value

    @attention_mask.setter
    def attention_mask(self, mask: torch.LongTensor | None) -> None:
        if mask is not None and mask.ndim != 2:
            raise PRTValueError(
                "`attention_mask` is not usable.",
                expected="shape (batch_size, prompt_length)",
                found=str(tuple(mask.shape)),
            )
        self._mask = _OfPrompts(mask)

    @property
    def prompt(self) -> torch.LongTensor | None:
        """The reward's own prompts."""
        return self._prompt.value

    @prompt.setter
    def prompt(self, prompt: Prompt | None) -> None:
        if prompt is None:
            self._prompt = _OfPrompts(None)
            return
        ids, mask = prompt, None
        if isinstance(prompt, Mapping):
            ids, mask = prompt.get("input_ids"), prompt.get("attention_mask")
        is_usable = isinstance(ids, torch.Tensor) and ids.ndim == 2 and ids.numel() > 0
        if not is_usable or (mask is not None and mask.shape != ids.shape):
            raise PRTValueError(
                "`prompt` is not usable.",
                expected="token ids of shape (batch_size, length), or a mapping with `input_ids` and `attention_mask`, "
                "as the reward's tokenizer returns it with `return_tensors='pt'`",
                found=f"{type(ids).__name__} {tuple(getattr(ids, 'shape', ())) or ''}",
            )
        check_ids(ids, self._match.reward_size)
        self._prompt = _OfPrompts(ids, torch.ones_like(ids) if mask is None else mask)

    def read(self, input_ids: torch.LongTensor) -> Rows:
        """Return what the reward reads of rows of the backbone's tokens, `(batch_size, sequence_length)`.

        Raises:
            VocabularyMismatchError: an id that the tokenizer does not have.
            PRTValueError: the mask or prompt belongs to other rows.
        """
        if self._prompt.value is not None:
            return self._after_own_prompt(input_ids)
        mask = self._mask_of(input_ids)
        if mask is not None and bool(mask.all()):
            mask = None
        if self._match.is_identical:
            check_ids(input_ids, self._match.size)
            return Rows(input_ids, mask)
        ids = self._match.to_reward.one_to_one(input_ids, mask)
        if ids is not None:
            return Rows(ids, mask)
        self._warn_of_neutral()
        rows = self._match.to_reward.rows(input_ids, mask)
        return Rows.of(rows.input_ids, rows.attention_mask)

    def _after_own_prompt(self, input_ids: torch.LongTensor) -> Rows:
        copies = self._prompt.copies(input_ids, None, "prompt")
        prompt, mask = (
            each.to(input_ids.device).repeat_interleave(copies, 0) for each in (self._prompt.value, self._prompt.mask)
        )
        generated = input_ids[:, self._prompt.prompts.shape[1] :]
        if self._match.is_identical:
            generated_mask = torch.ones_like(generated)
        elif generated.shape[1]:
            generated, generated_mask, *_ = self._match.to_reward.rows(generated)
        else:
            generated_mask = generated
        return Rows.of(torch.cat([prompt, generated], 1), torch.cat([mask, generated_mask], 1))

    def _warn_of_neutral(self) -> None:
        if not self._warned_of_neutral:
            self._warned_of_neutral = True
            logger.warning(
                "The text holds tokens that the reward does not know: it reads them as its own tokens for the same "
                "text, or leaves them out."
            )

    def _mask_of(self, input_ids: torch.LongTensor) -> torch.LongTensor | None:
        """Return the mask of all rows, with ones for generated tokens; None if there is no padding."""
        if self._mask.value is None:
            return self._inferred_mask(input_ids)
        mask = self._mask.value.to(input_ids.device)
        copies = self._mask.copies(input_ids, mask.shape[1], "attention_mask")
        generated = mask.new_ones(len(input_ids), input_ids.shape[1] - mask.shape[1])
        return torch.cat([mask.repeat_interleave(copies, 0), generated], 1)

    def _inferred_mask(self, input_ids: torch.LongTensor) -> torch.LongTensor | None:
        """Mask left padding: the run of pad tokens that a row starts with."""
        pad = self._tokenizer.pad_token_id
        if pad is None:
            return None
        leading = (input_ids == pad).long().cumprod(1).sum(1)
        if pad in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            # The token may open the text itself. A batch is padded to its longest prompt, so what all rows share is
            # text.
            if bool(leading.any()) and not self._warned_of_padding:
                self._warned_of_padding = True
                logger.warning(
                    f"Rows start with {self._tokenizer.pad_token!r}, which both pads and starts or ends texts: taken "
                    "as padding where a row has more of them than the row with the fewest. Pass `attention_mask=` to "
                    "be exact."
                )
            leading = leading - leading.min()
        return (torch.arange(input_ids.shape[1], device=input_ids.device) >= leading[:, None]).long()
