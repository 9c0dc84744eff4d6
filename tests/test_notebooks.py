"""The notebooks run from top to bottom: offline as they stand, and with the Hub, for which small models stand in."""

import os
import re
import shutil
import sys
from pathlib import Path

import datasets
import nbformat
import numpy as np
import pytest
import tiny
from nbclient import NotebookClient
from PIL import Image
from transformers import ViTImageProcessor

from prt_hf.demo.text import collator_of
from prt_hf.demo.training import Steps, fit

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ["1_tune_a_reward", "2_new_backbone", "3_images", "4_share_on_the_hub"]
LONG = ("2_new_backbone", "4_share_on_the_hub")  # minutes; with models of a loopback Hub they run in seconds


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute(notebook, folder):
    """In a new process of this Python, with its commands; errors of the notebook are this test's."""
    binaries = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": binaries, "OMP_NUM_THREADS": "1"}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    return notebook


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


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in NAMES]
)
def test_offline_it_runs_and_shows_what_is_stored(name, tmp_path):
    stored = read(name)
    executed = execute(read(name), tmp_path)
    for before, now in zip(code_cells(stored), code_cells(executed), strict=True):
        assert (kinds(before), tables(before)) == (kinds(now), tables(now)), now.source
    made = [entry.name for entry in tmp_path.iterdir()]
    assert made == ["runs"], "all that a notebook writes is in one folder"


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
    assert f"/prt-hf/prt_hf/blob/main/notebooks/{name}.ipynb)" in notebook.cells[0].source
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run from top to bottom"
    assert "\nON_HUB = False" in cells[0].source
    for cell in cells:
        assert all(output.get("name") != "stderr" for output in cell.outputs), cell.source
        for text in texts(cell):
            assert not re.search(r"(?<!\w)/(tmp|root|home|usr|var|Users)/|Traceback|it/s\b", text), text


@pytest.fixture
def stand_ins(tmp_path, monkeypatch):
    """Small models and data under the names of the Hub, in the folder where the notebook runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    generator = np.random.default_rng(0)
    rows = [
        {"question": " ".join(f"w{index}" for index in range(start, start + 8)), "answer": "w20 w21 w22"}
        for start in generator.integers(3, 30, 60).tolist()
    ]
    _save_data("openai/gsm8k", "main", rows, "test")
    tokenizer = tiny.tokenizer()
    known = [{"input_ids": tokenizer(f"{row['question']} {row['answer']}")["input_ids"]} for row in rows]
    new = fit(tiny.llama(2, hidden_size=64), known, Steps(30, 3e-3, 8), 0, "", collator_of(tokenizer))
    for size, model in (("0.5B", tiny.llama(1)), ("1.5B", new)):
        model.save_pretrained(f"Qwen/Qwen2.5-{size}")
        tokenizer.save_pretrained(f"Qwen/Qwen2.5-{size}")
    tiny.tokenizer(changed={"w5": "five"}).save_pretrained("openai-community/gpt2")

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
        for label in generator.integers(0, 10, 64).tolist()
    ]
    _save_data("frgfm/imagenette", "160px", photos, "validation")
    return tmp_path


def _save_data(name, config, rows, other_split):
    folder = Path(name)
    folder.mkdir(parents=True)
    for split in ("train", other_split):
        datasets.Dataset.from_list(rows).to_parquet(folder / f"{split}.parquet")
    files = "".join(f"  - split: {split}\n    path: {split}.parquet\n" for split in ("train", other_split))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n")


def on_hub(name):
    """The notebook with its switch turned, and steps for small models: fewer and larger."""
    notebook = read(name)
    for cell in code_cells(notebook):
        cell.source = re.sub(r"^ON_HUB = False", "ON_HUB = True", cell.source, flags=re.M)
        cell.source = (
            re.sub(r"(Steps\(|\"max_steps\": )\d{3}, ", r"\g<1>30, ", cell.source)
            .replace("2e-4", "1e-2")
            .replace("2e-5", "3e-3")
        )
    return notebook


@pytest.mark.parametrize("name", NAMES[:3])
def test_with_models_of_the_hub_it_runs(name, stand_ins):
    executed = execute(on_hub(name), stand_ins)
    assert all(cell.execution_count for cell in code_cells(executed))


def test_shared_on_a_hub_it_is_pushed_pulled_and_checked(stand_ins, hub):
    for name in ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B"):
        hub.put(name, stand_ins / name)
    shutil.rmtree(stand_ins / "Qwen")
    executed = execute(on_hub("4_share_on_the_hub"), stand_ins)
    assert all(cell.execution_count for cell in code_cells(executed))
    shared = hub.repositories["me/gsm8k-reward"]
    assert shared.private
    shown = "".join(text for cell in code_cells(executed) for text in texts(cell))
    first, second = (
        re.search(rf"^([0-9a-f]{{12}}) {title}$", shown, re.M)[1]
        for title in ("A reward for grade-school maths", "Tuned for longer")
    )
    before, now = (hub.files("me/gsm8k-reward", shared.resolve(commit)) for commit in (first, second))
    assert before.keys() == now.keys() >= {"README.md", "adapter_model.safetensors", "prt_config.json"}
    assert before["adapter_model.safetensors"] != now["adapter_model.safetensors"]
    assert b"base_model: Qwen/Qwen2.5-0.5B" in now["README.md"] and b"Tuned in a notebook" in now["README.md"]
    assert "fits: yes" in shown
