"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) in the one training loop.

    loss = -ln sigmoid(beta (ln p(chosen) / r(chosen) - ln p(rejected) / r(rejected)))

with p the policy's probability of a whole answer and r that of the reference, a frozen copy of what the policy was at first.
trl's DPOTrainer computes it (and IPO, Azar et al. 2023, arXiv 2310.12036) on a stock class of transformers that
model.convert makes; steps, ranks, saving, resuming and logs are those of every other stage.

Shape letters: P pairs, T tokens, E experts, k experts a token, N = 2 P * T.
"""

import collections
import copy
import math
import warnings

import datasets
import torch
from torch import nn
from trl import DPOConfig, DPOTrainer

from model.convert import load_stock_weights, stock_model, weights_of_stock_model
from model.errors import UserError
from model.model import MoEGate, Transformer
from model.training import ranks
from model.training.loop import Trainer
from model.training.reports import flops_per_token
from model.training.strategy import DataParallel

# What trl measures on a batch -> its name in our log.
TRL_NUMBERS = {
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "reward_accuracy",
    "logps/chosen": "log_probability_chosen",
    "logps/rejected": "log_probability_rejected",
}
KL_ROWS = 1024  # tokens whose distributions are held at once
# trl calls what transformers has renamed.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")


class Policy(nn.Module):
    """The stock model of transformers that computes what `model`, a Transformer, does, with what the loop asks of a model.

    config: the LMConfig. last_hidden_state [2 P, T, C]: what the output matrix saw in the last forward pass, without gradient.
    """

    def __init__(self, model):
        super().__init__()
        self.config = model.config
        try:
            self.stock = stock_model(model)
        except ValueError as error:
            raise UserError(f"--init_from: {error}; DPO needs a stock class") from None
        self.last_hidden_state, self.routing, self.gates = None, [], []
        self.stock.base_model.register_forward_hook(self.note_hidden_state)
        if self.config.use_moe:
            with torch.device("meta"):  # for their balance loss alone
                self.gates = [MoEGate(self.config) for _ in range(self.config.n_layers)]
            for layer in self.stock.base_model.layers:
                layer.block_sparse_moe.router.register_forward_hook(self.note_routing)

    @property
    def device(self):
        return self.stock.device

    def note_hidden_state(self, module, arguments, output):
        self.last_hidden_state = output.last_hidden_state.detach()

    def note_routing(self, module, arguments, output):
        self.routing.append((output[0], output[2]))  # logits [N, E], experts [N, k]

    def forward(self, **inputs):
        """What the stock model gives for its keyword arguments."""
        self.routing = []
        return self.stock(**inputs)

    def balance_loss(self, attention_mask):
        """The MoE balance loss of the last forward pass, as a Transformer has it (0 when dense); mask [2 P, T]."""
        total = attention_mask.new_zeros((), dtype=torch.float32)
        for gate, (logits, experts) in zip(self.gates, self.routing):
            scores = logits.float().softmax(dim=-1).view(*attention_mask.shape, -1)
            total = total + gate.balance_loss(scores, experts.view(*attention_mask.shape, -1), attention_mask)
        return total

    def expert_load(self):
        """As Transformer.expert_load."""
        return torch.stack([gate.expert_load for gate in self.gates]).mean(dim=0) if self.gates else None


class StockModel(DataParallel):
    """Training of a Policy, whose checkpoints are those of a Transformer."""

    def prepare(self, device, dtype, compile):
        pass  # the faster kernels are a Transformer's

    def weights(self):
        return weights_of_stock_model(self.model.stock, self.model.config)

    def load_weights(self, weights, path):
        try:
            load_stock_weights(self.model.stock, weights, self.model.config)
        except (RuntimeError, KeyError) as error:
            raise UserError(f"{path}: {str(error).splitlines()[0]}; omit --resume") from None


class PreferenceLoss:
    """trl's DPOTrainer as a loss function of the loop: sum over the pairs of a micro-batch, divided by num_items.

    policy: a Policy on its device, which this freezes a copy of. settings: PreferenceSettings.
    """

    def __init__(self, policy, tokenizer, settings, out_dir, seed):
        self.policy, self.settings, device = policy, settings, policy.device
        self.reference = copy.deepcopy(policy).requires_grad_(False).eval()
        types, weights = [settings.loss_type], [1.0]
        if settings.sft_weight:
            types, weights = [*types, "sft"], [*weights, settings.sft_weight]
        config = DPOConfig(
            output_dir=str(out_dir), beta=settings.beta, loss_type=types, loss_weights=weights, seed=seed, report_to="none",
            use_cpu=device.type == "cpu", bf16=False, gradient_checkpointing=False, disable_tqdm=True,
            router_aux_loss_coef=0.0,  # ours, which is another formula, is added
        )  # fmt: skip
        if device.type == "cuda":
            config._n_gpu = 1  # trl refuses to start where it sees several and no launcher
        datasets.disable_progress_bars()
        unused = datasets.Dataset.from_list([{"prompt": "a\n", "chosen": "b", "rejected": "c"}])  # it wants one
        self.trl = DPOTrainer(
            policy.stock, self.reference.stock, config, train_dataset=unused, processing_class=tokenizer
        )
        policy.to(device), self.reference.to(device)  # back from where trl's own choice of a device has put them
        if ranks.world_size() > 1:  # the loop adds up over ranks; here they may have different numbers of pairs
            self.trl.accelerator.gather = self.trl.accelerator.gather_for_metrics = lambda tensor: tensor
        self.sums = {
            True: collections.Counter(),
            False: collections.Counter(),
        }  # by whether the policy is being trained

    def __call__(self, model, batch, num_items):
        """(loss, balance loss) of a batch of PreferenceDataset; see loop.language_model_loss."""
        labels, pairs = batch["labels"], count_pairs(batch)
        mask = batch.get("attention_mask", torch.ones_like(labels))
        answers = (labels != -100).long()
        if not pairs:  # a rank without rows keeps step; its loss must be a number before it is multiplied by zero
            answers[:, 1:] = 1
        loss = self.trl.compute_loss(
            model, dict(input_ids=batch["input_ids"], attention_mask=mask, completion_mask=answers)
        )
        self.note(pairs, labels)
        return loss * pairs / num_items, self.policy.balance_loss(mask)

    def note(self, pairs, labels):
        """Add what trl has measured on the last batch, and the divergence from the reference, to the sums."""
        training = self.policy.training
        measured, sums = self.trl._metrics["train" if training else "eval"], self.sums[training]
        for theirs, ours in TRL_NUMBERS.items():
            sums[ours] += measured[theirs][-1] * pairs
        measured.clear()
        sums["pairs"] += pairs
        sums["tokens"] += int((labels != -100).sum())
        sums["kl"] += float(self.divergence(labels))

    @torch.no_grad()
    def divergence(self, labels):
        """Sum of KL(policy || reference) of the next token over all places of the answers in the last batch, nats."""
        places, total = labels[:, 1:] != -100, labels.new_zeros((), dtype=torch.float32)
        models = self.policy, self.reference
        states = [model.last_hidden_state[:, :-1][places].split(KL_ROWS) for model in models]
        for parts in zip(*states):
            policy, reference = (
                model.stock.lm_head(part).float().log_softmax(dim=-1) for model, part in zip(models, parts)
            )
            total += (policy.exp() * (policy - reference)).sum()
        return total

    def take_numbers(self):
        """{name: mean over the batches since the last call} over all ranks: rewards, margin and log-probabilities of a
        whole answer, accuracy of a pair, KL of a token."""
        sums = self.sums[self.policy.training]
        names = [*TRL_NUMBERS.values(), "kl", "pairs", "tokens"]
        *totals, pairs, tokens = ranks.sum_over_ranks([sums[name] for name in names])
        sums.clear()
        means = {name: total / max(1, pairs) for name, total in zip(names, totals)}
        return {**means, "kl": totals[-1] / max(1, tokens)}

    @torch.no_grad()
    def at_start(self, batch):
        """The preference loss of a batch while policy and reference are the same, without the sft term, a float, and what it
        must be then: ln 2, or (1 / (2 beta))^2 for IPO. Raises UserError where it is not."""
        types, weights = self.trl.loss_types, self.trl.loss_weights
        self.trl.loss_types, self.trl.loss_weights = types[:1], weights[:1]
        loss = float(self(self.policy, batch, 1)[0]) / count_pairs(batch)
        self.trl.loss_types, self.trl.loss_weights = types, weights
        self.sums[self.policy.training].clear()
        expected = math.log(2) if types[0] == "sigmoid" else 1 / (4 * self.settings.beta**2)
        if not math.isclose(loss, expected, rel_tol=1e-3):
            raise UserError(
                f"the loss before the first step is {loss:.4f}, not {expected:.4f}: policy and reference differ"
            )
        return loss, expected


def count_pairs(batch):
    """How many pairs of a batch have an answer that is learned."""
    learned = (batch["labels"] != -100).any(dim=1)
    return int(learned[: len(learned) // 2].sum())


class PreferenceTrainer(Trainer):
    """The loop on pairs; loss_function: a PreferenceLoss, model: its policy."""

    items_seen = "pairs_seen"

    def measure(self, batch):
        """(pairs, rows, real tokens, 0, T): the loss is divided by pairs."""
        mask, (rows, length) = batch.get("attention_mask"), batch["labels"].shape
        pairs = count_pairs(batch)
        return pairs, 2 * pairs, rows * length if mask is None else int(mask.sum()), 0, length

    def further_numbers(self):
        return self.loss_function.take_numbers()

    def loss_at_start(self):
        """PreferenceLoss.at_start on the first pairs."""
        rows = range(min(len(self.train_loader.dataset), self.settings.batch_size))
        return self.loss_function.at_start(self.to_device(self.train_loader.dataset[list(rows)]))

    def flops_per_token(self, length):
        """Forward and backward of the policy, which are three forwards, and the reference's forward."""
        with torch.device("meta"):
            return flops_per_token(Transformer(self.model.config), length) * 4 / 3
