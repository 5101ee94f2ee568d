"""Training with weights, gradients and optimizer state divided among the ranks by PyTorch itself (FSDP2; Zhao et al. 2023,
arXiv 2304.11277). Checkpoints and training states are DataParallel's."""

import contextlib

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from model.checkpoint import check_fits
from model.training import ranks
from model.training.strategy import DataParallel


class FullySharded(DataParallel):
    """Each rank holds its rows of every parameter; those of a layer come together when it is called. Every method that
    gathers or scatters is one of all ranks."""

    def prepare(self, device, dtype, settings):
        super().prepare(device, dtype, settings)
        for parameter in self.model.parameters():  # each rank has drawn its own
            dist.broadcast(parameter.data, 0)
        mesh = init_device_mesh(device.type, (ranks.world_size(),))
        for part in (*self.model.layers, self.model):  # the model's own group is what no layer has
            fully_shard(part, mesh=mesh)

    def make_runner(self, settings, device, dtype, dynamic):
        return torch.compile(self.model, dynamic=dynamic) if settings.compile else self.model

    def micro_batch(self, last):
        return contextlib.nullcontext()  # gradients travel after every pass: they would be kept whole until the last

    def gradient_norm(self):
        return super().gradient_norm().full_tensor()

    def weights(self):
        return gathered(super().weights())

    def load_weights(self, weights, path):
        saved = self.saved_parameters()
        check_fits(weights, {name: parameter.shape for name, parameter in saved.items()}, path)
        with torch.no_grad():
            for name, parameter in saved.items():
                parameter.copy_(divided(weights[name], parameter))

    def state_dict(self):
        state = super().state_dict()
        for optimizer in state["optimizers"]:
            optimizer["state"] = {index: gathered(values) for index, values in optimizer["state"].items()}
        return state

    def load_state_dict(self, state):
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for index, values in saved["state"].items():
                moments = {name: value for name, value in values.items() if name != "step"}
                values.update((name, divided(value, parameters[index])) for name, value in moments.items())
        super().load_state_dict(state)


def gathered(tensors):
    """{name: whole tensor on the CPU} of a dict of parts, on the main rank; {} on the others."""
    whole = ((name, part.full_tensor() if isinstance(part, DTensor) else part) for name, part in tensors.items())
    return {name: tensor.cpu() for name, tensor in whole if ranks.is_main()}


def divided(tensor, parameter):
    """This rank's part of a whole tensor that every rank has, as `parameter` is divided."""
    whole = tensor.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
