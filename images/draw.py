"""The pictures of README.md: the structure of a preset, drawn from its configuration; curves of the loss and of what each
expert has to do, drawn from logs; how servers do under load, drawn from what benchmarks/serving.py measured. And the
references in images/reference, thinned logs of real runs, with which training and curves compare a run of the same kind.

python images/draw.py model --preset minimind-v1-small --output images/structure_dense.png
python images/draw.py model --preset minimind-v1-moe --output images/structure_moe.png
python images/draw.py curves --logs out/logs/pretrain_512.jsonl --output images/loss.png
python images/draw.py reference --log out/quickstart/logs/pretrain_192.jsonl --output images/reference/demo_pretrain.jsonl
python images/draw.py experts --logs out/logs/pretrain_512_moe.jsonl --output images/experts.png
python images/draw.py serving --results out/serving.json --output images/serving.png
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.errors import UserError, run_main  # noqa: E402
from model.files import atomic_write  # noqa: E402

NORM, MIX, FEED, ROUTE, EDGE = "#fde9c9", "#cfe3f7", "#d5efd3", "#f3d3e2", "#444444"


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model", help="structure of a preset")
    model.add_argument("--preset", default="minimind-v1-small")
    curves = commands.add_parser("curves", help="training and validation loss of one or more runs")
    experts = commands.add_parser("experts", help="share of the tokens that each expert got in one or more runs")
    for command in (curves, experts):
        command.add_argument("--logs", nargs="+", required=True, help="files of out/logs, left to right")
    compare = (
        "draw this reference behind each curve; auto: the one of images/reference for the same stage, shape and data"
    )
    curves.add_argument("--reference", default="auto", metavar="auto|none|FILE", help=f"{compare} (default: auto)")
    reference = commands.add_parser(
        "reference", help="a reference, made of a run's log and the .json of its checkpoint"
    )
    reference.add_argument("--log", type=Path, required=True, help="out/logs/<run>.jsonl, beside its checkpoint")
    typical = "of ordinary text: the bits per byte of runs on other data are compared with it too"
    reference.add_argument("--typical", action="store_true", help=typical)
    reference.add_argument("--output", type=Path, required=True, help="the .jsonl to write")
    serving = commands.add_parser("serving", help="tokens per second and time to first token by number of clients")
    serving.add_argument("--results", required=True, help="the JSON line of benchmarks/serving.py, in a file")
    for command in (model, curves, experts, serving):
        command.add_argument("--output", required=True, help="the .png to write")
    return parser.parse_args()


def main():
    args = parse_arguments()
    if args.command == "reference":
        from model.training.reference import write_reference

        write_reference(args.log, args.output, args.typical)
        print(f"{args.output} is written")
        return
    import matplotlib

    matplotlib.use("Agg")
    drawings = dict(
        model=lambda: draw_model(args.preset),
        curves=lambda: draw_curves(args.logs, args.reference),
        experts=lambda: draw_experts_at_work(args.logs),
        serving=lambda: draw_serving(args.results),
    )
    figure = drawings[args.command]()
    with atomic_write(args.output) as handle:
        figure.savefig(handle, format="png", dpi=110, bbox_inches="tight")
    print(f"{args.output} is written")


def box(axes, center, width, text, color):
    """A rounded box around (x, y) of `center`, 0.62 high."""
    from matplotlib.patches import FancyBboxPatch

    x, y = center[0] - width / 2, center[1] - 0.31
    axes.add_patch(FancyBboxPatch((x, y), width, 0.62, boxstyle="round,pad=0.06", facecolor=color, edgecolor=EDGE))
    axes.text(*center, text, ha="center", va="center", fontsize=9)


def arrow(axes, *points):
    """A line through `points` with a head at the last one."""
    for (x0, y0), (x1, y1) in zip(points[:-2], points[1:-1]):
        axes.plot([x0, x1], [y0, y1], color=EDGE, linewidth=1.1)
    axes.annotate("", points[-1], points[-2], arrowprops=dict(arrowstyle="-|>", color=EDGE, linewidth=1.1))


def draw_model(preset):
    """One transformer block inside the whole model; every number comes from the preset's configuration."""
    import matplotlib.pyplot as pyplot
    import torch

    from model.LMConfig import preset_config
    from model.model import Transformer

    try:
        config = preset_config(preset)
    except ValueError as error:
        raise UserError(f"--preset: {error}", exit_code=2) from None
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in Transformer(config).parameters())
    figure, axes = pyplot.subplots(figsize=(9.5, 12.2))
    axes.set(xlim=(-4.6, 5.4), ylim=(-0.8, 14.2))
    axes.axis("off")
    axes.set_title(f"{preset}: {parameters:,} parameters", fontsize=13)

    box(axes, (0, 0), 4.4, f"token embedding   {config.vocab_size:,} x {config.dim}", MIX)
    axes.text(0, -0.7, "token ids [B, T]", ha="center", fontsize=9)
    draw_block(axes, config)
    box(axes, (0, 12.1), 4.4, "RMSNorm", NORM)
    box(axes, (0, 13.2), 4.4, f"output   {config.dim} x {config.vocab_size:,}  (= embedding, tied)", MIX)
    arrow(axes, (0, 0.37), (0, 1.53))
    arrow(axes, (0, 10.75), (0, 11.73))
    arrow(axes, (0, 12.47), (0, 12.83))
    axes.text(0, 13.8, f"logits [B, T, {config.vocab_size:,}]", ha="center", fontsize=9)
    return figure


def draw_block(axes, config):
    """Attention and feed-forward with their residual connections, in a frame that says how often it is repeated."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((-4.4, 0.8), 9.6, 10.4, fill=False, edgecolor=EDGE, linestyle="--"))
    axes.text(5.0, 10.8, f"x {config.n_layers} layers", ha="right", fontsize=11)
    width, half = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    box(axes, (0, 1.9), 4.4, "RMSNorm", NORM)
    box(axes, (-2.1, 3.1), 1.9, f"wq  {config.dim}x{width}", MIX)
    box(axes, (0, 3.1), 1.9, f"wk  {config.dim}x{half}", MIX)
    box(axes, (2.1, 3.1), 1.9, f"wv  {config.dim}x{half}", MIX)
    heads = f"{config.n_heads} query heads share {config.n_kv_heads} key/value heads of {config.head_dim}"
    box(axes, (0, 4.2), 6.3, f"rotary embedding on q, k; causal attention\n{heads}", MIX)
    box(axes, (0, 5.3), 4.4, f"wo  {width}x{config.dim}", MIX)
    for x in (-2.1, 0, 2.1):
        arrow(axes, (0, 2.27), (x, 2.73))
        arrow(axes, (x, 3.47), (x, 3.83))
    arrow(axes, (0, 4.57), (0, 4.93))
    arrow(axes, (0, 5.67), (0, 6.03))
    arrow(axes, (0, 6.3), (0, 6.93))
    box(axes, (0, 7.3), 4.4, "RMSNorm", NORM)
    for branch, plus in ((1.15, 6.15), (6.5, 10.6)):  # around attention, around the feed-forward
        arrow(axes, (0, branch), (-4.1, branch), (-4.1, plus), (-0.2, plus))
        axes.text(0, plus, "+", ha="center", va="center", fontsize=15)
    (draw_experts if config.use_moe else draw_feed_forward)(axes, config)


def draw_feed_forward(axes, config):
    box(axes, (-1.3, 8.4), 2.4, f"w1  {config.dim}x{config.hidden_dim}, SiLU", FEED)
    box(axes, (1.3, 8.4), 2.4, f"w3  {config.dim}x{config.hidden_dim}", FEED)
    box(axes, (0, 9.5), 4.4, f"product, w2  {config.hidden_dim}x{config.dim}   (SwiGLU)", FEED)
    for x in (-1.3, 1.3):
        arrow(axes, (0, 7.67), (x, 8.03))
        arrow(axes, (x, 8.77), (x, 9.13))
    arrow(axes, (0, 9.87), (0, 10.45))


def draw_experts(axes, config):
    """The gate and its experts side by side; the shared ones, which see every token, at the right."""
    gate = f"gate: softmax over {config.n_routed_experts}, top {config.num_experts_per_tok}, renormalised"
    expert = f"to experts, each a SwiGLU of {config.dim}-{config.hidden_dim}-{config.dim}"
    box(axes, (-1.2, 8.4), 4.4, f"{gate}\n{expert}", ROUTE)
    arrow(axes, (-1.2, 7.67), (-1.2, 8.03))
    count = config.n_routed_experts
    for index in range(count):
        x = -3.2 + 4.0 * index / max(count - 1, 1)
        box(axes, (x, 9.5), 4.0 / count - 0.05, f"expert {index}", FEED)
        arrow(axes, (-1.2, 8.77), (x, 9.13))
        arrow(axes, (x, 9.87), (-0.15, 10.5))
    if config.n_shared_experts:
        width = config.hidden_dim * config.n_shared_experts
        box(axes, (3.3, 9.5), 2.9, f"{config.n_shared_experts} shared: SwiGLU\n{config.dim}-{width}-{config.dim}", FEED)
        arrow(axes, (2.26, 7.3), (3.3, 7.3), (3.3, 9.13))
        arrow(axes, (3.3, 9.87), (0.15, 10.5))


def draw_curves(logs, reference="none"):
    """One panel per log: training loss of every report, validation loss as dots with their bits per byte; of a log on pairs
    of answers, which has none, accuracy and margin too. reference: "none", or what is drawn behind, see reference_for."""
    figure, panels = panels_of(logs)
    for axes, path in zip(panels, logs):
        records = read_log(path)
        lines = draw_reference(axes, records, reference_for(path, reference))
        lines += draw_numbers(axes, records, "loss", "loss", "C0")
        for record in held_out_ends(records):
            text = f"{record['validation_bits_per_byte']:.2f} bits/byte"
            place = (record["step"], record["validation_loss"])
            beside = (-20, 12) if record["step"] else (8, -3)
            axes.annotate(text, place, textcoords="offset points", xytext=beside, fontsize=8)
        preferences = any("reward_accuracy" in record for record in records)
        unit = "per pair" if preferences else "nats per token"
        axes.set(title=Path(path).stem, xlabel="optimizer step", ylabel=f"loss ({unit})")
        axes.grid(alpha=0.3)
        if preferences:
            right = axes.twinx()
            right.set_ylabel("accuracy, reward margin")
            lines += draw_numbers(right, records, "reward_accuracy", "accuracy", "C2")
            lines += draw_numbers(right, records, "reward_margin", "margin", "C1")
            axes.legend(handles=lines, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=8)
        else:
            axes.legend()
    figure.tight_layout()
    return figure


def reference_for(log, which):
    """The Reference to draw behind the curve of `log`: None for "none"; for "auto" that of the same stage, shape and data, if
    there is one; else that in the file `which`. Raises UserError for a file of another stage or shape than the log's."""
    if which == "none":
        return None
    from model.training.reference import Reference, described_run, find_reference

    if which != "auto":
        found, run = Reference(which), described_run(log)
        if not found.same_kind(run):
            what = " and ".join(f"{one['stage']} of dim {one['config'].get('dim')}" for one in (found.header, run))
            raise UserError(
                f"--reference {which}: is of another stage or preset than {log} ({what}); give one of its kind"
            )
        return found
    try:
        run = described_run(log)
    except UserError:  # a log by itself
        return None
    found = find_reference(run)
    return found if found and found.same_data(run) else None


def draw_reference(axes, records, reference):
    """A grey line: the loss of a Reference where the run has seen as many tokens; [] without one, else that line."""
    points = [
        (record["tokens_seen"], record["step"]) for record in records if "loss" in record and "tokens_seen" in record
    ]
    if reference is None or not points:
        return []
    tokens, steps = zip((0, 0), *points)
    within = reference.tokens <= tokens[-1]
    places = np.interp(reference.tokens[within], tokens, steps)
    losses, label = reference.numbers["loss"][within], f"reference: {reference.name}"
    return axes.plot(places, losses, color="0.7", linewidth=3, label=label)


def draw_serving(path):
    """Two panels by number of clients: tokens per second of all of them, and seconds until the first token, the median and,
    dotted, the slowest twentieth."""
    import matplotlib.pyplot as pyplot

    try:
        results = json.loads(Path(path).read_text("utf-8"))
        curves, machine = results["curve"], results["processor"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not what benchmarks/serving.py prints ({error!r})") from None
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.4, 4.2))
    for index, (server, points) in enumerate(curves.items()):
        clients, style = [point["clients"] for point in points], dict(color=f"C{index}", linewidth=1.3, markersize=4)
        left.plot(clients, [point["tokens_per_second"] for point in points], "-o", label=server, **style)
        right.plot(clients, [point["first_token_seconds"] for point in points], "-o", label=server, **style)
        right.plot(clients, [point["first_token_95"] for point in points], ":", **style)
    for axes, title in ((left, "tokens per second"), (right, "seconds to the first token")):
        axes.set_xscale("log", base=2)
        axes.set(title=title, xlabel="clients", xticks=clients, xticklabels=clients)
        axes.grid(alpha=0.3)
    left.set_ylim(bottom=0)
    right.set_yscale("log")
    left.legend(fontsize=8)
    figure.suptitle(machine, fontsize=8)
    figure.tight_layout()
    return figure


def draw_experts_at_work(logs):
    """One panel per log of a mixture of experts: each expert's share of the routing choices, mean over layers, and the least
    that any had in any layer, beside the share that would be fair and half of it."""
    figure, panels = panels_of(logs)
    for axes, path in zip(panels, logs):
        records = [record for record in read_log(path) if "least_expert_load" in record]
        if not records:
            raise UserError(f"{path}: nothing about experts in it, the log of a dense model or an older one")
        steps, loads = [record["step"] for record in records], [record["expert_load"] for record in records]
        for number, shares in enumerate(zip(*loads)):
            axes.plot(steps, shares, linewidth=1, label=f"expert {number}")
        least = [record["least_expert_load"] for record in records]
        axes.plot(steps, least, "k--", linewidth=1, label="least in a layer")
        fair = 1 / len(loads[0])
        axes.axhline(fair, color=EDGE, linewidth=0.6)
        axes.axhline(fair / 2, color=EDGE, linewidth=0.6, linestyle=":")
        axes.set(title=Path(path).stem, xlabel="optimizer step", ylabel="share of the routing choices", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    return figure


def panels_of(logs):
    """(figure, a panel for each log), three in a row."""
    import matplotlib.pyplot as pyplot

    columns = min(3, len(logs))
    rows = math.ceil(len(logs) / columns)
    figure, panels = pyplot.subplots(rows, columns, figsize=(5.2 * columns, 3.8 * rows), squeeze=False)
    for axes in panels.flat[len(logs) :]:
        axes.remove()
    return figure, panels.flat[: len(logs)]


def read_log(path):
    """The records of a training log, which has a step at least."""
    from model.training import reports

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        records = reports.read_log(Path(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a training log ({error})") from None
    if not records:
        raise UserError(f"{path}: not a training log")
    if not any("loss" in record for record in records):
        raise UserError(f"{path}: no step in it yet")
    return records


def draw_numbers(axes, records, name, title, color):
    """One number of the log: a line through what training reports, dots for held-out rows; returns both."""
    drawn = []
    for key, style, label in ((name, "-", "training"), (f"validation_{name}", "o", "held out")):
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            label = label if title == "loss" else f"{title}, {label}"
            drawn += axes.plot(*zip(*points), style, color=color, linewidth=1, markersize=5, label=label)
    return drawn


def held_out_ends(records):
    """The first and the last record of a validation in bits per byte."""
    held_out = [record for record in records if "validation_bits_per_byte" in record]
    return held_out[:1] + held_out[-1:]


if __name__ == "__main__":
    run_main(main)
