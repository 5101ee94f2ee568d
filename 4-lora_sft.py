"""Stage 4, LoRA: a chat model learns a manner or a subject in a small adapter, while its own weights stay as they are.

Beside every chosen matrix stand two narrow ones, a few hundredths of its size, and only these are trained. The file is
small, one base can carry many adapters, and without the adapter the model answers as before.

reads   dataset/sft_data.csv (columns history, q, a) and out/multi_chat/full_sft_<dim>[_moe].pth, else the single-turn one
writes  out/lora_<name>_<dim>[_moe].pth, the adapter alone, the same .json and .resume.pth, out/logs/*.jsonl

    python 4-lora_sft.py --lora_name identity --data_path dataset/lora_identity.csv
    python 2-eval.py --lora out/lora_identity_512.pth             # talk to it
    python 4-lora_sft.py --resume                                 # go on after Ctrl-C, kill -9 or a power cut

The loss starts where the base's stands on these answers; a new subject falls for long, a new name within some 50 steps.
"""

import shlex
from pathlib import Path

from model.cli import add_flags, add_training_flags, from_flags, script_parser, training_settings
from model.errors import run_main
from model.settings import PRETRAINING_ONLY, LoraSettings, ModelSettings
from model.stages import STAGES

STAGE = STAGES["lora"]


def parse_arguments():
    parser = script_parser(__doc__)
    add_flags(parser, LoraSettings, "adapter")
    parser.add_argument("--save_peft", type=Path, metavar="DIR", help="also write it as a folder that peft reads")
    parser.add_argument("--last_turn_only", action="store_true", help="learn only the last answer of a row, as v1 did")
    defaults = dict(data_path=STAGE.data_path, wandb_project="MiniMind-LoRA", eval_interval=100, save_interval=100)
    defaults.update(optimizer="adamw", learning_rate=1e-4, weight_decay=0.0)
    add_training_flags(parser, epochs=3, leave_out=(*PRETRAINING_ONLY, "embedding_rate_factor"), **defaults)
    return parser.parse_args()


def main():
    args = parse_arguments()
    lora = from_flags(LoraSettings, args)

    # Imported after the arguments are read, so that --help answers at once.
    from model.build import build_model, requested_config
    from model.checkpoint import find_checkpoint
    from model.data.dataset import describe_sample, open_sft_data
    from model.data.token_cache import data_files
    from model.files import refuse_existing
    from model.lora import add_adapter, check_peft_folder, describe_adapter, save_peft_folder
    from model.tokenizer import load_tokenizer
    from model.training.loop import Trainer, language_model_loss, start
    from model.training.ranks import on_all, on_main, print_once
    from model.training.reports import describe_model
    from model.training.strategy import LowRankAdapters

    # Device, ranks, seed; then the tokenizer and the base, a chat model whose shape wins over the preset.
    shape, settings = from_flags(ModelSettings, args), training_settings(args)
    device = start(settings)
    on_all(lambda: data_files(args.data_path, "sft"))
    if args.save_peft:
        refuse_existing([args.save_peft], args.overwrite or args.resume or args.dry_run)
        check_peft_folder(args.save_peft)
    base = args.init_from or find_checkpoint(args.out_dir, STAGE.parents, requested_config(shape), "--init_from")
    tokenizer = load_tokenizer(args.tokenizer_path, base)
    model, parent = build_model(shape, tokenizer, base)
    print_once(describe_model(model, settings.dtype))
    print_once(f"base {parent['file']}, which stays as it is")

    # Only the adapter learns: B A x beside W x, B being zero at first.
    matrices = add_adapter(model, lora)
    model.to(device)
    print_once(describe_adapter(model, matrices))

    # The rows of stage 3: conversations, labels mark the assistant's turns.
    options = dict(seed=args.seed, last_turn_only=args.last_turn_only, cache_dir=args.cache_dir)
    max_seq_len = model.config.max_seq_len
    train, validation = on_all(lambda: open_sft_data(args.data_path, tokenizer, max_seq_len, **options))
    print_once(f"{args.data_path}: " + "\n".join(train.report.summary()))
    print_once(f"sample, learned parts in brackets: {describe_sample(tokenizer, train[0], max_tokens=120)}")

    # The loss of stage 3 too. What goes into the file is the adapter, and its .json says on which base it stands.
    flags = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "last_turn_only")
    identity = {f"--{name}": getattr(lora, name, getattr(args, name)) for name in flags}
    identity["--init_from (its contents)"] = parent["sha256"]
    described = dict(rank=lora.lora_rank, alpha=lora.lora_alpha, dropout=lora.lora_dropout, targets=matrices)
    names = dict(stage=f"lora_{lora.lora_name}", parent=parent, identity=identity, metadata={"lora": described})
    trainer = Trainer(
        model, tokenizer, train, validation, settings,
        loss_function=language_model_loss, strategy=LowRankAdapters, **names,
    )  # fmt: skip
    print_once(trainer.describe())
    if args.resume:
        trainer.resume()
    if trainer.train():
        if args.save_peft:
            weights = trainer.strategy.weights()
            on_main(lambda: save_peft_folder(args.save_peft, weights, lora, matrices, base))
            print_once(f"{args.save_peft} is written, for peft")
        path, start_from = shlex.quote(str(trainer.path)), shlex.quote(str(base))
        print_once(
            f"{trainer.path} is written; talk to it:  python 2-eval.py --checkpoint {start_from} --lora {path}\n"
            f"as a whole model:  python export_model.py --checkpoint {start_from} --lora {path} --format pth"
        )
    trainer.close()


if __name__ == "__main__":
    run_main(main)
