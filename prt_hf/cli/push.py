"""`prt-hf push`."""

import argparse
import json
import sys
from pathlib import Path

from .arguments import add_command, add_json, add_option

DESCRIPTION = """\
Push the folder of a reward, or of a recipe (a saved PRT model), to the Hugging Face Hub, in one commit and without
loading any model. What users have written into the card there is kept. Only the files of a reward or recipe are pushed:
weights, configurations, tokenizer or image processor, card. They are listed first; `--include` adds others. Links are
refused."""
EXAMPLES = """\
examples:
  prt-hf push gsm8k-reward me/gsm8k-reward --private
  prt-hf push gsm8k-reward me/gsm8k-reward --revision v2 --commit_message "tuned on twice the data"
  prt-hf push gsm8k-reward someone/gsm8k-reward --create_pr
  prt-hf push gsm8k-7b me/gsm8k-7b           # a recipe: which backbone, which rewards, how strong

Log in first with `hf auth login`, or set HF_TOKEN."""


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(commands, "push", "share a saved reward or recipe on the Hub", DESCRIPTION, EXAMPLES)
    parser.add_argument("folder", type=Path, help="folder that `save_pretrained` or `prt-hf train` wrote")
    parser.add_argument("repo_id", help="user/name; created if it does not exist")
    add_option(parser, "private", action="store_true", default=None, help="make a new repository private")
    add_option(parser, "revision", help="branch to push to, created if it does not exist; default: main")
    add_option(parser, "commit_message", help="default: Upload reward, or Upload recipe")
    add_option(parser, "create_pr", action="store_true", help="open a pull request instead of pushing to the branch")
    add_option(parser, "include", nargs="+", default=[], metavar="FILE", help="further files of the folder to push")
    add_option(parser, "token", help="access token for the Hub; default: the one that `hf auth login` saved")
    add_json(parser, "print one JSON object: repo_id, commit, url")
    return parser


def run(args: argparse.Namespace) -> None:
    """Push a folder and print the address of the commit or pull request."""
    from ..hub.folder import RECIPE, folder_to_read, kind_of
    from ..hub.publishing import push_reward
    from ..inference.recipe import push_recipe

    push = push_recipe if kind_of(folder_to_read(args.folder)) == RECIPE else push_reward
    info = push(
        args.folder,
        args.repo_id,
        args.include,
        private=args.private,
        revision=args.revision,
        commit_message=args.commit_message,
        token=args.token,
        create_pr=args.create_pr,
        announce=lambda names: print(f"Pushing to {args.repo_id}:", *names, sep="\n  ", file=sys.stderr),
    )
    url = info.pr_url or info.commit_url
    print(json.dumps({"repo_id": args.repo_id, "commit": info.oid, "url": url}) if args.json else url)
