"""`prt-hf generate`."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

from ..errors import ContextLengthError, PRTValueError
from . import quantization
from .arguments import add_command, add_json, add_loading_options, add_option
from .generation import (
    add_generation,
    add_model,
    add_templates,
    encode,
    encode_for_rewards,
    generated,
    generation_options,
    is_streamable,
    load_model,
    pad_and_ends,
    readable_length,
)

DESCRIPTION = """\
Add rewards to the logits of a backbone, and answer or continue prompts. The backbone needs the rewards' vocabulary, or
an update of it; a recipe (a saved PRTForCausalLM) names its own rewards. A prompt is a user's message, written in the
backbone's chat template, where its tokenizer has one; with --raw it is a text to be continued. Only generated text is
printed to standard output, token by token; a line '---' separates several texts."""
EXAMPLES = """examples:
  prt-hf generate Qwen/Qwen2.5-7B-Instruct --reward me/gsm8k-reward --prompt "How many clips did Natalia sell in May?"
  prt-hf generate Qwen/Qwen2.5-7B --raw --reward me/gsm8k-reward me/style-reward --strength 1 0.5 --file prompts.txt
  cat question.txt | prt-hf generate gsm8k-7b --system "Answer in one line." --speculative
  prt-hf generate gsm8k-7b --file prompts.jsonl --batch_size 16 --json > texts.jsonl

`prt-hf chat` has conversations of several turns."""
SEPARATOR = "---"
_LONGEST = 128


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(commands, "generate", "generate text with a backbone and rewards", DESCRIPTION, EXAMPLES)
    add_model(parser)
    prompts = parser.add_argument_group("prompts", "give one of these; otherwise all of standard input is one prompt")
    many = {"nargs": "+", "action": "extend", "default": []}
    add_option(prompts, "prompt", **many, metavar="TEXT", help="one or several texts")
    add_option(
        prompts,
        "file",
        type=Path,
        help="a file with a prompt in each line; in .jsonl an object with `prompt` or `messages`",
    )
    add_option(prompts, "raw", action="store_true", help="continue the prompts as they are, without the chat template")
    add_templates(prompts)
    add_generation(parser, _LONGEST)
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
    options = generation_options(args, _LONGEST)
    if args.raw and args.system is not None:
        raise PRTValueError("A text has no system message.", expected="--system or --raw", found="both")
    prompts = _prompts(args)
    if args.speculative and args.batch_size > 1:
        raise PRTValueError("Speculation takes one prompt at a time.", expected="--batch_size 1", found=args.batch_size)

    from transformers import set_seed

    model = load_model(args)
    prompts = _in_template(prompts, model.processing_class, args)
    rows = [encode(model.processing_class, prompt, "backbone") for prompt in prompts]
    own_rows = encode_for_rewards(model, prompts, args)
    limit = _check_lengths(model, [max(each, key=len) for each in zip(rows, *own_rows, strict=True)])
    is_streamed = not (args.json or args.no_stream) and args.batch_size == 1 and is_streamable(model, options)
    set_seed(args.seed)
    for index, record in enumerate(_generated(model, prompts, rows, own_rows, limit, options, args, is_streamed)):
        if args.json:
            print(json.dumps(record, ensure_ascii=False), flush=True)
        elif not is_streamed:
            print(record["text"], flush=True)
        if not record["text"].strip():
            print(f"prt-hf generate: text {index + 1} is empty: {_why_empty(model, args)}", file=sys.stderr)
        if not args.json and index + 1 < len(prompts):
            print(SEPARATOR, flush=True)


def _in_template(prompts: list[str | list[dict]], tokenizer, args: argparse.Namespace) -> list[str | list[dict]]:
    """Return the prompts as the backbone gets them: as chats if its tokenizer has a template for them."""
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if texts and not args.raw and tokenizer.chat_template is not None:
        print(
            "prt-hf generate: prompts are messages in the backbone's chat template; --raw continues them as they are",
            file=sys.stderr,
        )
        prompts = [[{"role": "user", "content": each}] if isinstance(each, str) else each for each in prompts]
        texts = []
    for option in ("system", "reward_chat_template"):
        if texts and getattr(args, option):
            raise PRTValueError(
                "Texts have no chat template.",
                expected=f"a backbone with a chat template and no --raw, or `messages`, with --{option}",
                found="texts to be continued",
            )
    if args.system is None:
        return prompts
    system = {"role": "system", "content": args.system}
    return [prompt if prompt[0]["role"] == "system" else [system, *prompt] for prompt in prompts]


def _why_empty(model, args: argparse.Namespace) -> str:
    if args.raw and model.processing_class.chat_template is not None:
        return "the model is made for chats; leave --raw out"
    return "the model ended it at once; try another prompt, --do_sample, or a --strength nearer to 0"


def _generated(
    model,
    prompts: list,
    rows: list[list[int]],
    own_rows: list[list[list[int]]],
    limit: int | None,
    options: dict,
    args: argparse.Namespace,
    is_streamed: bool,
) -> Iterator[dict]:
    """Yield the record that --json prints for each prompt."""
    tokenizer, (_, ends) = model.processing_class, pad_and_ends(model)
    for start in range(0, len(rows), args.batch_size):
        part = slice(start, start + args.batch_size)
        own = [each[part] for each in own_rows]
        longest = max(len(row) for each in (rows[part], *own) for row in each)
        room = options["max_new_tokens"] if limit is None else limit - longest
        if room < options["max_new_tokens"]:
            print(f"prt-hf generate: after {longest} tokens the models can read {room} more", file=sys.stderr)
        fitting = options | {"max_new_tokens": min(options["max_new_tokens"], room)}
        began = perf_counter()
        output, texts = generated(model, rows[part], own, fitting, is_streamed=is_streamed)
        seconds = perf_counter() - began
        drafts = {"drafted": output.num_drafted, "accepted": output.num_accepted} if args.speculative else {}
        for prompt, tokens in zip(prompts[start:], texts, strict=False):
            count = next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))
            text = tokenizer.decode(tokens[:count], skip_special_tokens=True)
            yield {"prompt": prompt, "text": text, "new_tokens": count, "seconds": seconds} | drafts


def _prompts(args: argparse.Namespace) -> list[str | list[dict]]:
    """Return the prompts: texts, and chats as lists of messages."""
    if args.prompt and args.file:
        raise PRTValueError("Prompts are given twice.", expected="--prompt or --file", found="both")
    if args.file:
        prompts = _prompts_in(args.file)
    elif args.prompt or sys.stdin.isatty():
        prompts = args.prompt
    else:
        prompts = [text for text in [_read(None).removesuffix("\n")] if text]
    if not prompts:
        raise PRTValueError(
            "There is no prompt.",
            expected="--prompt, --file with at least one line, or text on standard input, from a pipe or file",
            remedy="`prt-hf chat` reads messages from the terminal",
        )
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


def _check_lengths(model, rows: list[list[int]]) -> int | None:
    """Return the longest text that backbone and rewards can read, after checking all prompts."""
    limit = readable_length(model)
    for number, row in enumerate(rows, 1):
        if limit is not None and len(row) >= limit:
            raise ContextLengthError(
                f"Prompt {number} leaves no room for a text.",
                expected=f"fewer than {limit} tokens, which backbone and rewards can read",
                found=str(len(row)),
            )
    return limit
