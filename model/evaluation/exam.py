"""A whole exam for one model, from its settings to a summary: what eval_ceval.py does, for a notebook too."""

import time
from pathlib import Path

from model.evaluation.ceval import BENCHMARKS, read_exam, shuffle_options, take_exam
from model.evaluation.exam_results import prompts_used, summarise
from model.lora import named, weights_sha256
from model.stages import PRETRAINED_STAGES


def exam_directory(settings):
    """The folder of the exam that ExamSettings mean."""
    return Path(settings.data_dir or BENCHMARKS[settings.benchmark].data_dir)


def exam_subjects(settings):
    """The Subjects that ExamSettings ask for, options shuffled if so. Raises UserError as read_exam does."""
    wanted = None if settings.subjects is None else settings.subjects.split(",")
    subjects = read_exam(BENCHMARKS[settings.benchmark], exam_directory(settings), settings.few_shot, wanted)
    return subjects if settings.shuffle_options is None else shuffle_options(subjects, settings.shuffle_options)


def sit_exam(model, tokenizer, subjects, settings, checkpoint, stage=None, lora=None):
    """Ask the Subjects of exam_subjects as ExamSettings say; returns (summary, table, answers) for print_result and
    write_results.

    checkpoint: path of the model's weights, lora: of the adapter that was merged into them. stage: the one that the .json
    names, which decides on prompt_format "auto".
    The summary holds settings and checkpoint beside what summarise finds. Raises UserError as take_exam does.
    """
    facts = exam_facts(settings, subjects, checkpoint, stage, lora)
    context = model.config.max_seq_len
    print(f"{facts['benchmark']}, {facts['checkpoint']}, {prompts_used(facts)}, context {context} tokens", flush=True)
    began = time.perf_counter()
    answers = take_exam(model, tokenizer, subjects, facts["prompt_format"] == "chat")
    rate = len(answers) / (time.perf_counter() - began)
    summary, table = summarise(answers, subjects)
    return {**facts, **summary, "questions_per_second": rate}, table, answers


def exam_facts(settings, subjects, checkpoint, stage, lora):
    """What a summary says of the exam and the model: which subjects, how they were asked, which weights exactly."""
    benchmark = BENCHMARKS[settings.benchmark]
    by_stage = "plain" if stage in PRETRAINED_STAGES else "chat"
    own = not any(subject.name in benchmark.known for subject in subjects)
    return {
        "benchmark": benchmark.name_of(subjects, exam_directory(settings)),
        "subjects": len(subjects),
        "subjects_of_benchmark": None if own else len(benchmark.known),
        "checkpoint": str(named(checkpoint, lora)),
        "checkpoint_sha256": weights_sha256(checkpoint, lora),
        "prompt_format": by_stage if settings.prompt_format == "auto" else settings.prompt_format,
        "few_shot": settings.few_shot,
        "shuffle_options": settings.shuffle_options,
    }
