"""Make batches for [`~evaluation.measure_portability`] from the user's rows."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from datasets import Dataset, Image, Value
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational, is_conversational_from_value, maybe_convert_to_chatml

from ..contract import IMAGE_CLASSIFICATION, TEXT_GENERATION
from ..errors import PRTValueError
from ..networks.anatomy import unwrap_adapter
from ..networks.pixels import PIXELS
from ..reward.backbones import Backbone
from ..reward.model import RewardModel
from ..training.collators import IMAGE, MASKS, TokenCollator
from ..training.data import label_ids, pixel_makers, require_column, require_texts
from ..vocabulary import unwrap_tokenizer

LABEL = "label"
TEXT_COLUMNS = "input_ids, or messages, or conversations, or prompt and completion, or text"


def batches(
    rows: Dataset, reward: RewardModel, batch_size: int, length: int, backbones: Sequence[Backbone] = ()
) -> DataLoader:
    """Return batches of inputs of the models, in the order of the rows.

    Args:
        rows: For language models columns of token ids, messages, prompt and completion (only the latter is supervised),
            or text; the end token is appended to completions and texts, as TRL's trainer does. For classifiers text or
            image, and optionally label; labels are matched by name.
        reward ([`RewardModel`]): The reward; its tokenizer or image processor is used.
        batch_size (`int`): The number of rows in a batch.
        length (`int`): The number of tokens at which a text is cut off.
        backbones: Loaded backbones. Those that need other pixels than the reward get them as
            `backbone_0_pixel_values`, `backbone_1_pixel_values`, ..., computed batch by batch.

    Raises:
        PRTValueError: The columns are none of these, a text has no tokens to predict, or the reward does not have a
            label.
    """
    return prepared(rows, reward, length)(batch_size, backbones)


def prepared(rows: Dataset, reward: RewardModel, length: int) -> Callable[..., DataLoader]:
    """Prepare rows that are read more than once, and return [`batches`] as a function of `batch_size` and `backbones`.

    Texts are tokenized here, once.
    """
    if reward.config.task == IMAGE_CLASSIFICATION:
        inputs, collator_for = _images(rows, reward)
    else:
        inputs, collate = (_texts if reward.config.task == TEXT_GENERATION else _classified)(rows, reward, length)

        def collator_for(_: Sequence[Backbone]) -> Callable:
            return collate

    def loader(batch_size: int, backbones: Sequence[Backbone] = ()) -> DataLoader:
        collate = collator_for(backbones)
        return DataLoader(inputs, batch_size, collate_fn=lambda batch: dict(collate(batch)))

    return loader


def _texts(rows: Dataset, reward: RewardModel, length: int) -> tuple[list[dict], Callable]:
    tokenizer = _tokenizer(reward)
    if is_conversational_from_value(rows[0]):
        rows = rows.map(maybe_convert_to_chatml)
    columns = set(rows.column_names)
    is_chat = is_conversational(rows[0])
    if is_chat and tokenizer.chat_template is None:
        raise PRTValueError("The reward's tokenizer has no chat template.", expected="a column `text`")
    if "input_ids" in columns:
        tokenized = list(rows)
    elif is_chat and {"prompt", "completion"} <= columns:
        tokenized = [_answered(tokenizer, row["prompt"], row["completion"]) for row in rows]
    elif is_chat and "messages" in columns:
        texts = tokenizer.apply_chat_template(list(rows["messages"]), tokenize=False)
        tokenized = [{"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in texts]
    elif {"prompt", "completion"} <= columns:
        for column in ("prompt", "completion"):
            require_texts(rows, column, "given")
        tokenized = [_completed(tokenizer, row["prompt"], row["completion"]) for row in rows]
    elif "text" in columns:
        require_texts(rows, "text", "given")
        tokenized = [{"input_ids": tokenizer(_ended(text, tokenizer))["input_ids"]} for text in rows["text"]]
    else:
        raise PRTValueError(
            "The data has no text.", expected=f"columns: {TEXT_COLUMNS}", found=", ".join(rows.column_names)
        )
    kept = ("input_ids", "labels", *MASKS)
    cut = [{name: row[name][:length] for name in kept if row.get(name) is not None} for row in tokenized]
    # Padding is masked on either side, so any token will do.
    collate = TokenCollator(0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id)
    return [row for row in cut if len(row["input_ids"]) > 1], collate


def _answered(tokenizer: PreTrainedTokenizerBase, prompt: list[dict], completion: list[dict]) -> dict:
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(prompt + completion, tokenize=False)
    return _supervised(*(tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, whole)))


def _completed(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> dict:
    return _supervised(*(tokenizer(text)["input_ids"] for text in (prompt, prompt + _ended(completion, tokenizer))))


def _supervised(start: list[int], ids: list[int]) -> dict:
    # The completion begins at the first difference: it includes an end token after the prompt, or a token across the
    # border.
    differing = (index for index, (one, other) in enumerate(zip(start, ids, strict=False)) if one != other)
    border = next(differing, len(start))
    return {"input_ids": ids, "completion_mask": [int(index >= border) for index in range(len(ids))]}


def _ended(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Append the end token if it is absent, as TRL's trainer does in training."""
    end = tokenizer.eos_token or ""
    return text if text.endswith(end) else text + end


def _classified(rows: Dataset, reward: RewardModel, length: int) -> tuple[list[dict], Callable]:
    require_texts(rows, "text", "given")
    tokenizer = _tokenizer(reward)
    encoded = [dict(tokenizer(text, truncation=True, max_length=length)) for text in rows["text"]]
    return _labelled(encoded, rows, reward), partial(tokenizer.pad, return_tensors="pt")


def _images(rows: Dataset, reward: RewardModel) -> tuple[Dataset, Callable]:
    """Return the rows, and a function from backbones to a collator, which reads only the images of its batch."""
    column = PIXELS if PIXELS in rows.column_names else IMAGE
    is_labelled = LABEL in rows.column_names

    def collator_for(backbones: Sequence[Backbone]) -> Callable:
        made = {PIXELS: torch.as_tensor}
        if column == IMAGE:
            theirs = [(each.processing_class, unwrap_adapter(each.network).config) for each in backbones]
            made = pixel_makers(reward.processing_class, unwrap_adapter(reward.network).config, theirs)

        def collate(batch: list[dict]) -> dict[str, torch.Tensor]:
            pixels = {
                name: torch.stack([torch.as_tensor(make(row[column])) for row in batch]) for name, make in made.items()
            }
            return pixels | ({"labels": torch.tensor([row["labels"] for row in batch])} if is_labelled else {})

        return collate

    if column == IMAGE:
        rows = _with_images(rows, reward)
    inputs = rows.select_columns([column])
    return inputs.add_column("labels", _labels(rows, reward)) if is_labelled else inputs, collator_for


def _with_images(rows: Dataset, reward: RewardModel) -> Dataset:
    require_column(rows, IMAGE, "given")
    if reward.processing_class is None:
        raise PRTValueError(
            "The reward has no image processor.", expected="one beside it or its base, or a column `pixel_values`"
        )
    if isinstance(rows.features[IMAGE], Value):
        return rows.cast_column(IMAGE, Image())  # paths
    return rows


def _tokenizer(reward: RewardModel) -> PreTrainedTokenizerBase:
    tokenizer = unwrap_tokenizer(reward.processing_class)
    if tokenizer is None:
        raise PRTValueError("The reward has no tokenizer.", expected="one beside it or its base")
    return tokenizer


def _labelled(prepared: list[dict], rows: Dataset, reward: RewardModel) -> list[dict]:
    if LABEL not in rows.column_names:
        return prepared
    return [row | {"labels": label} for row, label in zip(prepared, _labels(rows, reward), strict=True)]


def _labels(rows: Dataset, reward: RewardModel) -> list[int]:
    return label_ids(rows, LABEL, dict(enumerate(reward.contract.names)))
