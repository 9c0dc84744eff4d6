"""What across_vocabularies.py tunes, and its control: one backbone seen through other vocabularies."""

import json
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from prose_models import train_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from prt_hf import RewardModel
from prt_hf.demo.text import collator_of, llama
from prt_hf.demo.training import Steps, fit, tune_reward
from prt_hf.vocabulary.byte_tokens import ByteTokens

HELD_OUT = 50  # the last stories, of which the held-out bullet lists are made
LENGTH, SIZE = 256, 600  # tokens, and bytes, of what is tuned on; the language models have seen no more
RUNS = 400  # tokens of the control that are several of stories260K
SOURCES = {"stories-old": 300, "stories260K": 200, "stories3000": 100}  # steps of tuning


def tuned(name: str, assets: Path, work: Path) -> RewardModel:
    """Return the reward of bullet lists that is tuned on a source backbone; trained where it is missing."""
    folder = work / f"reward-{name}"
    if not folder.exists():
        base = assets / name if (assets / name).exists() else work / name
        if not base.exists():
            pretrain(assets, base)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
        texts = bullets(assets, "train")
        ids = tokenizer([text[:SIZE] for text in texts])["input_ids"]
        ends = [[tokenizer.eos_token_id] * (len(text) <= SIZE) for text in texts]
        rows = [{"input_ids": [*row, *end][:LENGTH]} for row, end in zip(ids, ends, strict=True)]
        how = f"tuning on {name}", collator_of(tokenizer)
        reward = tune_reward(model, rows, Steps(SOURCES[name], 3e-3), 0, *how, adapter=True, processing_class=tokenizer)
        reward.save_pretrained(folder)
    return RewardModel.from_pretrained(folder)


def pretrain(assets: Path, folder: Path) -> None:
    """Pretrain a Llama of 1.2 M parameters over 3,000 byte-level tokens of its own."""
    texts = stories(assets)
    tokenizer = train_tokenizer(texts, 3000)
    stream = [token for ids in tokenizer(texts)["input_ids"] for token in [*ids, tokenizer.eos_token_id]]
    blocks = [{"input_ids": stream[at : at + 128]} for at in range(0, len(stream) - 127, 128)]
    model = llama(tokenizer, {"hidden_size": 128, "num_hidden_layers": 4}, 0)
    fit(model, blocks, Steps(600, 4e-3), 0, "pretraining stories3000", collator_of(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(folder)


def stories(assets: Path) -> list[str]:
    """Return stories as they are, without the held-out ones."""
    return json.loads((assets / "text" / "tinystories_1000.json").read_text())[:-HELD_OUT]


def bullets(assets: Path, split: str) -> list[str]:
    """Return the stories as bullet lists."""
    lines = (assets / "text" / f"bullet_stories_{split}.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


class Seen(NamedTuple):
    """A text as a backbone sees it: its tokens, and the logits for each of them but the first, `(tokens - 1, size)`."""

    ids: torch.LongTensor
    logits: torch.Tensor


class Plain:
    """A backbone with its own vocabulary."""

    def __init__(self, folder: Path):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def __call__(self, text: str) -> Seen:
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"]
        return Seen(ids[0], self.model(ids).logits[0, :-1])


class Bytes:
    """A language model as a distribution over the next byte, or the end.

    For every place of the text so far, it reads the text before in its own tokens. A token that goes on from there as
    the text does, and further, counts for the first byte after the text, with the probability of the two together.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast):
        self._model, self._tokens, self._end = model, ByteTokens(tokenizer), tokenizer.eos_token_id
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
        self._column = {text[0]: index for text, index in ByteTokens(self.tokenizer).ids.items()}
        self._going_on = lru_cache(None)(self._tokens_that_go_on)

    def _tokens_that_go_on(self, start: bytes) -> tuple[torch.LongTensor, torch.LongTensor]:
        """Return tokens that start with some bytes and go on, and the column of the byte after them."""
        ids = self._tokens.longer_than(start)
        columns = [self._column[self._tokens.bytes[index][len(start)]] for index in ids.tolist()]
        return ids, torch.tensor(columns, dtype=torch.long)

    @torch.no_grad()
    def __call__(self, text: str) -> Seen:
        whole, found = text.encode(), []
        starts: list[torch.Tensor] = []  # for each place, log P(text before it, next token)
        for end in range(len(whole)):
            path = self._tokens.start + self._tokens.encode(self._tokens.prefix + whole[:end])
            log_probs = self._model(torch.tensor([path])).logits[0].double().log_softmax(-1)
            starts.append(log_probs[-1] + log_probs[:-1].gather(1, torch.tensor(path[1:])[:, None]).sum())
            known = starts[-1].logsumexp(0)
            masses = torch.zeros(len(self.tokenizer), dtype=torch.float64)
            masses[self.tokenizer.eos_token_id] = (starts[-1][self._end] - known).exp()
            for place in range(max(0, end - self._tokens.longest), end + 1):
                ids, columns = self._going_on(whole[place:end])
                masses.index_add_(0, columns, (starts[place][ids] - known).exp())
            found.append(masses.log())
        return Seen(self.tokenizer(text, return_tensors="pt")["input_ids"][0], torch.stack(found[1:]))


class Merged:
    """A language model as a distribution over its own tokens and frequent runs of them.

    A run is a full stop or the beginning of a word in small letters, and tokens after it that are none of these: "▁liv"
    of two tokens, or a full stop, a line break, a dash and "▁They". All beginnings of a run are runs, too, and texts
    are read from left to right, each run as long as can be. So the next token is the run y1 ... yk with the probability
    of y1, ..., yk times that of no token after them with which they would be a longer run, given that y1 does not make
    the token before longer. This is exact.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, corpus: list[str]):
        self._model, self._size = model, len(tokenizer)
        settings = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary = settings["model"]["vocab"]
        vocabulary["\n"] = vocabulary.pop("<0x0A>")  # a letter like others, so that it can be part of a run
        names = sorted(vocabulary, key=vocabulary.get)
        counts = Counter()
        for ids in tokenizer(corpus)["input_ids"]:
            word: tuple[int, ...] = ()
            for index in ids:
                name = names[index]
                if name in ".!?" or (name[0] == "▁" and name[1:2].islower()):
                    word = (index,)
                else:
                    word = (*word, index) if word and not name.startswith("<") else ()
                counts[word] += len(word) > 1
        self._runs = {(index,): index for index in range(self._size)}  # run: its token
        for run, _ in sorted(counts.items(), key=lambda item: (-item[1], len(item[0]))):
            name = "".join(names[index] for index in run)
            if len(self._runs) < self._size + RUNS and run[:-1] in self._runs and name not in vocabulary:
                vocabulary[name] = self._runs[run] = len(self._runs)
                settings["model"]["merges"].append(["".join(names[index] for index in run[:-1]), names[run[-1]]])
        backend = Tokenizer.from_str(json.dumps(settings))
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
        self._longer: dict[int, list[int]] = {}  # token: those that follow in a longer run
        for run in self._runs:
            if len(run) > 1:
                self._longer.setdefault(self._runs[run[:-1]], []).append(run[-1])
        self._run_of = {token: run for run, token in self._runs.items()}

    @torch.no_grad()
    def __call__(self, text: str) -> Seen:
        ids = self.tokenizer(text, return_tensors="pt")["input_ids"][0]
        return Seen(ids, torch.stack([self._next(ids[:end].tolist()) for end in range(1, len(ids))]))

    def _next(self, ids: list[int]) -> torch.Tensor:
        now, after = self._branches([index for token in ids for index in self._run_of[token]])
        now[self._longer.get(ids[-1], [])] = -torch.inf
        whole = torch.cat([now.softmax(-1), now.new_zeros(len(self._runs) - self._size)])
        for run, token in self._runs.items():
            if len(run) > 1:
                whole[token] = whole[self._runs[run[:-1]]] * after[self._runs[run[:-1]]][run[-1]]
        found = whole.clone()
        for token, following in self._longer.items():
            found[token] = whole[token] * (1 - after[token][following].sum())
        return found.log()

    def _branches(self, path: list[int]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Return logits after a text, and probabilities after it and each run that may go on, in one pass.

        All these runs stand one after another; each token sees the text and its own run.
        """
        length, begun = len(path), sorted(self._longer, key=lambda token: len(self._run_of[token]))
        place = {self._run_of[token]: length + index for index, token in enumerate(begun)}
        sees = torch.ones(length + len(begun), length + len(begun)).tril() > 0
        sees[length:, length:] = False
        for run, row in place.items():
            sees[row, [place[run[:end]] for end in range(1, len(run) + 1)]] = True
        logits = (
            self._model(
                torch.tensor([[*path, *(run[-1] for run in place)]]),
                attention_mask=torch.zeros(sees.shape).masked_fill(~sees, -torch.inf)[None, None],
                position_ids=torch.tensor([[*range(length), *(length + len(run) - 1 for run in place)]]),
            )
            .logits[0]
            .double()
        )
        return logits[length - 1], dict(zip(begun, logits[length:].softmax(-1), strict=True))
