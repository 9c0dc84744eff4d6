"""`prt-hf generate`."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

from ..errors import ContextLengthError, PRTValueError
from . import quantization
from .arguments import (
    add_command,
    add_json,
    add_loading_options,
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

DESCRIPTION = """\
Add rewards to the logits of a backbone, and continue prompts. The backbone needs the rewards' vocabulary, or an update
of it; a recipe (a saved PRTForCausalLM) names its own rewards. Only generated text is printed to standard output, token
by token; a line '---' separates several texts."""
EXAMPLES = """examples:
  prt-hf generate Qwen/Qwen2.5-7B --reward me/gsm8k-reward --prompt "Natalia sold clips to 48 of her friends"
  prt-hf generate Qwen/Qwen2.5-7B --reward me/gsm8k-reward me/style-reward --strength 1 0.5 --file prompts.txt
  cat question.txt | prt-hf generate gsm8k-7b --chat --speculative
  prt-hf generate gsm8k-7b --file prompts.jsonl --batch_size 16 --json > texts.jsonl"""
SEPARATOR = "---"
_SAMPLING = ("temperature", "top_p", "top_k")
_NUMBERS = {
    "max_new_tokens": (positive(int), "longest text in tokens; default: 128"),
    "temperature": (positive(float), "divides the logits before sampling"),
    "top_p": (share, "sample from the most probable tokens whose probabilities add up to this"),
    "top_k": (positive(int), "sample from this many most probable tokens"),
    "num_beams": (positive(int), "beams of a beam search"),
    "repetition_penalty": (positive(float), "above 1 to discourage repetition"),
}


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(commands, "generate", "generate text with a backbone and rewards", DESCRIPTION, EXAMPLES)
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
    prompts = parser.add_argument_group("prompts", "give one of these; otherwise all of standard input is one prompt")
    add_option(prompts, "prompt", **many, metavar="TEXT", help="one or several texts")
    add_option(
        prompts,
        "file",
        type=Path,
        help="a file with a prompt in each line; in .jsonl an object with `prompt` or `messages`",
    )
    add_option(
        prompts, "chat", action="store_true", help="treat each prompt as a user's message; `messages` always are chats"
    )
    add_option(
        prompts,
        "reward_chat_template",
        action="store_true",
        help="each reward reads chats in its own tokenizer's chat template, in which it was tuned",
    )
    generation = parser.add_argument_group("generation", "defaults: those of the backbone's generation_config.json")
    for name, (kind, text) in _NUMBERS.items():
        add_option(generation, name, type=kind, metavar="N", help=text)
    add_option(
        generation,
        "do_sample",
        type=boolean,
        nargs="?",
        const=True,
        help="sample, or (false) take the most probable token; temperature, top_p and top_k imply sampling",
    )
    add_option(generation, "seed", type=seed, default=0, help=with_default("seed of sampling"))
    add_option(
        generation,
        "speculative",
        action="store_true",
        help="draft with the source backbone: the same text, faster if the reward is much smaller than the backbone",
    )
    output = parser.add_argument_group("output")
    add_option(output, "no_stream", action="store_true", help="print each text when it is complete")
    add_json(
        output,
        "print a JSON object in a line for each prompt: prompt, text, new_tokens, seconds (of its batch), and with "
        "--speculative drafted and accepted",
    )
    add_loading_options(parser, batch_size=1)
    quantization.add_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Generate a text for each prompt and print it."""
    if given := [name for name in _SAMPLING if getattr(args, name) is not None]:
        if args.do_sample is False:
            raise PRTValueError(
                "Options of sampling have no effect without sampling.",
                expected="--do_sample false, or options of sampling, but not both",
                found=", ".join(f"--{name}" for name in given),
            )
        args.do_sample = True
    prompts = _prompts(args)
    if args.reward_chat_template and all(isinstance(prompt, str) for prompt in prompts):
        raise PRTValueError(
            "Texts have no chat template.", expected="--chat or `messages` with --reward_chat_template", found="texts"
        )
    if args.speculative and args.batch_size > 1:
        raise PRTValueError("Speculation takes one prompt at a time.", expected="--batch_size 1", found=args.batch_size)

    from transformers import set_seed

    model = _load(args)
    rows = [_encode(model.processing_class, prompt, "backbone") for prompt in prompts]
    own_rows = []  # of each reward
    if args.reward_chat_template:
        own_rows = [[_encode(each.processing_class, prompt, "reward") for prompt in prompts] for each in model.rewards]
    limit = _check_lengths(model, [max(each, key=len) for each in zip(rows, *own_rows, strict=True)])
    set_seed(args.seed)
    for index, record in enumerate(_generated(model, prompts, rows, own_rows, limit, args)):
        if args.json:
            print(json.dumps(record, ensure_ascii=False), flush=True)
        elif record["text"] is not None:
            print(record["text"], flush=True)
        if not args.json and index + 1 < len(prompts):
            print(SEPARATOR, flush=True)


def _generated(
    model, prompts: list, rows: list[list[int]], own_rows: list[list[list[int]]], limit: int | None, args
) -> Iterator[dict]:
    """Yield the record that --json prints for each prompt; `text` is None if it was streamed."""
    from transformers import TextStreamer

    tokenizer = model.processing_class
    options = {name: value for name in (*_NUMBERS, "do_sample") if (value := getattr(args, name)) is not None}
    # One text for each prompt, whatever the backbone's own configuration says.
    defaults = {"max_new_tokens": 128, "num_return_sequences": 1, "return_dict_in_generate": args.speculative}
    options = defaults | options
    is_streamed = not (args.json or args.no_stream) and args.batch_size == 1
    is_streamed = is_streamed and options.get("num_beams", model.generation_config.num_beams or 1) == 1
    if args.speculative:
        options["speculative"] = True
    pad, ends = _pad_and_ends(model)
    for start in range(0, len(rows), args.batch_size):
        part = slice(start, start + args.batch_size)
        inputs = _padded(rows[part], pad).to(model.device)
        own_inputs = [_padded(each[part], 0).to(model.device) for each in own_rows]
        length = inputs["input_ids"].shape[1]
        longest = max(each["input_ids"].shape[1] for each in (inputs, *own_inputs))
        room = options["max_new_tokens"] if limit is None else limit - longest
        if room < options["max_new_tokens"]:
            print(f"prt-hf generate: after {longest} tokens the models can read {room} more", file=sys.stderr)
        fitting = options | {"max_new_tokens": min(options["max_new_tokens"], room)}
        if own_inputs:
            fitting["reward_inputs"] = own_inputs
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if is_streamed else None
        began = perf_counter()
        output = model.generate(**inputs, **fitting, streamer=streamer, pad_token_id=pad)
        seconds = perf_counter() - began
        drafts = {"drafted": output.num_drafted, "accepted": output.num_accepted} if args.speculative else {}
        sequences = output.sequences if args.speculative else output
        for prompt, tokens in zip(prompts[start:], sequences[:, length:].tolist(), strict=False):
            count = next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))
            text = None if is_streamed else tokenizer.decode(tokens[:count], skip_special_tokens=True)
            yield {"prompt": prompt, "text": text, "new_tokens": count, "seconds": seconds} | drafts


def _prompts(args) -> list[str | list[dict]]:
    """Return the prompts: texts, and chats as lists of messages."""
    if args.prompt and args.file:
        raise PRTValueError("Prompts are given twice.", expected="--prompt or --file", found="both")
    if args.file:
        prompts = _prompts_in(args.file)
    else:
        prompts = args.prompt or [text for text in [_read(None).removesuffix("\n")] if text]
    if not prompts:
        raise PRTValueError(
            "There is no prompt.", expected="--prompt, --file with at least one line, or text on standard input"
        )
    if args.chat:
        prompts = [[{"role": "user", "content": each}] if isinstance(each, str) else each for each in prompts]
    return prompts


def _read(file: Path | None) -> str:
    """Return the text of a file, or of standard input."""
    try:
        return sys.stdin.read() if file is None else file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problem = f"{file or 'Standard input'} cannot be read."
        raise PRTValueError(problem, expected="text in UTF-8", found=str(error)) from error


def _prompts_in(file: Path) -> list[str | list[dict]]:
    numbered = [(number, line) for number, line in enumerate(_read(file).split("\n"), 1) if line.strip()]
    if file.suffix.lower() != ".jsonl":
        return [line for _, line in numbered]
    prompts = []
    for number, line in numbered:
        try:
            row = json.loads(line)
            prompt = row["prompt"] if "prompt" in row else row["messages"]
        except (ValueError, KeyError, TypeError):
            prompt = None
        if not (isinstance(prompt, str) or _is_chat(prompt)):
            raise PRTValueError(
                f"Line {number} of {file} is no prompt.",
                expected="a JSON object with `prompt` (a text) or `messages` (a list of role and content)",
                found=line[:80],
            )
        prompts.append(prompt)
    return prompts


def _is_chat(prompt) -> bool:
    turns = prompt if isinstance(prompt, list) and prompt else [None]
    return all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns)


def _load(args):
    from ..contract import TEXT_GENERATION
    from ..inference import PRTForCausalLM
    from ..inference.recipe import PRTModelConfig
    from ..networks.auto import load_config, load_pretrained, load_processing_class

    device, kwargs, backbone_kwargs = chosen_device(args), load_kwargs(args), config_kwargs(args)
    quantized = quantization.quantization_kwargs(args)
    is_recipe = isinstance(load_config(args.backbone, **backbone_kwargs), PRTModelConfig)
    if is_recipe == bool(args.reward):
        raise PRTValueError(
            f"{args.backbone} is a recipe, which names its own rewards." if is_recipe else "There is no reward.",
            expected="no --reward" if is_recipe else "--reward, or the recipe of a PRT model",
            found=", ".join(args.reward) or f"{args.backbone}, which is no recipe",
        )
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
        kwargs["token_map"] = args.token_map
        model = PRTForCausalLM.from_parts(backbone, args.reward, args.strength or None, tokenizer, **kwargs)
    return model if device is None else model.to(device)


def _check_strengths(strengths: list[float], rewards: int) -> None:
    if strengths and len(strengths) != rewards:
        raise PRTValueError(
            "Strengths and rewards do not match.",
            expected=f"no --strength, or {rewards}: one for each reward",
            found=f"{len(strengths)}: {', '.join(map(str, strengths))}",
        )


def _encode(tokenizer, prompt: str | list[dict], owner: str) -> list[int]:
    is_chat = not isinstance(prompt, str)
    if is_chat:
        if tokenizer.chat_template is None:
            raise PRTValueError(
                f"The {owner}'s tokenizer has no chat template.",
                expected="a model for chats",
                found=str(tokenizer.name_or_path),
                remedy="leave --chat out, and give texts as prompts"
                if owner == "backbone"
                else "leave --reward_chat_template out",
            )
        prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=not is_chat)["input_ids"]
    if not ids:
        raise PRTValueError("A prompt has no tokens.", expected="a text", found=repr(prompt))
    return ids


def _check_lengths(model, rows: list[list[int]]) -> int | None:
    """Return the longest text that backbone and rewards can read, after checking all prompts."""
    from ..networks.anatomy import context_length

    limits = [context_length(part) for part in (model.backbone, *model.reward_networks)]
    limit = min((each for each in limits if each is not None), default=None)
    for number, row in enumerate(rows, 1):
        if limit is not None and len(row) >= limit:
            raise ContextLengthError(
                f"Prompt {number} leaves no room for a text.",
                expected=f"fewer than {limit} tokens, which backbone and rewards can read",
                found=str(len(row)),
            )
    return limit


def _pad_and_ends(model) -> tuple[int, list[int]]:
    """Return a padding token, which is always masked, and the tokens that end a text."""
    config, tokenizer = model.generation_config, model.processing_class
    ends = [config.eos_token_id] if isinstance(config.eos_token_id, int) else list(config.eos_token_id or [])
    candidates = (config.pad_token_id, tokenizer.pad_token_id, *ends, 0)
    return next(token for token in candidates if token is not None), ends


def _padded(rows: list[list[int]], pad: int):
    """Return token rows padded on the left, as generation needs them."""
    import torch
    from transformers import BatchEncoding

    length = max(map(len, rows))
    ids = [[pad] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})
