"""A run that is far off is told so once, with what usually causes it: each cause by evidence of its own.

Only what the loop measures anyway is looked at, when it reports. What a normal run does, however it jumps, must say nothing:
every rule waits for several reports, and compares with a wide margin.
"""

import collections
import math
import statistics

from model.checkpoint import read_metadata
from model.data.dataset import repeated_share
from model.stages import PRETRAINED_STAGES
from model.tokenizer import own_tokenizer
from model.training import ranks

PATIENCE = 3  # reports, over which losses are averaged, and which must agree
LEAST_STEPS = 100  # after which a fresh model has learned something
COPIES = 0.3  # share of rows that are copies of others, which is no accident
LEAST_TARGETS = 0.02  # share of tokens that are learned in a chat stage
GROWN = 50  # times the usual gradient norm
# Bits per byte below which it is worth counting copies: real text has no less in pretraining; short answers may.
LOW = {True: 0.5, False: 0.05}


class Watch:
    """Looks at the reports of a Trainer's run.

    report: RowReport of the training rows. expectation: an Expectation.
    """

    def __init__(self, trainer, data, expectation):
        self.trainer, self.data, self.expectation = trainer, data, expectation
        self.pretraining = trainer.stage in PRETRAINED_STAGES
        self.uniform = math.log(trainer.model.config.vocab_size)  # the loss of who knows nothing, nats
        self.said, self.counted = set(), False
        self.losses, self.bits = (collections.deque(maxlen=PATIENCE) for _ in range(2))
        self.norms = collections.deque(maxlen=100)
        self.best = self.uniform if trainer.parent is None else math.inf  # where random weights begin
        self.worse = self.above = 0

    def see(self, record):
        """Look at a report, and say what it gives away."""
        if not ranks.is_main():
            return
        self.losses.append(record["loss"])
        self.norms.append(record["gradient_norm"])
        self.bits.append(record.get("bits_per_byte", math.inf))
        for cause in (self.rows, self.targets, self.tokenizer, self.rate, self.copies):
            self.tell(cause.__name__, cause(record))

    def see_validation(self, record):
        """Look at a validation: what is far better on rows that were learned from than on others."""
        if not ranks.is_main() or not self.losses or "validation_bits_per_byte" not in record:
            return
        train, held_out = statistics.mean(self.losses), record["validation_loss"]
        if held_out > train + max(0.5, 0.5 * train):
            self.tell("copies", self.copies(record, f"loss {train:.2f} where held-out rows have {held_out:.2f}"))
            epoch = self.trainer.state.step / self.trainer.steps_per_epoch
            if epoch > 1 and "copies" not in self.said:
                what = f"loss {train:.2f}, and {held_out:.2f} on held-out rows: after {epoch:.1f} epochs it knows its rows by heart"
                self.tell("by_heart", f"{what}; fewer --epochs, or more data")

    def tell(self, cause, text):
        """Say `text`, unless there is none or the cause was told before."""
        if text and cause not in self.said:
            self.said.add(cause)
            step = self.trainer.state.step
            self.trainer.log.write(f"warning: {self.trainer.step_of_total}: {text}", step=step, warning=text)

    def rows(self, record):
        """Most rows are left out."""
        report = self.data.report
        if report.dropped.total() > report.rows / 2:
            (reason, count), *_ = report.dropped.most_common()
            return f"{report.dropped.total():,} of {report.rows:,} rows teach nothing and are left out, {count:,} of them: {reason}"

    def targets(self, record):
        """Hardly a token is learned."""
        state = self.trainer.state
        share = state.supervised_tokens_seen / state.tokens_seen if state.tokens_seen else 1
        if not self.pretraining and "bits_per_byte" in record and share < LEAST_TARGETS:
            problem = f"only {share:.2%} of the tokens are learned, those of the answers"
            return f"{problem}: they are all but empty, or stand in another column; see the sample in brackets above"

    def tokenizer(self, record):
        """Weights that were trained already, nobody knows with which tokenizer, know less than nothing of the text."""
        state, parent = self.trainer.state, self.trainer.parent
        if state.step == 1 and parent and "bits_per_byte" in record and record["loss"] > self.uniform:
            file = parent["file"]
            if read_metadata(file).get("tokenizer_hash") or own_tokenizer(file):  # it was compared at the start
                return None
            problem = f"loss {record['loss']:.2f} before anything is learned, worse than guessing ({self.uniform:.2f})"
            way_out = "give it with --tokenizer_path, unless the text is unlike all it has seen"
            return f"{problem}: {file} was trained with another tokenizer, most likely; {way_out}"

    def rate(self, record):
        """The learning rate does not fit: the loss rises, or does not fall."""
        if len(self.losses) < PATIENCE or "tokenizer" in self.said:
            return None
        loss = statistics.mean(self.losses)
        problems = (self.rising(loss), self.stuck(loss, record), self.exploding(record), self.far_above(record))
        self.best = min(self.best, loss)
        return next((problem for problem in problems if problem), None)

    def rising(self, loss):
        self.worse = self.worse + 1 if min(self.losses) > self.best + max(0.5, 0.2 * self.best) else 0
        if self.worse >= PATIENCE:
            return f"the loss has risen from {self.best:.2f} to {loss:.2f}; {self.lower}"

    def stuck(self, loss, record):
        step, fresh = self.trainer.state.step, self.trainer.parent is None and "bits_per_byte" in record
        if fresh and step > max(LEAST_STEPS, self.trainer.schedule.warmup_steps) and loss > 0.9 * self.uniform:
            what = f"loss {loss:.2f} after {step:,} steps, and guessing has {self.uniform:.2f}: it learns nothing"
            return f"{what}; --learning_rate {self.trainer.settings.learning_rate:g} is far too low, or far too high"

    def exploding(self, record):
        norms = list(self.norms)
        earlier, last = norms[:-PATIENCE], norms[-PATIENCE:]
        if len(earlier) > PATIENCE and min(last) > GROWN * max(statistics.median(earlier), 0.1):
            usual = statistics.median(earlier)
            return f"the gradient's norm has grown from {usual:.2f} to {record['gradient_norm']:.2f}; {self.lower}"

    def far_above(self, record):
        expected = record.get("expected_loss", math.inf)
        past = self.trainer.state.step > self.trainer.schedule.warmup_steps
        self.above = self.above + 1 if past and record["loss"] > expected + max(0.3, 0.2 * expected) else 0
        if self.above >= PATIENCE + 2:
            theirs, own = self.expectation.reference.header.get("recipe", {}), self.trainer.described["recipe"]
            others = [
                f"{name} {value} instead of {theirs[name]}"
                for name, value in own.items()
                if value is not None and theirs.get(name) not in (None, value)
            ]
            what = (
                f"loss {record['loss']:.2f}, and {expected:.2f} is usual here ({self.expectation.reference.path.name})"
            )
            return f"{what}: this run has {', '.join(others)}" if others else f"{what}, with the same flags"

    @property
    def lower(self):
        """The way out of a rate that is too high."""
        rate = self.trainer.settings.learning_rate
        return f"--learning_rate {rate:g} is too high, most likely: try {rate / 3:.2g}, or a longer --warmup_iters"

    def copies(self, record, why=None):
        """Training is far too easy, for its rows are copies of each other, which are counted once."""
        bits = statistics.mean(self.bits) if len(self.bits) == PATIENCE else math.inf
        if why is None and bits < max(LOW[self.pretraining], record.get("typical_bits_per_byte", 0) / 2):
            why = f"{bits:.2f} bits per byte, which is unbelievably low"
        if why and not self.counted:
            self.counted = True
            share, rows = repeated_share(self.data)
            if share > COPIES:
                return f"{why}: {share:.0%} of {rows:,} rows are copies of others; data_process.py leaves such out"
