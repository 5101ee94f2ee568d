"""Talk to a chat model in the terminal: fixed questions, your own, or a conversation.

Takes what the latest stage wrote, out/dpo_<dim>[_moe].pth, else out/multi_chat/full_sft_<dim>[_moe].pth, else the
single-turn one, else what `make quickstart` trained; or --checkpoint. The first line says which.

    python 2-eval.py                                           # the eight fixed questions, same seed, same answers
    python 2-eval.py --prompt "你是谁？" --temperature 0
    python 2-eval.py --lora out/lora_identity_512.pth          # with a LoRA adapter on its base
    python 2-eval.py --interactive                             # a conversation; /help lists its commands
    python 2-eval.py --prompt_file dataset/heldout/facts.jsonl --json       # rows with answers: accuracy by task
    python 2-eval.py --checkpoint a.pth --checkpoint b.pth --report out/report.md     # side by side, .md and .html
"""

import dataclasses
import sys
from pathlib import Path

from model.cli import add_inference_flags, from_flags, non_negative_int, script_parser
from model.errors import UserError, run_main
from model.settings import InferenceSettings, SamplingParameters


def parse_arguments():
    parser = script_parser(__doc__)
    questions = parser.add_mutually_exclusive_group()
    questions.add_argument("--prompt", action="append", help="a question, may be given several times")
    kinds = '.txt with a question a line, or .jsonl {"q"[, "history"][, "answer"]}'
    questions.add_argument("--prompt_file", help=f"{kinds}; with answers: greedy, whatever --temperature")
    questions.add_argument("--interactive", action="store_true", help="a conversation: type, and it answers")
    remembered = "earlier exchanges the model sees (default: all with --interactive, else 0)"
    parser.add_argument("--history", type=non_negative_int, help=remembered)
    parser.add_argument("--json", action="store_true", help="with answers in --prompt_file: end with a line of JSON")
    add_inference_flags(parser)
    report = parser.add_argument_group("report", conflict_handler="resolve")  # its --checkpoint replaces the shared one
    both = "write FILE.md and FILE.html: answers, how they end, repetition, length (name either)"
    report.add_argument("--report", type=Path, metavar="FILE", help=both)
    several = "a .pth or a Hugging Face folder (default: the latest stage in --out_dir); with --report several times"
    report.add_argument("--checkpoint", action="append", metavar="PATH", help=several)
    endpoint = "an OpenAI-compatible endpoint that rates the answers: http://127.0.0.1:8000/v1; its key: OPENAI_API_KEY"
    report.add_argument("--judge", metavar="URL", help=endpoint)
    report.add_argument(
        "--judge_model", metavar="NAME", help="the model that --judge asks (default: the first it lists)"
    )
    report.add_argument("--overwrite", action="store_true", help="replace the files of an earlier --report")
    args = parser.parse_args()
    check_report_flags(args)
    return args


def check_report_flags(args):
    """Raise UserError for flags of the report that do not go together."""
    several = len(args.checkpoint or ()) > 1
    for given, name in (
        (several, "a second --checkpoint"),
        (args.judge, "--judge"),
        (args.judge_model, "--judge_model"),
        (args.overwrite, "--overwrite"),
    ):
        if given and not args.report:
            raise UserError(f"{name} needs --report FILE", exit_code=2)
    if args.report and (args.interactive or args.json):
        raise UserError(f"--report does not go with --{'interactive' if args.interactive else 'json'}", exit_code=2)
    if args.judge_model and not args.judge:
        raise UserError("--judge_model NAME needs --judge URL", exit_code=2)


def main():
    args = parse_arguments()
    if args.interactive and sys.stdin is None:
        raise UserError("--interactive: there is no standard input to read questions from", exit_code=2)

    # Imported after the arguments are read, so that --help answers at once.
    from model.data.conversations import message, parse_history
    from model.evaluation.questions import QUESTIONS, answer_each, check_prompts, read_questions
    from model.evaluation.scoring import measure_accuracy, print_accuracy
    from model.inference.chat import chat_prompt, converse, last_exchanges, print_answer, print_stream
    from model.inference.open import open_engine

    check_prompts(args.prompt or ())
    given = [("--prompt", {"q": question}) for question in args.prompt or QUESTIONS]
    rows = read_questions(args.prompt_file, "q") if args.prompt_file else given
    parameters = from_flags(SamplingParameters, args)
    histories = [last_exchanges(parse_history(row.get("history")), args.history) for _, row in rows]
    checkpoints, args.checkpoint = args.checkpoint or [None], None
    several = [dataclasses.replace(from_flags(InferenceSettings, args), checkpoint=path) for path in checkpoints]
    if args.report:
        return report(args, several, rows, histories, parameters)
    engine, path = open_engine(several[0])
    print(f"{path}: {engine.description}")

    if args.interactive:

        def reply(messages, write):
            *history, question = messages
            ids = chat_prompt(engine, history, question["content"], parameters)
            print_stream(engine, ids, parameters, write)

        return converse(reply, args.history)
    if all("answer" in row for _, row in rows):
        prompts = [chat_prompt(engine, history, row["q"], parameters) for history, (_, row) in zip(histories, rows)]
        print_accuracy(measure_accuracy(engine, rows, prompts, parameters), args.json)
    else:
        asked = []  # earlier questions and answers, as messages

        def answer(row):
            own = last_exchanges(parse_history(row.get("history")), args.history)
            history = own or last_exchanges(asked, args.history or 0)
            print(f"\nQ: {row['q']}")
            text = print_answer(engine, history, row["q"], parameters)
            asked.extend([message("user", row["q"]), message("assistant", text)])

        answer_each(rows, answer)


def report(args, several, rows, histories, parameters):
    """Write the report of --report on the checkpoints in `several`, InferenceSettings of each."""
    from model.evaluation.judge import Judge
    from model.evaluation.questions import QUESTIONS
    from model.evaluation.report import report_paths, write_report
    from model.files import refuse_existing

    paths = report_paths(args.report)
    refuse_existing(paths, args.overwrite)
    judge = Judge(args.judge, args.judge_model) if args.judge else None
    if judge:  # a wrong address or key shows here, before anybody waits for answers
        judge.rate({"q": QUESTIONS[-1]}, [], "一星期有七天。")
    source = args.prompt_file or ("--prompt" if args.prompt else "the fixed list of 2-eval.py")
    write_report(paths, several, rows, histories, parameters, source, judge)


if __name__ == "__main__":
    run_main(main)
