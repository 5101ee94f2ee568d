"""Talk to a chat model in the terminal: fixed questions, your own, or a conversation.

Takes what stage 3 wrote, out/multi_chat/full_sft_<dim>[_moe].pth, else the single-turn one; or --checkpoint.

    python 2-eval.py                                           # the eight fixed questions, same seed, same answers
    python 2-eval.py --prompt "你是谁？" --temperature 0
    python 2-eval.py --interactive                             # a conversation; /clear forgets it, /exit leaves
    python 2-eval.py --prompt_file dataset/heldout/facts.jsonl --json       # rows with answers: accuracy by task
"""

import sys
from collections import deque

from model.cli import add_inference_flags, from_flags, non_negative_int, script_parser
from model.errors import UserError, run_main
from model.settings import InferenceSettings, SamplingParameters

QUESTIONS = (
    "你知道长江吗？", "第一颗人造卫星是哪个国家发射的？", "你知道泰山在哪里吗？", "世界上最高的山峰是什么？",
    "万有引力是谁提出的？", "你知道大熊猫的主要食物是什么吗？", "海水为什么是咸的？", "一星期有多少天？",
)  # fmt: skip


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
    return parser.parse_args()


def main():
    args = parse_arguments()

    # Imported after the arguments are read, so that --help answers at once.
    from model.evaluation.questions import check_prompts, read_questions
    from model.evaluation.scoring import measure_accuracy, print_accuracy
    from model.inference.chat import chat_prompt, print_answer
    from model.inference.open import open_engine

    check_prompts(args.prompt or ())
    given = [{"q": question} for question in args.prompt or QUESTIONS]
    rows = read_questions(args.prompt_file, "q") if args.prompt_file else given
    parameters = from_flags(SamplingParameters, args)
    engine, path = open_engine(from_flags(InferenceSettings, args))
    print(f"{path}: {engine.description}")

    if args.interactive:
        converse(engine, parameters, args.history)
    elif all("answer" in row for row in rows):
        histories = [deque(row.get("history") or [], args.history) for row in rows]
        prompts = [chat_prompt(engine, history, row["q"], parameters) for history, row in zip(histories, rows)]
        print_accuracy(measure_accuracy(engine, rows, prompts, parameters), args.json)
    else:
        asked = deque(maxlen=args.history or 0)
        for row in rows:
            history = deque(row["history"], args.history) if row.get("history") else asked
            print(f"\nQ: {row['q']}")
            asked.append([row["q"], print_answer(engine, history, row["q"], parameters)])


def converse(engine, parameters, remembered):
    """Questions from the terminal until /exit, Ctrl-D or Ctrl-C; Ctrl-C during an answer stops only the answer."""
    from model.inference.chat import print_answer

    sys.stdin.reconfigure(errors="replace")  # a stray byte in the terminal is no reason to end a conversation
    print("/clear forgets the conversation, /exit leaves")
    history = deque(maxlen=remembered)
    while True:
        try:
            question = input("\nQ: ").strip()
        except (EOFError, KeyboardInterrupt):
            question = "/exit"
            print()
        if question == "/exit":
            return
        if question == "/clear":
            history.clear()
        elif question:
            try:
                history.append([question, print_answer(engine, history, question, parameters)])
            except KeyboardInterrupt:
                print(" (stopped)")
            except UserError as error:
                print(f"({error})")


if __name__ == "__main__":
    run_main(main)
