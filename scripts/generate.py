"""Ask a model: a base model, a run's adapter or full weights, or a merged model; one question, many, or a conversation.

    python scripts/generate.py --model outputs/llava-sample --image data/raw-sample/frames/seq_000001.jpg \
        --question "How many people are in view?"
    python scripts/generate.py --model outputs/llava-sample --image data/raw-sample/frames \
        --question "How many people are in view?" --output outputs/answers.jsonl
    python scripts/generate.py --model outputs/llava-sample --image data/raw-sample/frames/seq_000001.jpg --chat

--image takes pictures, folders of them, and .txt files with a path a line; --question takes questions and .txt files
with one a line. Each question is asked of each picture, greedily. Up to 20 answers come to the terminal; many go to
--output as JSONL ({"image", "question", "answer"}), and the same command again continues a file half done. With --chat
all pictures belong to the first question, and each question you type sees what was said before. Text-only models are
asked without --image. With --counts the file holds for each picture the median of all counts that the run finds likely,
an interval and the median's probability in place of an answer; --list_wide names pictures to look at. Several
GPUs: accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 scripts/generate.py ...
"""

import argparse
import json
import sys
import unicodedata
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetuning import command, start
from finetuning.data.pictures import SUFFIXES, find_pictures, what_is_wrong
from finetuning.flags import ANSWERS_KEPT, asking_parser, nearest_path
from finetuning.model_files import config_of
from finetuning.run_folder import (
    adapter_base,
    changed_settings,
    read_json,
    refuse_unfinished,
    write_atomically,
    write_json,
)

MOST_ON_SCREEN = 20  # answers that need no file
ACCEPTED = "accepted_changes"  # a setting of an answers file
Item = tuple[str | None, str]  # (path of the picture, question)


def read_questions(words: list[str], problems: list[str]) -> list[str]:
    """Questions and the lines of .txt files, in order; what is wrong with them is added to `problems`."""
    questions = []
    for word in words:
        if not word.endswith(".txt"):
            questions.append(word.strip())
        elif not Path(word).is_file():
            problems.append(f"--question {word}: no such file{nearest_path(word)}")
        else:
            questions += read_lines(Path(word), "--question", problems)
    # As preparation writes text: NFD Hangul would be three times as many tokens, none of which training saw.
    questions = [unicodedata.normalize("NFC", question) for question in questions]
    return [question for question in dict.fromkeys(questions) if question]


def read_lines(path: Path, flag: str, problems: list[str]) -> list[str]:
    """The lines of a text file in UTF-8, else in CP949 as Korean Windows saves it; empty ones are left out."""
    data = path.read_bytes()
    for encoding in ("utf-8-sig", "cp949"):
        try:
            return [line.strip() for line in data.decode(encoding).splitlines() if line.strip()]
        except UnicodeDecodeError:
            continue
    problems.append(f"{flag} {path}: neither UTF-8 nor CP949; save it as UTF-8")
    return []


def find_images(words: list[str], problems: list[str]) -> list[str]:
    """Paths of pictures, of those in folders and of those in .txt files; what is wrong with them goes to `problems`."""
    paths: list[Path] = []
    for word in map(Path, words):
        if word.is_dir():
            found = find_pictures(word)
            paths += found
            if not found:
                problems.append(f"--image {word}: no pictures in this folder; expected {', '.join(SUFFIXES)}")
        elif word.suffix == ".txt" and word.is_file():
            paths += map(Path, read_lines(word, "--image", problems))
        else:
            paths.append(word)
    for path in paths:
        if problem := what_is_wrong(path):
            problems.append(f"--image {path}: {problem}{nearest_path(path)}")
    return list(dict.fromkeys(map(str, paths)))


def answered_already(output: Path, settings: dict[str, Any], *unknown: str) -> set[Item]:
    """The items that `output` answers; a line that was being written when the last run ended does not count.

    Raises ValueError if the file was written with other settings, but for those `unknown` yet: its answers and the new
    ones would not compare.
    """
    settings_file = output.with_suffix(".settings.json")
    if not output.exists():
        return set()
    if not settings_file.is_file():
        raise ValueError(
            f"{output} exists, without the {settings_file.name} that this command writes beside it: choose another --output"
        )
    changed = changed_settings(read_json(settings_file, "Choose another --output"), settings, unknown)
    if changed:
        raise ValueError(
            f"{output} was begun with other settings ({'; '.join(changed)}): choose another --output, or the old settings"
        )
    written = output.read_bytes()
    answered = [json.loads(line) for line in written[: written.rfind(b"\n") + 1].decode("utf-8").splitlines()]
    return {(answer["image"], answer["question"]) for answer in answered}


def begin_or_mend(output: Path, settings: dict[str, Any]) -> None:
    """Make the file, or take back a line that was being written when the last run ended."""
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output.with_suffix(".settings.json"), settings)
        return
    written = output.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    if whole != written:
        write_atomically(output, whole)


def refused_together(options: argparse.Namespace, questions: list[str], images: list[str]) -> list[str]:
    """What of the command line does not go together, or not with the model's folder."""
    problems = []
    try:
        config = config_of(adapter_base(Path(options.model)) or options.model)
        if images and config is not None and "vision_config" not in config:
            problems.append(f"--image: {options.model} reads text only")
        if not images and config is not None and "vision_config" in config and command.is_main_process():
            print("Asked without a picture: the model sees the words alone; --image adds one", file=sys.stderr)
        refuse_unfinished(Path(options.model))
    except ValueError as error:
        problems.append(f"--model {error}")
    if not questions and not options.chat:
        problems.append("--question: ask something, or use --chat")
    num_items = max(len(images), 1) * len(questions)
    if num_items > MOST_ON_SCREEN and options.output is None and not options.chat:
        problems.append(f"{num_items} answers need a file: add --output answers.jsonl")
    if options.chat and options.output is not None:
        problems.append("--output keeps the answers to --question; a conversation is not kept: leave one of them out")
    if options.counts and (options.output is None or options.chat):
        problems.append("--counts writes a file: add --output counts.jsonl, without --chat")
    if options.engine == "vllm" and (options.chat or options.counts or options.load_in_4bit or options.base_precision):
        problems.append(
            "--engine vllm answers questions in 16 or 32 bits: without --chat, --counts, --load_in_4bit, --base_precision"
        )
    if options.list_wide and not options.counts:
        problems.append("--list_wide lists intervals: add --counts")
    return problems


def main(options: argparse.Namespace) -> None:
    """Check what is asked, then ask. Raises ValueError with all that is wrong, before PyTorch is imported."""
    # What is asked, and whether it can be: before PyTorch is imported
    problems: list[str] = []
    questions = read_questions(options.question, problems)
    images = find_images(options.image, problems)
    items: list[Item] = [(image, question) for image in images or [None] for question in questions]
    problems += refused_together(options, questions, images)
    if problems:
        raise ValueError("; ".join(problems))
    remaining = items
    if options.output is not None:
        settings = settings_of(options)
        done = answered_already(options.output, settings, ACCEPTED)
        remaining = [item for item in items if item not in done]
        if not remaining:
            print(f"All {len(items):,} answers are in {options.output} already")
            return
    base = adapter_base(Path(options.model))
    start.prepare(base, engine=options.engine)

    # Ask
    import torch

    from finetuning.device import open_processes
    from finetuning.folder_lock import give_back, take_lock
    from finetuning.inference.count_distribution import CountReader
    from finetuning.inference.count_file import settings_of as count_settings_of
    from finetuning.inference.count_file import widest, write_counts
    from finetuning.inference.session import Items, Session, open_image
    from finetuning.inference.vllm_engine import refuse_vllm
    from finetuning.kernels.int8_base import refuse_base_precision, set_base_precision
    from finetuning.models.loading import load_for_inference
    from finetuning.training.origin import refuse_changed_run

    start.imported()
    state = open_processes()
    changes = refuse_changed_run(Path(options.model), base, None, accept_changes=options.accept_changes)
    if options.engine == "vllm":
        refuse_vllm(options.model)
    refuse_base_precision(options.base_precision)
    if options.counts:
        forms, largest, calibration = count_settings_of(Path(options.model))
    if options.output is not None:
        settings |= {ACCEPTED: changes} if changes else {}
        take_lock(options.output, "a generate.py")
        done = answered_already(options.output, settings)  # again, now that nobody else writes
        remaining = [item for item in items if item not in done]
        state.wait_for_everyone()
        if len(remaining) < len(items):
            state.print(f"{len(items) - len(remaining):,} of {len(items):,} are answered, continuing")
        if state.is_main_process:
            begin_or_mend(options.output, settings)
        state.wait_for_everyone()
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    if options.engine == "vllm":
        ask_vllm(options, remaining, dtype)
        return
    model, processing_class = load_for_inference(options.model, dtype=dtype, load_in_4bit=options.load_in_4bit)
    set_base_precision(model, options.base_precision, Path(options.model))
    session = Session(model, processing_class, max_new_tokens=options.max_new_tokens, batch_size=options.batch_size)
    if options.chat:
        session.chat([open_image(image) for image in images], questions)
    elif options.output is None and len(items) == state.num_processes == 1:
        session.stream(Items(items)[0])
    elif options.output is None:
        session.show_items(items)
    elif options.counts:
        reader = CountReader(model.eval(), processing_class, forms, largest)
        rows = Items(remaining)
        write_counts(reader, calibration, remaining, rows, options.output, batch_size=options.batch_size)
        give_back(options.output)
        state.print(f"{len(items):,} counts: {options.output} ({calibration.note})")
        for line in widest(options.output, options.list_wide):
            state.print(f"  {line['image']}: {line['count']}, between {line['low']} and {line['high']}")
    else:
        session.answer_items(remaining, options.output)
        give_back(options.output)
        state.print(f"{len(items):,} answers: {options.output}")


def ask_vllm(options: argparse.Namespace, items: list[Item], dtype: Any) -> None:
    """Answers by vLLM, which shows none before it is whole."""
    from finetuning.folder_lock import give_back
    from finetuning.inference.session import Items, show_answers, write_answers
    from finetuning.inference.vllm_engine import answer_by_vllm
    from finetuning.models.processing import processing_class_for_inference

    processing_class = processing_class_for_inference(options.model)
    base = adapter_base(Path(options.model)) or options.model
    windows = answer_by_vllm(
        *(options.model, base, processing_class, Items(items)), max_new_tokens=options.max_new_tokens, dtype=dtype
    )
    if options.output is None:
        show_answers(windows, items)
        return
    write_answers(windows, items, options.output)
    give_back(options.output)
    print(f"{len(items):,} answers by vLLM: {options.output}")


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What answers depend on."""
    weights = [path.stat().st_mtime for path in Path(options.model).glob("*.safetensors")]
    return {
        "model": options.model,
        "weights_of": datetime.fromtimestamp(max(weights), UTC).isoformat() if weights else None,
        "dtype": options.dtype,
        "load_in_4bit": options.load_in_4bit,
        "max_new_tokens": options.max_new_tokens,
        **({"counts": True} if options.counts else {}),
        **({"engine": options.engine} if options.engine == "vllm" else {}),
        **({"base_precision": options.base_precision} if options.base_precision else {}),
    }


def parse_options(argv: list[str]) -> argparse.Namespace:
    """The command line; flags are not abbreviated."""
    parser = asking_parser(__doc__)
    parser.add_argument("--image", nargs="+", default=[], help="pictures, folders, .txt files with a path a line")
    parser.add_argument("--question", nargs="+", default=[], help="questions, .txt files with one a line")
    parser.add_argument("--output", type=Path, help="JSONL file for the answers")
    parser.add_argument("--counts", action="store_true", help="counts with intervals, of a run that was evaluated")
    parser.add_argument(
        "--list_wide", type=int, default=0, metavar="N", help="with --counts: name the N widest intervals"
    )
    parser.add_argument("--chat", action="store_true", help="a conversation in the terminal")
    return parser.parse_args(argv)


if __name__ == "__main__":
    command.run(lambda: main(parse_options(sys.argv[1:])), stopped=ANSWERS_KEPT)
