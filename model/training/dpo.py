"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) in the one training loop.

    loss = -ln sigmoid(beta (ln p(chosen) / r(chosen) - ln p(rejected) / r(rejected)))

with p the policy's probability of a whole answer and r that of the reference, a frozen copy of what the policy was at first.
trl's DPOTrainer computes it (and IPO, Azar et al. 2023, arXiv 2310.12036, of log-probabilities per token) on a stock
class of transformers that model.convert makes; steps, ranks, saving, resuming and logs are those of every other stage.

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
from model.data.dataset import IGNORED
from model.errors import UserError
from model.model import MoEGate, Transformer
from model.training import ranks
from model.training.loop import Trainer
from model.training.reports import flops_per_token
from model.training.strategy import DataParallel, checkpoint_layers

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
        self.stock.base_model.register_forward_pre_hook(self.forget_routing)
        self.stock.base_model.register_forward_hook(self.note_hidden_state)
        if self.config.use_moe:
            with torch.device("meta"):  # for their balance loss alone
                self.gates = [MoEGate(self.config) for _ in range(self.config.n_layers)]
            for layer in self.stock.base_model.layers:
                layer.block_sparse_moe.router.register_forward_hook(self.route)

    @property
    def device(self):
        return self.stock.device

    def note_hidden_state(self, module, arguments, output):
        self.last_hidden_state = output.last_hidden_state.detach()

    def forget_routing(self, module, arguments):
        self.routing = []

    def route(self, router, arguments, output):
        """Once more in float32, which MoEGate decides in whatever --dtype: else training would use other experts than chat."""
        (hidden_states,) = arguments
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits, weights, experts = router.forward(hidden_states.to(router.weight.dtype))  # [N, E], [N, k], [N, k]
        self.routing.append((logits, experts))
        return logits, weights, experts

    def forward(self, **inputs):
        """What the stock model gives for its keyword arguments."""
        return self.stock(**inputs)

    def balance_loss(self, attention_mask):
        """The MoE balance loss of the last forward pass, as a Transformer has it (0 when dense); mask [2 P, T]."""
        total = attention_mask.new_zeros((), dtype=torch.float32)
        for gate, (logits, experts) in zip(self.gates, self.routing):
            scores = logits.softmax(dim=-1).view(*attention_mask.shape, -1)
            total = total + gate.balance_loss(scores, experts.view(*attention_mask.shape, -1), attention_mask)
        return total

    def expert_load(self):
        """As Transformer.expert_load."""
        return torch.stack([gate.expert_load for gate in self.gates]) if self.gates else None


class StockModel(DataParallel):
    """Training of a Policy, whose checkpoints are those of a Transformer."""

    def prepare(self, device, dtype, settings):
        if settings.gradient_checkpointing:  # the faster kernels are a Transformer's
            checkpoint_layers(self.model.stock)

    def weights(self):
        return weights_of_stock_model(self.model.stock, self.model.config)

    def load_weights(self, weights, path):
        try:
            load_stock_weights(self.model.stock, weights, self.model.config)
        except (RuntimeError, KeyError) as error:
            problem = str(error).splitlines()[-1].strip()  # of the first tensor, below torch's heading
            raise UserError(f"{path}: {problem}; omit --resume") from None


class PreferenceLoss:
    """trl's DPOTrainer as a loss function of the loop: sum over the pairs of a micro-batch, divided by num_items.

    policy: a Policy on its device, which this freezes a copy of. settings: PreferenceSettings.
    """

    def __init__(self, policy, tokenizer, settings, out_dir, seed):
        self.policy, self.settings, device = policy, settings, policy.device
        self.reference = copy.deepcopy(policy).requires_grad_(False).eval()
        config = DPOConfig(
            output_dir=str(out_dir), beta=settings.beta, loss_type=settings.loss_type, seed=seed, report_to="none",
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
        self.sums = {training: collections.Counter() for training in (True, False)}

    def __call__(self, model, batch, num_items):
        """(loss, balance loss) of a batch of PreferenceDataset; see loop.language_model_loss."""
        pairs, labels = count_pairs(batch), batch["labels"]
        mask = batch.get("attention_mask", torch.ones_like(labels))
        loss, log_probabilities = self.preference_loss(model, batch["input_ids"], labels, mask)
        if self.settings.sft_weight:
            loss = loss + self.settings.sft_weight * chosen_loss(log_probabilities, labels)
        self.note(pairs, labels, log_probabilities)
        return loss * pairs / num_items, self.policy.balance_loss(mask)

    def preference_loss(self, model, input_ids, labels, mask):
        """trl's mean over the pairs of a batch, and ln p of the answers' tokens [2 P, T - 1], 0 at other places."""
        outputs = []

        def noted(**inputs):
            outputs.append(model(**inputs))
            return outputs[0]

        inputs = dict(input_ids=input_ids, attention_mask=mask, completion_mask=(labels != IGNORED).long())
        return self.trl.compute_loss(noted, inputs), outputs[0].log_probs

    def note(self, pairs, labels, log_probabilities):
        """Add what trl has measured on the last batch, how often the model by itself prefers the chosen answer, and the
        divergence from the reference to the sums."""
        training = self.policy.training
        measured, sums = self.trl._metrics["train" if training else "eval"], self.sums[training]
        for theirs, ours in TRL_NUMBERS.items():
            sums[ours] += measured[theirs][-1] * pairs
        measured.clear()
        chosen, rejected = log_probabilities.detach().sum(dim=1).chunk(2)
        sums["chosen_more_probable"] += int((chosen > rejected).sum())
        sums["pairs"] += pairs
        sums["tokens"] += int((labels != IGNORED).sum())
        sums["kl"] += float(self.divergence(labels))

    @torch.no_grad()
    def divergence(self, labels):
        """Sum of KL(policy || reference) of the next token over all places of the answers in the last batch, nats."""
        places, total = labels[:, 1:] != IGNORED, labels.new_zeros((), dtype=torch.float32)
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
        whole answer, accuracy of a pair and share of pairs whose chosen answer is the more probable one, KL of a token."""
        sums = self.sums[self.policy.training]
        names = [*TRL_NUMBERS.values(), "chosen_more_probable", "kl", "pairs", "tokens"]
        *totals, pairs, tokens = ranks.sum_over_ranks([sums[name] for name in names])
        sums.clear()
        means = {name: total / max(1, pairs) for name, total in zip(names, totals)}
        return {**means, "kl": totals[-1] / max(1, tokens)}

    @torch.no_grad()
    def at_start(self, batch):
        """The preference loss of a batch while policy and reference are the same, a float, and what it must be then: ln 2, or
        (1 / (2 beta))^2 for IPO. Raises UserError where it is not."""
        labels = batch["labels"]
        mask = batch.get("attention_mask", torch.ones_like(labels))
        loss = float(self.preference_loss(self.policy, batch["input_ids"], labels, mask)[0])
        expected = math.log(2) if self.settings.loss_type == "sigmoid" else 1 / (4 * self.settings.beta**2)
        if not math.isclose(loss, expected, rel_tol=1e-3):
            raise UserError(
                f"the loss before the first step is {loss:.4f}, not {expected:.4f}: policy and reference differ"
            )
        return loss, expected


def chosen_loss(log_probabilities, labels):
    """Next-token loss of the chosen answers, the mean over each answer's tokens and then over the answers (Pang et al. 2024,
    arXiv 2404.19733, eq. 2). trl's own is a mean over all tokens of a micro-batch: it would depend on how a step is split."""
    lengths = (labels[:, 1:] != IGNORED).sum(dim=1).clamp(min=1)
    per_answer = -log_probabilities.sum(dim=1) / lengths
    return per_answer[: len(per_answer) // 2].mean()


def count_pairs(batch):
    """How many pairs of a batch have an answer that is learned."""
    learned = (batch["labels"] != IGNORED).any(dim=1)
    return int(learned[: len(learned) // 2].sum())


class PreferenceTrainer(Trainer):
    """The loop on pairs; loss_function: a PreferenceLoss, model: its policy."""

    items_seen = "pairs_seen"

    @property
    def parameters_beside(self):
        """Those of the reference."""
        return sum(parameter.numel() for parameter in self.loss_function.reference.parameters())

    def measure(self, batch):
        """(pairs, rows, real tokens, 0, T): the loss is divided by pairs."""
        mask, (rows, length) = batch.get("attention_mask"), batch["labels"].shape
        pairs = count_pairs(batch)
        tokens = rows * length if mask is None else int(mask.sum())
        return pairs, 2 * pairs, tokens if pairs else 0, 0, length  # a rank without pairs only keeps step

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
