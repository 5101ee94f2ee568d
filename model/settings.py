"""What the scripts' flags set, one line each: default, help, bounds. A notebook fills in the same dataclasses by hand.

Library functions take these values; model/cli.py makes flags of them. Imports nothing heavy.
"""

import dataclasses
import math
import re

from model.errors import UserError

PRETRAINING_ONLY = ("short_rows_share", "short_rows")  # fields of TrainingSettings: conversations stay whole
DTYPES = ("auto", "bfloat16", "float16", "float32")
# The learning rate times the width, docs/recipe.md: of pretraining, and of fine-tuning all weights.
RATE_TIMES_WIDTH, SFT_RATE_TIMES_WIDTH = 0.3, 0.25
AUTO = "auto"  # as a batch size: what fits
ROWS_OF_A_STEP = 64  # on a GPU, over all ranks, where neither --batch_size nor --accumulation_steps says otherwise


def flag(default, help, kind=None, **limits):
    """A dataclass field that is a flag too. kind: type of its value (default: that of `default`). limits: least, most,
    below, choices, metavar, alone (the value of the flag without one), word (the only value that is no number), unset (what
    None means). `{default}` in `help` shows the default."""
    kind = kind or type(default)
    return dataclasses.field(default=default, metadata=dict(help=help, kind=kind, limits=limits))


class Checked:
    """A dataclass whose values keep the limits of their flags."""

    def __post_init__(self):
        """Raise UserError (exit code 2) for a value outside the limits of its flag."""
        for field in dataclasses.fields(self):
            value, limits = getattr(self, field.name), field.metadata.get("limits", {})
            if value is not None and (problem := violation(value, **limits)):
                raise UserError(f"--{field.name}: {problem}, got {value!r}", exit_code=2)


def violation(
    value, least=-math.inf, most=math.inf, below=math.inf, choices=None, metavar=None, alone=None, word=None, unset=None
):
    """What is wrong with `value`, None if nothing."""
    if word and isinstance(value, str):
        return None if value == word else f"must be {word} or a number of at least {least}"
    if choices:
        return None if value in choices else f"choose one of {', '.join(choices)}"
    if isinstance(value, (int, float)) and value > most:
        return f"must be at most {most}"
    if isinstance(value, (int, float)) and not least <= value < below:
        return (
            f"must be at least {least}"
            if value < least
            else "must be finite"
            if below == math.inf
            else f"must be below {below}"
        )
    return None


@dataclasses.dataclass
class ShapeSettings(Checked):
    """Which model: a preset, then single fields of it replaced. None: the preset's or the checkpoint's value."""

    preset: str = flag(None, "named shape (default: minimind-v1-small); a wrong name lists them all", str)
    dim: int = flag(None, "model width", int, least=1)
    n_layers: int = flag(None, "number of layers", int, least=1)
    n_heads: int = flag(None, "number of attention heads, a divisor of --dim", int, least=1)
    n_kv_heads: int = flag(None, "number of key/value heads, a divisor of --n_heads", int, least=1)
    max_seq_len: int = flag(
        None, "tokens of a row or a whole chat (default: the preset's or checkpoint's)", int, least=1
    )
    use_moe: bool = flag(None, "mixture of experts instead of dense", bool)


@dataclasses.dataclass
class ModelSettings(ShapeSettings):
    """The model a training stage works on."""

    dropout: float = flag(None, "dropout probability (default: 0)", float, least=0, below=1)


@dataclasses.dataclass
class DataSettings(Checked):
    """What a training stage reads and starts from."""

    data_path: str = flag(None, "training rows: a file, a folder of them or a quoted glob (default: {default})", str)
    tokenizer_path: str = flag(
        None, "tokenizer folder (default: a parent folder's, else model/minimind_tokenizer)", str
    )
    cache_dir: str = flag(None, "where tokenised rows are kept (default: .cache beside the data file)", str)
    init_from: str = flag(None, "start from this checkpoint; its shape wins over the preset", str, metavar="PTH")
    resume: bool = flag(False, "go on exactly where the last saved step ended")


@dataclasses.dataclass
class TrainingSettings(Checked):
    """How a stage trains; the same for all of them."""

    out_dir: str = flag("out", "where checkpoints and logs go (default: {default})")
    overwrite: bool = flag(False, "start over where a checkpoint is; its files stay until the first save")
    epochs: int = flag(
        None,
        "passes over the data (default: {default}; with --max_steps or --max_minutes as many as it takes)",
        int,
        least=1,
    )
    max_steps: int = flag(
        None, "optimizer steps, where the schedule ends too; with --epochs what ends first", int, least=1
    )
    max_minutes: float = flag(
        None,
        "minutes of training (without start-up, validation and saves) within which the schedule ends",
        float,
        least=0.001,
    )
    dry_run: bool = flag(
        False,
        "measure three steps and tell what the run would need: memory, data, time; write nothing but the token cache",
    )
    stop_after: int = flag(
        None, "save and leave after this step as Ctrl-C does; the schedule stays", int, least=1, metavar="STEP"
    )
    batch_size: int | str = flag(
        None,
        "rows per forward pass of a process; auto: as many as the GPU has room for, of the 64 rows of a step unless "
        "--accumulation_steps says otherwise (default: 64 on a GPU, 8 elsewhere, over all processes)",
        int,
        least=1,
        word=AUTO,
    )
    accumulation_steps: int = flag(
        None, "forward passes per step (default: 1; with --batch_size auto what makes a step of 64 rows)", int, least=1
    )
    learning_rate: float = flag(
        None, "AdamW's peak (default: {default})", float, least=0, unset="0.3 / --dim; in 3-full_sft.py 0.25 / --dim"
    )
    rate_times_width: float = RATE_TIMES_WIDTH  # no flag: the stage's
    muon_learning_rate: float = flag(None, "peak for Muon's matrices (default: 10 x --learning_rate)", float, least=0)
    embedding_rate_factor: float = flag(
        10.0,
        "the embedding, which AdamW trains, learns so many times as fast as --learning_rate (default: {default})",
        least=0,
    )
    schedule: str = flag(
        "linear",
        "how rates fall: linear, to zero; cosine, to a tenth as in v1 (default: {default})",
        choices=("linear", "cosine"),
    )
    decay_share: float = flag(
        1.0, "part of the run, its last, in which rates fall; 0: they stay (default: {default})", least=0, most=1
    )
    warmup_iters: int = flag(None, "steps of linear warm-up before that (default: 5 %, at most 100)", int, least=0)
    weight_decay: float = flag(0.1, "on matrices only (default: {default})", least=0)
    beta1: float = flag(0.9, "of the mean of gradients, AdamW's and Muon's (default: {default})", least=0, below=1)
    beta2: float = flag(0.95, "of the mean of their squares, AdamW's (default: {default})", least=0, below=1)
    grad_clip: float = flag(1.0, "largest gradient norm, 0: any (default: {default})", least=0)
    optimizer: str = flag(
        None,
        "muon: Muon on hidden matrices, AdamW on the rest; adamw: on all (default: muon; with --deepspeed adamw)",
        str,
        choices=("muon", "adamw"),
    )
    short_rows_share: float = flag(
        0.0,
        "first part of the run, in which rows are cut into shorter ones (default: in pretraining on a CPU 0.8, else 0)",
        least=0,
        most=1,
    )
    short_rows: int = flag(
        None, "tokens of those, a divisor of --max_seq_len (default: the largest up to a quarter of it)", int, least=2
    )
    seed: int = flag(1337, "weights, order, split (default: {default})", least=0, most=2**62)
    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps (default: {default})")
    local_rank: int = flag(None, "which GPU of its machine a process has; launchers pass it", int, least=0)
    rendezvous_timeout: float = flag(
        60.0, "seconds to wait at the start for the other processes, if there are any (default: {default})", least=0.1
    )
    dtype: str = flag(
        "auto",
        "of matrix products; auto: bfloat16 where it is native, else float16 on CUDA, float32 elsewhere",
        choices=DTYPES,
    )
    compile: bool = flag(False, "torch.compile the model: slow start, faster steps")
    gradient_checkpointing: bool = flag(
        False, "compute each layer again in the backward pass: less memory, a third more work, same losses"
    )
    deepspeed: str = flag(
        None,
        "share the work of several processes by DeepSpeed, as its config file says (default: one for these flags)",
        str,
        metavar="JSON",
        alone="auto",
    )
    zero_stage: int = flag(
        None,
        "what --deepspeed divides among the processes; 0: nothing, 1: optimizer state, 2: and gradients, 3: and weights "
        "(default: the file's; without a file 2)",
        int,
        least=0,
        most=3,
    )
    offload: bool = flag(False, "--deepspeed keeps the optimizer's state, in stage 3 weights too, in the host's memory")
    fsdp: bool = flag(
        False, "divide weights, gradients and optimizer state among the processes (FSDP2), as ZeRO 3 does"
    )
    num_workers: int = flag(0, "processes that prepare batches (default: {default})", least=0)
    log_interval: int = flag(10, "steps between log lines (default: {default})", least=1)
    eval_interval: int = flag(500, "steps between validations (default: {default})", least=1)
    eval_tokens: int = flag(
        100_000,
        "held-out tokens, or pairs where these are learned, per validation, 0: all (default: {default})",
        least=0,
    )
    save_interval: int = flag(500, "steps between checkpoints (default: {default})", least=1)
    sample_interval: int = flag(
        0, "steps between looks at what it says by now, greedy, also before the first step; 0: never", least=0
    )
    sample_prompts: str = flag(
        None,
        'what it is given then: a text file, one a line, or .jsonl with {"prompt"} in pretraining, else {"q"} '
        "(default: four of its own)",
        str,
        metavar="FILE",
    )
    use_wandb: bool = flag(False, "log to Weights & Biases, offline without a key")
    wandb_project: str = flag("MiniMind", "default: {default}")
    wandb_run_name: str = flag(None, "default: stage and dim", str)

    def __post_init__(self):
        super().__post_init__()
        for name in ("zero_stage", "offload"):
            if getattr(self, name) not in (None, False) and self.deepspeed is None:
                raise UserError(f"--{name}: says how --deepspeed works, and needs it", exit_code=2)
        if self.offload and self.zero_stage == 0:
            raise UserError("--offload: ZeRO stage 0 divides nothing; it needs --zero_stage 1, 2 or 3", exit_code=2)
        if self.sample_prompts and not self.sample_interval:
            raise UserError("--sample_prompts: needs --sample_interval, which says how often", exit_code=2)
        if self.fsdp and self.deepspeed is not None:
            raise UserError("--fsdp, --deepspeed: each divides the work in its own way; choose one", exit_code=2)
        if self.batch_size == AUTO and (self.fsdp or self.deepspeed is not None):
            problem = "trying what fits is for GPUs that hold the whole model, not for --deepspeed or --fsdp"
            raise UserError(f"--batch_size auto: {problem}; give a number", exit_code=2)

    def resolved(self, device, world_size, dim=512):
        """A copy in which nothing is left open: batch size (64 rows on a GPU, 8 elsewhere, over all ranks), the optimizer,
        learning rates for a model of width `dim`, the share of short rows.

        However many ranks share the rows of an open batch size, batches and steps are those of one process. "auto" is the
        default where there is no GPU; on one it stays, as does open accumulation (see training.batch_size). Raises
        UserError where rows cannot be shared evenly, and for a flag that would do nothing.
        """
        batch_size, accumulation = self.batch_size, self.accumulation_steps
        trying = batch_size == AUTO and device.type == "cuda"
        if batch_size in (None, AUTO) and not (trying and accumulation):
            rows = ROWS_OF_A_STEP if device.type == "cuda" else 8
            if rows % world_size:
                problem = f"the {rows} rows of a forward pass cannot be shared evenly by {world_size} processes"
                way_out = "give --batch_size, rows of one process, and --accumulation_steps, or start fewer processes"
                raise UserError(f"--batch_size: {problem}; {way_out}")
            if not trying:
                batch_size = rows // world_size
        rate = self.rate_times_width / dim if self.learning_rate is None else self.learning_rate
        share = self.short_rows_share
        if share is None:  # pretraining's: attention to all of a row costs a CPU a third of its time
            share = 0.8 if device.type == "cpu" else 0.0
        if self.short_rows and not share:
            raise UserError("--short_rows: there are none; it needs a --short_rows_share above 0", exit_code=2)
        optimizer = self.optimizer or ("muon" if self.deepspeed is None else "adamw")
        if self.muon_learning_rate is not None and optimizer != "muon":
            raise UserError(
                f"--muon_learning_rate: the optimizer is {optimizer}; it needs --optimizer muon", exit_code=2
            )
        muon_rate = 10 * rate if self.muon_learning_rate is None and optimizer == "muon" else self.muon_learning_rate
        return dataclasses.replace(
            self,
            batch_size=batch_size,
            accumulation_steps=accumulation or (None if trying else 1),
            optimizer=optimizer,
            learning_rate=rate,
            muon_learning_rate=muon_rate,
            short_rows_share=share,
        )


@dataclasses.dataclass
class LoraSettings(Checked):
    """The adapter that stage 4 trains."""

    lora_name: str = flag("sft", "names the file: lora_<name>_<dim>.pth (default: {default})")
    lora_rank: int = flag(8, "rows of A and columns of B (default: {default})", least=1)
    lora_alpha: float = flag(None, "the update is alpha / rank times B A (default: 2 x rank)", float, least=0.001)
    lora_dropout: float = flag(0.0, "of what goes into A (default: {default})", least=0, below=1)
    lora_targets: str = flag(
        "all",
        "matrices with an adapter, separated by commas, each by any part of its name: wq, attention, experts, layers.0 "
        "(default: {default}, of attention, feed-forward and experts)",
    )

    def __post_init__(self):
        super().__post_init__()
        if not re.fullmatch(r"[\w-]+", self.lora_name):
            problem = "must be letters, digits, - and _, for it becomes part of a file's name"
            raise UserError(f"--lora_name: {problem}, got {self.lora_name!r}", exit_code=2)
        if self.lora_alpha is None:
            self.lora_alpha = 2.0 * self.lora_rank


@dataclasses.dataclass
class PreferenceSettings(Checked):
    """The loss of stage 5, as trl has it."""

    beta: float = flag(0.1, "weight of staying near the reference, higher: nearer (default: {default})", least=1e-6)
    loss_type: str = flag(
        "sigmoid",
        "sigmoid: DPO; ipo: a squared distance from a margin of 1 / (2 beta) nats per token, which asks for a --beta of "
        "1 or more (default: {default})",
        choices=("sigmoid", "ipo"),
    )
    sft_weight: float = flag(0.0, "times the chosen answers' next-token loss is added (default: {default})", least=0)


@dataclasses.dataclass
class CheckpointSettings(ShapeSettings):
    """Which trained model: a file or folder, or what finds the one a training stage wrote; with which adapter on it."""

    checkpoint: str = flag(
        None, "a .pth or a Hugging Face folder (default: the latest stage in --out_dir)", str, metavar="PATH"
    )
    lora: str = flag(None, "put this LoRA adapter on it, which 4-lora_sft.py wrote", str, metavar="PTH")
    force: bool = flag(False, "put --lora also on another base than the one it was trained on")
    out_dir: str = flag("out", "where to look for checkpoints (default: {default})")
    tokenizer_path: str = flag(None, "tokenizer folder (default: a folder's own, else model/minimind_tokenizer)", str)
    rope_scaling: str = flag(None, "stretch positions beyond the trained length", str, choices=("linear", "yarn"))


@dataclasses.dataclass
class ExportSettings(Checked):
    """What a trained model is turned into."""

    format: str = flag("minimind", "default: {default}", choices=("minimind", "llama", "granitemoe", "gguf", "pth"))
    output: str = flag(None, "folder or file to write (default: out/export/<checkpoint>_<format>)", str)
    force: bool = flag(False, "replace an export that is there; put --lora also on another base than it was trained on")
    dtype: str = flag(None, "of the weights (default: float32); a gguf has --quantization", str, choices=DTYPES[1:])
    quantization: str = flag(None, "of a gguf's matrices (default: q8_0)", str, choices=("f32", "f16", "bf16", "q8_0"))
    license: str = flag("apache-2.0", "what the model card says; your data may ask for another (default: {default})")
    scores: str = flag(None, "summary.json of eval_ceval.py, for the model card", str, metavar="JSON")
    push_to_hub: str = flag(
        None, "upload the export to this repository of the Hugging Face hub", str, metavar="OWNER/NAME"
    )
    private: bool = flag(False, "a repository that --push_to_hub makes is private")

    def __post_init__(self):
        super().__post_init__()
        for name, wrong in (("dtype", self.format == "gguf"), ("quantization", self.format != "gguf")):
            if wrong and getattr(self, name):
                raise UserError(f"--{name}: is not for --format {self.format}", exit_code=2)
        if self.private and not self.push_to_hub:
            raise UserError("--private: needs --push_to_hub", exit_code=2)
        if self.format == "pth" and (self.scores or self.license != type(self).license):
            raise UserError("--scores, --license: a pth has no model card", exit_code=2)
        if self.format == "gguf" and self.scores and not self.push_to_hub:
            raise UserError("--scores: a gguf has a model card only with --push_to_hub", exit_code=2)


@dataclasses.dataclass
class ExamSettings(Checked):
    """Which exam of four options, how its questions are asked, and where the results go."""

    benchmark: str = flag("ceval", "default: {default}", choices=("ceval", "cmmlu"))
    data_dir: str = flag(None, "folder of the exam (default: ceval/ceval-exam, or cmmlu)", str)
    subjects: str = flag(None, "only these, separated by commas (default: all that are there)", str)
    few_shot: int = flag(
        0,
        "solved examples from dev/ before each question, fewer where the context is full (default: {default})",
        least=0,
        metavar="K",
    )
    prompt_format: str = flag(
        "auto",
        "chat: a conversation; plain: a text to go on from; auto: by the checkpoint's stage, chat if unknown",
        choices=("auto", "chat", "plain"),
    )
    shuffle_options: int = flag(
        None, "ask with the four options in another order, which SEED decides", int, least=0, metavar="SEED"
    )
    results_dir: str = flag(
        "out/ceval",
        "a CSV per subject and summary.csv, .json, .md, .png; an earlier exam's are replaced (default: {default})",
    )


@dataclasses.dataclass
class MachineSettings(CheckpointSettings):
    """Which trained model runs where."""

    device: str = flag("auto", "auto, cpu, cuda, cuda:N or mps (default: {default})")
    dtype: str = flag(
        "auto",
        "of weights and cache; auto: bfloat16 where it is native, else float16 on CUDA, float32 elsewhere",
        choices=DTYPES,
    )


@dataclasses.dataclass
class InferenceSettings(MachineSettings):
    """Which trained model writes text, and where."""

    dtype: str = flag(
        "auto",
        "as elsewhere; int8: bfloat16 with weights rounded to 8 bits, on a CPU faster (default: {default})",
        choices=(*DTYPES, "int8"),
    )
    compile: bool = flag(False, "torch.compile the decoding step: slow start, faster tokens")


@dataclasses.dataclass
class ServerSettings(Checked):
    """Where the server listens, to whom, and how much it takes."""

    host: str = flag("127.0.0.1", "address to listen at; 0.0.0.0: all of this machine's (default: {default})")
    port: int = flag(8000, "0: any free one (default: {default})", least=0, most=65535)
    api_key: str = flag(
        None,
        "clients must send it (default: the environment's MINIMIND_API_KEY, which other users do not see; else none)",
        str,
        metavar="KEY",
    )
    cors: str = flag(
        None, "origins whose web pages may ask, separated by commas, *: any (default: none)", str, metavar="ORIGIN"
    )
    model_name: str = flag(None, "what clients call the model (default: the checkpoint's name)", str, metavar="NAME")
    strict_model: bool = flag(False, "refuse other model names than those of GET /v1/models")
    max_batch: int = flag(32, "answers written at the same time (default: {default})", least=1)
    max_cache_gb: float = flag(
        None, "memory for their keys and values; who finds none left waits (default: what is free)", float, least=0.001
    )
    max_waiting: int = flag(64, "requests that may wait beside them; more get status 429 (default: {default})", least=0)
    max_body_bytes: int = flag(2**20, "largest request; larger ones get status 413 (default: {default})", least=1000)
    request_timeout: float = flag(600.0, "seconds until an answer is cut off (default: {default})", least=0.1)

    def __post_init__(self):
        super().__post_init__()
        if self.api_key is not None and not re.fullmatch("[!-~]+", self.api_key):  # which is not repeated here
            raise UserError(
                "--api_key: must be ASCII characters without spaces, for it is sent in a header", exit_code=2
            )
        if self.cors is not None and not all(origin.strip() for origin in self.cors.split(",")):
            raise UserError(f"--cors: expected origins such as http://localhost:3000, got {self.cors!r}", exit_code=2)


@dataclasses.dataclass(frozen=True)
class SamplingParameters(Checked):
    """How one request picks its tokens. Raises UserError (exit code 2) for values without a meaning.

    temperature: logits are divided by it; 0 is greedy: always the most probable token, and so is anything below 1e-5.
    top_k: only the k most probable tokens, of equals the first in the vocabulary; 0 switches it off.
    top_p: only the smallest set of tokens that holds this much probability (nucleus sampling, Holtzman et al. 2020,
        arXiv 1904.09751), among those top_k left; at least one token always remains.
    repetition_penalty: positive logits of tokens already in prompt or answer are divided by it, negative ones
        multiplied (Keskar et al. 2019, CTRL, arXiv 1909.05858, section 4.1); above 1 discourages repeating.
    presence_penalty, frequency_penalty: taken from the logits of tokens already in the answer, the first once, the second as
        often as they occur (OpenAI's API); negative ones encourage repeating.
    max_new_tokens: counts what is generated, never the prompt.
    seed: the same seed, prompt and parameters give the same answer, in float32 whoever shares the batch. In bfloat16 and
        float16 matrix products round differently for another number of rows, so only alone or in the same company (of
        16 sampled answers of 64 tokens 15 differed alone and together, of 16 greedy ones 9). None: a fresh one.
    stop_token_ids: tokens that end the answer and are not part of it; None means the model's eos_token_id.
    stop_strings: texts that end the answer, which is cut before the first of them.
    logprobs: with each token come its log-probability and those of so many most probable ones, of the model's own
        distribution, before penalties and temperature; None: none at all.
    """

    temperature: float = flag(1.0, "0: always the most probable (default: {default})", least=0)
    top_k: int = flag(0, "of the k most probable tokens, 0: all (default: {default})", least=0)
    top_p: float = flag(1.0, "of the most probable with this much in sum (default: {default})")
    repetition_penalty: float = flag(1.0, "above 1: repeat less (default: {default})", least=0.01, most=100)
    presence_penalty: float = flag(0.0, "above 0: other tokens (default: {default})", least=-2, most=2)
    frequency_penalty: float = flag(0.0, "above 0: not the same too often (default: {default})", least=-2, most=2)
    max_new_tokens: int = flag(512, "longest answer, prompt not counted (default: {default})", least=1)
    seed: int = flag(None, "same seed, same answer (default: {default})", int, least=0)
    stop_token_ids: tuple | None = None
    stop_strings: tuple = ()
    logprobs: int | None = None

    def __post_init__(self):
        super().__post_init__()
        for name, valid, expected in (
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= 20, "between 0 and 20"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("stop_strings", not isinstance(self.stop_strings, str) and all(self.stop_strings), "non-empty texts"),
        ):
            if not valid:
                raise UserError(f"--{name}: must be {expected}, got {getattr(self, name)!r}", exit_code=2)


@dataclasses.dataclass
class EndpointSettings(Checked):
    """Which OpenAI-compatible server answers, and how it picks its tokens; None: as the server does by itself."""

    base_url: str = flag("http://127.0.0.1:8000/v1", "address of its API (default: {default})", metavar="URL")
    api_key: str = flag(None, "its key (default: OPENAI_API_KEY, else none)", str, metavar="KEY")
    model: str = flag(None, "name of the model (default: the first that the server lists)", str, metavar="NAME")
    temperature: float = flag(None, "0: always the most probable (default: the server's)", float, least=0, most=2)
    top_p: float = flag(
        None, "of the most probable with this much in sum (default: the server's)", float, least=0, most=1
    )
    max_tokens: int = flag(None, "longest answer (default: the server's)", int, least=1)
