"""Decoding speed: MiniMind's engine against a stock transformers Llama's generate(), same shape, greedy.

    python benchmarks/decoding.py
    python benchmarks/decoding.py --compile

One request of 32 prompt tokens, then 16 requests together, in float32 and bfloat16. They take turns in one process, so
that a busy machine disturbs them alike; the median counts. With --compile our engine is timed both ways. The last line is
JSON: the processor, new tokens per second, and the ratios.
"""

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from model.cli import positive_int  # noqa: E402
from model.errors import UserError, run_main  # noqa: E402


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="minimind-v1-small", help="default: %(default)s")
    parser.add_argument("--new_tokens", type=positive_int, default=128, help="per request (default: %(default)s)")
    parser.add_argument("--requests", type=positive_int, default=16, help="of the batch (default: %(default)s)")
    parser.add_argument("--repeats", type=positive_int, default=5, help="measurements of each (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="also time the engine with its compiled decoding step")
    return parser.parse_args()


def contenders(args, config, dtype, device):
    """{name: function of a list of prompts that decodes --new_tokens for each} of one number format."""
    import torch
    from training import stock_llama

    from model.inference.engine import Engine
    from model.inference.sampling import SamplingParameters
    from model.model import Transformer

    parameters = SamplingParameters(temperature=0.0, max_new_tokens=args.new_tokens, stop_token_ids=())
    torch.manual_seed(0)
    model = Transformer(config).to(device, dtype).eval()
    stock = stock_llama(config).to(device, dtype).eval()

    def generate(prompts):
        ids = torch.tensor(prompts, device=device)
        with torch.inference_mode():
            stock.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=args.new_tokens,
                min_new_tokens=args.new_tokens,
                do_sample=False,
                pad_token_id=0,
            )

    functions = {"stock": generate}
    for name in ("minimind", "minimind compiled") if args.compile else ("minimind",):
        engine = Engine(model, max_batch=args.requests, compile=name.endswith("compiled"))
        functions[name] = lambda prompts, engine=engine: engine.generate(prompts, parameters)
    return functions


def medians(functions, repeats):
    """{name: median of the numbers that each function returns}, taken in turns after one turn that nobody counts."""
    found = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            number = function()
            found[name] += [number] if turn else []
    return {name: statistics.median(numbers) for name, numbers in found.items()}


def rate(function, prompts, new_tokens):
    """New tokens per second of `function`, which decodes so many for each of the prompts."""
    began = time.perf_counter()
    function(prompts)
    return len(prompts) * new_tokens / (time.perf_counter() - began)


def cpu_name(threads):
    """The processor's name, which of the units that matter here it has, and how many threads are in use."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text("utf-8").splitlines() if known.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in fields.get("flags", "").split()]
    family = f" (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else ""
    return f"{fields.get('model name') or platform.processor()}{family}, {' '.join(units)}, {threads} threads"


def main():
    args = parse_arguments()
    import torch

    from model.device import select_device
    from model.LMConfig import preset_config

    device = select_device(args.device)
    try:
        config = preset_config(args.preset)
    except ValueError as error:
        raise UserError(f"--preset: {error}", exit_code=2) from None
    prompts = torch.randint(
        3, config.vocab_size, (args.requests, 32), generator=torch.Generator().manual_seed(0)
    ).tolist()
    rates, ratios = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        functions = contenders(args, config, dtype, device)
        for count in (1, args.requests):
            label = f"{str(dtype).removeprefix('torch.')}, {count} request{'s' if count > 1 else ''}"
            calls = {
                name: functools.partial(rate, function, prompts[:count], args.new_tokens)
                for name, function in functions.items()
            }
            measured = medians(calls, args.repeats)
            rates[label] = {name: round(number, 1) for name, number in measured.items()}
            ratios[label] = {
                name: round(rate / measured["stock"], 3) for name, rate in measured.items() if name != "stock"
            }
            print(f"{label:22s} " + "  ".join(f"{name} {rate:,.0f} tokens/s" for name, rate in measured.items()))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(torch.get_num_threads())
    print(json.dumps({"device": name, "tokens_per_second": rates, "ratio_to_stock": ratios}))


if __name__ == "__main__":
    run_main(main)
