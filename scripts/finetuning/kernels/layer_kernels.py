"""What lies between the matrix products of a decoder layer, forward and backward, each in one pass over memory.

And the activation of a vision tower that is frozen, forward only.

Every function is plain torch; on a CUDA device with Triton the kernel of the same name takes over, which reads and
writes each number once (autograd's chain of small operations reads them five to ten times). Everything is computed in
fp32 (fp64 stays fp64 in plain torch) and rounded once at the end, but for the activation of a frozen vision tower.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

GELU_TANH = 0.7978845608028654  # sqrt(2 / pi)
E4M3_MAX = 448.0


def has_kernel(tensor: Tensor) -> bool:
    return triton is not None and tensor.is_cuda


def widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def rms_norm(hidden: Tensor, weight: Tensor, offset: float, eps: float, out: Tensor) -> Tensor:
    """(rows, width) -> hidden / rms(hidden) * (offset + weight); Gemma's offset is 1, Llama's 0.

    Written into `out` of the same shape, whose rows may lie apart (stride (any, 1)), in its type.
    """
    if has_kernel(hidden):
        rows, width = hidden.shape
        block = triton.next_power_of_2(width)
        rms_norm_kernel[(rows,)](hidden, weight, out, width, out.stride(0), offset, eps, BLOCK=block, num_warps=8)
        return out
    wide = widen(hidden)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return out.copy_(normed * (offset + widen(weight)))


def rms_norm_backward(
    hidden: Tensor, weight: Tensor, offset: float, eps: float, grad: Tensor, grad_residual: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of `hidden` through the norm and past it, and the norm's output once more (in the type of `grad`)."""
    if has_kernel(hidden):
        rows, width = hidden.shape
        grad_hidden, normed = torch.empty_like(hidden), torch.empty_like(grad)
        rms_norm_backward_kernel[(rows,)](
            hidden, weight, grad, grad_residual.contiguous(), grad_hidden, normed, width, offset, eps,
            BLOCK=triton.next_power_of_2(width), num_warps=8,
        )  # fmt: skip
        return grad_hidden, normed
    wide = widen(hidden)
    scale = offset + widen(weight)
    inverse_rms = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * inverse_rms
    scaled = widen(grad) * scale
    through = inverse_rms * (scaled - normed * (scaled * normed).mean(-1, keepdim=True))
    return (through + widen(grad_residual)).to(hidden.dtype), (normed * scale).to(grad.dtype)


def gated_activation(gate_up: Tensor, is_gelu: bool, out: Tensor) -> Tensor:
    """(rows, [gate, up]) -> silu(gate) * up, or Gemma's tanh-approximated gelu(gate) * up.

    Written into `out` (rows, width), whose rows may lie apart (stride (any, 1)).
    """
    if has_kernel(gate_up):
        rows, width = out.shape
        gated_activation_kernel[(rows, triton.cdiv(width, 1024))](
            gate_up, out, width, out.stride(0), IS_GELU=is_gelu, BLOCK=1024
        )
        return out
    gate, up = widen(gate_up).chunk(2, dim=-1)
    if is_gelu:
        activated = 0.5 * gate * (1 + torch.tanh(GELU_TANH * (gate + 0.044715 * gate * gate * gate)))
    else:
        activated = gate * torch.sigmoid(gate)
    return out.copy_(activated * up)


def gated_activation_backward(gate_up: Tensor, grad: Tensor, is_gelu: bool, out: Tensor) -> Tensor:
    """The activation's output once more; the gradient of the stacked [gate, up] is written into `out`.

    The rows of `out` may lie apart (stride (any, 1)).
    """
    if has_kernel(gate_up):
        rows, width = grad.shape
        activated = torch.empty_like(grad)
        gated_activation_backward_kernel[(rows, triton.cdiv(width, 1024))](
            gate_up, grad, out, activated, width, out.stride(0), IS_GELU=is_gelu, BLOCK=1024
        )
        return activated
    gate, up = widen(gate_up).chunk(2, dim=-1)
    if is_gelu:
        tanh = torch.tanh(GELU_TANH * (gate + 0.044715 * gate * gate * gate))
        activated = 0.5 * gate * (1 + tanh)
        slope = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * GELU_TANH * (1 + 3 * 0.044715 * gate * gate)
    else:
        sigmoid = torch.sigmoid(gate)
        activated = gate * sigmoid
        slope = sigmoid * (1 + gate * (1 - sigmoid))
    wide = widen(grad)
    out.copy_(torch.cat([wide * up * slope, wide * activated], dim=-1))
    return (activated * up).to(gate_up.dtype)


def quick_gelu(hidden: Tensor) -> Tensor:
    """hidden * sigmoid(1.702 hidden), the activation of CLIP, rounded after each of its three steps as inference rounds it.

    No gradient passes: it is for a vision tower that is frozen.
    """
    if has_kernel(hidden):
        hidden = hidden.contiguous()
        activated = torch.empty_like(hidden)
        quick_gelu_kernel[(triton.cdiv(hidden.numel(), 2048),)](hidden, activated, hidden.numel(), BLOCK=2048)
        return activated
    return hidden * torch.sigmoid(1.702 * hidden)


def split_and_rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, tokens, q + k + v) -> queries and keys turned to their positions, values: (batch, tokens, heads, width).

    `cos` and `sin` are (batch or 1, tokens, width), `heads` the numbers of query heads and of key heads.
    """
    batch, tokens, _ = qkv.shape
    num_heads, num_kv_heads = heads
    width = cos.shape[-1]
    if has_kernel(qkv):
        query = qkv.new_empty(batch, tokens, num_heads, width)
        key, value = (qkv.new_empty(batch, tokens, num_kv_heads, width) for _ in range(2))
        launch_rotate(qkv.view(batch * tokens, -1), query, key, value, cos, sin, backward=False)
        return query, key, value
    stacked = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, width))
    first, second = widen(stacked[:, :, : num_heads + num_kv_heads]).chunk(2, dim=-1)
    cos_first, cos_second = widen(cos)[:, :, None].chunk(2, dim=-1)
    sin_first, sin_second = widen(sin)[:, :, None].chunk(2, dim=-1)
    turned = [first * cos_first - second * sin_first, second * cos_second + first * sin_second]
    query, key = torch.cat(turned, dim=-1).to(qkv.dtype).split(heads, dim=2)
    return query, key, stacked[:, :, num_heads + num_kv_heads :].contiguous()


def split_and_rotate_backward(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Gradients of queries, keys and values -> gradient of the stacked ones, written into `out`.

    `out` is (batch * tokens, q + k + v); its rows may lie apart (stride (any, 1)).
    """
    if has_kernel(query):
        launch_rotate(out, query.contiguous(), key.contiguous(), value.contiguous(), cos, sin, backward=True)
        return
    first, second = widen(torch.cat([query, key], dim=2)).chunk(2, dim=-1)
    cos_first, cos_second = widen(cos)[:, :, None].chunk(2, dim=-1)
    sin_first, sin_second = widen(sin)[:, :, None].chunk(2, dim=-1)
    turned = [first * cos_first + second * sin_second, second * cos_second - first * sin_first]
    out.copy_(torch.cat([torch.cat(turned, dim=-1).to(query.dtype), value], dim=2).flatten(0, 1).flatten(1))


def launch_rotate(
    qkv: Tensor, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, *, backward: bool
) -> None:
    batch, tokens, num_heads, width = query.shape
    num_kv_heads = key.shape[2]
    rotate_kernel[(batch * tokens, 3)](
        qkv, query, key, value, cos, sin, qkv.stride(0), cos.shape[0] * tokens, num_heads, num_kv_heads,
        HALF=width // 2, BLOCK_HALF=triton.next_power_of_2(width // 2), BACKWARD=backward,
        BLOCK_HEADS=triton.next_power_of_2(num_heads), num_warps=8 if num_heads * width > 2048 else 4,
    )  # fmt: skip


MIX = 0x45D9F3B  # multiplier of Thomas Mueller's 32-bit integer hash


def drop(tensor: Tensor, seeds: Tensor, probability: float) -> Tensor:
    """Zero each element with `probability` and scale the others by 1 / (1 - probability).

    `tensor` is (rows, width), its rows may lie apart (stride (any, 1)). The mask is a hash of the element's row and
    column and two 31-bit `seeds`, so it costs no memory: the same seeds give the same mask in the backward pass.
    """
    if has_kernel(tensor):
        rows, width = tensor.shape
        dropped = tensor.new_empty(rows, width)
        threshold = int(probability * 2**31)
        drop_kernel[(rows, triton.cdiv(width, 1024))](
            tensor, seeds, dropped, width, tensor.stride(0), threshold, 1 / (1 - probability), BLOCK=1024
        )
        return dropped
    low_32_bits = 0xFFFFFFFF
    mixed = (torch.arange(tensor.numel(), device=tensor.device) + seeds[0]) & low_32_bits
    for step in range(4):
        if step == 2:
            mixed = mixed ^ seeds[1]
        mixed = ((mixed ^ (mixed >> 16)) * MIX) & low_32_bits
    mixed = (mixed ^ (mixed >> 16)) >> 1
    return torch.where(mixed.view_as(tensor) >= int(probability * 2**31), tensor * (1 / (1 - probability)), 0)


def unpack_4bit(packed: Tensor, scales: Tensor, code: Tensor, block_size: int, out: Tensor) -> Tensor:
    """bitsandbytes' 4-bit numbers, two a byte, the first in the upper half -> `out` (rows, even width).

    Number i is code[...] (16 values) * scales[i // block_size]. The rows of `out` may lie apart (stride (any, 1)), which
    bitsandbytes' own kernel cannot do; its values are these.
    """
    packed = packed.flatten().view(torch.uint8)
    if has_kernel(packed):
        rows, width = out.shape
        unpack_4bit_kernel[(rows, triton.cdiv(width, 2048))](
            packed, scales, code, out, width, out.stride(0), BLOCK_SIZE=block_size, BLOCK=1024
        )
        return out
    numbers = code[torch.stack([packed >> 4, packed & 15], dim=1).flatten().int()]
    return out.copy_((numbers.view(-1, block_size) * scales[:, None]).view(out.shape))


def quantize_rows(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, columns) -> values in FP8 (E4M3) and the fp32 scale of each row, (rows, 1), that brings them back."""
    if has_kernel(tensor):
        rows, width = tensor.shape
        values = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=tensor.device)
        scale = torch.empty(rows, 1, dtype=torch.float32, device=tensor.device)
        quantize_rows_kernel[(rows,)](
            tensor, values, scale, E4M3_MAX, width, BLOCK=min(triton.next_power_of_2(width), 16384), num_warps=8
        )
        return values, scale
    wide = tensor.float()
    scale = wide.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / E4M3_MAX
    return (wide / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


if triton is not None:

    @triton.jit
    def rms_norm_kernel(hidden_ptr, weight_ptr, normed_ptr, width, normed_stride, offset, eps, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside = columns < width
        hidden = tl.load(hidden_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(hidden * hidden, 0) / width + eps)
        normed = hidden * inverse_rms * (offset + weight)
        tl.store(normed_ptr + row * normed_stride + columns, normed, mask=inside)

    @triton.jit
    def rms_norm_backward_kernel(
        hidden_ptr, weight_ptr, grad_ptr, grad_residual_ptr, grad_hidden_ptr, normed_ptr, width, offset, eps,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        inside = columns < width
        places = row * width + columns
        hidden = tl.load(hidden_ptr + places, mask=inside, other=0.0).to(tl.float32)
        scale = offset + tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        scaled = tl.load(grad_ptr + places, mask=inside, other=0.0).to(tl.float32) * scale
        residual = tl.load(grad_residual_ptr + places, mask=inside, other=0.0).to(tl.float32)
        inverse_rms = tl.rsqrt(tl.sum(hidden * hidden, 0) / width + eps)
        normed = hidden * inverse_rms
        through = inverse_rms * (scaled - normed * (tl.sum(scaled * normed, 0) / width))
        tl.store(grad_hidden_ptr + places, through + residual, mask=inside)
        tl.store(normed_ptr + places, normed * scale, mask=inside)

    @triton.jit
    def activation(gate, IS_GELU: tl.constexpr):
        """Activated gate and the slope there."""
        if IS_GELU:
            inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
            tanh = 2 * tl.sigmoid(2 * inner) - 1
            activated = 0.5 * gate * (1 + tanh)
            inner_slope = 0.7978845608028654 * (1 + 3 * 0.044715 * gate * gate)
            slope = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * inner_slope
        else:
            sigmoid = tl.sigmoid(gate)
            activated = gate * sigmoid
            slope = sigmoid * (1 + gate * (1 - sigmoid))
        return activated, slope

    @triton.jit
    def gated_activation_kernel(
        gate_up_ptr, activated_ptr, width, activated_stride, IS_GELU: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        gate = tl.load(gate_up_ptr + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
        activated, _ = activation(gate, IS_GELU)
        tl.store(activated_ptr + row * activated_stride + columns, activated * up, mask=inside)

    @triton.jit
    def gated_activation_backward_kernel(
        gate_up_ptr, grad_ptr, out_ptr, activated_ptr, width, out_stride, IS_GELU: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        gate_place = row * 2 * width + columns
        gate = tl.load(gate_up_ptr + gate_place, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + gate_place + width, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        activated, slope = activation(gate, IS_GELU)
        tl.store(out_ptr + row * out_stride + columns, grad * up * slope, mask=inside)
        tl.store(out_ptr + row * out_stride + width + columns, grad * activated, mask=inside)
        tl.store(activated_ptr + row * width + columns, activated * up, mask=inside)

    @triton.jit
    def quick_gelu_kernel(hidden_ptr, activated_ptr, size, BLOCK: tl.constexpr):
        places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = places < size
        hidden = tl.load(hidden_ptr + places, mask=inside, other=0.0)
        scaled = (1.702 * hidden.to(tl.float32)).to(hidden.dtype)
        sigmoid = tl.sigmoid(scaled.to(tl.float32)).to(hidden.dtype)
        tl.store(activated_ptr + places, hidden.to(tl.float32) * sigmoid.to(tl.float32), mask=inside)

    @triton.jit
    def rotate_kernel(
        qkv_ptr, query_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, qkv_stride, positions, num_heads, num_kv_heads,
        HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BACKWARD: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        part = tl.program_id(1)  # queries, keys, values
        heads = num_heads
        before = 0
        part_ptr = query_ptr
        if part == 1:
            heads = num_kv_heads
            before = num_heads
            part_ptr = key_ptr
        if part == 2:
            heads = num_kv_heads
            before = num_heads + num_kv_heads
            part_ptr = value_ptr
        head = tl.arange(0, BLOCK_HEADS)[:, None]
        column = tl.arange(0, BLOCK_HALF)[None, :]
        inside = (head < heads) & (column < HALF)
        stacked = qkv_ptr + row * qkv_stride + (before + head) * 2 * HALF + column
        alone = part_ptr + (row * heads + head) * 2 * HALF + column
        if BACKWARD:
            first = tl.load(alone, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(alone + HALF, mask=inside, other=0.0).to(tl.float32)
        else:
            first = tl.load(stacked, mask=inside, other=0.0).to(tl.float32)
            second = tl.load(stacked + HALF, mask=inside, other=0.0).to(tl.float32)
        if part < 2:
            angle = (row % positions) * 2 * HALF + column
            cos_first = tl.load(cos_ptr + angle, mask=column < HALF, other=0.0).to(tl.float32)
            cos_second = tl.load(cos_ptr + angle + HALF, mask=column < HALF, other=0.0).to(tl.float32)
            sin_first = tl.load(sin_ptr + angle, mask=column < HALF, other=0.0).to(tl.float32)
            sin_second = tl.load(sin_ptr + angle + HALF, mask=column < HALF, other=0.0).to(tl.float32)
            if BACKWARD:
                turned = first * cos_first + second * sin_second
                second = second * cos_second - first * sin_first
            else:
                turned = first * cos_first - second * sin_first
                second = second * cos_second + first * sin_second
            first = turned
        if BACKWARD:
            tl.store(stacked, first, mask=inside)
            tl.store(stacked + HALF, second, mask=inside)
        else:
            tl.store(alone, first, mask=inside)
            tl.store(alone + HALF, second, mask=inside)

    @triton.jit
    def drop_kernel(tensor_ptr, seeds_ptr, dropped_ptr, width, stride, threshold, scale, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        places = row * width + columns
        mixed = (places + tl.load(seeds_ptr)).to(tl.uint32)
        second_seed = tl.load(seeds_ptr + 1).to(tl.uint32)
        for step in tl.static_range(4):
            if step == 2:
                mixed = mixed ^ second_seed
            mixed = (mixed ^ (mixed >> 16)) * 0x45D9F3B
        mixed = (mixed ^ (mixed >> 16)) >> 1
        values = tl.load(tensor_ptr + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
        kept = tl.where(mixed.to(tl.int32) >= threshold, values * scale, 0.0)
        tl.store(dropped_ptr + places, kept, mask=inside)

    @triton.jit
    def unpack_4bit_kernel(
        packed_ptr, scales_ptr, code_ptr, out_ptr, width, out_stride, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = 2 * byte < width
        packed = tl.load(packed_ptr + row * (width // 2) + byte, mask=inside, other=0).to(tl.int32)
        scale = tl.load(scales_ptr + (row * width + 2 * byte) // BLOCK_SIZE, mask=inside, other=0.0)
        first = tl.load(code_ptr + (packed >> 4)) * scale
        second = tl.load(code_ptr + (packed & 15)) * scale
        column = tl.program_id(1) * 2 * BLOCK + tl.arange(0, 2 * BLOCK)
        tl.store(out_ptr + row * out_stride + column, tl.interleave(first, second), mask=column < width)

    @triton.jit
    def quantize_rows_kernel(tensor_ptr, values_ptr, scale_ptr, largest, width: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        columns = tl.arange(0, BLOCK)
        maximum = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, width, BLOCK):
            inside = start + columns < width
            part = tl.load(tensor_ptr + row * width + start + columns, mask=inside, other=0.0).to(tl.float32)
            maximum = tl.maximum(maximum, tl.abs(part))
        scale = tl.maximum(tl.max(maximum, 0), 1e-12) / largest
        tl.store(scale_ptr + row, scale)
        inverse = 1.0 / scale
        for start in range(0, width, BLOCK):
            inside = start + columns < width
            part = tl.load(tensor_ptr + row * width + start + columns, mask=inside, other=0.0).to(tl.float32)
            quantized = tl.minimum(tl.maximum(part * inverse, -largest), largest)
            tl.store(values_ptr + row * width + start + columns, quantized.to(tl.float8e4nv), mask=inside)
