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
_AT_ONCE = 8  # positions of a text that are scored together

Read = Callable[[Sequence[Path], int], list[torch.Tensor]]


class Step:
    """The next tokens of several texts.

    Args:
        now: log-probabilities of the tuned and the untuned source, `(2, rows, source size)`.
        tables: the map of the vocabularies.

    Attributes:
        rho (`torch.DoubleTensor` of shape `(rows, size)`): the log-ratio for each of the backbone's tokens, up to a
            constant for each row.
        masses (`torch.DoubleTensor` of shape `(2, rows, size)`): their probabilities under the tuned and the untuned
            source, as far as several source tokens add up; else 0.
        totals (`torch.DoubleTensor` of shape `(2, rows)`): the sums over all tokens, that of the text itself being 1.
    """

    def __init__(self, now: torch.Tensor, tables: Tables):
        self.now, self.tables = now, tables
        several, rows = tables.several, now.shape[1]
        sums = now.new_zeros(2, rows, len(several))
        sums.index_add_(-1, tables.pushed, now[:, :, tables.pushing].exp())
        self.masses = now.new_zeros(2, rows, len(tables.columns))
        self.masses[:, :, several] = sums
        self.totals = now.new_ones(2, rows)
        self.rho = (now[0] - now[1])[:, tables.first]
        self.rho[:, several] = _ratio(sums, self.rho[:, several])

    def add(self, row: int, tokens: torch.LongTensor, added: torch.Tensor) -> None:
        """Add masses, `(2, n)`, to tokens of a row, `(n,)`, one of which may stand there several times."""
        self.totals[:, row] += added.sum(-1)
        fresh = tokens.unique()
        fresh = fresh[self.tables.is_single[fresh] & (self.masses[0, row, fresh] == 0)]
        self.masses[:, row, fresh] = self.now[:, row, self.tables.first[fresh]].exp()
        self.masses[:, row].index_add_(-1, tokens, added)
        self.rho[row, tokens] = _ratio(self.masses[:, row, tokens], self.rho[row, tokens])

    def resolve(self, row: int, tokens: torch.LongTensor, chained: torch.Tensor, backbone: torch.Tensor) -> None:
        """Set rho of tokens of a row, `(n,)`, that are several source tokens.

        Args:
            row: index of the row.
            tokens: the tokens.
            chained: log-probabilities of their first source tokens in a row, `(2, n)`.
            backbone: the backbone's log-probabilities of the tokens, `(n,)`.
        """
        found = (chained.exp() + self.masses[:, row, tokens]) / self.totals[:, row, None]
        off = (self.totals[1, row] / self.totals[0, row]).log()  # rho of all other tokens lacks it
        self.rho[row, tokens] = _ratio(found + _DAMPING * backbone.exp(), self.rho[row, tokens]) - off


class AcrossVocabularies:
    """rho for the next tokens of a backbone with another vocabulary than the reward's.

    Args:
        vocabularies: the map from the reward's tokens to the backbone's.
        signs: of the terms of the reward; the second of two is the source backbone.
        tuned: the network of the first term.
        untuned: the source backbone.
        lookahead: rows of the further pass for each row, at most.

    Attributes:
        vocabularies ([`VocabularyMap`]): the map.
        contexts ([`TextContexts`]): the rows as texts.

    Raises:
        UnsupportedError: a source network that cannot take back what it has read.
    """

    def __init__(
        self, vocabularies: VocabularyMap, signs: Sequence[float], tuned: nn.Module, untuned: nn.Module, lookahead: int
    ):
        self.vocabularies, self._signs, self._lookahead = vocabularies, signs, lookahead
        self._state = SourceState(tuned, untuned, vocabularies.source.size)
        self.contexts = TextContexts(vocabularies)

    @property
    def tokens_computed(self) -> int:
        """Tokens that the source has read, over all calls."""
        return self._state.tokens_computed

    def columns_on(self, device: torch.device) -> torch.LongTensor:
        """Return columns for [`~prt_hf.functional.combine`], `(size,)`: -1 for neutral tokens, else their own ids."""
        return self.vocabularies.on(device).columns

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
        return self._known(texts, self._state.read, scores, strength_of_rows(strength, len(scores)))

    def score(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.LongTensor,
        positions: torch.LongTensor,
        scores: torch.Tensor,
        strength: float,
    ) -> torch.Tensor:
        """Return rho for the tokens after several positions of one text, `(n, size)`.

        The source reads the text once, then what the backbone has written in another way.

        Args:
            input_ids: the backbone's tokens, `(sequence_length,)`.
            attention_mask: of the same shape, 0 at padding.
            positions: `(n,)`, in ascending order.
            scores: the backbone's logits there, `(n, size)`.
            strength: 1 / lambda.
        """
        found = []
        for some, their_scores in zip(positions.split(_AT_ONCE), scores.split(_AT_ONCE), strict=True):
            texts = self.contexts.prefixes(input_ids, attention_mask, some)
            paths = [text.path for text in texts if text.path]
            if paths:
                self._state.read([paths[-1]], max(map(len, paths)) - min(map(len, paths)) + HEALED + 1)
            strengths = torch.full((len(some),), float(strength))
            found.append(self._known(texts, self._state.peek, their_scores, strengths))
        return torch.cat(found)

    def _known(
        self, texts: Sequence[TextContext], read: Read, scores: torch.Tensor, strengths: torch.Tensor
    ) -> torch.Tensor:
        """Return rho as [`_ratios`] does, and 0 where the source can read nothing."""
        is_empty = torch.tensor([not text.path for text in texts], device=scores.device)
        texts = [text if text.path else TextContext([0], 1, []) for text in texts]
        return self._ratios(texts, read, scores, strengths.to(scores.device)).masked_fill(is_empty[:, None], 0.0)

    def _ratios(
        self, texts: Sequence[TextContext], read: Read, scores: torch.Tensor, strengths: torch.Tensor
    ) -> torch.Tensor:
        """Return rho for the tokens after each text.

        Args:
            texts: the texts.
            read: gives the source's logits after the last tokens of each.
            scores: the backbone's logits, `(texts, size)`.
            strengths: one for each text.
        """
        logits = read([text.path for text in texts], HEALED + 1)
        tables = self.vocabularies.on(scores.device)
        now = self._log_probs(torch.stack([each[:, -1] for each in logits], 1), strengths)
        step = Step(now.to(_exact(scores.device)), tables)
        for row, text in enumerate(texts):
            self._heal(step, row, text, logits[row], strengths[row])
        if self._lookahead and len(tables.waiting):
            self._look_ahead(step, texts, scores, strengths)
        return step.rho.masked_fill(tables.columns < 0, 0.0)

    def _log_probs(self, logits: torch.Tensor, strengths: torch.Tensor) -> torch.Tensor:
        """Return log-probabilities of the tuned and the untuned source, `(2, rows, source size)`.

        Args:
            logits: of the network and the source backbone, `(2, rows, source size)`.
            strengths: one for each row.
        """
        logits = logits.to(strengths.device, torch.promote_types(logits.dtype, torch.float32))
        reward = check_finite(signed_sum(self._signs, list(logits[: len(self._signs)])))
        return torch.stack([logits[1] + strengths[:, None].to(reward.dtype) * reward, logits[1]]).log_softmax(-1)

    def _heal(self, step: Step, row: int, text: TextContext, logits: torch.Tensor, strength: torch.Tensor) -> None:
        """Add source tokens that span the end of a text, from contexts before its last source tokens."""
        source = self.vocabularies.source
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
        device, last = step.rho.device, places[-1][0]
        earlier = self._log_probs(logits[:, -1 - last : -1], strength.expand(last))  # (2, last, source size)
        path = torch.tensor(text.path[-last:], device=device)
        written = earlier.gather(-1, path.expand(2, -1)[..., None])[..., 0].to(step.rho.dtype)
        since = written.flip(-1).cumsum(-1)  # log-probabilities of the last 1, 2, ... tokens
        for back, known, tokens in places:
            ids = tokens.to(device)
            found = earlier[:, last - back][:, ids].to(step.rho.dtype) - since[:, back - 1, None]
            best = found.amax(0)  # the text itself has 0
            order = best.topk(min(_TRIED, len(ids))).indices
            order = order[best[order].exp() > _LEAST]
            history = _covering(text.history, known, self.vocabularies)
            targets = torch.tensor(self.vocabularies.continuations(history, known, ids[order].tolist()), device=device)
            is_next = targets >= 0
            if bool(is_next.any()):
                step.add(row, targets[is_next], found[:, order[is_next]].exp())

    def _look_ahead(
        self, step: Step, texts: Sequence[TextContext], scores: torch.Tensor, strengths: torch.Tensor
    ) -> None:
        """Read the second source token where most probability waits for it."""
        tables, dtype = step.tables, step.rho.dtype
        log_backbone = scores.log_softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        combined = (log_backbone + step.rho.masked_fill(tables.columns < 0, 0.0)).softmax(-1)
        firsts = tables.first[tables.waiting]
        waiting = step.rho.new_zeros(len(texts), self.vocabularies.source.size)
        waiting.index_add_(1, firsts, combined[:, tables.waiting])
        best = waiting.topk(min(self._lookahead, waiting.shape[1]))
        rows, ranks = (best.values > _WAITING).nonzero(as_tuple=True)
        if not len(rows):
            return
        read = best.indices[rows, ranks]
        pairs = list(zip(rows.tolist(), read.tolist(), strict=True))
        logits = self._state.peek([[*texts[row].path, token] for row, token in pairs], 1)
        then = self._log_probs(torch.cat(logits, 1), strengths[rows])  # (2, pairs, source size)
        starts, ends = (torch.searchsorted(firsts, read, right=right).tolist() for right in (False, True))
        for index, (row, token) in enumerate(pairs):
            tokens = tables.waiting[starts[index] : ends[index]]
            chained = step.now[:, row, token, None] + then[:, index][:, tables.second[tokens]].to(dtype)
            step.resolve(row, tokens, chained, log_backbone[row, tokens].to(dtype))


def _exact(device: torch.device) -> torch.dtype:
    """Return the precision in which probabilities are added up: small ones of large vocabularies count."""
    return torch.float32 if device.type == "mps" else torch.float64


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
