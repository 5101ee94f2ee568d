"""What the scripts that try out a trained model share: questions from files, answers in batches, accuracy by task."""

import collections
import dataclasses
import json

from model.demo.world import score_answer
from model.errors import UserError
from model.files import open_binary


def read_questions(path, question):
    """The rows of a .jsonl file, dicts with the text field `question`, or the lines of a text file as such rows.

    Raises UserError naming file and line for a row that cannot be read, and for a file without any question.
    """
    rows = []
    with open_binary(path) as handle:
        for number, line in enumerate(handle, start=1):
            if line.strip():
                rows.append(parse_question(line, question, f"{path}:{number}", ".jsonl" in str(path)))
    if not rows:
        raise UserError(f"{path}: no question in it; write one a line")
    return rows


def parse_question(line, question, place, is_json):
    try:
        text = line.decode("utf-8-sig").strip()
        row = json.loads(text) if is_json else {question: text}
    except UnicodeDecodeError:
        raise UserError(f"{place}: not UTF-8; convert the file, or remove the line") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON ({error.msg}); expected one object a line") from None
    if not isinstance(row, dict) or not isinstance(row.get(question), str) or not row[question].strip():
        raise UserError(f'{place}: has no text "{question}"')
    answers = row.get("answer", "")
    if not all(isinstance(answer, str) for answer in (answers if isinstance(answers, list) else [answers])):
        raise UserError(f'{place}: "answer" must be text or a list of texts')
    history = row.get("history") or []
    if not isinstance(history, list) or not all(is_exchange(pair) for pair in history):
        raise UserError(f'{place}: "history" must be a list of [question, answer]')
    return row


def check_prompts(texts):
    """Raise UserError for a text of --prompt that says nothing or is not UTF-8."""
    for text in texts:
        if not text.strip():
            raise UserError("--prompt is empty: give the model a text", exit_code=2)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"--prompt {ascii(text)}: not UTF-8, check the terminal's encoding", exit_code=2)


def is_exchange(pair):
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def measure_accuracy(engine, rows, prompts, parameters, is_right=score_answer):
    """Answer `prompts` (token ids) greedily, together; returns {"accuracy", "questions", "tasks": {task: accuracy}}.

    Row i's answer is right when is_right(rows[i], text); rows with a "task" are also counted by task.
    """
    from tqdm import tqdm

    greedy = dataclasses.replace(parameters, temperature=0.0)
    with tqdm(total=len(prompts), unit="question", disable=None) as bar:
        requests = engine.generate(prompts, greedy, on_finish=lambda request: bar.update())
    right, asked = collections.Counter(), collections.Counter()
    for row, request in zip(rows, requests):
        for task in {"all", row.get("task", "all")}:
            asked[task] += 1
            right[task] += bool(is_right(row, request.text))
    tasks = {task: right[task] / asked[task] for task in asked if task != "all"}
    return {"accuracy": right["all"] / len(rows), "questions": len(rows), "tasks": tasks}


def print_accuracy(result, as_json):
    """A line per task and one for all; with as_json one more line, the whole result as JSON."""
    for task, accuracy in sorted(result["tasks"].items()):
        print(f"{accuracy:7.1%}  {task}")
    print(f"{result['accuracy']:7.1%}  of {result['questions']} questions answered right")
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
