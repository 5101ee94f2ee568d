"""The demo's files: the world as raw corpora, these made into what every stage trains on, held-out tests and the exam.

It replaces what it wrote itself and nothing else. A copy of every file that other data could stand in place of is kept
in <output_dir>/raw/demo_copies; a place that holds anything but the bytes of its copy is not the demo's. New files are
made in raw/demo_unfinished and moved when all are there, so an interrupted run, even by kill -9, can be repeated.
"""

import csv
import filecmp
import itertools
import json
import os
import shutil
from pathlib import Path

from model.data.corpus import process_corpus
from model.data.filters import ConversationRules, PreferenceRules, PretrainRules
from model.demo.world import DEFAULT_DIRECTORY, LETTERS, DemoWorld
from model.errors import UserError
from model.files import atomic_write


class OneFileRules(ConversationRules):
    """Single exchanges and longer conversations go to the same file: stage 4 reads one."""

    frames = ConversationRules.frames[:1]

    def convert(self, record):
        return super().convert(record)._replace(output=0)


# Kind of training data -> the raw files it is made from, the files that are made, by which rules.
TRAINING_FILES = {
    "pretrain": (["pretrain"], ["pretrain_data.csv"], PretrainRules),
    "sft": (["sft_single", "sft_multi"], ["sft_data_single.csv", "sft_data.csv"], ConversationRules),
    "identity": (["sft_identity"], ["lora_identity.csv"], OneFileRules),
    "dpo": (["dpo"], ["dpo/train_data.json"], PreferenceRules),
}
# File -> the rows of a world that it holds.
HELDOUT_FILES = {
    "heldout/facts.jsonl": DemoWorld.heldout_facts,
    "heldout/multi_turn.jsonl": DemoWorld.heldout_multi_turns,
    "heldout/identity.jsonl": DemoWorld.heldout_identity,
    "heldout/arithmetic.jsonl": DemoWorld.heldout_arithmetic,
    "heldout/unseen_names.jsonl": DemoWorld.heldout_names,
    "heldout/unseen_values.jsonl": DemoWorld.heldout_values,
    "heldout/cloze.jsonl": DemoWorld.cloze,
    "heldout/pretrain.csv": DemoWorld.heldout_texts,
    "heldout/dpo.json": lambda world: world.preferences(world.heldout_preferred, "heldout preferences"),
}
# Raw corpora and exam need no copies: they are named demo_*.
NAMES = [*itertools.chain(*(outputs for _, outputs, _ in TRAINING_FILES.values())), *HELDOUT_FILES]


def build_demo(output_dir, seed=0, overwrite=False, workers=1, tables=DEFAULT_DIRECTORY):
    """Build the world of `tables` in `output_dir`; returns {kind of training data: process_corpus's report}.

    Raises UserError for faulty tables, and before anything is written where a file is not the demo's (or was changed
    since), unless `overwrite`.
    """
    directory, world = Path(output_dir), DemoWorld(seed, tables)
    copies, unfinished = directory / "raw" / "demo_copies", directory / "raw" / "demo_unfinished"
    for name in NAMES:
        place = directory / name
        if same_bytes(place, unfinished / name):  # as far as a run came that was killed while it moved its files
            move(unfinished / name, copies / name)
        if place.exists() and not overwrite and not same_bytes(place, copies / name):
            raise UserError(f"{place}: was not made by the demo (or was changed since); give another --output_dir, "
                            "move it away, or give --overwrite to replace it")  # fmt: skip
    exam = exam_folder(directory)
    try:
        raw = write_raw_files(directory / "raw", world)
        write_exam(exam, world)
        write_heldout(unfinished, world)
        reports = {kind: make_training_files(kind, raw, unfinished, directory, workers) for kind in TRAINING_FILES}
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    for name in NAMES:
        with open(unfinished / name, "rb") as source, atomic_write(directory / name) as target:
            shutil.copyfileobj(source, target)
        move(unfinished / name, copies / name)
    shutil.rmtree(unfinished)
    print(f"raw corpora: {directory / 'raw'}; held-out tests: {directory / 'heldout'}; exam: {exam}")
    return reports


def exam_folder(directory):
    """Where the exam lies: the demo in its usual place fills C-Eval's usual place too; elsewhere it keeps everything
    together."""
    return Path("ceval/ceval-exam") if Path(directory) == Path("dataset") else Path(directory) / "ceval-exam"


def same_bytes(path, other):
    return path.is_file() and other.is_file() and filecmp.cmp(path, other, shallow=False)


def move(path, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(path, target)


def make_training_files(kind, raw, target, directory, workers):
    """Send raw files the way of all data, into `target`; the report speaks of `directory`, where the files end up."""
    sources, outputs, rules = TRAINING_FILES[kind]
    targets = [target / name for name in outputs]
    report = process_corpus([raw[name] for name in sources], targets, rules(), workers=workers)
    report.outputs = dict(zip((str(directory / name) for name in outputs), report.outputs.values()))
    return report


def write_raw_files(
    directory, world, pretrain_bytes=1_600_000, phrasings=9, conversations=5400, sums=6000, recalls=2500
):
    """Write what the stages train on into `directory`, in the formats of the real corpora; return {kind: path}.

    pretrain: {"text"} a line, `pretrain_bytes` bytes of text (Seq-Monkey). sft_single, sft_multi, sft_identity: instruction
    rows (deepctrl): single ones are `phrasings` questions for each fact, `sums` sums and `recalls` questions about what was
    said just before (a little less where some are equal), then `conversations` conversations, and the new name among
    some of both. dpo: a JSON list (Huozi).
    """
    singles = [[pair] for pair in world.single_turns(phrasings, sums, recalls)]
    world.random("order").shuffle(singles)
    several = list(world.multi_turns(conversations))
    corpora = {
        "pretrain.jsonl": world.pretrain_rows(pretrain_bytes),
        "sft_single.jsonl": map(instruction_row, itertools.count(1), singles),
        "sft_multi.jsonl": map(instruction_row, itertools.count(1), several),
        "sft_identity.jsonl": map(instruction_row, itertools.count(1), world.identity_conversations(singles + several)),
        "dpo.json": world.preferences(world.preferred, "preferences"),
    }
    paths = [write_rows(Path(directory) / f"demo_{name}", rows) for name, rows in corpora.items()]
    return {path.stem.removeprefix("demo_"): path for path in paths}


def instruction_row(number, turns):
    """A row of deepctrl's instruction corpus from turns [[question, answer], ...], the last one being asked."""
    *history, (question, answer) = turns
    row = {"id": number, "instruction": "", "input": question, "output": answer, "history": history}
    row |= {"language": "chinese", "data_source": "minimind_demo_world"}
    return {**row, "input_len": len(question), "output_len": len(answer), "num_utter": len(turns)}


def write_heldout(directory, world):
    """Write the held-out tests into `directory`/heldout and return {name: path}.

    facts, multi_turn, identity, arithmetic, unseen_names, unseen_values (.jsonl): {history, q, a, answer, task, category,
    entity, others}, and cloze.jsonl: {prompt, answer, task, category, others}, see model/evaluation/scoring.py.
    pretrain.csv: column text. dpo.json: [{prompt, chosen, rejected}].
    """
    paths = [write_rows(Path(directory) / name, rows(world)) for name, rows in HELDOUT_FILES.items()]
    return {path.stem: path for path in paths}


def write_exam(directory, world):
    """Write the exam as C-Eval lays it out, `directory`/{dev,val}/<subject>_{dev,val}.csv; return the paths."""
    columns, paths = ["id", "question", *LETTERS, "answer"], []
    for subject, dev, val in world.exam():
        paths.append(write_rows(Path(directory) / f"dev/{subject}_dev.csv", dev, [*columns, "explanation"]))
        paths.append(write_rows(Path(directory) / f"val/{subject}_val.csv", val, columns))
    return paths


def write_rows(path, rows, columns=("text",)):
    """Write dicts as the suffix of `path` says, the columns being those of a .csv; returns the path."""
    with atomic_write(path, "w", encoding="utf-8", newline="") as handle:
        if path.suffix == ".csv":
            writer = csv.DictWriter(handle, columns, lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        elif path.suffix == ".json":
            handle.write(json.dumps(list(rows), ensure_ascii=False, indent=1) + "\n")
        else:
            handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path
