"""`prt-hf chat`."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress

from ..errors import ContextLengthError, PRTValueError
from . import generation, quantization
from .arguments import add_command, add_loading_options

DESCRIPTION = """\
Talk to a backbone with rewards, in its chat template. Each line is a message, answered token by token; the models read
the whole conversation again at each turn. `/reset` begins a new conversation, `/exit` or the end of input leaves."""
EXAMPLES = """examples:
  prt-hf chat Qwen/Qwen2.5-7B-Instruct --reward me/gsm8k-reward
  prt-hf chat gsm8k-7b --system "Answer in one line." --temperature 0.7
  printf 'What is 7 * 8?\\nAnd half of it?\\n' | prt-hf chat gsm8k-7b"""
PROMPT, RESET, EXIT = "> ", "/reset", "/exit"
_LONGEST = 512


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(commands, "chat", "talk to a backbone with rewards", DESCRIPTION, EXAMPLES)
    generation.add_model(parser)
    generation.add_templates(parser)
    generation.add_generation(parser, _LONGEST)
    add_loading_options(parser)
    quantization.add_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Answer messages until there are no more."""
    from transformers import set_seed

    options = generation.generation_options(args, _LONGEST)
    model = generation.load_model(args)
    opening = [] if args.system is None else [{"role": "system", "content": args.system}]
    trial = [*opening, {"role": "user", "content": "Hello"}]
    # To report a template that refuses it before the first message.
    generation.encode(model.processing_class, trial, "backbone")
    generation.encode_for_rewards(model, [trial], args)
    set_seed(args.seed)
    conversation = list(opening)
    for line in _lines():
        if line == RESET:
            conversation = list(opening)
            continue
        messages = [*conversation, {"role": "user", "content": line}]
        try:
            reply = _answer(model, messages, options, args)
        except ContextLengthError as error:
            print(f"prt-hf chat: {error}", file=sys.stderr)
            continue
        conversation = [*messages, {"role": "assistant", "content": reply}]


def _lines() -> Iterator[str]:
    """Yield the messages: lines of the terminal, or of a pipe or file, which are printed as a terminal shows them."""
    if sys.stdin.isatty():
        print(f"{RESET} begins a new conversation, {EXIT} or Ctrl-D leaves", file=sys.stderr)
        with suppress(ImportError):
            import readline  # noqa: F401  # lines can be edited, and earlier ones called back
    while True:
        try:
            line = input(PROMPT)
        except EOFError:
            print()
            return
        except UnicodeDecodeError as error:
            raise PRTValueError("A message cannot be read.", expected="text in UTF-8", found=str(error)) from error
        if not sys.stdin.isatty():
            print(line, flush=True)
        if line.strip() == EXIT:
            return
        if line.strip():
            yield line.strip()


def _answer(model, messages: list[dict], options: dict, args: argparse.Namespace) -> str:
    """Print and return the model's reply to a conversation.

    Raises:
        ContextLengthError: the conversation is too long for a reply.
    """
    tokenizer, limit = model.processing_class, generation.readable_length(model)
    row = generation.encode(tokenizer, messages, "backbone")
    own_rows = generation.encode_for_rewards(model, [messages], args)
    length = max(map(len, [row, *(own for (own,) in own_rows)]))
    if limit is not None and length >= limit:
        raise ContextLengthError(
            "The conversation is longer than the models can read.",
            expected=f"fewer than {limit} tokens",
            found=str(length),
            remedy=RESET,
        )
    if limit is not None:
        options = options | {"max_new_tokens": min(options["max_new_tokens"], limit - length)}
    is_streamed = generation.is_streamable(model, options)
    _, (tokens,) = generation.generated(model, [row], own_rows, options, is_streamed=is_streamed)
    _, ends = generation.pad_and_ends(model)
    while tokens and tokens[-1] in ends:
        tokens.pop()
    reply = tokenizer.decode(tokens, skip_special_tokens=True)
    if not is_streamed:
        print(reply, flush=True)
    if not reply.strip():
        print("prt-hf chat: the reply is empty: the model ended it at once", file=sys.stderr)
    return reply
