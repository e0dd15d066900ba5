"""One process or many: joining torchrun's group, FSDP2 sharding, and what all processes must agree on.

The trained module is wrapped in a root whose forward calls whatever it is given, so that a stage may use its modules in
any way (not only through forward) while FSDP2 has the parameters gathered. Repeated blocks (the entries of a
ModuleList) large enough to be worth their own messages become units of their own; then each process must run the same
blocks in each step. Source: PyTorch, torch.distributed.fsdp.fully_shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

Result = TypeVar("Result")

# A smaller block costs more in messages than its gathered weights cost in memory.
MIN_UNIT_PARAMETERS = 2_000_000


@dataclass(frozen=True)
class World:
    """This process's place: rank 0 writes files and shows progress."""

    rank: int = 0
    size: int = 1


def join_world() -> World:
    """Join the group torchrun has started this process in, once; alone, nothing happens."""
    if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return current_world()


def leave_world() -> None:
    """Leave the group join_world joined, all together: one that left early would abort the others."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def current_world() -> World:
    """This process's place now."""
    if not (dist.is_available() and dist.is_initialized()):
        return World()
    return World(dist.get_rank(), dist.get_world_size())


def pick_device() -> torch.device:
    """This process's GPU, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = dist.get_node_local_rank(fallback_rank=0) if dist.is_available() else 0
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


class Root(nn.Module):
    """Calls what it is given, with the trained module's parameters gathered meanwhile."""

    def __init__(self, trained: nn.Module) -> None:
        super().__init__()
        self.trained = trained

    def forward(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """call(*arguments)."""
        return call(*arguments)


def shard(trained: nn.Module, world: World, min_unit_parameters: int = MIN_UNIT_PARAMETERS) -> Root:
    """Wrap the module and, with several processes, shard its parameters over them."""
    root = Root(trained)
    if world.size == 1:
        return root
    device = next(trained.parameters()).device
    mesh = init_device_mesh(device.type, (world.size,))
    for module in trained.modules():
        for block in module if isinstance(module, nn.ModuleList) else ():
            if sum(parameter.numel() for parameter in block.parameters()) >= min_unit_parameters:
                fully_shard(block, mesh=mesh)
    fully_shard(root, mesh=mesh)
    return root


def whole(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, gathered where it is sharded (then every process must call this)."""
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu().contiguous()


def like(target: Tensor, value: Tensor) -> Tensor:
    """value on target's device, sharded as target is."""
    value = value.to(target.device)
    if isinstance(target, DTensor):
        return distribute_tensor(value, target.device_mesh, target.placements)
    return value


def without_gradients(root: Root, call: Callable[[], Result]) -> Result:
    """call() without gradients, the parameters gathered meanwhile and given back afterwards."""
    with torch.no_grad():
        result: Result = root(call)
    if isinstance(root, FSDPModule):
        root.reshard()  # FSDP2 keeps a root gathered for the backward that never comes; the next step would reuse it
    return result


def sync_gradients(root: Root, enabled: bool) -> None:
    """Whether the next backward exchanges gradients; only the last micro-batch of a step has to."""
    if isinstance(root, FSDPModule):
        root.set_requires_gradient_sync(enabled)


def touch(loss: Tensor, trained: nn.Module) -> Tensor:
    """loss, with every gathered parameter in its graph: processes exchange the same gradients whatever a batch used."""
    gathered = [p for p in trained.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    if current_world().size == 1 or not gathered:
        return loss
    return loss + 0.0 * torch.stack([parameter.sum() for parameter in gathered]).sum()


def forget_untouched(parameters: Iterable[nn.Parameter]) -> None:
    """Take the gradient from parameters that no process used in this step, so that they stand still as they do alone.

    Such a gradient is exactly zero everywhere; left in place, momentum and weight decay would go on moving them.
    """
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    if current_world().size == 1 or not with_gradient:
        return
    norms = torch.stack(torch._foreach_norm([local(parameter.grad) for parameter in with_gradient]))
    dist.all_reduce(norms)
    for parameter, norm in zip(with_gradient, norms.tolist(), strict=True):
        if norm == 0:
            parameter.grad = None


def local(tensor: Tensor | None) -> Tensor:
    """This process's shard of a sharded tensor, or the tensor itself."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def wait_for_all() -> None:
    """Return once every process has come here: files rank 0 wrote before are there for all."""
    if current_world().size > 1:
        dist.barrier()


def agree_on_largest(value: int, device: torch.device) -> int:
    """The largest of all processes' values: a signal that reached one of them stops all at the same step."""
    if current_world().size == 1:
        return value
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return int(shared)


def mean_over_world(value: float, device: torch.device) -> float:
    """The mean of all processes' values."""
    world = current_world()
    if world.size == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(shared)
    return float(shared) / world.size


def gather_bytes(value: Tensor) -> list[Tensor]:
    """Every process's tensor (uint8, same length everywhere), by rank."""
    world = current_world()
    if world.size == 1:
        return [value]
    device = pick_device()
    parts = [torch.empty_like(value, device=device) for _ in range(world.size)]
    dist.all_gather(parts, value.to(device))
    return [part.cpu() for part in parts]
