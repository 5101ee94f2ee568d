"""Serving: requests that come and go while others run, in the engine, over HTTP, and beside llama.cpp's server.

    python benchmarks/serving.py                        # the 26M shape with random weights, about five minutes
    python benchmarks/serving.py | tee out/serving.txt && tail -n 1 out/serving.txt > out/serving.json
    python images/draw.py serving --results out/serving.json --output images/serving.png

Measured, all greedy, on random prompts of 16 to 112 tokens with answers of 64 to 192:
 - together: the engine with 16 requests in flight, a new one as soon as one ends, against stock transformers' generate():
   on 16 prompts of 64 tokens with 128 new ones each, its best case, and on the same requests, 16 at a time
 - first token: of a request that comes while 15 others run, against its prefill alone: how many of their steps it waits
 - HTTP: 16 clients that stream, against the engine without a server; and from the start of the process to its first answer
 - survival: 2,000 requests of 4 to 300 tokens by 32 clients of which every third leaves in the middle, in float32: what the
   others got is compared with what the engine alone answers; memory of the server after 400 of them and at the end
 - curve: tokens per second and time to first token of 1 to 64 clients that ask again as soon as they have their answer

What is compared takes turns, so that a busy machine disturbs both alike; medians. llama.cpp serves through xllamacpp, with
as many threads and 16 slots. The clients share the processors with the server. The last line is JSON.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import deque
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))

from decoding import medians  # noqa: E402

from model.cli import positive_int  # noqa: E402
from model.errors import UserError, run_main  # noqa: E402

ROWS = 16
PARTS = ("together", "first_token", "http", "survival", "curve")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="minimind-v1-small", help="default: %(default)s")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--requests", type=positive_int, default=64, help="of a measurement (default: %(default)s)")
    parser.add_argument("--repeats", type=positive_int, default=3, help="measurements of each (default: %(default)s)")
    parser.add_argument(
        "--survivors", type=positive_int, default=2000, help="requests to survive (default: %(default)s)"
    )
    parser.add_argument(
        "--clients", type=positive_int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="of the curve"
    )
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------- the engine


def workload(count, prompt=(16, 112), answer=(64, 192), seed=0):
    """[(token ids of a prompt, how many new tokens)], lengths and ids at random."""
    chance = random.Random(seed)
    return [
        ([chance.randrange(3, 6400) for _ in range(chance.randint(*prompt))], chance.randint(*answer))
        for _ in range(count)
    ]


def greedy(new_tokens):
    from model.settings import SamplingParameters

    return SamplingParameters(temperature=0.0, max_new_tokens=new_tokens, stop_token_ids=())


def run_engine(engine, work, steady=False):
    """Tokens per second over `work`, ROWS of them in flight; steady: from when the first one has ended, so that they no longer
    start together, until nothing new is left to start."""
    waiting, requests, tokens, began = deque(work), [], 0, time.perf_counter()
    while waiting or (engine.has_work and not steady):
        while waiting and len(engine.rows) + len(engine.waiting) < ROWS:
            prompt, count = waiting.popleft()
            requests.append(engine.add(prompt, greedy(count)))
        tokens += sum(len(delta.token_ids) for delta in engine.step())
        if steady and len(requests) == ROWS:  # nobody has come after the first ones yet
            tokens, began = 0, time.perf_counter()
    seconds = time.perf_counter() - began
    for request in requests:
        engine.cancel(request)
    return tokens / seconds


def run_stock(model, work):
    """Tokens per second of generate() over `work`, ROWS at a time, padded on the left; each batch ends with its longest."""
    import torch

    tokens, began = 0, time.perf_counter()
    for start in range(0, len(work), ROWS):
        prompts, counts = zip(*work[start : start + ROWS])
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        length = dict(max_new_tokens=max(counts), min_new_tokens=max(counts), do_sample=False, pad_token_id=0)
        with torch.inference_mode():
            model.generate(ids, attention_mask=mask, **length)
        tokens += sum(counts)
    return tokens / (time.perf_counter() - began)


def load_engines(checkpoint, dtypes, rows=ROWS):
    """{"minimind <dtype>": Engine}."""
    from model.inference.open import open_engine
    from model.settings import InferenceSettings

    settings = {dtype: InferenceSettings(checkpoint=str(checkpoint), device="cpu", dtype=dtype) for dtype in dtypes}
    return {f"minimind {dtype}": open_engine(each, max_batch=rows)[0] for dtype, each in settings.items()}


def measure_together(args, checkpoint):
    """Tokens per second of requests that come and go, and of generate(); ratios to generate()'s best batch."""
    import torch
    from training import stock_llama

    engines = load_engines(checkpoint, ("float32", "bfloat16", "int8"))
    config, work = engines["minimind float32"].model.config, workload(args.requests)
    alike = workload(ROWS, (64, 64), (128, 128))
    functions = {name: lambda engine=engine: run_engine(engine, work, steady=True) for name, engine in engines.items()}
    for dtype in (torch.float32, torch.bfloat16):
        stock, name = stock_llama(config).to(dtype).eval(), f"generate {str(dtype).removeprefix('torch.')}"
        functions[f"{name}, alike"] = lambda stock=stock: run_stock(stock, alike)
        functions[f"{name}, the same requests"] = lambda stock=stock: run_stock(stock, work)
    rates = medians(functions, args.repeats)
    best = max(rate for name, rate in rates.items() if name.endswith("alike"))
    return {name: {"tokens_per_second": round(rate, 1), "ratio": round(rate / best, 3)} for name, rate in rates.items()}


def measure_first_token(args, checkpoint):
    """A request that comes while 15 others run: {prompt tokens: milliseconds until its first token, of its prefill alone, of
    a step of the others, and how many such steps the difference is, the median and the worst}."""
    (engine,), results = load_engines(checkpoint, ["bfloat16"], ROWS + 1).values(), {}

    def until_first(prompt):
        began, request = time.perf_counter(), engine.add(prompt, greedy(1))
        while not request.token_ids:
            engine.step()
        return 1000 * (time.perf_counter() - began)

    for length in (32, 128, 400):
        prompts = [prompt for prompt, _ in workload(20, (length, length))]
        alone = statistics.median([until_first(prompt) for prompt in prompts])
        others = [engine.add(prompt, greedy(400)) for prompt, _ in workload(ROWS - 1, seed=1)]
        steps = []
        while any(not request.token_ids for request in others):
            engine.step()
        for _ in range(40):
            began = time.perf_counter()
            engine.step()
            steps.append(1000 * (time.perf_counter() - began))
        step, under_load = statistics.median(steps), [until_first(prompt) for prompt in prompts]
        assert not any(request.finish_reason for request in others)
        for request in others:
            engine.cancel(request)
        waited = [(milliseconds - alone) / step for milliseconds in under_load]
        results[length] = dict(
            milliseconds=round(statistics.median(under_load), 1), prefill_milliseconds=round(alone, 1),
            step_milliseconds=round(step, 1), steps=round(statistics.median(waited), 2), most_steps=round(max(waited), 2),
        )  # fmt: skip
    return results


# -------------------------------------------------------------------------------------------------------- over HTTP


@contextlib.contextmanager
def minimind_server(checkpoint, dtype):
    """my_openai_api.py in a process of its own; yields (its address, its process, seconds until it was ready)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--checkpoint", checkpoint, "--device", "cpu", "--dtype", dtype, "--port", port, "--max_batch", ROWS]
    command, began = [sys.executable, ROOT / "my_openai_api.py", *words], time.perf_counter()
    with subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, cwd=ROOT) as process:
        try:
            while True:
                with contextlib.suppress(urllib.error.URLError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
                    break
                if process.poll() is not None:
                    raise UserError("my_openai_api.py ended before it was ready")
                time.sleep(0.01)
            yield ("127.0.0.1", port), process, time.perf_counter() - began
        finally:
            process.send_signal(signal.SIGTERM)


def serve_llama_cpp(path, threads, pipe):
    """In a process of its own: llama.cpp's server, until the pipe says otherwise."""
    import xllamacpp

    wanted = xllamacpp.CommonParams()
    wanted.model.path = str(path)
    wanted.n_parallel, wanted.n_ctx = ROWS, ROWS * 512
    wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = threads
    wanted.n_gpu_layers, wanted.verbosity = 0, -1
    server = xllamacpp.Server(wanted)
    pipe.send(server.listening_address)
    pipe.recv()


@contextlib.contextmanager
def llama_cpp_server(path):
    """llama.cpp's server of a GGUF; yields its address."""
    import torch

    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=serve_llama_cpp, args=(path, torch.get_num_threads(), theirs), daemon=True)
    process.start()
    try:
        host, _, port = ours.recv().removeprefix("http://").rpartition(":")
        yield host, int(port)
    finally:
        process.terminate()
        process.join()


async def ask(address, prompt, new_tokens, leave_after=None):
    """Stream one answer; returns (seconds until its first token, tokens, text). leave_after: hang up after so many events."""
    fixed = dict(temperature=0, stream=True, stream_options={"include_usage": True})
    llama_cpp = dict(ignore_eos=True, cache_prompt=False)  # which others ignore
    body = json.dumps({"prompt": prompt, "max_tokens": new_tokens, **fixed, **llama_cpp}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    began, first, texts, usage = time.perf_counter(), None, [], None
    reader, writer = await asyncio.open_connection(*address, limit=1 << 20)
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise UserError(f"the server answers {status.decode().strip()}: {(await reader.read()).decode()[-300:]}")
        async for line in reader:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            first = first or time.perf_counter() - began
            if leave_after is not None and len(texts) >= leave_after:
                return first, 0, None
            event = json.loads(line[6:])
            texts += [choice["text"] for choice in event["choices"]]
            usage = event.get("usage") or usage
    finally:
        writer.close()
    return first, usage["completion_tokens"], "".join(texts)


async def ask_all(address, work, clients):
    """`clients` clients go through `work` together; returns (tokens per second, [seconds until each first token])."""
    waiting, firsts, tokens = iter(work), [], 0

    async def client():
        nonlocal tokens
        for prompt, count in waiting:
            first, received, _ = await ask(address, prompt, count)
            firsts.append(first)
            tokens += received

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return tokens / (time.perf_counter() - began), firsts


def measure_http(args, checkpoint):
    """Tokens per second of the engine alone and behind HTTP, and the share that HTTP costs; seconds until the server is
    ready."""
    (engine,), work, ready = load_engines(checkpoint, ["bfloat16"]).values(), workload(args.requests), []
    with minimind_server(checkpoint, "bfloat16") as (address, _, seconds):
        ready.append(seconds)
        functions = dict(
            engine=lambda: run_engine(engine, work), http=lambda: asyncio.run(ask_all(address, work, ROWS))[0]
        )
        rates = medians(functions, args.repeats)
    for _ in range(args.repeats - 1):
        with minimind_server(checkpoint, "auto") as (_, _, seconds):
            ready.append(seconds)
    result = {name: round(rate, 1) for name, rate in rates.items()}
    return {
        **result,
        "cost": round(1 - rates["http"] / rates["engine"], 3),
        "ready_seconds": round(statistics.median(ready), 2),
    }


def measure_survival(args, checkpoint):
    """Requests by 32 clients of which every third hangs up midway: how many were whole and right, and what is left behind."""
    import psutil

    (engine,), cases = load_engines(checkpoint, ["float32"]).values(), workload(400, (4, 300), (4, 24))
    expected = [
        request.text for request in engine.generate(*zip(*((prompt, greedy(count)) for prompt, count in cases)))
    ]
    outcomes = dict(left=0, right=0, wrong=0)

    async def client(address, numbers):
        for number in numbers:
            (prompt, count), leaves = cases[number % len(cases)], number % 3 == 0
            _, _, text = await ask(
                address, prompt, 400 if leaves else count, leave_after=number % 5 if leaves else None
            )
            outcomes["left" if leaves else "right" if text == expected[number % len(cases)] else "wrong"] += 1

    async def flood(address, count):
        numbers = iter(range(count))
        await asyncio.gather(*(client(address, numbers) for _ in range(32)))

    def megabytes(process):
        return psutil.Process(process.pid).memory_info().rss / 1e6

    with minimind_server(checkpoint, "float32") as (address, process, _):
        asyncio.run(flood(address, 400))
        before, outcomes = megabytes(process), dict.fromkeys(outcomes, 0)
        asyncio.run(flood(address, args.survivors))
        time.sleep(1)
        grown = megabytes(process) - before
        metrics = urllib.request.urlopen("http://{}:{}/metrics".format(*address)).read().decode()
    left = [line for line in metrics.splitlines() if "running_requests " in line and not line.startswith("#")]
    return {
        **outcomes,
        "still_running": float(left[0].split()[-1]),
        "megabytes": round(before),
        "grown_megabytes": round(grown, 1),
    }


def measure_curve(args, checkpoint, folder):
    """{server: [{"clients", "tokens_per_second", "first_token_seconds": median, "first_token_95": 95th percentile}]}."""
    from exports import export

    def points(address):
        found = []
        asyncio.run(ask_all(address, workload(4), 1))  # warm
        for clients in args.clients:
            count = max(8, 3 * clients)
            rate, firsts = asyncio.run(ask_all(address, workload(count, answer=(64, 64), seed=clients), clients))
            slowest = sorted(firsts)[int(0.95 * (len(firsts) - 1))]
            found.append(
                dict(clients=clients, tokens_per_second=round(rate, 1), first_token_seconds=round(statistics.median(firsts), 4),
                     first_token_95=round(slowest, 4))
            )  # fmt: skip
        return found

    curves = {}
    for dtype in ("bfloat16", "int8"):
        with minimind_server(checkpoint, dtype) as (address, _, _):
            curves[f"minimind {dtype}"] = points(address)
    for kind in ("bf16", "q8_0"):
        with llama_cpp_server(export(checkpoint, folder, "gguf", "--quantization", kind)) as address:
            curves[f"llama.cpp {kind}"] = points(address)
    return curves


def main():
    args = parse_arguments()
    import psutil
    import torch
    from decoding import cpu_name
    from exports import random_checkpoint

    results = {"processor": cpu_name(torch.get_num_threads()), "load_average": round(psutil.getloadavg()[0], 2)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = random_checkpoint(args.preset, folder)
        measures = dict(
            together=measure_together, first_token=measure_first_token, http=measure_http, survival=measure_survival,
            curve=lambda *given: measure_curve(*given, folder),
        )  # fmt: skip
        for part in args.parts:
            results[part] = measures[part](args, checkpoint)
            print(f"\n{part}")
            for name, value in results[part].items():
                rows = value if isinstance(value, list) else [value]
                print("\n".join(f"  {name!s:40s} {row}" for row in rows))
    print(json.dumps(results))


if __name__ == "__main__":
    run_main(main)
