"""What the command lines share: flags and their types. Imports nothing heavy."""

import argparse
import os
import shlex
import sys

from model.tokenizer import DEFAULT_TOKENIZER_PATH


def positive_int(text):
    """argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def non_negative_int(text):
    """argparse type: a whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def non_negative_float(text):
    """argparse type: a finite number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number of at least 0, got {text}")
    return value


def add_model_flags(parser):
    """The flags that choose the shape of a fresh model. Those left out are None: the preset's value holds."""
    group = parser.add_argument_group("model", "a preset, then single fields of it replaced")
    group.add_argument("--preset", help="named shape (default: minimind-v1-small); a wrong name lists them all")
    group.add_argument("--dim", type=positive_int, help="model width")
    group.add_argument("--n_layers", type=positive_int, help="number of layers")
    group.add_argument("--n_heads", type=positive_int, help="number of attention heads, a divisor of --dim")
    group.add_argument("--n_kv_heads", type=positive_int, help="number of key/value heads, a divisor of --n_heads")
    group.add_argument("--max_seq_len", type=positive_int, help="tokens per training row (default: the preset's)")
    group.add_argument("--use_moe", action="store_true", default=None, help="mixture of experts instead of dense")
    group.add_argument("--dropout", type=non_negative_float, help="dropout probability (default: 0)")


def add_training_flags(parser, *, data_path, learning_rate, epochs, wandb_project):
    """The flags of every training stage, with this stage's defaults."""
    data = parser.add_argument_group("data and checkpoints")
    data.add_argument("--data_path", default=data_path, help="training rows, .csv or .jsonl (default: %(default)s)")
    data.add_argument(
        "--tokenizer_path", default=DEFAULT_TOKENIZER_PATH, help="tokenizer folder (default: model/minimind_tokenizer)"
    )
    data.add_argument("--cache_dir", help="where tokenised rows are kept (default: .cache beside the data file)")
    data.add_argument("--out_dir", default="out", help="where checkpoints and logs go (default: %(default)s)")
    data.add_argument("--init_from", metavar="PTH", help="start from this checkpoint; its shape wins over the preset")
    data.add_argument("--resume", action="store_true", help="go on exactly where the last saved step ended")

    steps = parser.add_argument_group("optimisation")
    steps.add_argument("--epochs", type=positive_int, help=f"passes over the data (default: {epochs})")
    steps.add_argument(
        "--max_steps",
        type=positive_int,
        help="optimizer steps, where the schedule ends too; with --epochs whichever ends first, "
        "without it as many epochs as that takes",
    )
    parser.set_defaults(default_epochs=epochs)
    steps.add_argument(
        "--stop_after",
        metavar="STEPS",
        type=positive_int,
        help="save and leave after this optimizer step of the run, as Ctrl-C does; the schedule does not change, so "
        "going on with --resume gives the weights of a run without a stop",
    )
    steps.add_argument(
        "--batch_size", type=positive_int, help="rows per forward pass (default: 64 on a GPU, 8 elsewhere)"
    )
    steps.add_argument(
        "--accumulation_steps",
        type=positive_int,
        help="forward passes per optimizer step (default: 1, or what makes 64 rows when --batch_size is left out)",
    )
    steps.add_argument(
        "--learning_rate", type=non_negative_float, default=learning_rate, help="peak (default: %(default)s)"
    )
    steps.add_argument(
        "--warmup_iters",
        type=non_negative_int,
        help="optimizer steps of linear warm-up before the cosine (default: 5 %% of the run, at most 100)",
    )
    steps.add_argument(
        "--weight_decay", type=non_negative_float, default=0.1, help="on matrices only (default: %(default)s)"
    )
    steps.add_argument(
        "--grad_clip", type=non_negative_float, default=1.0, help="largest gradient norm, 0: any (default: %(default)s)"
    )
    steps.add_argument(
        "--optimizer",
        choices=("adamw", "muon"),
        default="adamw",
        help="muon: Muon on the hidden matrices, AdamW on the rest (default: %(default)s)",
    )
    steps.add_argument(
        "--muon_learning_rate", type=non_negative_float, help="peak for Muon's matrices (default: 10 x --learning_rate)"
    )
    steps.add_argument(
        "--seed", type=non_negative_int, default=1337, help="weights, order, split (default: %(default)s)"
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    machine.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="of matrix products, weights stay float32 (default: bfloat16 where the hardware has it, else float32)",
    )
    machine.add_argument("--compile", action="store_true", help="torch.compile the model: slow start, faster steps")
    machine.add_argument(
        "--num_workers", type=non_negative_int, default=0, help="processes that prepare batches (default: %(default)s)"
    )

    reports = parser.add_argument_group("reports, counted in optimizer steps")
    reports.add_argument("--log_interval", type=positive_int, default=10, help="default: %(default)s")
    reports.add_argument("--eval_interval", type=positive_int, default=500, help="validation (default: %(default)s)")
    reports.add_argument(
        "--eval_tokens",
        type=non_negative_int,
        default=100_000,
        help="held-out tokens per validation, 0: all (default: %(default)s)",
    )
    reports.add_argument("--save_interval", type=positive_int, default=500, help="checkpoint (default: %(default)s)")
    reports.add_argument("--use_wandb", action="store_true", help="log to Weights & Biases, offline without a key")
    reports.add_argument("--wandb_project", default=wandb_project, help="default: %(default)s")
    reports.add_argument("--wandb_run_name", help="default: stage and dim")


def add_inference_flags(parser):
    """The flags of every script that runs a trained model: which one, how it picks tokens, on what machine."""
    group = parser.add_argument_group("checkpoint", "a file, or what finds the one a training stage wrote")
    group.add_argument("--checkpoint", metavar="PTH", help="the .pth to run (default: the latest stage in --out_dir)")
    group.add_argument("--out_dir", default="out", help="where to look for checkpoints (default: %(default)s)")
    group.add_argument("--tokenizer_path", help="tokenizer folder (default: model/minimind_tokenizer)")
    group.add_argument("--preset", help="named shape (default: minimind-v1-small); a wrong name lists them all")
    group.add_argument("--dim", type=positive_int, help="model width")
    group.add_argument("--n_layers", type=positive_int, help="number of layers")
    group.add_argument("--n_heads", type=positive_int, help="attention heads, for a .pth without its .json")
    group.add_argument("--n_kv_heads", type=positive_int, help="key/value heads, for a .pth without its .json")
    group.add_argument("--use_moe", action="store_true", default=None, help="mixture of experts instead of dense")
    group.add_argument(
        "--max_seq_len", type=positive_int, help="context: prompt and answer (default: the checkpoint's)"
    )
    group.add_argument("--rope_scaling", choices=("linear", "yarn"), help="stretch positions beyond the trained length")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--temperature", type=non_negative_float, default=0.7, help="0: always the most probable (default: %(default)s)"
    )
    sampling.add_argument(
        "--top_k", type=non_negative_int, default=8, help="of the k most probable tokens, 0: all (default: %(default)s)"
    )
    sampling.add_argument(
        "--top_p", type=float, default=1.0, help="of the most probable with this much in sum (default: %(default)s)"
    )
    sampling.add_argument(
        "--repetition_penalty", type=float, default=1.0, help="above 1: repeat less (default: %(default)s)"
    )
    sampling.add_argument(
        "--max_new_tokens",
        type=positive_int,
        default=256,
        help="longest answer, prompt not counted (default: %(default)s)",
    )
    sampling.add_argument(
        "--seed", type=non_negative_int, default=1337, help="same seed, same answer (default: %(default)s)"
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    machine.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="of weights and cache (default: bfloat16 where the hardware has it, else float32)",
    )
    machine.add_argument(
        "--compile", action="store_true", help="torch.compile the decoding step: slow start, faster tokens"
    )


def command_line(*extra, without=None):
    """This run's command as typed, for "to go on: ..." messages: flags in `extra` appended unless there, the flag
    `without` and its value left out (also under a shortened name, which argparse takes when it is unique)."""
    words, rest = [], iter(sys.argv)
    for word in rest:
        name, equals, _ = word.partition("=")
        if not (without and len(name) > 2 and without.startswith(name)):
            words.append(word)
        elif not equals:
            next(rest, None)
    ranks = os.environ.get("WORLD_SIZE", "1")
    launcher = ["python"] if ranks == "1" else ["torchrun", "--nproc_per_node", ranks]
    return shlex.join([*launcher, *words, *(flag for flag in extra if flag not in words)])
