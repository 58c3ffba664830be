"""On the PYTHONPATH of a launch: lets accelerate use FSDP2 without a GPU.

PyTorch's FSDP2 runs over gloo; accelerate 1.15 turns FSDP on for the GPU kinds of `distributed_type` only, so that a CPU
launch is given the name of one. Everything else is the real thing: sharding, gathering, saving, continuing.
"""

import accelerate.state
from accelerate.utils import DistributedType

initialise = accelerate.state.PartialState.__init__


def initialise_as_gpu(self, *args, **kwargs):
    initialise(self, *args, **kwargs)
    if self.__dict__.get("distributed_type") == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


accelerate.state.PartialState.__init__ = initialise_as_gpu
