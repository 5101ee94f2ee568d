"""Whether a reply is right, judged by what its row says, and how many of a file's replies are."""

import collections
import dataclasses
import json
import re
import unicodedata

from model.errors import UserError, tell

NUMBER = re.compile(r"(?<![a-z\d])(?<!\d\.)\d+(?:\.\d+)?")  # not the 2 of H2O
WHOLE_START = r"(?<![A-Za-z](?=[A-Za-z]))(?<!\d(?=\d))(?<!\d\.(?=\d))"  # not in the middle of a word or number
WHOLE_END = r"(?![A-Za-z])(?!\.?\d)"
IDLE_BLANK = re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])")  # any but that between two words or numbers


def score_answer(row, reply):
    """Whether `reply` contains every text of row["answer"] (a text or a list of them) and none of row["others"].

    Names are matched whole and longest first: He is not H, and 巴西利亚 not 巴西. So one of the "others" does not count
    where it is part of a longer key or of row["entity"], which the question is about. With row["one_number"] a reply
    with another number than the key's is a guess and wrong; those of row["q"] may be repeated. Width, case and spacing
    make no difference. All but "answer" may be missing.
    """
    keys = {normalise(key) for key in ([row["answer"]] if isinstance(row["answer"], str) else row["answer"])}
    entity = normalise(row.get("entity") or "")
    others = {normalise(text) for text in row.get("others") or ()} - keys - {entity}
    reply = normalise(reply)
    found = mentions(reply, (keys | others | {entity}) - {""})
    if not keys <= found or found & others:
        return False
    if not row.get("one_number"):
        return True
    expected = {number for key in keys for number in NUMBER.findall(key)}
    said, asked = (collections.Counter(NUMBER.findall(text)) for text in (reply, normalise(row["q"])))
    return said.keys() == expected or (said - asked).keys() == expected


def normalise(text):
    """Full-width forms to half-width, lower case; no white space except one blank between two words of letters or digits."""
    return IDLE_BLANK.sub("", " ".join(unicodedata.normalize("NFKC", text).casefold().split()))


def mentions(text, names):
    """The `names` in `text`, read from left to right, longest first; a run of letters or digits is never split."""
    longest_first = sorted(names, key=lambda name: (-len(name), name))
    pattern = "|".join(re.escape(name) + WHOLE_END * bool(re.search("[A-Za-z0-9]$", name)) for name in longest_first)
    return set(re.findall(f"{WHOLE_START}(?:{pattern})", text))


def answer_together(engine, rows, prompts, parameters):
    """The finished Request of each of `prompts` (token ids), all answered together; None for one that the engine refuses,
    which is told on stderr with its place.

    rows: (place, row) for each prompt; one with an "answer" is answered greedily, the others by `parameters`. Raises
    UserError when the engine fails: that is no answer, right or wrong.
    """
    from tqdm import tqdm

    greedy = dataclasses.replace(parameters, temperature=0.0)
    asked, requests = [], [None] * len(prompts)
    for index, (place, row) in enumerate(rows):
        try:
            engine.check_prompt(prompts[index])
            asked.append(index)
        except UserError as error:
            tell(f"{place}: {error}; {'counted as wrong' if 'answer' in row else 'not answered'}")
    with tqdm(total=len(asked), unit="question", disable=None) as bar:
        finished = engine.generate(
            [prompts[index] for index in asked],
            [greedy if "answer" in rows[index][1] else parameters for index in asked],
            on_finish=lambda request: bar.update(),
        )
    for index, request in zip(asked, finished):
        if request.finish_reason == "error":
            raise UserError(f"{rows[index][0]}: {request.error}")
        requests[index] = request
    return requests


def measure_accuracy(engine, rows, prompts, parameters, is_right=score_answer):
    """Answer `prompts` (token ids) greedily, together; returns {"accuracy", "questions", "tasks": {task: accuracy}}.

    rows: (place, row) for each prompt. An answer is right when is_right(row, text); rows with a "task" are also counted
    by task; what answer_together leaves unanswered is wrong. Raises what that does.
    """
    requests = answer_together(engine, rows, prompts, parameters)
    right = [request is not None and bool(is_right(row, request.text)) for (_, row), request in zip(rows, requests)]
    by_task = collections.defaultdict(list)
    for (_, row), is_one in zip(rows, right):
        if row.get("task"):
            by_task[row["task"]].append(is_one)
    tasks = {task: sum(some) / len(some) for task, some in by_task.items()}
    return {"accuracy": sum(right) / len(right), "questions": len(right), "tasks": tasks}


def print_accuracy(result, as_json):
    """A line per task and one for all; with as_json one more line, the whole result as JSON."""
    for task, accuracy in sorted(result["tasks"].items()):
        print(f"{accuracy:7.1%}  {task}")
    print(f"{result['accuracy']:7.1%}  of {result['questions']} questions answered right")
    if as_json:
        print(json.dumps(result, ensure_ascii=False))
