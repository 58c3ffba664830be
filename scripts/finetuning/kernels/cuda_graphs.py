"""Forward and backward pass of a text model as CUDA graphs, for steps that are limited by kernel launches.

Four rows of a hundred tokens keep a large GPU busy for 20 ms, while the host takes 80 to 130 ms to launch 2,400
kernels. A CUDA graph (https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs) is recorded once and launched as
one. It is valid for one shape: batches are padded to a multiple of 64 tokens, and each padded length has its own pair
of graphs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.modeling_outputs import BaseModelOutputWithPast

from finetuning import upstream
from finetuning.kernels.lora_layers import TWO_NORM_LAYERS, projection_stacks
from finetuning.kernels.model_patches import NO_MASK
from finetuning.models.parts import base_model_of, decoder_layers

PAD_MULTIPLE = 64  # tokens
# Inputs that follow from the recorded ones, or that only the host reads.
UNRECORDED_INPUTS = {
    "attention_mask", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "supervised_rows", "use_cache",
    *upstream.CACHE,
}  # fmt: skip


class CudaGraphs(TrainerCallback):
    """Switches the graphs on when training begins, unless activation checkpointing is on, which it then says.

    Raises ValueError if anything but LoRA on all seven linear layers of every decoder layer is trained.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        layers = decoder_layers(trainer.model)
        fused = [layer for layer in layers if isinstance(layer, tuple(TWO_NORM_LAYERS.values()))]
        adapters = {
            id(adapter) for layer in fused for stack in projection_stacks(layer) for adapter in stack.adapters()
        }
        trained = {id(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad}
        if len(fused) < len(layers) or trained != adapters:
            raise ValueError(
                "cuda_graphs needs a Llama or Gemma decoder with LoRA on all seven linear layers of each layer, and "
                "nothing else that is trained: set cuda_graphs: false"
            )

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Put a GraphedModel in place of the language model's `forward`."""
        trainer = self.trainer
        if trainer.layer_checkpointing is not None and trainer.layer_checkpointing.count:
            trainer.accelerator.print("  cuda_graphs: not used, because layers are checkpointed")
            return
        language_model = base_model_of(trainer.accelerator.unwrap_model(trainer.model)).model
        parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        upstream.replace(language_model, "forward", GraphedModel(language_model, parameters))


class GraphedModel:
    """Replaces `forward` of a language model of which only `parameters`, its fused LoRA adapters, are trained.

    In training it returns `last_hidden_state` (rows, tokens, width), as the model does, and backward accumulates into
    the parameters' `grad`. All gradients are views of one tensor, whose address the graphs keep across `zero_grad`.
    Evaluation and generation with a cache run the model's own forward. Raises ValueError for an input of unknown name.
    """

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter]):
        self.model, self.parameters = model, parameters
        self.eager_forward = model.forward
        self.layers = decoder_layers(model)
        self.stacks = [stack for layer in self.layers for stack in projection_stacks(layer)]
        self.passes: dict[tuple, GraphedPasses] = {}
        self.copies: list[int] = []
        self.memory_pool = torch.cuda.graph_pool_handle()
        sizes = [parameter.numel() for parameter in parameters]
        self.flat_grads = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        views = zip(self.flat_grads.split(sizes), parameters, strict=True)
        self.grads = [view.view_as(parameter) for view, parameter in views]

    def __call__(self, input_ids: Tensor | None = None, **kwargs) -> Any:
        if not (self.model.training and torch.is_grad_enabled()) or upstream.cache_of(kwargs) is not None:
            return self.eager_forward(input_ids=input_ids, **kwargs)
        if self.layers[0].gradient_checkpointing:
            # A step ran out of memory: layers are checkpointed from now on, which cannot be recorded.
            self.passes.clear()
            return self.eager_forward(input_ids=input_ids, **kwargs)
        batch = {"input_ids": input_ids, "position_ids": kwargs.pop("position_ids", None)}
        batch["cu_seq_lens_q"] = kwargs.pop("cu_seq_lens_q", None)
        batch = {name: tensor for name, tensor in batch.items() if tensor is not None}
        if unknown := {name for name, value in kwargs.items() if value is not None} - UNRECORDED_INPUTS:
            raise ValueError(
                f"cuda_graphs: the model is given {sorted(unknown)}, which no graph knows: set it to false"
            )
        hidden = ReplayGraphs.apply(self.passes_for(batch), batch, self.parameters[0])
        return BaseModelOutputWithPast(last_hidden_state=hidden[:, : input_ids.shape[1]])

    def passes_for(self, batch: dict[str, Tensor]) -> "GraphedPasses":
        """The graphs for the padded shape of `batch`, recorded at first use."""
        # The graphs read the 16-bit copies of the adapters, which get new memory when their dtype changes.
        copies = [copy.data_ptr() for stack in self.stacks for copy in (stack.a, stack.copies[-1])]
        if copies != self.copies:
            self.copies = copies
            self.passes.clear()
        shape = (*batch, *batch["input_ids"].shape[:1], padded_length(batch), len(batch.get("cu_seq_lens_q", ())))
        if shape not in self.passes:
            self.passes[shape] = GraphedPasses(self, batch)
        return self.passes[shape]

    def run_eager(self, inputs: dict[str, Tensor]) -> Tensor:
        """The model's own forward pass of padded `inputs` -> hidden states (rows, tokens, width)."""
        packed = {}
        if "cu_seq_lens_q" in inputs:
            tokens = inputs["input_ids"].shape[1]
            packed = {"cu_seq_lens_k": inputs["cu_seq_lens_q"], "max_length_q": tokens, "max_length_k": tokens}
        return self.eager_forward(**inputs, **packed, attention_mask=NO_MASK, use_cache=False).last_hidden_state

    def assign_grads(self) -> None:
        """After `zero_grad(set_to_none=True)`: zero the gradients and give them back to the parameters."""
        if self.parameters[0].grad is None:
            self.flat_grads.zero_()
            for parameter, grad in zip(self.parameters, self.grads, strict=True):
                parameter.grad = grad


class GraphedPasses:
    """The forward and the backward graph for batches of one shape, with their input and output tensors."""

    def __init__(self, model: GraphedModel, batch: dict[str, Tensor]):
        self.model = model
        self.inputs = pad_batch(batch)
        device = batch["input_ids"].device
        with torch.random.fork_rng(devices=[device]):
            # A warm-up: kernels are compiled, and libraries allocate what they cannot allocate while recording.
            aside = torch.cuda.Stream(device)
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(aside):
                hidden = model.run_eager(self.inputs)
                torch.autograd.grad(hidden, model.parameters, torch.zeros_like(hidden))
                del hidden
            torch.cuda.current_stream(device).wait_stream(aside)
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # `thread_local`: other threads (the data loader's) may call CUDA meanwhile.
        record = {"pool": model.memory_pool, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self.forward, **record):
            hidden = model.run_eager(self.inputs)
        self.hidden, self.grad = hidden.detach(), torch.empty_like(hidden)
        with torch.cuda.graph(self.backward, **record):
            grads = torch.autograd.grad(hidden, model.parameters, self.grad)
            torch._foreach_add_(model.grads, grads)
        # Graphs of all shapes share one memory pool: saved activations of two shapes are never alive at once.

    def copy_inputs(self, batch: dict[str, Tensor]) -> None:
        """Copy `batch` into the graphs' inputs. Padding keeps old values: no real token attends to it."""
        for name, tensor in batch.items():
            self.inputs[name][..., : tensor.shape[-1]].copy_(tensor)


class ReplayGraphs(torch.autograd.Function):
    """Replays the recorded passes; `parameter` is any trained one, so that autograd calls backward."""

    @staticmethod
    def forward(ctx, passes: GraphedPasses, batch: dict[str, Tensor], parameter: nn.Parameter) -> Tensor:
        """Hidden states (rows, padded tokens, width) of `batch`, from the recorded forward pass."""
        ctx.passes = passes
        passes.copy_inputs(batch)
        passes.forward.replay()
        return passes.hidden.detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, None, None]:
        """Accumulate the adapters' gradients by the recorded backward pass; the inputs get none."""
        ctx.passes.model.assign_grads()
        ctx.passes.grad.copy_(grad)
        ctx.passes.backward.replay()
        return None, None, None


def padded_length(batch: dict[str, Tensor]) -> int:
    """Tokens of a row, rounded up to PAD_MULTIPLE."""
    return -(-batch["input_ids"].shape[1] // PAD_MULTIPLE) * PAD_MULTIPLE


def pad_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy of the batch, padded on the right to `padded_length`; in packed rows the padding is one more row."""
    tokens = padded_length(batch)
    copies = {}
    for name, tensor in batch.items():
        if name == "cu_seq_lens_q":
            copies[name] = tensor.new_full((len(tensor) + 1,), tokens)
        else:
            copies[name] = tensor.new_zeros(*tensor.shape[:-1], tokens)
        copies[name][..., : tensor.shape[-1]] = tensor
    return copies
