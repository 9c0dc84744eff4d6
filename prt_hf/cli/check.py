"""`prt-hf check`."""

import argparse
import json

from ..errors import PRTError
from . import quantization
from .across import measured
from .arguments import (
    add_across,
    add_command,
    add_evaluation_data,
    add_json,
    add_loading_options,
    chosen_device,
    config_kwargs,
    evaluation_rows,
    load_kwargs,
)

DESCRIPTION = """\
Check whether a reward fits a backbone. Without --data, only configurations and tokenizers are compared, and no weights
are downloaded. With --data, the models are loaded and measured on its rows: how far source and target backbone are
apart (eps and C of Prop. 3.2), and what the reward gains on each. The exit status is 1 if the two do not fit."""
EXAMPLES = """examples:
  prt-hf check me/gsm8k-reward Qwen/Qwen2.5-7B
  prt-hf check me/gsm8k-reward Qwen/Qwen2.5-7B --data questions.jsonl --samples 200 --dtype bfloat16
  prt-hf check cars-reward facebook/convnextv2-large-22k-224 --data cars/ --json"""
_WAYS = {
    "by itself": ("source", "target"),
    "with the reward": ("prt_source", "prt_target"),
    "reward by itself": ("reward_only", "reward_only"),
}


def add_parser(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the command's parser."""
    parser = add_command(
        commands, "check", "check whether a reward fits a backbone, and what it gains there", DESCRIPTION, EXAMPLES
    )
    parser.add_argument("reward", help="Hub id or folder of a reward, or of an ordinary LoRA adapter")
    parser.add_argument("backbone", help="Hub id or folder of a backbone")
    add_across(parser)
    add_evaluation_data(parser, samples=100)
    add_json(parser)
    add_loading_options(parser, batch_size=8)
    quantization.add_arguments(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print whether a reward fits; return the exit status."""
    import torch

    from ..evaluation import check_fit
    from ..hub.client import is_of_hub

    dtype = getattr(torch, args.dtype) if args.dtype else None
    try:
        quantized = quantization.quantization_kwargs(args)
        fit = check_fit(
            args.reward,
            args.backbone,
            dtype=dtype,
            is_quantized=bool(quantized),
            across_vocabularies=args.across_vocabularies,
            **config_kwargs(args),
        )
        is_measured = fit.fits and args.data
        across = measured(args, args.reward, args.backbone, quantized) if is_measured and fit.is_across else None
        portability, skipped = _measure(args, fit, quantized) if is_measured and not fit.is_across else (None, 0)
    except Exception as error:
        if not args.json or not (isinstance(error, PRTError | OSError) or is_of_hub(error)):
            raise
        print(json.dumps({"error": str(error)}))  # no `fits`: nobody knows
        return 1
    if args.json:
        found = {}
        if portability is not None:
            worth, reasons = portability.verdict()
            found = {"portability": portability.to_dict(), "rows_without_predictions": skipped}
            found |= {"worth_porting": worth, "verdict": reasons}
        found |= {"across_vocabularies": across.to_dict()} if across else {}
        print(json.dumps(fit.to_dict() | found))
    else:
        lines = _describe(portability, skipped) if portability else ["", *across.lines()] if across else []
        print("\n".join(_describe_fit(args, fit) + lines))
    return int(not fit.fits)


def _measure(args, fit, quantized):
    """Return the portability, and the number of rows that had nothing to predict after they were cut off."""
    from ..evaluation import batches, measure_portability
    from ..inference.loading import load_reward
    from ..reward.backbones import Backbone, source_backbones

    device, kwargs = chosen_device(args), load_kwargs(args)
    rows = evaluation_rows(args)
    reward, _ = load_reward(args.reward, [], kwargs)
    if device is not None:
        reward.to(device)
    target_kwargs = kwargs | config_kwargs(args) | quantized
    backbones = [source_backbones(reward, **kwargs)[0], Backbone(reward, args.backbone, **target_kwargs)]
    for backbone in backbones:
        backbone.load()
    length = min([args.max_length, *filter(None, (fit.backbone_context, fit.reward_context))])
    read = batches(rows, reward, args.batch_size, length, backbones)
    found = measure_portability(reward, backbones[1], read, source=backbones[0])
    return found, len(rows) - found.rows


def _describe_fit(args, fit) -> list[str]:
    from ..contract import IMAGE_CLASSIFICATION, TEXT_GENERATION

    reward, source = fit.reward, fit.reward.source_backbone
    kind = "reward adapter" if reward.is_adapter else "full reward"
    if len(reward.terms) > 1:
        kind = "adapter that is carried over"
    lines = {
        "reward": f"{args.reward}: {reward.task}, {kind}, kl_coef {reward.kl_coef:g}, strength {reward.strength:g}",
        "base": f"{_named(reward.reward_base)}, {reward.reward_base.architecture}",
        "source": "the base" if source in (None, reward.reward_base) else _named(source),
        "backbone": f"{_named(fit.backbone)}, {fit.backbone.architecture}",
        reward.contract.kind: _contract(fit),
        "context": f"reward {fit.reward_context or 'unlimited'}, backbone {fit.backbone_context or 'unlimited'} tokens",
        "parameters": _parameters(fit),
        "weights": f"{_size(fit.weight_bytes)}B in memory, {args.dtype or 'each as it is stored'}"
        + ("; less, as the backbone is quantised" if quantization.is_asked(args) else ""),
    }
    if reward.task == IMAGE_CLASSIFICATION:
        del lines["context"]
    if reward.task == TEXT_GENERATION:
        lines["decoding"] = (
            "one pass for both, on the same weights"
            if fit.is_base_shared
            else f"c = {fit.cost_ratio:.3g}, reward / backbone by parameters; at best 1 / (1 + c) = "
            f"{fit.speed_limit:.0%} of the bare backbone's speed if not speculative"
        )
    described = [f"{name:<11}{text}" for name, text in lines.items()]
    return [*described, f"fits: {'yes' if fit.fits else 'no'}", *fit.problems]


def _parameters(fit) -> str:
    held = " (the backbone, held once)" if fit.is_base_shared else ""
    text = f"backbone {_size(fit.backbone_parameters)}, reward's base {_size(fit.base_parameters)}{held}"
    return text + (f", adapter {_size(fit.adapter_parameters)}" if fit.reward.is_adapter else "")


def _contract(fit) -> str:
    from ..vocabulary import IDENTICAL

    if not fit.fits:
        return "do not match, see below"
    contract = fit.reward.contract
    is_updated = fit.match is not None and not fit.match.startswith(IDENTICAL)
    if contract.kind == "labels":
        order = "in another order, matched by name" if fit.is_permuted else "in the same order"
        return f"{contract.size}, {order}" + (f"; vocabulary {fit.match.split(';')[0]}" if is_updated else "")
    if fit.is_across:
        return f"another vocabulary of {fit.backbone_tokens:,} tokens; the reward's has {contract.size:,}"
    heads = {"reward": (contract.size, fit.reward_columns), "backbone": (fit.backbone_tokens, fit.backbone_columns)}
    padded = [
        f"{columns - tokens} rows pad the {owner}'s head"
        for owner, (tokens, columns) in heads.items()
        if columns > tokens
    ]
    differing = [f"{role} {ours!r} -> {theirs!r}" for role, (ours, theirs) in fit.special_tokens.items()]
    known = "the same" if fit.is_tokenizer_known else "taken to be the same: the backbone has no tokenizer"
    return "; ".join([fit.match if is_updated else f"{contract.size} tokens, {known}", *padded, *differing])


def _describe(found, skipped: int) -> list[str]:
    from ..contract import TEXT_GENERATION
    from ..evaluation.results import VERDICTS

    is_text = found.task == TEXT_GENERATION
    worth, reasons = found.verdict()
    unused = f"; {skipped} more had nothing left to predict" if skipped else ""
    lines = [
        "",
        f"on {found.rows} rows"
        + (f", {found.positions} tokens" if is_text else "")
        + f", strength {found.strength:g}{unused}",
        f"eps = {found.eps:.4g}   KL(source || target), nats, mean; no threshold is known (Prop. 3.2, Table 7)",
        f"C   = {found.c_mean:.4g}   max e^r / E e^r under the source, mean; largest {found.c_max:.4g}",
    ]
    if found.nll is not None:
        lines += ["", f"{'':<26}{'source':>9}{'target':>9}"]
        for name, values, scale in (
            ("nats per token" if is_text else "nats", found.nll, 1),
            ("accuracy, %", found.accuracy, 100),
        ):
            digits = 3 if scale == 1 else 1
            lines.append(name)
            for text, ways in _WAYS.items():
                cells = "".join(f"{scale * values[way]:>9.{digits}f}" for way in ways)
                lines.append(f"  {text:<24}{cells}")
    lines += ["", f"worth porting: {VERDICTS[worth]}"]
    lines += [f"  {reason}" for reason in reasons]
    return lines if found.proposal is None else [*lines, str(found.proposal)]


def _named(reference) -> str:
    return str(reference.id) + (f" at {reference.revision[:12]}" if reference.revision else "")


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} G" if count >= 1e9 else f"{count / 1e6:.3g} M"
