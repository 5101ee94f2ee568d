"""From an empty folder to a model that answers, in minutes on two CPU cores: what `make quickstart` runs.

Every step is a command of this repository, printed before it runs, so that each can be repeated and changed by hand.
Everything lands in its own folders (dataset/demo, out/quickstart): real data and checkpoints beside them stay untouched.
Stopped by Ctrl-C or anything else, it goes on where it was when started again; once it has finished, it starts over.
The last line is one JSON object.
"""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from model.cli import positive_int, script_parser
from model.errors import UserError, command_line, run_main
from model.files import atomic_write
from model.stages import STAGES

MODEL = "--preset minimind-tiny"
# Checkpoint of a stage -> the stage, its file in the data folder, and what it is trained with. Few rows a step: with few
# tokens to see, more steps teach more than smoother ones. Later rounds learn slower, so that they forget less of what came
# before.
RECIPE = {
    "pretrain": (
        "pretrain", "pretrain_data.csv", "--learning_rate 3e-3 --embedding_rate_factor 2 --epochs 1 --batch_size 4",
    ),
    "single_chat/full_sft": (
        "single_chat/full_sft", "sft_data_single.csv",
        "--learning_rate 2e-3 --embedding_rate_factor 2 --epochs 2 --max_steps 740 --batch_size 24",
    ),
    "multi_chat/full_sft": (
        "multi_chat/full_sft", "sft_data.csv",
        "--learning_rate 1.2e-3 --embedding_rate_factor 1 --epochs 2 --max_steps 480 --batch_size 16",
    ),
    "lora_identity": (
        "lora", "lora_identity.csv",
        "--lora_name identity --lora_rank 16 --learning_rate 2e-3 --epochs 2 --batch_size 16",
    ),
    "dpo": (
        "dpo", "dpo/train_data.json", "--learning_rate 1.5e-4 --sft_weight 0.1 --max_steps 37 --batch_size 16",
    ),
}  # fmt: skip


def run(command, stdout=None):
    """Run one of the repository's scripts and return what it printed into `stdout`. A signal to stop is passed on, and
    the script has the time it needs to save; that, or a failed script, ends everything with a line on how to go on."""
    print(f"\n$ python {command}", flush=True)
    stops, waiting, process = [], [], None

    def pass_on(number, frame):
        stops.append(number)
        waiting.append(number)
        deliver()

    def deliver():
        while process and waiting:
            number = waiting.pop()
            if os.name == "posix":  # Windows gives Ctrl-C to both by itself
                process.send_signal(number)

    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in names)}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:  # nohup's
            signal.signal(number, pass_on)
    try:
        # In its own process group a script gets the terminal's Ctrl-C from here alone: a second one would end its saving.
        process = subprocess.Popen([sys.executable, *shlex.split(command)], stdout=stdout, text=True, process_group=0)
        deliver()  # what came while it was being started
        printed, _ = process.communicate()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    code = 128 + stops[0] if stops else process.returncode
    if code:
        raise stopped("" if stops else f" by the error of python {command}", code if code > 0 else 128 - code)
    return printed


def stopped(reason="", exit_code=1):
    """The UserError that ends an unfinished quickstart."""
    way_on = "make quickstart" if len(sys.argv) == 1 else command_line()
    return UserError(f"stopped{reason}; to go on where it was: {way_on}", exit_code)


class Progress:
    """What an earlier start with the same recipe and data has done, kept in quickstart.json beside the checkpoints.

    A checkpoint counts when its description is not one that lay there before, of another recipe or of a quickstart that
    had finished. There is no such file once quickstart has finished.
    """

    def __init__(self, out_dir, commands, data_paths, started, moe=False):
        self.path, self.started = out_dir / "quickstart.json", started
        self.descriptions = {name: out_dir / f"{name}_192{'_moe' if moe else ''}.json" for name in commands}
        data = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in data_paths}
        found, recipe = read_json(self.path), {"commands": commands, "data": data}
        if found.get("recipe") == recipe:
            self.before, self.seconds = found["before"], found["seconds"]
        else:
            self.before = {name: self.digest(name) for name in commands}
            self.seconds = 0.0
        self.recipe = recipe
        self.save()

    def digest(self, name):
        path = self.descriptions[name]
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None

    def seconds_total(self):
        """Seconds of all starts; a kill -9 takes those of the command it hits."""
        return self.seconds + time.time() - self.started

    def save(self):
        with atomic_write(self.path, "w", encoding="utf-8") as handle:
            json.dump({"recipe": self.recipe, "before": self.before, "seconds": self.seconds_total()}, handle)

    def record(self, name):
        """The description of this recipe's checkpoint of a stage, {} when there is none yet."""
        return {} if self.digest(name) == self.before[name] else read_json(self.descriptions[name])

    def finished(self, name):
        record = self.record(name)
        validated = record.get("validation_loss") is not None  # else a signal came in between: --resume makes up for it
        return validated and record["step"] >= record["total_steps"]

    def way_on(self, name):
        """The flag with which a stage goes on, or starts in spite of a checkpoint that does not count."""
        return " --resume" if self.record(name) else " --overwrite" if self.descriptions[name].exists() else ""


def read_json(path):
    """The object in a .json file, {} when there is none or it is damaged."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def quoted(path):
    """A path as a word of a command, blanks and Windows' separators included."""
    return shlex.quote(path.as_posix())


def result_of(command):
    """Run a script that ends with a line of JSON; prints the rest and returns that."""
    *table, result = run(f"{command} --json", subprocess.PIPE).splitlines()
    print("\n".join(table), flush=True)
    return json.loads(result)


def accuracy(checkpoint, test, max_steps, more=""):
    """Share of the held-out questions in the file `test` that `checkpoint` answers right; of 20 of them if max_steps."""
    if max_steps:
        few = test.with_name(f"few_{test.name}")
        few.write_text("".join(test.read_text("utf-8").splitlines(keepends=True)[:20]), "utf-8")
        test = few
    command = f"2-eval.py --checkpoint {quoted(checkpoint)}{more} --prompt_file {quoted(test)} --max_new_tokens 48"
    return result_of(command)["accuracy"]


def main():
    parser = script_parser(__doc__)
    parser.add_argument("--data_dir", type=Path, default=Path("dataset/demo"), help="default: %(default)s")
    parser.add_argument("--out_dir", type=Path, default=Path("out/quickstart"), help="default: %(default)s")
    parser.add_argument(
        "--use_moe", action="store_true", help="a mixture of experts: the same road, about twice as long"
    )
    few = "stop each stage early and ask 20 questions a test: does every command work?"
    parser.add_argument("--max_steps", type=positive_int, help=few)
    args = parser.parse_args()
    os.chdir(Path(__file__).resolve().parent)
    started = float(os.environ.get("QUICKSTART_STARTED") or time.time())  # make's: the installation counts too
    model = MODEL + (" --use_moe" if args.use_moe else "")
    stop = f" --max_steps {args.max_steps}" if args.max_steps else ""

    run(f"data_process.py demo --output_dir {quoted(args.data_dir)}")
    saving = f"--out_dir {quoted(args.out_dir)} --eval_interval 1000 --save_interval 100"
    data_paths, commands = [], {}
    for name, (stage, file, flags) in RECIPE.items():
        path = args.data_dir / file
        if stage == "dpo":
            flags += f" --validation_path {quoted(heldout(args, 'dpo.json'))}"
        data_paths.append(path)
        commands[name] = f"{STAGES[stage].command} --data_path {quoted(path)} {model} {flags} {saving}{stop}"
    progress = Progress(args.out_dir, commands, data_paths, started, args.use_moe)
    try:
        train(commands, progress)
        result = examine(args, progress)
    except KeyboardInterrupt:  # between two scripts
        raise stopped(exit_code=128 + signal.SIGINT) from None
    finally:
        progress.save()
    progress.path.unlink()
    print(json.dumps(result))


def train(commands, progress):
    """Run the stages that are not finished, each from where it stopped."""
    for name, command in commands.items():
        if progress.finished(name):
            print(f"\n{name} is finished: step {progress.record(name)['step']:,}", flush=True)
            continue
        run(command + progress.way_on(name))
        progress.save()
        if not progress.finished(name):  # it was told to stop, and we were not
            raise stopped()


def heldout(args, name):
    """The demo's file of held-out questions of that name."""
    return args.data_dir / "heldout" / name


def examine(args, progress):
    """Ask the chat models the held-out questions, with and without the adapter, let the last one sit the exam and export it,
    show answers and the table; returns what the last line says."""
    from model.demo.files import exam_folder

    records = {name: progress.record(name) for name in RECIPE}
    paths = {name: path.with_suffix(".pth") for name, path in progress.descriptions.items()}
    single, multi, adapter, last = list(paths.values())[1:]
    tokens, seconds = (sum(record[name] for record in records.values()) for name in ("tokens_seen", "train_seconds"))

    def ask(checkpoint, *names, more=""):
        return {name: accuracy(checkpoint, heldout(args, f"{name}.jsonl"), args.max_steps, more) for name in names}

    with_adapter = f" --lora {quoted(adapter)}"
    scores = {
        "single-turn": ask(single, "facts", "multi_turn", "arithmetic"),
        "multi-turn": ask(multi, "facts", "multi_turn", "arithmetic", "unseen_names", "unseen_values", "identity"),
        "+ adapter": ask(multi, "facts", "identity", more=with_adapter),
        "DPO": ask(last, "facts", "multi_turn", "arithmetic", "unseen_names", "unseen_values"),
    }
    preferences = records["dpo"]["validation"]["reward_accuracy"]
    likelier = "better one likelier"  # of the two answers of a held-out pair
    scores["multi-turn"][likelier] = likelier_before(paths["dpo"])
    scores["DPO"][likelier] = records["dpo"]["validation"]["chosen_more_probable"]
    exam = f"--data_dir {quoted(exam_folder(args.data_dir))} --results_dir {quoted(args.out_dir / 'ceval')}"
    ceval = result_of(f"eval_ceval.py --checkpoint {quoted(last)} {exam}")
    scores["DPO"]["exam"] = ceval["accuracy"]
    gguf, stock = args.out_dir / "export" / "gguf" / "chat.gguf", "granitemoe" if args.use_moe else "llama"
    for flags in (f"{stock} --output {quoted(gguf.parent.parent / stock)}", f"gguf --output {quoted(gguf)}"):
        run(f"export_model.py --checkpoint {quoted(last)} --force --format {flags}")
    for more in ("", with_adapter):
        run(
            f"2-eval.py --checkpoint {quoted(multi)}{more} --temperature 0 --max_new_tokens 48 --prompt 你是谁？ --prompt 你叫什么？"
        )
    run(f"2-eval.py --checkpoint {quoted(last)} --temperature 0 --max_new_tokens 48")
    print_table(scores)
    longer = records["dpo"]["dpo"]["longer_is_chosen"]["held_out"]
    print(
        f"preferences: {preferences:.1%} of the held-out pairs moved the right way; "
        f"choosing by length alone is right in {max(longer, 1 - longer):.1%}"
    )
    print(f"exam of 4 options: {ceval['verdict']}")
    print(f"talk to it:  .venv/bin/python 2-eval.py --checkpoint {quoted(last)} --interactive")
    print(f"with llama.cpp:  llama-cli -m {quoted(gguf)} --jinja\n")
    return {
        "facts_heldout_accuracy": round(scores["multi-turn"]["facts"], 4),
        "multi_turn_accuracy": round(scores["multi-turn"]["multi_turn"], 4),
        "identity_accuracy": round(scores["+ adapter"]["identity"], 4),
        "facts_with_adapter": round(scores["+ adapter"]["facts"], 4),
        "preference_accuracy": round(preferences, 4),
        "facts_after_dpo": round(scores["DPO"]["facts"], 4),
        "arithmetic_accuracy": round(scores["DPO"]["arithmetic"], 4),
        "unseen_names_accuracy": round(scores["DPO"]["unseen_names"], 4),
        "unseen_values_accuracy": round(scores["DPO"]["unseen_values"], 4),
        "exam_accuracy": round(ceval["accuracy"], 4),
        "pretrain_val_bpb": round(records["pretrain"]["validation_bits_per_byte"], 4),
        "seconds_train": round(seconds, 1),
        "seconds_total": round(progress.seconds_total(), 1),
        "tokens_per_second": round(tokens / seconds),
    }


def likelier_before(checkpoint):
    """Share of the held-out pairs whose chosen answer was the more probable one before the first step of DPO, None
    when its log is gone."""
    log = checkpoint.parent / "logs" / f"{checkpoint.stem}.jsonl"
    if log.exists():
        return json.loads(log.read_text("utf-8").splitlines()[0]).get("validation_chosen_more_probable")


def print_table(scores):
    """One line for each held-out test, one column for each model that was asked."""
    print(f"\n{'held-out accuracy':20s}" + "".join(f"{model:>14s}" for model in scores))
    for test in dict.fromkeys(test for asked in scores.values() for test in asked):
        cells = ("" if asked.get(test) is None else f"{asked[test]:.1%}" for asked in scores.values())
        print(f"{test:20s}" + "".join(f"{cell:>14s}" for cell in cells))


if __name__ == "__main__":
    run_main(main)
