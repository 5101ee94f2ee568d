"""Continue a text with a pretrained model: the quickest look at what stage 1 has taught it.

A pretrained model goes on writing; it does not answer. Ask it questions after stage 3, with 2-eval.py.

    python 0-eval_pretrain.py                                  # a few openings, with the checkpoint stage 1 wrote
    python 0-eval_pretrain.py --prompt "长江是" --temperature 0
    python 0-eval_pretrain.py --prompt_file dataset/heldout/cloze.jsonl     # {"prompt", "answer"} rows: accuracy
"""

from model.cli import add_inference_flags, from_flags, script_parser
from model.errors import run_main
from model.settings import InferenceSettings, SamplingParameters
from model.stages import PRETRAINED_STAGES


def parse_arguments():
    parser = script_parser(__doc__)
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--prompt", action="append", help="text to go on from, may be given several times")
    file_help = '.txt with a text a line, or .jsonl with {"prompt"} and perhaps {"answer"}'
    texts.add_argument("--prompt_file", help=file_help)
    parser.add_argument("--json", action="store_true", help="with answers in --prompt_file: end with a line of JSON")
    add_inference_flags(parser)
    return parser.parse_args()


def main():
    args = parse_arguments()

    # Imported after the arguments are read, so that --help answers at once.
    from model.evaluation.questions import OPENINGS, answer_each, check_prompts, read_questions
    from model.evaluation.scoring import measure_accuracy, print_accuracy, score_answer
    from model.inference.chat import print_stream, text_prompt
    from model.inference.open import open_engine

    check_prompts(args.prompt or ())
    given = [("--prompt", {"prompt": text}) for text in args.prompt or OPENINGS]
    rows = read_questions(args.prompt_file, "prompt") if args.prompt_file else given
    parameters = from_flags(SamplingParameters, args)
    engine, path = open_engine(from_flags(InferenceSettings, args), PRETRAINED_STAGES)
    print(f"{path}: {engine.description}")

    if all("answer" in row for _, row in rows):
        # What counts is how the sentence ends: the first one of the continuation.
        def is_right(row, text):
            return score_answer({**row, "q": row["prompt"]}, text.split("。")[0])

        prompts = [text_prompt(engine.tokenizer, row["prompt"]) for _, row in rows]
        print_accuracy(measure_accuracy(engine, rows, prompts, parameters, is_right), args.json)
        return

    def go_on(row):
        print(f"\n{row['prompt']}", end="", flush=True)
        print_stream(engine, text_prompt(engine.tokenizer, row["prompt"]), parameters)

    answer_each(rows, go_on)


if __name__ == "__main__":
    run_main(main)
