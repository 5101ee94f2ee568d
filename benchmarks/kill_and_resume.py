"""kill -9 at random moments: does --resume end with the very weights of a run that nobody stopped?

    python benchmarks/kill_and_resume.py                 # 100 kills over stages 1 and 3, about 15 minutes
    python benchmarks/kill_and_resume.py --kills 7       # one of each kind

Each kind of run (dense, mixture of experts, Muon with dropout, accumulation with workers, conversations, two ranks) is
killed again and again, all of its processes at once, until it has had its share; then it may finish. What lies under the
final names must load after every kill, and at the end the weights must be those of the straight run, bit for bit, and
the files those of the last step. The last line is JSON.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model.cli import non_negative_int, positive_int  # noqa: E402
from model.errors import UserError, run_main  # noqa: E402

SHAPE = "--dim 64 --n_layers 2 --n_heads 4 --n_kv_heads 2 --max_seq_len 64 --batch_size 4 --learning_rate 1e-3"
STEPS = "--max_steps 120 --save_interval 3 --eval_interval 40 --eval_tokens 500 --log_interval 20"
PRETRAIN, SFT = (
    "1-pretrain.py --data_path {data}/pretrain_data.csv",
    "3-full_sft.py --data_path {data}/sft_data.csv --multi",
)
KINDS = {
    "dense": PRETRAIN,
    "mixture of experts": f"{PRETRAIN} --use_moe",
    "muon, dropout": f"{PRETRAIN} --optimizer muon --dropout 0.1",
    "accumulation, workers": f"{PRETRAIN} --accumulation_steps 2 --num_workers 2",
    "conversations": f"{SFT} --init_from {{parent}}",
    "conversations, workers, muon": f"{SFT} --init_from {{parent}} --num_workers 1 --optimizer muon",
    "two ranks": f"-m torch.distributed.run --standalone --nproc_per_node 2 {PRETRAIN} --batch_size 2",
}


def start(command):
    """The process of a training command, the only one of its group, once it has built its model."""
    process = subprocess.Popen(
        [sys.executable, *command.split()],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output = []
    for line in process.stdout:
        output.append(line)
        if line.startswith("model: "):
            break
    reader = threading.Thread(target=lambda: output.extend(process.stdout))
    reader.start()
    return process, output, reader


def finish(process, output, reader):
    """Wait for the end of a run that should succeed."""
    process.wait()
    reader.join()
    if process.returncode:
        raise UserError("a run failed:\n" + "".join(output[-20:]))


def last_files(out):
    """{name: bytes} of the checkpoint in a folder, without what tells times; raises UserError when one does not load."""
    from model.checkpoint import load_model, read_tensors, resume_path

    files = {}
    for path in out.rglob("*.pth"):
        if path.suffixes == [".pth"]:
            _, metadata = load_model(path)
            files[path.name] = path.read_bytes()
            files[f"{path.stem}: step"] = metadata["step"], read_tensors(resume_path(path))["progress"]["step"]
    return files


def torture(name, command, folder, kills, chance):
    """Kill a run `kills` times, let it finish and compare; returns whether its files are those of the straight run."""
    outs = folder / "straight", folder / "killed"
    began = time.perf_counter()
    process, *rest = start(f"{command} --out_dir {outs[0]}")
    seconds = -time.perf_counter()
    finish(process, *rest)
    seconds += time.perf_counter()
    done = 0
    while True:
        resume = " --resume" if list(outs[1].rglob("*.resume.pth")) else ""
        process, *rest = start(f"{command} --out_dir {outs[1]}{resume}")
        if done == kills:
            finish(process, *rest)
            break
        time.sleep(chance.random() * seconds)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            done += 1
        else:  # it was faster than the moment chosen: begin anew
            finish(process, *rest)
            for path in outs[1].rglob("*full_sft*"):
                path.unlink()
            for path in outs[1].glob("pretrain*"):
                path.unlink()
        rest[1].join()
        process.wait()
        last_files(outs[1])
    straight, killed = map(last_files, outs)
    exact = straight == killed and all(steps == (120, 120) for key, steps in killed.items() if key.endswith("step"))
    print(
        f"{name:30s} {done:3d} kills: {'exact' if exact else 'DIFFERENT'}, {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    return exact


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=positive_int, default=100, help="in all (default: %(default)s)")
    parser.add_argument("--seed", type=non_negative_int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    chance, exact = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        data, parent = Path(folder, "data"), Path(folder, "parent")
        demo = [sys.executable, "data_process.py", "demo", "--output_dir", str(data)]
        subprocess.run(demo, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        finish(*start(f"{PRETRAIN.format(data=data)} {SHAPE} --max_steps 2 --out_dir {parent}"))
        for index, (name, command) in enumerate(KINDS.items()):
            kills = args.kills * (index + 1) // len(KINDS) - args.kills * index // len(KINDS)
            if not kills:
                continue
            command = command.format(data=data, parent=parent / "pretrain_64.pth")
            script, _, own = command.partition(" --data_path")
            line = f"{script} {SHAPE} {STEPS} --device cpu --data_path{own}"
            exact += kills * torture(name, line, Path(folder, str(index)), kills, chance)
    print(json.dumps({"kills": args.kills, "exact": exact}))
    return int(exact != args.kills)


if __name__ == "__main__":
    run_main(main)
