"""Load the model, and read the options and prompts, of `generate` and `chat`."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from ..errors import PRTValueError
from . import quantization
from .arguments import (
    add_across,
    add_option,
    boolean,
    chosen_device,
    config_kwargs,
    load_kwargs,
    names,
    positive,
    seed,
    share,
    with_default,
)

if TYPE_CHECKING:
    from ..inference.configuration import PRTModelConfig

_SAMPLING = ("temperature", "top_p", "top_k")
_NUMBERS = {
    "max_new_tokens": (positive(int), "longest text in tokens; default: {longest}"),
    "temperature": (positive(float), "divides the logits before sampling"),
    "top_p": (share, "sample from the most probable tokens whose probabilities add up to this"),
    "top_k": (positive(int), "sample from this many most probable tokens"),
    "num_beams": (positive(int), "beams of a beam search"),
    "repetition_penalty": (positive(float), "above 1 to discourage repetition"),
}


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a backbone and its rewards."""
    parser.add_argument("backbone", help="Hub id or folder of the backbone, or of a recipe")
    many = {"nargs": "+", "action": "extend", "default": []}
    add_option(
        parser,
        "reward",
        **many,
        metavar="REWARD",
        help="Hub ids or folders of rewards, or of ordinary LoRA adapters, which are carried over; not with a recipe",
    )
    add_option(
        parser,
        "strength",
        **many,
        type=float,
        metavar="S",
        help="1 / lambda, one for each reward; a negative strength subtracts the tuned behaviour; default: as tuned",
    )
    add_option(
        parser,
        "token_map",
        type=names,
        metavar="JSON",
        help="the backbone's tokens -> the rewards', where names and roles do not tell: "
        '\'{"<|im_end|>": "<|eot_id|>"}\'; not with a recipe',
    )
    add_across(parser)


def add_templates(group: argparse._ActionsContainer) -> None:
    """Add the options of how chats are written."""
    add_option(group, "system", metavar="TEXT", help="the system message of each chat that has none")
    add_option(
        group,
        "reward_chat_template",
        action="store_true",
        help="each reward reads chats in its own tokenizer's chat template, in which it was tuned",
    )


def add_generation(parser: argparse.ArgumentParser, longest: int) -> None:
    """Add the options of `model.generate`; `longest` is the default of `--max_new_tokens`."""
    group = parser.add_argument_group("generation", "defaults: those of the backbone's generation_config.json")
    for name, (kind, text) in _NUMBERS.items():
        add_option(group, name, type=kind, metavar="N", help=text.format(longest=longest))
    add_option(
        group,
        "do_sample",
        type=boolean,
        nargs="?",
        const=True,
        help="sample, or (false) take the most probable token; temperature, top_p and top_k imply sampling",
    )
    add_option(group, "seed", type=seed, default=0, help=with_default("seed of sampling"))
    add_option(
        group,
        "speculative",
        action="store_true",
        help="draft with the source backbone: the same text, faster if the reward is much smaller than the backbone",
    )


def generation_options(args: argparse.Namespace, longest: int) -> dict:
    """Return the keyword arguments of `model.generate`, one text for each prompt."""
    if given := [name for name in _SAMPLING if getattr(args, name) is not None]:
        if args.do_sample is False:
            raise PRTValueError(
                "Options of sampling have no effect without sampling.",
                expected="--do_sample false, or options of sampling, but not both",
                found=", ".join(f"--{name}" for name in given),
            )
        args.do_sample = True
    options = {name: value for name in (*_NUMBERS, "do_sample") if (value := getattr(args, name)) is not None}
    # One text for each prompt, whatever the backbone's own configuration says.
    defaults = {"max_new_tokens": longest, "num_return_sequences": 1, "return_dict_in_generate": args.speculative}
    return defaults | options | ({"speculative": True} if args.speculative else {})


def recipe_at(backbone: str, rewards: list[str], **config_kwargs: Any) -> PRTModelConfig | None:
    """Return the configuration of a recipe; None if the model is a backbone, to which rewards are added.

    Raises:
        PRTValueError: a recipe and rewards, or neither.
    """
    from ..hub.client import refuse_reward
    from ..inference.configuration import PRTModelConfig
    from ..networks.auto import load_config

    refuse_reward(backbone, "a backbone, or a recipe", config_kwargs.get("token"), config_kwargs["revision"])
    config = load_config(backbone, **config_kwargs)
    is_recipe = isinstance(config, PRTModelConfig)
    if is_recipe == bool(rewards):
        raise PRTValueError(
            f"{backbone} is a recipe, which names its own rewards." if is_recipe else "There is no reward.",
            expected="no --reward" if is_recipe else "--reward, or the recipe of a PRT model",
            found=", ".join(rewards) or f"{backbone}, which is no recipe",
        )
    return config if is_recipe else None


def load_model(args: argparse.Namespace):
    """Return the PRT model of a backbone and rewards, or of a recipe, on its device."""
    from ..contract import TEXT_GENERATION
    from ..inference import PRTForCausalLM
    from ..networks.auto import load_pretrained, load_processing_class

    device, kwargs, backbone_kwargs = chosen_device(args), load_kwargs(args), config_kwargs(args)
    quantized = quantization.quantization_kwargs(args)
    is_recipe = recipe_at(args.backbone, args.reward, **backbone_kwargs) is not None
    if is_recipe and args.token_map:
        raise PRTValueError(
            f"{args.backbone} is a recipe, which has its own map of tokens.", expected="no --token_map", found="one"
        )
    if is_recipe:
        model = PRTForCausalLM.from_pretrained(args.backbone, **kwargs | backbone_kwargs | quantized)
        _check_strengths(args.strength, len(model.strengths))
        model.strengths = args.strength or model.strengths
    else:
        _check_strengths(args.strength, len(args.reward))
        tokenizer = load_processing_class(args.backbone, TEXT_GENERATION, **backbone_kwargs)
        backbone = load_pretrained(args.backbone, **kwargs | backbone_kwargs | quantized)
        kwargs |= {"token_map": args.token_map, "across_vocabularies": args.across_vocabularies}
        model = PRTForCausalLM.from_parts(backbone, args.reward, args.strength or None, tokenizer, **kwargs)
    return model if device is None else model.to(device)


def _check_strengths(strengths: list[float], rewards: int) -> None:
    if strengths and len(strengths) != rewards:
        raise PRTValueError(
            "Strengths and rewards do not match.",
            expected=f"no --strength, or {rewards}: one for each reward",
            found=f"{len(strengths)}: {', '.join(map(str, strengths))}",
        )


def encode(tokenizer, prompt: str | list[dict], owner: str) -> list[int]:
    """Return the token ids of a text, or of a chat in the tokenizer's template with the reply begun."""
    is_chat = not isinstance(prompt, str)
    if is_chat:
        if tokenizer.chat_template is None:
            raise PRTValueError(
                f"The {owner}'s tokenizer has no chat template.",
                expected="a model for chats",
                found=str(tokenizer.name_or_path),
                remedy="continue texts instead: `prt-hf generate` without --system and `messages`"
                if owner == "backbone"
                else "leave --reward_chat_template out",
            )
        from jinja2 import TemplateError

        try:
            prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:  # some have no system message, or want turns to alternate
            raise PRTValueError(
                f"The {owner}'s chat template refuses the messages.",
                found=str(error),
                remedy="leave --system out, or change the roles",
            ) from error
    if re.search("[\ud800-\udfff]", prompt):  # as Python reads broken bytes
        raise PRTValueError("A prompt cannot be read.", expected="text in UTF-8", found=repr(prompt)[:80])
    ids = tokenizer(prompt, add_special_tokens=not is_chat)["input_ids"]
    if not ids:
        raise PRTValueError("A prompt has no tokens.", expected="a text", found=repr(prompt))
    return ids


def encode_for_rewards(model, prompts: list, args: argparse.Namespace) -> list[list[list[int]]]:
    """Return the token ids of the prompts for each reward, in its own template; none unless that is asked for."""
    if not args.reward_chat_template:
        return []
    return [[encode(reward.processing_class, prompt, "reward") for prompt in prompts] for reward in model.rewards]


def readable_length(model) -> int | None:
    """Return the longest text in tokens that backbone and rewards can read; None without a limit."""
    from ..networks.anatomy import context_length

    rewards = zip(model.rewards, model.matches, strict=True)
    # A reward of another vocabulary reads another number of tokens.
    networks = [reward.network for reward, match in rewards if not match.is_across]
    limits = [context_length(network) for network in (model.backbone, *networks)]
    return min((each for each in limits if each is not None), default=None)


def is_streamable(model, options: dict) -> bool:
    """Return whether the first beam is the text, so that tokens can be printed as they are made."""
    return options.get("num_beams", model.generation_config.num_beams or 1) == 1


def pad_and_ends(model) -> tuple[int, list[int]]:
    """Return a padding token, which is always masked, and the tokens that end a text."""
    config, tokenizer = model.generation_config, model.processing_class
    ends = [config.eos_token_id] if isinstance(config.eos_token_id, int) else list(config.eos_token_id or [])
    candidates = (config.pad_token_id, tokenizer.pad_token_id, *ends, 0)
    return next(token for token in candidates if token is not None), ends


def generated(
    model, rows: list[list[int]], own_rows: list[list[list[int]]], options: dict, *, is_streamed: bool
) -> tuple[Any, list[list[int]]]:
    """Generate after token rows; print the text of a single row token by token if `is_streamed`.

    Args:
        model: the PRT model.
        rows: the prompts.
        own_rows: the prompts as each reward reads them; none to read `rows`.
        options: of `model.generate`.
        is_streamed: whether to print.

    Returns:
        what `model.generate` returns, and the new tokens of each row, up to the longest of them.
    """
    from transformers import TextStreamer

    pad, _ = pad_and_ends(model)
    inputs = padded(rows, pad).to(model.device)
    if own_rows:
        options = options | {"reward_inputs": [padded(each, 0).to(model.device) for each in own_rows]}
    tokenizer = model.processing_class
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if is_streamed else None
    output = model.generate(**inputs, **options, streamer=streamer, pad_token_id=pad)
    sequences = output.sequences if options.get("return_dict_in_generate") else output
    return output, sequences[:, inputs["input_ids"].shape[1] :].tolist()


def padded(rows: list[list[int]], pad: int):
    """Return token rows padded on the left, as generation needs them."""
    import torch
    from transformers import BatchEncoding

    length = max(map(len, rows))
    ids = [[pad] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})
