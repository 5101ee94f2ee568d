"""Raw corpora -> the files that the training stages read.

    python data_process.py demo                                           everything below, from the small built-in world
    python data_process.py pretrain --data_path 'raw/*.jsonl.gz'       -> dataset/pretrain_data.csv
    python data_process.py sft --data_path raw/sft_data_zh.jsonl       -> dataset/sft_data_single.csv, dataset/sft_data.csv
    python data_process.py dpo --data_path raw/huozi_rlhf_data.json    -> dataset/dpo/train_data.json

Ends with a table: rows read, dropped by which rule, bad lines, kept, written, speed, memory. A row that cannot be read is
counted, the first of its kind is named as file:line, and all of them are listed in <output>.bad_lines.txt.
"""

import argparse
import json
import os
import signal
from pathlib import Path

from model.data.corpus import process_corpus
from model.data.filters import ConversationRules, PreferenceRules, PretrainRules
from model.errors import UserError, run_main
from model.files import atomic_write, expand_paths

MOST_WORKERS = 4  # unless asked for: more wait for the one process that writes, and each needs 50 MB
OUTPUTS = {
    "pretrain": ("pretrain_data.csv",),
    "sft": ("sft_data_single.csv", "sft_data.csv"),
    "dpo": ("dpo/train_data.json",),
}
EPILOGS = {
    "pretrain": 'Rows: {"text"} (Seq-Monkey, SkyPile), one JSON object a line or one JSON list. A document '
    "stays whole, however long: cutting it into rows is the work of training.",
    "sft": 'Rows: {"history", "q", "a"}; {"instruction", "input", "output", "history", "language"} (deepctrl, Alpaca), the '
    'question being instruction and input on two lines; {"conversations"} or {"messages"} of role/content or from/value. '
    "Rows without history go to sft_data_single.csv, rows with history to sft_data.csv.",
    "dpo": 'Rows: {"prompt" or "question" or "instruction" (+ "input"), "chosen", "rejected"}, each a text or a list of '
    'messages; {"conversations", "chosen": {"value"}, "rejected": {"value"}}; {"instruction", "output": [chosen, '
    'rejected]}; as one JSON list or one object a line. Preferences inside a longer conversation are dropped.',
}


def number(kind, low, high=float("inf")):
    """argparse type: a number within low..high."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is outside {low}..{high}")
        return value

    parse.__name__ = kind.__name__
    return parse


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--output_dir", default="dataset", help="folder of the results (default: dataset)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    shared.add_argument("--workers", type=number(int, 1), default=min(cores, MOST_WORKERS),
                        help=f"processes; the output does not depend on their number (default: all cores, at most "
                        f"{MOST_WORKERS}; small inputs use one)")  # fmt: skip
    shared.add_argument("--report", help="also write the final table as JSON to this file")
    demo = commands.add_parser("demo", parents=[shared], help="build all data of the small built-in world")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--overwrite", action="store_true", help="also replace files that the demo did not make")
    for name, rules in (("pretrain", PretrainRules()), ("sft", ConversationRules()), ("dpo", PreferenceRules())):
        command = commands.add_parser(name, parents=[shared], help=" and ".join(OUTPUTS[name]), epilog=EPILOGS[name])
        add_corpus_flags(command, rules)
    commands.choices["pretrain"].add_argument("--output", help="file instead of OUTPUT_DIR/pretrain_data.csv")
    sft = commands.choices["sft"]
    sft.add_argument("--output_single", help="file instead of OUTPUT_DIR/sft_data_single.csv (rows without history)")
    sft.add_argument("--output_multi", help="file instead of OUTPUT_DIR/sft_data.csv (rows with history)")
    sft.add_argument("--language", default=ConversationRules.language, help='keep rows whose "language" field, where there is '
                     'one, is this; "any" keeps all, for English also set --min_chinese 0 (default: Chinese)')  # fmt: skip
    commands.choices["dpo"].add_argument("--output", help="file instead of OUTPUT_DIR/dpo/train_data.json")
    return parser


def add_corpus_flags(parser, rules):
    """Inputs and filters of one kind of rows; the defaults are those of `rules`."""
    what = "document" if isinstance(rules, PretrainRules) else "each question and answer"
    parser.add_argument("--data_path", nargs="+", required=True, metavar="FILE",
                        help="files or quoted globs: .jsonl, .json, also .gz, .xz, .zst")  # fmt: skip
    parser.add_argument("--min_chars", type=number(int, 0), default=rules.min_chars,
                        help=f"least characters of {what} (default: {rules.min_chars})")  # fmt: skip
    parser.add_argument("--max_chars", type=number(int, 0), default=rules.max_chars,
                        help=f"most characters of {what}, longer ones are dropped; 0: no limit (default: {rules.max_chars})")  # fmt: skip
    parser.add_argument("--min_chinese", type=number(float, 0, 1), default=rules.min_chinese,
                        help="least share of Chinese characters; ASCII digits, punctuation and spaces do not count "
                        f"(default: {rules.min_chinese})")  # fmt: skip
    parser.add_argument("--no_dedup", action="store_true", help="keep exact duplicates")
    parser.add_argument("--near_dedup", action="store_true", help="also drop near duplicates (MinHash over runs of 5 characters)")
    parser.add_argument("--near_dedup_threshold", type=number(float, 0.1, 0.99), default=0.8, metavar="SIMILARITY",
                        help="Jaccard similarity from which --near_dedup drops a row (default: 0.8)")  # fmt: skip


def rules_from(arguments):
    limits = {name: getattr(arguments, name) for name in ("min_chars", "max_chars", "min_chinese")}
    if 0 < arguments.max_chars < arguments.min_chars:
        raise UserError("--min_chars is larger than --max_chars; nothing could be kept", exit_code=2)
    if arguments.command == "pretrain":
        return PretrainRules(**limits)
    if arguments.command == "sft":
        return ConversationRules(**limits, language=arguments.language)
    return PreferenceRules(**limits)


def output_paths(arguments):
    names = ("output_single", "output_multi") if arguments.command == "sft" else ("output",)
    defaults = [Path(arguments.output_dir) / name for name in OUTPUTS[arguments.command]]
    return [Path(getattr(arguments, name) or default) for name, default in zip(names, defaults)]


def main():
    arguments = build_parser().parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave as on Ctrl-C: no temporary files, one line
    if arguments.command == "demo":
        from model.demo.files import build_demo

        reports = build_demo(arguments.output_dir, arguments.seed, arguments.overwrite, arguments.workers)
        return finish(reports, arguments.report)
    rules = rules_from(arguments)
    report = process_corpus(
        expand_paths(arguments.data_path),
        output_paths(arguments),
        rules,
        dedup=not arguments.no_dedup,
        near_threshold=arguments.near_dedup_threshold if arguments.near_dedup else None,
        workers=arguments.workers,
        description=arguments.command,
    )
    finish({arguments.command: report}, arguments.report)


def finish(reports, report_path):
    """Print the tables and write them as JSON where asked."""
    for name, report in reports.items():
        print(f"== {name}\n{report.table()}")
        for path, written in report.outputs.items():
            if written["left_as_it_was"]:
                print(f"{path}: left as it was: no row is for it")
            elif not written["rows"]:
                print(f"warning: no row is for {path}; it has no data")
    if report_path:
        values = {name: report.as_dict() for name, report in reports.items()}
        with atomic_write(report_path) as handle:
            handle.write(json.dumps(values, ensure_ascii=False, indent=2).encode() + b"\n")


if __name__ == "__main__":
    run_main(main)
