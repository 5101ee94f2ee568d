"""How fast the token cache is built, file to finished folder, against encode_batch alone on the same texts in memory.

    python benchmarks/token_cache.py [--data_path FILE] [--megabytes 12] [--repeats 3]

Without --data_path the rows are made up of the characters the tokenizer knows. Both take turns, so that a busy
machine disturbs them alike; the last line is JSON with the medians in MB/s of text and their ratio.
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
    parser.add_argument("--tokenizer_path", help="tokenizer folder (default: model/minimind_tokenizer)")
    parser.add_argument(
        "--megabytes", type=positive_int, default=12, help="text taken from the file (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=positive_int, default=3, help="measurements of each (default: %(default)s)")
    return parser.parse_args()


def read_texts(path, size):
    from model.data.rows import iter_records

    texts, taken = [], 0
    for record in iter_records(path, ("text",)):
        texts.append(record["text"])
        taken += len(record["text"].encode())
        if taken >= size:
            break
    return texts


def made_up_texts(tokenizer, size):
    """Documents of random tokens: slower to encode than real text, which repeats itself more."""
    generator, texts, taken = random.Random(0), [], 0
    while taken < size:
        texts.append(tokenizer.decode(generator.choices(range(3, len(tokenizer)), k=generator.randint(50, 1500))))
        taken += len(texts[-1].encode())
    return texts


def main():
    args = parse_arguments()
    from model.data.token_cache import PretrainEncoding, open_token_cache
    from model.tokenizer import DEFAULT_TOKENIZER_PATH, load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer_path or DEFAULT_TOKENIZER_PATH)
    size = args.megabytes * 10**6
    texts = [
        text
        for text in (read_texts(args.data_path, size) if args.data_path else made_up_texts(tokenizer, size))
        if text
    ]
    if not texts:
        raise UserError(f"--data_path {args.data_path}: has no text")
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    alone, cached = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.csv"
        with open(path, "w", newline="", encoding="utf-8") as handle:
            csv.writer(handle, lineterminator="\n").writerows([["text"], *([text] for text in texts)])
        for repeat in range(args.repeats):
            start = time.perf_counter()
            encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
            alone.append(megabytes / (time.perf_counter() - start))
            del encodings
            start = time.perf_counter()
            cache = open_token_cache(path, tokenizer, PretrainEncoding(tokenizer), Path(folder) / str(repeat))
            cached.append(megabytes / (time.perf_counter() - start))
            print(f"encode_batch alone {alone[-1]:.2f} MB/s, token cache {cached[-1]:.2f} MB/s", file=sys.stderr)
        result = {
            "megabytes": round(megabytes, 2),
            "tokens": len(cache.tokens),
            "encode_batch_mb_per_second": round(statistics.median(alone), 2),
            "token_cache_mb_per_second": round(statistics.median(cached), 2),
            "ratio": round(statistics.median(cached) / statistics.median(alone), 3),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
