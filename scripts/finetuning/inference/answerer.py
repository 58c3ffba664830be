"""Greedy answers of one model on one device, a batch at a time: prompts computed in chunks, then all answers together.

A chunk of prompts is one flat sequence without padding; pictures are seen once, and image prefixes computed once for all
questions about them. Then every row of the batch gets a token a step. On a GPU a step is a CUDA graph, because its 700
kernels take the host longer than the GPU. Rows that have ended leave the batch when half of it has.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor
from torch.nn import functional as F
from transformers import ProcessorMixin

from finetuning.data.collator import image_token_of, stop_tokens
from finetuning.data.count_tree import CountTree, sum_over_tree
from finetuning.inference.decode_steps import DecodeSteps, NewRows
from finetuning.inference.packed_decoder import KeyValuePool, PackedDecoder
from finetuning.inference.packed_prompts import PackedPrompts, Segment
from finetuning.inference.prompt_reader import PromptGroup
from finetuning.models.picture_parameters import without_adapter

LIKELIHOODS = "likelihoods"  # beside the names of the models, what a row's tree tells
CHUNK_TOKENS = 32768  # more make no product faster
MOST_ROWS = 256  # of an automatic batch on a GPU
MOST_ROWS_ON_CPU = 64
ROOM_OF_ONE = 2048  # slots more for a single question: the next one of a conversation is longer
ROWS_OF_LOGITS = 64  # whose trees' logits are there at once, 4 MB a row
SPARE_BYTES = 2**30  # left for graphs, logits and the allocator's rounding


@dataclass
class Chunk:
    """Prompts computed in one pass: their flat layout, and for each row its last token and the runs of its keys."""

    groups: Sequence[PromptGroup]
    prompts: PackedPrompts
    rows: list[int]
    last: list[int]
    runs: list[list[tuple[int, int]]]  # of each row: (first token, tokens) of the prefix and of its own part
    trees: dict[int, tuple[CountTree, slice]]  # of rows whose counts are read: the tree, its tokens
    pictures: dict[str, Tensor]

    @property
    def asked(self) -> list[int]:
        """Tokens whose next one is asked for: the last of each row, then those of the trees."""
        return self.last + [token for _, tokens in self.trees.values() for token in range(tokens.start, tokens.stop)]


@dataclass
class Batch:
    """Rows that are answered together: those laid out already, in `chunks` with their pictures' features, and the rest."""

    chunks: list[Chunk] = field(default_factory=list)
    features: list[Tensor | None] = field(default_factory=list)
    waiting: list[PromptGroup] = field(default_factory=list)
    groups: list[PromptGroup] = field(default_factory=list)
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)  # row -> name -> text, and LIKELIHOODS -> a list

    @property
    def num_rows(self) -> int:
        return sum(len(group.rows) for group in self.groups)


@dataclass
class Prefill:
    """Prompts of a batch as the model `name` computed them; the next free slot of the pool."""

    batch: Batch
    name: str
    next_slot: int
    rows: list[NewRows] = field(default_factory=list)
    likelihoods: dict[int, Tensor] = field(default_factory=dict)


class Answerer:
    """Answers groups of prompts with `model`; several models at once are the adapter's `tuned` and `base`.

    `batch_size` is the most rows at once, `auto` what free memory holds. A batch that does not fit is halved, which is
    said through `say`. `on_token` sees each token of a single row as it comes. Of rows in `trees` the first model that
    answers also tells how likely each count of the row's tree is, from the same pass over the prompt.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        processing_class,
        *,
        max_new_tokens: int,
        batch_size: int | str = "auto",
        trees: Mapping[int, CountTree] | None = None,
        say: Callable[[str], None] = print,
    ):
        self.trees = trees or {}
        self.decoder = PackedDecoder(model)
        self.model, self.max_new_tokens, self.say = model, max_new_tokens, say
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.stops = torch.tensor(stop_tokens(processing_class), device=self.decoder.device)
        vision = isinstance(processing_class, ProcessorMixin)
        self.image_token = image_token_of(processing_class) if vision else None
        self.is_cuda = self.decoder.device.type == "cuda"
        self.most_rows = (MOST_ROWS if self.is_cuda else MOST_ROWS_ON_CPU) if batch_size == "auto" else int(batch_size)
        self.chunk_tokens = CHUNK_TOKENS
        self.pool: KeyValuePool | None = None
        self.steps: DecodeSteps | None = None
        self.one_at_a_time = (
            threading.RLock()
        )  # prompts and steps are launched by two threads, of one model or the other
        self.decoder.refresh()

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
        """Slots of keys and values that the group takes: its tokens, the answers of its rows, and their trees."""
        trees = sum(len(self.trees[row].tokens) for row in group.rows if row in self.trees) if self.trees else 0
        return group.num_tokens + len(group.rows) * self.max_new_tokens + trees

    def make_room(self, slots: int, rows: int, lanes: int = 1, chunks: int | None = None) -> None:
        """A pool for `lanes` batches of `most_rows` rows like these, of at most `chunks` chunks, or for what memory holds.

        A new one where the old is too small for `slots` in each lane.
        """
        if self.pool is not None and self.pool.slots >= lanes * slots:
            return
        self.pool = self.steps = None
        wanted = -(-slots * self.most_rows // rows)
        if chunks is not None:
            wanted = min(wanted, chunks * self.chunk_tokens + self.most_rows * self.max_new_tokens)
        slots, wanted = lanes * slots, lanes * max(slots, wanted)
        wanted += ROOM_OF_ONE if self.most_rows == 1 else 0
        if self.is_cuda:
            free = torch.cuda.mem_get_info(self.decoder.device)[0]
            free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            of_chunk = self.decoder.bytes_of_token() * self.chunk_tokens
            while self.chunk_tokens > 1024 and of_chunk > (free - SPARE_BYTES) // 3:
                self.chunk_tokens //= 2
                of_chunk //= 2
            wanted = min(wanted, max(slots, int(0.9 * (free - of_chunk - SPARE_BYTES)) // self.decoder.bytes_of_slot()))
        self.pool = KeyValuePool(self.decoder, wanted)
        self.steps = DecodeSteps(self.decoder, self.pool, self.stops, self.max_new_tokens, self.as_named)

    def release(self) -> None:
        """Give the pool and the graphs back, to whoever wants the GPU next."""
        self.pool = self.steps = None
        if self.is_cuda:
            torch.cuda.empty_cache()

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
            pass  # handled outside, where the failed pass's tensors are no longer held
        return self.halve(groups, compute)

    def halve(self, groups: Sequence[PromptGroup], compute: Callable[[Sequence[PromptGroup]], dict]) -> dict:
        """`compute` of the halves of a batch that did not fit, smaller ones from here on."""
        rows = sum(len(group.rows) for group in groups)
        halves = halved(groups)
        if halves is None:
            raise ValueError(
                "the GPU has no memory for a single question: close other programs on it, or load the model in 4 bits"
            )
        self.release()
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
        batch = Batch(groups=list(groups))
        prefill = Prefill(batch, names[0], 0)
        for part in in_chunks(groups, self.chunk_tokens):
            self.compute_prompts(prefill, part)
        self.decode(prefill, on_token)
        for name in names[1:]:
            self.decode(self.compute_again(batch, name, 0), on_token)
        return batch.answers

    def compute_prompts(self, prefill: Prefill, groups: Sequence[PromptGroup]) -> None:
        """Lay `groups` out as one more chunk of the batch, and compute their prompts."""
        batch, chunk = prefill.batch, lay_out(groups, self.decoder.device, self.trees)
        with self.as_named(prefill.name):
            seen = self.see(chunk)
            self.prefill_chunk(prefill, chunk, seen)
        batch.chunks.append(chunk)
        batch.features.append(seen)

    def compute_again(self, batch: Batch, name: str, first_slot: int) -> Prefill:
        """The prompts of a batch by another model."""
        prefill = Prefill(batch, name, first_slot)
        with self.as_named(name):
            if not self.sees_alike():
                batch.features = [self.see(chunk) for chunk in batch.chunks]
            for chunk, seen in zip(batch.chunks, batch.features, strict=True):
                plain = lay_out(chunk.groups, self.decoder.device) if chunk.trees else chunk
                self.prefill_chunk(prefill, plain, seen)
        return prefill

    @torch.no_grad()
    def decode(self, prefill: Prefill, on_token: Callable[[int], None] | None = None) -> None:
        """Add the answers of a batch whose prompts were computed to `batch.answers`."""
        batch = prefill.batch
        self.steps.begin(max(self.most_rows, batch.num_rows))
        for rows in prefill.rows:
            self.steps.add(rows)
        self.steps.place_answers(prefill.next_slot)
        tokens = self.steps.run(prefill.name, on_token)
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        for row, text in zip((row for chunk in batch.chunks for row in chunk.rows), texts, strict=True):
            batch.answers.setdefault(row, {})[prefill.name] = text.strip()
        for row, likelihoods in prefill.likelihoods.items():
            batch.answers[row][LIKELIHOODS] = likelihoods.tolist()

    @contextmanager
    def as_named(self, name: str) -> Iterator[None]:
        """The model that answers as `name`: a PeftModel's base with its adapter off, else the model as it is."""
        off = without_adapter(self.model) if name == "base" and isinstance(self.model, PeftModel) else nullcontext()
        with self.one_at_a_time, off:
            self.decoder.follow_switch()
            yield

    def sees_alike(self) -> bool:
        """Whether base and adapter see a picture alike: nothing of the tower or the projector was trained."""
        parts = [getattr(self.decoder.base.model, name, None) for name in ("vision_tower", "multi_modal_projector")]
        modules = [module for part in parts if part is not None for module in part.modules()]
        return not any(isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)) for module in modules)

    def see(self, chunk: Chunk) -> Tensor | None:
        """Features of the chunk's pictures (image tokens, width)."""
        if not chunk.pictures:
            return None
        base = self.decoder.base
        others = {name: value.tolist() for name, value in chunk.pictures.items() if name != "pixel_values"}
        pixel_values = chunk.pictures["pixel_values"].to(base.dtype)
        if self.is_cuda:
            pixel_values = pixel_values.pin_memory()  # else the copy, and with it the host, waits for the chunk before
        pixel_values = pixel_values.to(self.decoder.device, non_blocking=True)
        return torch.cat(list(base.model.get_image_features(pixel_values=pixel_values, **others).pooler_output))

    def prefill_chunk(self, prefill: Prefill, chunk: Chunk, features: Tensor | None) -> None:
        """Compute the prompts of a chunk, whose tokens take the slots from `prefill.next_slot` on."""
        first_slot = prefill.next_slot
        hidden = self.embed(chunk.prompts, features)
        states = self.decoder.prefill(hidden, chunk.prompts, self.to_device(chunk.asked), self.pool, first_slot)
        logits = self.decoder.logits(states[: len(chunk.rows)])
        if chunk.trees:
            prefill.likelihoods |= read_trees(self.decoder, chunk, logits, states[len(chunk.rows) :])
        lengths = [sum(length for _, length in runs) for runs in chunk.runs]
        runs = [[(start + first_slot, length) for start, length in runs] for runs in chunk.runs]
        prefill.rows.append(NewRows(logits.argmax(-1), lengths, runs))
        prefill.next_slot += len(hidden)

    def to_device(self, numbers: Sequence[int]) -> Tensor:
        # `torch.tensor(..., device=...)` would wait for all that the GPU was given before.
        return torch.tensor(numbers).to(self.decoder.device, non_blocking=True)

    def embed(self, prompts: PackedPrompts, features: Tensor | None) -> Tensor:
        """Embeddings of all tokens, with features in the places of image tokens."""
        embeddings = self.decoder.text_model.embed_tokens(prompts.tokens)
        if features is None:
            return embeddings
        places = (torch.cat([segment.tokens for segment in prompts.segments]) == self.image_token).nonzero()[:, 0]
        if len(places) != len(features):
            raise ValueError(f"{len(places)} image tokens in the prompts, {len(features)} features of their pictures")
        places = places.to(self.decoder.device, non_blocking=True)
        return embeddings.index_copy(0, places, features.to(embeddings.dtype))


def read_trees(decoder: PackedDecoder, chunk: Chunk, logits: Tensor, states: Tensor) -> dict[int, Tensor]:
    """Row -> log-likelihood of each count, fp32: from `logits` behind the prompts and `states` of the trees' tokens."""
    place_of = {row: place for place, row in enumerate(chunk.rows)}
    parts = dict(zip(chunk.trees, states.split([len(tree.tokens) for tree, _ in chunk.trees.values()]), strict=True))
    alike: dict[int, list[int]] = {}
    for row, (tree, _) in chunk.trees.items():
        alike.setdefault(id(tree), []).append(row)
    likelihoods = {}
    for rows in alike.values():
        tree = chunk.trees[rows[0]][0]
        for some in (rows[start : start + ROWS_OF_LOGITS] for start in range(0, len(rows), ROWS_OF_LOGITS)):
            places = torch.tensor([place_of[row] for row in some]).to(logits.device, non_blocking=True)
            behind = decoder.logits(torch.cat([parts[row] for row in some]))
            behind = behind.view(len(some), len(tree.tokens), behind.shape[-1])
            behind = torch.cat([logits[places, None], behind], dim=1)
            likelihoods |= dict(zip(some, sum_over_tree(behind, tree), strict=True))
    return likelihoods


def in_chunks(groups: Sequence[PromptGroup], chunk_tokens: int) -> list[list[PromptGroup]]:
    """Groups in passes of about `chunk_tokens`, evenly."""
    total = sum(group.num_tokens for group in groups)
    share = total / -(-total // chunk_tokens)
    chunks: list[list[PromptGroup]] = [[]]
    tokens = 0
    for group in groups:
        if chunks[-1] and tokens + group.num_tokens / 2 > share * len(chunks):
            chunks.append([])
        chunks[-1].append(group)
        tokens += group.num_tokens
    return chunks


def lay_out(groups: Sequence[PromptGroup], device: torch.device, trees: Mapping[int, CountTree] | None = None) -> Chunk:
    """Groups as one chunk: prefixes first, then what rows add to theirs, behind both the rows' trees."""
    alone, shared = by_length(groups)
    ordered = alone + shared
    rows = [number for group in ordered for number in group.rows]
    segments = [Segment(group.prefix) for group in ordered]
    paths = [[number] for number in range(len(alone))]  # of each row, the segments of its prompt
    tree_segments: dict[int, int] = {}

    def add_trees(first: int) -> None:
        for row, path in zip(rows[first:], paths[first:], strict=False):
            if trees and row in trees and len(trees[row].tokens):
                tree_segments[row] = len(segments)
                segments.append(Segment(trees[row].tokens, path[-1], trees[row].sees, trees[row].depths))

    add_trees(0)
    for number, group in enumerate(shared, len(alone)):
        for own in group.own:
            paths.append([number, len(segments)])
            segments.append(Segment(own, number))
    add_trees(len(alone))
    prompts = PackedPrompts(segments, device)

    def tokens_of(segment: int | None) -> slice:  # none of a tree whose counts are one token each
        return slice(0, 0) if segment is None else slice(prompts.starts[segment], prompts.ends[segment])

    return Chunk(
        groups=groups,
        prompts=prompts,
        rows=rows,
        last=[prompts.ends[path[-1]] - 1 for path in paths],
        runs=[[(prompts.starts[part], prompts.lengths[part]) for part in path] for path in paths],
        trees={row: (trees[row], tokens_of(tree_segments.get(row))) for row in rows if trees and row in trees},
        pictures=join_pictures([group.pictures for group in ordered if group.pictures]),
    )


def join_pictures(groups: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The inputs of several groups' pictures as one, in order; those with fewer tiles get empty ones, as in a batch."""
    joined = {}
    for name in groups[0] if groups else ():
        values = [group[name] for group in groups]
        if values[0].dim() == 5:  # (pictures, tiles, 3, height, width)
            most = max(value.shape[1] for value in values)
            values = [F.pad(value, (0, 0) * 3 + (0, most - value.shape[1])) for value in values]
        joined[name] = torch.cat(values)
    return joined


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
