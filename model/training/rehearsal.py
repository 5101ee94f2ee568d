"""Steps that are only tried: afterwards the run stands where it stood, to the bit."""

import contextlib
import io

import torch

from model.training import resume


@contextlib.contextmanager
def unchanged(trainer):
    """A context in which steps may be done; behind it weights, gradients, optimizers, scaler and random generators are what
    they were before.

    Where --deepspeed or --fsdp has divided them they stay changed: such a run must not go on.
    """
    strategy, settings = trainer.strategy, trainer.settings
    if settings.deepspeed is not None or settings.fsdp:
        yield
        return
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    saved = io.BytesIO()  # on the host: a GPU shall hold what it does in the run itself
    weights = [parameter.detach() for parameter in parameters]
    torch.save({"weights": weights, "state": strategy.state_dict()}, saved)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in strategy.optimizers]
    random, training = resume.random_state(trainer.device), trainer.model.training
    try:
        yield
    finally:
        strategy.forget_gradients()
        saved.seek(0)
        saved = torch.load(saved, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for parameter, weight in zip(parameters, saved["weights"], strict=True):
                parameter.copy_(weight)
        renew_scaler(trainer)
        strategy.load_state_dict(saved["state"])
        for optimizer, before in zip(strategy.optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, before, strict=True):
                group["lr"] = rate
        trainer.model.train(training)
        resume.restore_random_state(random, trainer.device)


def renew_scaler(trainer):
    """A gradient scaler in the place of one that an error may have left in the middle of a step."""
    strategy = trainer.strategy
    strategy.scaler = torch.amp.GradScaler(trainer.device.type, enabled=strategy.scaler.is_enabled())
