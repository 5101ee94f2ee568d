"""What test_deepspeed.py has two processes do: many short runs, one after the other, for starting takes longest. Rank 0
writes what came out of them to <out>/results.pt.

    PYTHONPATH=.:tests deepspeed --num_gpus=2 tests/training/divided_runs.py <tokenizer> <rows of stage 3> <out> <script flag> ...
"""

import functools
import runpy
import sys
from pathlib import Path

import test_loop
import test_strategy
import torch

from model.errors import UserError
from model.tokenizer import load_tokenizer
from model.training import ranks
from model.training.loop import language_model_loss

ZERO = [f"--deepspeed --zero_stage {stage}" for stage in range(4)]
# Name -> flags of all, flags of each; the first is plain DDP, with which the others must agree.
FAMILIES = {
    "float32": ("", ["", *ZERO, f"{ZERO[2]} --offload", f"{ZERO[3]} --offload", "--fsdp"]),
    "bfloat16": ("--dtype bfloat16", ["", ZERO[0], ZERO[2], ZERO[3], "--fsdp"]),
    "float16": ("--dtype float16", ["", ZERO[0], ZERO[2], ZERO[3], "--fsdp"]),
    "clipped": ("--grad_clip 0.1", ["", ZERO[2], ZERO[3], "--fsdp"]),
    "experts": ("--use_moe", ["", ZERO[2], ZERO[3], "--fsdp"]),
    "muon": ("--optimizer muon", ["", ZERO[0], "--fsdp"]),
    "adapter": ("--adapter", ["", ZERO[0], ZERO[2], ZERO[3], "--fsdp"]),
    "checkpointing": ("--gradient_checkpointing", ["", ZERO[2], ZERO[3], "--fsdp"]),
    "validation": ("--batch_size 1 --eval_tokens 10", ["", ZERO[3], "--fsdp"]),  # ends before the rows do
    "compiled": ("--compile", ["", ZERO[0], ZERO[2], "--fsdp"]),
}
RESUMED = [ZERO[2], ZERO[3], f"{ZERO[3]} --offload", f"{ZERO[2]} --dtype float16", "--fsdp"]
# What trains the first half of a run, what the second.
CHANGED = [("", ZERO[2]), (ZERO[2], ""), ("", ZERO[3]), (ZERO[3], "--fsdp"), ("--fsdp", ""), (ZERO[1], ZERO[3])]
BROKEN = ["", ZERO[2], ZERO[3], "--fsdp"]


class Runs:
    """Runs on the rows of stage 3 in `data`, each with the flags in one string."""

    def __init__(self, tokenizer, data, out):
        self.tokenizer, self.data, self.out = load_tokenizer(tokenizer), data, Path(out)

    def make(self, name, words, *more, **options):
        """A Trainer; --adapter: as stage 4 makes it."""
        steps = "--max_steps 4 --batch_size 2 --accumulation_steps 2 --log_interval 1 --eval_interval 2 --optimizer adamw --embedding_rate_factor 1".split()
        words = [*steps, *words.split(), *more]
        if "--adapter" in words:
            words.remove("--adapter")
            return test_strategy.make_run(self.data, self.out / name, *words, tokenizer=self.tokenizer)
        return test_loop.make_trainer(self.data, self.out / name, *words, tokenizer=self.tokenizer, sft=True, **options)

    def straight(self, words):
        """What a run logs, and its weights."""
        run = self.make("straight", words, "--overwrite")
        run.train()
        return self.result(run)

    def resumed(self, first, second):
        """The same of one that begins with the flags `first` and goes on with `second`."""
        run = self.make("resumed", first, "--overwrite", "--stop_after", "2")
        run.train()
        run.strategy.close()
        run = self.make("resumed", second)
        run.resume()
        run.train()
        return self.result(run)

    def result(self, run):
        result = {"weights": copy(run.strategy.weights())}
        if ranks.is_main():
            log = test_loop.records(run)
            for name in ("loss", "gradient_norm", "learning_rate", "validation_loss"):
                result[name] = [record[name] for record in log if name in record]
        run.strategy.close()
        return result

    def overflow(self, words):
        """(scales of all ranks, whether weights stayed) after a step with far too large a scale for float16."""
        run = self.make("overflow", f"{words} --dtype float16", "--overwrite", "--stop_after", "1")
        before, state = copy(run.strategy.weights()), run.strategy.state_dict()
        state["scaler"] = {**state["scaler"], "scale": 2.0**60}
        state["optimizers"] = [{**optimizer, "state": {}} for optimizer in state["optimizers"]]
        run.strategy.load_state_dict(state)
        run.train()
        scales = ranks.gather(run.strategy.scaler.get_scale())
        return scales, same(before, self.result(run)["weights"])

    def infinite(self, words):
        """(error, whether weights stayed) of a run whose gradient is not finite on one rank, while its loss is."""

        def loss_function(model, batch, num_items):
            loss, aux_loss = language_model_loss(model, batch, num_items)
            if loss.requires_grad and ranks.rank() == 1:
                loss.register_hook(lambda gradient: gradient * torch.inf)
            return loss, aux_loss

        run = self.make("infinite", words, "--overwrite", loss_function=loss_function)
        before, error = copy(run.strategy.weights()), None
        try:
            run.train()
        except UserError as problem:
            error = str(problem)
        after = copy(run.strategy.weights())
        run.strategy.close()
        return error, same(before, after)

    def number_format(self, words):
        """dtype of logits that the loop's own autocast is not around."""
        run = self.make("format", f"{words} --dtype bfloat16", "--overwrite")
        batch = run.to_device(run.train_loader.dataset[[0, 1]])
        logits = run.strategy.runner(input_ids=batch["input_ids"]).logits
        run.strategy.close()
        return str(logits.dtype)


def copy(weights):
    return {name: tensor.clone() for name, tensor in weights.items()}


def same(before, after):
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def script(*words):
    """Run a script of the repository in this process; returns its exit code."""
    sys.argv = list(words)
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as leaving:
        return leaving.code


def main():
    tokenizer, data, out, *flags = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    runs, results = Runs(tokenizer, data, out), {}
    torch.compile = functools.partial(torch.compile, backend="eager")  # without half a minute of C++
    for family, (common, each) in FAMILIES.items():
        for words in each:
            results[family, words] = runs.straight(f"{common} {words}")
            ranks.print_once(f"{family}, {words}: done")
    results.update({("resumed", words): runs.resumed(words, words) for words in RESUMED})
    results.update({("changed", *both): runs.resumed(*both) for both in CHANGED})
    results.update({("overflow", words): runs.overflow(words) for words in BROKEN})
    results.update({("infinite", words): runs.infinite(words) for words in BROKEN})
    results.update({("format", words): runs.number_format(words) for words in (ZERO[0], ZERO[2])})
    leave, ranks.shut_down = ranks.shut_down, lambda: None  # the scripts are not the last to leave
    results["scripts"] = [
        script("3-full_sft.py", *flags, "--data_path", data, "--deepspeed", "--local_rank=0"),
        script(
            "4-lora_sft.py",
            *flags,
            "--data_path",
            data,
            "--deepspeed",
            "--zero_stage",
            "3",
            "--save_peft",
            out + "/peft",
        ),
        script("4-lora_sft.py", *flags, "--data_path", data, "--fsdp", "--lora_name", "other"),
    ]
    if ranks.is_main():
        torch.save(results, Path(out) / "results.pt")
    leave()


if __name__ == "__main__":
    main()
