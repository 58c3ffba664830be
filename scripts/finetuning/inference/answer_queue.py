"""Questions of many clients, answered by one model: a queue of limited length, and one thread that owns the model."""

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from finetuning.inference.answerer import Answerer
from finetuning.inference.count_calibration import Calibration, read_out
from finetuning.inference.count_distribution import CountReader
from finetuning.inference.generation import answer_batch
from finetuning.inference.packed_decoder import reason_against
from finetuning.inference.prompt_reader import PromptReader
from finetuning.models.picture_parameters import without_adapter


class QueueFull(Exception):
    """As many questions as the queue holds are waiting already."""


@dataclass(frozen=True)
class Reply:
    """An answer; how many tokens prompt and answer have; and for a counting question `Count` as a dict, else None."""

    text: str
    prompt_tokens: int
    answer_tokens: int
    count: dict[str, Any] | None = None


@dataclass
class Job:
    """One question: a row that ends with it, and which model is asked, `tuned` or `base`."""

    row: dict[str, Any]
    name: str
    future: Future = field(default_factory=Future)


class AnswerQueue:
    """Answers rows with a loaded model, in batches of what is waiting, on a thread of its own.

    `most` questions may wait; one more is refused with `QueueFull`. `reader` and `calibration` add counts with intervals
    to the tuned model's answers. `close` ends the thread; what waits then is refused, too.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        most: int,
        batch_size: int | str = "auto",
        reader: CountReader | None = None,
        calibration: Calibration | None = None,
    ):
        self.model, self.processing_class, self.max_new_tokens = model.eval(), processing_class, max_new_tokens
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self.reader, self.calibration = reader, calibration
        self.answerer = None
        if not reason_against(model):
            self.answerer = Answerer(
                model, processing_class, max_new_tokens=max_new_tokens, batch_size=batch_size, say=print
            )
        self.batch_size = self.answerer.most_rows if self.answerer else 1
        self.waiting: queue.Queue[Job | None] = queue.Queue(most)
        self.is_closed = False
        self.thread = threading.Thread(target=self._work, name="answers", daemon=True)
        self.thread.start()

    @property
    def names(self) -> list[str]:
        """The models that can be asked: `tuned`, and `base` where an adapter can be switched off."""
        return ["tuned", "base"] if isinstance(self.model, PeftModel) else ["tuned"]

    @property
    def counting_questions(self) -> list[str]:
        """Questions of training that are answered with a count and its interval, too."""
        return [question for question in self.reader.trees.forms if question] if self.reader else []

    def submit(self, row: dict[str, Any], name: str = "tuned") -> Future:
        """A future `Reply`, or the ValueError of a row that cannot be asked. Raises QueueFull."""
        job = Job(row, name)
        if self.is_closed:
            raise QueueFull
        try:
            self.waiting.put_nowait(job)
        except queue.Full:
            raise QueueFull from None
        return job.future

    def close(self) -> None:
        """Refuse what is waiting, and end the thread after the batch that it is at."""
        self.is_closed = True
        while True:
            try:
                job = self.waiting.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                job.future.set_exception(QueueFull())
        self.waiting.put(None)
        self.thread.join()

    def _work(self) -> None:
        while True:
            jobs = [self.waiting.get()]
            while len(jobs) < self.batch_size and not self.waiting.empty():
                jobs.append(self.waiting.get())
            for name in ("tuned", "base"):
                self._answer([job for job in jobs if job is not None and job.name == name], name)
            if None in jobs:
                return

    def _answer(self, jobs: Sequence[Job], name: str) -> None:
        """Set the futures of jobs that ask the same model. Whatever happens to a batch, none of them waits for ever."""
        if not jobs:
            return
        try:
            replies = self._reply(jobs, name)
        except Exception as error:  # a row that cannot be asked, no memory, ...: each is asked alone, and told its own
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            for job in jobs:
                self._answer([job], name)
            return
        for job, reply in zip(jobs, replies, strict=True):
            job.future.set_result(reply)

    @torch.no_grad()
    def _reply(self, jobs: Sequence[Job], name: str) -> list[Reply]:
        rows = [job.row for job in jobs]
        if self.answerer is None:
            off = without_adapter(self.model) if name == "base" and len(self.names) > 1 else nullcontext()
            with off:
                texts = answer_batch(self.model, self.processing_class, rows, max_new_tokens=self.max_new_tokens)
            lengths = [0] * len(rows)
        else:
            reader = PromptReader(self.processing_class, rows, self.model.dtype)
            groups = [group for number in range(len(rows)) for group in reader.read([number])]
            answers: dict[int, dict[str, str]] = {}
            for batch in self.answerer.batches(groups):
                answers |= self.answerer.answer(batch, [name])
            texts = [answers[number][name] for number in range(len(rows))]
            lengths = [group.num_tokens for group in groups]
        counts = self._counts(rows) if name == "tuned" else [None] * len(rows)
        return [
            Reply(text, length, len(self.tokenizer.encode(text, add_special_tokens=False)), count)
            for text, length, count in zip(texts, lengths, counts, strict=True)
        ]

    def _counts(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any] | None]:
        """Count with interval of each row whose question training asked for a count."""
        if self.reader is None or self.calibration is None:
            return [None] * len(rows)
        likelihoods = self.reader.read_batch(rows)
        return [
            None if values is None else asdict(read_out(torch.tensor([values]), self.calibration)[0])
            for values in likelihoods
        ]
