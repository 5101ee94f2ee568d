"""Corpora beyond one machine: what process_corpus does, as tasks that run anywhere, each again if it was lost.

The tasks of a run share nothing but folders on a file system that all machines see. One stage follows the other:

    convert   filters the task's files; of each document that is left, hashes go to disk, sorted by parts
    match     finds the equal hashes of one part, of all tasks: exact duplicates, and the pairs of near ones
    resolve   one task: goes through those pairs in the order of the corpus; of two alike the later one goes
    write     filters the task's files again and writes the documents that stay to <task>.jsonl.gz

Which documents stay depends neither on the number of tasks nor on where they run, and is what process_corpus decides. The
MinHash blocks of datatrove cannot be made to agree with it: they hash words by another function, and keep one document
of each connected group, so that of a chain A ~ B ~ C they lose C, which is not like A. So theirs are the executors (how
a task is started, its log, its completion marker), and the blocks are ours. Of the executors only Slurm's own run() is
used: in those for one machine and for Ray a pool waits for ever for a task that was killed.
"""

import contextlib
import dataclasses
import functools
import gzip
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import orjson
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from filelock import Timeout
from loguru import logger
from tqdm import tqdm

from model.data.corpus import CorpusReport, convert_block, in_processes, merge_block, read_blocks
from model.data.deduplication import BAND, DOCUMENT, are_similar, candidate_pairs, minhash_signatures, rows_per_band
from model.data.filters import PretrainRules
from model.data.rows import RowReport
from model.data.shards import JoinedArrays
from model.errors import SCRIPTS, UserError, tell
from model.files import atomic_write, locked, refuse_existing, replace_folder
from model.memory import peak_memory

logger.disable("datatrove")  # progress and errors are told in this project's way

ROW_BITS = np.uint64(40)  # of a document's key: its number in its file, below the number of the file
ENTRIES_AT_ONCE = 1 << 14  # bounds the memory that comparing documents with their candidates takes
SHARDS = "[0-9]*.jsonl.gz"
LEFTOVERS = ("arrays", "reports", "shards")  # of Job.work


@dataclasses.dataclass(frozen=True)
class Job:
    """What the tasks of a run have to know. output: folder of the shards. tasks: how many work on the files; task r has the
    files r, r + tasks, ... near_threshold, rules: as for process_corpus. report_path: of the final table as JSON."""

    inputs: tuple
    output: Path
    rules: PretrainRules
    tasks: int
    dedup: bool = True
    near_threshold: float | None = None
    report_path: str | None = None
    started: float = dataclasses.field(default_factory=time.time)

    @property
    def work(self):
        """The folder of an unfinished run: arrays, shards, and logs with the markers of completed tasks."""
        return self.output.with_name(f".{self.output.name}.unfinished")

    @property
    def stages(self):
        """{name: number of tasks}, in order. Without duplicates to find there is nothing but to write."""
        finding = {"convert": self.tasks, "match": self.tasks, "resolve": 1}
        return {**(finding if self.dedup or self.near_threshold else {}), "write": self.tasks}

    def description(self):
        """What a run must have in common with the unfinished one that it goes on with, as JSON text."""
        files = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.inputs]
        deciding = self.tasks, self.dedup, self.near_threshold, dataclasses.asdict(self.rules)
        return json.dumps([files, *deciding], indent=1)


class ShardRules(PretrainRules):
    """The same documents as JSON lines."""

    def convert(self, record):
        return super().convert(record)._replace(payload=orjson.dumps({"text": record["text"]}) + b"\n")


# Arrays between the stages


def array_path(job, stage, task, name):
    return job.work / "arrays" / f"{stage}-{task:05d}-{name}.npy"


def save(job, stage, task, arrays):
    for name, array in arrays.items():
        with atomic_write(array_path(job, stage, task, name)) as handle:
            # Only write, or NumPy takes the file's descriptor, and its error of a full disk says neither disk nor file.
            np.save(types.SimpleNamespace(write=handle.write), array)


def load(job, stage, task, name):
    """The array that a task saved, memory-mapped."""
    return np.load(array_path(job, stage, task, name), mmap_mode="r")


def of_all_tasks(job, name):
    """An array of the stage convert, of all tasks one behind the other."""
    return JoinedArrays([load(job, "convert", task, name) for task in range(job.tasks)], [0] * job.tasks)


# The stages


def documents(job, task, rules, **duplicates):
    """Yield (Converted, key of its first document) for each block of the task's files. Keys, uint64, are consecutive within
    a file and sort documents as process_corpus reads them."""
    for number in range(task, len(job.inputs), job.tasks):
        key = np.uint64(number) << ROW_BITS
        for block in read_blocks(job.inputs[number]):
            converted = convert_block(block, rules, **duplicates)
            yield converted, key
            key += np.uint64(len(converted.payloads))


def convert(job, task):
    """Save of each document key, digest, bits of its signature, and sorted by parts digests and bands."""
    near_rows = rows_per_band(job.near_threshold) if job.near_threshold else None
    keys, digests, signatures = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)], [minhash_signatures([], near_rows)]
    for block, key in documents(job, task, job.rules, dedup=job.dedup, near_rows=near_rows):
        keys.append(key + np.arange(len(block.payloads), dtype=np.uint64))
        digests.append(block.digests)
        signatures.append(block.signatures)
    arrays = {"keys": np.concatenate(keys)}
    if job.dedup:
        arrays["digests"] = np.concatenate(digests)
        arrays |= by_parts("digest", arrays["digests"][:, None], job.tasks)
    if job.near_threshold:
        bands, arrays["bits"] = map(np.concatenate, zip(*signatures))
        signatures.clear()  # a third of the memory
        bands &= BAND
        arrays |= by_parts("band", bands, job.tasks)
    save(job, "convert", task, arrays)


def by_parts(name, hashes, parts):
    """{name: the hashes [n, k] of n documents sorted by the part each belongs to, "<name>_rows": the document of each,
    "<name>_bounds": where each part begins, and the end}."""
    part = (hashes.ravel() // (DOCUMENT + np.uint64(1)) % np.uint64(parts)).astype(np.uint32)
    order = np.argsort(part, kind="stable")
    bounds = np.searchsorted(part[order], np.arange(parts + 1, dtype=np.uint32))
    rows = (order // hashes.shape[1]).astype(np.uint32)
    return {name: hashes.ravel()[order], f"{name}_rows": rows, f"{name}_bounds": bounds}


def shared(job, name, part):
    """(hashes, documents): the hashes of a part that occur more than once, and whose they are, counted through all tasks."""
    hashes, rows, first = [], [], 0
    for task in range(job.tasks):
        start, stop = load(job, "convert", task, f"{name}_bounds")[part : part + 2]
        hashes.append(load(job, "convert", task, name)[start:stop])
        rows.append(load(job, "convert", task, f"{name}_rows")[start:stop] + np.int64(first))
        first += len(load(job, "convert", task, "keys"))
    hashes, rows = np.concatenate(hashes), np.concatenate(rows)
    order = np.argsort(hashes, kind="stable")
    same = np.zeros(len(order) + 1, bool)  # as the one before it; the first and the end have none
    same[1:-1] = hashes[order][1:] == hashes[order][:-1]
    chosen = order[same[:-1] | same[1:]]
    return hashes[chosen], rows[chosen]


def match(job, part):
    """Save the keys of exact duplicates and the [key, an earlier key] of near ones, as far as this part's hashes tell."""
    found = {"exact": np.empty(0, np.uint64), "near": np.empty((0, 2), np.uint64)}
    if job.dedup:
        digests, rows = shared(job, "digest", part)
        keys = of_all_tasks(job, "keys")[rows]
        found["exact"] = keys[~are_first(keys, digests)]
    if job.near_threshold:
        found["near"] = near_pairs(job, part)
    save(job, "match", part, found)


def are_first(keys, digests):
    """bool [n]: whether each key is the lowest among those with the same digest."""
    order = np.lexsort((keys, digests))
    begins = np.ones(len(keys), bool)
    begins[1:] = digests[order][1:] != digests[order][:-1]
    lowest = np.maximum.accumulate(np.where(begins, np.arange(len(keys)), 0))
    first = np.empty(len(keys), bool)
    first[order] = keys[order] == keys[order][lowest]
    return first


def near_pairs(job, part):
    """uint64 [p, 2]: the keys of a document and of an earlier one that is like it, of those that share a band of this part."""
    bands, rows = shared(job, "band", part)
    keys = of_all_tasks(job, "keys")[rows]
    if job.dedup:  # exact duplicates are not compared; having all bands in common, their first one is here too
        first = are_first(keys, of_all_tasks(job, "digests")[rows])
        bands, rows, keys = bands[first], rows[first], keys[first]
    keys, places, numbers = np.unique(keys, return_index=True, return_inverse=True)
    if len(keys) > DOCUMENT:
        raise UserError(f"--tasks {job.tasks}: too few for so many documents")
    rows, bits, found = rows[places], of_all_tasks(job, "bits"), [np.empty((0, 2), np.uint64)]
    entries = np.sort(bands | numbers.astype(np.uint64))
    for start in range(0, len(entries), ENTRIES_AT_ONCE):
        pairs = candidate_pairs(entries[start : start + ENTRIES_AT_ONCE], [entries])
        pairs = np.stack([pairs >> np.uint64(32), pairs & DOCUMENT], axis=1).astype(np.int64)
        similar = are_similar(bits[rows[pairs[:, 0]]], bits[rows[pairs[:, 1]]], job.near_threshold)
        found.append(keys[pairs[similar]])
    return np.concatenate(found)


def resolve(job, task):
    """Save the keys of all documents that go: of near duplicates those that are like an earlier document that stays."""
    exact = np.concatenate([load(job, "match", part, "exact") for part in range(job.tasks)])
    pairs = np.concatenate([load(job, "match", part, "near") for part in range(job.tasks)])
    near = set()
    for document, earlier in np.unique(pairs, axis=0).tolist():
        if earlier not in near:
            near.add(document)
    save(job, "resolve", task, {"duplicate": np.sort(exact), "near_duplicate": np.array(sorted(near), np.uint64)})


def write(job, task):
    """Write the documents of the task's files that stay, in their order, and the report on them; no shard without any."""
    rules = ShardRules(**dataclasses.asdict(job.rules))
    gone = {rule: load(job, "resolve", 0, rule) for rule in ("duplicate", "near_duplicate") if "resolve" in job.stages}
    report = CorpusReport(job.inputs[task :: job.tasks], [job.output], workers=1)
    written, met = report.outputs[str(job.output)], 0
    path = job.work / "shards" / f"{task:05d}.jsonl.gz"
    with atomic_write(path) as file, atomic_write(report_file(job, task, "bad_lines.txt")) as bad_lines:
        with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=4, filename="", mtime=0) as handle:
            for block, key in documents(job, task, rules, dedup=False, near_rows=None):
                kept = np.ones(len(block.payloads), bool)
                for rule, keys in gone.items():
                    start, stop = np.searchsorted(keys, [key, key + np.uint64(len(kept))])
                    kept[(keys[start:stop] - key).astype(np.int64)] = False
                    report.dropped[rule] += int(stop - start)
                met += len(kept)
                merge_block(block, kept, [(handle, written)], bad_lines, report)
    if gone and met != len(load(job, "convert", task, "keys")):
        raise UserError(f"{job.inputs[task]} or a later one was changed during the run; start over with --overwrite")
    written["bytes"] = path.stat().st_size
    if not written["rows"]:
        path.unlink()
    with atomic_write(report_file(job, task, "report.json")) as handle:
        handle.write(json.dumps(vars(report)).encode())


def report_file(job, task, name):
    return job.work / "reports" / f"{task:05d}.{name}"


STAGES = {"convert": convert, "match": match, "resolve": resolve, "write": write}


def run_task(data, task, tasks, job, stage):
    """A block of a datatrove pipeline: one task of a stage."""
    STAGES[stage](job, task)
    save(job, stage, task, {"memory": np.array(peak_memory())})


# The end


def total_report(job, workers):
    """The CorpusReport of all tasks."""
    total = CorpusReport(job.inputs, [job.output], workers)
    written = total.outputs[str(job.output)]
    for task in range(job.tasks):
        part = json.loads(report_file(job, task, "report.json").read_text(encoding="utf-8"))
        total.add(RowReport.from_dict(part))
        total.blank_lines += part["blank_lines"]
        total.rows_of_input |= part["rows_of_input"]
        for name in ("rows", "bytes"):
            written[name] += part["outputs"][str(job.output)][name]
    paths = [array_path(job, stage, task, "memory") for stage, tasks in job.stages.items() for task in range(tasks)]
    total.memory["largest task"] = max(int(np.load(path)) for path in paths)
    total.seconds = time.time() - job.started
    return total


def finish(job, workers):
    """Put the shards in their place and remove the rest; returns the CorpusReport. Raises UserError, and leaves the unfinished
    run as it is, when no document is left."""
    report = total_report(job, workers)
    report.refuse_empty_result()
    if report.bad_kinds:
        report.bad_lines_file = f"{job.output}.bad_lines.txt"
        with atomic_write(report.bad_lines_file) as handle:
            for task in range(job.tasks):
                with open(report_file(job, task, "bad_lines.txt"), "rb") as part:
                    shutil.copyfileobj(part, handle)
    (job.work / "run.json").unlink()  # from here on there is nothing to go on with
    for path in (job.work / "shards").glob("*.tmp-*"):  # of tasks that were killed on another machine
        path.unlink()
    replace_folder(job.work / "shards", job.output)
    for name in LEFTOVERS:
        shutil.rmtree(job.work / name, ignore_errors=True)
    return report


def finish_on_slurm(data, task, tasks, job):
    """finish as the last block of a chain of Slurm jobs: the table goes to its log, and where --report says."""
    report = finish(job, job.tasks)
    print(report.table())
    if job.report_path:
        with atomic_write(job.report_path) as handle:
            handle.write(json.dumps({"pretrain": report.as_dict()}, ensure_ascii=False, indent=2).encode() + b"\n")


# Starting a run


def check_output(output, inputs, report, overwrite):
    """UserError for a folder `output` that must not be written: one with inputs in it, one that is there, unless `overwrite`,
    and even so one that holds anything but shards and their token caches."""
    if os.path.realpath(output) in (os.path.realpath(path.parent) for path in inputs):
        raise UserError(f"{output}: is where the input lies; choose another output")
    refuse_existing([output, *([report] if report else [])], overwrite)
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file, not a folder; choose another output")
    for path in sorted(output.iterdir()) if output.exists() else ():
        if not path.match(SHARDS) and path.name != ".cache":
            raise UserError(f"{output}: holds {path.name}, which is no shard of a corpus; choose another output")


@contextlib.contextmanager
def unfinished_run(job, overwrite):
    """A context in which job.work is there and no other run is started in it: an unfinished one of the same description, or
    a new one, also where `overwrite` asks for it. Raises UserError: another is running, or was begun with other flags."""
    known, description = job.work / "run.json", job.description()
    job.work.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(job.work / ".lock", timeout=0))
        except Timeout:
            raise UserError(f"{job.output}: another run is writing it; choose another --output") from None
        if not known.exists() or known.read_text(encoding="utf-8") != description:
            if known.exists() and not overwrite:
                way_out = "give the same to go on with it, or --overwrite to start over"
                raise UserError(f"{job.work}: is an unfinished run with other files or flags; {way_out}")
            for name in ("logs", *LEFTOVERS):  # the markers of completed tasks first
                shutil.rmtree(job.work / name, ignore_errors=True)
            with atomic_write(known) as handle:
                handle.write(description.encode())
        (job.work / "shards").mkdir(exist_ok=True)
        yield


def run(job, executor="local", workers=None, overwrite=False, partition=None, time_limit=None, memory=None):
    """Run what is left of a job; returns the CorpusReport, None where Slurm goes on alone.

    executor: "local" (processes of this machine), "ray" (the cluster that ray.init finds, else one on this machine) or
    "slurm". workers: tasks at a time (None: no limit but that of the machines). partition, time_limit: of Slurm. memory: GB that
    a task reserves there and on Ray. Raises UserError; what was completed is kept, and the same job goes on with it.
    """
    check_output(job.output, job.inputs, job.report_path, overwrite)
    with unfinished_run(job, overwrite):
        if executor == "slurm":
            return submit(job, workers, partition, time_limit, memory)
        for stage, tasks in job.stages.items():
            pipeline, logs = [functools.partial(run_task, job=job, stage=stage)], str(job.work / "logs" / stage)
            if executor == "ray":
                stage_executor = RayPipelineExecutor(pipeline, tasks=tasks, logging_dir=logs)
                start = functools.partial(on_ray, memory=memory)
            else:
                stage_executor = LocalPipelineExecutor(pipeline, tasks=tasks, logging_dir=logs)
                start = functools.partial(in_processes, wait=False)
            left = stage_executor.get_incomplete_ranks()
            if len(left) < tasks:
                tell(f"{stage}: {tasks - len(left)} of {tasks} tasks are done already")
            done = start(stage_executor._run_for_rank, left, workers=max(1, min(workers or tasks, len(left))))
            for _ in tqdm(done, total=tasks, initial=tasks - len(left), desc=stage, unit="task", disable=None):
                pass
        report = finish(job, workers or job.tasks)
        shutil.rmtree(job.work, ignore_errors=True)
    return report


def on_ray(function, items, workers, memory):
    """Yield function(item) of every item as they come from a Ray cluster, at most `workers` at a time; each may take
    `memory` GB. A task whose process is lost is run again by Ray, three times."""
    import ray

    try:
        ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level="ERROR")
    except ConnectionError as error:
        raise UserError(f"--executor ray: no cluster answers where RAY_ADDRESS says ({error})") from None
    if memory and not any(node["Resources"].get("memory", 0) >= memory * 1e9 for node in ray.nodes()):
        raise UserError(f"--task_memory {memory}: no machine of the Ray cluster has so much")  # it would wait for one
    task = ray.remote(num_cpus=1, memory=memory and int(memory * 1e9))(call)
    function, waiting, running = ray.put(function), list(items), []
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(task.remote(function, waiting.pop(0)))
            done, running = ray.wait(running)
            yield from ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error
    except ray.exceptions.RayError as error:
        raise UserError(f"Ray lost a task ({type(error).__name__}); start again: what was completed is kept") from None


def call(function, argument):
    return function(argument)


def submit(job, workers, partition, time_limit, memory):
    """Submit the stages as Slurm job arrays, each waiting for the one before, and one job that finishes."""
    if not shutil.which("sbatch"):
        raise UserError("--executor slurm: no sbatch here; start it on a machine that submits jobs")
    blocks = {stage: functools.partial(run_task, job=job, stage=stage) for stage in job.stages}
    blocks["finish"] = functools.partial(finish_on_slurm, job=job)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    last = None
    for stage, block in blocks.items():
        last = SlurmPipelineExecutor(
            [block],
            tasks=job.stages.get(stage, 1),
            workers=workers or -1,
            depends=last,
            logging_dir=str(job.work / "logs" / stage),
            job_name=f"minimind-{stage}",
            partition=partition,
            time=time_limit,
            mem_per_cpu_gb=memory or 4,
            qos=None,
            sbatch_args={"kill-on-invalid-dep": "yes"},
            env_command=f"export PATH={shlex.quote(path)} PYTHONPATH={shlex.quote(str(SCRIPTS))}",
        )
    try:
        last.run()
    except subprocess.CalledProcessError as error:
        raise UserError(f"sbatch ended with exit code {error.returncode}, and says above why") from None
    tell(f"submitted; {job.output} is there when job {last.job_id} is done. Logs: {job.work / 'logs'}/*/slurm_logs")
