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

import shlex

from model.cli import add_training_flags, from_flags, script_parser, training_settings
from model.errors import run_main
from model.settings import PRETRAINING_ONLY, SFT_RATE_TIMES_WIDTH, ModelSettings
from model.stages import STAGES

SINGLE, MULTI = STAGES["single_chat/full_sft"], STAGES["multi_chat/full_sft"]


def parse_arguments():
    parser = script_parser(__doc__)
    parser.add_argument("--multi", action="store_true", help="second round, on conversations of several turns")
    parser.add_argument("--last_turn_only", action="store_true", help="learn only the last answer of a row, as v1 did")
    data_path = f"{SINGLE.data_path}, with --multi {MULTI.data_path}"
    defaults = dict(data_path=data_path, wandb_project="MiniMind-Full-SFT")
    defaults.update(embedding_rate_factor=3.0)
    add_training_flags(parser, epochs=3, leave_out=PRETRAINING_ONLY, **defaults)
    parser.set_defaults(data_path=None, rate_times_width=SFT_RATE_TIMES_WIDTH)
    return parser.parse_args()


def main():
    args = parse_arguments()

    # Imported after the arguments are read, so that --help answers at once.
    from model.build import build_model, requested_config
    from model.checkpoint import find_checkpoint
    from model.data.dataset import describe_sample, open_sft_data
    from model.data.token_cache import data_files
    from model.tokenizer import load_tokenizer
    from model.training.loop import Trainer, language_model_loss, start
    from model.training.ranks import on_all, print_once
    from model.training.reports import describe_model

    # Device, ranks, seed; then the tokenizer and the weights of the stage before, whose shape wins over the preset.
    stage, shape, settings = MULTI if args.multi else SINGLE, from_flags(ModelSettings, args), training_settings(args)
    device = start(settings)
    data_path = args.data_path or stage.data_path
    on_all(lambda: data_files(data_path, "sft"))
    start_from = args.init_from or find_checkpoint(args.out_dir, stage.parents, requested_config(shape), "--init_from")
    tokenizer = load_tokenizer(args.tokenizer_path, start_from)
    model, parent = build_model(shape, tokenizer, start_from)
    model.to(device)
    print_once(describe_model(model, settings.dtype))
    print_once(f"weights from {parent['file']}")

    # Conversations, batched by length; labels mark the assistant's turns.
    max_seq_len = model.config.max_seq_len
    options = dict(seed=args.seed, last_turn_only=args.last_turn_only, cache_dir=args.cache_dir)
    train, validation = on_all(lambda: open_sft_data(data_path, tokenizer, max_seq_len, **options))
    print_once(f"{data_path}: " + "\n".join(train.report.summary()))
    print_once(f"sample, learned parts in brackets: {describe_sample(tokenizer, train[0], max_tokens=120)}")

    # Every parameter learns, by the next-token loss of the labelled tokens.
    names = dict(stage=stage.name, parent=parent, loss_function=language_model_loss)
    identity = {"--last_turn_only": args.last_turn_only}
    trainer = Trainer(model, tokenizer, train, validation, settings, identity=identity, **names)
    print_once(trainer.describe())
    if args.resume:
        trainer.resume()
    if trainer.train():
        path = shlex.quote(str(trainer.path))
        following = "" if args.multi else f"\nnext round:  python 3-full_sft.py --multi --init_from {path}"
        print_once(f"{trainer.path} is written; talk to it:  python 2-eval.py --checkpoint {path}{following}")
    trainer.close()


if __name__ == "__main__":
    run_main(main)
