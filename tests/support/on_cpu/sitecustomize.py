"""On the PYTHONPATH of a launch: what accelerate and DeepSpeed do on GPUs, on a CPU too.

PyTorch's FSDP2 runs over gloo; accelerate 1.15 turns FSDP on for the GPU kinds of `distributed_type` only, so that a CPU
launch is given the name of one. DeepSpeed 0.19 compiles a helper for CPUs, minutes of work for something that inference
alone uses: it is told that nothing can be compiled. gloo sends tensors that do not lie in one piece, NCCL refuses them:
so does a CPU here. Everything else is the real thing: dividing, gathering, saving, continuing.
"""

import atexit
import gc
import os

# Most of what such a process does here is to start and to end, and a fifth of that is looking for garbage among the half
# million objects that imports make and nobody drops.
gc.set_threshold(50_000)
atexit.register(gc.freeze)

if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    import accelerate.state
    from accelerate.utils import DistributedType

    initialise = accelerate.state.PartialState.__init__

    def initialise_as_gpu(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        if self.__dict__.get("distributed_type") == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    accelerate.state.PartialState.__init__ = initialise_as_gpu
    initialise_all = accelerate.state.AcceleratorState.__init__

    def initialise_as_what_it_is(self, *args, **kwargs):
        shared = accelerate.state.PartialState._shared_state
        if (
            os.environ.get("ACCELERATE_USE_FSDP") != "true"
            and shared.get("distributed_type") == DistributedType.MULTI_GPU
        ):
            shared["distributed_type"] = DistributedType.MULTI_CPU  # where this project has taken over, DDP is left
        initialise_all(self, *args, **kwargs)

    accelerate.state.AcceleratorState.__init__ = initialise_as_what_it_is

if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed.ops
    import torch

    deepspeed.ops.__compatible_ops__ = {}

    def as_nccl(send):
        def send_in_one_piece(*args, **kwargs):
            if not all(value.is_contiguous() for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)):
                raise ValueError("Tensors must be contiguous")
            return send(*args, **kwargs)

        return send_in_one_piece

    for name in ("broadcast", "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
        setattr(torch.distributed, name, as_nccl(getattr(torch.distributed, name)))
