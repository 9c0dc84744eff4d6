"""The README and the guides run as they stand, with small models in the place of those of the Hub; their links lead on.

The README's Python runs first. A guide whose snippets continue those of the README gets its names, others only data.
"""

import re
import shlex
from pathlib import Path

import datasets
import idea
import pytest
import test_own_pixels
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

import prt_hf
from prt_hf import cli
from prt_hf.cli.train_options import Options
from prt_hf.contract import IMAGE_CLASSIFICATION, TEXT_GENERATION
from prt_hf.training.config import PRTConfig
from prt_hf.training.sft import PRTSFTConfig

pytestmark = pytest.mark.xdist_group("guides")  # the README once

ROOT = Path(__file__).parents[1]
README, LANDING = ROOT / "README.md", ROOT / "notebooks" / "README.md"
RECIPES = ROOT / "notebooks" / "recipes" / "README.md"  # see test_recipes.py
ROOMS = ("notebooks", "prt_hf", "model_cards")
GUIDES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (
        README,
        *(path for room in ("notebooks", "prt_hf", "model_cards") for path in (ROOT / room).rglob("*.md")),
    )
}
OF_CARDS = re.compile(r"model_cards/(?!README)")  # rendered: see hub/test_model_card.py
LINKED = {name: text for name, text in GUIDES.items() if not OF_CARDS.match(name)}
# Ray Data wants the environment of vLLM: see tests/serving/test_batch.py.
PYTHON = {
    name: [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if not block.startswith("import ray\n")]
    for name, text in LINKED.items()
}
COMMANDS = [
    pytest.param(line, id=f"{name}: {line[:60]}")
    for name, text in LINKED.items()
    if name != RECIPES.relative_to(ROOT).as_posix()
    for block in re.findall(r"```bash\n(.*?)```", text, re.S)
    for line in re.sub(r"^torchrun .* -m prt_hf\.cli", "prt-hf", block, flags=re.M).splitlines()
    if line.startswith("prt-hf ")
]

MODELS = {
    "Qwen/Qwen2.5-0.5B": tiny.llama(1),
    "Qwen/Qwen2.5-1.5B": tiny.llama(3),
    "Qwen/Qwen2.5-7B": tiny.llama(2, hidden_size=64),
    "user/tuned-qwen2.5-0.5b": tiny.llama(4),
    "google/vit-base-patch16-224": tiny.vit(1),
    "facebook/convnextv2-large-22k-224": tiny.resnet(2, names=tiny.COLOURS[::-1]),
}
CLASS_NAMES = ["w3", "w4", "w5", "w6"]
ENCODERS = {
    "openai/clip-vit-base-patch16": (CLIPModel, CLIPConfig, {"num_channels": 3, "image_size": 8}),
    "google/siglip-so400m-patch14-384": (SiglipModel, SiglipConfig, {"num_channels": 3, "image_size": 12}),
}
PROCESSORS = (
    CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
    SiglipImageProcessorPil(size={"height": 12, "width": 12}),
)
PROBLEM = {"question": " ".join(f"w{index}" for index in range(3, 12)), "answer": "w20 w21 w22"}
DATA_SETS = {"openai/gsm8k": PROBLEM, "trl-lib/Capybara": {"text": " ".join(PROBLEM.values())}}


def save_models():
    for model_id, model in MODELS.items():
        model.save_pretrained(model_id)
        tiny.tokenizer().save_pretrained(model_id)
    base = MODELS["Qwen/Qwen2.5-0.5B"].from_pretrained("Qwen/Qwen2.5-0.5B")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).save_pretrained("user/any-lora")
    for (model_id, (model, config, size)), processor in zip(ENCODERS.items(), PROCESSORS, strict=True):
        encoders = {"text_config": tiny.TEXT_ENCODER, "vision_config": tiny.IMAGE_ENCODER | size}
        model(config(**encoders)).save_pretrained(model_id)
        tiny.tokenizer().save_pretrained(model_id)
        processor.save_pretrained(model_id)


def data_of_images():
    """The names that the guide to images leaves to its reader."""
    pixel_values = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    photos = datasets.Dataset.from_dict({"pixel_values": pixel_values.tolist(), "label": [0, 1, 2, 3]})
    photos = photos.with_format("torch")
    return {"photos": photos, "pixel_values": pixel_values, "cars": test_own_pixels.PHOTOS, "class_names": CLASS_NAMES}


def run(name, scope):
    """Run the blocks of a guide one after another, and return the names that each left."""
    seen = []
    for block in PYTHON[name]:
        exec(compile(block, name, "exec"), scope)
        seen.append(dict(scope))
    return seen


@pytest.fixture(scope="module")
def readme(tmp_path_factory):
    """The names that each block of the README leaves, in a folder with what it saves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("guides"))
        patch.setattr(
            datasets, "load_dataset", lambda name, *_, **__: datasets.Dataset.from_list([DATA_SETS[name]] * 4)
        )
        save_models()
        yield run("README.md", {})


def test_the_readme_runs_as_it_stands(readme):
    tuned, ported, whole = readme
    assert tuned["trainer"].state.global_step > 0
    prompt = ported["inputs"]["input_ids"].shape[1]
    assert ported["output"].shape[1] == prompt + 64
    bare = ported["backbone"].generate(**ported["inputs"], max_new_tokens=64)
    assert not torch.equal(bare, ported["output"])
    with torch.no_grad():
        logits = whole["model"](ported["inputs"]["input_ids"]).logits
    expected = whole["model"].generate(**ported["inputs"], max_new_tokens=64)
    assert torch.equal(whole["output"], expected), "speculative or not, in memory or reloaded"
    torch.testing.assert_close(logits.exp().sum(-1), torch.ones(logits.shape[:-1]))


@pytest.mark.parametrize("name", [name for name, blocks in PYTHON.items() if blocks and name != "README.md"])
def test_a_guide_runs_as_it_stands(name, readme, hub):
    before = {each: readme[-1][each] for each in ("reward", "backbone", "inputs")}
    goes_on = re.search(r"snippets\s+continue\s+those\s+of", GUIDES[name])
    seen = run(name, dict(readme[-1]) if goes_on else data_of_images())
    CHECKS.get(name, lambda seen, before, hub: None)(seen, before, hub)


def check_tuning(seen, before, hub):
    trained, measured = seen
    assert trained["trainer"].state.global_step > 0 and trained["trainer"].args.output_dir == "chat-reward"
    assert measured["figures"]["eval_loss"] > 0


def check_porting(seen, before, hub):
    matched, own, across, combined, fast = seen
    assert across["processor"].vocabularies is None  # the stand-ins have one vocabulary
    assert str(matched["processor"].match) == "identical: 97 tokens"
    assert own["processor"].prompt.shape[1] > 0
    assert combined["output"].shape[0] == 2
    expected = before["backbone"].generate(
        **before["inputs"], logits_processor=[before["reward"].processor(before["backbone"])], max_new_tokens=64
    )
    assert torch.equal(fast["fast"].sequences, expected), "speculative or not"


def check_existing_loras(seen, before, hub):
    _, carried_over, distilled = seen
    generated = carried_over["carried_over"].generate(**before["inputs"], max_new_tokens=64)
    assert torch.equal(generated, carried_over["emulated"])
    assert distilled["trainer"].reward.config.distilled_from.id.endswith("user/any-lora")


def check_bake(seen, before, hub):
    baked, merged = seen
    ids = before["inputs"]["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(merged["merged"](ids).logits, baked["baked"](ids).logits, rtol=1e-3, atol=1e-3)


def check_playground(seen, before, hub):
    (found,) = seen
    assert len(found["rewarded"]) == 20 and found["before"].shape == found["after"].shape == (20,)


def check_migration(seen, before, hub):
    proxy, distilled = seen
    large, ids = proxy["large"], proxy["inputs"]["input_ids"]
    with torch.no_grad():
        logits = [model(ids).logits[:, -1] for model in (large, proxy["expert"], proxy["antiexpert"])]
    expected = torch.log_softmax(logits[0] + logits[1] - logits[2], -1)
    torch.testing.assert_close(proxy["processor"](ids, logits[0]), expected, msg="alpha = 1")
    assert distilled["output"].shape == proxy["output"].shape


def check_images(seen, before, hub):
    images, by_hand, zero_shot = seen
    source, target = MODELS["google/vit-base-patch16-224"], MODELS["facebook/convnextv2-large-22k-224"]
    assert [source.config.id2label[index] for index in by_hand["order"]] == list(target.config.id2label.values())
    torch.testing.assert_close(images["log_probs"], by_hand["by_hand"])
    torch.testing.assert_close(zero_shot["log_probs"].exp().sum(-1), torch.ones(4))
    assert list(zero_shot["target"].config.id2label.values()) == CLASS_NAMES


def check_evaluation(seen, before, hub):
    (measured,) = seen
    # The end token belongs to what is answered.
    assert (measured["report"].rows, measured["report"].positions) == (4, 4 * (3 + 1))
    assert "| `Qwen/Qwen2.5-7B` | `evaluation data` |" in Path("gsm8k-reward/README.md").read_text()
    assert Path("report/report.png").is_file()


def check_sharing(seen, before, hub):
    (shared,) = seen
    assert hub.repositories["me/gsm8k-reward"].private
    ids = before["inputs"]["input_ids"]
    with torch.no_grad():
        assert torch.equal(shared["reward"](input_ids=ids), before["reward"](input_ids=ids))
    assert shared["model"].config.name_or_path == "me/gsm8k-7b"


CHECKS = {
    "notebooks/tuning.md": check_tuning,
    "notebooks/porting.md": check_porting,
    "notebooks/existing_loras.md": check_existing_loras,
    "notebooks/bake.md": check_bake,
    "notebooks/migration.md": check_migration,
    "notebooks/images.md": check_images,
    "prt_hf/evaluation/README.md": check_evaluation,
    "prt_hf/playground/README.md": check_playground,
    "model_cards/README.md": check_sharing,
}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_parses(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```yaml\n(# reward\.yaml.*?)```", GUIDES["notebooks/tuning.md"], re.S)
    Path("reward.yaml").write_text(block)
    arguments = shlex.split(line, comments=True)[1:]
    seen = []
    for command in cli.COMMANDS:
        monkeypatch.setattr(command, "run", seen.append)
    assert cli.main(arguments) == 0
    (args,) = seen
    if args.command == "train":
        kind = (PRTConfig, IMAGE_CLASSIFICATION) if "vit" in line else (PRTSFTConfig, TEXT_GENERATION)
        assert Options([*args.rest, "--use_cpu"]).training_config(*kind).output_dir


def test_the_readmes_checks_run(readme, capsys):
    problem = f'{{"prompt": "{PROBLEM["question"]}", "completion": "{PROBLEM["answer"]}"}}\n'
    Path("test.jsonl").write_text(problem * 2)
    lines = [line for line in GUIDES["README.md"].splitlines() if line.startswith("prt-hf check")]
    assert [cli.main(shlex.split(line, comments=True)[1:]) for line in lines] == [0, 0]
    printed = capsys.readouterr().out
    assert printed.count("fits: yes") == 2 and printed.count("worth porting: ") == 1


def test_the_face_comes_early():
    lines = GUIDES["README.md"].splitlines()
    assert len(lines) <= 250
    first = "\n".join(lines[:110])
    for line in ("pip install -e . && prt-hf demo", "PRTTrainer(", "RewardModel.from_pretrained", "backbone.generate"):
        assert line in first, line


def test_the_picture_shows_what_its_text_says(tmp_path):
    answers = [idea.WORDS[torch.tensor(idea.together(step[2])).argmax()] for step in idea.STEPS.values()]
    assert answers == ["Sydney", "Canberra"]
    idea.draw(tmp_path / "idea.svg")
    assert (tmp_path / "idea.svg").read_text().startswith("<?xml")


def test_every_public_name_is_told():
    told = {name for name in prt_hf.__all__ if any(name in text for text in LINKED.values())}
    assert told == set(prt_hf.__all__) - {"__version__"}


def test_every_command_is_told():
    names = {command.__name__.rpartition(".")[2] for command in cli.COMMANDS}
    assert {name for name in names if f"| `{name}` |" not in GUIDES["README.md"]} == set()


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", GUIDES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    text = re.sub(r"```.*?```", "", GUIDES[name], flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "hf://")) or OF_CARDS.match(name):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_relative_to(ROOT) and target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_every_guide_is_linked_from_the_landing_page():
    links = {
        (LANDING.parent / link.partition("#")[0]).resolve()
        for link in re.findall(r"\]\(([^)]+)\)", LANDING.read_text())
    }
    missing = {name for name in LINKED if ROOT / name not in links | {LANDING}}
    assert missing == set()


def test_the_package_ships_no_guides():
    (patterns,) = re.findall(r"^prt_hf = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M)
    guides = [path.relative_to(ROOT / "prt_hf") for path in (ROOT / "prt_hf").rglob("*.md")]
    assert guides and not (ROOT / "MANIFEST.in").exists()
    assert not [path for path in guides for pattern in re.findall(r'"(.*?)"', patterns) if path.match(pattern)]


def test_nobody_is_sent_to_an_index_for_this_package():
    """The name there is not ours."""
    texts = [path for kind in ("*.md", "*.py", "*.jinja") for path in ROOT.rglob(kind)]
    sent = re.compile(r"pip install (?:-\S+ )*[\"']?prt[-_]hf")
    found = {path.name for path in texts if path != Path(__file__) and sent.search(path.read_text())}
    assert found == set()
