"""What training costs: memory of a rank, network, hours; by formula where no run is at hand, counted where there is one.

Weights, gradients and optimizer state follow from the number of parameters. What the forward pass leaves behind for the
backward pass is counted: it runs on few tokens, and all that autograd keeps is added up. Left out: what a kernel needs for
a moment, and fragmentation.
"""

import math

import torch

from model.device import autocast
from model.LMConfig import PRESETS, LMConfig, preset_config
from model.model import Transformer
from model.training import cpu_kernels
from model.training.optimizer import is_hidden_matrix
from model.training.reports import flops_per_token, whole_size

FLOAT, HALF = 4, 2  # bytes
TOKENS = 53  # of the count
BEST_TOKENS = 20  # for each parameter, where the sum of computing is given (Hoffmann et al. 2022, arXiv 2203.15556)
# Epochs after which data that is seen again has lost all but 1/e of its worth (Muennighoff et al. 2023, arXiv 2305.16264:
# R_D* of eq. 5, the fit of section 6).
REPEATED_EPOCHS = 15.39


def kept_for_backward(function):
    """Bytes that autograd keeps of what function(rows) computes for each of its rows: those of two rows less those of one, for
    weights, and their copies in 16 bits, are there once."""
    sizes = []
    for rows in (1, 2):
        kept = {}

        def keep(tensor, kept=kept):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage  # held, so that no address comes twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = function(rows)
            sizes.append(sum(storage.nbytes() for storage in kept.values()))
        del output
    return sizes[1] - sizes[0]


def bytes_per_token(config, length=TOKENS, dtype=torch.bfloat16, prepare=None):
    """(of one block, of embedding, last norm and loss) that autograd keeps for each token of a row of `length`, in autocast to
    `dtype`. prepare(model): installs in it what training does (default: what it does on a GPU, not compiled)."""
    model, vocabulary = Transformer(LMConfig(**{**config.to_dict(), "n_layers": 1})).train(), config.vocab_size
    if prepare:
        prepare(model)
    else:
        cpu_kernels.install(model, torch.device("cuda"), dtype, compile=False)
    rotary = model.rotary_table(length, model.device)[:, None]

    def block(rows):
        return model.layers[0](torch.randn(rows, length, config.dim, requires_grad=True), rotary, None, None, None)

    def whole(rows):
        ids = (torch.arange(length) % vocabulary).repeat(rows, 1)
        return model(ids, labels=ids, return_logits=False).loss

    with autocast(model.device, dtype):
        block, whole = kept_for_backward(block) / length, kept_for_backward(whole) / length
    return block, max(0, whole - block)


def activations(config, tokens, **options):
    """{"blocks", "ends", "inputs", "block"}: bytes that `tokens` tokens leave behind for the backward pass in all blocks and
    outside of them; of the first with gradient checkpointing no more than what goes into each block, and what is kept of
    the one that is computed again. options: bytes_per_token's."""
    block, ends = bytes_per_token(config, **options)
    layers = config.n_layers
    return dict(
        blocks=tokens * layers * block,
        ends=tokens * ends,
        inputs=tokens * layers * FLOAT * config.dim,
        block=tokens * block,
    )


def of_the_loss(config, tokens, chunk):
    """Bytes that cross-entropy needs for a moment: gradients of the logits of all `tokens`, or of a `chunk` of them, three
    times, and the embedding's gradient twice (see cpu_kernels.ChunkedCrossEntropy)."""
    if chunk is None:
        return FLOAT * tokens * config.vocab_size
    return FLOAT * config.vocab_size * (3 * min(chunk, tokens) + 2 * config.dim)


def peak(held, kept, loss, checkpointing, accumulating):
    """Most bytes at once in a step: at the end of the forward pass, or of the backward one. held: of memory(); kept: of
    activations(); loss: of of_the_loss(). accumulating: there are gradients of an earlier pass of the same step."""
    forward = held["copies"] + loss + kept["ends"] + (kept["inputs"] if checkpointing else kept["blocks"])
    forward += held["gradients"] * accumulating
    backward = held["gradients"] + (kept["inputs"] + kept["block"] if checkpointing else 0)
    return held["weights"] + held["optimizer"] + held.get("beside", 0) + max(forward, backward)


def memory(parameters, block, processes, stage, trained=None, optimizer=None, copies=HALF):
    """{what: bytes on each rank} with ZeRO stage 0 to 3 (Rajbhandari et al. 2020, arXiv 1910.02054, section 3), everything in
    float32: `parameters` in all, `block` of them in the largest piece that ZeRO 3 brings together, `trained` of them with
    a gradient (default: all), `optimizer` bytes of its state (default: AdamW's two moments). copies: bytes of a weight's
    copy for the products, 0 where they are float32 too."""
    trained = parameters if trained is None else trained
    optimizer = 2 * FLOAT * trained if optimizer is None else optimizer
    held = dict(weights=FLOAT * parameters, copies=copies * parameters, gradients=FLOAT * trained, optimizer=optimizer)
    if stage == 0:
        return held
    held["optimizer"] = (optimizer + FLOAT * trained) / processes  # and the weights that it moves
    if stage >= 2:
        held["gradients"] = FLOAT * trained / processes
    if stage == 3:
        held.update(weights=FLOAT * (parameters / processes + 2 * block), copies=copies * 2 * block)
    return held


def network(parameters, stage):
    """Bytes that each rank sends for a step, where there are many: a sum over all is two passes over what is added."""
    return (3 if stage == 3 else 2) * FLOAT * parameters


def optimizer_state(model, optimizer):
    """Bytes of the state of `optimizer` ("adamw", "muon") for the trained parameters: AdamW keeps two moments of each,
    Muon one of hidden matrices."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    one = {name for name, parameter in trained if optimizer == "muon" and is_hidden_matrix(name, parameter)}
    return sum(FLOAT * whole_size(parameter) * (1 if name in one else 2) for name, parameter in trained)


def largest_piece(model):
    """Parameters of the largest piece that ZeRO 3 brings together: a block, or the embedding."""
    layers = [
        module for name, module in model.named_modules() if name.split(".")[-1].isdecimal() and "experts" not in name
    ]
    sizes = [sum(map(whole_size, layer.parameters())) for layer in layers]
    return max([*sizes, *(whole_size(p) for name, p in model.named_parameters() if p.dim() == 2 and "embed" in name)])


def meta_model(config):
    """A Transformer that has shapes and no numbers."""
    with torch.device("meta"):
        return Transformer(config)


def counted_activations(trainer, row):
    """Bytes that autograd keeps for the row `row` of the data, or another as long, of a forward pass of this run's own loss,
    without checkpointing."""
    model, training = trainer.model, trainer.model.training
    checkpointing = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    one = torch.ones((), device=trainer.device)

    def forward(rows):
        batch = trainer.to_device(trainer.train_loader.dataset[[row] * rows])
        with autocast(trainer.device, trainer.dtype):
            loss, aux_loss = trainer.loss_function(model, batch, one)
            return loss + aux_loss

    model.train()
    try:
        for module in checkpointing:
            module.gradient_checkpointing = False
        return kept_for_backward(forward)
    finally:
        for module in checkpointing:
            module.gradient_checkpointing = True
        trainer.further_numbers()  # what a preference loss has noted
        model.train(training)


def worth(epochs):
    """How many epochs of fresh data are worth what `epochs` over the same are (Muennighoff et al. 2023, eq. 5): up to 4
    nearly as many."""
    if epochs <= 1:
        return epochs
    return 1 + REPEATED_EPOCHS * (1 - math.exp((1 - epochs) / REPEATED_EPOCHS))


def neighbours(config):
    """{"smaller": name, "larger": name} of the presets of config's vocabulary next to it in operations for a token, those of
    its own kind, dense or mixture of experts, if there are any."""
    length = config.max_seq_len
    work = {}
    for name in PRESETS:
        other = preset_config(name, max_seq_len=length)
        if other.vocab_size == config.vocab_size:
            work[name] = (other.use_moe == config.use_moe, flops_per_token(meta_model(other), length))
    own, found = flops_per_token(meta_model(config), length), {}
    for name, pick, fits in (("smaller", max, lambda flops: flops < own), ("larger", min, lambda flops: flops > own)):
        near = {preset: flops for preset, (kin, flops) in work.items() if fits(flops) and kin}
        near = near or {preset: flops for preset, (_, flops) in work.items() if fits(flops)}
        if near:
            found[name] = pick(near, key=near.get)
    return found
