"""What an adapter costs: a training step with LoRA against one of all weights, and whether a base in int8 would pay.

    python benchmarks/lora.py                              # 26M, bfloat16 autocast, 4 x 512, adapters of rank 8
    python benchmarks/lora.py --compile --lora_rank 16
    python benchmarks/lora.py --batch_size 64              # on a GPU

Both trainings take turns step by step in one process, and so do three ways of one frozen matrix product (w1 of the preset,
a step's rows): the weights in the training's number format; int8 weights with one scale a row (as QLoRA keeps a base in few
bits), multiplied by torch's int8 kernel; the same turned back into the format at each use. The last line is JSON.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from training import device_name, make_own_step, median_seconds, waited  # noqa: E402

from model.cli import positive_int  # noqa: E402
from model.errors import run_main  # noqa: E402


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="minimind-v1-small", help="default: %(default)s")
    parser.add_argument("--batch_size", type=positive_int, default=4, help="rows per step (default: %(default)s)")
    parser.add_argument("--max_seq_len", type=positive_int, default=512, help="tokens per row (default: %(default)s)")
    parser.add_argument("--lora_rank", type=positive_int, default=8, help="default: %(default)s")
    parser.add_argument("--steps", type=positive_int, default=7, help="measured steps (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="default: %(default)s")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    parser.add_argument("--compile", action="store_true", help="torch.compile both models")
    return parser.parse_args()


def matrix_products(rows, weight, dtype, device):
    """{name: function that multiplies `rows` random vectors by `weight`, float32 [N, K]} for each way of keeping it."""
    import torch

    scales = weight.abs().amax(1) / 127
    quantized = (weight / scales[:, None]).round().to(torch.int8)
    inputs, plain, scales = (part.to(device, dtype) for part in (torch.randn(rows, weight.shape[1]), weight, scales))
    quantized = quantized.to(device)
    ways = {
        f"{dtype}".removeprefix("torch."): lambda: inputs @ plain.T,
        "int8, turned back at each use": lambda: inputs @ (quantized.to(dtype) * scales[:, None]).T,
    }
    if dtype == torch.bfloat16:  # what the kernel takes
        ways["int8, torch's kernel"] = lambda: torch._weight_int8pack_mm(inputs, quantized, scales)
    return {name: waited(way, device) for name, way in ways.items()}


def main():
    args = parse_arguments()
    import torch

    from model.build import requested_config
    from model.device import select_device, select_dtype
    from model.lora import add_adapter
    from model.model import Transformer
    from model.settings import LoraSettings, ModelSettings

    device = select_device(args.device)
    dtype = select_dtype(args.dtype, device)
    torch.manual_seed(0)
    batch = torch.randint(0, 6400, (args.batch_size, args.max_seq_len), device=device)
    config = requested_config(ModelSettings(preset=args.preset, max_seq_len=args.max_seq_len))
    steps, trained = {}, {}
    for name in ("all weights", "adapter"):
        model = Transformer(config)
        if name == "adapter":
            add_adapter(model, LoraSettings(lora_rank=args.lora_rank))
        trained[name] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        steps[name] = make_own_step(model, batch, device, dtype, args.compile)
    seconds = median_seconds(steps, args.steps)
    weight = torch.randn(config.hidden_dim, config.dim)
    products = median_seconds(matrix_products(batch.numel(), weight, dtype, device), 5 * args.steps)

    for name, value in seconds.items():
        print(f"step of {name:32s} {value * 1e3:10.2f} ms  {trained[name]:,} parameters train")
    for name, value in products.items():
        print(f"w1 in {name:34s} {value * 1e3:10.2f} ms")
    format_name, *int8 = products
    result = {
        "device": device_name(device),
        "dtype": format_name,
        "compiled": args.compile,
        "step_of_adapter_to_all_weights": round(seconds["adapter"] / seconds["all weights"], 3),
        "int8_product_to_plain": {name: round(products[name] / products[format_name], 2) for name in int8},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
