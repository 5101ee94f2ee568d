"""How much validation flatters when pieces of one document lie on both sides of the held-out split.

    python benchmarks/held_out_split.py --data_path corpus.jsonl [--documents 250] [--epochs 6]

The same documents twice, with the same model, steps and seed: whole, as data_process.py keeps them, and cut into pieces
of 512 characters that are held out one by one. Each model is then also asked about documents that nobody has seen. The
last line is JSON: bits per byte.
"""

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.cli import positive_int  # noqa: E402
from model.errors import UserError, run_main  # noqa: E402

PIECE = 512  # characters


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help='.jsonl or .csv with "text", also compressed')
    parser.add_argument("--documents", type=positive_int, default=250, help="to train on (default: %(default)s)")
    parser.add_argument("--epochs", type=positive_int, default=6, help="default: %(default)s")
    parser.add_argument("--preset", default="minimind-tiny", help="default: %(default)s")
    return parser.parse_args()


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def train(folder, name, texts, unseen, args):
    """Train on `texts`; returns (bits per byte on the held-out tenth of them, on the documents `unseen`)."""
    from model.build import build_model
    from model.data.dataset import open_pretrain_data
    from model.settings import ModelSettings, TrainingSettings
    from model.tokenizer import load_tokenizer
    from model.training.loop import Trainer, start

    settings = TrainingSettings(epochs=args.epochs, batch_size=8, optimizer="muon", learning_rate=3e-3, eval_tokens=0)
    settings.out_dir, settings.eval_interval = str(folder / name), 10**9
    device, tokenizer = start(settings), load_tokenizer()
    model, _ = build_model(ModelSettings(preset=args.preset), tokenizer)
    length = model.config.max_seq_len
    rows = open_pretrain_data(write_rows(folder / f"{name}.jsonl", texts), tokenizer, length, validation_share=0.1)
    trainer = Trainer(model.to(device), tokenizer, *rows, settings, stage=name)
    trainer.train()
    held_out = trainer.state.validation_bits_per_byte
    strangers, _ = open_pretrain_data(unseen, tokenizer, length, validation_share=0)
    trainer.validation_loader = trainer.make_loader(strangers)
    trainer.validation_start = trainer.validation_loader.state_dict()
    trainer.validate()
    return held_out, trainer.state.validation_bits_per_byte


def main():
    args = parse_arguments()

    from model.data.rows import iter_records

    number = args.documents + args.documents // 5
    texts = [row["text"] for row in itertools.islice(iter_records(args.data_path, ("text",)), number)]
    if len(texts) < number:
        raise UserError(f"{args.data_path}: has {len(texts)} documents, {number} are needed; choose fewer --documents")
    documents, result = (
        texts[: args.documents],
        {"preset": args.preset, "documents": args.documents, "epochs": args.epochs},
    )
    pieces = [text[start : start + PIECE] for text in documents for start in range(0, len(text), PIECE)]
    with tempfile.TemporaryDirectory() as folder:
        unseen = write_rows(Path(folder) / "unseen.jsonl", texts[args.documents :])
        for name, rows in (("pieces", pieces), ("documents", documents)):
            held_out, strangers = train(Path(folder), name, rows, unseen, args)
            result[name] = {"rows": len(rows), "held_out": round(held_out, 3), "never_seen": round(strangers, 3)}
            print(f"{name:10s} {len(rows):7,} rows  held out {held_out:.3f}  never seen {strangers:.3f} bits per byte")
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
