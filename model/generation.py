"""Text generation: a preallocated KV cache with a length per row, sampling, and an engine in which many requests share
each forward pass, joining and leaving between steps (continuous batching; Yu et al. 2022, Orca).

Shape letters: B rows, T new tokens, K keys, G key/value heads, D head size, V vocabulary.
"""

import contextlib
import random
import sys
from collections import deque
from dataclasses import dataclass

import torch

from model.checkpoint import check_tokenizer, checkpoint_path, load_model, read_metadata, requested_config
from model.cli import SHAPE_FLAGS, UserError, model_overrides
from model.distributed import check_compiler, select_device, select_dtype
from model.LMConfig import LMConfig
from model.tokenizer import StreamDecoder, load_tokenizer, render_conversation


class KVCache:
    """Keys and values of `batch` rows in preallocated tensors [B, G, capacity, D] per layer. Row r holds lengths[r]
    tokens in slots 0 .. lengths[r] - 1: a batch of unequal rows is padded on the right, never on the left.

    A forward pass first asks get_seq_length(), which also settles where the update() of each layer will write; after it
    the owner calls advance().
    """

    def __init__(self, config, batch, capacity, dtype=torch.float32, device="cpu"):
        shape = (batch, config.n_kv_heads, capacity, config.head_dim)
        # Zeros, not empty: a masked slot has weight 0 in attention, and 0 times a leftover NaN would be NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
        self.lengths = torch.zeros(batch, dtype=torch.long)  # on the host, so that looking at it never waits for a GPU
        self.past, self.fixed_shapes = 0, False

    @property
    def batch(self):
        return self.keys[0].shape[0]

    @property
    def capacity(self):
        return self.keys[0].shape[2]

    def get_seq_length(self):
        """Tokens stored per row: an int when all rows hold the same number, else a LongTensor [B]."""
        if self.fixed_shapes:
            return self.past
        listed = self.lengths.tolist()
        uniform = listed.count(listed[0]) == len(listed)
        self.past = listed[0] if uniform else self.lengths.to(self.keys[0].device)
        return self.past

    def key_count(self, new):
        """K of what update() returns for `new` tokens: the longest row's length including them; in fixed_shapes mode
        the capacity."""
        return self.capacity if self.fixed_shapes else int(self.lengths.max()) + new

    def update(self, key, value, layer_index):
        """Store key and value [B, G, T, D] after each row's stored tokens; return all keys and values [B, G, K, D]."""
        keys, values, new = self.keys[layer_index], self.values[layer_index], key.shape[2]
        if isinstance(self.past, int):  # plain slices: no index tensors, and views instead of copies come back
            end = self.past + new
            keys[:, :, self.past : end] = key
            values[:, :, self.past : end] = value
            return keys[:, :, :end], values[:, :, :end]
        rows = torch.arange(self.batch, device=key.device)[:, None]
        slots = self.past[:, None] + torch.arange(new, device=key.device)
        keys[rows, :, slots] = key.transpose(1, 2)
        values[rows, :, slots] = value.transpose(1, 2)
        end = self.key_count(new)
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, counts):
        """After a forward pass: row r now holds counts[r] more tokens (counts: an int, or a list or LongTensor [B])."""
        self.lengths += torch.as_tensor(counts, dtype=torch.long)

    @contextlib.contextmanager
    def with_fixed_shapes(self):
        """Within, get_seq_length() is a LongTensor and K is the capacity, whatever the lengths: compiled code, made for
        fixed shapes, serves every step."""
        self.past, self.fixed_shapes = self.lengths.to(self.keys[0].device), True
        try:
            yield
        finally:
            self.fixed_shapes = False

    def rows(self, first, last):
        """Rows first .. last - 1 as a cache of their own on the same memory."""
        view = object.__new__(KVCache)
        view.keys = [keys[first:last] for keys in self.keys]
        view.values = [values[first:last] for values in self.values]
        view.lengths, view.past, view.fixed_shapes = self.lengths[first:last], 0, False
        return view

    def move_row(self, source, target):
        """Copy row `source` over row `target`."""
        length = int(self.lengths[source])
        for storage in (*self.keys, *self.values):
            storage[target, :, :length] = storage[source, :, :length]
        self.lengths[target] = length

    def copy_rows(self, other):
        """Copy the rows of a smaller cache of the same capacity into the first rows of this one."""
        for mine, theirs in zip((*self.keys, *self.values), (*other.keys, *other.values)):
            mine[: other.batch].copy_(theirs)
        self.lengths[: other.batch] = other.lengths


@dataclass(frozen=True)
class SamplingParameters:
    """How one request picks its tokens. Raises UserError (exit code 2) for values without a meaning.

    temperature: logits are divided by it; 0 is greedy: always the most probable token.
    top_k: only the k most probable tokens; 0 switches it off.
    top_p: only the smallest set of tokens that holds this much probability (nucleus sampling, Holtzman et al. 2020,
        arXiv 1904.09751), among those top_k left; at least one token always remains.
    repetition_penalty: positive logits of tokens already in prompt or answer are divided by it, negative ones
        multiplied (Keskar et al. 2019, CTRL, arXiv 1909.05858, section 4.1); above 1 discourages repeating.
    max_new_tokens: counts what is generated, never the prompt.
    seed: the same seed, prompt and parameters give the same answer, whoever shares the batch; None: a fresh one.
    stop_token_ids: tokens that end the answer and are not part of it; None means the model's eos_token_id.
    stop_strings: texts that end the answer, which is cut before the first of them.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    seed: int | None = None
    stop_token_ids: tuple | None = None
    stop_strings: tuple = ()

    def __post_init__(self):
        for name, valid, expected in (
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0 (1 is off)"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("stop_strings", not isinstance(self.stop_strings, str) and all(self.stop_strings), "non-empty texts"),
        ):
            if not valid:
                raise UserError(f"{name} must be {expected}, got {getattr(self, name)!r}", exit_code=2)


class Sampler:
    """The sampling parameters of the rows of a batch as tensors: what is the same in every step is prepared once."""

    def __init__(self, parameters, histories, vocab_size, device):
        """parameters: a SamplingParameters per row; histories: the token ids each row has seen, prompt and answer."""

        def column(name):
            return torch.tensor([[float(getattr(row, name))] for row in parameters], device=device)

        self.all_greedy = all(row.temperature == 0 for row in parameters)
        self.greedy = column("temperature")[:, 0] == 0
        self.temperature = column("temperature").masked_fill(self.greedy[:, None], 1.0)
        top_k = [row.top_k if 0 < row.top_k < vocab_size and row.temperature > 0 else vocab_size for row in parameters]
        self.largest_k = max(top_k)
        self.top_k = torch.tensor(top_k, device=device)[:, None] if min(top_k) < self.largest_k else None
        self.top_p = column("top_p") if any(row.top_p < 1 for row in parameters) else None
        self.sorted = self.largest_k < vocab_size or self.top_k is not None or self.top_p is not None
        self.penalty = self.seen = None
        if any(row.repetition_penalty != 1 for row in parameters):
            self.penalty = column("repetition_penalty")
            self.seen = torch.zeros(len(parameters), vocab_size, dtype=torch.bool, device=device)
            for seen, history in zip(self.seen, histories):
                seen[torch.tensor(history, dtype=torch.long, device=device)] = True

    def penalise(self, logits):
        """Apply the repetition penalty to logits [B, V]."""
        if self.penalty is None:
            return logits
        return torch.where(self.seen, torch.where(logits > 0, logits / self.penalty, logits * self.penalty), logits)

    def distribution(self, logits):
        """Penalised logits [B, V] -> probabilities [B, V], 0 where excluded; they need not sum to one."""
        scaled = logits / self.temperature
        if not self.sorted:
            return scaled.softmax(dim=-1)
        scaled, tokens = scaled.topk(self.largest_k, dim=-1)
        if self.top_k is not None:
            rank = torch.arange(self.largest_k, device=logits.device)
            scaled = scaled.masked_fill(rank >= self.top_k, float("-inf"))
        probabilities = scaled.softmax(dim=-1)
        if self.top_p is not None:
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        return torch.zeros_like(logits).scatter_(1, tokens, probabilities)

    def pick(self, logits, uniforms):
        """The next token of each row (list [B]) from logits [B, V] and one number in (0, 1] per row (list [B]).

        Sampling inverts the cumulative distribution over the vocabulary in its own order, so that a row's token depends
        on its own logits, parameters and number alone.
        """
        logits = self.penalise(logits.float())
        chosen = logits.argmax(dim=-1)
        if not self.all_greedy:
            cumulative = self.distribution(logits).cumsum(dim=-1)
            threshold = torch.tensor(uniforms, device=logits.device)[:, None] * cumulative[:, -1:]
            sampled = torch.searchsorted(cumulative, threshold).clamp(max=logits.shape[-1] - 1)
            chosen = torch.where(self.greedy, chosen, sampled[:, 0])
        if self.seen is not None:
            self.seen.scatter_(1, chosen[:, None], True)
        return chosen.tolist()


@dataclass
class Delta:
    """What one step added to one request: text ("" while a character or a possible stop string is incomplete), token
    ids, and on the last delta finish_reason "stop" (stop token or string) or "length"."""

    request: "Request"
    text: str
    token_ids: list
    finish_reason: str | None


class Request:
    """One prompt on its way to an answer, and the answer so far: .token_ids, .text, .finish_reason (None: not done)."""

    def __init__(self, prompt_ids, parameters, stop_token_ids, limit, tokenizer):
        self.prompt_ids, self.parameters = prompt_ids, parameters
        self.stop_token_ids, self.limit = stop_token_ids, limit
        self.token_ids, self.text, self.finish_reason = [], "", None
        self.random = random.Random(parameters.seed)
        self.decoder = StreamDecoder(tokenizer) if tokenizer is not None else None
        self.held_back = ""

    def accept(self, token):
        """Take the next token; returns the Delta it causes."""
        stopped = token in self.stop_token_ids
        if not stopped:
            self.token_ids.append(token)
        reason = "stop" if stopped else "length" if len(self.token_ids) == self.limit else None
        text = self.held_back + self.decode(token, stopped, reason is not None)
        cut = min((place for place in map(text.find, self.parameters.stop_strings) if place >= 0), default=None)
        if cut is not None:
            text, reason = text[:cut], "stop"
        keep = 0 if reason else self.possible_stop(text)
        text, self.held_back = text[: len(text) - keep], text[len(text) - keep :]
        self.text += text
        self.finish_reason = reason
        return Delta(self, text, [] if stopped else [token], reason)

    def decode(self, token, stopped, last):
        """The characters that `token` completes, and on the last step what is left of an unfinished one."""
        if self.decoder is None:
            return ""
        return ("" if stopped else self.decoder.push(token)) + (self.decoder.flush() if last else "")

    def possible_stop(self, text):
        """Length of the longest end of `text` with which a stop string could begin."""
        longest = max(map(len, self.parameters.stop_strings), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.parameters.stop_strings):
                return length
        return 0


class Engine:
    """Runs requests through one model. add() queues a request, each step() gives every running one a token.

    Rows 0 .. n-1 of the cache belong to the n running requests; when one leaves, the last row moves into its place, so
    that each forward pass computes no empty row. Not thread-safe: one thread owns an engine.

    model: a Transformer, left in evaluation mode. tokenizer: needed for text and stop strings, not for token ids.
    max_batch: how many requests run at once; others wait their turn. max_length: most tokens of prompt and answer
    together, default config.max_seq_len: past it the model meets positions that it was never trained on. compile:
    torch.compile the decoding step, once for each doubling of the rows in use.
    """

    PREFILL_CHUNK = 512  # prompt tokens per forward pass: bounds the memory of long prompts

    def __init__(self, model, tokenizer=None, max_batch=16, max_length=None, compile=False):
        self.model, self.tokenizer, self.max_batch = model.eval(), tokenizer, max_batch
        self.max_length = max_length or model.config.max_seq_len
        self.running, self.waiting = [], deque()
        self.cache, self.sampler = None, None
        self.compiled = None
        if compile:
            check_compiler(model.device)
            mode = "reduce-overhead" if model.device.type == "cuda" else "default"  # the former: one CUDA graph a step
            self.compiled = torch.compile(self.model, mode=mode, dynamic=False)

    def add(self, prompt_ids, parameters=SamplingParameters()):
        """Queue a prompt (token ids) and return its Request.

        Raises UserError for an empty prompt, ids outside the vocabulary, or a prompt that fills the whole context.
        """
        prompt_ids = list(prompt_ids)
        vocab_size = self.model.config.vocab_size
        if not prompt_ids:
            raise UserError("the prompt is empty: give the model at least one token to go on from", exit_code=2)
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab_size:
            raise UserError(f"the prompt has token ids outside 0..{vocab_size - 1}: tokenizer and model do not match")
        if len(prompt_ids) >= self.max_length:
            length, context = len(prompt_ids), self.max_length
            way_out = "shorten it, or raise --max_seq_len with --rope_scaling yarn"
            raise UserError(f"the prompt has {length} tokens but the context only {context}: {way_out}")
        if parameters.stop_strings and self.tokenizer is None:
            raise ValueError("stop_strings need an Engine with a tokenizer")
        stop = parameters.stop_token_ids
        stop = {self.model.config.eos_token_id} if stop is None else set(stop)
        limit = min(parameters.max_new_tokens, self.max_length - len(prompt_ids))
        request = Request(prompt_ids, parameters, stop, limit, self.tokenizer)
        self.waiting.append(request)
        return request

    @property
    def description(self):
        """One line for the user: size of the model, number format, device, context."""
        weight, count = self.model.tok_embeddings.weight, sum(part.numel() for part in self.model.parameters())
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"{count:,} parameters, {dtype} on {weight.device}, context {self.max_length} tokens"

    @property
    def has_work(self):
        """True while any request is running or waiting."""
        return bool(self.running or self.waiting)

    def cancel(self, request):
        """Drop a request, waiting or running; one that is done already is left as it is."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request in self.running:
            self.release([request])

    @torch.inference_mode()
    def step(self):
        """One token for every running request, waiting ones admitted first; returns a list of Delta."""
        older, logits = len(self.running), []
        admitted = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.max_batch - older))]
        if admitted:
            try:  # before the others' turn: a prompt that fails leaves them as they were
                logits.append(self.prefill(admitted))
            except BaseException:
                self.release([request for request in admitted if request in self.running])
                raise
        if older:
            logits.insert(0, self.decode(older))
        if not logits:
            return []
        if self.sampler is None:
            histories = [request.prompt_ids + request.token_ids for request in self.running]
            parameters = [request.parameters for request in self.running]
            self.sampler = Sampler(parameters, histories, self.model.config.vocab_size, logits[0].device)
        uniforms = [1.0 - request.random.random() for request in self.running]
        tokens = self.sampler.pick(logits[0] if len(logits) == 1 else torch.cat(logits), uniforms)
        deltas = [request.accept(token) for request, token in zip(self.running, tokens)]
        self.release([request for request in self.running if request.finish_reason])
        return deltas

    def decode(self, rows):
        """Feed the first `rows` running requests their last token; logits [rows, V] of the next."""
        device = self.model.device
        last = [[request.token_ids[-1]] for request in self.running[:rows]]
        if self.compiled is not None:
            # All rows of the cache, also the unused ones: their number is part of the shape that was compiled.
            last += [[0]] * (self.cache.batch - rows)
            with self.cache.with_fixed_shapes():
                logits = self.compiled(torch.tensor(last, device=device), kv_cache=self.cache).logits[:rows, -1]
            self.cache.rows(0, rows).advance(1)
            return logits
        cache = self.cache.rows(0, rows) if rows < self.cache.batch else self.cache
        with one_row_kernels(rows, self.model):
            logits = self.model(torch.tensor(last, device=device), kv_cache=cache).logits[:, -1]
        cache.advance(1)
        return logits

    def prefill(self, requests):
        """Give `requests` rows, run their prompts through the model together; logits [B, V] of their first tokens."""
        first, device = len(self.running), self.model.device
        self.running += requests
        self.sampler = None
        self.reserve_rows(len(self.running))
        cache = self.cache.rows(first, len(self.running))
        cache.lengths.zero_()
        lengths = torch.tensor([len(request.prompt_ids) for request in requests])
        longest = int(lengths.max())
        padded = [request.prompt_ids + [0] * (longest - len(request.prompt_ids)) for request in requests]
        ids = torch.tensor(padded, device=device)
        result = None
        for start in range(0, longest, self.PREFILL_CHUNK):
            chunk = ids[:, start : start + self.PREFILL_CHUNK]
            last = (lengths - 1 - start).clamp(0, chunk.shape[1] - 1).to(device)
            logits = self.model(chunk, kv_cache=cache, padding_side="right", logits_to_keep=last[:, None]).logits[:, 0]
            cache.advance(chunk.shape[1])
            ends_here = ((lengths > start) & (lengths <= start + chunk.shape[1])).to(device)
            result = logits if result is None else torch.where(ends_here[:, None], logits, result)
        cache.lengths.copy_(lengths)
        if not torch.isfinite(result).all():
            raise UserError(
                "the model's output is not finite: the checkpoint is damaged, or --dtype is too narrow for it"
            )
        return result

    def reserve_rows(self, rows):
        """Make the cache hold at least `rows` rows; the number doubles, so a single request pays for one row only."""
        if self.cache is not None and self.cache.batch >= rows:
            return
        batch = min(self.max_batch, max(rows, 2 * self.cache.batch if self.cache else 1))
        embeddings = self.model.tok_embeddings.weight
        larger = KVCache(self.model.config, batch, self.max_length, embeddings.dtype, embeddings.device)
        if self.cache is not None:
            larger.copy_rows(self.cache)
        self.cache = larger
        if self.compiled is not None:  # a CUDA graph writes into these very tensors; others it would copy in every step
            for storage in (*larger.keys, *larger.values):
                torch._dynamo.mark_static_address(storage)

    @torch.inference_mode()
    def release(self, requests):
        """Free the rows of `requests`; rows behind them move up."""
        for request in requests:
            row, last = self.running.index(request), len(self.running) - 1
            if row != last:
                self.cache.move_row(last, row)
                self.running[row] = self.running[last]
            self.running.pop()
            self.sampler = None

    def stream(self, prompt_ids, parameters=SamplingParameters()):
        """Yield the Deltas of one prompt; their texts join to the answer. Closing the iterator cancels the request."""
        request = self.add(prompt_ids, parameters)
        try:
            while request.finish_reason is None:
                yield from (delta for delta in self.step() if delta.request is request)
        finally:
            self.cancel(request)

    def generate(self, prompts, parameters=SamplingParameters(), on_finish=None):
        """Complete a list of prompts (lists of token ids); returns their finished Requests in the same order.

        parameters: one for all, or a list with one each. on_finish(request) is called as each one is done.
        """
        each = [parameters] * len(prompts) if isinstance(parameters, SamplingParameters) else parameters
        requests = [None] * len(prompts)
        try:
            # Neighbours in length share a prefill, so that little of it is padding.
            for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index])):
                requests[index] = self.add(prompts[index], each[index])
            while any(request.finish_reason is None for request in requests):
                for delta in self.step():
                    if delta.finish_reason and on_finish is not None:
                        on_finish(delta.request)
        finally:
            for request in requests:
                self.cancel(request)
        return requests


@contextlib.contextmanager
def one_row_kernels(rows, model):
    """For one or two rows in bfloat16 on a CPU: PyTorch's own matrix-vector kernel reads the weights twice as fast as
    the oneDNN one that it would take otherwise (2 cores, one row: 25 against 12 GB/s)."""
    weight, enabled = model.tok_embeddings.weight, torch.backends.mkldnn.enabled
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and rows <= 2:
        torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled


def conversation_prompt(tokenizer, messages, context, max_new_tokens):
    """Token ids that ask for the assistant's next turn, and how many of the oldest messages had to be dropped.

    Whole exchanges are dropped, never a system turn or the last question, until the answer has max_new_tokens or a
    quarter of the `context` left, whichever is less. A last question that fills the context alone is left to
    Engine.add to refuse.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    turns = messages[len(system) :]
    room = min(max_new_tokens, context // 4)
    dropped = 0
    while True:
        ids, _ = render_conversation(tokenizer, system + turns[dropped:], add_generation_prompt=True)
        if len(ids) + room <= context or len(turns) - dropped <= 1:
            return ids, dropped
        dropped += 1
        while turns[dropped]["role"] != "user" and dropped < len(turns) - 1:
            dropped += 1


def open_engine(args, stages, **engine_arguments):
    """(Engine, path of its checkpoint) as the inference flags in `args` ask.

    Without --checkpoint the first of `stages`, such as "multi_chat/full_sft", that has a file for the flags' shape.
    Raises UserError when there is none, when shape or tokenizer do not fit, or for a device that is not there.
    """
    device = select_device(args.device)
    dtype = select_dtype(args.dtype, device)
    path = args.checkpoint or find_checkpoint(args, stages)
    overrides = model_overrides(args)
    if args.preset:
        overrides.update({name: getattr(requested_config(args), name) for name in SHAPE_FLAGS})
    trained = read_metadata(path).get("config", {}).get("max_seq_len", LMConfig().max_seq_len)
    if (args.max_seq_len or 0) > trained and not args.rope_scaling:
        print(
            f"note: trained on {trained} tokens; beyond them answers get worse without --rope_scaling yarn",
            file=sys.stderr,
        )
    if args.rope_scaling:
        if (args.max_seq_len or 0) <= trained:
            raise UserError(f"--rope_scaling needs a --max_seq_len above the trained {trained} tokens", exit_code=2)
        overrides["rope_scaling"] = {"rope_type": args.rope_scaling, "factor": args.max_seq_len / trained}
    model, metadata = load_model(path, **overrides)
    tokenizer = load_tokenizer(args.tokenizer_path)
    check_tokenizer(tokenizer, path, model, metadata)
    return Engine(model.to(device, dtype), tokenizer, compile=args.compile, **engine_arguments), path


def find_checkpoint(args, stages):
    """The checkpoint of the first of `stages` that has the flags' shape; UserError names what there is."""
    config = requested_config(args)
    paths = [checkpoint_path(args.out_dir, stage, config) for stage in stages]
    for path in paths:
        if path.is_file():
            return path
    found = {str(other) for path in paths for other in path.parent.glob("*.pth") if other.suffixes == [".pth"]}
    hint = (
        f"there is {', '.join(sorted(found))}: name one with --checkpoint"
        if found
        else "train one first, or use --checkpoint"
    )
    raise UserError(f"{' or '.join(map(str, paths))}: no such checkpoint; {hint}")


def sampling_parameters(args):
    """The sampling flags in `args` as SamplingParameters."""
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens", "seed")
    return SamplingParameters(**{name: getattr(args, name) for name in names})
