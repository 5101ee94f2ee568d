"""Which rows form each batch, in an order that can be resumed, and the loop over the batches of one rank."""

import itertools
import signal

import numpy as np
import torch
from torch.utils.data import DataLoader

from model.data.dataset import IGNORED, batch_width
from model.errors import UserError

GROUPS_SORTED_TOGETHER = 64  # more: less padding; fewer: rows of a batch are more at random
JITTER = (
    1 / 8
)  # of lengths: 500 rows in batches of 8 keep 22 % of their mates (1/32: 36 %) at 2.5 points more of padding


class ResumableSampler:
    """Which rows form each batch of an epoch, a pure function of (seed, epoch), and how far the run has come.

    batch_size is per rank; a global micro-batch is batch_size * world_size consecutive rows of the epoch's order and
    each rank takes its slice, so the order is the same at every world size with the same product. lengths: batches
    get rows of similar length. The last micro-batch of an epoch is smaller, never lost.
    """

    def __init__(self, num_rows, batch_size, seed=0, rank=0, world_size=1, lengths=None):
        self.num_rows, self.seed, self.lengths, self.rank, self.world_size = num_rows, seed, lengths, rank, world_size
        self.rows_per_step = self.group_size = batch_size * world_size
        self.epoch = self.position = 0

    def __len__(self):
        """Micro-batches in a whole epoch (the same on every rank)."""
        return -(-self.num_rows // self.rows_per_step)

    def order(self, epoch):
        """int array [num_rows]: every row once. With lengths: stretches of rows are sorted by width and cut into groups
        in random order (an incomplete one last, so that batches and groups stay aligned)."""
        generator, order = np.random.default_rng((self.seed, 2, epoch)), np.arange(self.num_rows)
        generator.shuffle(order)
        if self.lengths is not None:
            stretch = GROUPS_SORTED_TOGETHER * self.group_size
            widths = self.jittered_widths(generator, stretch)
            for rows in (order[start : start + stretch] for start in range(0, self.num_rows, stretch)):
                rows[:] = rows[np.argsort(widths[rows], kind="stable")]
            whole = self.num_rows // self.group_size * self.group_size
            generator.shuffle(order[:whole].reshape(-1, self.group_size))
        return order

    def jittered_widths(self, generator, stretch):
        """int array [num_rows]: the width of a batch whose longest row is this one, or a little longer at random.

        Rows of one width are in random order and cost no padding together; the rest makes other rows meet in every
        epoch where a few stretches hold all of them. (A set of many stretches needs none: each is another sample.)
        """
        jitter = JITTER * min(1, stretch / max(1, self.num_rows)) * generator.random(self.num_rows)
        lengths, places = np.unique((self.lengths * (1 + jitter)).astype(np.int64), return_inverse=True)
        return np.array([batch_width(length) for length in lengths.tolist()], np.int64)[places]

    def batches(self):
        """This rank's row numbers for each micro-batch from the position, which stays, to the end; none at all where
        the last one has fewer rows than ranks."""
        order = self.order(self.epoch)
        for start in range(self.position, self.num_rows, self.rows_per_step):
            yield np.array_split(order[start : start + self.rows_per_step], self.world_size)[self.rank]

    def advance(self):
        """One micro-batch is consumed; behind the last one stands the start of the next epoch."""
        self.position += self.rows_per_step
        if self.position >= self.num_rows:
            self.epoch, self.position = self.epoch + 1, 0

    def state_dict(self):
        """Plain numbers: epoch, position (rows of it that all ranks have consumed), and what the order depends on."""
        return {name: getattr(self, name) for name in ("seed", "epoch", "position", "num_rows", "group_size")}

    def load_state_dict(self, state):
        """Go on behind the rows already consumed, at any world size; UserError when the data has other rows."""
        if state["num_rows"] != self.num_rows:
            raise UserError(
                f"--resume: the data has {self.num_rows:,} rows now and had {state['num_rows']:,}; "
                "go on with the same --data_path, --max_seq_len, --tokenizer_path and --seed, or start without --resume"
            )
        names, largest = ("seed", "epoch", "position", "group_size"), (1 << 62, 1 << 62, self.num_rows - 1, 1 << 31)
        if not all(0 <= int(state[name]) <= most for name, most in zip(names, largest)) or not state["group_size"]:
            raise ValueError("no position within the data")
        for name in names:
            setattr(self, name, int(state[name]))


def leave_signals_to_the_main_process(worker):
    """What stops a run reaches all of its processes. The main one saves, and its workers end when it has no more to ask;
    without them it could not finish the step."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class BatchLoader:
    """`for batch in loader` yields the rest of the current epoch for this rank; iterate again for the next one.

    len(loader): micro-batches per epoch. num_workers processes prepare batches ahead; pin_memory: batches lie where a
    GPU can fetch them in the background. state_dict() counts what was handed out, not what workers prefetched;
    load_state_dict() takes effect at the next iteration.
    """

    def __init__(self, dataset, sampler, num_workers=0, pin_memory=False):
        self.dataset, self.sampler = dataset, sampler
        self.options = {"num_workers": num_workers, "pin_memory": pin_memory}
        self.state_dict, self.load_state_dict = sampler.state_dict, sampler.load_state_dict

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        wanted, handed_out = itertools.tee(self.sampler.batches())  # workers are ahead of what is handed out
        indices = (rows if len(rows) else [0] for rows in wanted)
        generator = torch.Generator()  # else it would draw from the global one, and a resumed run would differ
        options = dict(sampler=indices, generator=generator, worker_init_fn=leave_signals_to_the_main_process)
        batches = DataLoader(self.dataset, batch_size=None, **options, **self.options)
        for batch, rows in zip(batches, handed_out):
            if not len(rows):
                batch["labels"].fill_(IGNORED)  # a rank without rows keeps step
            self.sampler.advance()
            yield batch
