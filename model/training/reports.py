"""What a training run reports: lines on the terminal, a .jsonl file, Weights & Biases on request; and what they say."""

import dataclasses
import datetime
import json
import math
import os
import re

import torch
from tqdm import tqdm

from model.device import select_dtype
from model.errors import UserError, say, warn
from model.files import atomic_write

# Dense 16-bit tensor-core peaks in TFLOP/s from NVIDIA's data sheets, under regular expressions of which the first that
# matches whole words of a device's name counts. "$" leaves out the Ti, SUPER, D and Laptop cards.
# fmt: off
PEAK_TFLOPS = {
    "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989, "GH200": 989, "B200": 2250, "A100": 312,
    "A800": 312, "A10G": 70, "A10": 125, "A40": 149.7, "A6000": 154.8, "L40S": 362, "L40": 181, "L4": 121, "V100": 125,
    "T4": 65, "RTX 5090$": 209.5, "RTX 4090$": 165.2, "RTX 4080$": 97.5, "RTX 3090$": 71, "RTX 3080$": 59.5,
}
# fmt: on
NO_BFLOAT16 = ("V100", "T4")  # their peak is float16's
# What a line shows besides the loss: name in the log -> name on the terminal.
SHOWN = {"bits_per_byte": "bpb", "reward_margin": "margin", "reward_accuracy": "accuracy", "kl": "KL"}
# What a reference says to the number before it.
USUAL = {"expected_loss": " (expected here {:.2f})", "typical_bits_per_byte": " ({:.2f} on other text)"}


class RunLog:
    """One run's reports, on the main rank alone (active=True); on the others every call does nothing.

    path: .jsonl file, one object a line, each with its "step".
    """

    def __init__(self, path, active=True):
        self.path, self.current, self.active = path, path, active
        self.bar = self.wandb_run = None

    def start(self, first_step, total_steps, wandb_run=None):
        """A fresh run (first_step 0) replaces the file; a resumed one keeps the lines up to its first step, so that no
        step appears twice after a kill."""
        if not self.active:
            return
        kept = self.path.read_text(encoding="utf-8").splitlines() if first_step and self.path.exists() else []
        if not first_step and self.path.exists():  # an earlier run's, as long as its checkpoint is
            self.current = self.path.with_name(f"{self.path.name}.new")
        with atomic_write(self.current, "w", encoding="utf-8") as handle:
            handle.writelines(line + "\n" for line in kept if step_of(line) <= first_step)
        # disable=None: no bar where stderr is not a terminal.
        total = total_steps if total_steps < math.inf else None
        self.bar = tqdm(total=total, initial=first_step, unit="step", disable=None, dynamic_ncols=True)
        self.wandb_run = wandb_run

    def advance(self):
        """One optimizer step is done."""
        if self.bar is not None:
            self.bar.update()

    def write(self, text, **record):
        """Show `text`, append `record` (with its step) to the file, send its numbers to Weights & Biases."""
        if not self.active:
            return
        say(text, write=tqdm.write)
        try:
            self.current.parent.mkdir(parents=True, exist_ok=True)
            with open(self.current, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(record, ensure_ascii=False) + "\n")
        except OSError as error:  # a full disk, for one, ends the run when it saves
            warn(f"{self.current}: {error.strerror}; this line is not in it")
        if self.wandb_run is not None:
            step = record.pop("step")
            self.wandb_run.log(
                {name: value for name, value in record.items() if not isinstance(value, list)}, step=step
            )

    def keep(self):
        """The run's first checkpoint is written: its log takes the place of an earlier run's."""
        if self.current != self.path:
            os.replace(self.current, self.path)
            self.current = self.path

    def discard(self):
        """As if this run, which began at step 0, had not been started: its file goes, an earlier run's stays."""
        if self.active:
            self.current.unlink(missing_ok=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def read_log(path):
    """The records of a run's .jsonl file in order, without a line torn by a kill; [] when there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if step_of(line) < math.inf]


def run_name(path):
    """What a run's log is called: its checkpoint's path in out/, in one word."""
    return path.with_suffix("").as_posix().replace("/", "_")


def step_of(line):
    """The step of one line of the file; a line torn by a kill counts as later than any step."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")


def start_wandb(settings, run_name):
    """A Weights & Biases run, offline (folder wandb/) when it finds no key and WANDB_MODE does not say otherwise."""
    try:
        import wandb
    except ImportError:
        raise UserError("--use_wandb: wandb is not installed; pip install wandb, or leave the flag out") from None
    mode = os.environ.get("WANDB_MODE")
    try:
        mode = mode or ("online" if wandb.login(prompt=False) else "offline")
    except wandb.Error as error:
        warn(f"--use_wandb: {error}; logging offline, to be sent with: wandb sync")
        mode = "offline"
    name, config = settings.wandb_run_name or run_name, dataclasses.asdict(settings)
    return wandb.init(project=settings.wandb_project, name=name, config=config, mode=mode)


def mean_loss(sums):
    """(nats per item, bits per byte) of the sums over some batches: nats, items (supervised targets), size (their UTF-8
    bytes). Items without bytes, pairs of answers for one, have no bits per byte: None."""
    bits_per_byte = sums["nats"] / math.log(2) / sums["size"] if sums["size"] else None
    return sums["nats"] / max(1, sums["items"]), bits_per_byte


def step_line(record, step_of_total):
    """The line on the terminal for one record of the log."""
    usual = {name: "" for name in USUAL} | {
        name: text.format(record[name]) for name, text in USUAL.items() if name in record
    }
    numbers = {**record, **usual, "further": further(record), "place": step_of_total}
    text = "{place}  epoch {epoch:.2f}  loss {loss:.4f}{expected_loss}{further}{typical_bits_per_byte}"
    text = (text + "  lr {learning_rate:.2e}  norm {gradient_norm:.2f}  {tokens_per_second:,.0f} tok/s").format(
        **numbers
    )
    if "mfu" in record:
        text += f"  MFU {record['mfu']:.1%}"
    if "seconds_left" in record:
        text += f"  left {datetime.timedelta(seconds=int(record['seconds_left']))}"
    if "expert_load" in record:
        shares = " ".join(f"{share:.0%}" for share in record["expert_load"])
        text += f"  experts {shares} (least in a layer {record['least_expert_load']:.0%})"
    return text


def validation_line(record, step_of_total, items):
    """The line on the terminal for one validation, over `items` held-out tokens or pairs."""
    what = "tokens" if "validation_bits_per_byte" in record else "pairs"
    text = f"{step_of_total}  validation loss {record['validation_loss']:.4f}{further(record, 'validation_')}"
    return f"{text}  ({items:,} held-out {what})"


def further(record, prefix=""):
    """Those of SHOWN that a record has, each with two blanks before it."""
    return "".join(f"  {title} {record[prefix + name]:.4f}" for name, title in SHOWN.items() if prefix + name in record)


def describe_model(model, dtype):
    """One line: how many parameters, of which shape, where and in which number format."""
    config = model.config
    total, active = count_parameters(model)
    experts = f", {active:,} of them at work on a token" if active != total else ""
    shape = f"dim {config.dim}, {config.n_layers} layers, {config.n_heads}/{config.n_kv_heads} heads"
    kind = str(select_dtype(dtype, model.device)).removeprefix("torch.")
    return f"model: {total:,} parameters{experts}; {shape}, {config.vocab_size:,} words; {kind} on {model.device.type}"


def count_parameters(model):
    """(all parameters, those that work on one token): of the routed experts only num_experts_per_tok do."""
    total = sum(whole_size(parameter) for parameter in model.parameters())
    routed = sum(whole_size(p) for name, p in model.named_parameters() if ".feed_forward.experts." in name)
    config = model.config
    idle = 1 - config.num_experts_per_tok / config.n_routed_experts if config.use_moe else 0
    return total, total - round(routed * idle)


def whole_size(parameter):
    """How many numbers a parameter has, also one of which DeepSpeed keeps but a part here."""
    return getattr(parameter, "ds_numel", parameter.numel())


def flops_per_token(model, length):
    """Floating-point operations of forward and backward for one token in a row of `length` tokens: 6 N + 12 L H Q T
    with N the parameters at work (the tied embedding counts once, as the output product), L layers, H * Q = dim, T the
    row length (Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B). Of frozen parameters 4 N: they have no gradient.
    """
    frozen = sum(whole_size(parameter) for parameter in model.parameters() if not parameter.requires_grad)
    total, working = count_parameters(model)
    return 6 * working - 2 * round(frozen * working / total) + 12 * model.config.n_layers * model.config.dim * length


def peak_flops(device, dtype):
    """Dense peak of the device in FLOP/s for products in `dtype`; None where it is not known (any CPU, a part of a GPU
    under MIG) or the tensor cores do not work in dtype (float32; bfloat16 before Ampere)."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    key = next((key for key in PEAK_TFLOPS if re.search(rf"\b{key}\b", name)), None)
    if key is None or " MIG " in name or (key in NO_BFLOAT16 and dtype != torch.float16):
        return None
    return PEAK_TFLOPS[key] * 1e12
