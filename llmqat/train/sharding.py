"""Several processes on one training: who speaks for all, and models in shards (FSDP2).

The student is sharded by accelerate (`accelerate launch`, `fsdp_version: 2`), the teacher here, in
the same way: one group per decoder block, gathered for its own forward and freed after it, so that
no process ever holds a whole model (the released code keeps a full teacher on every GPU). The
shards are rows of the weights, and every quantizer of weights works row by row: the codes of a
shard are rows of the codes of the whole.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, fsdp2_load_full_state_dict
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers.integrations import is_fsdp_enabled

from llmqat.errors import ConfigError
from llmqat.models.families import find_family, iter_blocks
from llmqat_kernels import nn as qnn

__all__ = [
    "allow_cpu",
    "forget_codes",
    "from_first",
    "gather",
    "head_weight",
    "is_first",
    "is_sharded",
    "join",
    "local_weight",
    "place_teacher",
    "processes",
    "reads_weights",
    "reserve",
    "sum_over_processes",
    "use_masters",
]

T = TypeVar("T")


# Processes


def join(device: torch.device) -> None:
    """Meet the other processes of `accelerate launch` or `torchrun`; nothing where there are
    none.

    Raises:
        ConfigError: a launcher was asked for several processes or for shards, and started one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if not dist.is_initialized():
            PartialState(cpu=device.type == "cpu")
    elif _asks_for_shards():
        raise ConfigError(
            "accelerate launch: FSDP with one process has nothing to share; start at least two"
            " (--num_processes 2), or run llmqat without the launcher"
        )
    elif _lost_processes():
        raise ConfigError(
            "accelerate launch: was asked for several processes and started one, as it does with"
            " --cpu; use configs/fsdp2.yaml without --cpu (llmqat's own --device decides), or"
            " torchrun --nproc_per_node 2"
        )


def _asks_for_shards() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _lost_processes() -> bool:
    """Whether accelerate's launcher for one process (it alone says whether the CPU is used) was
    given more: it then names a place to meet (and leaves FSDP out) but starts nobody to meet.
    """
    one = "ACCELERATE_USE_CPU" in os.environ and "WORLD_SIZE" not in os.environ
    return one and "MASTER_ADDR" in os.environ


def processes() -> int:
    """Processes that share this training, 1 without a launcher."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_first(work: Callable[[], T]) -> T:
    """What `work` returns in the first process, in every process.

    Raises:
        What `work` raises, in the first process; SystemExit in the others, which end quietly.
    """
    if processes() == 1:
        return work()
    message: list[Any] = [None]
    if is_first():
        try:
            message = [(True, work())]
        except BaseException:
            dist.broadcast_object_list([(False, None)], src=0)
            raise
    dist.broadcast_object_list(message, src=0)
    succeeded, value = message[0]
    if not succeeded:
        raise SystemExit(1)
    return value  # type: ignore[no-any-return]


def sum_over_processes(values: Tensor) -> Tensor:
    """`values` int64 [n], summed over the processes, in place."""
    if processes() > 1:
        backend = dist.get_backend()
        on = values.cuda() if backend == "nccl" else values
        dist.all_reduce(on)
        values.copy_(on)
    return values


# The student, which accelerate shards


def reads_weights() -> bool:
    """Whether this process reads models from their files: the first, or every one unless shards are
    sent out (`fsdp_cpu_ram_efficient_loading: true`).
    """
    return is_first() or not is_fsdp_enabled()


def reserve(model: nn.Module) -> None:
    """Give a model's meta parameters memory that is not written: until then it takes no pages.
    accelerate tells the parameters of an optimizer by their addresses, which meta ones do not have.
    """
    given: dict[int, nn.Parameter] = {}  # a tied parameter gets its memory once
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in given:
                room = torch.empty_like(parameter, device="cpu")
                given[id(parameter)] = nn.Parameter(room, parameter.requires_grad)
            module._parameters[name] = given[id(parameter)]


def allow_cpu() -> None:
    """Let processes on CPUs have FSDP: accelerate reads its FSDP settings on GPUs only."""
    state = PartialState()
    if _asks_for_shards() and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether models are trained in shards.

    Raises:
        ConfigError: FSDP of the first version, or shards that are kept in main memory.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return False
    if not accelerator.is_fsdp2:
        raise ConfigError(
            "fsdp_version: 1 flattens the weights, whose rows are quantized; set fsdp_version: 2"
        )
    if isinstance(accelerator.state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
        raise ConfigError(
            "fsdp_offload_params: true is not supported; use more GPUs, or --teacher-logits"
        )
    return True


def use_masters(accelerator: Accelerator) -> None:
    """Gather the fp32 masters, not a bf16 copy: weights are quantized from their own precision, and
    autocast does the rest as it does without shards.
    """
    accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    # A decoder hands a slice of its states to the head; nothing here writes into that view.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def forget_codes(model: nn.Module) -> None:
    """Stop keeping weight codes between forwards.

    They would be a whole int8 student in every process; and a gathered weight is a new one each
    time, in memory that held another before.
    """
    for module in model.modules():
        if isinstance(module, qnn.QATLinear):
            module.keep_codes(False)


@contextmanager
def local_weight(linear: nn.Linear) -> Iterator[Tensor]:
    """Inside the block a sharded `linear` has the rows [n, K] of this process as its weight."""
    weight = linear.weight
    if not isinstance(weight, DTensor):
        yield weight
        return
    rows = nn.Parameter(weight.to_local(), requires_grad=False)
    linear._parameters["weight"] = rows
    try:
        yield rows
    finally:
        linear._parameters["weight"] = weight


def head_weight(head: nn.Linear) -> Tensor:
    """The whole weight [V, H] of a head outside its model's forward, with its gradient.

    The student's is gathered in its forward and stays so until its backward. The teacher's is
    gathered for the caller, who frees it by dropping it.
    """
    weight = head.weight
    if not isinstance(weight, DTensor):
        return weight
    if weight.requires_grad:
        raise RuntimeError("the student's head was freed before the loss; its forward must end it")
    return weight.full_tensor()


def gather(model: nn.Module) -> None:
    """Give a model sharded by rows its whole weights back, on the CPU, in the first process; the
    others lose theirs. Every process has to call it; training is over then.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    whole: dict[int, nn.Parameter] = {}
    shards: list[nn.Parameter] = []  # alive, so that no id is used twice
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in whole:
                full = parameter.detach().full_tensor()
                full = full.cpu() if is_first() else torch.empty(0, dtype=full.dtype)
                whole[id(parameter)] = nn.Parameter(full, requires_grad=parameter.requires_grad)
                shards.append(parameter)
            module._parameters[name] = whole[id(parameter)]


# The teacher


def place_teacher(teacher: nn.Module, accelerator: Accelerator) -> None:
    """Move a frozen teacher to the device: in shards where the student is in shards."""
    if is_sharded(accelerator):
        _shard(teacher, accelerator)
    else:
        teacher.to(accelerator.device)


def _shard(model: nn.Module, accelerator: Accelerator) -> None:
    """Every block a group, the embeddings with the head where they are tied, the rest the root."""
    if not is_fsdp_enabled():
        _group(model, accelerator)
        return
    # As accelerate does it with the student: shards of nothing, then the first process's weights,
    # one at a time. Rotary tables are no weights; every process has its own.
    weights = model.state_dict()
    tables = {name: t for name, t in model.named_buffers() if name not in weights}
    model.to("meta")
    model.tie_weights()  # type: ignore[operator]
    _group(model, accelerator)
    fsdp2_load_full_state_dict(accelerator, model, weights)
    model.tie_weights()  # type: ignore[operator]
    for name, table in tables.items():
        module, _, buffer = name.rpartition(".")
        model.get_submodule(module)._buffers[buffer] = table.to(accelerator.device)


def _group(model: nn.Module, accelerator: Accelerator) -> None:
    mesh = getattr(accelerator, "torch_device_mesh", None)
    if mesh is not None:
        mesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for _, block in iter_blocks(model, find_family(model)):
        fully_shard(block, **options)
    if embedding.weight is head.weight:
        fully_shard([embedding, head], **options)
    else:
        fully_shard(embedding, **options)
        fully_shard(head, **options)
    fully_shard(model, **options)
