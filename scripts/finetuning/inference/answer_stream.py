"""Answers of a stream of prompts: while one batch is decoded, the prompts of the next one are computed.

Prompts keep the chip's arithmetic busy, decode steps its memory: on a GPU a second CUDA stream, served by a second
thread, decodes behind the first one's products. (Sarathi-Serve mixes both in one pass, arXiv 2403.02310.) The two
batches lie in two halves of the pool, its lanes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any

import torch

from finetuning.inference.answerer import Answerer, Batch, Prefill
from finetuning.inference.prompt_reader import PromptGroup

FIRST_CHUNK_TOKENS = 8192  # so that the GPU begins while the loader still reads
CHUNKS_OF_BATCH = 2  # long enough to hide the steps of the batch before

Answers = dict[int, dict[str, Any]]  # row number -> the answer of each name, and LIKELIHOODS


class AnswerStream:
    """Answers of prompts by the models `names` of an answerer, a batch of at most its `most_rows` rows at a time.

    `overlaps`: whether a batch is decoded while the next one's prompts are computed; left out, on a GPU.
    """

    def __init__(self, answerer: Answerer, names: Sequence[str] = ("tuned",), *, overlaps: bool | None = None):
        self.answerer, self.names = answerer, names
        overlaps = answerer.is_cuda if overlaps is None else overlaps
        self.num_lanes, self.lane = (2, 0) if overlaps else (1, 0)
        self.thread = ThreadPoolExecutor(1, "decode") if overlaps else None
        self.cuda_stream = torch.cuda.Stream(answerer.decoder.device, priority=-1) if answerer.is_cuda else None
        self.batch, self.prefill = Batch(), None  # the batch that still takes prompts, and those computed of it
        self.decoding: tuple[Prefill, Future | None] | None = None
        self.completed: list[Answers] = []
        self.is_begun = False
        kind = answerer.decoder.device.type
        self.autocast = {  # a thread's own, so the second one is told
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
        }

    @torch.no_grad()
    def answers(self, prompts: Iterable[PromptGroup]) -> Iterator[Answers]:
        """Answers of a batch at a time. Raises ValueError where not one row fits the GPU."""
        try:
            for group in prompts:
                for part in self.answerer.divided(group):
                    if self.batch.groups and not self.has_room(part):
                        yield from self.attempt(self.end_batch)
                    yield from self.attempt(partial(self.take, part))
            yield from self.attempt(self.finish)
        finally:
            if self.thread is not None:
                self.thread.shutdown()

    def attempt(self, action: Callable[[], None]) -> list[Answers]:
        """`action`; where memory does not suffice all that is unfinished is answered by smaller batches. What is completed."""
        try:
            action()
            fits = True
        except torch.OutOfMemoryError:
            fits = False  # handled outside, where the failed pass's tensors are no longer held
        if not fits:
            self.start_over()
        completed, self.completed = self.completed, []
        return completed

    def take(self, part: PromptGroup) -> None:
        """One more group of prompts, for which the batch has room; computed once there are enough of them."""
        self.batch.groups.append(part)
        self.batch.waiting.append(part)
        slots = self.answerer.slots_of(part)
        if self.lane_slots < slots:
            self.complete()
            self.answerer.make_room(slots, len(part.rows), self.num_lanes, CHUNKS_OF_BATCH)
        enough = self.answerer.chunk_tokens if self.is_begun else min(FIRST_CHUNK_TOKENS, self.answerer.chunk_tokens)
        if sum(group.num_tokens for group in self.batch.waiting) >= enough:
            self.compute()

    @property
    def lane_slots(self) -> int:
        """Slots of one batch."""
        return 0 if self.answerer.pool is None else self.answerer.pool.slots // self.num_lanes

    def has_room(self, part: PromptGroup) -> bool:
        """Whether the batch can take `part` too."""
        groups = [*self.batch.groups, part]
        tokens = sum(group.num_tokens for group in groups)
        fits = sum(map(self.answerer.slots_of, groups)) <= self.lane_slots
        rows = self.batch.num_rows + len(part.rows)
        return fits and rows <= self.answerer.most_rows and tokens <= CHUNKS_OF_BATCH * self.answerer.chunk_tokens

    def compute(self) -> None:
        """Compute the prompts that wait."""
        self.is_begun = True
        if self.prefill is None:
            self.prefill = Prefill(self.batch, self.names[0], self.next_lane())
        waiting, self.batch.waiting = self.batch.waiting, []
        self.answerer.compute_prompts(self.prefill, waiting)

    def next_lane(self) -> int:
        """The first slot of the lane that is free."""
        first_slot = self.lane * self.lane_slots
        self.lane = (self.lane + 1) % self.num_lanes
        return first_slot

    def end_batch(self) -> None:
        """Compute what is left of the batch, and hand it over to be decoded."""
        if self.batch.waiting:
            self.compute()
        self.complete()
        self.hand_over(self.prefill)
        for name in self.names[1:]:
            prefill = self.answerer.compute_again(self.batch, name, self.next_lane())
            self.complete()
            self.hand_over(prefill)
        self.batch, self.prefill = Batch(), None

    def finish(self) -> None:
        """Answer all that was taken."""
        if self.batch.groups:
            self.end_batch()
        self.complete()

    def hand_over(self, prefill: Prefill) -> None:
        """Let a prefill be decoded, beside what this thread launches next."""
        if self.thread is None:
            self.answerer.decode(prefill)
            self.decoding = prefill, None
            return
        ready = torch.cuda.current_stream().record_event() if self.cuda_stream is not None else None
        self.decoding = prefill, self.thread.submit(self.decode_beside, prefill, ready)

    def decode_beside(self, prefill: Prefill, ready: torch.cuda.Event | None) -> None:
        """In the second thread: decode once the prompts are computed."""
        with torch.cuda.stream(self.cuda_stream), torch.autocast(**self.autocast):  # the stream's device with it
            if ready is not None:
                self.cuda_stream.wait_event(ready)
            self.answerer.decode(prefill)

    def complete(self) -> None:
        """Wait for what was handed over; its batch is completed if all names have answered."""
        if self.decoding is None:
            return
        prefill, future = self.decoding
        if future is not None:
            future.result()
        self.decoding = None
        if prefill.name == self.names[-1]:
            self.completed.append(prefill.batch.answers)

    def start_over(self) -> None:
        """Answer what was begun, and did not fit, by the answerer alone: it takes halves from here on."""
        unfinished = [self.batch] if self.batch.groups else []
        if self.decoding is not None:
            prefill, future = self.decoding
            if future is not None:
                wait([future])
            if prefill.batch is not self.batch:
                unfinished.insert(0, prefill.batch)
        self.batch, self.prefill, self.decoding, self.lane = Batch(), None, None, 0
        groups = [group for batch in unfinished for group in batch.groups]
        answers = self.answerer.halve(groups, lambda part: self.answerer.answer_once(part, self.names, None))
        self.completed.append(answers)
