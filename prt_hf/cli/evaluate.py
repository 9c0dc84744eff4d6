"""`prt-hf evaluate`."""

import argparse
import json
from pathlib import Path

from ..errors import PRTValueError
from . import fleet, quantization
from .across import measured
from .arguments import (
    add_across,
    add_command,
    add_evaluation_data,
    add_json,
    add_loading_options,
    add_option,
    chosen_device,
    evaluation_rows,
    load_kwargs,
    positive,
    training_rows,
    with_default,
)

DESCRIPTION = """\
Measure a reward on its source and on other backbones, beside the alternatives: each backbone alone (pretrained), the
backbone with the reward (prt), the reward alone (reward_only, the control), the fine-tuned source carried over (eft,
needs --eft) or, where all shapes match, laid on the backbone's weights (transplanted, needs --eft), and the fine-tuned
backbone (finetuned, the upper bound, lora, baked; each needs the option of its name), with examples in its context
(few_shot), or with LoRAs that are tuned here, for as many steps as the reward (lora_steps) and with as much compute
(lora_compute; see the option tune_rivals). Prints accuracy and negative log-likelihood with 95 % intervals, how far the
backbones are apart (eps and C of Prop. 3.2), time and memory, and whether the reward is worth porting. With --tasks,
lm-evaluation-harness runs its tasks on each backbone, alone, with the reward, as EFT, and on the fine-tuned backbones.
With several rewards, tells first what fits, from configurations alone, then what each gains on each backbone.
With --across_vocabularies backbones may have another vocabulary, and are compared in nats per byte of text."""
EXAMPLES = """examples:
  prt-hf evaluate me/gsm8k-reward --targets Qwen/Qwen2.5-1.5B Qwen/Qwen2.5-7B --data questions.jsonl --dtype bfloat16
  prt-hf evaluate cars-reward --targets facebook/convnextv2-large-22k-224 --data cars/ --output_dir cars-report
  prt-hf evaluate me/gsm8k-reward --targets Qwen/Qwen2.5-7B --tasks gsm8k ifeval --samples 200 --output_dir report
  prt-hf evaluate bullets --targets new-model --data test.jsonl --eft old-tuned --finetuned new-tuned --write_card
  prt-hf evaluate bullets --targets new-model --data test.jsonl --train_data train.jsonl --few_shot 2 --tune_rivals 300
  prt-hf evaluate me/gsm8k-reward me/style-lora --targets Qwen/Qwen3-4B --data test.jsonl --output_dir new --compare old
  prt-hf evaluate rewards.yaml --targets Qwen/Qwen2.5-7B Qwen/Qwen3-4B --output_dir fleet

A YAML file lists rewards, each with data of its own: `- {reward: me/gsm8k-reward, data: gsm8k.jsonl, split: test}`.
--output_dir receives report.json, report.md and report.png (the paper's bar chart). It is updated after each backbone:
after an interruption the same command continues, and with more --targets it measures only the new ones. Of several
rewards, each has a folder there, beside fleet.md (the table), fleet.json and fleet.png (a heat map)."""

_TUNED = ("finetuned", "lora", "baked")


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands, "evaluate", "measure a reward on several backbones, beside EFT and fine-tuning", DESCRIPTION, EXAMPLES
    )
    parser.add_argument(
        "rewards",
        nargs="+",
        metavar="reward",
        help="Hub ids or folders of rewards or of ordinary LoRA adapters; or one YAML file that lists them",
    )
    add_option(parser, "targets", nargs="+", required=True, help="Hub ids or folders of backbones")
    add_across(parser)
    add_evaluation_data(parser, samples=500)
    add_option(
        parser,
        "methods",
        nargs="+",
        help="some of pretrained eft prt reward_only finetuned transplanted few_shot lora lora_steps lora_compute "
        "baked; default: all",
    )
    add_option(parser, "eft", help="the fine-tuned source: Hub id or folder of a model, or of its LoRA adapter")
    add_option(
        parser, "finetuned", nargs="+", help="the fine-tuned targets, as many as --targets and in the same order"
    )
    add_option(parser, "lora", nargs="+", help="the targets tuned with LoRA on the reward's data, like --finetuned")
    add_option(parser, "baked", nargs="+", help="the targets' LoRAs that `prt-hf bake` made, like --finetuned")
    count = {"type": positive(int), "metavar": "N"}
    add_option(parser, "few_shot", **count, help="examples of --train_data in the targets' context")
    add_option(parser, "tune_rivals", **count, help="tune LoRAs on the targets here; N: the steps of the reward")
    add_option(parser, "learning_rate", type=positive(float), default=2e-4, help=with_default("that of these LoRAs"))
    text = "the reward's data (split train) for few_shot and tune_rivals; default: the split train of --data"
    add_option(parser, "train_data", metavar="DATA", help=text)
    add_option(
        parser, "tasks", nargs="+", help="tasks of lm-evaluation-harness (pip install lm_eval), limited by --samples"
    )
    add_option(parser, "include_path", help="folder with your own tasks (YAML) for --tasks")
    add_option(
        parser,
        "compare",
        metavar="REPORT",
        help="folder of an earlier report; the exit status is 1 if anything is worse now",
    )
    add_option(parser, "output_dir", help="folder for the report; default: no files")
    add_option(parser, "write_card", action="store_true", help="write the figures into the card in the reward's folder")
    add_json(parser)
    add_loading_options(parser, batch_size=8)
    quantization.add_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure a reward and print the reports; return the exit status."""
    if fleet.is_fleet(args):
        return fleet.run(args)
    (args.reward,) = args.rewards
    for name in _TUNED:
        if (given := getattr(args, name)) and len(given) != len(args.targets):
            raise PRTValueError(
                "The fine-tuned models do not pair with the targets.",
                expected=f"{len(args.targets)}, as many as --targets, in the same order",
                found=f"{len(given)} of --{name}",
            )
    from ..contract import PRT_CONFIG_NAME

    if args.write_card and not Path(args.reward, PRT_CONFIG_NAME).is_file():
        raise PRTValueError(
            "The card can only be written into a folder.",
            expected="the reward's folder",
            found=args.reward,
            remedy="evaluate the folder that `prt-hf train` wrote, and push it with `prt-hf push`",
        )
    if args.compare:
        fleet.check_comparable(args)
    if args.across_vocabularies:
        return _across(args)
    if not (args.data or args.tasks):
        raise PRTValueError("There is nothing to evaluate on.", expected="--data, or --tasks, or both", found="neither")
    from ..hub.folder import check_writable
    from ..inference.loading import load_reward

    if args.output_dir:
        check_writable(args.output_dir)  # before anything is measured

    quantized = quantization.quantization_kwargs(args)
    reward, _ = load_reward(args.reward, [], load_kwargs(args))
    device = chosen_device(args)
    if device is not None:
        reward.to(device)
    reports = []
    if args.data:
        reports.append(_measure(args, reward, quantized))
    if args.tasks:
        reports.append(_ask(args, reward, quantized))
    if args.write_card:
        from ..evaluation.results import write_measurements

        measurements = [row for report in reports for row in report.measurements()]
        write_measurements(args.reward, measurements, name=args.reward)
    if args.json:
        found = reports[0].to_dict() if args.data else {}
        print(json.dumps(found | ({"tasks": reports[-1].to_dict()} if args.tasks else {})))
    else:
        print("\n".join(report.table() for report in reports), end="")
    return fleet.compare_report(args, reports[0]) if args.compare else 0


def _across(args: argparse.Namespace) -> int:
    """Measure a reward on backbones with other vocabularies, in nats per byte."""
    others = ("methods", "eft", *_TUNED, "few_shot", "tune_rivals", "tasks", "compare", "write_card")
    if given := [f"--{name}" for name in others if getattr(args, name)]:
        raise PRTValueError(
            "Across vocabularies a reward is compared with the bare backbone alone.",
            expected="--across_vocabularies with --data",
            found=", ".join(given),
        )
    if not args.data:
        raise PRTValueError("There is nothing to evaluate on.", expected="--data", found="none")
    from ..hub.folder import check_writable, replace_file

    if args.output_dir:
        check_writable(args.output_dir)
    quantized = quantization.quantization_kwargs(args)
    found = {target: measured(args, args.reward, target, quantized) for target in args.targets}
    text = "\n\n".join("\n".join([f"{args.reward} on {target}", *each.lines()]) for target, each in found.items())
    figures = json.dumps({target: each.to_dict() for target, each in found.items()})
    if args.output_dir:
        replace_file(Path(args.output_dir, "across_vocabularies.json"), figures)
        replace_file(Path(args.output_dir, "across_vocabularies.txt"), text + "\n")
    print(figures if args.json else text)
    return 0


def _measure(args: argparse.Namespace, reward, quantized: dict):
    from tqdm.auto import tqdm

    from ..evaluation import portability_report
    from ..evaluation.tuned_rivals import Tuning

    rivals = {}
    if args.few_shot or args.tune_rivals:
        rows = training_rows(args)
        if args.few_shot:
            rivals["few_shot"] = rows.select(range(min(args.few_shot, len(rows))))
        if args.tune_rivals:
            rivals["tuning"] = Tuning(rows, args.tune_rivals, args.learning_rate, args.batch_size, args.max_length)
    report = portability_report(
        reward,
        args.targets,
        evaluation_rows(args),
        **rivals,
        **({"methods": args.methods} if args.methods else {}),
        eft=args.eft,
        **{name: dict(zip(args.targets, getattr(args, name) or (), strict=False)) for name in _TUNED},
        batch_size=args.batch_size,
        length=args.max_length,
        reward_name=args.reward,
        dataset_name=args.data,
        output_dir=args.output_dir,
        progress=lambda batches, text: tqdm(batches, text, unit="batch"),
        revision=args.revision,
        **quantized,
        **load_kwargs(args),
    )
    if args.output_dir:
        report.save(args.output_dir)
    return report


def _ask(args: argparse.Namespace, reward, quantized: dict):
    from ..evaluation.harness import task_report

    report = task_report(
        reward,
        args.targets,
        args.tasks,
        reward_name=args.reward,
        eft=args.eft,
        given={name: dict(zip(args.targets, getattr(args, name) or (), strict=False)) for name in _TUNED},
        limit=args.samples,
        batch_size=args.batch_size,
        include_path=args.include_path,
        output_dir=args.output_dir,
        **load_kwargs(args) | ({"revision": args.revision} if args.revision else {}) | quantized,
    )
    if args.output_dir:
        report.save(args.output_dir)
    return report
