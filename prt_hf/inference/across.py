r"""A reward on a backbone with another vocabulary.

The reward makes a tuned model of its source backbone, softmax(log pi_s + strength * r). For each token v of the
backbone

    rho(v) = log P(v comes next | tuned source) - log P(v comes next | source)

takes the place of the reward: softmax(log pi_b + rho). With one vocabulary rho is strength * r up to a constant, and
this is Eq. 10. The probabilities follow from those of source tokens in three steps:

1. *Push*: a source token counts for the backbone's token that begins the same text. Their sum is that of the source.
2. *Heal*: where the backbone stands inside of a source token, or the source would write the end of the text with
   another one, contexts up to six tokens back count as well, with the source tokens that span the place.
3. *Look ahead*: the backbone's tokens that are several source tokens wait for the second. The first tokens for which
   most probability waits are read in one further pass.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..functional import check_finite, signed_sum, strength_of_rows
from ..vocabulary.across import Tables, VocabularyMap
from .source_state import Path, SourceState
from .text_context import TextContext, TextContexts

HEALED = 6  # source tokens that the backbone may write in another way
_TRIED = 256  # source tokens that may span a place, the most probable ones
_LEAST = 1e-6  # of the probability of the text itself, for those to count
# The share of the backbone's own probability in both probabilities of a token that is several source tokens: where the
# source gives it next to none, the ratio says nothing.
_DAMPING = 1e-3
_WAITING = 1e-4  # probability that is worth a row of the further pass

Read = Callable[[Sequence[Path], int], list[torch.Tensor]]


class _Masses(NamedTuple):
    """Probabilities of the backbone's tokens under the tuned and the untuned source, as far as several tokens add up.

    Attributes:
        tokens (`torch.DoubleTensor` of shape `(2, rows, size)`): 0 for tokens with one source token, and for none.
        totals (`torch.DoubleTensor` of shape `(2, rows)`): their sum over all tokens.
    """

    tokens: torch.Tensor
    totals: torch.Tensor


class AcrossVocabularies:
    """rho for the next tokens of a backbone with another vocabulary than the reward's.

    Args:
        vocabularies: the map from the reward's tokens to the backbone's.
        signs: of the terms of the reward; the second of two is the source backbone.
        tuned: the network of the first term.
        untuned: the source backbone.
        lookahead: rows of the further pass for each row, at most.

    Attributes:
        contexts ([`TextContexts`]): the rows as texts.
        columns (`torch.LongTensor` of shape `(size,)`): for [`~prt_hf.functional.combine`]; -1 for neutral tokens.

    Raises:
        UnsupportedError: a source network that cannot take back what it has read.
    """

    def __init__(
        self, vocabularies: VocabularyMap, signs: Sequence[float], tuned: nn.Module, untuned: nn.Module, lookahead: int
    ):
        self._map, self._signs, self._lookahead = vocabularies, signs, lookahead
        self._state = SourceState(tuned, untuned, vocabularies.source.size)
        self.contexts = TextContexts(vocabularies)

    def columns_on(self, device: torch.device) -> torch.LongTensor:
        """Return `columns` on a device."""
        return self._map.on(device).columns

    def reset(self) -> None:
        """Free the caches."""
        self._state.reset()

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.Tensor, strength: float | torch.Tensor
    ) -> torch.Tensor:
        """Return rho for the tokens after each row.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): the backbone's tokens.
            scores (`torch.FloatTensor` of shape `(batch_size, size)`): the backbone's logits.
            strength: 1 / lambda, a number or one per row.

        Returns:
            `torch.DoubleTensor` of shape `(batch_size, size)`; 0 in rows of which the source can read nothing.
        """
        texts = self.contexts.texts(input_ids)
        is_empty = torch.tensor([not text.path for text in texts], device=scores.device)
        texts = [text if text.path else TextContext([0], 1, []) for text in texts]
        logits = self._state.read([text.path for text in texts], HEALED + 1)
        strengths = strength_of_rows(strength, len(scores)).to(scores.device)
        rho = self.ratios(texts, logits, self._state.peek, scores, strengths)
        return rho.masked_fill(is_empty[:, None], 0.0)

    def ratios(
        self,
        texts: Sequence[TextContext],
        logits: Sequence[torch.Tensor],
        peek: Read,
        scores: torch.Tensor,
        strengths: torch.Tensor,
    ) -> torch.Tensor:
        """Return rho for the tokens after each text.

        Args:
            texts: the texts.
            logits: of the source after the last tokens of each, `(2, tokens, source size)`.
            peek: gives them for other texts.
            scores: the backbone's logits, `(texts, size)`.
            strengths: one for each text.
        """
        device = scores.device
        tables = self._map.on(device)
        now = self._log_probs(torch.stack([each[:, -1] for each in logits], 1), strengths)
        gap = now[0] - now[1]
        rho = gap[:, tables.first]
        masses = _pushed(now, tables)
        rho[:, tables.several] = _ratio(masses.tokens[:, :, tables.several], rho[:, tables.several])
        for row, text in enumerate(texts):
            self._heal(row, text, logits[row], now, strengths, masses, rho, tables)
        if self._lookahead and len(tables.waiting):
            self._look_ahead(texts, peek, now, masses, rho, scores, strengths, tables)
        return rho.masked_fill(tables.columns < 0, 0.0)

    def _log_probs(self, logits: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities of the tuned and the untuned source, `(2, rows, ...)`, in double precision.

        Args:
            logits: of the network and the source backbone, `(2, rows, ...)`.
            strengths: one for each row.
        """
        device = strengths.device
        exact = torch.float32 if device.type == "mps" else torch.float64
        logits = logits.to(device, exact)
        reward = check_finite(signed_sum(self._signs, list(logits[: len(self._signs)])))
        tuned = logits[1] + strengths.view(-1, *[1] * (reward.ndim - 1)) * reward
        return torch.stack([tuned, logits[1]]).log_softmax(-1)

    def _heal(
        self,
        row: int,
        text: TextContext,
        logits: torch.Tensor,
        now: torch.Tensor,
        strengths: torch.Tensor,
        masses: _Masses,
        rho: torch.Tensor,
        tables: Tables,
    ) -> None:
        """Add source tokens that span the end of a text, from contexts before its last source tokens, in place."""
        source = self._map.source
        spanned, places = b"", []
        for back in range(1, min(HEALED, len(text.path) - text.fixed, logits.shape[1] - 1) + 1):
            spanned = source.bytes[text.path[-back]] + spanned
            if len(spanned) >= source.longest:
                break
            tokens = source.longer_than(spanned)
            if len(tokens):
                places.append((back, len(spanned), tokens))
        if not places:
            return
        device, last = rho.device, places[-1][0]
        steps = self._log_probs(logits[:, -1 - last : -1], strengths[row].expand(last))  # (2, last, source size)
        path = torch.tensor(text.path[-last:], device=device)
        written = steps.gather(-1, path.expand(2, -1)[..., None])[..., 0]
        since = written.flip(-1).cumsum(-1)  # log-probabilities of the last 1, 2, ... tokens
        for back, known, tokens in places:
            ids = tokens.to(device)
            found = steps[:, last - back][:, ids] - since[:, back - 1, None]  # relative to the text itself
            best = found.amax(0)
            order = best.topk(min(_TRIED, len(ids))).indices
            order = order[best[order] > torch.log(torch.tensor(_LEAST))]
            history = _covering(text.history, known, self._map)
            targets = torch.tensor(self._map.continuations(history, known, ids[order].tolist()), device=device)
            is_next = targets >= 0
            if not bool(is_next.any()):
                continue
            targets, added = targets[is_next], found[:, order[is_next]].exp()
            masses.totals[:, row] += added.sum(-1)
            fresh = targets.unique()
            fresh = fresh[tables.is_single[fresh] & (masses.tokens[0, row, fresh] == 0)]
            masses.tokens[:, row, fresh] = now[:, row, tables.first[fresh]].exp()
            masses.tokens[:, row].index_add_(-1, targets, added)
            rho[row, targets] = _ratio(masses.tokens[:, row, targets], rho[row, targets])

    def _look_ahead(
        self,
        texts: Sequence[TextContext],
        peek: Read,
        now: torch.Tensor,
        masses: _Masses,
        rho: torch.Tensor,
        scores: torch.Tensor,
        strengths: torch.Tensor,
        tables: Tables,
    ) -> None:
        """Read the second token where most probability waits for it, in place."""
        log_backbone = scores.to(rho.dtype).log_softmax(-1)
        combined = (log_backbone + rho.masked_fill(tables.columns < 0, 0.0)).softmax(-1)
        firsts = tables.first[tables.waiting]
        waiting = rho.new_zeros(len(rho), self._map.source.size).index_add_(1, firsts, combined[:, tables.waiting])
        best = waiting.topk(min(self._lookahead, waiting.shape[1]))
        rows, ranks = (best.values > _WAITING).nonzero(as_tuple=True)
        if not len(rows):
            return
        read = best.indices[rows, ranks]
        pairs = list(zip(rows.tolist(), read.tolist(), strict=True))
        logits = peek([[*texts[row].path, token] for row, token in pairs], 1)
        then = self._log_probs(torch.cat(logits, 1), strengths[rows])  # (2, pairs, source size)
        ends = torch.searchsorted(firsts, read, right=True).tolist()
        starts = torch.searchsorted(firsts, read).tolist()
        off = (masses.totals[1] / masses.totals[0]).log()
        for index, (row, token) in enumerate(pairs):
            tokens = tables.waiting[starts[index] : ends[index]]
            found = (now[:, row, token, None] + then[:, index][:, tables.second[tokens]]).exp()
            found = (found + masses.tokens[:, row, tokens]) / masses.totals[:, row, None]
            rho[row, tokens] = _ratio(found + _DAMPING * log_backbone[row, tokens].exp(), rho[row, tokens]) - off[row]


def _pushed(now: torch.Tensor, tables: Tables) -> _Masses:
    """Return the masses of tokens that several source tokens stand for, of log-probabilities `(2, rows, ...)`."""
    _, rows, _ = now.shape
    sums = now.new_zeros(2, rows, len(tables.several))
    sums.index_add_(-1, tables.pushed, now[:, :, tables.pushing].exp())
    tokens = now.new_zeros(2, rows, len(tables.columns))
    tokens[:, :, tables.several] = sums
    return _Masses(tokens, now.new_ones(2, rows))


def _ratio(masses: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """Return the log-ratio of two masses, `(2, ...)` -> `(...)`, or another where one of them is 0."""
    return torch.where((masses > 0).all(0), masses[0].log() - masses[1].log(), otherwise)


def _covering(history: Sequence[int], length: int, vocabularies: VocabularyMap) -> tuple[int, ...]:
    """Return the last tokens of the backbone that have at least as many bytes, and begin with a whole letter."""
    count, text = 0, b""
    while count < len(history) and (len(text) < length or 0x80 <= text[0] < 0xC0):
        count += 1
        text = vocabularies.target.bytes[history[-count]] + text
    return tuple(history[len(history) - count :])
