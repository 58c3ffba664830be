"""Averages gradients in one message behind the backward pass, in place of DDP's buckets.

DDP's buckets are as large as all gradients and there from step to step, while activations need most memory too. Here
gradients appear as activations go. The message is not hidden: 640 MB, of 160 million numbers, take 3 ms over NVLink.
"""

import torch
import torch.distributed as dist
from accelerate.state import GradientState
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def average_behind_backward(model: nn.Module, last_layer: nn.Module) -> None:
    """Average what `model` trains over all processes behind each backward pass that begins in `last_layer`; in place.

    DDP, which will wrap the model, is left the first parameter, for it does not do without. All processes begin with the
    first one's parameters and buffers, which lie on this process's device.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for tensor in [*model.parameters(), *model.buffers()]:
        dist.broadcast(tensor.data, 0)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [name for name, _ in trained[1:]])
    parameters = [parameter for _, parameter in trained[1:]]

    def average() -> None:
        if GradientState().sync_gradients:  # else more rows of this step come
            average_gradients(parameters)

    def when_backward_begins(layer: nn.Module, args: tuple, output: Tensor) -> None:
        # Not of a layer that is computed again, inside the backward pass.
        if output.requires_grad and torch._C._current_graph_task_id() == -1:
            output.register_hook(lambda grad: torch.autograd.Variable._execution_engine.queue_callback(average))

    last_layer.register_forward_hook(when_backward_begins)


@torch.no_grad()
def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Their gradients become the mean over all processes; one that is missing counts as zero."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in parameters]
    flat = torch.cat([grad.flatten() for grad in grads]).div_(dist.get_world_size())
    dist.all_reduce(flat)
    parts = flat.split([grad.numel() for grad in grads])
    torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(parts, grads, strict=True)])
