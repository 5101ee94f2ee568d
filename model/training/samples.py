"""What the model says while it learns: a few fixed prompts, answered every --sample_interval steps.

A model of its own answers, made for the moment of the weights that a checkpoint would hold. So it is the same under every
way of training (compiled, divided among processes, an adapter, trl's stock class), and of the model in training nothing is
touched: no mode, no random number, no cache. The answers are greedy, and repeat exactly.
"""

import contextlib
import html

import torch

from model.checkpoint import file_sha256, load_model, load_weights, weights_file
from model.data.conversations import message
from model.errors import UserError, is_out_of_memory, warn
from model.evaluation.questions import OPENINGS, QUESTIONS, read_questions
from model.files import atomic_write
from model.inference.chat import conversation_prompt, text_prompt
from model.inference.engine import Engine
from model.lora import Adapter, is_adapter, merged_weights
from model.model import Transformer
from model.settings import SamplingParameters
from model.stages import PRETRAINED_STAGES
from model.training import ranks
from model.training.reports import read_log

BUILT_IN = 4  # prompts
LONGEST = 48  # tokens of an answer
GREEDY = SamplingParameters(temperature=0, max_new_tokens=LONGEST)


class Samples:
    """The samples of a Trainer's run; without --sample_interval every call does nothing.

    Raises UserError for a file of prompts that cannot be read, and for a prompt that does not fit the context.
    """

    def __init__(self, trainer, tokenizer):
        self.trainer, self.tokenizer, self.interval = trainer, tokenizer, trainer.settings.sample_interval
        self.prompts, self.taken, self.base = [], -1, None
        if self.interval:
            self.prompts = prompts_of(trainer.stage, trainer.settings.sample_prompts)
            self.prompt_ids = [self.encode(place, text) for place, text in self.prompts]

    def encode(self, place, text):
        """Token ids of a prompt that was found at `place`."""
        context = self.trainer.model.config.max_seq_len
        if self.trainer.stage in PRETRAINED_STAGES:
            ids = text_prompt(self.tokenizer, text)
        else:
            ids, _ = conversation_prompt(self.tokenizer, [message("user", text)], context, LONGEST)
        if len(ids) >= context:
            problem = f"{text!r} has {len(ids)} tokens, and a row only {context}"
            raise UserError(f"{place}: {problem}; raise --max_seq_len, or give shorter ones with --sample_prompts")
        return ids

    def start(self):
        """Learn from the log, which a resumed run goes on with, of which step the last samples are. A table that a killed
        run has left beside another's is no run's any more."""
        if ranks.is_main():
            self.new_table.unlink(missing_ok=True)
        if not self.interval:
            return
        steps = [record["step"] for record in read_log(self.trainer.log.current) if "samples" in record]
        (self.taken,) = ranks.sum_over_ranks([max(steps, default=-1) if ranks.is_main() else 0])

    def take_if_due(self):
        """Answer all prompts where the step asks for it: every `interval` steps, the first and the last one. Every rank
        calls it, for the weights may be divided; the main one answers. Nothing of what a request to stop cuts short is kept,
        and --resume makes up for it."""
        state = self.trainer.state
        due = self.interval and (state.step % self.interval == 0 or state.finished) and state.step != self.taken
        if due:
            self.taken = state.step
            weights = self.trainer.strategy.weights()
            ranks.on_main(lambda: self.take(weights))

    def take(self, weights):
        """Answer with `weights`, what a checkpoint holds, and show and write the answers. Training does not end for what
        goes wrong here."""
        place = self.trainer.step_of_total
        try:
            answers = self.answer(self.model_of(weights))
        except (UserError, RuntimeError, MemoryError) as error:
            if not isinstance(error, UserError) and not is_out_of_memory(error):
                raise
            reason = error if isinstance(error, UserError) else "out of memory"
            warn(f"{place}: no samples ({reason}); training goes on")
            return
        if answers is not None:
            pairs = [dict(prompt=text, answer=answer) for (_, text), answer in zip(self.prompts, answers)]
            lines = [f"  {pair['prompt']} → {' '.join(pair['answer'].split())}" for pair in pairs]
            text = "\n".join([f"{place}  samples", *lines])
            self.trainer.log.write(text, step=self.trainer.state.step, samples=pairs)
            self.write_table()

    def model_of(self, weights):
        """A Transformer that has `weights` themselves, not copies; of an adapter's, with the base."""
        trainer = self.trainer
        with torch.device("meta"):  # no random weights, and no random numbers for them
            model = Transformer(trainer.model.config)
        if is_adapter(weights):
            if self.base is None:
                self.base = self.read_base(next(iter(weights.values())).device)
            adapter = Adapter(trainer.path, {name: part.float() for name, part in weights.items()}, trainer.metadata)
            merged = {f"{name}.weight": part for name, part in merged_weights(self.base, adapter).items()}
            weights = {**self.base.state_dict(), **merged}
        load_weights(model, weights, trainer.path, assign=True)
        model.tie_weights()
        return model.requires_grad_(False)

    def read_base(self, device):
        """The model that an adapter is trained on, from its file: in training its weights may be divided. UserError when the
        file is not what it was."""
        file, sha256 = self.trainer.parent["file"], self.trainer.parent["sha256"]
        if file_sha256(weights_file(file)) != sha256:
            raise UserError(f"{file} has changed since it was read")
        return load_model(file)[0].to(device)

    def answer(self, model):
        """The texts of all answers; None when a request to stop came in between."""
        engine = Engine(model, self.tokenizer)
        requests = [engine.add(ids, GREEDY) for ids in self.prompt_ids]
        while engine.has_work:
            if self.trainer.stop.requested:
                return None
            engine.step()
        return [request.text if request.error is None else f"({request.error})" for request in requests]

    def write_table(self):
        """Write the Markdown file beside the log, of all samples in it: beside that of an earlier run as long as the log is."""
        try:
            with atomic_write(self.current_table, "w", encoding="utf-8") as handle:
                handle.write(table(self.trainer.run_name, read_log(self.trainer.log.current)))
        except OSError as error:  # a full disk ends the run when it saves
            warn(f"{self.current_table}: {error.strerror}; the samples are in the log alone")

    @property
    def table_path(self):
        return self.trainer.log.path.with_name(f"{self.trainer.run_name}_samples.md")

    @property
    def new_table(self):
        return self.table_path.with_name(f"{self.table_path.name}.new")

    @property
    def current_table(self):
        log = self.trainer.log
        return self.table_path if log.current == log.path else self.new_table

    def keep(self):
        """The run's first checkpoint is written: its table takes the place of an earlier run's, as its log does."""
        if self.new_table.exists():
            with contextlib.suppress(OSError):
                self.new_table.replace(self.table_path)

    def discard(self):
        """The table of a run that has no checkpoint goes, as its log does."""
        if self.interval and ranks.is_main():
            self.current_table.unlink(missing_ok=True)


def prompts_of(stage, file):
    """[(place, text)] of the prompts in `file`, or of the built-in ones that a stage has without one."""
    pretraining = stage in PRETRAINED_STAGES
    if file is None:
        return [("--max_seq_len", text) for text in (OPENINGS if pretraining else QUESTIONS)[:BUILT_IN]]
    field = "prompt" if pretraining else "q"
    return [(place, row[field]) for place, row in read_questions(file, field)]


def table(run_name, records):
    """Markdown of the samples among the records of a log: a section for each prompt, a line for each step, with the loss
    that was reported last."""
    sections, loss = {}, "–"
    for record in records:
        if "loss" in record:
            loss = f"{record['loss']:.4f}"
        for sample in record.get("samples", ()):
            row = f"| {record['step']} | {loss} | {cell(sample['answer'])} |"
            sections.setdefault(sample["prompt"], []).append(row)
    head = "| step | loss | answer |\n|---:|---:|---|"
    parts = [f"## {cell(prompt)}\n\n{head}\n" + "\n".join(rows) for prompt, rows in sections.items()]
    return "\n\n".join([f"# What {run_name} said while it learned", *parts]) + "\n"


def cell(text):
    """`text` in one cell of a table: nothing in it ends the cell, the line, or is markup."""
    escaped = html.escape(text, quote=False)
    for character in "\\`*_[]|#":
        escaped = escaped.replace(character, f"\\{character}")
    return " ".join(escaped.split())
