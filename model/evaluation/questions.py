"""Questions from files and from the command line, checked before a model is loaded."""

from pathlib import Path

from model.data.conversations import BadRow, parse_history
from model.data.rows import iter_json_lines, read_lines
from model.errors import UserError

# Of what a pretrained model goes on from, and of what a chat model is asked, where nothing else is given.
OPENINGS = ("中国的首都是", "长江是", "太阳从", "世界上最高的山峰是", "水是由", "从前，有一个小村庄，", "读书的好处是")
QUESTIONS = (
    "你知道长江吗？", "第一颗人造卫星是哪个国家发射的？", "你知道泰山在哪里吗？", "世界上最高的山峰是什么？",
    "万有引力是谁提出的？", "你知道大熊猫的主要食物是什么吗？", "海水为什么是咸的？", "一星期有多少天？",
)  # fmt: skip


def read_questions(path, question):
    """[("file:line", row), ...] of a .jsonl file, dicts with the text field `question`, or of the lines of a text file.

    Raises UserError naming file and line for a row that cannot be read, and for a file without any question.
    """
    rows = []
    for place, row, problem in iter_json_lines(path) if ".jsonl" in Path(path).suffixes else text_lines(path, question):
        if problem:
            way_out = "convert the file, or remove the line" if problem == "not UTF-8" else "expected one object a line"
            raise UserError(f"{place}: {problem}; {way_out}")
        check_row(row, question, place)
        rows.append((place, row))
    if not rows:
        raise UserError(f"{path}: no question in it; write one a line")
    return rows


def text_lines(path, question):
    """The lines of a text file that are not blank, in the form of iter_json_lines."""
    for number, line in read_lines(path):
        place = f"{path}:{number}"
        try:
            if text := line.decode("utf-8").strip():
                yield place, {question: text}, None
        except UnicodeDecodeError:
            yield place, None, "not UTF-8"


def check_row(row, question, place):
    """Raise UserError for a field that cannot be asked or judged by; all but `question` may be missing."""
    if not is_text(row.get(question)):
        raise UserError(f'{place}: has no text "{question}"')
    answers = row.get("answer", row[question])
    if not is_text(answers) and not (answers and is_list_of(is_text, answers)):
        raise UserError(f'{place}: "answer" must be text or a list of texts')
    if not is_list_of(is_text, row.get("others") or []):
        raise UserError(f'{place}: "others" must be a list of texts')
    try:
        parse_history(row.get("history"))
    except BadRow:
        raise UserError(f'{place}: "history" must be a list of [question, answer]') from None
    for field in ("task", "entity"):
        if not isinstance(row.get(field) or "", str):
            raise UserError(f'{place}: "{field}" must be text')


def answer_each(rows, answer):
    """answer(row) for each (place, row). What a UserError says of one is kept until all others are answered; then the
    first of them is raised again with its place."""
    problems = []
    for place, row in rows:
        try:
            answer(row)
        except UserError as error:
            print("(not answered)")
            problems.append((f"{place}: {error}", error.exit_code))
    if problems:
        first, exit_code = problems[0]
        count = f"{len(problems)} of {len(rows)} questions not answered; " if len(rows) > 1 else ""
        raise UserError(count + first, exit_code)


def is_text(value):
    return isinstance(value, str) and bool(value.strip())


def is_list_of(is_item, value):
    return isinstance(value, list) and all(map(is_item, value))


def check_prompts(texts):
    """Raise UserError for a text of --prompt that says nothing or is not UTF-8."""
    for text in texts:
        if not text.strip():
            raise UserError("--prompt is empty: give the model a text", exit_code=2)
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise UserError(f"--prompt {ascii(text)}: not UTF-8, check the terminal's encoding", exit_code=2)
