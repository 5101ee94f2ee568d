"""Stage 1, pretraining: a model of random weights learns to predict the next token of plain text.

After it the model can continue a text (python 0-eval_pretrain.py) but not answer a question; that is stage 3's work.

reads   dataset/pretrain_data.csv (column text; data_process.py makes it)
writes  out/pretrain_<dim>[_moe].pth, the same .json (what it is) and .resume.pth (how to go on), out/logs/*.jsonl

    python 1-pretrain.py                              # minimind-v1-small, 26M parameters
    python 1-pretrain.py --preset minimind-tiny       # small enough for a laptop
    python 1-pretrain.py --resume                     # go on after Ctrl-C, kill -9 or a power cut

The loss starts at ln(6400) = 8.8 and falls to 3-4 on real text; bits per byte compares across tokenizers.
"""

import shlex

from model.cli import add_training_flags, from_flags, script_parser, training_settings
from model.errors import run_main
from model.settings import ModelSettings
from model.stages import STAGES

STAGE = STAGES["pretrain"]


def parse_arguments():
    parser = script_parser(__doc__)
    add_training_flags(
        parser, data_path=STAGE.data_path, short_rows_share=None, epochs=2, wandb_project="MiniMind-Pretrain"
    )
    return parser.parse_args()


def main():
    args = parse_arguments()

    # Imported after the arguments are read, so that --help answers at once.
    from model.build import build_model
    from model.data.dataset import describe_sample, open_pretrain_data
    from model.data.token_cache import data_files
    from model.tokenizer import load_tokenizer
    from model.training.loop import Trainer, language_model_loss, start
    from model.training.ranks import on_all, print_once
    from model.training.reports import describe_model

    # Device, ranks, seed; then the tokenizer and a model of its vocabulary, fresh unless --init_from names a parent.
    settings = training_settings(args)
    device = start(settings)
    on_all(lambda: data_files(args.data_path, "pretrain"))
    tokenizer = load_tokenizer(args.tokenizer_path, args.init_from)
    model, parent = build_model(from_flags(ModelSettings, args), tokenizer, args.init_from)
    model.to(device)
    print_once(describe_model(model, settings.dtype))

    # Documents of which one in a hundred is held out for validation, packed into rows without padding.
    options = dict(seed=args.seed, cache_dir=args.cache_dir)
    train, validation = on_all(
        lambda: open_pretrain_data(args.data_path, tokenizer, model.config.max_seq_len, **options)
    )
    print_once(f"{args.data_path}: " + "\n".join(train.report.summary()))
    print_once(f"sample: {describe_sample(tokenizer, train[0], max_tokens=60)}")

    # Every parameter learns, by the plain next-token loss.
    names = dict(stage=STAGE.name, parent=parent, loss_function=language_model_loss)
    trainer = Trainer(model, tokenizer, train, validation, settings, **names)
    print_once(trainer.describe())
    if args.resume:
        trainer.resume()
    if trainer.train():
        path = shlex.quote(str(trainer.path))
        print_once(
            f"{trainer.path} is written; see what it learned:  python 0-eval_pretrain.py --checkpoint {path}\n"
            f"next stage:  python 3-full_sft.py --init_from {path}"
        )
    trainer.close()


if __name__ == "__main__":
    run_main(main)
