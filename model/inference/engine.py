"""An engine in which many requests share each forward pass, joining and leaving between steps (continuous batching; Yu
et al. 2022, Orca).

Shape letters: B rows, V vocabulary.
"""

import itertools
import math
import random
from collections import OrderedDict, deque
from dataclasses import dataclass

import psutil
import torch

from model.device import check_compiler
from model.errors import UserError, is_out_of_memory
from model.inference.kernels import install
from model.inference.kv_cache import KVCache
from model.inference.sampling import Sampler
from model.lora import merged_weights
from model.settings import SamplingParameters
from model.tokenizer import StreamDecoder


@dataclass
class Delta:
    """What one step added to one request: text ("" while a character or a possible stop string is incomplete), token
    ids, and on the last delta finish_reason "stop" (stop token or string), "length" (max_new_tokens or the context is
    full) or "error" (request.error says what went wrong). With SamplingParameters.logprobs: for each token id its
    log-probability and the most probable tokens with theirs, [(token, log-probability), ...]."""

    request: "Request"
    text: str
    token_ids: list
    finish_reason: str | None
    logprobs: list | None = None


class Request:
    """One prompt on its way to an answer, and the answer so far: .token_ids, .text, .finish_reason (None: not done; else
    as in Delta, or "cancelled", which has no Delta), .error (one line when that is "error"), .out_of_memory (whether it
    is for lack of memory: later there may be some)."""

    def __init__(self, prompt_ids, parameters, stop_token_ids, limit, tokenizer, adapter=None):
        self.prompt_ids, self.parameters, self.adapter = prompt_ids, parameters, adapter
        self.stop_token_ids, self.limit = stop_token_ids, limit
        self.token_ids, self.text, self.finish_reason, self.error = [], "", None, None
        self.out_of_memory = False
        self.read = self.reused = 0  # prompt tokens in the cache, and how many of them came from another request
        self.arrival = None  # its number among those that have got a row
        self.random = random.Random(parameters.seed)
        self.decoder = StreamDecoder(tokenizer) if tokenizer is not None else None
        self.held_back = ""

    @property
    def rest(self):
        """How many tokens of the prompt are to be read."""
        return len(self.prompt_ids) - self.read

    def accept(self, token, log_probability=None):
        """Take the next token, and what Sampler says of its probability; returns the Delta it causes."""
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
        logprobs = None
        if self.parameters.logprobs is not None:
            own, best = log_probability
            logprobs = [] if stopped else [(own, best[: self.parameters.logprobs])]
        return Delta(self, text, [] if stopped else [token], reason, logprobs)

    def fail(self, error, out_of_memory=False):
        """End without an answer, or in the middle of one; returns the Delta that says so."""
        self.finish_reason, self.error, self.out_of_memory = "error", error, out_of_memory
        return Delta(self, "", [], "error")

    def possible_stop(self, text):
        """Where in `text` a stop string may begin that the next tokens would complete; len(text) if nowhere."""
        stops = self.parameters.stop_strings
        starts = (start for start in range(len(text)) if any(stop.startswith(text[start:]) for stop in stops))
        return next(starts, len(text))


class Lane:
    """The requests that are answered with one adapter, in the order of their rows of the lane's cache, and what they are
    computed with. running: each has been read, and gets a token a step; reading: prompts of which more is to be read."""

    def __init__(self):
        self.running, self.reading = [], []
        self.cache = self.sampler = None

    @property
    def rows(self):
        """The requests that have a row of the cache, in the order of the rows."""
        return self.running + self.reading


def common_start(ids, others):
    """How many token ids two lists have in common at their beginning."""
    return next(
        (place for place, (one, other) in enumerate(zip(ids, others)) if one != other), min(len(ids), len(others))
    )


class Engine:
    """Runs requests through one model. add() queues a request, each step() gives every running one a token.

    Rows 0 .. n-1 of a cache belong to the n running requests, the rows behind them to those whose prompts are still being
    read; when one leaves, others move up, so that each forward pass computes no empty row. Which requests share a pass
    changes an answer in bfloat16 and float16 by their rounding only, and in float32 not at all (see
    SamplingParameters.seed). Not thread-safe: one thread owns an engine.

    Prompts are read in pieces between the steps of the running requests (chunked prefill; Agrawal et al. 2023, SARATHI,
    arXiv 2308.16369), in turn the first that came and the one of which least is left, so that a long one holds nobody up.
    What a prompt has in common with one that is in the cache, or among the last prefix_rows that were, is copied from there
    instead of being computed again.

    model: a Transformer, left in evaluation mode. tokenizer: needed for text and stop strings, not for token ids.
    max_batch: how many requests run at once; others wait their turn. max_length: most tokens of prompt and answer
    together, default config.max_seq_len: past it the model meets positions that it was never trained on. prefix_rows: how
    many requests that are done are kept for prompts that begin alike; each takes a row's memory at most. compile:
    torch.compile the decoding step, on CUDA once for each doubling of the rows in use, on a CPU only that of a single
    row: more are faster with packed weights. int8: the linear layers' weights rounded to 8 bits (see kernels.Int8Linear), for
    a bfloat16 model on a CPU. max_cache_bytes: most memory for keys and values, those of kept prefixes included, default
    what is free; requests that find none wait.

    add_adapter() gives the engine a LoRA adapter by name, and a request may ask for one. Requests that share a pass share
    the adapter; those of different ones take turns step by step, so that n adapters in use make each n times slower.
    """

    PREFILL_CHUNK = 512  # prompt tokens per forward pass, padding counted: bounds the memory of long prompts
    PREFILL_BETWEEN = 256  # the same while others are running, who wait that long
    PREFILL_MULTIPLE = 32  # pieces are padded to such lengths: the libraries keep memory for every shape they have met
    SHORTEST_PREFIX = 8  # tokens: fewer are read as quickly as copied

    def __init__(
        self, model, tokenizer=None, max_batch=16, max_length=None, compile=False, prefix_rows=0, int8=False,
        max_cache_bytes=math.inf,
    ):  # fmt: skip
        self.model, self.tokenizer, self.max_batch = install(model.eval(), int8), tokenizer, max_batch
        self.int8, self.max_cache_bytes = int8, max_cache_bytes
        self.max_length = max_length or model.config.max_seq_len
        self.lane, self.waiting = Lane(), deque()  # the lane that steps now, or did last
        self.steps, self.arrivals = 0, itertools.count()
        self.lanes = {None: self.lane}  # by adapter, the one that has not stepped for longest first
        self.prefixes, self.prefix_rows = OrderedDict(), prefix_rows  # (adapter, token ids): their keys and values
        self.compiled = None
        self.adapters = {None: {}}  # name: {matrix: its weight with the adapter}; None: as they are without one
        self.packed = {}  # (adapter, matrix): what PackedLinear has made of such a weight
        self.adapter = None  # the name of the one in use
        self.uses_graphs = model.device.type == "cuda"  # a compiled step is one CUDA graph
        if not self.has_memory_for(1):
            size, limit = self.bytes_for(1), self.max_cache_bytes
            what = f"the {limit / 1e9:,.3f} GB of --max_cache_gb" if limit < size else "is free"
            problem = f"--max_seq_len {self.max_length}: a request needs {size / 1e9:,.3f} GB, more than {what}"
            raise UserError(f"{problem}; shorten it")
        if compile:
            check_compiler(model.device)
            mode = "reduce-overhead" if self.uses_graphs else "default"
            self.compiled = torch.compile(self.model, mode=mode, dynamic=False)

    def add_adapter(self, name, adapter):
        """Keep a model.lora.Adapter under `name`, for requests that ask for it; it takes the memory of the matrices that it
        changes. Whether it was trained on these weights, model.lora.check_base tells. In half precision it is added to the
        weights as they are, rounded, where --lora adds first and rounds once. Raises UserError where it does not fit, or
        requests for an earlier one of that name are not done."""
        if name is None or self.is_wanted(name):
            raise UserError(
                f"an adapter cannot be called {name!r} now: requests for another one of that name are not done"
            )
        in_use = self.adapter
        self.use_adapter(None)
        try:
            self.adapters[name] = merged_weights(self.model, adapter)
            self.forget(name)
            for matrix in self.adapters[name]:
                self.adapters[None].setdefault(matrix, self.model.get_submodule(matrix).weight.data)
        finally:
            self.use_adapter(in_use)  # the running requests go on with it

    def use_adapter(self, name):
        """Let the model's weights be those with the adapter `name`, or without one (None)."""
        if name == self.adapter:
            return
        for matrix, weight in (self.adapters[None] | self.adapters[name]).items():
            layer = self.model.get_submodule(matrix)
            self.packed[self.adapter, matrix] = layer.take_packed()
            layer.weight.data = weight
            layer.put_packed(self.packed.get((name, matrix)))
        self.adapter = name

    def remove_adapter(self, name):
        """Forget the adapter of that name, if there is one. Raises UserError while requests for it are not done."""
        if name is None or self.is_wanted(name):
            raise UserError(f"the adapter {name!r} cannot be removed now: requests for it are not done")
        if self.adapter == name:
            self.use_adapter(None)
        self.adapters.pop(name, None)
        self.forget(name)

    def is_wanted(self, name):
        """Whether a request for the adapter of that name is not done."""
        return any(request.adapter == name for request in (*self.rows, *self.waiting))

    def forget(self, name):
        """Drop what was computed with an adapter of that name."""
        self.packed = {key: packed for key, packed in self.packed.items() if key[0] != name}
        for key in [key for key in self.prefixes if key[0] == name]:
            del self.prefixes[key]

    def add(self, prompt_ids, parameters=SamplingParameters(), adapter=None):
        """Queue a prompt (token ids), to be answered with the adapter of that name, and return its Request. Raises what
        check_prompt does, and UserError for a name that add_adapter was not given."""
        request = self.new_request(prompt_ids, parameters, adapter)
        self.enqueue(request)
        return request

    def enqueue(self, request):
        """Queue a Request that new_request has made."""
        self.waiting.append(request)

    def new_request(self, prompt_ids, parameters, adapter=None):
        """A Request that is not queued yet, or what is wrong, as add raises it. Any thread may ask: nothing is changed."""
        prompt_ids = list(prompt_ids)
        self.check_prompt(prompt_ids)
        if adapter not in self.adapters:
            names = ", ".join(sorted(name for name in self.adapters if name)) or "none"
            raise UserError(f"no adapter is called {adapter!r}; there is: {names}")
        if parameters.stop_strings and self.tokenizer is None:
            raise ValueError("stop_strings need an Engine with a tokenizer")
        stop = parameters.stop_token_ids
        stop = {self.model.config.eos_token_id} if stop is None else set(stop)
        limit = min(parameters.max_new_tokens, self.max_length - len(prompt_ids))
        return Request(prompt_ids, parameters, stop, limit, self.tokenizer, adapter)

    def check_prompt(self, prompt_ids):
        """Raise UserError for an empty prompt, ids outside the vocabulary, or a prompt that fills the whole context."""
        vocab_size = self.model.config.vocab_size
        if not prompt_ids:
            raise UserError("the prompt is empty: give the model at least one token to go on from", exit_code=2)
        if not 0 <= min(prompt_ids) <= max(prompt_ids) < vocab_size:
            raise UserError(f"the prompt has token ids outside 0..{vocab_size - 1}: tokenizer and model do not match")
        if len(prompt_ids) >= self.max_length:
            problem = f"the prompt has {len(prompt_ids)} tokens but the context only {self.max_length}"
            raise UserError(f"{problem}: shorten it, or raise --max_seq_len with --rope_scaling yarn")

    @property
    def description(self):
        """One line for the user: size of the model, number format, device, context."""
        weight, count = self.model.tok_embeddings.weight, sum(part.numel() for part in self.model.parameters())
        dtype = "int8" if self.int8 else str(weight.dtype).removeprefix("torch.")
        return f"{count:,} parameters, {dtype} on {weight.device}, context {self.max_length} tokens"

    @property
    def rows(self):
        """The requests that are running or being read, of whatever adapter."""
        return [request for lane in self.lanes.values() for request in lane.rows]

    @property
    def has_work(self):
        """True while any request is running, being read or waiting."""
        return bool(self.rows or self.waiting)

    def cancel(self, request):
        """End a request, waiting or running, with finish_reason "cancelled"; one that is done stays as it is."""
        if request.finish_reason is None:
            if request in self.waiting:
                self.waiting.remove(request)
            else:
                self.release([request], self.lanes[request.adapter])
            request.finish_reason = "cancelled"

    def abandon(self):
        """Forget all requests, and the cache, which an exception may have left in any state; ends none of them."""
        self.lane = Lane()
        self.lanes = {self.adapter: self.lane}
        self.waiting.clear()
        self.prefixes.clear()

    @torch.inference_mode()
    def step(self):
        """One token for every running request of one adapter and one piece of its prompts that are being read, waiting ones
        admitted first; returns a list of Delta.

        A request for which memory runs out while its prompt is read, or whose logits are not finite, ends with an "error"
        and the others go on as if it had never been there. Any other exception is raised; it ends those whose prompts
        were being read, while the running ones could go on.
        """
        lane = self.take_turn()
        older, logits, deltas = len(lane.running), [], []
        admitted, pieces = self.admissible(), []  # (request, how many tokens of its prompt are read now)
        try:
            self.admit(admitted)
            pieces = self.next_pieces()
            if pieces:
                logits.append(self.prefill(pieces))
        except Exception as error:
            deltas, pieces = self.reject([request for request, _ in pieces] or admitted, error), []
            if not is_out_of_memory(error):
                raise
        done = [request for request, count in pieces if count == request.rest]
        if logits:
            logits[0] = logits[0][: len(done)]  # of the last piece, which is not the prompt's end, there is no use
        if older:
            logits.insert(0, self.decode(older))
        running, tokens = lane.running + done, []
        sampler = lane.sampler
        if running:
            if sampler is None or done:
                sampler = self.new_sampler(running)
            uniforms = [1.0 - request.random.random() for request in running]
            tokens = sampler.pick(logits[0] if len(logits) == 1 else torch.cat(logits), uniforms)

        # Only now that nothing can fail any more are the pieces read, and have the others one token more.
        for request, count in pieces:
            request.read += count
        lane.running, lane.reading, lane.sampler = running, lane.reading[len(done) :], sampler
        if older:
            lane.cache.rows(0, older).advance(1)
        damaged = "the model's output is not finite: the checkpoint is damaged, or --dtype is too narrow for it"
        probabilities = sampler.log_probabilities if running and sampler.log_probabilities else [None] * len(running)
        deltas += [
            request.fail(damaged) if token < 0 else request.accept(token, probability)
            for request, token, probability in zip(running, tokens, probabilities)
        ]
        self.release([request for request in running if request.finish_reason], lane)
        return deltas

    def take_turn(self):
        """Make self.lane that of the adapter whose turn it is, among those with rows or with requests that are to get some;
        what other lanes hold is let go. Returns it."""
        self.steps += 1
        names = dict.fromkeys(request.adapter for request in (*self.rows, *self.next_waiting()))
        if names:
            lanes = {name: lane for name, lane in self.lanes.items() if name in names}
            lanes |= {name: Lane() for name in names if name not in lanes}
            name = next(iter(lanes))
            self.lane = lanes.pop(name)
            self.lanes = {**lanes, name: self.lane}
            self.use_adapter(name)
        return self.lane

    def next_waiting(self):
        """The waiting requests, in the order they came, of which no more run than max_batch."""
        return list(itertools.islice(self.waiting, self.max_batch - len(self.rows)))

    def admissible(self):
        """Those of them that are this lane's, and for which there is memory."""
        nobody = not self.rows
        admitted = [request for request in self.next_waiting() if request.adapter == self.adapter]
        while len(admitted) > nobody and not self.fits(len(self.lane.rows) + len(admitted)):
            admitted.pop()  # it waits until others have left
        return admitted

    def admit(self, requests):
        """Give waiting requests rows behind all others of the lane. Raises what reserve_rows does."""
        lane = self.lane
        self.reserve_rows(len(lane.rows) + len(requests))
        for request in requests:
            self.waiting.remove(request)
            request.arrival = next(self.arrivals)
        lane.reading += requests
        if requests:
            lane.cache.lengths[len(lane.rows) - len(requests) :] = 0
        for request in requests:  # now, so that next_pieces knows who has little left
            self.reuse(request)

    def next_pieces(self):
        """[(request, tokens), ...] of the prompts to be read now, which get the first rows behind the running ones: whole rests
        of prompts as long as they stay within the limit together with their padding, and of a longer first one what the limit
        allows."""
        limit, pieces = self.PREFILL_BETWEEN if self.lane.running else self.PREFILL_CHUNK, []
        # Every other step the shortest first: a short one never waits for several long ones.
        first = (lambda request: request.rest) if self.steps % 2 else (lambda request: request.arrival)
        for request in sorted(self.lane.reading, key=first):
            rest = self.reuse(request)
            longest = max([rest, *(count for _, count in pieces)])
            if pieces and ((len(pieces) + 1) * self.padded(longest) > limit or self.same_start(request, pieces)):
                break
            pieces.append((request, min(rest, limit)))
            if rest > limit:
                break
        for place, (request, _) in enumerate(pieces):
            self.exchange(place, self.lane.reading.index(request))
        return pieces

    def padded(self, count):
        """Length at which a piece of `count` tokens is read."""
        return -(-count // self.PREFILL_MULTIPLE) * self.PREFILL_MULTIPLE

    def exchange(self, place, other):
        """Let two of the lane's prompts that are being read change places."""
        if place != other:
            lane, first = self.lane, len(self.lane.running)
            lane.reading[place], lane.reading[other] = lane.reading[other], lane.reading[place]
            lane.cache.swap_rows(first + place, first + other)

    def reuse(self, request):
        """Copy what the prompt of `request` has in common with what the cache holds or held, if that is more than has been
        read; returns how many tokens are left to read, at least the last one."""
        lane = self.lane
        row, best = lane.rows.index(request), (request.read + self.SHORTEST_PREFIX, None)
        there = {other: self.held(lane, other) for other in range(len(lane.rows)) if other != row}
        there |= {key: key[1] for key in self.prefixes if key[0] == request.adapter}
        for key, ids in there.items():
            best = max(best, (common_start(request.prompt_ids[:-1], ids), key), key=lambda found: found[0])
        count, source = best
        if source is not None:
            if isinstance(source, tuple):
                self.prefixes.move_to_end(source)
                lane.cache.load_row(row, self.prefixes[source], count)
            else:
                lane.cache.copy_row(source, row, count)
            request.reused += count - request.read
            request.read = count
        return request.rest

    def held(self, lane, row):
        """The token ids whose keys and values are in a row of a lane's cache."""
        request = lane.rows[row]
        return (request.prompt_ids + request.token_ids)[: int(lane.cache.lengths[row])]

    def same_start(self, request, pieces):
        """Whether one of `pieces` reads what `request` could copy when it is read."""
        return any(
            common_start(request.prompt_ids[:-1], other.prompt_ids[: other.read + count])
            >= request.read + self.SHORTEST_PREFIX
            for other, count in pieces
        )

    def reject(self, requests, error):
        """Take `requests` from the queue, or from the lane, because of the exception `error`; returns their Deltas."""
        reason = f"{type(error).__name__}: {error}"
        if is_out_of_memory(error):
            count = f"{len(requests)} more requests" if len(requests) > 1 else "one more request"
            reason = (
                f"no memory for {count} of up to {self.max_length} tokens: ask fewer at once, or shorten --max_seq_len"
            )
        deltas = [request.fail(reason, is_out_of_memory(error)) for request in requests]
        for request in requests:
            if request in self.waiting:
                self.waiting.remove(request)
            else:
                self.release([request], self.lane)
        return deltas

    def new_sampler(self, requests):
        """A Sampler of the rows of `requests`."""
        histories = [request.prompt_ids + request.token_ids for request in requests]
        parameters = [request.parameters for request in requests]
        answers = [request.token_ids for request in requests]
        return Sampler(parameters, histories, self.model.config.vocab_size, self.model.device, answers)

    def decode(self, rows):
        """Feed the lane's first `rows` running requests their last token; logits [rows, V] of the next."""
        last = [[request.token_ids[-1]] for request in self.lane.running[:rows]]
        cache, device = self.lane.cache.rows(0, rows), self.model.device
        if self.compiled is None or (rows > 1 and not self.uses_graphs):
            return self.model(torch.tensor(last, device=device), kv_cache=cache).logits[:, -1]
        if self.uses_graphs:  # all rows of the cache, also the unused ones: their number is part of what was compiled
            cache = self.lane.cache
        last = torch.tensor(last + [[0]] * (cache.batch - rows), device=device)
        with cache.with_fixed_shapes():
            return self.compiled(last, kv_cache=cache).logits[:rows, -1]

    def prefill(self, pieces):
        """Run `pieces` of prompts, [(request, tokens), ...] from next_pieces, through the model together, in the rows behind
        the running ones; logits [B, V] of what follows each piece."""
        first, device = len(self.lane.running), self.model.device
        cache = self.lane.cache.rows(first, first + len(pieces))
        cache.lengths.copy_(torch.tensor([request.read for request, _ in pieces]))
        room = self.max_length - int(cache.lengths.max())  # behind the longest: padding must fit too
        length = min(self.padded(max(count for _, count in pieces)), room)
        ids = torch.zeros(len(pieces), length, dtype=torch.long)
        for row, (request, count) in zip(ids, pieces):
            row[:count] = torch.tensor(request.prompt_ids[request.read : request.read + count])
        last = torch.tensor([[count - 1] for _, count in pieces], device=device)
        logits = self.model(ids.to(device), kv_cache=cache, padding_side="right", logits_to_keep=last).logits[:, 0]
        cache.advance([count for _, count in pieces])
        return logits

    def fits(self, rows):
        """Whether the lane's cache holds so many rows, or could."""
        cache = self.lane.cache
        return (cache is not None and cache.batch >= rows) or self.has_memory_for(rows)

    def has_memory_for(self, rows):
        """Whether the lane can hold a cache of so many rows. Linux grants more than it has and ends the process later."""
        device = self.model.device
        on_gpu = device.type == "cuda"
        free = torch.cuda.mem_get_info(device)[1] if on_gpu else psutil.virtual_memory().available
        return self.bytes_for(rows) <= min(free, self.max_cache_bytes - self.bytes_of_others())

    def bytes_for(self, rows):
        """Size of a cache of so many rows."""
        return KVCache.bytes_needed(self.model.config, rows, self.max_length, self.model.dtype)

    def prefix_bytes(self, ids):
        """Size of what is kept of so many token ids."""
        return self.bytes_for(1) * len(ids) // self.max_length

    def bytes_of_others(self):
        """Size of the other lanes' caches."""
        caches = (lane.cache for lane in self.lanes.values() if lane is not self.lane)
        return sum(self.bytes_for(cache.batch) for cache in caches if cache is not None)

    def reserve_rows(self, rows):
        """Make the lane's cache hold at least `rows` rows; the number doubles, so a single request pays for one row only.
        Raises MemoryError, or torch's own error, and then leaves the rows as they were."""
        lane = self.lane
        if rows == 0 or (lane.cache is not None and lane.cache.batch >= rows):
            return
        batch = min(self.max_batch, max(rows, 2 * lane.cache.batch if lane.cache else 1))
        if not self.has_memory_for(batch):
            batch = rows
        if not self.has_memory_for(batch):
            raise MemoryError
        self.trim_prefixes(self.bytes_for(batch))
        if lane.cache is None:
            config, dtype = self.model.config, self.model.dtype
            lane.cache = KVCache(config, batch, self.max_length, dtype, self.model.device)
        else:
            lane.cache.grow(batch)
        if self.compiled is not None and self.uses_graphs:  # it writes into these very tensors; others would be copied
            for storage in (*lane.cache.keys, *lane.cache.values):
                torch._dynamo.mark_static_address(storage)

    @torch.inference_mode()
    def release(self, requests, lane):
        """Free the rows of `requests` in a lane; rows behind them move up."""
        for request in requests:
            row = lane.rows.index(request)
            if request.finish_reason == "error":
                lane.cache.clear_row(row)
            elif self.prefix_rows:
                self.keep(request, lane, row)
            if request in lane.running:
                last = lane.running.pop()
                if last is not request:
                    lane.cache.move_row(len(lane.running), row)
                    lane.running[row] = last
                row, lane.sampler = len(lane.running), None
            else:
                lane.reading.remove(request)
            for place in range(row, len(lane.rows)):  # those being read stay in their order
                lane.cache.move_row(place + 1, place)

    def keep(self, request, lane, row):
        """Keep what the lane's cache holds of `request` for prompts that begin alike, in place of what that goes on from."""
        ids = tuple(self.held(lane, row))
        for key in [key for key in self.prefixes if key[0] == request.adapter and ids[: len(key[1])] == key[1]]:
            del self.prefixes[key]
        if self.trim_prefixes(self.bytes_for(lane.cache.batch), self.prefix_bytes(ids)):
            self.prefixes[request.adapter, ids] = lane.cache.save_row(row, len(ids))

    def trim_prefixes(self, cache, new=0):
        """Forget kept prefixes, those not used for longest first, until this lane's cache may have `cache` bytes and, with new
        bytes, one more is neither too many nor too large; whether that is so."""
        sizes = deque(self.prefix_bytes(ids) for _, ids in self.prefixes)
        room, most = self.max_cache_bytes - self.bytes_of_others() - cache - new, self.prefix_rows - (new > 0)
        while sizes and (len(sizes) > most or sum(sizes) > room):
            self.prefixes.popitem(last=False)
            sizes.popleft()
        return room >= 0

    def stream(self, prompt_ids, parameters=SamplingParameters(), adapter=None):
        """Yield the Deltas of one prompt; their texts join to the answer. Closing the iterator cancels the request."""
        request = self.add(prompt_ids, parameters, adapter)
        try:
            while request.finish_reason is None:
                yield from (delta for delta in self.step() if delta.request is request)
        finally:
            self.cancel(request)

    def generate(self, prompts, parameters=SamplingParameters(), on_finish=None, adapter=None):
        """Complete a list of prompts (lists of token ids); returns their Requests in the same order, all of them done:
        look at finish_reason. Raises what check_prompt does, for any of them before the first one runs.

        parameters: one for all, or a list with one each. on_finish(request) is called as each one ends by itself. adapter:
        the name of the one that they are answered with.
        """
        each = [parameters] * len(prompts) if isinstance(parameters, SamplingParameters) else parameters
        requests = [self.new_request(prompt, wanted, adapter) for prompt, wanted in zip(prompts, each, strict=True)]
        # Neighbours in length share a prefill, so that little of it is padding.
        self.waiting.extend(sorted(requests, key=lambda request: len(request.prompt_ids)))
        try:
            while any(request.finish_reason is None for request in requests):
                for delta in self.step():
                    if delta.finish_reason and on_finish is not None:
                        on_finish(delta.request)
        finally:
            for request in requests:
                self.cancel(request)
        return requests
