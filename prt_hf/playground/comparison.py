"""Read one PRT model under several settings of its strengths at once: answers, and how far the rewards moved them."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList
from transformers.generation import BaseStreamer

from .. import inference
from ..contract import MINUS_BASE, TEXT_GENERATION
from ..errors import ContextLengthError, PRTValueError
from ..hub.card import PRT_CLASSES
from ..inference.prt_model import PRTPreTrainedModel
from ..networks.anatomy import context_length, task_of
from ..networks.auto import load_pretrained
from ..vocabulary import unwrap_tokenizer

ALONE, REWARDED, CARRIED_OVER = "Backbone alone", "With the rewards", "EFT"


def load(
    backbone: str | Path,
    rewards: Sequence[str | Path],
    strengths: Sequence[float] | None = None,
    *,
    revision: str | None = None,
    quantization_config: Any = None,
    across_vocabularies: bool = False,
    **load_kwargs: Any,
) -> PRTPreTrainedModel:
    """Load a backbone with rewards as the PRT model of its task.

    Args:
        backbone: Hub id or folder.
        rewards: Hub ids or folders of rewards, or of ordinary LoRA adapters, which are carried over.
        strengths (*optional*): 1 / lambda, one for each reward; by default as they were tuned.
        revision (*optional*): branch, tag or commit of the backbone.
        quantization_config (*optional*): of the backbone alone.
        across_vocabularies: whether rewards may have other vocabularies than the backbone.
        **load_kwargs: for `from_pretrained` of all parts (`dtype`, `device_map`, `token`, ...).
    """
    own = {"revision": revision, "quantization_config": quantization_config}
    pretrained = load_pretrained(str(backbone), **own, **load_kwargs)
    model_class = getattr(inference, PRT_CLASSES[task_of(pretrained)])
    load_kwargs["across_vocabularies"] = across_vocabularies
    return model_class.from_parts(pretrained, list(rewards), strengths and list(strengths), **load_kwargs)


class Candidate(NamedTuple):
    """A token or label that may come next.

    Attributes:
        index (`int`): its id.
        before (`float`): pi_pt, its probability for the backbone alone.
        after (`float`): pi_theta, its probability with the rewards.
        rewards (`tuple[float, ...]`): each reward's r, in the normalisation of Prop. 3.1: E_pt[exp(r)] = 1, so that a
            token with r = 0 keeps its probability at strength 1, as neutral tokens do.
    """

    index: int
    before: float
    after: float
    rewards: tuple[float, ...]


class Comparison:
    """A PRT model, read under several settings of its strengths at once, a row of the batch for each.

    Several threads take turns, since the strengths are the model's.

    Args:
        model: a PRT model, on any device.
        names (*optional*): of the rewards, to show.
    """

    def __init__(self, model: PRTPreTrainedModel, names: Sequence[str] | None = None):
        self.model = model.eval()
        self.names = list(names or (f"reward {number}" for number, _ in enumerate(model.rewards, 1)))
        self._lock = threading.Lock()

    @property
    def is_text(self) -> bool:
        """Whether the model generates text; else it is a classifier."""
        return self.model.task == TEXT_GENERATION

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The backbone's tokenizer."""
        return unwrap_tokenizer(self.model.processing_class)

    def sides(self, strengths: Sequence[float]) -> dict[str, list[float]]:
        """Return the sides to compare: title -> strength of each reward.

        Tuned rewards are added together. LoRAs that are carried over are a side of their own, EFT.
        """
        are_carried = [MINUS_BASE in reward.config.terms for reward in self.model.rewards]
        kinds = {REWARDED: False, CARRIED_OVER: True}
        return {ALONE: [0.0] * len(are_carried)} | {
            title: [value if each is kind else 0.0 for value, each in zip(strengths, are_carried, strict=True)]
            for title, kind in kinds.items()
            if kind in are_carried
        }

    @torch.no_grad()
    def log_probs(
        self, inputs: Mapping[str, torch.Tensor], settings: Sequence[Sequence[float]], **kwargs: Any
    ) -> torch.Tensor:
        """Return log pi of one input under each setting, `(settings, ..., tokens or labels)`, float32.

        Args:
            inputs: of the model, each of shape `(1, ...)`.
            settings: strengths of all rewards.
            **kwargs: for the model.
        """
        rows = {
            name: value.to(self.model.device).expand(len(settings), *value.shape[1:]) for name, value in inputs.items()
        }
        with self._under(settings):
            return self.model(**rows, **kwargs).logits

    def candidates(
        self, inputs: Mapping[str, torch.Tensor], strengths: Sequence[float], count: int = 10
    ) -> list[Candidate]:
        """Return the likeliest next tokens or labels before the rewards and after, the likeliest after them first.

        Args:
            inputs: of the model, one row.
            strengths: of all rewards.
            count: the number of the likeliest before, and of those after; at most twice as many are returned.
        """
        units = torch.eye(len(strengths)).tolist()
        kwargs = {"use_cache": False, "logits_to_keep": 1} if self.is_text else {}
        rows = self.log_probs(inputs, [[0.0] * len(strengths), strengths, *units], **kwargs)
        before, after, *with_each = rows.view(len(rows), -1).cpu()
        likeliest = {int(index) for row in (before, after) for index in row.topk(min(count, len(row))).indices}
        return [
            Candidate(
                index,
                before[index].exp().item(),
                after[index].exp().item(),
                tuple((row[index] - before[index]).item() for row in with_each),
            )
            for index in sorted(likeliest, key=lambda index: -after[index])
        ]

    def next_tokens(self, ids: Sequence[int], strengths: Sequence[float], count: int = 10) -> list[Candidate]:
        """Return the likeliest tokens after a text, as [`candidates`] does."""
        return self.candidates(_as_inputs(ids), strengths, count)

    def moved(self, prompt: Sequence[int], answer: Sequence[int], strengths: Sequence[float]) -> torch.Tensor:
        """Return log pi_pt and log pi_theta of each token of an answer, `(2, tokens of the answer)`."""
        settings = [[0.0] * len(strengths), strengths]
        inputs = _as_inputs([*prompt, *answer[:-1]])
        rows = self.log_probs(inputs, settings, use_cache=False, logits_to_keep=len(answer)).cpu()
        return rows.gather(-1, torch.tensor(answer)[None, :, None].expand(2, -1, -1))[..., 0]

    def answers(
        self, prompt: Sequence[int], settings: Sequence[Sequence[float]], max_new_tokens: int
    ) -> Iterator[list[list[int]]]:
        """Generate greedily under all settings at once; yield the tokens so far of each, an end token included.

        Greedily, so that whatever differs is due to the rewards. The model stops when the iterator is closed.

        Raises:
            ContextLengthError: the prompt leaves no room for an answer.
        """
        max_new_tokens = min(max_new_tokens, self._room(prompt))
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        steps: SimpleQueue[list[int] | None] = SimpleQueue()
        is_closed = False

        def generate() -> None:
            ids = torch.tensor([list(prompt)] * len(settings), device=self.model.device)
            with self._under(settings):
                self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    num_beams=1,
                    num_return_sequences=1,
                    max_new_tokens=max_new_tokens,
                    streamer=_Steps(steps),
                    stopping_criteria=StoppingCriteriaList(
                        [lambda rows, _scores, **_: torch.full((len(rows),), is_closed, device=rows.device)]
                    ),
                )

        answers: list[list[int]] = [[] for _ in settings]
        with ThreadPoolExecutor(1) as executor:
            done = executor.submit(generate)
            done.add_done_callback(lambda _: steps.put(None))
            try:
                while (step := steps.get()) is not None:
                    for answer, token in zip(answers, step, strict=True):
                        if not answer or answer[-1] not in ends:
                            answer.append(token)
                    yield [list(answer) for answer in answers]
            finally:
                is_closed = True
            done.result()

    def encode(self, text: str, is_chat: bool = False) -> list[int]:
        """Return the tokens of a prompt, or of a user's message in the tokenizer's chat template.

        Raises:
            PRTValueError: there are none.
        """
        if is_chat:
            messages = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = self.tokenizer(text, add_special_tokens=not is_chat)["input_ids"]
        if not ids:
            raise PRTValueError("The prompt has no tokens.", expected="a text", found=repr(text))
        return ids

    def read(self, given: Any) -> dict[str, torch.Tensor]:
        """Return a classifier's inputs for a Pillow image or a text.

        Raises:
            PRTValueError: nothing is given, or the model has no image processor or tokenizer.
        """
        if given is None or self.model.processing_class is None:
            raise PRTValueError(
                "There is nothing to classify." if given is None else "The model cannot read it.",
                expected="an image or a text, and the backbone's image processor or tokenizer",
                found="neither image nor text" if given is None else "a backbone without either",
            )
        return dict(self.model.processing_class(given, return_tensors="pt"))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text that each token adds to those before it: none before a letter of several tokens is whole."""
        texts = [
            self.tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False).rstrip("\ufffd")
            for end in range(len(ids) + 1)
        ]
        return [after[len(before) :] for before, after in pairwise(texts)]

    def _room(self, prompt: Sequence[int]) -> int:
        """Return how many tokens all networks can read after a prompt."""
        limits = [context_length(part) for part in (self.model.backbone, *self.model.reward_networks)]
        limit = min((each for each in limits if each is not None), default=None)
        if limit is not None and len(prompt) >= limit:
            raise ContextLengthError(
                "The prompt leaves no room for an answer.",
                expected=f"fewer than {limit} tokens, which backbone and rewards can read",
                found=str(len(prompt)),
            )
        return 2**31 if limit is None else limit - len(prompt)

    @contextmanager
    def _under(self, settings: Sequence[Sequence[float]]) -> Iterator[None]:
        """Give each row of a batch strengths of its own."""
        with self._lock:
            strengths = self.model.strengths
            self.model.strengths = torch.tensor(settings, dtype=torch.float32).T
            try:
                yield
            finally:
                self.model.strengths = strengths


def _as_inputs(ids: Sequence[int]) -> dict[str, torch.Tensor]:
    rows = torch.tensor([list(ids)])
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


class _Steps(BaseStreamer):
    """Puts the tokens of every step of `generate` into a queue; those of transformers take one row only."""

    def __init__(self, steps: SimpleQueue):
        self._steps, self._is_prompt = steps, True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompts, then the next token of each row."""
        if not self._is_prompt:
            self._steps.put(value.tolist())
        self._is_prompt = False

    def end(self) -> None:
        """Do nothing: the queue is closed when `generate` has returned."""
