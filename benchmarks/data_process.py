"""Speed and memory of data_process.py pretrain, beside a bare loop that only parses rows and writes them with csv.writer.

    python benchmarks/data_process.py [--data_path corpus.jsonl] [--megabytes 200]

Without --data_path a corpus is made up: sentences of common characters in documents of 50 to 5,000 characters, one in ten
a repetition. Each line is one run of the script in its own process; MB are 10^6 bytes of JSONL. Last line: JSON.
"""

import argparse
import csv
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = {
    "one core, no duplicate filter": ["--workers", "1", "--no_dedup"],
    "one core": ["--workers", "1"],
    "all cores": [],
    "all cores, near duplicates": ["--near_dedup"],
}
COMMON = "的一是在不了有和人这中大为上个国我以要他时来用们生到作地于出就分对成会可主发年动同工也能下过子说产种面而方后多定行学法所民得经"


def write_corpus(path, megabytes, chance):
    sentences = ["".join(chance.choices(COMMON, k=chance.randint(4, 40))) + "。" for _ in range(20_000)]
    rows, written = [], 0
    with open(path, "wb") as handle:
        while written < megabytes * 1e6:
            if rows and chance.random() < 0.1:
                row = chance.choice(rows)
            else:
                text = "".join(chance.choices(sentences, k=int(2 ** chance.uniform(1, 8))))
                row = json.dumps({"text": f"{written}号：{text}"}, ensure_ascii=False).encode() + b"\n"
                rows = rows[-100:] + [row]
            written += handle.write(row)


def bare_loop(source, target):
    """MB/s of json rows to csv rows without any filter, in this process."""
    import orjson

    started = time.perf_counter()
    with open(source, "rb") as rows, open(target, "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle, lineterminator="\n").writerows([orjson.loads(row)["text"]] for row in rows)
    return os.path.getsize(source) / 1e6 / (time.perf_counter() - started)


def run(source, directory, flags):
    """The --report of one run, with its processor time added."""
    report = directory / "report.json"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [
        sys.executable,
        ROOT / "data_process.py",
        "pretrain",
        "--data_path",
        source,
        "--output",
        directory / "out.csv",
        "--overwrite",
    ]
    subprocess.run([*command, "--report", report, *flags], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {**json.loads(report.read_text())["pretrain"], "processor_seconds": processor}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", help="plain JSONL file")
    parser.add_argument("--megabytes", type=float, default=200, help="size of the made-up corpus (default: 200)")
    arguments = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        source = Path(arguments.data_path or directory / "corpus.jsonl")
        if not arguments.data_path:
            write_corpus(source, arguments.megabytes, random.Random(0))
        results["bare_loop_megabytes_per_second"] = round(bare_loop(source, directory / "bare.csv"), 1)
        print(f"{'orjson + csv.writer alone':<32}{results['bare_loop_megabytes_per_second']:>8.1f} MB/s")
        for name, flags in RUNS.items():
            report = run(source, directory, flags)
            speed, memory = report["megabytes_per_second"], report["peak_memory_bytes"] / 1e6
            per_core = report["input_bytes"] / 1e6 / report["processor_seconds"]
            print(f"{name:<32}{speed:>8.1f} MB/s, {per_core:.1f} MB per second of processor time, {memory:.0f} MB peak")
            key = name.replace(",", "").replace(" ", "_")
            results[f"{key}_megabytes_per_second"] = speed
            results[f"{key}_megabytes_per_processor_second"] = round(per_core, 1)
            results[f"{key}_peak_megabytes"] = round(memory)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
