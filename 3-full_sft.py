"""Stage 3, supervised fine-tuning: a pretrained model learns to answer, first one question, then within a conversation.

Only the assistant's turns are learned (content and the </s> that ends it); everything else is what they follow from.

reads   single:  dataset/sft_data_single.csv and out/pretrain_<dim>[_moe].pth
        --multi: dataset/sft_data.csv and out/single_chat/full_sft_<dim>[_moe].pth   (columns history, q, a)
writes  out/single_chat/full_sft_<dim>[_moe].pth or out/multi_chat/..., the same .json and .resume.pth, out/logs/*.jsonl

    python 3-full_sft.py
    python 3-full_sft.py --multi                      # then talk to it: python 2-eval.py
    python 3-full_sft.py --multi --resume             # go on after Ctrl-C, kill -9 or a power cut

The loss, over the answers alone, starts near the pretraining loss and soon falls below it: answers are easier.
"""

import argparse

from model.cli import add_model_flags, add_training_flags
from model.errors import run_main


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--multi", action="store_true", help="second round, on conversations of several turns")
    parser.add_argument("--last_turn_only", action="store_true", help="learn only the last answer of a row, as v1 did")
    add_model_flags(parser)
    add_training_flags(
        parser,
        data_path="dataset/sft_data_single.csv, with --multi dataset/sft_data.csv",
        learning_rate=1e-4,
        epochs=3,
        wandb_project="MiniMind-Full-SFT",
    )
    parser.set_defaults(data_path=None)
    args = parser.parse_args()
    args.data_path = args.data_path or ("dataset/sft_data.csv" if args.multi else "dataset/sft_data_single.csv")
    return args


def main():
    args = parse_arguments()

    # Imported after the arguments are read, so that --help answers at once.
    from model.build import build_model, default_parent
    from model.data.dataset import describe_sample, open_sft_data
    from model.tokenizer import load_tokenizer
    from model.training import ranks
    from model.training.loop import Trainer, build_optimizers, describe_model, language_model_loss, start

    # Device, ranks, seed; then the tokenizer and the weights of the stage before, whose shape wins over the preset.
    device, dtype = start(args)
    tokenizer = load_tokenizer(args.tokenizer_path)
    parent_stage, script = ("single_chat/full_sft", "3-full_sft.py") if args.multi else ("pretrain", "1-pretrain.py")
    model, parent = build_model(args, tokenizer, args.init_from or default_parent(args, parent_stage, script))
    model.to(device)
    ranks.print_once(describe_model(model, device, dtype))
    ranks.print_once(f"weights from {parent['file']}")

    # Conversations, batched by length; labels mark the assistant's turns.
    train, validation = open_sft_data(
        args.data_path,
        tokenizer,
        model.config.max_seq_len,
        seed=args.seed,
        last_turn_only=args.last_turn_only,
        cache_dir=args.cache_dir,
    )
    ranks.print_once(f"{args.data_path}: " + "\n".join(train.report.summary()))
    ranks.print_once(f"sample, learned parts in brackets: {describe_sample(tokenizer, train[0], max_tokens=120)}")

    # Every parameter learns, by the next-token loss of the labelled tokens.
    trainer = Trainer(
        model,
        build_optimizers(model, args),
        train,
        validation,
        args,
        stage="multi_chat/full_sft" if args.multi else "single_chat/full_sft",
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        parent=parent,
        identity={"--last_turn_only": args.last_turn_only},
        loss_function=language_model_loss,
    )
    ranks.print_once(trainer.describe())
    if args.resume:
        trainer.resume()
    if trainer.train():
        following = "" if args.multi else f"\nnext round:  python 3-full_sft.py --multi --init_from {trainer.path}"
        talk = f"python 2-eval.py --checkpoint {trainer.path}"
        ranks.print_once(f"{trainer.path} is written; talk to it:  {talk}{following}")
    trainer.close()


if __name__ == "__main__":
    run_main(main)
