"""Write the playground as a Space: a folder to upload, whose `app.py` builds the same page from ids."""

import shutil
from collections.abc import Sequence
from importlib.metadata import requires, version
from pathlib import Path

import yaml
from huggingface_hub.utils import validate_repo_id

from ..errors import PRTValueError
from ..functional import check_strengths

_PACKAGE = Path(__file__).parents[1]
_APP = '''\
"""Show a backbone with and without rewards."""

import torch

from prt_hf.playground import Comparison, build_page, load, serve

BACKBONE = {backbone!r}
REWARDS = {rewards!r}
STRENGTHS = {strengths!r}  # None: as they were tuned
OPTIONS = {options!r}

model = load(BACKBONE, REWARDS, STRENGTHS, **OPTIONS).to("cuda" if torch.cuda.is_available() else "cpu")
page = build_page(Comparison(model, REWARDS), {title!r})
serve(page, host=None)
page.block_thread()
'''


def title_of(backbone: str, rewards: Sequence[str]) -> str:
    """Return the line that names the models on the page."""
    return f"**{backbone}** with {', '.join(f'**{reward}**' for reward in rewards)}"


def write_space(
    folder: str | Path,
    backbone: str,
    rewards: Sequence[str],
    strengths: Sequence[float] | None = None,
    **options: str | bool,
) -> None:
    """Write `app.py`, `requirements.txt`, `README.md` and a copy of this package, which is on no index.

    Args:
        folder: new or empty.
        backbone: Hub id.
        rewards: Hub ids.
        strengths (*optional*): 1 / lambda, one for each reward; by default as they were tuned.
        **options: for [`load`] there: `revision`, `dtype`, `trust_remote_code`.

    Raises:
        PRTValueError: the folder holds something, a model is a folder of this machine, or strengths do not fit.
        HFValidationError: a model has no id.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PRTValueError(f"{folder} is not empty.", expected="a new or an empty folder for the Space")
    if local := [each for each in (backbone, *rewards) if Path(each).exists()]:
        raise PRTValueError(
            "A Space cannot read folders of this machine.",
            expected="ids of the Hub",
            found=", ".join(local),
            remedy="push them (`prt-hf push`), and name them by their ids",
        )
    for each in (backbone, *rewards):
        validate_repo_id(each)
    if strengths is not None:
        check_strengths(strengths, len(rewards))
    title = title_of(backbone, rewards)
    shutil.copytree(_PACKAGE, folder / "prt_hf", ignore=shutil.ignore_patterns("__pycache__"))
    app = _APP.format(backbone=backbone, rewards=list(rewards), strengths=strengths, options=options, title=title)
    (folder / "app.py").write_text(app, encoding="utf-8")
    needed = [each for each in requires("prt_hf") or () if "extra ==" not in each]
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n", encoding="utf-8")
    matter = {
        "title": "Portable Reward Tuning",
        "sdk": "gradio",
        "sdk_version": version("gradio"),
        "app_file": "app.py",
        "models": [backbone, *rewards],
    }
    text = f"---\n{yaml.safe_dump(matter, sort_keys=False)}---\n\n{title}, side by side with the backbone alone.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
