"""How a token is picked from the logits of a batch whose rows each have parameters of their own."""

import torch

from model.settings import SamplingParameters as SamplingParameters  # for those who import it from here


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
