"""A loaded model and somebody who asks it: many questions into a file, one on the screen, or a conversation."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TextStreamer

from finetuning.data.pictures import PictureError, open_picture
from finetuning.failures import writing
from finetuning.inference.answerer import Answerer
from finetuning.inference.generation import answer_one, answer_rows
from finetuning.inference.packed_decoder import reason_against

Item = tuple[str | None, str]  # (path of the picture, question)


class Items(Sequence):
    """Items as rows to ask, each picture opened when its row is read."""

    def __init__(self, items: Sequence[Item]):
        self.items = items
        self.image_ids = [path for path, _ in items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> dict[str, Any]:
        path, question = self.items[number]
        return {"messages": [{"role": "user", "content": question}], "images": [open_image(path)] if path else []}


def open_image(path: str) -> Image.Image:
    """The picture as the model sees it. Raises ValueError that names a broken one."""
    try:
        return open_picture(path)
    except PictureError as error:
        raise ValueError(f"{path}: {error}. Repair this picture or take it out, and run again") from error


def write_answers(windows: Iterable[dict[str, list[str]]], items: Sequence[Item], output: Path) -> None:
    """Append the answers of the `tuned` model to `output`, a line per item, window by window; the main process writes."""
    done = 0
    with writing(output), output.open("a", encoding="utf-8") as file:
        for window in windows:
            answers = window["tuned"]
            if PartialState().is_main_process:
                for (image, question), answer in zip(items[done : done + len(answers)], answers, strict=True):
                    line = {"image": image, "question": question, "answer": answer}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
            done += len(answers)


def show_answers(windows: Iterable[dict[str, list[str]]], items: Sequence[Item]) -> None:
    """Print each item with the answer of the `tuned` model above the progress bar; the main process prints."""
    answers = (answer for window in windows for answer in window["tuned"])
    for (image, question), answer in zip(items, answers, strict=True):
        if PartialState().is_main_process:
            tqdm.write("\n".join(filter(None, [image, question, f"  {answer}"])))


class Session:
    """A model, its processor, and how long its answers may be."""

    def __init__(
        self,
        model: PreTrainedModel,
        processing_class: ProcessorMixin | PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        batch_size: int | str = "auto",
    ):
        self.model, self.processing_class = model, processing_class
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.answerer: Answerer | None = None

    def windows(self, items: Sequence[Item]) -> Iterator[dict[str, list[str]]]:
        """Answers to the items, in order, as they come: `answer_rows`."""
        return answer_rows(
            self.model,
            self.processing_class,
            Items(items),
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
        )

    def answer_items(self, items: Sequence[Item], output: Path) -> None:
        """Answers appended to `output`, a line per item in the order of the items, on disk as they come."""
        write_answers(self.windows(items), items, output)

    def show_items(self, items: Sequence[Item]) -> None:
        """Each item with its answer, on the screen."""
        show_answers(self.windows(items), items)

    def stream(self, row: dict[str, Any]) -> str:
        """The answer of one row, shown word by word."""
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        if self.answerer is None and not reason_against(self.model):
            self.answerer = Answerer(
                self.model, self.processing_class, max_new_tokens=self.max_new_tokens, batch_size=1
            )
        return answer_one(
            self.model,
            self.processing_class,
            row,
            max_new_tokens=self.max_new_tokens,
            streamer=streamer,
            answerer=self.answerer,
        )

    def chat(self, images: list[Image.Image], questions: list[str]) -> None:
        """`questions`, then those from the keyboard, until an empty line or the end of the input."""
        messages: list[dict[str, str]] = []
        print(f"{len(images)} pictures in this conversation. An empty line ends it.")
        while True:
            if questions:
                question = questions.pop(0)
                print(f"> {question}")
            else:
                try:
                    question = input("> ").strip()
                except EOFError:
                    question = ""
            if not question:
                return
            messages.append({"role": "user", "content": question})
            answer = self.stream({"messages": messages, "images": images})
            messages.append({"role": "assistant", "content": answer})
