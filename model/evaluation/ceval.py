"""Exams of four options, C-Eval's and CMMLU's and your own in their layout: questions from CSV files, prompts made of
them, and the probability that a model gives to each of the letters A to D as the next token."""

import os
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from model.data.conversations import message
from model.data.rows import RowReport, iter_csv_rows
from model.errors import UserError, tell
from model.evaluation.batches import length_batches, padded, tokens_per_batch
from model.evaluation.subjects import CEVAL, CMMLU, LETTERS, OTHER
from model.inference.kernels import install
from model.inference.kv_cache import KVCache
from model.tokenizer import encode_text, render_conversation

INSTRUCTION = "下面是{}考试的单项选择题，每题只有一个正确选项，请回答它的字母。"


@dataclass(frozen=True)
class Benchmark:
    """How an exam lies in its folder: (folder, what follows the subject's name) of its questions and of its solved
    examples, their columns, its subjects in order, and where to get it."""

    title: str
    data_dir: str
    questions: tuple
    examples: tuple
    columns: tuple
    subjects: dict
    source: str

    @property
    def known(self):
        """{subject: (its name in the prompt, category)} of its table, in order."""
        return {name: (title, kind) for kind, names in self.subjects.items() for name, title in names.items()}

    def name_of(self, subjects, data_dir):
        """What an exam of these Subjects is called: the benchmark's title, with their number where they are not exactly
        its own, or the folder of an exam of one's own."""
        known = sum(subject.name in self.known for subject in subjects)
        if not known:
            return str(data_dir)
        if known == len(self.known) == len(subjects):
            return self.title
        others = f" and {len(subjects) - known} others" if known < len(subjects) else ""
        return f"{self.title}, {known} of {len(self.known)} subjects{others}"


BENCHMARKS = {
    "ceval": Benchmark(
        "C-Eval", "ceval/ceval-exam", ("val", "_val.csv"), ("dev", "_dev.csv"), ("question", *LETTERS, "answer"), CEVAL,
        "ceval-exam.zip of the dataset ceval/ceval-exam on Hugging Face",
    ),
    "cmmlu": Benchmark(
        "CMMLU", "cmmlu", ("test", ".csv"), ("dev", ".csv"), ("Question", *LETTERS, "Answer"), CMMLU,
        "cmmlu_v1_0_1.zip of the dataset haonan-li/cmmlu on Hugging Face",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """One question with its four options; answer: the letter of the right one; place: "file:line"."""

    text: str
    options: tuple
    answer: str
    place: str


@dataclass(frozen=True)
class Subject:
    """One subject's questions, and solved examples to show before each of them; title: its name in the prompt."""

    name: str
    title: str
    category: str
    questions: list
    examples: list


def read_exam(benchmark, data_dir, few_shot=0, wanted=None):
    """The Subjects of an exam that are there, those of the benchmark's table first and in its order, any others by name.

    few_shot: how many examples each brings along. wanted: names of subjects, None for all. Raises UserError for a
    missing folder or subject, for one whose results could not be told from the summary, for fewer examples than asked
    for, and naming file and line for what read_questions refuses.
    """
    folder, ending = Path(data_dir, benchmark.questions[0]), benchmark.questions[1]
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; unpack {benchmark.source}, and name its folder with --data_dir")
    found = {path.name.removesuffix(ending) for path in folder.glob(f"*{ending}")}
    known = benchmark.known
    order = [name for name in known if name in found] + sorted(found - known.keys())
    for name in wanted or ():
        if name not in found:
            raise UserError(f"--subjects {name!r}: {folder} has {', '.join(order) or 'none'}", exit_code=2)
    if not order:
        raise UserError(f"{folder}: has no <subject>{ending}; {benchmark.source} has them")
    if wanted is None:
        tell_what_differs(benchmark, found)
    subjects = []
    for name in (name for name in order if wanted is None or name in wanted):
        if name.lower() in ("", "summary"):
            raise UserError(f"{folder / (name + ending)}: no name for a subject, whose results are a file; rename it")
        title, category = known.get(name, (name, OTHER))
        questions = read_questions(folder / f"{name}{ending}", benchmark.columns)
        examples = Path(data_dir, benchmark.examples[0], f"{name}{benchmark.examples[1]}")
        subjects.append(Subject(name, title, category, questions, read_examples(examples, benchmark.columns, few_shot)))
    return subjects


def tell_what_differs(benchmark, found):
    """A note for each way in which the subjects `found` are not exactly the benchmark's: their total does not compare
    with others'. An exam of one's own, without any of them, is no such case."""
    known = benchmark.known
    missing, others = [name for name in known if name not in found], sorted(found - known.keys())
    if len(missing) == len(known):
        return
    if missing:
        tell(f"note: {len(missing)} of {benchmark.title}'s {len(known)} subjects are missing: {', '.join(missing)}")
    if others:
        tell(f"note: the totals have subjects that are not {benchmark.title}'s: {', '.join(others)}")


def read_examples(path, columns, count):
    """The first `count` Questions of a file; UserError when it has fewer."""
    examples = read_questions(path, columns)[:count] if count else []
    if len(examples) < count:
        raise UserError(f"{path}: has {len(examples)} examples, fewer than --few_shot {count}")
    return examples


def read_questions(path, columns):
    """The Questions of a CSV file with these columns (question, A, B, C, D, answer; others are ignored).

    Raises UserError, naming the line, for a column that is missing or there twice, a fifth option, a row of another
    length, an empty question or option, an answer that is no letter from A to D, bytes that are not UTF-8, and for a
    file without questions.
    """
    rows, header, questions = iter_csv_rows(path, RowReport()), None, []
    for place, cells, problem in rows:
        if problem:
            raise UserError(f"{place}: {problem}")
        if header is None:
            header = cells
            check_header(header, columns, place)
            continue
        if len(cells) != len(header):
            raise UserError(f"{place}: has {len(cells)} cells but the header {len(header)}; exactly four options fit")
        for column in columns[:-1]:
            if not cells[header.index(column)].strip():
                raise UserError(f"{place}: column {column!r} is empty; complete the question, or remove it")
        text, *options, answer = (cells[header.index(column)] for column in columns)
        if answer.strip() not in tuple(LETTERS):
            raise UserError(f"{place}: the answer is {answer!r}, expected one of {', '.join(LETTERS)}")
        questions.append(Question(text, tuple(options), answer.strip(), place))
    if not questions:
        raise UserError(f"{path}: is empty, it has no question")
    return questions


def check_header(header, columns, place):
    """Raise UserError unless the header names each of `columns` once and no fifth option, which is a single letter."""
    for column in columns:
        if header.count(column) != 1:
            problem = "two columns" if column in header else "no column"
            raise UserError(f"{place}: {problem} {column!r}; columns found: {', '.join(header)}")
    for column in header:
        if re.fullmatch(r"\s*[E-Ze-z]\s*", column):
            raise UserError(
                f"{place}: a fifth option, column {column!r}; only questions with four options can be asked"
            )


def shuffle_options(subjects, seed):
    """The Subjects with the options of each question in another order, which depends on the seed, the subject and the
    question's number alone; the examples stay as they are."""

    def shuffled(question, key):
        order = random.Random(key).sample(range(len(LETTERS)), len(LETTERS))
        answer = LETTERS[order.index(LETTERS.index(question.answer))]
        return replace(question, options=tuple(question.options[index] for index in order), answer=answer)

    return [
        replace(subject, questions=[shuffled(q, f"{seed} {subject.name} {n}") for n, q in enumerate(subject.questions)])
        for subject in subjects
    ]


def question_text(question):
    """A question as it is asked, its options one a line, up to where the letter of the answer follows."""
    options = (f"{letter}. {option}" for letter, option in zip(LETTERS, question.options))
    return "\n".join([question.text, *options, "答案："])


def encode_prompt(tokenizer, title, examples, question, chat):
    """Ids of the prompt whose next token is the answer's letter: with `chat` a conversation in which the examples are
    earlier turns, else a text that begins with <s> as documents do."""
    instruction = INSTRUCTION.format(title)
    if not chat:
        solved = "".join(f"{question_text(example)}{example.answer}\n\n" for example in examples)
        text = f"{instruction}\n{solved}{question_text(question)}"
        return [tokenizer.bos_token_id, *encode_text(tokenizer, text)]
    messages = []
    for example in examples:
        messages += [message("user", question_text(example)), message("assistant", example.answer)]
    messages.append(message("user", question_text(question)))
    messages[0]["content"] = f"{instruction}\n{messages[0]['content']}"
    return render_conversation(tokenizer, messages, add_generation_prompt=True)[0]


def fitting_prompt(tokenizer, subject, question, chat, context):
    """(ids, number of examples) of the prompt with as many examples as the context of so many tokens holds; None for
    the number when the question does not fit even alone."""
    for count in range(len(subject.examples), -1, -1):
        ids = encode_prompt(tokenizer, subject.title, subject.examples[:count], question, chat)
        if len(ids) <= context:
            return ids, count
    return ids, None


def letter_ids(tokenizer):
    """The ids of A, B, C and D. Raises UserError for a tokenizer that needs several tokens for one of them."""
    ids = [encode_text(tokenizer, letter) for letter in LETTERS]
    if any(len(each) != 1 for each in ids):
        raise UserError(f"the tokenizer has no single token for each of {', '.join(LETTERS)}: it cannot sit this exam")
    return [each[0] for each in ids]


def take_exam(model, tokenizer, subjects, chat):
    """Ask every question; returns a dict for each, in order: subject, question, A, B, C, D, answer, prompt (exactly the
    text that was encoded, control tokens included), llm_answer, is_right (1 or 0), p_A, p_B, p_C, p_D, examples (how
    many solved ones the prompt shows: where the context is full fewer than the subject has).

    p_A is the probability that the model gives to the token "A" among all tokens, so the four rarely sum to one; the
    largest is llm_answer. A question that is longer than the model's context is not asked and counts as wrong:
    llm_answer is "" and its p_A to p_D are None; which ones is told on stderr. Raises UserError when none fits.
    """
    from tqdm import tqdm

    context, letters = model.config.max_seq_len, letter_ids(tokenizer)
    install(model.eval())
    results, too_long = [], []
    with tqdm(total=sum(len(subject.questions) for subject in subjects), unit="question", disable=None) as bar:
        for subject in subjects:
            prompts = [fitting_prompt(tokenizer, subject, q, chat, context) for q in subject.questions]
            answers = [None] * len(prompts)
            for count in {count for _, count in prompts} - {None}:  # those with the same examples begin alike
                alike = [index for index, (_, shown) in enumerate(prompts) if shown == count]
                probabilities = letter_probabilities(model, [prompts[index][0] for index in alike], letters, bar.update)
                for index, row in zip(alike, probabilities.tolist()):
                    answers[index] = row
            for question, (ids, count), answer in zip(subject.questions, prompts, answers):
                results.append(result_row(tokenizer, subject, question, ids, answer, count or 0))
                too_long += [question.place] if count is None else []
    if len(too_long) == len(results):
        raise UserError(f"no question fits the model's context of {context} tokens; --max_seq_len can make it longer")
    if too_long:
        places = ", ".join(too_long[:5]) + (", ..." if len(too_long) > 5 else "")
        tell(f"{len(too_long)} questions did not fit the context of {context} tokens, counted as wrong: {places}")
    return results


def result_row(tokenizer, subject, question, ids, probabilities, examples):
    """What take_exam tells about one question; probabilities: of the four letters, None when it did not fit."""
    letter = LETTERS[max(range(len(LETTERS)), key=probabilities.__getitem__)] if probabilities else ""
    return {
        "subject": subject.name,
        "question": question.text,
        **dict(zip(LETTERS, question.options)),
        "answer": question.answer,
        "prompt": tokenizer.decode(ids, clean_up_tokenization_spaces=False),
        "llm_answer": letter,
        "is_right": int(letter == question.answer),
        **{f"p_{letter}": p for letter, p in zip(LETTERS, probabilities or [None] * len(LETTERS))},
        "examples": examples,
    }


@torch.inference_mode()
def letter_probabilities(model, prompts, letters, on_batch=lambda count: None):
    """Probability of each of the ids `letters` as the next token after each prompt (lists of ids), float32 [prompts, 4].

    What all prompts begin with, the instruction and the examples, is computed once; the batches go on from there.
    on_batch(count) is called after each. Raises UserError when the model's output is not finite.
    """
    shared = min(len(os.path.commonprefix(prompts)), min(map(len, prompts)) - 1)
    prefix = KVCache(model.config, 1, shared, model.dtype, model.device)
    if shared:
        model(torch.tensor([prompts[0][:shared]], device=model.device), kv_cache=prefix, logits_to_keep=1)
    result = torch.empty(len(prompts), len(letters))
    for rows in length_batches([len(prompt) - shared for prompt in prompts], tokens_per_batch(model.device)):
        ids = padded([prompts[row][shared:] for row in rows]).to(model.device)
        last = torch.tensor([len(prompts[row]) - shared - 1 for row in rows], device=model.device)
        cache = KVCache(model.config, len(rows), shared + ids.shape[1], model.dtype, model.device)
        for mine, theirs in zip((*cache.keys, *cache.values), (*prefix.keys, *prefix.values)):
            mine[:, :, :shared] = theirs
        cache.advance(shared)
        logits = model(ids, kv_cache=cache, padding_side="right", logits_to_keep=last[:, None]).logits[:, 0]
        result[rows] = logits.float().softmax(dim=-1)[:, letters].cpu()
        on_batch(len(rows))
    if not result.isfinite().all():
        raise UserError("the model's output is not finite: its weights are damaged, or --dtype is too narrow for them")
    return result
