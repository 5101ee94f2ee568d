"""A report on several checkpoints: their answers to the same questions side by side, measured, as Markdown and as HTML."""

import dataclasses
import html
import platform
import re
import statistics
from pathlib import Path

import torch
import transformers

from model.errors import UserError, tell
from model.evaluation.scoring import answer_together, score_answer
from model.files import atomic_files
from model.inference.chat import chat_prompt
from model.inference.open import open_engine

NOTES = """Repetition is seq-rep-4 (Welleck et al. 2019, arXiv 1908.04319): the share of an answer's runs of four tokens \
that occurred earlier in it. It and the lengths are means over the answers, the end-of-turn token not counted. Ends by \
itself: the share of answers that the model ended, rather than --max_new_tokens or the context. Each question is asked \
by itself, all of them with the same seed; one whose right answer is known is answered greedily. A checkpoint answers \
all its questions in one batch: in bfloat16 and float16 an answer asked for alone can differ by rounding."""

STYLE = """:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; margin: 1em auto; padding: 0 1em; max-width: 90em }
.scroll { overflow-x: auto }
table { border-collapse: collapse; margin: 1em 0 }
th, td { border: 1px solid #888; padding: .4em .6em; text-align: left; vertical-align: top; white-space: pre-wrap;
  overflow-wrap: break-word; min-width: 5em; max-width: 30em }
.wide th, .wide td { min-width: 16em }
small { display: block; opacity: .75 }"""


@dataclasses.dataclass
class Column:
    """One checkpoint's part of the report. Of each question: the finished Request (None: the engine refused it), whether
    it is right (None: nobody knows), the judge's Rating (None: not judged)."""

    path: str
    description: str
    requests: list
    right: list
    ratings: list


def report_paths(path):
    """The two files of a report, [FILE.md, FILE.html], whichever of them `path` names. Raises UserError."""
    path = Path(path)
    if path.suffix not in (".md", ".html"):
        raise UserError(f"--report {path}: name a file that ends in .md or .html; both are written", exit_code=2)
    return [path.with_suffix(suffix) for suffix in (".md", ".html")]


def write_report(paths, several, rows, histories, parameters, source, judge=None):
    """Answer `rows` with each checkpoint and write the files of report_paths; prints the summary.

    several: InferenceSettings of each checkpoint. rows: (place, row) of read_questions; histories: the messages before
    each. source: where the questions are from. judge: a Judge, if there is one. Raises UserError, and OSError where
    nothing can be written, and then leaves no file behind.
    """
    for settings in several:  # before the others have answered for minutes
        if settings.checkpoint and not Path(settings.checkpoint).exists():
            raise UserError(f"{settings.checkpoint}: no such checkpoint")
    with atomic_files() as create:
        markdown, page = [create(path, "w", encoding="utf-8", errors="replace", newline="\n") for path in paths]
        columns = [answer_questions(settings, rows, histories, parameters) for settings in several]
        if judge:
            rate_answers(judge, columns, rows, histories)
        facts = run_facts(several[0], parameters, source, judge)
        parts = compose(columns, facts, [row for _, row in rows], histories)
        markdown.write(to_markdown(parts))
        page.write(to_html(parts))
    print("\n" + markdown_table(*summary(columns)) + "\n" + " and ".join(map(str, paths)) + " written")


def answer_questions(settings, rows, histories, parameters):
    """The Column of one checkpoint, which is in memory only meanwhile."""
    engine, path = open_engine(settings)
    print(f"{path}: {engine.description}", flush=True)
    prompts = [chat_prompt(engine, history, row["q"], parameters) for history, (_, row) in zip(histories, rows)]
    requests = answer_together(engine, rows, prompts, parameters)
    right = [
        (request is not None and score_answer(row, request.text)) if "answer" in row else None
        for (_, row), request in zip(rows, requests)
    ]
    return Column(str(path), engine.description, requests, right, [None] * len(rows))


def rate_answers(judge, columns, rows, histories):
    """Fill in every Column's ratings. A reply without a valid score is told on stderr; raises UserError when none has one,
    and what Judge.rate does."""
    from tqdm import tqdm

    answered = [(column, index) for column in columns for index, request in enumerate(column.requests) if request]
    for column, index in tqdm(answered, unit="rating", disable=None):
        place, row = rows[index]
        rating = column.ratings[index] = judge.rate(row, histories[index], column.requests[index].text)
        if rating.score is None:
            asked = f"{column.path}, {place}, {row['q'][:40]!r}"
            tell(f"{asked}: no score from 1 to 10 in the judge's reply {rating.reason[:80]!r}")
    if answered and not any(column.ratings[index].score for column, index in answered):
        raise UserError(f"--judge_model {judge.model}: not one valid score; choose a model that can follow the format")


def repetition(token_ids, n=4):
    """Share of the runs of `n` tokens that occurred earlier in the answer: seq-rep-n, 1 - distinct / all (Welleck et al.
    2019, arXiv 1908.04319, section 6). 0 for an answer shorter than that."""
    grams = [tuple(token_ids[start : start + n]) for start in range(len(token_ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def summary(columns):
    """(header, rows) of the table with a row for each Column."""
    header = ["checkpoint", "model", "answered", "ends by itself", "repetition", "mean tokens", "mean characters"]
    with_answers = any(one is not None for column in columns for one in column.right)
    judged = any(column.ratings != [None] * len(column.ratings) for column in columns)
    table = []
    for column in columns:
        answers = [request for request in column.requests if request]
        known = [one for one in column.right if one is not None]
        scores = [rating.score for rating in column.ratings if rating and rating.score is not None]
        line = [
            column.path,
            column.description,
            f"{len(answers)} of {len(column.requests)}",
            mean((request.finish_reason == "stop" for request in answers), ".0%"),
            mean((repetition(request.token_ids) for request in answers), ".1%"),
            mean((len(request.token_ids) for request in answers), ".1f"),
            mean((len(request.text) for request in answers), ".1f"),
        ]
        line += [f"{mean(known, '.1%')} of {len(known)}"] * with_answers
        line += [f"{mean(scores, '.1f')} ({len(scores)} of {len(answers)} rated)"] * judged
        table.append(line)
    return header + ["right"] * with_answers + ["judge, 1 to 10"] * judged, table


def mean(values, form):
    """The mean as text, a dash when there is nothing to take it of."""
    values = list(map(float, values))
    return format(statistics.fmean(values), form) if values else "–"


def run_facts(settings, parameters, source, judge):
    """[name, value] rows: what the answers depend on besides the checkpoint."""
    facts = [["questions", source]]
    facts += [
        [field.name, getattr(parameters, field.name)] for field in dataclasses.fields(parameters) if field.metadata
    ]
    facts += [["rope_scaling", settings.rope_scaling], ["compile", settings.compile]]
    facts += [["Python", platform.python_version()], ["PyTorch", torch.__version__]]
    facts += [["transformers", transformers.__version__]]
    if judge:
        blind = "it sees a question and one answer at a time, not which checkpoint wrote it"
        facts += [["judge", f"{judge.model} at {judge.url}; {blind}"]]
    return [[name, "none" if value is None else str(value)] for name, value in facts]


def compose(columns, facts, rows, histories):
    """The report as a list of parts: ("heading", level, text), ("text", text) or ("table", header, rows). A cell is text,
    or (text, note)."""
    answers = []
    for index, (row, history) in enumerate(zip(rows, histories)):
        asked = "\n".join([*(f"{message['role']}: {message['content']}" for message in history), row["q"]])
        answers.append([(asked, expected(row)), *(answer_cell(column, index) for column in columns)])
    return [
        ("heading", 1, "MiniMind: answers side by side"),
        ("table", *summary(columns)),
        ("text", NOTES),
        ("heading", 2, "Settings"),
        ("table", ["setting", "value"], facts),
        ("heading", 2, "Questions and answers"),
        ("table", ["question", *(column.path for column in columns)], answers),
    ]


def expected(row):
    """What is known of a question's right answer, "" if nothing."""
    known = row.get("answer") or []
    return f"expected: {known if isinstance(known, str) else '、'.join(known)}" if known else ""


def answer_cell(column, index):
    """(text, note) of one answer."""
    request, right, rating = column.requests[index], column.right[index], column.ratings[index]
    notes = [] if right is None else ["✓ right" if right else "✗ wrong"]
    if request is None:
        return "", "; ".join([*notes, "not answered: longer than the context"])
    notes.append("ended by itself" if request.finish_reason == "stop" else f"cut at {request.limit} tokens")
    if rating:
        score = "no valid score" if rating.score is None else f"{rating.score:g} of 10"
        notes.append(f"judge: {score}, {rating.reason[:200]}")
    return request.text, "; ".join(notes)


def clean(text):
    """`text` with line ends as \\n and no other control characters, which neither format can hold."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", re.sub(r"\r\n?", "\n", text))


def to_markdown(parts):
    """The parts as GitHub-flavoured Markdown."""
    written = []
    for kind, *content in parts:
        if kind == "table":
            written.append(markdown_table(*content))
        elif kind == "heading":
            written.append(f"{'#' * content[0]} {markdown_text(content[1])}\n")
        else:
            written.append(markdown_text(*content) + "\n")
    return "\n".join(written)


def markdown_table(header, rows):
    lines = [map(markdown_cell, header), ["---"] * len(header), *(map(markdown_cell, row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown_cell(cell):
    text, note = cell if isinstance(cell, tuple) else (cell, "")
    shown = [markdown_text(text)] * bool(text) + [f"<sub>{markdown_text(note)}</sub>"] * bool(note)
    return "<br>".join(shown)


def markdown_text(text):
    """`text` as one line that shows it as it stands: nothing in it is markup, a table's end or HTML."""
    escaped = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(clean(text), quote=False))
    return escaped.replace("\n", "<br>")


def to_html(parts):
    """The parts as one self-contained page, without scripts or anything from elsewhere."""
    written = []
    for kind, *content in parts:
        if kind == "table":
            written.append(html_table(*content))
        elif kind == "heading":
            written.append(f"<h{content[0]}>{html_text(content[1])}</h{content[0]}>")
        else:
            written.append(f"<p>{html_text(*content)}</p>")
    title = html_text(next(content[-1] for kind, *content in parts if kind == "heading"))
    return f"""<!DOCTYPE html>
<html lang="zh">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{STYLE}
</style>
{chr(10).join(written)}
</html>
"""


def html_table(header, rows):
    head = "".join(f'<th scope="col">{html_text(name)}</th>' for name in header)
    body = "\n".join(f"<tr>{''.join(map(html_cell, row))}</tr>" for row in rows)
    wide = " wide" if any(isinstance(cell, tuple) for row in rows for cell in row) else ""
    return f'<div class="scroll{wide}"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def html_cell(cell):
    text, note = cell if isinstance(cell, tuple) else (cell, "")
    return f"<td>{html_text(text)}{f'<small>{html_text(note)}</small>' if note else ''}</td>"


def html_text(text):
    return html.escape(clean(text))
