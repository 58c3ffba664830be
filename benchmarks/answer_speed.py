"""Speed and memory of answering: this project beside transformers' `generate`, the same questions, in turns, in one run.

    python benchmarks/answer_speed.py --model llava-hf/llava-1.5-7b-hf --output benchmarks/results/answers
    python benchmarks/answer_speed.py --model models/tiny-llava --images 6 --rounds 1 --output benchmarks/results/smoke

Only config and processor of the model are read: weights and an adapter of rank 64 on every linear layer of the language
model are drawn at random in the published shape. Answers have all --max_new_tokens tokens but for the few that a random
model ends. `--before FOLDER` adds an older checkout of this project (its `generate_answers`). Measured on one NVIDIA
H200; the second line runs anywhere. Writes results.json, report.md and answers.png.
"""

import argparse
import gc
import json
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset, Features, Image, List, Value
from matplotlib import pyplot
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image as Picture
from PIL import ImageDraw
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from train_speed import peak_rate, quantize

from finetuning.data.count_tree import AnswerForm
from finetuning.families import is_vision
from finetuning.inference import generation
from finetuning.inference.answer_stream import AnswerStream
from finetuning.inference.answerer import Answerer
from finetuning.inference.count_distribution import CountReader, read_counts
from finetuning.inference.generation import answer_batch, answer_one, generate_answers
from finetuning.models.processing import load_config, load_processing_class

GIB = 2**30
QUESTIONS = [
    "How many people can you see in this picture of the crossing?",
    "Count the people who are standing in the picture. How many?",
    "What is the number of people in this frame of the camera?",
]


@dataclass(frozen=True)
class Setting:
    """What is asked, of which model."""

    title: str
    questions: int = 1  # about each picture
    nf4: bool = False
    single: bool = False  # one question at a time, and how long it takes
    tokens: int | None = None  # longest answer; None: --max_new_tokens


SETTINGS = {
    "adapter": Setting("adapter, one question a picture"),
    "shared": Setting("adapter, three questions a picture", questions=3),
    "nf4": Setting("adapter over NF4, one question a picture", nf4=True),
    "single": Setting("one question at a time", single=True, tokens=33),
}


def draw_frames(folder: Path, number: int) -> list[str]:
    """JPEG files of 640 x 480 with discs on noise, as large as a camera's."""
    drawn = random.Random(0)
    paths = []
    for index in range(number):
        picture = Picture.effect_noise((640, 480), 40).convert("RGB")
        for _ in range(drawn.randint(1, 30)):
            x, y = drawn.randint(10, 620), drawn.randint(10, 460)
            ImageDraw.Draw(picture).ellipse((x, y, x + 14, y + 24), fill=tuple(drawn.randint(0, 255) for _ in range(3)))
        paths.append(str(folder / f"{index:06d}.jpg"))
        picture.save(paths[-1], quality=85)
    return paths


def rows_of(paths: Sequence[str], questions: int, number: int, prompt_tokens: int, repeat: int = 1) -> Dataset:
    """Rows to ask: pictures with `questions` each, or `number` texts of about `prompt_tokens` tokens without them."""
    message = {"role": Value("string"), "content": Value("string")}
    if not paths:
        words = ["What", "is", "known", "about", "the", "old", "story", "of"]
        rows = [
            {
                "messages": [
                    {
                        "role": "user",
                        "content": " ".join(words[(index + place) % 8] for place in range(prompt_tokens - 10)),
                    }
                ]
            }
            for index in range(number)
        ]
        return Dataset.from_list(rows, features=Features({"messages": List(message)}))
    rows = [
        {"messages": [{"role": "user", "content": question}], "images": [path], "image_id": f"{path} {time}"}
        for time in range(repeat)
        for path in paths
        for question in QUESTIONS[:questions]
    ]
    features = {"messages": List(message), "images": List(Image()), "image_id": Value("string")}
    return Dataset.from_list(rows, features=Features(features))


def random_model(name: str, *, nf4: bool) -> PeftModel:
    """The published shape with an adapter, weights drawn on the device: the same at each call."""
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    config = load_config(name)
    set_seed(0)
    auto_class = AutoModelForImageTextToText if is_vision(config) else AutoModelForCausalLM
    with torch.device("cuda" if cuda else "cpu"):
        model = auto_class.from_config(config, dtype=dtype, attn_implementation="sdpa")
        if nf4:
            quantize(model, dtype)
        targets = r".*(language_model|^model)\.layers\..*(?:q|k|v|o|gate|up|down)_proj"
        targets = targets if is_vision(config) else "all-linear"
        model = get_peft_model(model, LoraConfig(r=64, lora_alpha=32, target_modules=targets))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.02)
        parameter.requires_grad_(False)
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)  # as a run is loaded to be asked
    return model.eval()


def load_before(folder: Path) -> Callable:
    """`generate_answers` of an older checkout, whose modules have the names of this one's."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "finetuning"}
    sys.path.insert(0, str(folder / "scripts"))
    try:
        try:
            from finetuning.generation import generate_answers as before
        except ImportError:
            from finetuning.inference.generation import generate_answers as before
        return before
    finally:
        sys.path.remove(str(folder / "scripts"))
        for name in [name for name in sys.modules if name.split(".")[0] == "finetuning"]:
            del sys.modules[name]
        sys.modules.update(ours)


def by_transformers(model, processing_class, rows, *, batch_size: int, max_new_tokens: int) -> list[str]:
    """transformers' `generate` on batches in the order of the rows."""
    answers = []
    for start in range(0, len(rows), batch_size):
        batch = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
        answers += answer_batch(model, processing_class, batch, max_new_tokens=max_new_tokens)
    return answers


# Stage -> the method of Answerer that computes it.
STAGES = {"see": "see", "prefill": "prefill_chunk", "decode": "decode"}


class Stages:
    """Seconds of this project's stages, summed, one after the other: each waits for the GPU, so that the parts are true."""

    def __init__(self):
        self.seconds = dict.fromkeys(STAGES, 0.0)

    def __enter__(self):
        self.replaced = {stage: getattr(Answerer, method) for stage, method in STAGES.items()}
        for stage, method in STAGES.items():
            setattr(Answerer, method, self.timed(stage, self.replaced[stage]))
        generation.AnswerStream = partial(AnswerStream, overlaps=False)
        return self

    def __exit__(self, *error):
        for stage, method in STAGES.items():
            setattr(Answerer, method, self.replaced[stage])
        generation.AnswerStream = AnswerStream

    def timed(self, stage: str, method: Callable) -> Callable:
        """`method`, whose seconds on the GPU are added to `stage`."""

        def with_time(*args, **kwargs):
            wait_for_gpu()
            started = time.perf_counter()
            result = method(*args, **kwargs)
            wait_for_gpu()
            self.seconds[stage] += time.perf_counter() - started
            return result

        return with_time


def wait_for_gpu() -> None:
    """Let the host wait for all that was launched; nothing on a CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def profile(answer: Callable[[], object], most: int = 15) -> list[str]:
    """Lines of Markdown: how long the GPU worked and rested in one call, and what its kernels took, the longest first."""
    from torch.profiler import DeviceType, ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CUDA]) as recorded:
        answer()
        wait_for_gpu()
    kernels = [event for event in recorded.events() if event.device_type == DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    busy, end, gaps = 0.0, spans[0][0], []
    for start, stop in spans:
        if start > end:
            gaps.append((start - end) / 1e3)
        busy += max(0.0, stop - max(start, end)) / 1e6
        end = max(end, stop)
    whole, added = (end - spans[0][0]) / 1e6, sum(stop - start for start, stop in spans) / 1e6
    longest = ", ".join(f"{gap:.0f}" for gap in sorted(gaps, reverse=True)[:10])
    lines = [
        f"GPU: {whole:.2f} s from its first kernel to its last, {1 - busy / whole:.1%} of them idle; {added - busy:.2f} s of "
        f"{added:.2f} s of kernels ran beside others. Longest gaps, ms: {longest}",
        "",
        "| kernel | calls | ms |",
        "|---|---|---|",
    ]
    by_name: dict[str, list[float]] = {}
    for event in kernels:
        by_name.setdefault(event.name, []).append((event.time_range.end - event.time_range.start) / 1e3)
    longest_first = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    return lines + [
        f"| {name[:110].replace('|', '/')} | {len(ms)} | {sum(ms):.1f} |" for name, ms in longest_first[:most]
    ]


def needed_flops(name: str, prompt_tokens: float, new_tokens: int, pictures_a_question: float) -> float:
    """Operations of an answer that nothing can spare: two a weight and token, each picture and its tokens once."""
    config = load_config(name)
    text = config.get_text_config()
    width, layers = text.hidden_size, text.num_hidden_layers
    head_dim = getattr(text, "head_dim", None) or width // text.num_attention_heads
    weights = layers * (
        2 * width * head_dim * (text.num_attention_heads + text.num_key_value_heads)
        + 3 * width * text.intermediate_size
    )
    flops = 2 * weights * (prompt_tokens + new_tokens) + 2 * text.vocab_size * width * new_tokens
    if is_vision(config):
        vision = config.vision_config
        patches = (vision.image_size // vision.patch_size) ** 2 + 1
        of_layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
        flops += 2 * vision.num_hidden_layers * of_layer * patches * pictures_a_question
    return flops


def measure(name: str, setting: Setting, ways: dict[str, Callable], options: argparse.Namespace) -> list[dict]:
    """Every way on the same rows, in turns."""
    config = load_config(options.model)
    processing_class = load_processing_class(options.model)
    tokens = setting.tokens or options.max_new_tokens
    results = []
    with TemporaryDirectory() as folder:
        paths = draw_frames(Path(folder), options.images) if is_vision(config) else []
        asked_in_all = options.images * options.repeat * setting.questions
        rows = rows_of(paths, setting.questions, asked_in_all, options.prompt_tokens, options.repeat)
        models = {way: random_model(options.model, nf4=setting.nf4) for way in ways}
        for number in range(options.rounds + 1):  # the first warms up
            for way, answer in ways.items():
                count = min(len(rows), options.singles if setting.single else len(rows))
                if way in ("transformers", "before"):  # enough for a steady rate of batches that are all alike
                    count = min(count, options.images * setting.questions)
                if number == 0 and not setting.single:
                    count = min(count, options.warmup)
                asked = rows.select(range(count))
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                wait_for_gpu()
                started = time.perf_counter()
                answers = answer(models[way], processing_class, asked, tokens)
                wait_for_gpu()
                seconds = time.perf_counter() - started
                if number:
                    peak = torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None
                    result = {"setting": name, "way": way, "answers": count, "seconds": seconds, "peak_gib": peak}
                    results.append(result | {"texts": answers})
        if "this project" in ways and not setting.single:
            some = rows.select(range(min(len(rows), options.images * setting.questions)))
            with Stages() as stages:
                started = time.perf_counter()
                ways["this project"](models["this project"], processing_class, some, tokens)
                whole = time.perf_counter() - started
            parts = {**stages.seconds, "waiting for pictures and the rest": whole - sum(stages.seconds.values())}
            results.append({"setting": name, "way": "this project", "stages": parts})
        if options.profile and "this project" in ways and torch.cuda.is_available():
            some = rows if setting.single else rows.select(range(min(len(rows), options.images * setting.questions)))
            results.append(
                {
                    "setting": name,
                    "way": "this project",
                    "profile": profile(
                        lambda: ways["this project"](models["this project"], processing_class, some, tokens)
                    ),
                }
            )
        prompt = sum(len(prompt_tokens(processing_class, rows[index])) for index in range(setting.questions))
        image = len(prompt_tokens(processing_class, rows[0])) if paths else 0
        shared = max(0, image - 32) * (
            setting.questions - 1
        )  # what other questions about a picture need not compute again
        flops = needed_flops(options.model, (prompt - shared) / setting.questions, tokens, 1 / setting.questions)
        for result in results:
            result["share_of_peak"] = (
                flops * result["answers"] / result["seconds"] / options.peak if "answers" in result else None
            )
    return results


def prompt_tokens(processing_class, row: dict) -> list[int]:
    """Token ids of one row's prompt, as generation sends it."""
    from finetuning.data.collator import prompt_batch

    return prompt_batch(processing_class, [row])["input_ids"][0].tolist()


def one_by_one(model, processing_class, rows, tokens: int) -> list[str]:
    """As a conversation asks: the memory and the graphs of the first question serve the next ones."""
    answerer = Answerer(model, processing_class, max_new_tokens=tokens, batch_size=1)
    return [answer_one(model, processing_class, row, max_new_tokens=tokens, answerer=answerer) for row in rows]


def all_counts(model, processing_class, rows, tokens: int) -> list[str]:
    """The likelihood of each of the counts 0..60 as the answer, in place of one greedy answer; the most likely is given."""
    forms = dict.fromkeys(QUESTIONS, AnswerForm("", " people."))
    reader = CountReader(model, processing_class, forms, largest=60)
    likelihoods = read_counts(reader, rows, batch_size="auto")
    return [str(max(range(len(row)), key=row.__getitem__)) for row in likelihoods if row is not None]


def ways_of(setting: Setting, options: argparse.Namespace, before: Callable | None) -> dict[str, Callable]:
    """What is measured: (model, processing class, rows, tokens) -> answers."""
    if setting.single:
        return {
            "transformers": lambda model, processing_class, rows, tokens: [
                answer_batch(model, processing_class, [row], max_new_tokens=tokens)[0] for row in rows
            ],
            "this project": one_by_one,
        }
    ways: dict[str, Callable] = {}
    if "transformers" in options.ways:
        ways["transformers"] = lambda model, processing_class, rows, tokens: by_transformers(
            model, processing_class, rows, batch_size=options.batch_size, max_new_tokens=tokens
        )
    if before is not None:
        ways["before"] = lambda model, processing_class, rows, tokens: before(
            model, processing_class, rows, batch_size=options.batch_size, max_new_tokens=tokens
        )
    if "counts" in options.ways:
        ways["all counts"] = all_counts
    ways["this project"] = lambda model, processing_class, rows, tokens: generate_answers(
        model, processing_class, rows, batch_size="auto", max_new_tokens=tokens
    )
    return ways


def write_report(results: list[dict], options: argparse.Namespace) -> str:
    """The results as Markdown: a header of the machine and a table, one row for each way of answering."""
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    lines = [
        f"{machine}, torch {torch.__version__}, {options.model} in its published shape with random weights, LoRA r=64, "
        f"batch {options.batch_size} (this project: auto), {options.max_new_tokens} new tokens, {options.rounds} rounds "
        f"in turns; matrix peak {options.peak / 1e12:.3g} TFLOP/s",
        "",
        "| | way | answers/s | s an answer | peak GiB | share of peak | answers as transformers' |",
        "|---|---|---|---|---|---|---|",
    ]
    rates: dict[tuple[str, str], float] = {}
    for setting in dict.fromkeys(result["setting"] for result in results):
        timed = [result for result in results if result["setting"] == setting and "seconds" in result]
        first = timed[0]
        for way in dict.fromkeys(result["way"] for result in timed):
            rounds = [result for result in timed if result["way"] == way]
            seconds = sum(result["seconds"] for result in rounds) / len(rounds)
            rate = rounds[0]["answers"] / seconds
            rates[setting, way] = rate
            same = sum(one == two for one, two in zip(first["texts"], rounds[0]["texts"], strict=False))
            peak = max((result["peak_gib"] or 0) for result in rounds)
            share = sum(result["share_of_peak"] for result in rounds) / len(rounds)
            lines.append(
                f"| {SETTINGS[setting].title if setting in SETTINGS else setting} | {way} | {rate:.1f} | {1 / rate:.3f} | "
                f"{peak:.1f} | {share:.2f} | {same} of {min(first['answers'], rounds[0]['answers'])} |"
            )
    for result in results:
        if "stages" in result:
            parts = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result["stages"].items())
            lines += ["", f"{result['setting']}, this project, each stage waited for: {parts}"]
        if "profile" in result:
            lines += ["", f"{result['setting']}, this project, profiled.", *result["profile"]]
    text = "\n".join(lines) + "\n"
    facts = {
        "machine": machine,
        "torch": torch.__version__,
        **{key: str(value) for key, value in vars(options).items()},
    }
    kept = [{key: value for key, value in result.items() if key != "texts"} for result in results]
    settings = {name: asdict(setting) for name, setting in SETTINGS.items()}
    (options.output / "results.json").write_text(
        json.dumps({"facts": facts, "settings": settings, "results": kept}, indent=1) + "\n", encoding="utf-8"
    )
    (options.output / "report.md").write_text(text, encoding="utf-8")
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    axes.barh([f"{setting}: {way}" for setting, way in rates], list(rates.values()))
    axes.invert_yaxis()
    axes.set(xlabel="answers a second", title="The same questions")
    figure.savefig(options.output / "answers.png", dpi=120)
    pyplot.close(figure)
    return text


def main() -> None:
    """Measure every case in turn and write its rows as JSON and Markdown to --output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="Hub name or folder; config and processor are read, no weights")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results; must not hold any yet")
    parser.add_argument("--settings", nargs="+", default=["adapter"], choices=list(SETTINGS), help="what is asked")
    parser.add_argument(
        "--ways",
        nargs="+",
        default=["transformers"],
        choices=["transformers", "counts", "none"],
        help="beside this project's greedy answers: transformers' generate, the likelihoods of all counts, or nothing",
    )
    parser.add_argument("--before", type=Path, help="an older checkout of this project, to measure beside it")
    parser.add_argument("--images", type=int, default=256, help="pictures (questions, for a text model)")
    parser.add_argument("--repeat", type=int, default=1, help="ask this project about every picture so many times")
    parser.add_argument("--profile", action="store_true", help="profile one more call on a GPU")
    parser.add_argument("--max_new_tokens", type=int, default=12)
    parser.add_argument("--prompt_tokens", type=int, default=40, help="tokens of a text model's question, about")
    parser.add_argument("--batch_size", type=int, default=64, help="of transformers and of the older checkout")
    parser.add_argument("--rounds", type=int, default=2, help="how often each way runs, in turns")
    parser.add_argument("--warmup", type=int, default=64, help="rows asked before it is measured")
    parser.add_argument("--singles", type=int, default=5, help="questions asked one at a time")
    options = parser.parse_args()
    if (options.output / "results.json").exists():
        sys.exit(f"answer_speed.py: {options.output} holds results already: choose another --output")
    before = load_before(options.before) if options.before else None
    options.output.mkdir(parents=True, exist_ok=True)
    options.peak = peak_rate()
    results: list[dict] = []
    for name in tqdm(options.settings, unit="setting"):
        setting = SETTINGS[name]
        results += measure(name, setting, ways_of(setting, options, before), options)
        report = write_report(results, options)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(report)


if __name__ == "__main__":
    main()
