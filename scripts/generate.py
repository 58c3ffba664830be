"""Ask a model: a base model, a run's adapter or full weights, or a merged model; one question, many, or a conversation.

    python scripts/generate.py --model outputs/llava-sample --image data/raw-sample/frames/seq_000001.jpg \
        --question "How many people are in view?"
    python scripts/generate.py --model outputs/llava-sample --image data/raw-sample/frames \
        --question "How many people are in view?" --output outputs/answers.jsonl
    python scripts/generate.py --model outputs/llava-sample --image data/raw-sample/frames/seq_000001.jpg --chat

--image takes pictures, folders of them, and .txt files with a path a line; --question takes questions and .txt files
with one a line. Each question is asked of each picture, greedily. A single answer streams to the terminal; many go to
--output as JSONL ({"image", "question", "answer"}), and the same command again continues a file half done. With --chat
all pictures belong to the first question, and each question you type sees what was said before. Text-only models are
asked without --image. Several GPUs: accelerate launch scripts/generate.py ...
"""

import argparse
import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TextStreamer

from finetuning.folder_lock import give_back, take_lock
from finetuning.inference.generation import answer_batch
from finetuning.models.loading import is_vision, load_config, load_for_inference
from finetuning.run_folder import adapter_base, changed_settings, read_json, write_atomically, write_json

Item = tuple[str | None, str]  # (path of the picture, question)


def read_questions(words: list[str], problems: list[str]) -> list[str]:
    """Questions and the lines of .txt files, in order; what is wrong with them is added to `problems`."""
    questions = []
    for word in words:
        if not word.endswith(".txt"):
            questions.append(word.strip())
        elif not Path(word).is_file():
            problems.append(f"--question {word}: no such file")
        else:
            questions += [
                line.strip() for line in Path(word).read_text(encoding="utf-8-sig").splitlines() if line.strip()
            ]
    return [question for question in dict.fromkeys(questions) if question]


def find_images(words: list[str], problems: list[str]) -> list[str]:
    """Paths of pictures, of those in folders and of those in .txt files; what is wrong with them goes to `problems`."""
    suffixes = set(Image.registered_extensions())
    paths: list[Path] = []
    for word in map(Path, words):
        if word.is_dir():
            found = sorted(path for path in word.rglob("*") if path.suffix.lower() in suffixes)
            paths += found
            if not found:
                problems.append(f"--image {word}: no pictures in this folder")
        elif word.suffix == ".txt" and word.is_file():
            paths += [Path(line.strip()) for line in word.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        else:
            paths.append(word)
    for path in paths:
        try:
            Image.open(path).close()
        except FileNotFoundError:
            problems.append(f"--image {path}: no such file")
        except (OSError, Image.DecompressionBombError) as error:
            problems.append(f"--image {path}: no picture that can be read ({error})")
    return list(dict.fromkeys(map(str, paths)))


def as_row(item: Item) -> dict[str, Any]:
    """An item as the collator wants it, the picture decoded. Raises ValueError that names a broken picture."""
    path, question = item
    try:
        images = [Image.open(path).convert("RGB")] if path else []
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{path}: this picture is broken ({error}). Repair it or take it out, and run again"
        ) from error
    return {"messages": [{"role": "user", "content": question}], "images": images}


def start_or_continue(output: Path, settings: dict[str, Any]) -> set[Item]:
    """The items that `output` already answers; a line that was being written when the last run ended is taken back.

    Raises ValueError if the file was written with other settings: its answers and the new ones would not compare.
    """
    settings_file = output.with_suffix(".settings.json")
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(settings_file, settings)
        return set()
    if not settings_file.is_file():
        raise ValueError(
            f"{output} exists, without the {settings_file.name} that this command writes beside it: choose another --output"
        )
    before = read_json(settings_file, "Choose another --output")
    changed = changed_settings(before, settings)
    if changed:
        raise ValueError(
            f"{output} was begun with other settings ({'; '.join(changed)}): choose another --output, or the old settings"
        )
    written = output.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    if whole != written:
        write_atomically(output, whole)
    answered = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
    return {(answer["image"], answer["question"]) for answer in answered}


def answer_many(
    model: PreTrainedModel,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    items: list[Item],
    output: Path,
    options: argparse.Namespace,
) -> None:
    """Answers appended to `output`, a line per item in the order of the items, on disk after each batch."""
    state = PartialState()
    step = options.batch_size * state.num_processes
    with (
        output.open("a", encoding="utf-8") as file,
        tqdm(total=len(items), desc="Answering", unit="answer", disable=not state.is_main_process) as bar,
    ):
        for start in range(0, len(items), step):
            begin = start + state.process_index * options.batch_size
            mine = items[begin : min(begin + options.batch_size, len(items))]
            rows = [as_row(item) for item in mine]
            texts = answer_batch(model, processing_class, rows, max_new_tokens=options.max_new_tokens) if rows else []
            answers = gather_object(list(zip(mine, texts, strict=True)))
            if state.is_main_process:
                for (image, question), answer in answers:
                    line = {"image": image, "question": question, "answer": answer}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                file.flush()
            bar.update(len(answers))


def stream(
    model: PreTrainedModel,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    row: dict[str, Any],
    options: argparse.Namespace,
) -> str:
    """Answer one row, printing tokens as they come; returns the answer."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    return answer_batch(model, processing_class, [row], max_new_tokens=options.max_new_tokens, streamer=streamer)[0]


def chat(
    model: PreTrainedModel,
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
    images: list[Image.Image],
    questions: list[str],
    options: argparse.Namespace,
) -> None:
    """Questions from the command line, then from the keyboard, until an empty line or the end of the input."""
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
        answer = stream(model, processing_class, {"messages": messages, "images": images}, options)
        messages.append({"role": "assistant", "content": answer})


def main(options: argparse.Namespace) -> None:
    # What is asked, and whether it can be: before any weights are loaded
    problems: list[str] = []
    questions = read_questions(options.question, problems)
    images = find_images(options.image, problems)
    if images and not is_vision(load_config(adapter_base(Path(options.model)) or options.model)):
        problems.append(f"--image: {options.model} reads text only")
    if not questions and not options.chat:
        problems.append("--question: ask something, or use --chat")
    items: list[Item] = [(image, question) for image in images or [None] for question in questions]
    if len(items) > 1 and options.output is None and not options.chat:
        problems.append(f"{len(items)} answers need a file: add --output answers.jsonl")
    if options.chat and options.output is not None:
        problems.append("--output keeps the answers to --question; a conversation is not kept: leave one of them out")
    if problems:
        raise ValueError("; ".join(problems))

    remaining = items
    if options.output is not None:
        weights = [path.stat().st_mtime for path in Path(options.model).glob("*.safetensors")]
        settings = {
            "model": options.model,
            "weights_of": datetime.fromtimestamp(max(weights), UTC).isoformat() if weights else None,
            "dtype": options.dtype,
            "load_in_4bit": options.load_in_4bit,
            "max_new_tokens": options.max_new_tokens,
        }
        take_lock(options.output, "a generate.py")
        with PartialState().main_process_first():
            done = start_or_continue(options.output, settings)
        remaining = [item for item in items if item not in done]
        if not remaining:
            give_back(options.output)
            PartialState().print(f"All {len(items):,} answers are in {options.output} already")
            return
        if done:
            PartialState().print(f"{len(items) - len(remaining):,} of {len(items):,} are answered, continuing")

    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    model, processing_class = load_for_inference(options.model, dtype=dtype, load_in_4bit=options.load_in_4bit)
    if options.chat:
        chat(model, processing_class, [as_row((image, ""))["images"][0] for image in images], questions, options)
    elif options.output is None:
        stream(model, processing_class, as_row(items[0]), options)
    else:
        answer_many(model, processing_class, remaining, options.output, options)
        give_back(options.output)
        PartialState().print(f"{len(items):,} answers: {options.output}")


def parse_options(argv: list[str]) -> argparse.Namespace:
    """The command line; flags are not abbreviated."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="a base (folder or Hub name), outputs/<run>, or a merged folder")
    parser.add_argument("--image", nargs="+", default=[], help="pictures, folders, .txt files with a path a line")
    parser.add_argument("--question", nargs="+", default=[], help="questions, .txt files with one a line")
    parser.add_argument("--output", type=Path, help="JSONL file for the answers")
    parser.add_argument("--chat", action="store_true", help="a conversation in the terminal")
    parser.add_argument("--batch_size", type=int, default=8, help="answers at a time, per process")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer in tokens")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float16", "float32"], default="auto")
    parser.add_argument("--load_in_4bit", action="store_true", help="quantise the weights: 7B parameters in 5 GB")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main(parse_options(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{Path(__file__).name}: stopped; what was answered is kept, and the same command continues")
