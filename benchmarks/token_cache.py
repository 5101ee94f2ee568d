"""How fast the token cache is built, file to finished folder, against encode_batch alone on the same texts in memory.

    python benchmarks/token_cache.py [--data_path FILE] [--sft_data_path FILE] [--megabytes 12] [--repeats 3]

Once for pretraining texts, once for conversations; without a file they are made up of the characters the tokenizer
knows. Both take turns, so that a busy machine disturbs them alike; the last line is JSON with the medians in MB/s of
text and their ratio.
"""

import argparse
import csv
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from model.cli import positive_int
from model.errors import UserError, run_main


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_path", help="rows with a column text, .csv or .jsonl, also compressed")
    parser.add_argument("--sft_data_path", help="rows with columns history, q, a")
    parser.add_argument("--tokenizer_path", help="tokenizer folder (default: model/minimind_tokenizer)")
    parser.add_argument("--max_seq_len", type=positive_int, default=512, help="of conversations (default: %(default)s)")
    parser.add_argument(
        "--megabytes", type=positive_int, default=12, help="text taken of each file (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=positive_int, default=3, help="measurements of each (default: %(default)s)")
    return parser.parse_args()


def read_rows(path, columns, size):
    """Rows [value of each column] of a file until their texts have `size` bytes; history as its JSON text."""
    from model.data.rows import iter_records

    rows, taken = [], 0
    for record in iter_records(path, columns, json_columns=("history",)):
        row = [json.dumps(record[name] or []) if name == "history" else record[name] for name in columns]
        rows.append(row)
        taken += sum(len(text.encode()) for text in row)
        if taken >= size:
            break
    return rows


def made_up_rows(tokenizer, columns, size):
    """Rows of random tokens: slower to encode than real text, which repeats itself more. No history."""
    generator, rows, taken = random.Random(0), [], 0
    longest = 1500 if len(columns) == 1 else 200
    while taken < size:
        texts = [
            tokenizer.decode(generator.choices(range(3, len(tokenizer)), k=generator.randint(20, longest)))
            for name in columns
            if name != "history"
        ]
        taken += sum(len(text.encode()) for text in texts)
        rows.append(["[]", *texts] if "history" in columns else texts)
    return rows


def measure(kind, columns, rows, texts, tokenizer, encoding, repeats):
    """{result: value} of encoding the texts alone and of building the cache of a .csv file of the rows."""
    from model.data.token_cache import open_token_cache

    texts = [text for text in texts if text]
    if not texts:
        raise UserError(f"{kind}: the file has no text")
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    alone, cached = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        with open(path, "w", newline="", encoding="utf-8") as handle:
            csv.writer(handle, lineterminator="\n").writerows([columns, *rows])
        for repeat in range(repeats):
            start = time.perf_counter()
            encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
            alone.append(megabytes / (time.perf_counter() - start))
            del encodings
            start = time.perf_counter()
            cache = open_token_cache(path, tokenizer, encoding, Path(folder) / str(repeat))
            cached.append(megabytes / (time.perf_counter() - start))
            print(f"{kind}: encode_batch {alone[-1]:.2f} MB/s, token cache {cached[-1]:.2f} MB/s", file=sys.stderr)
        return {
            "megabytes": round(megabytes, 2),
            "tokens": len(cache.tokens),
            "encode_batch_mb_per_second": round(statistics.median(alone), 2),
            "token_cache_mb_per_second": round(statistics.median(cached), 2),
            "ratio": round(statistics.median(cached) / statistics.median(alone), 3),
        }


def main():
    args = parse_arguments()
    from model.data.conversations import training_conversation
    from model.data.token_cache import PretrainEncoding, SFTEncoding
    from model.tokenizer import DEFAULT_TOKENIZER_PATH, load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer_path or DEFAULT_TOKENIZER_PATH)
    results = {}
    for kind, path, columns, encoding in (
        ("pretrain", args.data_path, ["text"], PretrainEncoding(tokenizer)),
        ("sft", args.sft_data_path, ["history", "q", "a"], SFTEncoding(tokenizer, args.max_seq_len)),
    ):
        size = args.megabytes * 10**6
        rows = read_rows(path, columns, size) if path else made_up_rows(tokenizer, columns, size)
        texts = [text for row in rows for text in row]
        if kind == "sft":
            turns = (turn for row in rows for turn in training_conversation(dict(zip(columns, row))))
            texts = [turn["content"] for turn in turns]
        results[kind] = measure(kind, columns, rows, texts, tokenizer, encoding, args.repeats)
    print(json.dumps(results))


if __name__ == "__main__":
    run_main(main)
