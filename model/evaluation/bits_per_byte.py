"""Bits per byte: how well a model predicts a text, in a unit that models with different tokenizers share."""

import itertools
import math

import torch
from tqdm import tqdm

from model.data.rows import iter_records, read_lines
from model.errors import UserError
from model.evaluation.batches import length_batches, padded, tokens_per_batch
from model.files import uncompressed_suffix
from model.inference.kernels import install
from model.tokenizer import encode_texts

DOCUMENTS_AT_ONCE = 256  # of these, windows of like length share a batch


def read_texts(path):
    """Stream the documents of a file: the column text of a .csv or .jsonl, any other file as a whole.

    Raises UserError for a missing file and, naming the line, for bytes that are not UTF-8.
    """
    if uncompressed_suffix(path) in (".csv", ".jsonl"):
        yield from (record["text"] for record in iter_records(path, ("text",)))
        return
    lines = []
    for number, line in read_lines(path):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{path}:{number}: not UTF-8; convert the file") from None
    yield "".join(lines)


def windows(ids, context):
    """Yield (window, number of its last tokens that count) over a document's ids, the first of which is only context.

    A window holds `context` ids and the next begins half a window later, so that each token counts once and, past the
    first window, has at least half a context before it.
    """
    counted = 1
    for start in range(0, len(ids), context // 2):
        window = ids[start : start + context]
        if start + len(window) > counted:
            yield window, start + len(window) - counted
            counted = start + len(window)


@torch.inference_mode()
def measure_bits_per_byte(model, tokenizer, texts):
    """{"bits_per_byte", "bytes", "tokens"} of an iterable of texts: the sum of -log2 of each token's probability, given
    the tokens before it, divided by the bytes of all texts in UTF-8.

    As in training a document begins with <s>, from which its first token is predicted. Where it is longer than the
    model's context, see windows(). Raises UserError when there is no text, for a context in which no token has another
    before it, and when the loss is not finite.
    """
    if model.config.max_seq_len < 2:
        raise UserError("--bpb: needs a context of at least 2 tokens; give a larger --max_seq_len", exit_code=2)
    install(model.eval())
    documents, nats, size, tokens = iter(texts), 0.0, 0, 0
    with tqdm(unit="token", unit_scale=True, desc="bits per byte", disable=None) as bar:
        while some := list(itertools.islice(documents, DOCUMENTS_AT_ONCE)):
            size += sum(len(text.encode()) for text in some)
            parts = []
            for ids in encode_texts(tokenizer, some):
                parts += windows([tokenizer.bos_token_id, *ids], model.config.max_seq_len)
            for rows in length_batches([len(window) for window, _ in parts], tokens_per_batch(model.device)):
                nats += summed_loss(model, [parts[row] for row in rows])
                counted = sum(parts[row][1] for row in rows)
                tokens += counted
                bar.update(counted)
    if not size:
        raise UserError("--bpb: there is no text in the file")
    if not math.isfinite(nats):
        raise UserError("the model's loss is not finite: its weights are damaged, or --dtype is too narrow for them")
    return {"bits_per_byte": nats / math.log(2) / size, "bytes": size, "tokens": tokens}


def summed_loss(model, parts):
    """Sum of -ln p over the tokens that count, of (window, number of its last tokens that count) pairs."""
    labels = [[-100] * (len(window) - counted) + window[len(window) - counted :] for window, counted in parts]
    ids, labels = padded([window for window, _ in parts]), padded(labels, -100)
    output = model(
        ids.to(model.device),
        labels=labels.to(model.device),
        padding_side="right",
        num_items_in_batch=1,
        return_logits=False,
    )
    return float(output.loss)
