"""Let a model sit C-Eval, CMMLU or your own exam of four options, or measure bits per byte on any text.

Each question and its options are one prompt; the answer is the letter, A to D, that the model finds the most probable
as the next token. 25 % come by guessing alone, so the last lines say how far the result is from that.

    python eval_ceval.py                                # reads ceval/ceval-exam/val/, writes out/ceval/
    python eval_ceval.py --few_shot 5 --checkpoint out/pretrain_512.pth
    python eval_ceval.py --shuffle_options 1            # a model that knows stays right; one that guesses moves
    python eval_ceval.py --benchmark cmmlu --data_dir cmmlu
    python eval_ceval.py --lora out/lora_law_512.pth    # with a LoRA adapter on its base
    python eval_ceval.py --bpb book.txt                 # bits per byte; needs no exam

A folder --data_dir holds val/<subject>_val.csv (columns id, question, A, B, C, D, answer) and, for --few_shot,
dev/<subject>_dev.csv. A file of one's own is a subject too. In float32 unless --dtype says otherwise: in bfloat16 about
one answer in two hundred depends on which questions share a batch.
"""

import contextlib
import json

from model.cli import add_flags, from_flags, script_parser
from model.errors import run_main, tell
from model.settings import ExamSettings, MachineSettings
from model.stages import CHAT_STAGES, PRETRAINED_STAGES


def parse_arguments():
    parser = script_parser(__doc__)
    add_flags(parser, ExamSettings, "exam")
    bpb = "measure bits per byte on this text (.csv and .jsonl: column text), and sit the exam only if it is there"
    parser.add_argument("--bpb", metavar="FILE", help=bpb)
    parser.add_argument("--json", action="store_true", help="end with a line of JSON")
    add_flags(parser, MachineSettings, "checkpoint and machine", dtype="float32")
    return parser.parse_args()


def main():
    args = parse_arguments()
    settings = from_flags(ExamSettings, args)

    # Imported after the arguments are read, so that --help answers at once.
    from model.evaluation.exam import exam_directory, exam_subjects, sit_exam
    from model.evaluation.exam_results import print_result, results_folder, write_results
    from model.inference.open import open_model
    from model.lora import named

    subjects, folder, results = None, exam_directory(settings), contextlib.nullcontext()
    if args.bpb and settings.data_dir is None and not folder.is_dir():
        tell(f"note: {folder} is not there, so no exam")
    else:
        subjects = exam_subjects(settings)
        results = results_folder(settings.results_dir, folder)  # before anybody waits for a model
    with results as directory:
        model, tokenizer, path, metadata = open_model(
            from_flags(MachineSettings, args), CHAT_STAGES + PRETRAINED_STAGES
        )
        result = {"checkpoint": str(named(path, args.lora))}
        if args.bpb:
            result |= bits_per_byte(model, tokenizer, args.bpb, result["checkpoint"])
        if subjects:
            exam = sit_exam(model, tokenizer, subjects, settings, path, metadata.get("stage"), args.lora)
            summary, table, answers = exam
            print_result(summary, table)
            write_results(directory, summary, table, answers)
            print(f"{summary['questions_per_second']:,.1f} questions per second; written: {directory}")
            result |= summary
    if args.json:
        print(json.dumps(result, ensure_ascii=False))


def bits_per_byte(model, tokenizer, file, path):
    """Measure and print bits per byte of a text; returns what measure_bits_per_byte does."""
    from model.evaluation.bits_per_byte import measure_bits_per_byte, read_texts

    measured = measure_bits_per_byte(model, tokenizer, read_texts(file))
    counts = f"{measured['bytes']:,} bytes in {measured['tokens']:,} tokens"
    print(f"{file}: {measured['bits_per_byte']:.4f} bits per byte ({counts}), {path}")
    return measured


if __name__ == "__main__":
    run_main(main)
