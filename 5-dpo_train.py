"""Stage 5, DPO: a chat model learns from pairs which of two answers to prefer.

The chosen answer is to become more probable than the rejected one, measured against a frozen copy of the model as it was,
which keeps it from going astray. No reward model, no sampling: two forward passes and a classification.

reads   dataset/dpo/train_data.json ({prompt, chosen, rejected}) and out/multi_chat/full_sft_<dim>[_moe].pth, else single_chat
writes  out/dpo_<dim>[_moe].pth, the same .json and .resume.pth, out/logs/*.jsonl

    python 5-dpo_train.py
    python 5-dpo_train.py --beta 0.3 --sft_weight 0.2             # stay nearer to the old answers
    python 5-dpo_train.py --resume                                # go on after Ctrl-C, kill -9 or a power cut

The loss starts at ln 2 = 0.6931 (with --sft_weight, above it). Watch margin and accuracy of the held-out pairs, and KL: when only
KL still grows, stop.
"""

import shlex
from pathlib import Path

from model.cli import add_flags, add_training_flags, from_flags, script_parser, training_settings
from model.errors import run_main
from model.settings import PRETRAINING_ONLY, PreferenceSettings, ShapeSettings
from model.stages import STAGES

STAGE = STAGES["dpo"]


def parse_arguments():
    parser = script_parser(__doc__)
    add_flags(parser, PreferenceSettings, "preferences")
    held_out = "held-out pairs (default: one in twenty of --data_path)"
    parser.add_argument("--validation_path", metavar="JSON", help=held_out)
    defaults = dict(data_path=STAGE.data_path, wandb_project="MiniMind-DPO", eval_interval=20, save_interval=20)
    defaults.update(learning_rate=1e-5, embedding_rate_factor=1.0, weight_decay=0.0)
    whole = ("deepspeed", "zero_stage", "offload", "fsdp")  # the reference must be whole, and so is the policy
    add_training_flags(parser, epochs=1, model=ShapeSettings, leave_out=whole + PRETRAINING_ONLY, **defaults)
    return parser.parse_args()


def main():
    args = parse_arguments()

    # Imported after the arguments are read, so that --help answers at once.
    from model.build import build_model, requested_config
    from model.checkpoint import find_checkpoint
    from model.data.dataset import describe_sample, open_preference_data
    from model.data.token_cache import data_files
    from model.tokenizer import load_tokenizer
    from model.training.loop import start
    from model.training.ranks import on_all, print_once
    from model.training.reports import describe_model

    # Device, ranks, seed; then the tokenizer and the chat model to begin with, whose shape wins over the preset.
    shape, settings = from_flags(ShapeSettings, args), training_settings(args)
    device = start(settings)
    on_all(lambda: data_files(args.data_path, "dpo"))
    if args.validation_path:
        on_all(lambda: data_files(args.validation_path, "dpo", "--validation_path"))
    start_from = args.init_from or find_checkpoint(args.out_dir, STAGE.parents, requested_config(shape), "--init_from")
    tokenizer = load_tokenizer(args.tokenizer_path, start_from)
    model, parent = build_model(shape, tokenizer, start_from)
    print_once(describe_model(model.to(device), settings.dtype))
    print_once(f"weights, and the reference, from {parent['file']}")

    # Pairs of answers to one prompt; labels mark the answers.
    max_seq_len = model.config.max_seq_len
    options = dict(validation_path=args.validation_path, seed=args.seed, cache_dir=args.cache_dir)
    train, validation = on_all(lambda: open_preference_data(args.data_path, tokenizer, max_seq_len, **options))
    print_once(f"{args.data_path}: " + "\n".join(train.report.summary()))
    parts = {"training": train, "held_out": validation}
    longer = {name: pairs.longer_is_chosen for name, pairs in parts.items() if len(pairs)}
    shares = ", ".join(f"{share:.1%} ({name.replace('_', ' ')})" for name, share in longer.items())
    print_once(f"length alone: the chosen answer is the longer one in {shares} of the pairs")
    chosen, rejected = ({name: part[row] for name, part in train[0].items()} for row in (0, 1))
    print_once(f"sample, learned part in brackets, chosen: {describe_sample(tokenizer, chosen, max_tokens=120)}")
    print_once(f"rejected: {describe_sample(tokenizer, rejected, max_tokens=120)}")

    # Every parameter learns, by the preference loss against a frozen copy: trl's, on a stock class of transformers.
    from model.training.dpo import Policy, PreferenceLoss, PreferenceTrainer, StockModel

    preferences, policy = from_flags(PreferenceSettings, args), Policy(model).to(device)
    loss_function = PreferenceLoss(policy, tokenizer, preferences, args.out_dir, args.seed)
    identity = {f"--{name}": getattr(preferences, name) for name in ("beta", "loss_type", "sft_weight")}
    identity["--init_from (its contents)"] = parent["sha256"]
    described = {**vars(preferences), "longer_is_chosen": longer}
    names = dict(stage=STAGE.name, parent=parent, identity=identity, metadata={"dpo": described})
    trainer = PreferenceTrainer(
        policy, tokenizer, train, validation, settings, loss_function=loss_function, strategy=StockModel, **names
    )
    print_once(trainer.describe())
    if args.resume:
        trainer.resume()
    else:
        print_once("loss before the first step: {:.4f}, as it must be ({:.4f})".format(*trainer.loss_at_start()))
    if trainer.train():
        path = shlex.quote(str(trainer.path))
        print_once(f"{trainer.path} is written; talk to it:  python 2-eval.py --checkpoint {path}")
        report = shlex.quote(str(Path(args.out_dir) / "dpo.md"))
        compare = f"--checkpoint {shlex.quote(str(start_from))} --checkpoint {path} --report {report}"
        print_once(f"side by side with what it was:  python 2-eval.py {compare}")
    trainer.close()


if __name__ == "__main__":
    run_main(main)
