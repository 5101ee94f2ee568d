"""What RoPE scaling does to the loss of a model that runs beyond its trained length.

    python benchmarks/context_length.py --checkpoint out/pretrain_512.pth --data_path dataset/pretrain_data.csv

The same held-out tokens are read in rows of once, twice and four times the trained length, with positions as they are
and with linear and YaRN scaling by the same factor. The last line is JSON: loss in nats per token.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from model.cli import positive_int  # noqa: E402
from model.errors import UserError, run_main  # noqa: E402


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="PTH")
    parser.add_argument("--data_path", required=True, help="long texts the model was not trained on, column text")
    parser.add_argument("--tokens", type=positive_int, default=65536, help="tokens to read (default: %(default)s)")
    return parser.parse_args()


def main():
    args = parse_arguments()
    import torch
    from tqdm import tqdm

    from model.checkpoint import load_model
    from model.data.rows import iter_records
    from model.tokenizer import encode_text, load_tokenizer

    tokenizer = load_tokenizer()
    trained = load_model(args.checkpoint)[0].config.max_seq_len
    stream, bar = [], tqdm(total=args.tokens, unit="token", desc="read", disable=None)
    for record in iter_records(args.data_path, ("text",)):
        ids = [tokenizer.bos_token_id, *encode_text(tokenizer, record["text"]), tokenizer.eos_token_id]
        stream += ids
        bar.update(len(ids))
        if len(stream) >= args.tokens:
            break
    bar.close()
    longest = 4 * trained
    if len(stream) < longest:
        raise UserError(f"{args.data_path}: {len(stream):,} tokens, {longest:,} are needed; give it more text")
    tokens = torch.tensor(stream[: len(stream) // longest * longest])

    losses = {}
    for factor in (1, 2, 4):
        for kind in ("none", "linear", "yarn") if factor > 1 else ("none",):
            scaling = None if kind == "none" else {"rope_type": kind, "factor": float(factor)}
            model = load_model(args.checkpoint, max_seq_len=trained * factor, rope_scaling=scaling)[0].eval()
            rows = tokens.view(-1, trained * factor)
            with torch.inference_mode():
                parts = [
                    model(row[None], labels=row[None]).loss for row in tqdm(rows, desc=kind, leave=False, disable=None)
                ]
            losses[f"{trained * factor} {kind}"] = round(float(torch.stack(parts).mean()), 4)
            print(f"{trained * factor:6d} tokens, scaling {kind:6s}  loss {losses[f'{trained * factor} {kind}']:.4f}")
    print(json.dumps({"tokens": len(tokens), "loss": losses}))


if __name__ == "__main__":
    run_main(main)
