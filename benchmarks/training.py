"""Training speed: MiniMind against a stock transformers Llama of the same shape, and mixture of experts against dense.

    python benchmarks/training.py                          # 26M, bfloat16 autocast, batch 4 x 512
    python benchmarks/training.py --compile
    python benchmarks/training.py --presets minimind-v1-small minimind-v1 minimind-v1-moe --batch_size 64   # on a GPU

Every step is what a stage does: forward, backward, gradient norm, fused AdamW. The models take turns step by step in one
process, so that a busy machine disturbs them alike; the median step counts. On a GPU with a known peak the table has
MFU. The last line is JSON.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from model.cli import positive_int  # noqa: E402
from model.errors import UserError, run_main  # noqa: E402


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["minimind-v1-small", "minimind-v1-moe"])
    parser.add_argument("--batch_size", type=positive_int, default=4, help="rows per step (default: %(default)s)")
    parser.add_argument("--max_seq_len", type=positive_int, default=512, help="tokens per row (default: %(default)s)")
    parser.add_argument("--steps", type=positive_int, default=7, help="measured steps (default: %(default)s)")
    parser.add_argument("--n_shared_experts", type=int, default=1, help="of mixtures of experts (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="default: %(default)s")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    parser.add_argument("--compile", action="store_true", help="torch.compile all of them")
    return parser.parse_args()


def stock_llama(config):
    """transformers' Llama with the shape of `config`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    stock = LlamaConfig(
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.max_seq_len,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(stock)


def make_step(model, batch, device, dtype, compiled, **arguments):
    """A function that trains `model` by one step on `batch`, token ids [B, T], and returns when the device is done."""
    import torch

    from model.device import autocast

    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    forward = torch.compile(model) if compiled else model

    def step():
        with autocast(device, dtype):
            output = forward(input_ids=batch, labels=batch, **arguments)
            loss = output.loss + getattr(output, "aux_loss", 0.0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return waited(step, device)


def make_own_step(model, batch, device, dtype, compiled):
    """make_step of one of our models, prepared as a stage prepares it."""
    from model.training import cpu_kernels

    cpu_kernels.install(model, device, dtype, compiled)
    model.to(device).rotary_table(batch.shape[1], device)  # as training does: made within it would be compiled in
    return make_step(model, batch, device, dtype, compiled, return_logits=False)


def waited(function, device):
    """`function`, which then returns when the device is done."""
    import torch

    def call():
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return call


def device_name(device):
    """What the last line says of the machine."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def median_seconds(steps, count):
    """Median seconds of each step function, taken in turns, after two turns that nobody counts."""
    seconds = {name: [] for name in steps}
    for turn in range(count + 2):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name] += [time.perf_counter() - began] if turn >= 2 else []
    return {name: statistics.median(values) for name, values in seconds.items()}


def main():
    args = parse_arguments()
    import torch

    from model.device import select_device, select_dtype
    from model.LMConfig import preset_config
    from model.model import Transformer
    from model.training.reports import flops_per_token, peak_flops

    device = select_device(args.device)
    dtype = select_dtype(args.dtype, device)
    torch.manual_seed(0)
    batch = torch.randint(0, 6400, (args.batch_size, args.max_seq_len), device=device)
    steps, flops = {}, {}
    for preset in args.presets:
        try:
            config = preset_config(preset, max_seq_len=args.max_seq_len, n_shared_experts=args.n_shared_experts)
        except ValueError as error:
            raise UserError(f"--presets: {error}", exit_code=2) from None
        model = Transformer(config)
        steps[preset] = make_own_step(model, batch, device, dtype, args.compile)
        flops[preset] = flops_per_token(model, args.max_seq_len)
        if not config.use_moe:
            steps[f"stock {preset}"] = make_step(stock_llama(config), batch, device, dtype, args.compile)
            flops[f"stock {preset}"] = flops[preset]
    seconds = median_seconds(steps, args.steps)

    tokens, peak = batch.numel(), peak_flops(device, dtype)
    rates = {name: tokens / value for name, value in seconds.items()}
    for name, rate in rates.items():
        mfu = f"  MFU {rate * flops[name] / peak:.1%}" if peak else ""
        print(f"{name:26s} {rate:12,.0f} tokens/s{mfu}")
    ratios = {name: rates[name] / rates[f"stock {name}"] for name in args.presets if f"stock {name}" in rates}
    if "minimind-v1-moe" in rates and "minimind-v1-small" in rates:
        ratios["minimind-v1-moe"] = rates["minimind-v1-moe"] / rates["minimind-v1-small"]
    result = {
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "compiled": args.compile,
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio_to_stock_and_moe_to_dense": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "mfu": {name: round(rate * flops[name] / peak, 4) for name, rate in rates.items()} if peak else None,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
