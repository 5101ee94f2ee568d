"""Raw corpora -> the files that the training stages read.

    python data_process.py demo                                           all of this and lora_identity.csv, from a small world
    python data_process.py pretrain --data_path 'raw/*.jsonl.gz'       -> dataset/pretrain_data.csv
    python data_process.py pretrain --data_path 'raw/*.jsonl.gz' --engine datatrove --tasks 8   -> dataset/pretrain/*.jsonl.gz
    python data_process.py sft --data_path raw/sft_data_zh.jsonl       -> dataset/sft_data_single.csv, dataset/sft_data.csv
    python data_process.py dpo --data_path raw/huozi_rlhf_data.json    -> dataset/dpo/train_data.json

Ends with a table: rows read, dropped by which rule, bad lines, kept, written, speed, memory. A row that cannot be read is
counted, the first of its kind is named as file:line, and all of them are listed in <output>.bad_lines.txt. Files that
are there already are replaced only with --overwrite (by the demo: those that it made itself also without).
"""

import json
import os
import signal
from pathlib import Path

from model.cli import add_flags, checked, from_flags, positive_int, script_parser
from model.data.corpus import PARALLEL_FROM_BYTES, check_outputs, process_corpus
from model.data.filters import ConversationRules, PreferenceRules, PretrainRules
from model.errors import UserError, run_main
from model.files import atomic_write, expand_paths

MOST_WORKERS = 4  # unless asked for: more wait for the one process that writes, and each needs 50 MB
RULES = {"pretrain": PretrainRules, "sft": ConversationRules, "dpo": PreferenceRules}
# Flag of --engine datatrove -> the executors it is for.
ENGINE_FLAGS = {
    "executor": None,
    "tasks": None,
    "partition": ["slurm"],
    "time": ["slurm"],
    "task_memory": ["slurm", "ray"],
}
OUTPUTS = {  # flag that names another file -> file in --output_dir
    "pretrain": {"output": "pretrain_data.csv"},
    "sft": {"output_single": "sft_data_single.csv", "output_multi": "sft_data.csv"},
    "dpo": {"output": "dpo/train_data.json"},
}
EPILOGS = {
    "pretrain": 'Rows: {"text"} (Seq-Monkey, SkyPile), one JSON object a line or one JSON list. A document '
    "stays whole, however long: cutting it into rows is the work of training.",
    "sft": 'Rows: {"history", "q", "a"}; {"instruction", "input", "output", "history", "language"} (deepctrl, Alpaca), the '
    'question being instruction and input on two lines; {"conversations"} or {"messages"} of role/content or from/value. '
    "Rows without history go to sft_data_single.csv, rows with history to sft_data.csv.",
    "dpo": 'Rows: {"prompt" or "question" or "instruction" (+ "input"), "chosen", "rejected"}, each a text or a list of '
    'messages; {"conversations", "chosen": {"value"}, "rejected": {"value"}}; {"instruction", "output": [chosen, '
    "rejected]}; as one JSON list or one object a line. Preferences inside a longer conversation are dropped.",
}


def parse_arguments():
    parser = script_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="build all data of the small built-in world")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--overwrite", action="store_true", help="also replace files that the demo did not make")
    for name in RULES:
        help = " and ".join(OUTPUTS[name].values())
        add_corpus_flags(commands.add_parser(name, help=help, epilog=EPILOGS[name]), name)
    add_engine_flags(commands.choices["pretrain"])
    for command in commands.choices.values():
        command.add_argument("--output_dir", default="dataset", help="folder of the results (default: dataset)")
        command.add_argument("--workers", type=positive_int,
                             help="processes; the output does not depend on their number (default: all cores, at most "
                             f"{MOST_WORKERS}; small inputs use one)")  # fmt: skip
        command.add_argument("--report", help="also write the final table as JSON to this file")
    return parser.parse_args()


def add_corpus_flags(parser, kind):
    """Inputs, filters and outputs of one kind of rows."""
    parser.add_argument("--data_path", nargs="+", required=True, metavar="FILE",
                        help="files or quoted globs: .jsonl, .json, also .gz, .xz, .zst")  # fmt: skip
    for flag, name in OUTPUTS[kind].items():
        parser.add_argument(f"--{flag}", metavar="FILE", help=f"instead of OUTPUT_DIR/{name}")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already (one that no row "
                        "is for stays as it was)")  # fmt: skip
    add_flags(parser, RULES[kind], "filters")
    parser.add_argument("--no_dedup", action="store_true", help="keep exact duplicates")
    parser.add_argument("--near_dedup", action="store_true",
                        help="also drop near duplicates (MinHash over runs of 5 characters); takes 200 bytes of memory for "
                        "every row that is no exact duplicate, 400 for moments")  # fmt: skip
    parser.add_argument("--near_dedup_threshold", type=checked(float, {"least": 0.5, "most": 0.99}), default=0.8,
                        metavar="SIMILARITY", help="Jaccard similarity from which --near_dedup drops a row; it is estimated "
                        "within about 0.03 (default: 0.8)")  # fmt: skip


def add_engine_flags(parser):
    """How a corpus for pretraining is processed beyond one machine."""
    group = parser.add_argument_group("beyond one machine")
    group.add_argument("--engine", choices=("single", "datatrove"), default="single", help="datatrove: the same documents as "
                       "tasks that can be run again, in the folder OUTPUT_DIR/pretrain or --output (default: single)")  # fmt: skip
    group.add_argument("--executor", choices=("local", "slurm", "ray"), help="where tasks run (default: local)")
    group.add_argument("--tasks", type=positive_int, help="how many; a task has whole files, and takes 900 bytes of memory "
                       "for each of their rows with --near_dedup (default: as many as files)")  # fmt: skip
    group.add_argument("--partition", help="of Slurm, which needs it")
    group.add_argument("--time", help="limit of a task on Slurm (default: 24:00:00)")
    group.add_argument(
        "--task_memory",
        type=positive_int,
        metavar="GB",
        help="reserved on Slurm (default: 4) and Ray (default: nothing)",
    )


def check_engine_flags(args):
    """UserError for a flag that would have no effect, or is missing."""
    for name, executors in ENGINE_FLAGS.items():
        if getattr(args, name) is None:
            continue
        if args.engine == "single":
            raise UserError(f"--{name} is for --engine datatrove: give that too, or leave it out", exit_code=2)
        if executors and args.executor not in executors:
            raise UserError(f"--{name} is for --executor {' or '.join(executors)}: leave it out", exit_code=2)
    if args.executor == "slurm" and not args.partition:
        raise UserError("--executor slurm: name the partition with --partition", exit_code=2)


def process_with_datatrove(args, inputs, rules):
    """The CorpusReport of a run with --engine datatrove, None where Slurm goes on alone."""
    try:
        from model.data.datatrove import Job, run
    except ModuleNotFoundError as error:
        install = "pip install -r requirements.txt -c constraints.txt"
        raise UserError(f"--engine datatrove: {error.name} is not installed: {install}") from None
    output = Path(os.path.abspath(args.output or Path(args.output_dir, "pretrain")))
    near_threshold = args.near_dedup_threshold if args.near_dedup else None
    inputs = tuple(Path(os.path.abspath(path)) for path in inputs)
    report = args.report and os.path.abspath(args.report)
    job = Job(inputs, output, rules, args.tasks or len(inputs), not args.no_dedup, near_threshold, report)
    executor = args.executor or "local"
    workers = args.workers
    if executor == "local":
        small = sum(path.stat().st_size for path in inputs) < PARALLEL_FROM_BYTES
        workers = 1 if small else workers or default_workers()
    place = dict(partition=args.partition, time_limit=args.time or "24:00:00", memory=args.task_memory)
    return run(job, executor, workers, args.overwrite, **place)


def default_workers():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores, MOST_WORKERS)


def main():
    args = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # leave as on Ctrl-C: no temporary files, one line
    if args.command == "demo":
        from model.demo.files import build_demo

        return finish(
            build_demo(args.output_dir, args.seed, args.overwrite, args.workers or default_workers()), args.report
        )
    rules = from_flags(RULES[args.command], args)
    if 0 < rules.max_chars < rules.min_chars:
        raise UserError("--min_chars is larger than --max_chars; nothing could be kept", exit_code=2)
    if args.command == "pretrain":
        check_engine_flags(args)
    inputs = expand_paths(args.data_path)
    if getattr(args, "engine", None) == "datatrove":
        report = process_with_datatrove(args, inputs, rules)
        return finish({args.command: report}, args.report) if report else None
    outputs = [getattr(args, flag) or Path(args.output_dir, name) for flag, name in OUTPUTS[args.command].items()]
    check_outputs(inputs, outputs, rules.suffix, args.report, args.overwrite)
    report = process_corpus(
        inputs,
        outputs,
        rules,
        dedup=not args.no_dedup,
        near_threshold=args.near_dedup_threshold if args.near_dedup else None,
        workers=args.workers or default_workers(),
        description=args.command,
    )
    finish({args.command: report}, args.report)


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
