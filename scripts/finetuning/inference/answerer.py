"""Greedy answers of one model on one device, a batch at a time: prompts computed in chunks, then all answers together.

A chunk of prompts is one flat sequence without padding; pictures are seen once, and image prefixes computed once for all
questions about them. Then every row of the batch gets a token a step. On a GPU a step is a CUDA graph, because its 700
kernels take the host longer than the GPU. Rows that have ended leave the batch when half of it has.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor

from finetuning.data.collator import stop_tokens
from finetuning.inference.packed_decoder import KeyValuePool, PackedDecoder
from finetuning.inference.packed_prompts import PackedPrompts, Segment
from finetuning.inference.prompt_reader import PromptGroup

CHUNK_TOKENS = 32768  # more make no product faster
MOST_ROWS = 256  # of an automatic batch on a GPU
MOST_ROWS_ON_CPU = 64
SPARE_BYTES = 2**30  # left for graphs, logits and the allocator's rounding
# Rows that a step is prepared for. A batch takes the next larger one, and its other rows are idle.
STEP_SIZES = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512]


@dataclass
class Chunk:
    """Prompts computed in one pass: their flat layout, and for each row its last token and the runs of its keys."""

    prompts: PackedPrompts
    rows: list[int]
    last: list[int]
    runs: list[list[tuple[int, int]]]  # of each row: (first token, tokens) of the prefix and of its own part
    pixel_values: Tensor | None


class Answerer:
    """Answers groups of prompts with `model`; several models at once are the adapter's `tuned` and `base`.

    `batch_size` is the most rows at once, `auto` what free memory holds. A batch that does not fit is halved, which is
    said through `say`. `on_token` sees each token of a single row as it comes.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        processing_class,
        *,
        max_new_tokens: int,
        batch_size: int | str = "auto",
        say: Callable[[str], None] = print,
    ):
        self.decoder = PackedDecoder(model)
        self.model, self.max_new_tokens, self.say = model, max_new_tokens, say
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.stops = torch.tensor(stop_tokens(processing_class), device=self.decoder.device)
        self.image_token = getattr(processing_class, "image_token_id", None)
        self.is_cuda = self.decoder.device.type == "cuda"
        self.most_rows = (MOST_ROWS if self.is_cuda else MOST_ROWS_ON_CPU) if batch_size == "auto" else int(batch_size)
        self.chunk_tokens = CHUNK_TOKENS
        self.pool: KeyValuePool | None = None
        self.steps: DecodeSteps | None = None

    # Batches

    def batches(self, groups: Iterable[PromptGroup]) -> Iterable[list[PromptGroup]]:
        """Groups joined to batches of as many rows as fit; a group that is larger alone is divided."""
        batch: list[PromptGroup] = []
        num_rows = num_slots = 0
        for group in groups:
            for part in self.divided(group):
                rows, slots = len(part.rows), self.slots_of(part)
                self.make_room(slots, rows)
                if batch and (num_rows + rows > self.most_rows or num_slots + slots > self.pool.slots):
                    yield batch
                    batch, num_rows, num_slots = [], 0, 0
                batch.append(part)
                num_rows, num_slots = num_rows + rows, num_slots + slots
        if batch:
            yield batch

    def divided(self, group: PromptGroup) -> list[PromptGroup]:
        """The group in parts of at most `most_rows` rows."""
        if len(group.rows) <= self.most_rows:
            return [group]
        return [part for half in group.split() for part in self.divided(half)]

    def slots_of(self, group: PromptGroup) -> int:
        """Slots of keys and values that the group takes: its tokens, and the answers of its rows."""
        return group.num_tokens + len(group.rows) * self.max_new_tokens

    def make_room(self, slots: int, rows: int) -> None:
        """A pool for `most_rows` rows like these, or for what free memory holds; a new one where the old is too small."""
        if self.pool is not None and self.pool.slots >= slots:
            return
        self.pool = self.steps = None
        wanted = max(slots, -(-slots * self.most_rows // rows))
        if self.is_cuda:
            free = torch.cuda.mem_get_info(self.decoder.device)[0]
            free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            of_chunk = self.decoder.bytes_of_token() * self.chunk_tokens
            while self.chunk_tokens > 1024 and of_chunk > (free - SPARE_BYTES) // 3:
                self.chunk_tokens //= 2
                of_chunk //= 2
            wanted = min(wanted, max(slots, int(0.9 * (free - of_chunk - SPARE_BYTES)) // self.decoder.bytes_of_slot()))
        self.pool = KeyValuePool(self.decoder, wanted)
        self.steps = DecodeSteps(self.decoder, self.pool, self.stops, self.max_new_tokens, self.tokenizer.pad_token_id)

    # Answers

    @torch.no_grad()
    def answer(
        self,
        groups: Sequence[PromptGroup],
        names: Sequence[str] = ("tuned",),
        on_token: Callable[[int], None] | None = None,
    ) -> dict[int, dict[str, str]]:
        """One batch of `batches` -> row number -> the answer of each name."""
        return self.fit(groups, lambda part: self.answer_once(part, names, on_token))

    def fit(self, groups: Sequence[PromptGroup], compute: Callable[[Sequence[PromptGroup]], dict]) -> dict:
        """`compute` of a batch, or of its halves where it does not fit; both are joined. Raises ValueError where nothing does."""
        try:
            return compute(groups)
        except torch.OutOfMemoryError:
            rows = sum(len(group.rows) for group in groups)
            halves = halved(groups)
            if halves is None:
                raise ValueError(
                    "the GPU has no memory for a single question: close other programs on it, or load the model in 4 bits"
                ) from None
        # Outside of the handler, which would keep the failed pass's tensors alive.
        self.pool = self.steps = None
        if self.is_cuda:
            torch.cuda.empty_cache()
        self.most_rows = max(1, rows // 2)
        self.chunk_tokens = max(1024, self.chunk_tokens // 2)
        self.say(
            f"A batch of {rows} questions does not fit the GPU's memory: at most {self.most_rows} at once from here"
        )
        results = {}
        for half in halves:
            for batch in self.batches(half):
                results |= self.fit(batch, compute)
        return results

    def answer_once(self, groups, names, on_token) -> dict[int, dict[str, str]]:
        """Answers of all groups by each named model: row -> name -> text. Pictures are encoded once where all see alike."""
        self.make_room(sum(map(self.slots_of, groups)), sum(len(group.rows) for group in groups))
        chunks = [self.lay_out(part) for part in self.chunks(groups)]
        features: list[Tensor | None] = []
        answers: dict[int, dict[str, str]] = {row: {} for chunk in chunks for row in chunk.rows}
        for name in names:
            with self.as_named(name):
                if not features or not self.sees_alike():
                    features = [self.see(chunk) for chunk in chunks]
                for row, text in self.decode_rows(chunks, features, on_token).items():
                    answers[row][name] = text
        return answers

    @contextmanager
    def as_named(self, name: str) -> Iterator[None]:
        """The model that answers as `name`: a PeftModel's base with its adapter off, else the model as it is."""
        off = self.model.disable_adapter() if name == "base" and isinstance(self.model, PeftModel) else nullcontext()
        with off:
            self.decoder.refresh()
            yield

    def chunks(self, groups: Sequence[PromptGroup]) -> list[list[PromptGroup]]:
        """Groups in passes of about `chunk_tokens`, evenly."""
        total = sum(group.num_tokens for group in groups)
        share = total / -(-total // self.chunk_tokens)
        chunks: list[list[PromptGroup]] = [[]]
        tokens = 0
        for group in groups:
            if chunks[-1] and tokens + group.num_tokens / 2 > share * len(chunks):
                chunks.append([])
            chunks[-1].append(group)
            tokens += group.num_tokens
        return chunks

    def lay_out(self, groups: Sequence[PromptGroup]) -> Chunk:
        """Groups as one chunk: prefixes first, then what rows add to theirs, and the runs that each row will read."""
        alone, shared = by_length(groups)
        ordered = alone + shared
        segments = [Segment(group.prefix) for group in ordered]
        segments += [Segment(own, len(alone) + number) for number, group in enumerate(shared) for own in group.own]
        prompts = PackedPrompts(segments, self.decoder.device)
        last, runs = [], []
        leaves = [(number, None) for number in range(len(alone))]
        leaves += [(segment.parent, len(ordered) + place) for place, segment in enumerate(segments[len(ordered) :])]
        for first, own in leaves:
            ends = prompts.ends[first if own is None else own]
            last.append(ends - 1)
            parts = [first] if own is None else [first, own]
            runs.append([(prompts.starts[part], prompts.lengths[part]) for part in parts])
        rows = [number for group in ordered for number in group.rows]
        pictures = [group.pixel_values for group in ordered if group.pixel_values is not None]
        pixel_values = torch.cat(pictures) if pictures else None
        return Chunk(prompts, rows, last, runs, pixel_values)

    def sees_alike(self) -> bool:
        """Whether base and adapter see a picture alike: nothing of the tower or the projector was trained."""
        parts = [getattr(self.decoder.base.model, name, None) for name in ("vision_tower", "multi_modal_projector")]
        modules = [module for part in parts if part is not None for module in part.modules()]
        return not any(isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)) for module in modules)

    def see(self, chunk: Chunk) -> Tensor | None:
        """Features of the chunk's pictures (image tokens, width)."""
        if chunk.pixel_values is None:
            return None
        base = self.decoder.base
        pixel_values = chunk.pixel_values.to(self.decoder.device, base.dtype, non_blocking=True)
        return torch.cat(list(base.model.get_image_features(pixel_values=pixel_values).pooler_output))

    def decode_rows(self, chunks: Sequence[Chunk], features: Sequence[Tensor | None], on_token) -> dict[int, str]:
        """Answers of the chunks' rows, as row -> text."""
        rows = [row for chunk in chunks for row in chunk.rows]
        self.steps.begin(len(rows))
        first_slot = 0
        for chunk, seen in zip(chunks, features, strict=True):
            first_slot = self.prefill_chunk(chunk, seen, first_slot)
        self.steps.place_answers(first_slot)
        texts = self.tokenizer.batch_decode(self.decode_steps(on_token), skip_special_tokens=True)
        return {row: text.strip() for row, text in zip(rows, texts, strict=True)}

    def prefill_chunk(self, chunk: Chunk, features: Tensor | None, first_slot: int) -> int:
        """Compute prompts, whose tokens take the slots from `first_slot` on. Returns the next free slot."""
        hidden = self.embed(chunk.prompts.tokens, features)
        asked = torch.tensor(chunk.last, device=self.decoder.device)
        last = self.decoder.prefill(hidden, chunk.prompts, asked, self.pool, first_slot)
        lengths = [sum(length for _, length in runs) for runs in chunk.runs]
        runs = [[(start + first_slot, length) for start, length in runs] for runs in chunk.runs]
        self.steps.add(self.decoder.logits(last).argmax(-1), lengths, runs)
        return first_slot + len(hidden)

    def decode_steps(self, on_token: Callable[[int], None] | None) -> list[list[int]]:
        """Token ids of each row's answer, without its stop token."""
        return self.steps.run(on_token)

    def embed(self, tokens: Tensor, features: Tensor | None) -> Tensor:
        """(tokens) -> (tokens, width), image tokens replaced by `features`. Raises ValueError where their numbers differ."""
        embeddings = self.decoder.text_model.embed_tokens(tokens)
        if features is None:
            return embeddings
        places = (tokens == self.image_token).nonzero()[:, 0]
        if len(places) != len(features):
            raise ValueError(f"{len(places)} image tokens in the prompts, {len(features)} features of their pictures")
        return embeddings.index_copy(0, places, features.to(embeddings.dtype))


def by_length(groups: Sequence[PromptGroup]) -> tuple[list[PromptGroup], list[PromptGroup]]:
    """Prompts alone, and those that share a prefix, both with equal lengths side by side: these are a plain batch."""
    ordered = sorted(groups, key=lambda group: len(group.prefix))
    return [group for group in ordered if not group.own], [group for group in ordered if group.own]


def halved(groups: Sequence[PromptGroup]) -> tuple[list[PromptGroup], list[PromptGroup]] | None:
    """The groups in two halves; None where a single group cannot be split."""
    if len(groups) > 1:
        return list(groups[: len(groups) // 2]), list(groups[len(groups) // 2 :])
    parts = groups[0].split()
    return None if parts is None else ([parts[0]], [parts[1]])


class DecodeSteps:
    """The rows of a batch while they are answered, a token a step, in memory that CUDA graphs can keep reading."""

    def __init__(
        self, decoder: PackedDecoder, pool: KeyValuePool, stops: Tensor, max_new_tokens: int, pad_token: int | None
    ):
        self.decoder, self.pool, self.stops, self.max_new_tokens = decoder, pool, stops, max_new_tokens
        self.is_cuda = decoder.device.type == "cuda"
        self.capacity = 0
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.memory = torch.cuda.graph_pool_handle() if self.is_cuda else None

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
        self.total = rows

    def add(self, first_tokens: Tensor, lengths: list[int], runs: list[list[tuple[int, int]]]) -> None:
        """Rows whose prompts are computed, with the first token of each answer."""
        new = slice(self.num_rows, self.num_rows + len(lengths))
        padded = torch.tensor([[*([(0, 0)] * (2 - len(parts))), *parts, (0, 0)] for parts in runs], dtype=torch.int32)
        self.runs[new] = padded.to(self.runs.device, non_blocking=True)
        self.positions[new] = torch.tensor(lengths).to(self.positions.device, non_blocking=True)
        self.tokens[new] = first_tokens
        self.out[new, 0] = first_tokens
        self.counts[new] = 1
        self.alive[new] = self.goes_on(first_tokens)
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

    def run(self, on_token: Callable[[int], None] | None = None) -> list[list[int]]:
        """Tokens of each row's answer, with the one that ends it."""
        answers: list[list[int]] = [[]] * self.num_rows
        numbers = list(range(self.num_rows))  # the row that each place of the batch holds
        size = step_size(self.num_rows)
        if on_token:
            on_token(int(self.tokens[0]))
        alive = self.alive.tolist()[: self.num_rows]
        for step in range(1, self.max_new_tokens + 1):
            num_alive = sum(alive)
            last = not num_alive or step == self.max_new_tokens
            if last or step_size(num_alive) <= size // 2:
                self.collect(numbers, [] if last else alive, answers)
                if last:
                    break
                keep = [place for place, is_alive in enumerate(alive) if is_alive]
                numbers, size = self.compact(keep, numbers), step_size(len(keep))
            self.step(size)
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
        """Keep the rows at these places and no others; returns their numbers."""
        places = torch.tensor(keep, device=self.tokens.device)
        for state in (self.tokens, self.positions, self.slots, self.runs, self.alive, self.out, self.counts):
            state[: len(keep)] = state[places]
        self.idle(len(keep))
        return [numbers[place] for place in keep]

    def step(self, size: int) -> None:
        """A token for each of the first `size` places: recorded at its second use, launched as one from then on."""
        uses_lora = bool(self.decoder.stacks) and self.decoder.stacks[0].is_active
        key = (size, uses_lora)
        if not self.is_cuda:
            self.compute(size)
        elif key not in self.graphs:
            self.compute(size)  # libraries load and kernels are compiled, which cannot be recorded
            self.graphs[key] = None
        else:
            if self.graphs[key] is None:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.memory, capture_error_mode="thread_local"):
                    self.compute(size)
                self.graphs[key] = graph
            self.graphs[key].replay()

    def compute(self, size: int) -> None:
        """One token of the first `size` rows, all on the device: what a CUDA graph records."""
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
        """(rows) 1 where a token is no stop token, else 0."""
        return (tokens[:, None] != self.stops).all(1).long()


def step_size(rows: int) -> int:
    """The smallest recorded size that holds so many rows; `rows` itself beyond the largest."""
    return next((size for size in STEP_SIZES if size >= rows), rows)
