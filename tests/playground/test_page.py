"""The playground in a browser: what it shows is what the model computes, and nothing leaves the machine."""

import re
import shutil
import threading
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import CLIPImageProcessorPil

from prt_hf import PRTForCausalLM, PRTForImageClassification, RewardModel
from prt_hf.playground import ALONE, CARRIED_OVER, REWARDED, Comparison, build_page, serve

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium"),
    pytest.mark.xdist_group("browser"),
]
PROMPT, LENGTH = "w5 w6 w7 w8", 24


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """A tuned reward, and a LoRA carried over."""
    folder, tokenizer = tmp_path_factory.mktemp("lora"), tiny.tokenizer()
    torch.manual_seed(3)
    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules="all-linear")
    get_peft_model(tiny.llama(2), config).save_pretrained(folder)
    carried = RewardModel.from_adapter(folder, base_model=tiny.llama(2), processing_class=tokenizer)
    rewards = [RewardModel.from_base(tiny.gpt2(4), tokenizer), carried]
    return Comparison(PRTForCausalLM.from_parts(tiny.llama(1), rewards, [1.0, 1.0], tokenizer), ["tuned", "lora"])


@contextmanager
def opened(comparison):
    """The page of a browser, which has asked nobody else for anything."""
    blocks = build_page(comparison, "**these**")
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 1100})
            asked = []
            page.on("request", lambda request: asked.append(urlsplit(request.url)))
            page.goto(serve(blocks))
            page.wait_for_selector("#start")
            yield page
            assert asked and {url.hostname for url in asked if url.scheme not in ("data", "blob")} == {"127.0.0.1"}
            browser.close()
    finally:
        blocks.close()


@contextmanager
def paused_after(model, steps):
    """Let the model take as many steps, then wait until the event is set."""
    go_on, taken = threading.Event(), []

    def wait(*_):
        taken.append(1)
        if len(taken) > steps:
            assert go_on.wait(60)

    handle = model.register_forward_hook(wait)
    yield go_on
    handle.remove()


def generated(comparison, strengths):
    """Tokens and text, by the model alone."""
    model, ids = comparison.model, torch.tensor([comparison.encode(PROMPT)])
    before, model.strengths = model.strengths, strengths
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LENGTH)
    model.strengths = before
    answer = output[0, ids.shape[1] :].tolist()
    return answer, comparison.tokenizer.decode(answer, skip_special_tokens=True)


def figures(name, candidate):
    """The row of a table."""
    rewards = (f"{r:+.2f}" for r in candidate.rewards)
    return [name, f"{candidate.before:.1%}", f"{candidate.after:.1%}", *rewards]


def table_of(page):
    rows = page.locator("#table [role=row]").filter(has=page.get_by_role("gridcell")).all()
    return [[cell.strip() for cell in row.get_by_role("gridcell").all_inner_texts()] for row in rows]


def test_text_side_by_side(comparison):
    sides = [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    answers, texts = zip(*(generated(comparison, side) for side in sides), strict=True)
    assert len(set(texts)) == 3
    with opened(comparison) as page, paused_after(comparison.model.backbone, 6) as go_on:
        boxes = page.locator(".answer textarea")
        page.fill("#prompt textarea", PROMPT)
        page.get_by_label("number input for Longest answer, in tokens").fill(str(LENGTH))
        page.click("#start")
        page.wait_for_function("document.querySelector('.answer textarea').value.split(' ').length >= 5")
        for text, streamed in zip(texts, (box.input_value() for box in boxes.all()), strict=True):
            assert text.startswith(streamed) and 0 < len(streamed) < len(text)
        go_on.set()
        page.wait_for_selector(".tokens .text")
        assert [box.input_value() for box in boxes.all()] == list(texts)
        assert page.locator(".answer label > span").all_inner_texts() == [ALONE, REWARDED, CARRIED_OVER]

        for side in (1, 2):  # what the rewards moved, and a click
            shown = page.locator(".tokens").nth(side - 1)
            assert "".join(shown.locator(".text").all_text_contents()) == comparison.tokenizer.decode(answers[side])
            before, after = comparison.moved(comparison.encode(PROMPT), answers[side], sides[side]).exp()
            for at, style in enumerate(each.get_attribute("style") for each in shown.locator(".token").all()):
                share = 1 - min(before[at], after[at]) / max(before[at], after[at])
                colour = "239, 68, 60" if after[at] >= before[at] else "128, 90, 213"
                assert colour in style
                opacity = (*map(float, re.findall(r"[\d.]+", style)), 1.0)[3]
                assert opacity == pytest.approx(share.item(), abs=5e-3)  # of 255 levels

            shown.locator(".text").nth(9).click()
            page.get_by_text(f"{comparison.tokenizer.decode(answers[side][:9])[-20:]}”").wait_for()
            ids = [*comparison.encode(PROMPT), *answers[side][:9]]
            found = comparison.next_tokens(ids, sides[side])
            rows = [[f"{each.before:.1%}", f"{each.after:.1%}", *(f"{r:+.2f}" for r in each.rewards)] for each in found]
            rows = [
                [f"␣{comparison.tokenizer.decode([each.index])}", *row] for each, row in zip(found, rows, strict=True)
            ]
            cell = page.locator("#table [role=gridcell]").get_by_text(rows[-1][-1], exact=True).first
            cell.wait_for()
            assert table_of(page) == rows

        for name in ("tuned", "lora"):
            box = page.get_by_label(f"number input for Strength of {name}")
            box.fill("0")
            box.press("Tab")  # which generates anew
        page.wait_for_function(
            "text => [...document.querySelectorAll('.answer textarea')].every(box => box.value === text)", arg=texts[0]
        )


def test_labels_before_and_after(tmp_path):
    processor = CLIPImageProcessorPil(size={"height": 8, "width": 8}, crop_size={"height": 8, "width": 8})
    reward = RewardModel.from_base(tiny.resnet(2, num_channels=3), processor)
    model = PRTForImageClassification.from_parts(tiny.vit(1, num_channels=3), [reward], [1.0], processor)
    comparison = Comparison(model)
    noise = torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(0))
    Image.fromarray(noise.numpy().astype("uint8")).save(tmp_path / "image.png")
    expected = comparison.candidates(comparison.read(Image.open(tmp_path / "image.png")), [1.0])
    names = [model.backbone.config.id2label[each.index] for each in expected]
    with opened(comparison) as page:
        page.click("#start")
        page.get_by_text("There is nothing to classify.").wait_for()
        page.locator("input[type=file]").first.set_input_files(tmp_path / "image.png")
        page.locator("img").wait_for()
        page.click("#start")
        page.locator("#table").get_by_text(f"{expected[0].after:.1%}").last.wait_for()
        assert table_of(page) == list(map(figures, names, expected))
        best = max(expected, key=lambda each: each.before)
        boxes = page.locator(".answer").all()
        assert names[expected.index(best)] in boxes[0].inner_text() and f"{best.before:.0%}" in boxes[0].inner_text()
        assert names[0] in boxes[1].inner_text() and f"{expected[0].after:.0%}" in boxes[1].inner_text()
