"""What an exam's answers say: totals, their uncertainty, a verdict; printed, and written as tables and a chart."""

import contextlib
import csv
import json
import math
import tempfile
from pathlib import Path

import pandas as pd

from model.errors import UserError
from model.evaluation.subjects import CHANCE, LETTERS
from model.files import atomic_files

Z_95 = 1.959964  # the normal distribution's 97.5 % quantile


def wilson_interval(correct, total, z=Z_95):
    """(lowest, highest) share of right answers that `correct` of `total` are compatible with: Wilson's score interval
    (1927, J. Am. Stat. Assoc. 22, 209-212), here of 95 %."""
    share = correct / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def verdict(correct, total):
    """What `correct` of `total` answers say in words: whether guessing's 25 % lie in the interval."""
    low, high = wilson_interval(correct, total)
    if low > CHANCE:
        return "better than guessing"
    return "worse than guessing" if high < CHANCE else "not distinguishable from guessing"


def count_right(rows, by):
    """DataFrame with index `by` in order of appearance and the columns correct, questions, accuracy; rows: DataFrame
    with is_right."""
    table = rows.groupby(by, sort=False)["is_right"].agg(correct="sum", questions="count")
    return table.assign(accuracy=table["correct"] / table["questions"])


def summarise(answers, subjects):
    """(summary as plain values, DataFrame with a row per subject) of what take_exam returned for these Subjects.

    A question that did not fit the context counts as wrong in every accuracy. But it was not asked, so that it says
    nothing of what the model knows: interval_95, verdict and mean_examples are of the questions that were.
    """
    rows = pd.DataFrame(answers)
    rows["category"] = rows["subject"].map({subject.name: subject.category for subject in subjects})
    table = count_right(rows, "subject")
    table.insert(0, "name", [subject.title for subject in subjects])
    table.insert(1, "category", [subject.category for subject in subjects])
    correct, total = int(rows["is_right"].sum()), len(rows)
    asked = rows[rows["llm_answer"] != ""]
    wanted = asked["subject"].map({subject.name: len(subject.examples) for subject in subjects})
    commonest = rows["answer"].value_counts().sort_index().idxmax()
    summary = {
        "accuracy": correct / total,
        "correct": correct,
        "questions": total,
        "asked": len(asked),
        "not_fitting": total - len(asked),
        "interval_95": list(wilson_interval(correct, len(asked))),
        "verdict": verdict(correct, len(asked)),
        "chance": CHANCE,
        "commonest_letter": commonest,
        "commonest_letter_accuracy": float((rows["answer"] == commonest).mean()),
        "letters_answered": {letter: int((asked["llm_answer"] == letter).sum()) for letter in LETTERS},
        "mean_examples": float(asked["examples"].mean()),
        "with_fewer_examples": int((asked["examples"] < wanted).sum()),
        "by_category": count_right(rows, "category").to_dict("index"),
    }
    return summary, table


def prompts_used(settings):
    """How the questions were asked, in words, from prompt_format, few_shot and shuffle_options."""
    seed = settings["shuffle_options"]
    shuffled = "" if seed is None else f", options shuffled by seed {seed}"
    examples = f"up to {settings['few_shot']} examples" if settings["few_shot"] else "no examples"
    return f"{settings['prompt_format']} prompts, {examples}{shuffled}"


def of_the_asked(summary):
    """What interval and verdict are of, in words: "" when every question was asked."""
    return f" of the {summary['asked']} asked" if summary["not_fitting"] else ""


def summary_lines(summary):
    """The lines under the table."""
    low, high = summary["interval_95"]
    lines = [
        f"{name:16}{counts['correct']}/{counts['questions']}  {counts['accuracy']:.2%}"
        for name, counts in summary["by_category"].items()
    ]
    lines.append(f"总题数: {summary['questions']}  总正确数: {summary['correct']}  总正确率: {summary['accuracy']:.2%}")
    if summary["few_shot"]:
        fewer = f"{summary['with_fewer_examples']} questions had fewer than {summary['few_shot']}"
        lines.append(f"examples shown: {summary['mean_examples']:.2f} in the mean; {fewer}")
    if summary["not_fitting"]:
        of_asked = f"{summary['correct'] / summary['asked']:.2%} of the {summary['asked']} asked are right"
        lines.append(f"not asked, longer than the context, counted as wrong: {summary['not_fitting']}; {of_asked}")
    asked = of_the_asked(summary)
    return [
        *lines,
        f"95 % interval{asked}: {low:.2%} to {high:.2%}, guessing {summary['chance']:.2%}, always answering "
        f"{summary['commonest_letter']} {summary['commonest_letter_accuracy']:.2%}",
        "answered: " + ", ".join(f"{letter} {count}" for letter, count in summary["letters_answered"].items()),
        f"verdict{asked}: {summary['verdict']}",
    ]


def print_result(summary, table):
    """The table by subject, right answers of all and accuracy, and the lines under it."""
    shown = table[["name"]].assign(
        right=table["correct"].astype(str) + "/" + table["questions"].astype(str),
        accuracy=table["accuracy"].map("{:.1%}".format),
    )
    with pd.option_context("display.unicode.east_asian_width", True):
        print(shown.rename_axis(None).to_string())
    print("\n".join(["", *summary_lines(summary)]))


@contextlib.contextmanager
def results_folder(directory, data_dir):
    """A context that gives the folder `directory` as a Path, there and open to writing. On an error it goes again
    if it was not there before. Raises UserError when it cannot be, is a file, or lies in the exam's `data_dir`."""
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--results_dir {directory}: is not a folder", exit_code=2)
    if directory.resolve().is_relative_to(Path(data_dir).resolve()):
        reason = f"lies in the exam's folder {data_dir}, whose questions it could replace"
        raise UserError(f"--results_dir {directory}: {reason}; choose another", exit_code=2)
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]  # the innermost first
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
        except OSError as error:
            raise UserError(f"--results_dir {directory}: cannot be written to ({error.strerror})") from None
        yield directory
    except BaseException:
        with contextlib.suppress(OSError):  # not empty: somebody else's by now
            for folder in made:
                folder.rmdir()
        raise


def write_results(directory, summary, table, answers):
    """Write <subject>.csv for each subject, summary.csv, summary.json, summary.md and summary.png into the folder
    `directory`, a Path, all or none. What an earlier exam left there is replaced, subjects that this one lacks go."""
    rows = pd.DataFrame(answers)
    earlier = result_names(directory / "summary.csv")
    with atomic_files() as create:
        written = set()

        def text_file(name):
            written.add(name)
            return create(directory / name, "w", encoding="utf-8", newline="")

        for subject, part in rows.groupby("subject", sort=False):
            part.drop(columns="subject").to_csv(text_file(f"{subject}.csv"), index=False, lineterminator="\n")
        table.to_csv(text_file("summary.csv"), lineterminator="\n")
        json.dump(summary, text_file("summary.json"), ensure_ascii=False, indent=2)
        text_file("summary.md").write(markdown(summary, table))
        draw_chart(create(directory / "summary.png"), summary, table)
    for name in earlier - written:
        (directory / name).unlink(missing_ok=True)


def result_names(path):
    """Names of the files of subjects that belong to a summary.csv of write_results, none where `path` is not one."""
    if not path.is_file():
        return set()
    with open(path, encoding="utf-8", errors="replace", newline="") as handle:
        header, *rows = [*csv.reader(handle)] or [[]]
    if header[:3] != ["subject", "name", "category"]:
        return set()
    return {f"{row[0]}.csv" for row in rows if row and Path(row[0]).name == row[0]}


def markdown(summary, table):
    """The summary as Markdown: its lines, then the table by subject."""
    lines = [f"# {summary['benchmark']}: {summary['checkpoint']}", "", f"- {prompts_used(summary)}"]
    lines += [f"- {line}" for line in summary_lines(summary)]
    lines += ["", "| subject | name | category | right | accuracy |", "|---|---|---|---|---|"]
    for subject in table.itertuples():
        right = f"{subject.correct}/{subject.questions}"
        lines.append(f"| {subject.Index} | {subject.name} | {subject.category} | {right} | {subject.accuracy:.2%} |")
    return "\n".join(lines) + "\n"


def draw_chart(handle, summary, table):
    """Accuracy of each subject as a bar, and the line of guessing, as a PNG image. Labels are the subjects' English
    names: matplotlib's own font has no Chinese characters."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2 + 0.22 * len(table)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.barh(table.index, table["accuracy"], color="#4c78a8")
    axes.axvline(summary["chance"], color="#e45756", linestyle="--", label=f"guessing, {summary['chance']:.0%}")
    low, high = summary["interval_95"]
    asked = of_the_asked(summary)
    label = f"all: {summary['accuracy']:.1%}, 95 % interval{asked}"
    axes.axvspan(low, high, color="#f2cf5b", alpha=0.5, label=label)
    title = f"{summary['benchmark']}\nverdict{asked}: {summary['verdict']}"
    axes.set(xlim=(0, 1), xlabel="share of right answers", title=title)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(handle, format="png", dpi=120)
