"""What an export costs and gives: MiniMind's engine, stock transformers' generate() and llama.cpp on the same weights.

    python benchmarks/exports.py                                             # the 26M shape and the quickstart's
    python benchmarks/exports.py --checkpoint out/quickstart/multi_chat/full_sft_192.pth

export_model.py writes each format; then size, load time (median of three, files in the page cache, tokenizer included)
and greedy decoding, one request of 32 prompt tokens and 16 together, on the CPU. They take turns, each in a process of
its own (in one process PyTorch is two to three times slower once llama.cpp has been loaded); the median counts, and
only tokens that were really generated: nobody stops at </s>. llama.cpp (through xllamacpp, threads as PyTorch's) keeps
its defaults: flash attention, a cache of 16 bits. Its threads spin while they wait for each other, so that other
programs slow it several times more than the rest: measure on a quiet machine (load_average, what ran before, is in the
last line, which is JSON). Ratios are to MiniMind's engine in the format that is nearest: float32 for f32 files, int8
for q8_0, bfloat16 for the rest; with --compile, which also times its compiled step, to the faster of the two.
"""

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))

from decoding import medians  # noqa: E402

from model.cli import positive_int  # noqa: E402
from model.errors import UserError, run_main  # noqa: E402

PROMPT_TOKENS = 32
QUANTIZATIONS = ("f32", "bf16", "q8_0")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shapes = "shapes to measure with random weights (default: %(default)s)"
    parser.add_argument("--preset", nargs="+", default=["minimind-v1-small", "minimind-tiny"], help=shapes)
    parser.add_argument("--checkpoint", metavar="PTH", help="measure this one instead")
    parser.add_argument("--new_tokens", type=positive_int, default=128, help="per request (default: %(default)s)")
    parser.add_argument("--requests", type=positive_int, default=16, help="of the batch (default: %(default)s)")
    parser.add_argument("--repeats", type=positive_int, default=5, help="measurements of each (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="also time the engine with its compiled decoding step")
    return parser.parse_args()


def random_checkpoint(preset, folder):
    """Path of a checkpoint in `folder` with random weights of the preset's shape."""
    import torch

    from model.checkpoint import save_checkpoint
    from model.LMConfig import preset_config
    from model.model import Transformer
    from model.tokenizer import load_tokenizer, tokenizer_hash

    try:
        config = preset_config(preset)
    except ValueError as error:
        raise UserError(f"--preset: {error}", exit_code=2) from None
    torch.manual_seed(0)
    metadata = {"stage": "single_chat/full_sft", "tokenizer_hash": tokenizer_hash(load_tokenizer())}
    save_checkpoint(folder / f"{preset}.pth", Transformer(config), metadata)
    return folder / f"{preset}.pth"


def export(checkpoint, folder, kind, *flags):
    """What export_model.py makes of `checkpoint` as `kind`: a path in `folder`, each in a folder of its own because a
    GGUF has a Modelfile beside it."""
    output = folder / "-".join((kind, *flags[1:])) / ("model.gguf" if kind == "gguf" else "model")
    command = [sys.executable, ROOT / "export_model.py", "--checkpoint", checkpoint, "--format", kind, *flags]
    done = subprocess.run([*command, "--output", output], stdout=subprocess.DEVNULL, cwd=ROOT)
    if done.returncode:
        raise UserError(f"export_model.py --format {kind} failed", exit_code=done.returncode)
    return output


def contenders(args, checkpoint, folder):
    """{name: (path, function that loads it)}. What is loaded is a function: of prompts (lists of token ids), it decodes
    --new_tokens for each and returns how many tokens that were."""
    from model.checkpoint import read_metadata

    stock = "granitemoe" if read_metadata(checkpoint).get("config", {}).get("use_moe") else "llama"
    exported, found = export(checkpoint, folder, stock), {}
    for dtype in ("float32", "bfloat16", "int8"):
        for compile in (False, True) if args.compile else (False,):
            name = f"minimind {dtype}" + " compiled" * compile
            found[name] = checkpoint, functools.partial(load_minimind, args, checkpoint, dtype, compile)
    for dtype in ("float32", "bfloat16"):
        found[f"generate {dtype}"] = exported, functools.partial(load_stock, args, exported, dtype)
    for kind in QUANTIZATIONS:
        path = export(checkpoint, folder, "gguf", "--quantization", kind)
        found[f"llama.cpp {kind}"] = path, functools.partial(load_llama_cpp, args, path)
    return found


def load_minimind(args, path, dtype, compile):
    from model.inference.open import open_engine
    from model.settings import InferenceSettings, SamplingParameters

    settings = InferenceSettings(checkpoint=str(path), device="cpu", dtype=dtype, compile=compile)
    engine, _ = open_engine(settings, max_batch=args.requests)
    parameters = SamplingParameters(temperature=0.0, max_new_tokens=args.new_tokens, stop_token_ids=())
    return lambda prompts: sum(len(request.token_ids) for request in engine.generate(prompts, parameters))


def load_stock(args, path, dtype):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    length = dict(max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens)

    def decode(prompts):
        ids = torch.tensor(prompts)
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=0, **length).numel() - ids.numel()

    return decode


def load_llama_cpp(args, path):
    import torch
    import xllamacpp

    wanted = xllamacpp.CommonParams()
    wanted.model.path = str(path)
    wanted.n_parallel = args.requests  # slots, which share the context
    wanted.n_ctx = args.requests * (PROMPT_TOKENS + args.new_tokens + 1)
    wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = torch.get_num_threads()
    wanted.n_gpu_layers, wanted.verbosity = 0, -1
    server, pool = xllamacpp.Server(wanted), concurrent.futures.ThreadPoolExecutor(args.requests)
    server.handle_completions({"prompt": [0], "max_tokens": 1})  # one that ends before it has really started would hang
    fixed = dict(max_tokens=args.new_tokens, temperature=0, ignore_eos=True, cache_prompt=False)

    def one(prompt):
        reply = server.handle_completions({"prompt": prompt, **fixed})
        if "error" in reply:
            raise UserError(f"{path}: llama.cpp refuses: {reply['error'].get('message')}")
        return reply["usage"]["completion_tokens"]

    return lambda prompts: sum(pool.map(one, prompts))


def timed(function, *arguments):
    """(seconds, result) of one call."""
    began = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - began, result


def work(load, pipe):
    """In a process of its own: load a contender three times and tell the median of the seconds, then those of every call."""
    try:
        seconds, function = [], None
        for _ in range(3):
            function = None  # llama.cpp's server ends with it
            second, function = timed(load)
            seconds.append(second)
        pipe.send(statistics.median(seconds))
        while True:
            pipe.send(timed(function, pipe.recv()))
    except EOFError:
        pass  # nothing more is asked
    except Exception as error:
        pipe.send(error)


def answer(pipe):
    """What a contender tells. Raises what it has raised."""
    told = pipe.recv()
    if isinstance(told, Exception):
        raise told
    return told


def rate(pipe, prompts):
    """New tokens per second of the contender behind `pipe`."""
    pipe.send(prompts)
    seconds, tokens = answer(pipe)
    return tokens / seconds


def measure(args, checkpoint, folder):
    """{name: {"megabytes", "load_seconds", "1", "<requests>" (tokens per second), "ratio_1", "ratio_<requests>"}}."""
    import torch

    results, pipes, spawn = {}, {}, multiprocessing.get_context("spawn")
    for name, (path, load) in contenders(args, checkpoint, folder).items():
        files = [path] if path.is_file() else list(path.iterdir())
        pipes[name], theirs = spawn.Pipe()
        spawn.Process(target=work, args=(load, theirs), daemon=True).start()
        size, seconds = sum(file.stat().st_size for file in files) / 1e6, answer(pipes[name])
        results[name] = {"megabytes": round(size, 1), "load_seconds": round(seconds, 3)}
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 6400, (args.requests, PROMPT_TOKENS), generator=generator).tolist()
    for count in sorted({1, args.requests}):
        calls = {name: functools.partial(rate, pipe, prompts[:count]) for name, pipe in pipes.items()}
        rates = medians(calls, args.repeats)
        for name, number in rates.items():
            ours = (
                "float32"
                if "32" in name
                else "int8"
                if name.endswith(("q8_0", "int8", "int8 compiled"))
                else "bfloat16"
            )
            best = max(rates[own] for own in rates if own.startswith(f"minimind {ours}"))
            results[name] |= {str(count): round(number, 1), f"ratio_{count}": round(number / best, 3)}
    return results


def print_table(title, results):
    """A line per contender."""
    columns = list(next(iter(results.values())))
    print(f"\n{title}\n{'':27s}" + "".join(f"{column:>14s}" for column in columns))
    for name, values in results.items():
        print(f"{name:27s}" + "".join(f"{values[column]:14,}" for column in columns))


def main():
    args = parse_arguments()
    import psutil
    import torch
    from decoding import cpu_name

    results, machine = (
        {},
        {"processor": cpu_name(torch.get_num_threads()), "load_average": round(psutil.getloadavg()[0], 2)},
    )
    with tempfile.TemporaryDirectory() as temporary:
        for name in [args.checkpoint] if args.checkpoint else args.preset:
            folder = Path(temporary, str(len(results)))
            folder.mkdir()
            checkpoint = Path(args.checkpoint) if args.checkpoint else random_checkpoint(name, folder)
            results[name] = measure(args, checkpoint, folder)
            print_table(f"{name}: tokens per second of 1 and {args.requests} requests", results[name])
    print(json.dumps({**machine, "results": results}))


if __name__ == "__main__":
    run_main(main)
