"""`prt-hf playground`."""

import argparse
from pathlib import Path

from . import quantization
from .arguments import add_command, add_loading_options, add_option, chosen_device, load_kwargs

DESCRIPTION = """\
Compare a backbone with and without rewards in the browser: answers side by side, a slider for each strength, and for
each token how far the rewards moved it. LoRAs that are carried over stand beside as EFT. Classifiers show their labels
before and after. The page is served to this machine alone."""
EXAMPLES = """examples:
  prt-hf playground Qwen/Qwen2.5-7B --reward me/gsm8k-reward
  prt-hf playground Qwen/Qwen2.5-7B --reward me/gsm8k-reward me/ordinary-lora --strength 1 0.5 --port 8000
  prt-hf playground facebook/convnextv2-large-22k-224 --reward me/cars-reward
  prt-hf playground Qwen/Qwen2.5-7B --reward me/gsm8k-reward --space_dir my-space"""

_OF_SPACES = ("revision", "dtype", "trust_remote_code")


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands, "playground", "compare a backbone with and without rewards in the browser", DESCRIPTION, EXAMPLES
    )
    parser.add_argument("backbone", help="Hub id or folder of the backbone")
    add_option(
        parser,
        "reward",
        nargs="+",
        action="extend",
        required=True,
        metavar="REWARD",
        help="Hub ids or folders of rewards, or of ordinary LoRA adapters, which are carried over",
    )
    add_option(
        parser,
        "strength",
        nargs="+",
        action="extend",
        type=float,
        metavar="S",
        help="1 / lambda to begin with, one for each reward; default: as tuned",
    )
    add_option(parser, "port", type=_port, metavar="N", help="port of the page; default: the first free one from 7860")
    add_option(
        parser, "share", action="store_true", help="open a public link through gradio's servers, for anyone who has it"
    )
    add_option(
        parser,
        "space_dir",
        type=Path,
        metavar="FOLDER",
        help="write the same page as a Space into a new folder, instead of showing it; models by their Hub ids",
    )
    add_loading_options(parser)
    quantization.add_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    """Serve the page until it is interrupted, or write the Space."""
    from ..playground import Comparison, build_page, check_gradio, load, serve, title_of, write_space

    check_gradio()  # before models are loaded
    if args.space_dir:
        options = {name: value for name in _OF_SPACES if (value := getattr(args, name))}
        write_space(args.space_dir, args.backbone, args.reward, args.strength, **options)
        print(f"{args.space_dir} is ready: hf upload <user>/<space> {args.space_dir} --repo-type space")
        return
    kwargs = load_kwargs(args) | quantization.quantization_kwargs(args)
    model = load(args.backbone, args.reward, args.strength, revision=args.revision, **kwargs)
    if (device := chosen_device(args)) is not None:
        model.to(device)
    names = [Path(each).resolve().name if Path(each).is_dir() else each for each in (args.backbone, *args.reward)]
    page = build_page(Comparison(model, names[1:]), title_of(names[0], names[1:]))
    print(f"The playground is at {serve(page, port=args.port, share=args.share)} (Ctrl-C ends it)", flush=True)
    page.block_thread()


def _port(text: str) -> int:
    value = int(text)
    if not 0 < value < 2**16:
        raise argparse.ArgumentTypeError(f"must be from 1 to 65535, not {text}")
    return value
