"""The page: plain gradio components around a [`Comparison`]."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..contract import IMAGE_CLASSIFICATION
from ..errors import PRTError, UnsupportedError
from .comparison import ALONE, REWARDED, Candidate, Comparison

if TYPE_CHECKING:
    import gradio

# gradio lays tokens out as separate boxes with gaps; here they are a text.
_CSS = """
.tokens .textfield { display: block !important; font-size: 0; }
.tokens .token { margin: 0 !important; padding: 0 !important; cursor: pointer; }
.tokens .text { font-size: var(--text-lg); line-height: 1.9; padding: 3px 0; background: inherit; }
"""
_LEGEND = (
    "Red tokens were made likelier by the rewards, violet ones less likely; the deeper, the more. "
    "**Click a token** for what else could have stood there."
)


def check_gradio() -> Any:
    """Return gradio, with its analytics switched off in this process.

    Raises:
        UnsupportedError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise UnsupportedError(
            "The playground is a gradio page, and gradio is not installed.",
            expected="the package gradio",
            found=str(error),
            remedy='pip install -e ".[playground]" in your clone of prt_hf',
        ) from error
    return gradio


def build_page(comparison: Comparison, title: str = "") -> "gradio.Blocks":
    """Return the page: a prompt or an image, a strength for each reward, and all sides of the comparison.

    Args:
        comparison: of any PRT model.
        title (*optional*): the models' names.

    Raises:
        UnsupportedError: gradio is not installed.
    """
    gr = check_gradio()
    with gr.Blocks(title="Portable Reward Tuning", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"## Portable Reward Tuning\n{title}")
        (_text_page if comparison.is_text else _label_page)(gr, comparison)
    return page


def serve(
    page: "gradio.Blocks", *, host: str | None = "127.0.0.1", port: int | None = None, share: bool = False
) -> str:
    """Serve a page in the background, and return its address.

    Args:
        page: as [`build_page`] returns it.
        host: address to listen at; None for what `GRADIO_SERVER_NAME` says, as a Space does.
        port (*optional*): by default the first free one from 7860.
        share: open a public link through gradio's servers as well.
    """
    _, local, public = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        ssr_mode=False,
        footer_links=[],
        css=_CSS,
        theme=check_gradio().themes.Default(primary_hue="indigo"),
    )
    return public or local


def _sliders(gr: Any, comparison: Comparison) -> list:
    strengths = zip(comparison.names, map(float, comparison.model.strengths), strict=True)
    return [
        gr.Slider(min(-1.0, value), max(2.0, value), value, step=0.05, label=f"Strength of {name}")
        for name, value in strengths
    ]


def _table(gr: Any, comparison: Comparison, first: str) -> Any:
    rewards = ["r"] if len(comparison.names) == 1 else [f"r of {name}" for name in comparison.names]
    headers = [first, "before", "after", *rewards]
    return gr.Dataframe(
        headers=headers, interactive=False, wrap=True, max_height=700, elem_id="table", label="Before and after"
    )


def _rows(candidates: list[Candidate], names: list[str]) -> list[list[str]]:
    return [
        [name, f"{each.before:.1%}", f"{each.after:.1%}", *(f"{value:+.2f}" for value in each.rewards)]
        for name, each in zip(names, candidates, strict=True)
    ]


@contextmanager
def _shown_errors(gr: Any) -> Iterator[None]:
    """Show the user what is wrong, without a traceback."""
    try:
        yield
    except PRTError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _text_page(gr: Any, comparison: Comparison) -> None:
    tokenizer, titles = comparison.tokenizer, list(comparison.sides([0.0] * len(comparison.names)))
    has_template = tokenizer.chat_template is not None
    with gr.Row():
        with gr.Column(scale=2):
            prompt = gr.Textbox(label="Prompt", lines=4, elem_id="prompt")
            is_chat = gr.Checkbox(has_template, label="As a user's message, in the chat template", visible=has_template)
            with gr.Row():
                start = gr.Button("Generate", variant="primary", elem_id="start")
                stop = gr.Button("Stop")
        with gr.Column():
            sliders = _sliders(gr, comparison)
            length = gr.Slider(8, 512, 128, step=8, label="Longest answer, in tokens")
    with gr.Row():
        answers = [
            gr.Textbox(label=title, lines=8, max_lines=16, interactive=False, elem_classes="answer") for title in titles
        ]
    gr.Markdown(_LEGEND)
    with gr.Row():
        with gr.Column():
            tokens = [gr.HighlightedText(label=title, elem_classes="tokens") for title in titles[1:]]
        with gr.Column():
            table = _table(gr, comparison, "next token")
    kept = gr.State()  # prompt, answer and strengths of each side with rewards, as they were generated

    def generate(text: str, is_chat: bool, length: int, *strengths: float) -> Iterator[dict]:
        with _shown_errors(gr):
            ids, sides = comparison.encode(text, is_chat), comparison.sides(strengths)
            yield dict.fromkeys([*answers, *tokens, table, kept])
            found = [[]] * len(sides)
            for found in comparison.answers(ids, list(sides.values()), length):
                texts = (tokenizer.decode(answer, skip_special_tokens=True) for answer in found)
                yield dict(zip(answers, texts, strict=True))
            rewarded = list(zip([ids] * len(sides), found, sides.values(), strict=True))[1:]
            shades = (_shades(comparison, *each) for each in rewarded)
            yield {kept: rewarded} | dict(zip(tokens, shades, strict=True))

    def look(side: int, kept: list, event: gr.SelectData) -> dict:
        ids, answer, strengths = kept[side]
        before = answer[: event.index]
        candidates = comparison.next_tokens([*ids, *before], strengths)
        names = [comparison.pieces([*before[-4:], each.index])[-1] for each in candidates]
        where = f"After “…{tokenizer.decode([*ids, *before])[-40:]}”"
        return {table: gr.Dataframe(_rows(candidates, list(map(_visible, names))), label=where.replace("\n", "↵"))}

    inputs, outputs = [prompt, is_chat, length, *sliders], [*answers, *tokens, table, kept]
    triggers = [start.click, prompt.submit, *(slider.release for slider in sliders)]
    running = gr.on(triggers, generate, inputs, outputs, trigger_mode="always_last")
    stop.click(None, cancels=[running])
    for side, box in enumerate(tokens):
        box.select(look, [gr.State(side), kept], [table])


def _visible(text: str) -> str:
    return text.replace("\n", "↵").replace(" ", "␣")


def _shades(
    comparison: Comparison, prompt: list[int], answer: list[int], strengths: list[float]
) -> list[tuple[str, float]]:
    """Return the text of each token, and the share of its probability that it won, or (below zero) lost."""
    before, after = comparison.moved(prompt, answer, strengths)
    change = after - before
    return list(zip(comparison.pieces(answer), (-change.sign() * (-change.abs()).expm1()).tolist(), strict=True))


def _label_page(gr: Any, comparison: Comparison) -> None:
    is_image = comparison.model.task == IMAGE_CLASSIFICATION
    with gr.Row():
        with gr.Column(scale=2):
            given = gr.Image(type="pil", label="Image") if is_image else gr.Textbox(label="Text", lines=4)
            start = gr.Button("Classify", variant="primary", elem_id="start")
        with gr.Column():
            sliders = _sliders(gr, comparison)
    with gr.Row():
        boxes = [gr.Label(label=title, elem_classes="answer") for title in (ALONE, REWARDED)]
    table = _table(gr, comparison, "label")

    def classify(given: Any, *strengths: float) -> dict:
        with _shown_errors(gr):
            candidates = comparison.candidates(comparison.read(given), strengths)
        names = [comparison.model.backbone.config.id2label[each.index] for each in candidates]
        before, after = (dict(zip(names, (each[side] for each in candidates), strict=True)) for side in (1, 2))
        return dict(zip([*boxes, table], (before, after, _rows(candidates, names)), strict=True))

    gr.on([start.click, *(slider.release for slider in sliders)], classify, [given, *sliders], [*boxes, table])
