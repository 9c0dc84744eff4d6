"""The classifiers of the CLIP recipe (pip install open_clip_torch).

python clip.py build                               cars/laion400m and cars/laion2b, zero-shot
python clip.py finetune cars/laion2b cars/tuned    one of them, fine-tuned: for EFT and the oracle
"""

import sys

import torch
from datasets import load_dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    Trainer,
    TrainingArguments,
)

from prt_hf import TEMPLATES, PixelCollator, zero_shot_classifier

DATA = "tanganke/stanford_cars"  # columns image and label, splits train and test
SOURCE = ("ViT-B-16", "laion400m_e32")  # in OpenCLIP's format only
TARGET = "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"  # the same architecture, in transformers' format
# OpenCLIP's names -> transformers'
NAMES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
}
IN_LAYER = {"ln_": "layer_norm", ".attn.": ".self_attn.", ".c_fc.": ".fc1.", ".c_proj.": ".fc2."}


def build() -> None:
    """Write the two zero-shot classifiers of the paper's update, LAION-400M to LAION-2B."""
    import open_clip

    class_names = load_dataset(DATA, split="train").features["label"].names
    target = CLIPModel.from_pretrained(TARGET)
    source = from_open_clip(open_clip.create_model(*SOURCE).state_dict(), target.config)
    tokenizer, processor = AutoTokenizer.from_pretrained(TARGET), AutoImageProcessor.from_pretrained(TARGET)
    for folder, model in (("cars/laion400m", source), ("cars/laion2b", target)):
        zero_shot_classifier(model, class_names, TEMPLATES["cars"], tokenizer).save_pretrained(folder)
        processor.save_pretrained(folder)


def from_open_clip(weights: dict[str, torch.Tensor], config: CLIPConfig) -> CLIPModel:
    """An OpenCLIP model with ViT and ordinary GELU as transformers' CLIP; every weight is used, or `load_state_dict`
    raises."""
    converted = {}
    for name, value in weights.items():
        start = next((start for start in NAMES if name == start or name.startswith(f"{start}.")), None)
        new = name if start is None else NAMES[start] + name.removeprefix(start)
        for old, ours in IN_LAYER.items() if ".layers." in new else ():
            new = new.replace(old, ours)
        if "in_proj_" in new:  # three layers in one
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                converted[new.replace("in_proj_", f"{part}_proj.")] = rows
        else:  # OpenCLIP multiplies with its projections from the right
            converted[new] = value.T if new.endswith("_projection.weight") else value
    model = CLIPModel(config)
    model.load_state_dict({name: value.contiguous() for name, value in converted.items()})
    return model.eval()


def finetune(folder: str, output: str) -> None:
    """As cars_reward.yaml tunes the reward. The head of class names is no parameter, and stays as it is."""
    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    args = TrainingArguments(
        output_dir=output,
        learning_rate=1e-5,
        lr_scheduler_type="cosine",
        warmup_steps=500,
        max_steps=2000,
        per_device_train_batch_size=128,
        bf16=torch.cuda.is_available(),
        save_strategy="no",
        remove_unused_columns=False,
        seed=0,
    )
    rows = load_dataset(DATA, split="train")
    trainer = Trainer(model, args, train_dataset=rows, data_collator=PixelCollator(processor))
    trainer.train()
    trainer.save_model(output)
    processor.save_pretrained(output)


if __name__ == "__main__":
    {"build": build, "finetune": finetune}[sys.argv[1]](*sys.argv[2:])
