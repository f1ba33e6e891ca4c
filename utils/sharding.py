"""Fully sharded training (FSDP2): each process holds a part of every weight, gradient, moment and average.

A sharded tensor is a DTensor. Checkpoints hold whole tensors, gathered one at a time on the first process, so a run may
change its number of processes, and change between ddp and fsdp, whenever it is resumed. FSDP and DTensor take a second to
import, so that is done where they are needed.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from utils.cli import InputError
from utils.distributed import World

DATA_PARALLEL = ("ddp", "fsdp", "hsdp")


def make_mesh(world: World, way: str) -> DeviceMesh:
    """fsdp: all processes hold a part each. hsdp: those of a machine do, and every machine holds a copy."""
    kind, local = world.device.type, world.local_size
    if way == "fsdp":
        return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
    if world.size % local or world.size == local:
        raise InputError(
            f"--data-parallel hsdp: {world.size} processes, {local} on this machine; expected several machines with as "
            "many processes each: use fsdp"
        )
    return init_device_mesh(kind, (world.size // local, local), mesh_dim_names=("replicate", "shard"))


def shard(
    model: nn.Module, blocks: Iterable[nn.Module], methods: Sequence[str], mesh: DeviceMesh, dtype: torch.dtype
) -> None:
    """Shard a model in place, a group a block and one for the rest, and move it to the mesh's device.

    methods: what is called of the model besides its forward. dtype: of gathered weights; gradients are summed in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for method in methods:
        register_fsdp_forward_method(model, method)


def is_sharded(value: Any) -> bool:
    """Whether a value is a DTensor."""
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def names_of(model: nn.Module) -> dict[int, str]:
    """The names of a model's weights by their identity, for point_to."""
    return {id(weight): name for name, weight in model.named_parameters()}


def point_to(optimizer: torch.optim.Optimizer, model: nn.Module, names: Mapping[int, str]) -> None:
    """Have a fresh optimizer update the model's present weights in place of those of `names`, which sharding replaced."""
    weights = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [weights[names[id(weight)]] for weight in group["params"]]


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process holds of each tensor."""
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]


def whole(state: Any, keep: bool = True) -> Any:
    """A state (dicts and lists) with its sharded tensors gathered on the CPU, None without `keep`. All processes call it."""
    if is_sharded(state):
        gathered = state.full_tensor()
        return gathered.cpu() if keep else None
    if isinstance(state, dict):
        return {key: whole(value, keep) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value, keep) for value in state]
    return state


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, placed as `like` is; the tensor itself where that is not sharded."""
    if not is_sharded(like) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def parts_of(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """This process's part of a whole state dict of a model."""
    own = model.state_dict()
    return {name: part_of(tensor, own[name]) if name in own else tensor for name, tensor in state.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a whole state into an optimizer; of mapped files it keeps copies, as their pages may vanish."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]

    def mine(index: int, value: Any) -> Any:
        return part_of(value.clone(), weights[index]) if isinstance(value, Tensor) else value

    moments = {i: {key: mine(i, value) for key, value in of.items()} for i, of in state["state"].items()}
    optimizer.load_state_dict({**state, "state": moments})


def frame(model: nn.Module) -> Callable[[Mapping[str, Tensor]], nn.Module]:
    """How to make a plain copy of a model, which is yet to be sharded, from whole weights. The frame itself holds none."""
    memo = {id(weight): nn.Parameter(torch.empty_like(weight, device="meta"), False) for weight in model.parameters()}
    empty = copy.deepcopy(model, memo).eval()

    def fill(state: Mapping[str, Tensor]) -> nn.Module:
        filled = copy.deepcopy(empty)
        filled.load_state_dict(state, assign=True)
        return filled

    return fill
