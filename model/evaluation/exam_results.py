"""What an exam's answers say: totals, their uncertainty, a verdict; printed, and written as tables and a chart."""

import json
import math

import pandas as pd

from model.evaluation.subjects import CHANCE
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
    """(summary as plain values, DataFrame with a row per subject) of what take_exam returned for these Subjects."""
    rows = pd.DataFrame(answers)
    rows["category"] = rows["subject"].map({subject.name: subject.category for subject in subjects})
    table = count_right(rows, "subject")
    table.insert(0, "name", [subject.title for subject in subjects])
    table.insert(1, "category", [subject.category for subject in subjects])
    correct, total = int(rows["is_right"].sum()), len(rows)
    commonest = rows["answer"].value_counts().sort_index().idxmax()
    summary = {
        "accuracy": correct / total,
        "correct": correct,
        "questions": total,
        "interval_95": list(wilson_interval(correct, total)),
        "verdict": verdict(correct, total),
        "chance": CHANCE,
        "commonest_letter": commonest,
        "commonest_letter_accuracy": float((rows["answer"] == commonest).mean()),
        "not_fitting": int((rows["llm_answer"] == "").sum()),
        "by_category": count_right(rows, "category").to_dict("index"),
    }
    return summary, table


def prompts_used(settings):
    """How the questions were asked, in words, from prompt_format, few_shot and shuffle_options."""
    seed = settings["shuffle_options"]
    shuffled = "" if seed is None else f", options shuffled by seed {seed}"
    return f"{settings['prompt_format']} prompts, {settings['few_shot']} examples{shuffled}"


def summary_lines(summary):
    """The lines under the table."""
    low, high = summary["interval_95"]
    lines = [
        f"{name:16}{counts['correct']}/{counts['questions']}  {counts['accuracy']:.2%}"
        for name, counts in summary["by_category"].items()
    ]
    return [
        *lines,
        f"总题数: {summary['questions']}  总正确数: {summary['correct']}  总正确率: {summary['accuracy']:.2%}",
        f"95 % interval {low:.2%} to {high:.2%}, guessing {summary['chance']:.2%}, always answering "
        f"{summary['commonest_letter']} {summary['commonest_letter_accuracy']:.2%}",
        f"verdict: {summary['verdict']}",
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


def write_results(directory, summary, table, answers):
    """Write <subject>.csv for each subject, summary.csv, summary.json, summary.md and summary.png, all or none; what
    an earlier exam left under the same names is replaced."""
    rows = pd.DataFrame(answers)
    with atomic_files() as create:

        def text_file(name):
            return create(directory / name, "w", encoding="utf-8", newline="")

        for subject, part in rows.groupby("subject", sort=False):
            part.drop(columns="subject").to_csv(text_file(f"{subject}.csv"), index=False, lineterminator="\n")
        table.to_csv(text_file("summary.csv"), lineterminator="\n")
        json.dump(summary, text_file("summary.json"), ensure_ascii=False, indent=2)
        text_file("summary.md").write(markdown(summary, table))
        draw_chart(create(directory / "summary.png"), summary, table)


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
    axes.axvspan(low, high, color="#f2cf5b", alpha=0.5, label=f"all: {summary['accuracy']:.1%}, 95 % interval")
    axes.set(xlim=(0, 1), xlabel="share of right answers", title=f"{summary['benchmark']}: {summary['verdict']}")
    axes.margins(y=0.01)
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(handle, format="png", dpi=120)
