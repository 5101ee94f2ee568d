"""The one training loop: every stage hands it rows, parameters and a loss.

A step draws all its micro-batches first and counts their supervised targets over all ranks, so that each micro-batch is
divided by the count of the whole step: gradients do not depend on how a step is split (Hugging Face, "Gradient
accumulation", 2024).
"""

import contextlib
import math
import random
import re
import resource
import signal
import sys
import time
from pathlib import Path

import numpy
import torch
from torch import nn

from model.checkpoint import checkpoint_path, file_sha256, load_weights, read_tensors, resume_path, save_checkpoint
from model.cli import command_line
from model.data.dataset import token_byte_lengths
from model.data.loader import BatchLoader, ResumableSampler
from model.device import autocast, check_compiler, select_device, select_dtype
from model.errors import FULL_DISK, UserError, warn
from model.tokenizer import tokenizer_hash
from model.training import ranks
from model.training.reports import RunLog, duration, start_wandb

# Dense 16-bit tensor-core peaks in FLOP/s from NVIDIA's data sheets, under regular expressions of which the first that
# matches whole words of a device's name counts. "$" leaves out the Ti, SUPER, D and Laptop cards.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 149.7e12,
    "A6000": 154.8e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 5090$": 209.5e12,
    "RTX 4090$": 165.2e12,
    "RTX 4080$": 97.5e12,
    "RTX 3090$": 71e12,
    "RTX 3080$": 59.5e12,
}
NO_BFLOAT16 = ("V100", "T4")  # their peak is float16's
ROWS_PER_STEP = 64  # of a step whose size the user left open
STEPS_FLAG = "--epochs or --max_steps"


def start(args):
    """Device, ranks, seed: returns (torch.device, torch.dtype) and fills in the batch size the user left open."""
    device = select_device(args.device)
    ranks.initialise(device)
    dtype = select_dtype(args.dtype, device)
    if args.batch_size is None:
        args.batch_size = 64 if device.type == "cuda" else 8
        rows = args.batch_size * ranks.world_size()
        args.accumulation_steps = args.accumulation_steps or max(1, ROWS_PER_STEP // rows)
    args.accumulation_steps = args.accumulation_steps or 1
    args.muon_learning_rate = 10 * args.learning_rate if args.muon_learning_rate is None else args.muon_learning_rate
    seed = args.seed + ranks.rank()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return device, dtype


def describe_model(model, device, dtype):
    """One line: how many parameters, of which shape, where and in which number format."""
    config = model.config
    total, active = count_parameters(model)
    experts = f", {active:,} of them at work on a token" if active != total else ""
    shape = f"dim {config.dim}, {config.n_layers} layers, {config.n_heads}/{config.n_kv_heads} heads"
    kind = str(dtype).removeprefix("torch.")
    return f"model: {total:,} parameters{experts}; {shape}, {config.vocab_size:,} words; {kind} on {device.type}"


def count_parameters(model):
    """(all parameters, those that work on one token): of the routed experts only num_experts_per_tok do."""
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = sum(p.numel() for name, p in model.named_parameters() if ".feed_forward.experts." in name)
    config = model.config
    idle = 1 - config.num_experts_per_tok / config.n_routed_experts if config.use_moe else 0
    return total, total - round(routed * idle)


def flops_per_token(model, length):
    """Floating-point operations of forward and backward for one token in a row of `length` tokens: 6 N + 12 L H Q T
    with N the parameters at work (the tied embedding counts once, as the output product), L layers, H * Q = dim, T the
    row length (Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B).
    """
    return 6 * count_parameters(model)[1] + 12 * model.config.n_layers * model.config.dim * length


def peak_flops(device, dtype):
    """Dense peak of the device in FLOP/s for products in `dtype`; None where it is not known (any CPU, a part of a GPU
    under MIG) or the tensor cores do not work in dtype (float32; bfloat16 before Ampere)."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    key = next((key for key in PEAK_FLOPS if re.search(rf"\b{key}\b", name)), None)
    if key is None or " MIG " in name or (key in NO_BFLOAT16 and dtype != torch.float16):
        return None
    return PEAK_FLOPS[key]


def learning_rate_factor(step, total_steps, warmup_steps):
    """Share of the peak learning rate in step `step` (from 0): linear warm-up, then v1's cosine to a tenth,
    0.1 + 0.5 * 0.9 * (1 + cos(pi t / T)) with t and T counted from the end of the warm-up."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def build_optimizers(model, args):
    """A list of optimizers over the trainable parameters: AdamW, or Muon on hidden matrices and AdamW on the rest.

    Only matrices decay, each by learning_rate * weight_decay per step under either optimizer. Muon (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon) orthogonalises updates of linear maps; embeddings, the router and norms are none.
    """
    parameters = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizers, hidden = [], set()
    if args.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise UserError(f"--optimizer muon: PyTorch {torch.__version__} has none; use adamw or PyTorch 2.9")
        matrices = [(name, parameter) for name, parameter in parameters if is_hidden_matrix(name, parameter)]
        hidden = {name for name, _ in matrices}
        rate = args.muon_learning_rate
        decay = args.weight_decay * args.learning_rate / rate if rate else 0.0
        optimizers.append(torch.optim.Muon([matrix for _, matrix in matrices], lr=rate, weight_decay=decay))
    rest = [parameter for name, parameter in parameters if name not in hidden]
    groups = [
        {"params": [parameter for parameter in rest if parameter.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [parameter for parameter in rest if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = parameters[0][1].device.type in ("cpu", "cuda")
    optimizers.append(torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=fused))
    return optimizers


def is_hidden_matrix(name, parameter):
    return name.startswith("layers.") and parameter.dim() == 2 and not name.endswith("gate.weight")


def language_model_loss(model, batch, num_items):
    """Next-token cross-entropy of one micro-batch summed and divided by `num_items`, and the MoE balance loss (mean
    over rows). Any stage may put its own function with these arguments and results in its place."""
    output = model(**batch, num_items_in_batch=num_items, padding_side="right", return_logits=False)
    return output.loss, output.aux_loss


def make_loaders(train, validation, args, device):
    """BatchLoaders of the shuffled training rows and of the validation rows in one fixed order."""
    loaders = []
    for dataset in (train, validation):
        sampler = ResumableSampler(
            len(dataset),
            args.batch_size,
            seed=args.seed,
            rank=ranks.rank(),
            world_size=ranks.world_size(),
            lengths=dataset.lengths,
        )
        loaders.append(BatchLoader(dataset, sampler, args.num_workers, pin_memory=device.type == "cuda"))
    return loaders


def measure(batch, byte_lengths):
    """(supervised targets, rows with any, real tokens, UTF-8 bytes of the targets, T) of a micro-batch on the CPU."""
    targets = batch["labels"][:, 1:]
    supervised = targets != -100
    mask = batch.get("attention_mask")
    tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
    size = int(byte_lengths[targets[supervised]].sum())
    return int(supervised.sum()), int(supervised.any(dim=1).sum()), tokens, size, targets.shape[1] + 1


def compile_model(model, device, dynamic):
    """torch.compile; dynamic: row lengths vary from batch to batch, so one kernel must serve them all."""
    check_compiler(device)
    return torch.compile(model, dynamic=True if dynamic else None)


def random_state(device):
    """The state of every random generator that training draws from, as tensors and plain values."""
    name, keys, *position = numpy.random.get_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *position),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }


def restore_random_state(state, device):
    """Undo what happened to the generators since random_state."""
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def peak_memory(device):
    """Most bytes held at once so far: by torch on a CUDA device, else by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class StopRequest:
    """Context in which the first SIGINT or SIGTERM only sets `requested`; a second one acts as usual."""

    def __enter__(self):
        self.requested = False
        self.previous = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        self.requested = True
        self.restore()
        print(f"{signal.Signals(number).name}: finishing this step, then saving", file=sys.stderr)

    def restore(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __exit__(self, *exception):
        self.restore()


class Trainer:
    """Trains `model` in place by `optimizers` and keeps its checkpoint and logs.

    model: on `device` already. train, validation: datasets (see model.data.dataset; validation may be empty). stage: the
    checkpoint's name without dim, such as "single_chat/full_sft". parent: {"file", "sha256"} of the weights it starts
    from. identity: further {flag: value} that decide what is learned from the data. loss_function: see
    language_model_loss.
    """

    def __init__(
        self, model, optimizers, train, validation, args, *, stage, tokenizer, device, dtype,
        parent=None, identity=None, loss_function=language_model_loss,
    ):  # fmt: skip
        self.model, self.optimizers, self.args = model, optimizers, args
        self.stage, self.device, self.dtype = stage, device, dtype
        self.parent, self.loss_function = parent, loss_function
        self.path = checkpoint_path(args.out_dir, stage, model.config)
        self.runner = ranks.wrap(model, device)
        if args.compile:
            self.runner = compile_model(self.runner, device, dynamic=train.lengths is not None)
        # float16 alone needs scaling: its smallest numbers swallow gradients that bfloat16 keeps.
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.train_loader, self.validation_loader = make_loaders(train, validation, args, device)
        self.validation_start = self.validation_loader.state_dict()
        self.peak_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self.byte_lengths = token_byte_lengths(tokenizer)
        self.tokenizer_hash = tokenizer_hash(tokenizer)
        self.peak_flops = peak_flops(device, dtype)
        self.total_steps = self.count_steps()
        warmup = args.warmup_iters
        self.warmup_steps = min(100, self.total_steps // 20) if warmup is None else warmup
        self.trajectory = self.describe_trajectory(train, identity or {})
        # What a checkpoint tells about the run so far.
        self.progress = dict(step=0, tokens_seen=0, supervised_tokens_seen=0, train_seconds=0.0)
        self.progress.update(validation_loss=None, validation_bits_per_byte=None)
        self.saved_step = None
        self.stopping = False

    @property
    def step(self):
        """Optimizer steps done."""
        return self.progress["step"]

    @property
    def stop_is_due(self):
        """Whether --stop_after asks for no further step."""
        return self.args.stop_after is not None and self.step >= self.args.stop_after

    @property
    def steps_per_epoch(self):
        return math.ceil(len(self.train_loader) / self.args.accumulation_steps)

    def count_steps(self):
        """--epochs in optimizer steps, or --max_steps, or with both what ends first."""
        args = self.args
        if args.epochs is None and args.max_steps is not None:
            return args.max_steps
        return min((args.epochs or args.default_epochs) * self.steps_per_epoch, args.max_steps or math.inf)

    def describe(self):
        """One line: rows, what a step is, how many of them."""
        args, steps = self.args, self.steps_per_epoch
        rows = args.batch_size * ranks.world_size()
        train, validation = len(self.train_loader.dataset), len(self.validation_loader.dataset)
        return (
            f"data: {train:,} rows to train on, {validation:,} to validate; "
            f"a step is {args.accumulation_steps} x {rows} rows of up to {self.model.config.max_seq_len} tokens, "
            f"{steps:,} steps an epoch, {self.total_steps:,} in all"
        )

    def describe_trajectory(self, train, identity):
        """({flag: value} that --resume must not change, {flag: value} that changes the course and gets a warning)."""
        args, config = self.args, self.model.config
        fixed = {
            "--data_path (its contents)": train.cache.folder.name.rpartition("-")[2],  # the fingerprint it is named by
            "--tokenizer_path (its contents)": self.tokenizer_hash,
            "--batch_size": args.batch_size,
            "--accumulation_steps": args.accumulation_steps,
            "--max_seq_len": config.max_seq_len,
            "--seed": args.seed,
            "--optimizer": args.optimizer,
            "the number of processes": ranks.world_size(),
            **identity,
        }
        free = {f"--{name}": getattr(args, name) for name in ("learning_rate", "weight_decay", "grad_clip", "compile")}
        free.update({"--warmup_iters": self.warmup_steps, STEPS_FLAG: f"{self.total_steps} steps"})
        free.update({"--dropout": config.dropout, "--dtype": str(self.dtype), "--device": self.device.type})
        if args.optimizer == "muon":
            free["--muon_learning_rate"] = args.muon_learning_rate
        return fixed, free

    def resume(self):
        """Go back to the last saved step: weights, optimizer, scaler, random generators, position in the data.

        Raises UserError when there is no saved state, or when a flag was changed under which it would mean something
        else.
        """
        path = resume_path(self.path)
        if not path.is_file():
            raise UserError(f"--resume: there is no {path} to go on from; leave out --resume to start from step 0")
        state = read_tensors(path)
        try:
            self.check_trajectory(state["trajectory"])
            load_weights(self.model, state["weights"], path)
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                groups = [dict(group) for group in optimizer.param_groups]
                optimizer.load_state_dict(saved)
                for group, own in zip(optimizer.param_groups, groups):
                    group.update(own)  # rates and decay as the flags of this run say
            self.scaler.load_state_dict(state["scaler"])
            self.train_loader.load_state_dict(state["loader"])
            restore_random_state(state["random"][ranks.rank()], self.device)
            self.progress.update(state["progress"])
            self.parent, self.saved_step = state["parent"], self.step
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}: no training state that fits this run ({error!r}); omit --resume") from None
        if self.path.is_file() and file_sha256(self.path) != state["weights_sha256"]:
            warn(f"{self.path} is not of step {self.step}, where {path} goes on; the next save replaces it")

    def check_trajectory(self, saved):
        """UserError for a changed flag that must not change, a warning for one that bends the course."""
        for changes_meaning, was, now in zip((True, False), saved, self.trajectory, strict=True):
            for flag in was.keys() | now.keys():
                old, new = was.get(flag), now.get(flag)
                if old != new and changes_meaning:
                    raise UserError(f"--resume: {flag} was {old} and is {new} now; give the old one or omit --resume")
                if old != new:
                    effect = "the run goes on differently than it began"
                    if flag == STEPS_FLAG:
                        effect = f"the schedule of the earlier steps ended there, so {effect} (--stop_after keeps it)"
                    warn(f"--resume: {flag} was {old} and is {new} now; {effect}")

    def train(self):
        """Train up to the last step, saving on the way; returns whether it was reached, False after --stop_after steps,
        SIGINT or SIGTERM.

        Raises UserError for a loss that is not finite (before it reaches the weights) and for a disk that is full.
        """
        if not self.step and self.path.exists() and ranks.is_main():
            warn(f"{self.path} exists and will be replaced by this run (--resume would go on from it)")
        run_name = f"{self.stage.replace('/', '_')}_{self.path.stem.removeprefix(Path(self.stage).name + '_')}"
        log_path = Path(self.args.out_dir) / "logs" / f"{run_name}.jsonl"
        main = ranks.is_main()
        wandb_run = start_wandb(self.args, run_name, vars(self.args)) if self.args.use_wandb and main else None
        self.log = RunLog(log_path, self.step, self.total_steps, wandb_run, active=main)
        self.first_step, self.steady_since = self.step, None
        self.model.train()
        with contextlib.closing(self.log), StopRequest() as self.stop:
            if not self.step:
                self.validate()
            if self.step < self.total_steps:
                self.stopping = self.stop_is_due
                if not self.stopping:
                    self.run_steps()
            else:
                ranks.print_once(f"nothing left to do: {self.step:,} of {self.total_steps:,} steps are done")
        if self.stopping:
            way_on = command_line("--resume", without="--stop_after" if self.stop_is_due else None)
            progress = f"step {self.step:,} of {self.total_steps:,}"
            ranks.print_once(f"stopped and saved at {progress}; to go on: {way_on}")
        return not self.stopping

    def close(self):
        """Leave the process group, if there is one; nothing can be trained or asked of other ranks afterwards."""
        self.runner = None
        ranks.shut_down()

    def run_steps(self):
        """From the current step to the last one, with reports, validation and saves where they are due."""
        window, clock = new_window(), time.perf_counter()
        for batches in self.step_batches():
            self.train_step(batches, window)
            window["seconds"] += time.perf_counter() - clock
            self.progress["train_seconds"] += time.perf_counter() - clock
            self.log.advance()
            last = self.step >= self.total_steps
            done = last or self.stopping or self.stop_is_due
            if self.step % self.args.log_interval == 0 or done or self.step == self.first_step + 1:
                self.report(window)
                window = new_window()
            if (self.step % self.args.eval_interval == 0 and not self.stopping) or last:
                self.validate()
            if self.step % self.args.save_interval == 0 or done:
                self.save()
            if done:
                self.stopping = self.stopping or (self.stop_is_due and not last)
                return
            clock = time.perf_counter()
            self.steady_since = self.steady_since or clock  # the first step holds compilation and is no measure

    def step_batches(self):
        """The micro-batches of each optimizer step, epoch after epoch; what remains of one is a smaller step."""
        while True:
            batches = []
            for batch in self.train_loader:
                batches.append(batch)
                if len(batches) == self.args.accumulation_steps:
                    yield batches
                    batches = []
            if batches:
                yield batches

    def train_step(self, batches, window):
        """One optimizer step over `batches`, as if they were one large batch; adds its numbers to `window`."""
        counts = [measure(batch, self.byte_lengths) for batch in batches]
        flops = sum(tokens * flops_per_token(self.model, length) for _, _, tokens, _, length in counts)
        sums = [sum(column) for column in zip(*counts)][:4] + [flops]
        items, rows, tokens, size, flops = ranks.sum_over_ranks(sums, self.device)
        factor = learning_rate_factor(self.step, self.total_steps, self.warmup_steps)
        for optimizer, rates in zip(self.optimizers, self.peak_rates):
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * factor
        loss = self.accumulate(batches, [count[1] / rows for count in counts], items)
        loss, norm = self.update(loss)
        self.progress["step"] += 1
        self.progress["tokens_seen"] += int(tokens)
        self.progress["supervised_tokens_seen"] += int(items)
        for name, value in dict(steps=1, nats=loss * items, items=items, size=size, tokens=tokens, flops=flops).items():
            window[name] += value
        window["norm"], window["factor"] = norm, factor

    def accumulate(self, batches, shares, items):
        """Forward and backward of every micro-batch; returns this rank's part of the step's loss, a tensor.

        shares: each micro-batch's part of the rows of the whole step, by which its balance loss counts.
        """
        total = torch.zeros((), device=self.device)
        # A tensor, for a number would be compiled into the graph.
        num_items = torch.tensor(items, dtype=torch.float32, device=self.device)
        world_size = ranks.world_size()  # DDP divides the sum of gradients by it
        for index, (batch, share) in enumerate(zip(batches, shares)):
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
            last = index == len(batches) - 1
            with contextlib.nullcontext() if last else ranks.without_sync(self.runner):
                with autocast(self.device, self.dtype):
                    loss, aux_loss = self.loss_function(self.runner, batch, num_items)
                self.scaler.scale((loss + aux_loss * share) * world_size).backward()
            total += loss.detach()
        return total

    def update(self, loss):
        """Clip and apply the gradients unless something is not finite; returns (loss over all ranks, gradient norm)."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        loss, norm_value = torch.stack((loss, norm)).tolist()  # the only wait for the device in a step
        loss, stops = ranks.sum_over_ranks([loss, self.stop.requested], self.device)
        self.stopping = stops > 0
        # With float16 an infinite gradient is how the scaler learns that its scale is too large: it skips this step.
        overflow = self.scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(norm_value)
        if overflow and self.scaler.get_scale() < 1:
            overflow = False
        if not overflow and not (math.isfinite(loss) and math.isfinite(norm_value)):
            raise UserError(self.divergence(loss, norm_value))
        if self.args.grad_clip and norm_value > self.args.grad_clip and not overflow:
            nn.utils.clip_grads_with_norm_(self.model.parameters(), self.args.grad_clip, norm)
        for optimizer in self.optimizers:
            if not overflow:
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return loss, norm_value

    def divergence(self, loss, norm):
        """The error line for a loss or gradient that is not finite."""
        what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {norm}"
        kept = f"{self.path} holds step {self.saved_step}" if self.saved_step else "nothing was saved yet"
        return (
            f"step {self.step + 1}: {what}; stopped before it reached the weights ({kept}); try a lower --learning_rate"
        )

    def report(self, window):
        """One line and one record on the steps since the last report."""
        loss, nats_per_bit = window["nats"] / max(1, window["items"]), math.log(2)
        bits_per_byte = window["nats"] / nats_per_bit / max(1, window["size"])
        rate = window["tokens"] / window["seconds"]
        record = dict(step=self.step, epoch=self.epoch, loss=loss, bits_per_byte=bits_per_byte)
        record.update(learning_rate=self.peak_rates[-1][0] * window["factor"], gradient_norm=window["norm"])
        record.update(tokens_per_second=rate, tokens_seen=self.progress["tokens_seen"])
        text = (
            f"step {self.step:,}/{self.total_steps:,}  epoch {self.epoch:.2f}  loss {loss:.4f}  bpb {bits_per_byte:.4f}"
        )
        text += f"  lr {record['learning_rate']:.2e}  norm {window['norm']:.2f}  {rate:,.0f} tok/s"
        if self.peak_flops:
            record["mfu"] = window["flops"] / window["seconds"] / self.peak_flops / ranks.world_size()
            text += f"  MFU {record['mfu']:.1%}"
        if self.steady_since:
            steady = (time.perf_counter() - self.steady_since) / (self.step - self.first_step - 1)
            record["seconds_left"] = round(steady * (self.total_steps - self.step), 1)
            text += f"  left {duration(record['seconds_left'])}"
        load = self.expert_load()
        if load:
            record["expert_load"] = load
            text += "  experts " + " ".join(f"{share:.0%}" for share in load)
        self.log.write(text, **record)

    @property
    def epoch(self):
        """Passes over the data so far, with a fraction."""
        return round(self.step / self.steps_per_epoch, 4)

    def expert_load(self):
        """Share of the last micro-batch's routing choices that each expert got, mean over layers; None when dense."""
        if not self.model.config.use_moe:
            return None
        loads = [layer.feed_forward.gate.expert_load for layer in self.model.layers]
        return [round(share, 4) for share in torch.stack(loads).mean(dim=0).tolist()]

    @torch.no_grad()
    def validate(self):
        """Mean loss and bits per byte over the same --eval_tokens held-out targets each time, into progress and log."""
        if not len(self.validation_loader):
            return
        self.model.eval()
        self.validation_loader.load_state_dict(self.validation_start)
        wanted = (self.args.eval_tokens or math.inf) / ranks.world_size()
        nats = items = size = 0
        one = torch.ones((), device=self.device)
        for batch in self.validation_loader:
            batch_items, _, _, batch_size, _ = measure(batch, self.byte_lengths)
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
            with autocast(self.device, self.dtype):
                nats += float(self.loss_function(self.model, batch, one)[0])
            items, size = items + batch_items, size + batch_size
            if items >= wanted or self.stop.requested:
                break
        self.model.train()
        nats, items, size = ranks.sum_over_ranks([nats, items, size], self.device)
        loss, bits_per_byte = nats / max(1, items), nats / math.log(2) / max(1, size)
        record = dict(validation_loss=loss, validation_bits_per_byte=bits_per_byte)
        self.progress.update(record)
        text = f"step {self.step:,}/{self.total_steps:,}  validation loss {loss:.4f}  bpb {bits_per_byte:.4f}"
        self.log.write(f"{text}  ({int(items):,} held-out tokens)", step=self.step, **record)

    def save(self):
        """Write checkpoint, description and training state; a full disk ends the run and the last ones stay intact."""
        states = ranks.gather(random_state(self.device))
        self.saved_step, previous = self.step, self.saved_step
        if not ranks.is_main():
            return
        metadata = dict(stage=self.stage, parent=self.parent, tokenizer_hash=self.tokenizer_hash, **self.progress)
        metadata.update(total_steps=self.total_steps, peak_memory_bytes=peak_memory(self.device))
        training_state = {
            "progress": self.progress,
            "parent": self.parent,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "loader": self.train_loader.state_dict(),
            "random": states,
            "trajectory": self.trajectory,
        }
        try:
            save_checkpoint(self.path, self.model, metadata, training_state)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            kept = f"the checkpoint of step {previous} is intact" if previous else "there is no earlier checkpoint"
            way_out = f"free some space and go on with: {command_line('--resume')}" if previous else "free some space"
            raise UserError(f"{self.path}: {error.strerror} while saving step {self.step}; {kept}; {way_out}") from None


def new_window():
    """Empty sums for the steps up to the next report."""
    return dict.fromkeys(("steps", "nats", "items", "size", "tokens", "flops", "seconds", "norm", "factor"), 0.0)
