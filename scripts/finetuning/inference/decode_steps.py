"""The rows of a batch while they are answered: a token a step, on a GPU as CUDA graphs."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from finetuning.inference.packed_decoder import KeyValuePool, PackedDecoder

# Rows that a step is prepared for. A batch takes the next larger one, and its other rows are idle.
STEP_SIZES = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512]


@dataclass
class NewRows:
    """Rows whose prompts are computed: the first token of each answer, the prompts' lengths, the runs of their keys."""

    first_tokens: Tensor
    lengths: list[int]
    runs: list[list[tuple[int, int]]]


class DecodeSteps:
    """The rows of a batch while they are answered, a token a step, in memory that CUDA graphs can keep reading.

    `as_named(name)` is a context in which the model of that name answers. Graphs are kept for each name.
    """

    def __init__(
        self,
        decoder: PackedDecoder,
        pool: KeyValuePool,
        stops: Tensor,
        max_new_tokens: int,
        as_named: Callable[[str], AbstractContextManager],
    ):
        self.decoder, self.pool, self.stops, self.max_new_tokens = decoder, pool, stops, max_new_tokens
        self.as_named = as_named
        self.is_cuda = decoder.device.type == "cuda"
        self.capacity = 0
        self.graphs: dict[tuple[int, str], torch.cuda.CUDAGraph | None] = {}
        if self.is_cuda:
            self.memory, self.recording = torch.cuda.graph_pool_handle(), torch.cuda.Stream(decoder.device)

    def begin(self, rows: int) -> None:
        """Room for so many rows, all of them still to be added."""
        size = step_size(rows)
        if size > self.capacity:
            self.capacity = size
            self.graphs.clear()
            device = self.decoder.device
            self.tokens = torch.zeros(size, dtype=torch.long, device=device)
            self.positions = torch.zeros(size, dtype=torch.long, device=device)
            self.slots = torch.zeros(size, dtype=torch.long, device=device)
            self.runs = torch.zeros(size, 3, 2, dtype=torch.int32, device=device)
            self.alive = torch.zeros(size, dtype=torch.long, device=device)
            self.out = torch.zeros(size, self.max_new_tokens, dtype=torch.long, device=device)
            self.counts = torch.zeros(size, dtype=torch.long, device=device)
        self.num_rows = 0

    def add(self, rows: NewRows) -> None:
        """Rows whose prompts are computed."""
        new = slice(self.num_rows, self.num_rows + len(rows.lengths))
        padded = [[*([(0, 0)] * (2 - len(parts))), *parts, (0, 0)] for parts in rows.runs]
        self.runs[new] = torch.tensor(padded, dtype=torch.int32).to(self.runs.device, non_blocking=True)
        self.positions[new] = torch.tensor(rows.lengths).to(self.positions.device, non_blocking=True)
        self.tokens[new] = rows.first_tokens
        self.out[new, 0] = rows.first_tokens
        self.counts[new] = 1
        self.alive[new] = self.goes_on(rows.first_tokens)
        self.num_rows = new.stop

    def place_answers(self, first_slot: int) -> None:
        """The answers' slots, `max_new_tokens` a row, begin at `first_slot`."""
        own = first_slot + self.max_new_tokens * torch.arange(self.num_rows, device=self.slots.device)
        self.slots[: self.num_rows] = own
        self.runs[: self.num_rows, 2, 0] = own.int()
        self.idle(self.num_rows)

    def idle(self, first: int) -> None:
        """Rows from `first` on do nothing: they read and write the slot that belongs to nobody."""
        rest = slice(first, self.capacity)
        self.tokens[rest] = self.positions[rest] = self.alive[rest] = self.counts[rest] = 0
        self.slots[rest] = self.pool.slots
        self.runs[rest] = 0
        self.runs[rest, 2] = torch.tensor([self.pool.slots, 1], dtype=torch.int32, device=self.runs.device)

    def run(self, name: str, on_token: Callable[[int], None] | None = None) -> list[list[int]]:
        """Tokens of each row's answer by the model `name`, with the one that ends it."""
        if self.is_cuda:
            return self.run_steps(partial(self.step, name=name), on_token)
        with self.as_named(name):
            return self.run_steps(self.compute, on_token)

    def run_steps(self, step: Callable[[int], None], on_token: Callable[[int], None] | None) -> list[list[int]]:
        """`step(size)` until every row has ended."""
        answers: list[list[int]] = [[]] * self.num_rows
        numbers = list(range(self.num_rows))  # the row that each place of the batch holds
        size = step_size(self.num_rows)
        if on_token:
            on_token(int(self.tokens[0]))
        alive = self.alive.tolist()[: self.num_rows]
        for length in range(1, self.max_new_tokens + 1):
            num_alive = sum(alive)
            last = not num_alive or length == self.max_new_tokens
            if last or step_size(num_alive) <= size // 2:
                self.collect(numbers, [] if last else alive, answers)
                if last:
                    break
                keep = [place for place, is_alive in enumerate(alive) if is_alive]
                numbers, size = self.compact(keep, numbers), step_size(len(keep))
            step(size)
            alive = self.alive[: len(numbers)].tolist()
            if on_token:
                on_token(int(self.tokens[0]))
        return answers

    def collect(self, numbers: list[int], alive: list[int], answers: list[list[int]]) -> None:
        """Read the answers of rows that have ended; of all where `alive` is empty."""
        counts, tokens = self.counts.tolist(), self.out.tolist()
        for place, number in enumerate(numbers):
            if not alive or not alive[place]:
                answers[number] = tokens[place][: counts[place]]

    def compact(self, keep: list[int], numbers: list[int]) -> list[int]:
        """Move the rows in the places `keep` to the front; their entries of `numbers` are returned."""
        places = torch.tensor(keep, device=self.tokens.device)
        for state in (self.tokens, self.positions, self.slots, self.runs, self.alive, self.out, self.counts):
            state[: len(keep)] = state[places]
        self.idle(len(keep))
        return [numbers[place] for place in keep]

    def step(self, size: int, name: str) -> None:
        """A token for each of the first `size` places: recorded at its second use, launched as one from then on."""
        graph = self.graphs.get((size, name))
        if graph is None:
            with self.as_named(name):
                if (size, name) in self.graphs:
                    graph = self.record(size)
                else:
                    self.compute(size)  # libraries load and kernels are compiled, which cannot be recorded
            self.graphs[size, name] = graph
        if graph is not None:
            graph.replay()

    def record(self, size: int) -> torch.cuda.CUDAGraph:
        """One step as a graph. `torch.cuda.graph` would wait for the GPU and give all of its free memory back first."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.recording):
            graph.capture_begin(pool=self.memory, capture_error_mode="thread_local")
            try:
                self.compute(size)
            finally:
                graph.capture_end()
        return graph

    def compute(self, size: int) -> None:
        """One decode step of the first `size` places, in place: no value is read on the host."""
        decoder = self.decoder
        alive = self.alive[:size]
        tokens, positions, slots, runs = self.tokens[:size], self.positions[:size], self.slots[:size], self.runs[:size]
        runs[:, 2, 1] += alive.int()
        hidden = decoder.decode(decoder.text_model.embed_tokens(tokens), positions, runs, slots, self.pool)
        chosen = decoder.logits(hidden).argmax(-1)
        tokens.copy_(torch.where(alive.bool(), chosen, tokens))
        counts = self.counts[:size]
        place = counts.clamp(max=self.max_new_tokens - 1)[:, None]
        out = self.out[:size]
        out.scatter_(1, place, torch.where(alive[:, None].bool(), tokens[:, None], out.gather(1, place)))
        counts += alive
        positions += alive
        slots += alive
        alive *= self.goes_on(tokens)

    def goes_on(self, tokens: Tensor) -> Tensor:
        """(rows,) of 1 where the token ends no answer, else 0."""
        return (tokens[:, None] != self.stops).all(1).long()


def step_size(rows: int) -> int:
    """The smallest recorded size that holds so many rows."""
    return next((size for size in STEP_SIZES if size >= rows), rows)
