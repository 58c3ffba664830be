"""What a decoder layer keeps for its backward pass, and what it allocates on the way: bytes, in the order of allocation.

`FusedLayer` follows `kernels/lora_layers.py` function by function, `PlainLayer` transformers' own layers under autocast.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from finetuning.preflight.planned_step import Batch, Training

STASH = 5  # inputs of layers that TRL's offloading has on the GPU, on their way to main memory


class Ledger:
    """Bytes that are live, by part, and what they were at the highest moment."""

    def __init__(self):
        self.live: Counter[str] = Counter()
        self.at_peak: dict[str, float] = {}
        self.total = self.peak = 0.0

    def add(self, part: str, size: float) -> None:
        """Allocate `size` bytes, or free them where negative."""
        self.live[part] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.live)

    @contextmanager
    def during(self, part: str, *sizes: float) -> Iterator[None]:
        """Allocated in order, and freed together."""
        for size in sizes:
            self.add(part, size)
        yield
        self.add(part, -sum(sizes))


@dataclass(frozen=True)
class Stack:
    """Linear layers that read one activation: a `ProjectionStack`. `rank` is the sum of their ranks, `outer` of their outputs.

    `alike` is their number where all have one shape, else 1: each B is then kept without the zeros beside it.
    """

    inner: int
    outer: int
    rank: int
    alike: int = 1

    def row(self, width: int) -> int:
        """Numbers of a row with room for the low-rank columns, as `ProjectionStack.row_length`."""
        return -(-(width + self.rank) // 64) * 64

    @property
    def joined(self) -> int:
        """Numbers of W with B behind it and s A below it."""
        return (self.outer + self.rank) * self.row(self.inner)


class Layer:
    """A decoder layer: `forward` and `backward` write into a ledger."""

    def __init__(self, training: Training, batch: Batch, index: int):
        self.training, self.batch, self.index = training, batch, index
        text = training.shape.text
        self.width, self.mlp, self.query, self.kv = text.width, text.mlp_width, text.query_width, text.kv_width
        self.heads, self.tokens = text.heads, batch.tokens
        self.size, self.residual = training.compute_bytes, training.residual_bytes
        self.is_last = index == text.layers - 1

    def keep(self) -> float:
        """Bytes that the layer keeps for its backward pass beside its input, without checkpointing."""
        raise NotImplementedError

    def working_forward(self) -> Iterator[list[float]]:
        """Bytes of what is allocated at the same time and freed, one list for each part of the forward pass."""
        raise NotImplementedError

    def working_backward(self) -> Iterator[tuple[float, list[float]]]:
        """(bytes kept that this part of the backward pass frees when it has ended, bytes allocated at the same time)."""
        raise NotImplementedError

    @property
    def output(self) -> float:
        """Bytes of the layer's output, which the next one keeps as its input."""
        return self.tokens * self.width * self.residual

    def forward(self, ledger: Ledger, *, keeps: bool) -> None:
        """The forward pass; `keeps` or not what the backward pass needs."""
        kept = self.keep()
        if keeps:
            ledger.add("activations", kept)
        for sizes in self.working_forward():
            with ledger.during("working memory", *sizes):
                pass
        ledger.add("activations", self.output - self.offloaded)

    @property
    def offloaded(self) -> float:
        """Bytes that lie in main memory between the forward pass and the backward pass."""
        return self.output if self.training.offloads_inputs and self.index >= STASH else 0.0

    def backward(self, ledger: Ledger, *, kept: bool) -> None:
        """The backward pass; without `kept` the forward pass again before it."""
        ledger.add("activations", self.offloaded)
        if not kept:
            ledger.add("activations", self.keep())
            for sizes in self.working_forward():
                with ledger.during("working memory", *sizes):
                    pass
        freed = 0.0
        for frees, sizes in self.working_backward():
            with ledger.during("working memory", *sizes):
                pass
            ledger.add("activations", -frees)
            freed += frees
        ledger.add("activations", freed - self.keep() - self.output)


class FusedLayer(Layer):
    """`FusedDecoderLayer`: four products, hand-written gradients."""

    def __init__(self, training: Training, batch: Batch, index: int):
        super().__init__(training, batch, index)
        rank = training.rank
        qkv = self.query + 2 * self.kv
        alike = 3 if self.kv == self.query else 1
        self.qkv = Stack(self.width, qkv, 3 * rank, alike)
        self.o = Stack(self.query, self.width, rank)
        self.gate_up = Stack(self.width, 2 * self.mlp, 2 * rank, 2)
        self.down = Stack(self.mlp, self.width, rank)
        # After its attention the last layer computes the rows alone that the loss reads.
        self.rows = batch.supervised if self.is_last else self.tokens
        self.drops = training.dropout > 0
        self.is_dense = training.joins_weights

    @property
    def stacks(self) -> list[Stack]:
        """In the order of computation."""
        return [self.qkv, self.o, self.gate_up, self.down]

    def unpacked(self, stack: Stack, *, backward: bool = False) -> list[float]:
        """Bytes of W in the type of the products with B behind it, or s A below it; nothing where it is kept so."""
        if self.is_dense or self.training.base_precision == "int8":
            return []
        scales = [4 * stack.inner * stack.outer / 64] if self.training.bits == 4 and self.training.nested else []
        if not backward:
            return [self.size * stack.outer * stack.row(stack.inner), *scales]
        return [self.size * (stack.outer + (0 if self.drops else stack.rank)) * stack.inner, *scales]

    def unscaled(self, stack: Stack) -> int:
        """Numbers of a token's outputs that DoRA keeps before their scale."""
        return stack.outer if self.training.dora else 0

    def scaling(self, stack: Stack, rows: int, *, in_place: bool) -> list[float]:
        """Bytes that DoRA's backward pass of a product takes: products in fp32, and the scaled gradient."""
        if not self.training.dora:
            return []
        return [rows * stack.outer * (4 if in_place else 4 + self.size)]

    @property
    def expands_kv(self) -> bool:
        """Whether keys and values are copied for every query head of their group: packed and shared rows, masks."""
        return self.kv < self.query and (self.training.packs_rows or bool(self.batch.prefix) or self.has_mask)

    @property
    def has_mask(self) -> bool:
        """Whether attention is given a mask: Gemma 3's windows and pictures are in one."""
        return self.training.shape.text.norms_heads

    @property
    def attended_kv(self) -> int:
        """Width of keys, and of values, that the attention keeps."""
        return self.query if self.expands_kv else self.kv

    def keep_attention(self) -> float:
        """x s A of q, k and v; queries, keys, values, outputs, log-sum-exp."""
        expanded = 2 * self.attended_kv if self.expands_kv else 0
        own_kv = 0 if self.has_mask else 2 * self.kv
        states = 3 * self.training.rank + self.unscaled(self.qkv) + 2 * self.query + own_kv + expanded
        bias = 0.0
        if self.batch.prefix:
            rest = self.batch.length - self.batch.prefix
            bias = self.batch.rows * rest * rest * self.size
        if self.has_mask:
            states += self.query + 2 * self.kv  # before the norms of heads
            bias = self.tokens * self.batch.length * self.size  # the mask, as numbers
        return self.tokens * (states * self.size + 4 * self.heads) + bias

    def keep_output(self) -> float:
        """Of the o projection: x s A; and what the last layer selects of the attended."""
        selected = self.rows * self.query * self.size if self.is_last else 0
        return self.rows * (self.training.rank + self.unscaled(self.o) + self.normed) * self.size + selected

    def keep_mlp(self) -> float:
        """The residual stream, gate and up, and both x s A."""
        low_rank = 3 * self.training.rank + self.unscaled(self.gate_up) + self.unscaled(self.down)
        return self.rows * (self.width * self.residual + (2 * self.mlp + low_rank + self.normed) * self.size)

    @property
    def normed(self) -> int:
        """Width of a product that is kept for the norm behind it; 0 without one."""
        return self.width if self.training.shape.text.norms_heads else 0

    def keep(self) -> float:
        return self.keep_attention() + self.keep_output() + self.keep_mlp()

    def working_forward(self) -> Iterator[list[float]]:
        n, rows, size = self.tokens, self.rows, self.size
        dropped = [n * self.width * size] if self.drops else []
        yield [n * self.qkv.row(self.width) * size, *dropped]
        before = [n * self.unscaled(self.qkv) * size]
        yield [n * self.qkv.row(self.width) * size, *self.unpacked(self.qkv), n * self.qkv.outer * size, *before]
        before = [rows * self.unscaled(self.o) * size]
        yield [rows * self.o.row(self.query) * size, *self.unpacked(self.o), rows * self.width * size, *before]
        gate_up = rows * self.gate_up.row(self.width) * size
        yield [gate_up, *self.unpacked(self.gate_up), rows * self.unscaled(self.gate_up) * size]
        down = rows * self.down.row(self.mlp) * size
        yield [gate_up, down, *([rows * self.mlp * size] if self.drops else [])]
        before = [rows * self.unscaled(self.down) * size]
        yield [gate_up, down, *self.unpacked(self.down), rows * self.width * size, *before]

    def working_backward(self) -> Iterator[tuple[float, list[float]]]:
        yield from self.backward_mlp()
        n, rows, size = self.tokens, self.rows, self.size
        twice = 2 if self.drops else 1
        scaling = self.scaling(self.o, rows, in_place=False)
        yield self.keep_output(), [rows * self.query * size * twice, *self.unpacked(self.o, backward=True), *scaling]
        selected = n * (self.query + self.width) * size if self.is_last else 0
        grads = n * (self.query + 2 * self.attended_kv) * size
        yield 0, [selected, n * self.query * size, grads, *self.attention_workspace()]
        states = n * (self.query + 2 * self.kv) * size
        yield self.keep_attention() - 3 * self.training.rank * n * size, []
        grad = n * (self.qkv.outer if self.drops else self.qkv.row(self.qkv.outer)) * size
        grad_x = n * self.width * size * twice
        yield 0, [states, grad, *self.scaling(self.qkv, n, in_place=True)]
        yield 0, [states, grad, *self.unpacked(self.qkv, backward=True), grad_x]
        yield 3 * self.training.rank * n * size, [states, grad, grad_x, self.output, n * self.width * size * twice]

    def attention_workspace(self) -> list[float]:
        """fp32 sums of the gradient of the queries, and row sums (FlashAttention-2, arXiv 2307.08691, section 3.1)."""
        return [4 * self.tokens * self.query, 4 * self.tokens * self.heads]

    def backward_mlp(self) -> Iterator[tuple[float, list[float]]]:
        """`NormMlp.backward`."""
        rows, size = self.rows, self.size
        twice = 2 if self.drops else 1
        grad_y = rows * self.width * size if self.residual != size else 0
        joined = [] if self.drops else [rows * self.down.row(self.width) * size]
        grad_x = rows * self.mlp * size
        yield 0, [grad_y, *joined, *self.unpacked(self.down, backward=True), grad_x * twice]
        yield 0, [grad_y, *joined, *self.scaling(self.down, rows, in_place=False)]
        outer = self.gate_up.outer if self.drops else self.gate_up.row(self.gate_up.outer)
        grad = rows * outer * size
        yield 0, [grad_y, grad_x, grad, grad_x * twice]
        yield 0, [grad_y, grad, *self.scaling(self.gate_up, rows, in_place=True)]
        grad_x = rows * self.width * size
        yield 0, [grad_y, grad, *self.unpacked(self.gate_up, backward=True), grad_x * twice]
        normed = rows * self.width * size * twice
        yield self.keep_mlp(), [grad_y, grad, grad_x, rows * self.width * self.residual, normed]


class PlainLayer(Layer):
    """transformers' Llama or Gemma layer, its linear layers with PEFT's LoRA or trained in full, under autocast."""

    def keep(self) -> float:
        training, n, size = self.training, self.tokens, self.size
        casts = 4 if self.residual != size else 0
        # Norms: their input is the residual stream; in fp32, its product with 1/rms, twice a layer.
        norms = n * self.width * (self.residual + 2 * 4)
        # Inputs of q, k, v, of gate and up: one cast for each.
        inputs = n * self.width * size * (5 if self.residual != size else 2)
        attention = n * (size * (2 * self.query + 2 * self.kv) + 4 * self.heads)
        if self.kv < self.query:
            attention += n * size * 2 * self.query
        mlp = n * size * 4 * self.mlp
        kept = norms + inputs + attention + mlp + casts * 0
        if training.placement["language_model"] == "lora":
            # PEFT casts each input to fp32 and, under autocast, back; keeps it and x A.
            adapted = [
                s
                for name, s in training.shape.text.projections.items()
                if not training.targets or name in training.targets
            ]
            kept += n * sum(4 * inner + size * (inner + training.rank) for inner, _ in adapted)
        return kept

    def working_forward(self) -> Iterator[list[float]]:
        n = self.tokens
        yield [n * self.width * 4 * 3]
        yield [n * self.mlp * self.size * 2]

    def working_backward(self) -> Iterator[tuple[float, list[float]]]:
        n, size = self.tokens, self.size
        largest = self.mlp * self.width
        weight = (4 + size) * largest if self.training.placement["language_model"] == "full" else 0
        weight += size * largest if self.training.bits is not None else 0
        yield 0, [n * self.mlp * size * 3, weight]
        yield n * (size * 4 * self.mlp), [n * self.mlp * size * 2, weight, n * self.width * 4]
        yield 0, [n * self.width * 4 * 4]
        yield 0, [n * self.query * size * 4, 4 * n * self.query]
        yield 0, [n * self.width * 4 * 4]
