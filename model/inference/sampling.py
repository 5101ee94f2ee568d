"""How a token is picked from the logits of a batch whose rows each have parameters of their own."""

import torch

from model.settings import SamplingParameters as SamplingParameters  # for those who import it from here

COLDEST = 1e-5  # a lower temperature picks what greedy decoding picks, and dividing by it would overflow


class Sampler:
    """The sampling parameters of the rows of a batch as tensors: what is the same in every step is prepared once."""

    def __init__(self, parameters, histories, vocab_size, device, answers=None):
        """parameters: a SamplingParameters per row; histories: the token ids each row has seen, prompt and answer; answers:
        those of the answer alone (default: none yet)."""
        self.precise = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64

        def column(name, dtype=torch.float32):
            values = [[float(getattr(row, name))] for row in parameters]
            return torch.tensor(values, dtype=dtype, device=device)

        greedy = [row.temperature < COLDEST for row in parameters]
        self.all_greedy, self.greedy = all(greedy), torch.tensor(greedy, device=device)
        self.temperature = column("temperature").masked_fill(self.greedy[:, None], 1.0)
        limits = [min(row.top_k or vocab_size, vocab_size) for row in parameters]
        sampled = [limit for limit, cold in zip(limits, greedy) if not cold] or [vocab_size]
        self.largest_k, self.top_k = max(sampled), torch.tensor(limits, device=device)[:, None].clamp(max=max(sampled))
        self.top_p = column("top_p", self.precise) if any(row.top_p < 1 for row in parameters) else None
        self.everything = min(sampled) == vocab_size and self.top_p is None
        self.penalty = self.seen = None
        if any(row.repetition_penalty != 1 for row in parameters):
            self.penalty = column("repetition_penalty")
            self.seen = torch.zeros(len(parameters), vocab_size, dtype=torch.bool, device=device)
            for seen, history in zip(self.seen, histories):
                seen[torch.tensor(history, dtype=torch.long, device=device)] = True
        self.counts = None
        if any(row.presence_penalty or row.frequency_penalty for row in parameters):
            self.presence, self.frequency = column("presence_penalty"), column("frequency_penalty")
            ids = [torch.tensor(answer, dtype=torch.long) for answer in answers or [[]] * len(parameters)]
            counts = [torch.bincount(answer, minlength=vocab_size) for answer in ids]
            self.counts = torch.stack(counts).to(device, torch.float32)
        self.log_probabilities = None  # of the last pick, where a row asks for them
        wanted = [row.logprobs for row in parameters]
        self.most_probable = max((count for count in wanted if count is not None), default=None)

    def penalise(self, logits):
        """Apply the repetition, presence and frequency penalties to logits [B, V]."""
        if self.penalty is not None:
            smaller = torch.where(logits > 0, logits / self.penalty, logits * self.penalty)
            logits = torch.where(self.seen, smaller, logits)
        if self.counts is not None:
            logits = logits - self.frequency * self.counts - self.presence * (self.counts > 0)
        return logits

    def distribution(self, logits):
        """Penalised logits [B, V] -> probabilities [B, V], exactly 0 where excluded."""
        scaled = logits / self.temperature
        if not self.everything:
            scaled = scaled.masked_fill(~self.kept(scaled), float("-inf"))
        return scaled.softmax(dim=-1)

    def kept(self, scaled):
        """bool [B, V]: the top_k largest of each row of `scaled` [B, V], of them the nucleus; of equals the first.

        Decided by the values alone, not by an order in which a sort leaves equals: that depends on the other rows.
        """
        largest = scaled.topk(self.largest_k, dim=-1).values
        count = self.top_k
        if self.top_p is not None:
            behind = torch.arange(self.largest_k, device=scaled.device) >= self.top_k
            probabilities = largest.to(self.precise).masked_fill(behind, float("-inf")).softmax(dim=-1)
            before = probabilities.cumsum(dim=-1) - probabilities
            count = ((before < self.top_p) & ~behind).sum(dim=-1, keepdim=True).clamp(min=1)
        smallest = largest.gather(1, count - 1)
        above, equal = scaled > smallest, scaled == smallest
        return above | equal & (equal.cumsum(dim=-1) <= count - above.sum(dim=-1, keepdim=True))

    def invert(self, probabilities, uniforms):
        """The first token [B] at which the cumulative sum of probabilities [B, V], in the vocabulary's own order, reaches
        that share uniforms [B, 1] of it, among those that are not 0: whatever rounding does to the sum (on a GPU it need
        not even grow from token to token), an excluded token never comes out.
        """
        possible, cumulative = probabilities > 0, probabilities.cumsum(dim=-1, dtype=self.precise)
        total = cumulative.masked_fill(~possible, 0.0).amax(dim=-1, keepdim=True)
        return (possible & (cumulative >= uniforms * total)).to(torch.uint8).argmax(dim=-1)

    def pick(self, logits, uniforms):
        """The next token of each row (list [B]) from logits [B, V] and one number in (0, 1] per row (list [B]); -1 for a
        row whose logits are not finite.

        A row's token depends on its own logits, parameters and number alone.
        """
        raw = logits.float()
        logits = self.penalise(raw)
        largest, chosen = logits.max(dim=-1)  # NaN counts as the largest
        if not self.all_greedy:
            uniforms = torch.tensor(uniforms, dtype=self.precise, device=logits.device)[:, None]
            chosen = torch.where(self.greedy, chosen, self.invert(self.distribution(logits), uniforms))
        if self.seen is not None:
            self.seen.scatter_(1, chosen[:, None], True)
        if self.counts is not None:
            self.counts.scatter_add_(1, chosen[:, None], torch.ones_like(chosen[:, None], dtype=torch.float32))
        if self.most_probable is not None:
            self.note_log_probabilities(raw, chosen)
        return chosen.masked_fill(~largest.isfinite(), -1).tolist()

    def note_log_probabilities(self, logits, chosen):
        """Put (log-probability, [(token, log-probability), ...] of the most probable ones, in their order) of the token
        `chosen` [B] in each row of the unpenalised logits [B, V] into self.log_probabilities, a list [B]."""
        distribution = logits.log_softmax(dim=-1)
        own = distribution.gather(1, chosen[:, None])[:, 0].tolist()
        best = distribution.topk(max(1, self.most_probable), dim=-1)
        pairs = [list(zip(*row)) for row in zip(best.indices.tolist(), best.values.tolist())]
        self.log_probabilities = list(zip(own, pairs))
