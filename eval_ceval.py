"""Let a model sit C-Eval, CMMLU or your own exam of four options, or measure bits per byte on any text.

Each question and its options are one prompt; the answer is the letter, A to D, that the model finds the most probable
as the next token. 25 % come by guessing alone, so the last lines say how far the result is from that.

    python eval_ceval.py                                # reads ceval/ceval-exam/val/, writes out/ceval/
    python eval_ceval.py --few_shot 5 --checkpoint out/pretrain_512.pth
    python eval_ceval.py --shuffle_options 1            # a model that knows stays right; one that guesses moves
    python eval_ceval.py --benchmark cmmlu --data_dir cmmlu
    python eval_ceval.py --bpb book.txt                 # bits per byte; needs no exam

A folder --data_dir holds val/<subject>_val.csv (columns id, question, A, B, C, D, answer) and, for --few_shot,
dev/<subject>_dev.csv. A file of one's own is a subject too. In float32 unless --dtype says otherwise: in bfloat16 about
one answer in two hundred depends on which questions share a batch.
"""

import json
import time
from pathlib import Path

from model.cli import add_flags, from_flags, non_negative_int, script_parser
from model.errors import UserError, run_main, tell
from model.settings import MachineSettings
from model.stages import CHAT_STAGES, PRETRAINED_STAGES


def parse_arguments():
    parser = script_parser(__doc__)
    exam = parser.add_argument_group("exam")
    exam.add_argument("--benchmark", choices=("ceval", "cmmlu"), default="ceval", help="default: %(default)s")
    exam.add_argument("--data_dir", help="folder of the exam (default: ceval/ceval-exam, or cmmlu)")
    exam.add_argument("--subjects", help="only these, separated by commas (default: all that are there)")
    few = "solved examples from dev/ before each question, fewer where the context is full (default: 0)"
    exam.add_argument("--few_shot", type=non_negative_int, default=0, metavar="K", help=few)
    formats = "chat: a conversation; plain: a text to go on from; auto: by the checkpoint's stage, chat if unknown"
    exam.add_argument("--prompt_format", choices=("auto", "chat", "plain"), default="auto", help=formats)
    shuffle = "ask with the four options in another order, which SEED decides"
    exam.add_argument("--shuffle_options", type=non_negative_int, metavar="SEED", help=shuffle)
    bpb = "measure bits per byte on this text (.csv and .jsonl: column text), and sit the exam only if it is there"
    exam.add_argument("--bpb", metavar="FILE", help=bpb)
    results = "a CSV per subject and summary.csv, .json, .md, .png; earlier ones are replaced (default: %(default)s)"
    exam.add_argument("--results_dir", default="out/ceval", help=results)
    exam.add_argument("--json", action="store_true", help="end with a line of JSON")
    add_flags(parser, MachineSettings, "checkpoint and machine", dtype="float32")
    return parser.parse_args()


def main():
    args = parse_arguments()
    if Path(args.results_dir).exists() and not Path(args.results_dir).is_dir():
        raise UserError(f"--results_dir {args.results_dir}: is not a folder", exit_code=2)

    # Imported after the arguments are read, so that --help answers at once.
    from model.evaluation.bits_per_byte import measure_bits_per_byte, read_texts
    from model.evaluation.ceval import BENCHMARKS, read_exam, shuffle_options
    from model.inference.open import open_model

    benchmark, subjects = BENCHMARKS[args.benchmark], None
    data_dir = Path(args.data_dir or benchmark.data_dir)
    if args.bpb and args.data_dir is None and not data_dir.is_dir():
        tell(f"note: {data_dir} is not there, so no exam")
    else:
        wanted = args.subjects and args.subjects.split(",")
        subjects = read_exam(benchmark, data_dir, args.few_shot, wanted)
        if args.shuffle_options is not None:
            subjects = shuffle_options(subjects, args.shuffle_options)
    model, tokenizer, path, metadata = open_model(from_flags(MachineSettings, args), CHAT_STAGES + PRETRAINED_STAGES)

    result = {"checkpoint": str(path)}
    if args.bpb:
        measured = measure_bits_per_byte(model, tokenizer, read_texts(args.bpb))
        counts = f"{measured['bytes']:,} bytes in {measured['tokens']:,} tokens"
        print(f"{args.bpb}: {measured['bits_per_byte']:.4f} bits per byte ({counts}), {path}")
        result |= measured
    if subjects:
        result |= sit_exam(args, benchmark, subjects, model, tokenizer, path, metadata)
    if args.json:
        print(json.dumps(result, ensure_ascii=False))


def sit_exam(args, benchmark, subjects, model, tokenizer, path, metadata):
    """Ask all questions, print and write the results; returns their summary."""
    from model.evaluation.ceval import take_exam
    from model.evaluation.exam_results import print_result, prompts_used, summarise, write_results

    by_stage = "plain" if metadata.get("stage") in PRETRAINED_STAGES else "chat"
    title = benchmark.name_of(subjects, args.data_dir or benchmark.data_dir)
    settings = {"benchmark": title, "checkpoint": str(path)}
    settings["prompt_format"] = by_stage if args.prompt_format == "auto" else args.prompt_format
    settings |= {"few_shot": args.few_shot, "shuffle_options": args.shuffle_options}
    print(f"{title}, {path}, {prompts_used(settings)}, context {model.config.max_seq_len} tokens")
    began = time.perf_counter()
    answers = take_exam(model, tokenizer, subjects, settings["prompt_format"] == "chat")
    rate = len(answers) / (time.perf_counter() - began)
    summary, table = summarise(answers, subjects)
    summary = {**settings, **summary, "questions_per_second": rate}
    print_result(summary, table)
    write_results(Path(args.results_dir), summary, table, answers)
    print(f"{rate:,.1f} questions per second; written: {args.results_dir}")
    return summary


if __name__ == "__main__":
    run_main(main)
