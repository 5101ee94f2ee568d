"""Train the tokenizer: text in, the folder model/minimind_tokenizer/ out (byte-level BPE, 6400 words).

    python train_tokenizer.py --data_path dataset/pretrain_data.csv dataset/sft_data.csv --output_dir out/my_tokenizer

A tokenizer that is there already, such as the shipped one, is replaced only with --overwrite: every checkpoint needs the
one it was trained with. The stages take another one with --tokenizer_path.
Ids 0, 1, 2 are <unk>, <s>, </s>; how the other words are chosen is told in model/data/tokenizer_training.py.

The folder the project ships was trained with (data/ holds rows with a "source"; those named last may not be used):
    python train_tokenizer.py --data_path "data/pretrain_zh_open-*.jsonl.xz" data/sft_zh.jsonl.gz \\
        --max_chars 42000000 --group_field source --exclude_groups carbonz0/ hikariming/ nlpdata/c3 AndrewZhe/ \\
        hiyouga/ "shibing624/MedicalGPT sharegpt" LianjiaTech/BELLE OpenLMLab/MOSS yangjianxin1/Firefly --overwrite
"""

import signal
from pathlib import Path

from model.cli import non_negative_int, positive_int, script_parser
from model.data.tokenizer_training import VOCABULARY_SIZES, characters_per_token, read_sample, train
from model.errors import UserError, run_main
from model.files import expand_paths
from model.tokenizer import DEFAULT_TOKENIZER_PATH, save_tokenizer

DEFAULT_INPUTS = ("dataset/tokenizer_train.jsonl", "dataset/pretrain_data.csv")


def parse_arguments():
    parser = script_parser(__doc__)
    parser.add_argument(
        "--data_path",
        nargs="+",
        metavar="FILE",
        help=".jsonl, .csv or .txt, also .gz, .xz, .zst; globs, folders of .jsonl and .csv. Rows have text, or history/q/a, or "
        f"conversations (default: {' or '.join(DEFAULT_INPUTS)})",
    )
    parser.add_argument(
        "--output_dir", default=str(DEFAULT_TOKENIZER_PATH), help="folder to write (default: model/minimind_tokenizer)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the tokenizer in --output_dir")
    parser.add_argument("--vocab_size", type=positive_int, default=6400, help="number of words (default: %(default)s)")
    parser.add_argument(
        "--max_chars",
        type=positive_int,
        default=10_000_000,
        help="characters sampled at most, in equal shares for every group (default: %(default)s); "
        "training takes about 100 bytes of memory for each",
    )
    parser.add_argument(
        "--group_field",
        metavar="FIELD",
        help="rows with the same value of this field are a group (default: a file is a group)",
    )
    parser.add_argument(
        "--exclude_groups", nargs="+", default=[], metavar="PREFIX", help="leave out groups whose name begins so"
    )
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the sample (default: %(default)s)")
    args = parser.parse_args()
    if args.vocab_size not in VOCABULARY_SIZES:
        allowed = f"{VOCABULARY_SIZES[0]} to {VOCABULARY_SIZES[-1]}"
        raise UserError(f"--vocab_size {args.vocab_size}: must be {allowed}", exit_code=2)
    args.data_path = args.data_path or [path for path in DEFAULT_INPUTS if Path(path).exists()][:1]
    if not args.data_path:
        raise UserError(f"none of {', '.join(DEFAULT_INPUTS)} exists: name text with --data_path")
    if not args.overwrite and (there := Path(args.output_dir, "tokenizer.json")).exists():
        raise UserError(f"{there}: is there already; name another folder with --output_dir, or give --overwrite")
    return args


def main():
    args = parse_arguments()
    paths = expand_paths(args.data_path, (".csv", ".jsonl"))
    sample = read_sample(paths, args.max_chars, args.group_field, args.exclude_groups, args.seed)
    groups, excluded = len(sample.sizes), len(sample.sizes) - len(sample.kept_sizes)
    print(
        f"{sum(sample.sizes.values()):,} characters in {groups} groups, {excluded} groups excluded; "
        f"training on {sum(map(len, sample.texts)):,} characters of {len(sample.texts):,} documents"
    )
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # the compiled loop would notice Ctrl-C only at its end
    backend = train(sample.texts, args.vocab_size)
    signal.signal(signal.SIGINT, handler)
    save_tokenizer(backend, args.output_dir)
    if sample.held_out:
        compression = characters_per_token(backend, sample.held_out)
        print(f"characters per token on {len(sample.held_out):,} held-out documents: {compression:.3f}")
    print(f"{args.output_dir}: {backend.get_vocab_size()} words written")


if __name__ == "__main__":
    run_main(main)
