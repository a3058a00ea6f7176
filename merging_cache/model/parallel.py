"""Which processes share a model by tensor parallelism."""

from typing import Any

import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel


def tensor_parallel_group(model: PreTrainedModel | None) -> Any:
    """The process group whose members hold the heads of every layer among them; `None` where this one has all."""
    mesh, size = getattr(model, "_device_mesh", None), getattr(model, "tp_size", None)
    if mesh is None or not size or size < 2:
        return None
    return (mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else mesh).get_group()


def summed(tensor: Tensor, group: Any) -> Tensor:
    """The sum of what the processes of a group hold; as it is where there is no group."""
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor
