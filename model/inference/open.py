"""From inference flags to a running Engine: which checkpoint, on what device, in which number format."""

import sys

from model.build import SHAPE_FLAGS, model_overrides, requested_config
from model.checkpoint import check_tokenizer, checkpoint_path, load_model, read_metadata
from model.device import select_device, select_dtype
from model.errors import UserError
from model.inference.engine import Engine
from model.inference.sampling import SamplingParameters
from model.LMConfig import LMConfig
from model.tokenizer import load_tokenizer


def open_engine(args, stages, **engine_arguments):
    """(Engine, path of its checkpoint) as the inference flags in `args` ask.

    Without --checkpoint the first of `stages`, such as "multi_chat/full_sft", that has a file for the flags' shape.
    Raises UserError when there is none, when shape or tokenizer do not fit, or for a device that is not there.
    """
    device = select_device(args.device)
    dtype = select_dtype(args.dtype, device)
    path = args.checkpoint or find_checkpoint(args, stages)
    overrides = model_overrides(args)
    if args.preset:
        overrides.update({name: getattr(requested_config(args), name) for name in SHAPE_FLAGS})
    trained = read_metadata(path).get("config", {}).get("max_seq_len", LMConfig().max_seq_len)
    if (args.max_seq_len or 0) > trained and not args.rope_scaling:
        print(
            f"note: trained on {trained} tokens; beyond them answers get worse without --rope_scaling yarn",
            file=sys.stderr,
        )
    if args.rope_scaling:
        if (args.max_seq_len or 0) <= trained:
            raise UserError(f"--rope_scaling needs a --max_seq_len above the trained {trained} tokens", exit_code=2)
        overrides["rope_scaling"] = {"rope_type": args.rope_scaling, "factor": args.max_seq_len / trained}
    model, metadata = load_model(path, **overrides)
    tokenizer = load_tokenizer(args.tokenizer_path)
    check_tokenizer(tokenizer, path, model, metadata)
    return Engine(model.to(device, dtype), tokenizer, compile=args.compile, **engine_arguments), path


def find_checkpoint(args, stages):
    """The checkpoint of the first of `stages` that has the flags' shape; UserError names what there is."""
    config = requested_config(args)
    paths = [checkpoint_path(args.out_dir, stage, config) for stage in stages]
    for path in paths:
        if path.is_file():
            return path
    found = {str(other) for path in paths for other in path.parent.glob("*.pth") if other.suffixes == [".pth"]}
    hint = (
        f"there is {', '.join(sorted(found))}: name one with --checkpoint"
        if found
        else "train one first, or use --checkpoint"
    )
    raise UserError(f"{' or '.join(map(str, paths))}: no such checkpoint; {hint}")


def sampling_parameters(args):
    """The sampling flags in `args` as SamplingParameters."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens", "seed")
    return SamplingParameters(**{name: getattr(args, name) for name in names})
