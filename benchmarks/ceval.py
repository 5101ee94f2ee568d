"""Questions of an exam per second: eval_ceval.py's batches against one forward pass a question.

    python benchmarks/ceval.py

Made-up questions as long as C-Eval's, chat prompts, without examples and with five before each question (or as many as
the context holds), random weights. Both sides make the prompts and ask every question; they take turns in one process, so
that a busy machine disturbs them alike, and the median counts. The last line is JSON: questions per second, their ratio,
and how many answers and how much of a probability differ.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from model.cli import positive_int  # noqa: E402
from model.errors import UserError, run_main  # noqa: E402


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    presets = ["minimind-tiny", "minimind-v1-small"]
    parser.add_argument("--presets", nargs="+", default=presets, help=f"default: {' '.join(presets)}")
    parser.add_argument("--subjects", type=positive_int, default=4, help="of 26 questions (default: %(default)s)")
    parser.add_argument("--questions", type=positive_int, default=26, help="of a subject (default: %(default)s)")
    parser.add_argument("--repeats", type=positive_int, default=3, help="measurements of each (default: %(default)s)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="auto", help="default: %(default)s")
    return parser.parse_args()


def made_up_exam(subjects, questions, examples, sentences):
    """Subjects with questions and options cut from `sentences`, their lengths drawn from log-normal distributions that
    have mean and spread of C-Eval's (characters of a question 50 in the mean, of an option 12)."""
    from model.evaluation.ceval import LETTERS, Question, Subject

    chance = random.Random(0)

    def text(mean, spread, longest):
        length, start = int(chance.lognormvariate(mean, spread)), chance.randrange(len(sentences) // 2)
        return sentences[start : start + min(max(length, 1), longest)]

    def question():
        options = tuple(text(2.03, 0.93, 130) for _ in LETTERS)
        return Question(text(3.61, 0.74, 500), options, chance.choice(LETTERS), "made up")

    def some(count):
        return [question() for _ in range(count)]

    return [Subject(f"subject_{n}", f"第{n}科", "other", some(questions), some(examples)) for n in range(subjects)]


def one_by_one(model, tokenizer, subjects):
    """[(letter, [p_A, p_B, p_C, p_D]), ...], a forward pass of the whole prompt for each question that fits."""
    import torch

    from model.evaluation.ceval import LETTERS, fitting_prompt, letter_ids

    letters, answers = letter_ids(tokenizer), []
    with torch.inference_mode():
        for subject in subjects:
            for question in subject.questions:
                ids, count = fitting_prompt(tokenizer, subject, question, True, model.config.max_seq_len)
                if count is not None:
                    logits = model(torch.tensor([ids], device=model.device)).logits[0, -1]
                    p = logits.float().softmax(dim=-1)[letters].tolist()
                    answers.append((LETTERS[p.index(max(p))], p))
    return answers


def batched(model, tokenizer, subjects):
    """The same through take_exam."""
    from model.evaluation.ceval import LETTERS, take_exam

    rows = [row for row in take_exam(model, tokenizer, subjects, chat=True) if row["llm_answer"]]
    return [(row["llm_answer"], [row[f"p_{letter}"] for letter in LETTERS]) for row in rows]


def compare(config, dtype, device, tokenizer, subjects, repeats):
    """Rates of both ways over `subjects`, their ratio, and how far the answers differ."""
    import torch

    from model.model import Transformer

    models = []
    for _ in range(2):  # a model each: take_exam gives its own faster layers
        torch.manual_seed(0)
        model = Transformer(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:  # as wide as trained weights are, so that the letters differ as much
                torch.nn.init.normal_(parameter, std=0.06)
        models.append(model.to(device, dtype).eval())
    ways = {"one by one": (one_by_one, models[0]), "batched": (batched, models[1])}
    seconds, answers = {name: [] for name in ways}, {}
    for turn in range(repeats + 1):  # the first does not count
        for name, (way, model) in ways.items():
            began = time.perf_counter()
            answers[name] = way(model, tokenizer, subjects)
            seconds[name] += [time.perf_counter() - began] if turn else []
    rates = {name: len(answers[name]) / statistics.median(times) for name, times in seconds.items()}
    pairs = list(zip(*answers.values(), strict=True))
    largest = max(abs(p - q) for (_, one), (_, other) in pairs for p, q in zip(one, other))
    return {
        "questions_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": round(rates["batched"] / rates["one by one"], 2),
        "questions": len(pairs),
        "other_answers": sum(one != other for (one, _), (other, _) in pairs),
        "largest_difference": largest,
    }


def main():
    args = parse_arguments()
    import torch
    from decoding import cpu_name

    from model.demo.world import DEFAULT_DIRECTORY
    from model.device import select_device
    from model.LMConfig import preset_config
    from model.tokenizer import load_tokenizer

    device, tokenizer, results = select_device(args.device), load_tokenizer(), {}
    sentences = (Path(DEFAULT_DIRECTORY) / "texts.txt").read_text("utf-8").replace("\n", "")
    for preset in args.presets:
        try:
            config = preset_config(preset)
        except ValueError as error:
            raise UserError(f"--presets: {error}", exit_code=2) from None
        config.vocab_size = len(tokenizer)
        for dtype in args.dtypes:
            for examples in (0, 5):
                exam = made_up_exam(args.subjects, args.questions, examples, sentences)
                found = compare(config, getattr(torch, dtype), device, tokenizer, exam, args.repeats)
                label = f"{preset}, {dtype}, {examples} examples"
                results[label] = found
                rates = "  ".join(f"{name} {rate:,.1f}/s" for name, rate in found["questions_per_second"].items())
                print(f"{label:42s} {rates}  ratio {found['ratio']}  other answers {found['other_answers']}")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(torch.get_num_threads())
    print(json.dumps({"device": name, "results": results}))


if __name__ == "__main__":
    run_main(main)
