"""An engine in which many requests share each forward pass, joining and leaving between steps (continuous batching; Yu
et al. 2022, Orca).

Shape letters: B rows, V vocabulary.
"""

import random
from collections import deque
from dataclasses import dataclass

import torch
from torch import nn

from model.device import check_compiler
from model.errors import UserError
from model.inference.cpu_kernels import install, one_row_kernels
from model.inference.kv_cache import KVCache
from model.inference.sampling import Sampler
from model.settings import SamplingParameters
from model.tokenizer import StreamDecoder


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
        text = self.held_back
        if self.decoder is not None:
            text += "" if stopped else self.decoder.push(token)
            text += self.decoder.flush() if reason else ""
        cut = min((place for place in map(text.find, self.parameters.stop_strings) if place >= 0), default=None)
        if cut is not None:
            text, reason = text[:cut], "stop"
        end = len(text) if reason else self.possible_stop(text)
        text, self.held_back = text[:end], text[end:]
        self.text += text
        self.finish_reason = reason
        return Delta(self, text, [] if stopped else [token], reason)

    def possible_stop(self, text):
        """Where in `text` a stop string may begin that the next tokens would complete; len(text) if nowhere."""
        stops = self.parameters.stop_strings
        starts = (start for start in range(len(text)) if any(stop.startswith(text[start:]) for stop in stops))
        return next(starts, len(text))


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
        self.model, self.tokenizer, self.max_batch = install(model.eval()), tokenizer, max_batch
        self.max_length = max_length or model.config.max_seq_len
        self.running, self.waiting = [], deque()
        self.cache = self.sampler = self.compiled = None
        if compile:
            check_compiler(model.device)
            mode = "reduce-overhead" if model.device.type == "cuda" else "default"  # the former: one CUDA graph a step
            self.compiled = torch.compile(self.model, mode=mode, dynamic=False)

    def add(self, prompt_ids, parameters=SamplingParameters()):
        """Queue a prompt (token ids) and return its Request.

        Raises UserError for an empty prompt, ids outside the vocabulary, or a prompt that fills the whole context.
        """
        prompt_ids, vocab_size = list(prompt_ids), self.model.config.vocab_size
        if not prompt_ids:
            raise UserError("the prompt is empty: give the model at least one token to go on from", exit_code=2)
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab_size:
            raise UserError(f"the prompt has token ids outside 0..{vocab_size - 1}: tokenizer and model do not match")
        if len(prompt_ids) >= self.max_length:
            problem = f"the prompt has {len(prompt_ids)} tokens but the context only {self.max_length}"
            raise UserError(f"{problem}: shorten it, or raise --max_seq_len with --rope_scaling yarn")
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
                del self.running[older:]
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
        last = [[request.token_ids[-1]] for request in self.running[:rows]]
        cache = self.cache.rows(0, rows) if rows < self.cache.batch else self.cache
        if self.compiled is not None:
            # All rows of the cache, also the unused ones: their number is part of the shape that was compiled.
            last = torch.tensor(last + [[0]] * (self.cache.batch - rows), device=self.model.device)
            with self.cache.with_fixed_shapes():
                logits = self.compiled(last, kv_cache=self.cache).logits[:rows, -1]
        else:
            with one_row_kernels(rows, self.model):
                logits = self.model(torch.tensor(last, device=self.model.device), kv_cache=cache).logits[:, -1]
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
        prompts = [torch.tensor(request.prompt_ids) for request in requests]
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        ids, result = nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(device), None
        for start in range(0, ids.shape[1], self.PREFILL_CHUNK):
            chunk = ids[:, start : start + self.PREFILL_CHUNK]
            last = (lengths - 1 - start).clamp(0, chunk.shape[1] - 1).to(device)
            logits = self.model(chunk, kv_cache=cache, padding_side="right", logits_to_keep=last[:, None]).logits[:, 0]
            cache.advance(chunk.shape[1])
            goes_on = (lengths > start).to(device)[:, None]
            result = logits if result is None else torch.where(goes_on, logits, result)
        cache.lengths.copy_(lengths)
        if not torch.isfinite(result).all():
            reasons = "the checkpoint is damaged, or --dtype is too narrow for it"
            raise UserError(f"the model's output is not finite: {reasons}")
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
            row, last = self.running.index(request), self.running.pop()
            if last is not request:
                self.cache.move_row(len(self.running), row)
                self.running[row] = last
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
