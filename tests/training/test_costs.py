"""What training costs, against counts by hand, the tensors of a graph and the memory that a step really takes."""

import math

import pytest
import torch

from model.device import autocast
from model.LMConfig import LMConfig
from model.model import Transformer
from model.settings import TrainingSettings
from model.training import costs, cpu_kernels
from model.training.strategy import DataParallel

CPU = torch.device("cpu")


def test_state_of_a_rank_by_hand():
    """A million parameters on four ranks, in bytes: 4 a weight, 4 a gradient, 8 both moments, 2 the copy in 16 bits; from stage 1
    on the moved weights once more, divided."""
    totals = [sum(costs.memory(10**6, 10**4, 4, stage).values()) for stage in range(4)]
    assert totals == [18e6, 10e6 + 12e6 / 4, 6e6 + 4e6 / 4 + 12e6 / 4, 4e6 / 4 + 4e6 / 4 + 12e6 / 4 + 2 * 6 * 10**4]
    assert costs.memory(10**6, 10**4, 1, 0)["optimizer"] == 8e6


def test_what_a_block_keeps_grows_with_its_widths_and_is_what_autograd_keeps():
    """Against the tensors that hang in the graph of a block, found by walking it."""
    config = LMConfig(dim=64, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=100, max_seq_len=64)
    block, ends = costs.bytes_per_token(config)
    model, count = Transformer(LMConfig(**{**config.to_dict(), "n_layers": 1})).train(), costs.TOKENS
    x = torch.randn(1, count, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = model.layers[0](x, model.rotary_table(count, x.device)[:, None], None, None, None)
    seen, sizes, nodes = set(), {}, [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [other for other, _ in node.next_functions]
        for name in dir(node):
            value = getattr(node, name) if name.startswith("_saved_") else None
            if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() % count == 0:
                sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    assert block == sum(sizes.values()) / count
    plain = costs.bytes_per_token(config, prepare=lambda model: None)
    assert plain[0] == block and plain[1] >= ends + 2 * 90, "the probabilities of all words"
    wider = costs.bytes_per_token(LMConfig(**{**config.to_dict(), "dim": 128, "head_dim": None, "hidden_dim": None}))
    assert wider[0] == pytest.approx(2 * block, rel=0.1)


def most_held(function):
    """Most bytes at once that function() allocates and has not freed yet, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize(
    "dtype, rows, length, fields, more",
    [
        (torch.float32, 8, 64, {}, {}),
        (torch.float32, 4, 64, dict(dim=128, n_heads=4), dict(gradient_checkpointing=True)),
        (torch.bfloat16, 4, 128, dict(n_layers=2), dict(optimizer="adamw")),
        (torch.bfloat16, 8, 64, dict(use_moe=True, n_layers=2), {}),
        (torch.bfloat16, 2, 64, dict(vocab_size=400), dict(accumulation_steps=2)),
    ],
)
def test_the_estimate_is_the_memory_of_a_step(dtype, rows, length, fields, more):
    """What a step takes besides weights and the optimizer's state, within a fifth: forward, backward, update."""
    torch.manual_seed(0)
    shape = dict(dim=192, n_layers=4, n_heads=6, n_kv_heads=2, vocab_size=1000)
    config = LMConfig(**{**shape, **fields}, max_seq_len=length)
    settings = TrainingSettings(batch_size=rows, **more).resolved(CPU, 1)
    model = Transformer(config).train()
    strategy = DataParallel(model, settings, CPU, dtype)
    input_ids = torch.randint(0, config.vocab_size, (rows, length))

    def step():
        for index in range(settings.accumulation_steps):
            with strategy.micro_batch(last=index == settings.accumulation_steps - 1), autocast(CPU, dtype):
                output = strategy.runner(input_ids, labels=input_ids, return_logits=False)
            strategy.backward(output.loss + output.aux_loss)
            del output
        strategy.gradient_norm()
        strategy.step(1.0)

    step()  # which makes the optimizer's state
    options = dict(length=length, dtype=dtype, prepare=lambda model: cpu_kernels.install(model, CPU, dtype, False))
    kept = costs.activations(config, rows * length, **options)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    held = costs.memory(parameters, 0, 1, 0, copies=costs.HALF if dtype == torch.bfloat16 else 0)
    held.update(weights=0, optimizer=0)
    loss = costs.of_the_loss(config, rows * length, cpu_kernels.CHUNK["cpu"])
    estimate = costs.peak(held, kept, loss, settings.gradient_checkpointing, settings.accumulation_steps > 1)
    assert estimate == pytest.approx(most_held(step), rel=0.2)


def test_the_peak_by_hand():
    held = dict(weights=1000, copies=500, gradients=900, optimizer=2000, beside=10_000)
    kept = dict(blocks=40, ends=7, inputs=4, block=20)
    assert costs.peak(held, kept, 3, checkpointing=False, accumulating=False) == 13_000 + 900  # gradients are more
    assert costs.peak(held, kept, 3, checkpointing=False, accumulating=True) == 13_000 + 500 + 40 + 7 + 3 + 900
    assert costs.peak(held, kept, 3, checkpointing=True, accumulating=False) == 13_000 + 900 + 4 + 20
    assert costs.peak(held, kept, 500, checkpointing=True, accumulating=False) == 13_000 + 500 + 500 + 7 + 4


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_state_of_the_optimizer_is_what_it_holds_after_a_step(optimizer):
    config = LMConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=100, use_moe=True)
    model = Transformer(config)
    model.layers[0].attention.wq.weight.requires_grad_(False)
    strategy = DataParallel(model, TrainingSettings(optimizer=optimizer).resolved(CPU, 1), CPU, torch.float32)
    input_ids = torch.randint(0, 100, (2, 16))
    output = model(input_ids, labels=input_ids)
    strategy.backward(output.loss + output.aux_loss)
    strategy.step(1.0)
    states = [state for part in strategy.optimizers for state in part.state.values()]
    sizes = [value.nbytes for state in states for name, value in state.items() if name != "step"]
    assert costs.optimizer_state(model, optimizer) == sum(sizes)


def test_only_trained_parameters_have_gradients_and_moments():
    held = costs.memory(1000, 0, 1, 0, trained=10)
    assert held == dict(weights=4000, copies=2000, gradients=40, optimizer=80)


def test_the_largest_piece_is_a_block_or_the_embedding():
    config = dict(dim=32, n_layers=3, n_heads=4, n_kv_heads=2, use_moe=True)
    small, large = (Transformer(LMConfig(**config, vocab_size=words)) for words in (100, 100_000))
    assert costs.largest_piece(small) == sum(parameter.numel() for parameter in small.layers[1].parameters())
    assert costs.largest_piece(large) == 100_000 * 32


def test_repeated_epochs_are_worth_less_and_less():
    """Muennighoff et al.: four epochs are worth nearly four, forty hardly more than sixteen."""
    assert costs.worth(0.5) == 0.5 and costs.worth(1) == 1
    assert costs.worth(4) == pytest.approx(1 + 15.39 - 15.39 * math.exp(-3 / 15.39)) == pytest.approx(3.73, abs=0.01)
    assert costs.worth(1e6) == pytest.approx(16.39)


def test_the_presets_next_to_a_shape():
    from model.LMConfig import preset_config

    assert costs.neighbours(preset_config("minimind-tiny")) == {"larger": "minimind-v1-small"}
    expected = {"smaller": "minimind-tiny", "larger": "minimind-v1"}
    assert costs.neighbours(preset_config("minimind-v1-small")) == expected
    assert costs.neighbours(preset_config("minimind-v1")) == {"smaller": "minimind-v1-small"}
    between = {"smaller": "minimind-v1-small", "larger": "minimind-v1"}  # there is one of its kind only
    assert costs.neighbours(preset_config("minimind-v1-moe")) == between
    assert costs.neighbours(preset_config("minimind-v0")) == {"smaller": "minimind-v0-small"}
    assert costs.neighbours(LMConfig(vocab_size=123)) == {}
