"""Render the example cards beside this file: python model_cards/render.py

The figures are those of notebooks/lora_rewards.json (seed 0) and of the README's demo. `me/...` stands for repositories
of one's own.
"""

import json
from pathlib import Path

from prt_hf import LabelContract, RewardConfig, VocabularyContract
from prt_hf.contract import ModelReference
from prt_hf.demo.images import DIGITS, ImageSettings
from prt_hf.hub.card import Measurement, render_card, render_recipe_card
from prt_hf.hub.training_record import TrainingRecord

ROOT = Path(__file__).parents[1]
BULLET_STORIES, TARGET = "me/bullet-stories", "me/stories260K"


def language_reward() -> str:
    """Stories retold as bullet lists: a LoRA reward on a Llama of 0.1 M parameters, measured with one of 0.26 M."""
    study = json.loads((ROOT / "notebooks" / "lora_rewards.json").read_text(encoding="utf-8"))
    pair = study["pairs"]["stories"]
    runs = {run["label"]: run["figures"] for run in pair["runs"] if run["seed"] == 0}
    prt, eft = (runs[f"{method}, LoRA head, alpha 64"] for method in ("PRT", "EFT"))
    finetuned = {"source": eft["source"], "target": runs["fine-tuned target"]["target"]}  # EFT at the source is that
    base = ModelReference("me/stories-old", architecture="LlamaForCausalLM")
    vocabulary = VocabularyContract(
        512,
        "0148b30394467e363d282bfa5583c2cb8d719fe9db00972c7ee44b07d2ffbd96",
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"},
    )
    hyperparameters = {
        "optimizer": "AdamW without weight decay, gradients clipped at 1",
        "learning_rate": pair["learning_rate"],
        "lr_scheduler_type": "cosine, 5 % warm-up",
        "train_batch_size": pair["batch_size"],
        "training_steps": pair["steps"],
        "seed": 0,
        "peft_type": "LORA",
        "lora_alpha": 64,
    }
    return render_card(
        RewardConfig("text-generation", vocabulary, base, base),
        "me/bullet-stories-reward",
        TrainingRecord((BULLET_STORIES,), hyperparameters, {"eval_loss": prt["source"]}, versions=study["versions"]),
        [
            Measurement(
                backbone,
                BULLET_STORIES,
                "negative log-likelihood per token",
                {
                    "pretrained": pair["pretrained"][place],
                    "eft": eft[place],
                    "prt": prt[place],
                    "reward_only": prt["reward only"],
                    "finetuned": finetuned[place],
                },
                is_lower_better=True,
                split="test",
            )
            for place, backbone in (("source", base.id), ("target", TARGET))
        ],
    )


def image_reward() -> str:
    """The demo's: a whole classifier of handwritten digits, tuned on digits that are rotated and noisy."""
    settings = ImageSettings()
    data = f"scikit-learn's digits, turned by {settings.degrees:g} degrees, with noise of {settings.noise:g}"
    base = ModelReference("/demo/images-source", architecture="ViTForImageClassification")
    # Means of `prt-hf demo --task images`, three tunings: source, target.
    figures = {
        "pretrained": (49.7, 74.0),
        "eft": (79.6, 77.1),
        "prt": (69.3, 85.0),
        "reward_only": (56.4, 56.4),
        "finetuned": (79.6, 95.2),
    }
    hyperparameters = {
        "learning_rate": settings.tuning.learning_rate,
        "train_batch_size": settings.tuning.batch_size,
        "lr_scheduler_type": "cosine",
        "training_steps": settings.tuning.steps,
        "seed": 0,
    }
    return render_card(
        RewardConfig("image-classification", LabelContract(DIGITS), base, base, is_adapter=False),
        "images-reward",
        TrainingRecord((data,), hyperparameters, versions={"torch": "2.13", "transformers": "5.24"}),
        [
            Measurement(
                f"/demo/images-{place}", data, "accuracy (%)", {name: each[index] for name, each in figures.items()}
            )
            for index, place in enumerate(("source", "target"))
        ],
    )


def recipe() -> str:
    """The language reward with its target, as one model."""
    backbone = ModelReference(TARGET, architecture="LlamaForCausalLM")
    return render_recipe_card(
        "me/bullet-stories-260K", "text-generation", backbone, [("me/bullet-stories-reward", 1.0)]
    )


EXAMPLES = {"language_reward.md": language_reward, "image_reward.md": image_reward, "recipe.md": recipe}

if __name__ == "__main__":
    for name, render in EXAMPLES.items():
        Path(__file__).with_name(name).write_text(render(), encoding="utf-8", newline="\n")
