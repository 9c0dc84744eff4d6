"""Show a backbone with and without rewards in the browser: answers side by side, and what the rewards moved.

`comparison.py` computes, without gradio; `page.py` shows it; `space.py` writes the same page as a Space.
"""

from .comparison import ALONE, CARRIED_OVER, REWARDED, Candidate, Comparison, load
from .page import build_page, check_gradio, serve
from .space import title_of, write_space

__all__ = [
    "ALONE",
    "CARRIED_OVER",
    "REWARDED",
    "Candidate",
    "Comparison",
    "build_page",
    "check_gradio",
    "load",
    "serve",
    "title_of",
    "write_space",
]
