"""The notebooks run from top to bottom: offline as they stand, and with the Hub, for which small models stand in."""

import ast
import os
import re
import sys
from importlib import util
from pathlib import Path

import datasets
import nbformat
import numpy as np
import pytest
import tiny
from nbclient import NotebookClient
from PIL import Image
from transformers import ViTImageProcessor

from prt_hf.demo.facts import word_tokenizer
from prt_hf.demo.text import collator_of
from prt_hf.demo.training import Steps, fit

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ["1_tune_a_reward", "2_new_backbone", "3_images", "4_share_on_the_hub", "5_chat"]
PUBLIC = {  # what a reader may copy: the public rooms, and of the demo its data
    "prt_hf": None,
    "prt_hf.evaluation": {"portability_report"},
    "prt_hf.demo.facts": {"examples", "halves", "judge", "make_world"},
    "prt_hf.demo.images": {"ImageSettings", "turned_digits"},
}


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute(notebooks, folder):
    """Run notebooks one after another in a new process, which imports the libraries once; return each with outputs."""
    cells = []
    for notebook in notebooks:
        cells += [nbformat.v4.new_code_cell("%reset -f"), *notebook.cells]  # names of one are not the next one's
    cells = [nbformat.from_dict({**cell, "id": f"cell-{index}"}) for index, cell in enumerate(cells)]
    joined = nbformat.v4.new_notebook(cells=cells)
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": binaries, "OMP_NUM_THREADS": "1"}
    client = NotebookClient(joined, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    done = iter(joined.cells)
    executed = []
    for notebook in notebooks:
        assert next(done).source == "%reset -f"
        executed.append(nbformat.v4.new_notebook(cells=[next(done) for _ in notebook.cells]))
    return executed


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell):
    """What a reader sees of its outputs, but for pictures."""
    shown = [output.text if output.output_type == "stream" else output.data["text/plain"] for output in cell.outputs]
    return shown + [output.data["text/html"] for output in cell.outputs if "text/html" in output.get("data", ())]


def kinds(cell):
    return {output.get("name") or tuple(sorted(output.data)) for output in cell.outputs}


def tables(cell):
    """Rows and columns without their figures, which follow the machine and the versions."""
    shown = [output.data["text/plain"] for output in cell.outputs if output.output_type == "execute_result"]
    return [re.sub(r"[-\s\d.]+", " ", table) for table in shown]


@pytest.mark.slow
def test_offline_they_run_and_show_what_is_stored(tmp_path):
    for name, executed in zip(NAMES, execute([read(name) for name in NAMES], tmp_path), strict=True):
        for before, now in zip(code_cells(read(name)), code_cells(executed), strict=True):
            assert (kinds(before), tables(before)) == (kinds(now), tables(now)), f"{name}: {now.source}"
    made = [entry.name for entry in tmp_path.iterdir()]
    assert made == ["runs"], "all that the notebooks write is in one folder"


@pytest.mark.parametrize("name", NAMES)
def test_it_is_stored_as_a_reader_wants_it(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert all(cell.metadata == {} for cell in notebook.cells)
    assert re.match(rf"# {name[0]}\. \w", notebook.cells[0].source), "a title, and no badge to others' repositories"
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run from top to bottom"
    assert "\nON_HUB = False" in cells[0].source
    for cell in cells:
        assert all(output.get("name") != "stderr" for output in cell.outputs), cell.source
        for text in texts(cell):
            assert not re.search(r"(?<!\w)/(tmp|root|home|usr|var|Users)/|Traceback|it/s\b", text), text


def imports(notebook):
    """Yield the modules of this package that a notebook imports from, each with the names that it takes."""
    for cell in code_cells(notebook):
        source = "\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith("%"))
        for node in ast.walk(ast.parse(source)) if not cell.source.startswith("%%bash") else ():
            if isinstance(node, ast.ImportFrom) and node.module.startswith("prt_hf"):
                yield node.module, {alias.name for alias in node.names}
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("prt_hf") for alias in node.names), cell.source


@pytest.mark.parametrize("name", NAMES)
def test_what_a_reader_copies_is_public(name):
    found = dict(imports(read(name)))
    assert "prt_hf" in found and found.keys() <= PUBLIC.keys()
    assert all(PUBLIC[module] is None or names <= PUBLIC[module] for module, names in found.items())


@pytest.mark.parametrize("name", NAMES)
def test_where_the_package_is_absent_it_says_how_to_install_it_and_installs_nothing(name, monkeypatch):
    cell = code_cells(read(name))[1].source
    (install,) = re.findall(r"^ *%pip .*$", cell, re.M)
    assert install.split() == ["%pip", "install", "-q", "{PRT_HF}"]
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="clone"):
        exec(cell.replace(install.strip(), "raise AssertionError('it would install something')"), {})


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Save small models and data under their names of the Hub, in the folder where the notebooks run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    # Answers count on from the question, and end in the form "w90 w90 w90". Only the new model can count already.
    counted = [[f"w{number}" for number in range(start, start + 10)] for start in range(3, 79, 2)]
    rows = [{"question": " ".join(row[:8]), "answer": " ".join([*row[8:], *["w90"] * 3])} for row in counted]
    _save_data("openai/gsm8k", "main", train=rows[::2], test=rows[1::2])
    tokenizer = tiny.tokenizer()
    known = [{"input_ids": tokenizer(" ".join(row))["input_ids"]} for row in counted]
    new = fit(tiny.llama(2, hidden_size=64), known, Steps(60, 3e-3, 8), 0, "", collator_of(tokenizer))
    for size, model in (("0.5B", tiny.llama(1)), ("1.5B", new)):
        model.save_pretrained(f"Qwen/Qwen2.5-{size}")
        tokenizer.save_pretrained(f"Qwen/Qwen2.5-{size}")
    tiny.tokenizer(changed={"w5": "five"}).save_pretrained("openai-community/gpt2")

    chat_tokenizer = word_tokenizer()
    chat_tokenizer.chat_template = "{% for message in messages %}{{ message.content + eos_token }}{% endfor %}"
    for size, seed in (("135M", 1), ("360M", 2)):
        model = tiny.llama(seed, vocab_size=len(chat_tokenizer), initializer_range=0.1)
        model.save_pretrained(f"HuggingFaceTB/SmolLM2-{size}-Instruct")
        chat_tokenizer.save_pretrained(f"HuggingFaceTB/SmolLM2-{size}-Instruct")

    names = [f"class {index}" for index in range(702)]
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    for size, model in (
        ("tiny", tiny.vit(0, names=names, num_channels=3)),
        ("large", tiny.resnet(1, names=names, num_channels=3)),
    ):
        model.save_pretrained(f"facebook/convnextv2-{size}-22k-224")
        processor.save_pretrained(f"facebook/convnextv2-{size}-22k-224")
    photos = [
        {"image": Image.fromarray(np.full((10, 10, 3), 25 * label, dtype=np.uint8)), "label": label}
        for label in np.random.default_rng(0).integers(0, 10, 64).tolist()
    ]
    _save_data("frgfm/imagenette", "160px", train=photos, validation=photos)
    return tmp_path


def _save_data(name, config, **splits):
    folder = Path(name)
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    files = "".join(f"  - split: {split}\n    path: {split}.parquet\n" for split in splits)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n")


def on_hub(name):
    """Return a notebook with its switch turned, and steps for small models: fewer and larger."""
    notebook = read(name)
    for cell in code_cells(notebook):
        cell.source = re.sub(r"^ON_HUB = False", "ON_HUB = True", cell.source, flags=re.M)
        cell.source = re.sub(r"(\"max_steps\": )(\d{3}|60), ", r"\g<1>30, ", cell.source)
        cell.source = re.sub(r"(new_tokens = \[0\], |max_new_tokens=)\d+", r"\g<1>8", cell.source)
        cell.source = cell.source.replace("2e-4", "1e-2").replace("2e-5", "3e-3")
    return notebook


def test_with_models_of_the_hub_they_run_and_a_reward_is_pushed_pulled_and_checked(stand_ins, hub):
    for name in ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B"):
        hub.put(name, stand_ins / name)
    *others, share = (on_hub(name) for name in sorted(NAMES, key="4_share_on_the_hub".__eq__))
    code_cells(share)[2].source += "\n!rm -r Qwen"  # from here on these models are on the Hub only
    executed = execute([*others, share], stand_ins)
    assert all(cell.execution_count for notebook in executed for cell in code_cells(notebook))
    shared = hub.repositories["me/gsm8k-reward"]
    assert shared.private
    shown = "".join(text for cell in code_cells(executed[-1]) for text in texts(cell))
    first, second = (
        re.search(rf"^([0-9a-f]{{12}}) {title}$", shown, re.M)[1]
        for title in ("A reward for grade-school maths", "Tuned for longer")
    )
    before, now = (hub.files("me/gsm8k-reward", shared.resolve(commit)) for commit in (first, second))
    assert before.keys() == now.keys() >= {"README.md", "adapter_model.safetensors", "prt_config.json"}
    assert before["adapter_model.safetensors"] != now["adapter_model.safetensors"]
    assert b"base_model: Qwen/Qwen2.5-0.5B" in now["README.md"] and b"Tuned in a notebook" in now["README.md"]
    assert "fits: yes" in shown
