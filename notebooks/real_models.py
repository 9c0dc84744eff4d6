"""The real models and data of the studies here, from the folder that `--assets` names."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

MILD, STRONG = 0.05, 0.12  # noise: standard deviation in units of half the range of a pixel, which is 0.5 / 0.226
TEXT_LENGTH = 160  # tokens; the language models have seen 256 at most


def resnets(assets: Path) -> dict[str, PreTrainedModel]:
    """ResNet-20, the source, and ResNet-32, the target: trained on clean CIFAR-10."""
    load = _cifar(assets).load_cifar_resnet
    return {"source": load("resnet20"), "target": load("resnet32")}


def cifar10(assets: Path, split: str, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (images, 3, 32, 32) with Gaussian noise that is the same every time, and labels (images,)."""
    cifar = _cifar(assets)
    data = load_dataset("parquet", data_files=str(assets / "cifar10" / f"{split}.parquet"), split="train")
    images = torch.cat([cifar.preprocess(data[i : i + 500]["image"]) for i in range(0, len(data), 500)])
    seed = {"train": 0, "test": 1}[split]
    drawn = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return images + noise * 0.5 / 0.226 * drawn, torch.tensor(data["label"])


def story_models(assets: Path) -> tuple[dict[str, PreTrainedModel], PreTrainedTokenizerBase]:
    """stories-old, the source, and stories260K, the target; one tokenizer."""
    names = {"source": "stories-old", "target": "stories260K"}
    models = {place: AutoModelForCausalLM.from_pretrained(assets / name) for place, name in names.items()}
    return models, AutoTokenizer.from_pretrained(assets / names["source"])


def text_rows(assets: Path, tokenizer: PreTrainedTokenizerBase, name: str) -> list[list[int]]:
    """Token ids of a file of texts, or of questions and answers."""
    rows = [json.loads(line) for line in (assets / "text" / f"{name}.jsonl").read_text().splitlines()]
    texts = [row["text"] if "text" in row else f"{row['question']}\n{row['answer']}" for row in rows]
    return [[*ids, tokenizer.eos_token_id][:TEXT_LENGTH] for ids in tokenizer(texts)["input_ids"]]


def _cifar(assets: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("cifar_resnet", assets / "cifar_resnet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
