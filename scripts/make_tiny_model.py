"""Make a small model of the real classes, to try everything offline on a CPU.

    python scripts/make_tiny_model.py --architecture llava --output models/tiny-llava --pretrain
    python scripts/make_tiny_model.py --architecture gemma --output models/tiny-gemma

llava: CLIP vision tower, projector, Llama, LlavaProcessor. vipllava: several layers of the tower. llava_next: around a
Mistral, with tiles. llava_onevision: around a Qwen2, with more tiles. gemma3: Gemma 3 with pictures. gemma: GemmaForCausalLM with Gemma's turn tokens. All get a tokenizer
of their own, trained on the text below (Hangul included). With --pretrain the LLaVA is trained in full, for about a minute
on two cores, to count drawn shapes: LoRA on purely random weights does not learn, a base that has seen something does. The
same seed gives the same weights on the same machine.
"""

from finetuning import command  # first: see there

# isort: split
import argparse
import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import (
    BaseImageProcessor,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GemmaTokenizer,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2Config,
    SiglipVisionConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
    set_seed,
)

from finetuning.data.collator import LlavaDataCollator
from finetuning.flags import Parser
from finetuning.models.onevision_processor import LlavaOnevisionProcessor
from finetuning.models.processing import CHAT_TEMPLATES
from finetuning.models.published_names import new_model, save

TEXT = """
How many people are in view? Count the people in the picture. How many persons can you see in this frame?
There are {n} people in view. {n} people. I can see {n} people. No one is there. one two three four five six seven eight
Is it crowded? Yes, it is crowded. No, it is quiet. Describe the scene. A shopping mall seen by a CCTV camera.
How many shapes are there? There are {n} shapes. How many circles, squares and triangles do you see? {n} shapes.
사람이 몇 명 있나요? 이 장면에 사람이 몇 명 보이나요? CCTV 화면에 보이는 사람 수를 알려 주세요. 사람 수를 세어 주세요.
{n}명입니다. 모두 {n}명이 보입니다. 아무도 없습니다. 화면이 붐비나요? 네, 붐빕니다. 아니요, 한산합니다. 쇼핑몰의 모습을 설명해 주세요.
도형이 몇 개 있나요? 도형은 {n}개입니다. 일곱 여덟 아홉 열 스물 서른 하나 둘 셋 넷 다섯 여섯
What is the anime about? Who made it? How was it received? Its genres are Action, Adventure, Comedy, Drama, Fantasy.
It was produced by the studio, has {n} episodes, is rated PG-13 and was scored {n}.{n} by {n} users. Also known as.
이 애니메이션은 어떤 작품인가요? 장르는 액션, 모험, 코미디입니다. 제작사는 어디인가요? 총 {n}화이며 평점은 {n}.{n}점입니다.
"""

GRID = 4  # rows, and cells of a row, in which shapes are located


def corpus(text: Path | None = None) -> list[str]:
    """Lines that a vocabulary is learnt from: the project's own, and those of the file `text`."""
    own = [line.format(n=n) for n in range(60) for line in TEXT.strip().splitlines()]
    return own if text is None else own + text.read_text(encoding="utf-8-sig").splitlines()


def train_vocabulary(
    special_tokens: list[str], size: int, text: Path | None = None
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """BPE with byte fallback on `corpus(text)`; digits stay single, as in Llama and Gemma."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Digits(individual_digits=True)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special_tokens + byte_tokens, show_progress=False)
    tokenizer.train_from_iterator(corpus(text), trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    return learned["vocab"], [tuple(pair) for pair in learned["merges"]]


def llama_tokenizer() -> LlamaTokenizer:
    """A vocabulary of 800 words, with the image mark."""
    vocabulary, merges = train_vocabulary(["<unk>", "<s>", "</s>"], 800)
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=merges, pad_token="<pad>", legacy=False)  # noqa: S106
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def tower_sizes(args: argparse.Namespace) -> dict[str, int]:
    """Sizes of a small vision tower, as any config of transformers calls them; in pixels and channels."""
    return {
        "hidden_size": args.vision_hidden_size,
        "intermediate_size": 2 * args.vision_hidden_size,
        "num_hidden_layers": args.vision_layers,
        "num_attention_heads": 4,
        "image_size": args.image_size,
        "patch_size": args.patch_size,
    }


def clip_config(args: argparse.Namespace) -> CLIPVisionConfig:
    """A small CLIP tower."""
    return CLIPVisionConfig(**tower_sizes(args))


def siglip_config(args: argparse.Namespace) -> SiglipVisionConfig:
    """A small SigLIP tower."""
    return SiglipVisionConfig(
        **tower_sizes(args),
        vision_use_head=False,  # pyrefly: ignore[unexpected-keyword] - as published
    )


def text_settings(tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> dict[str, int]:
    """What configs of language models have in common."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": args.hidden_size,
        "intermediate_size": 2 * args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def clip_processor(
    make: Callable[..., ProcessorMixin], image_processor: Callable[..., BaseImageProcessor], template: str,
    args: argparse.Namespace, **views: Any,
) -> ProcessorMixin:  # fmt: skip
    """A processor for a CLIP tower with a tokenizer of its own; `views` are settings of its image processor."""
    size = args.image_size
    return make(
        image_processor=image_processor(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **views
        ),
        tokenizer=llama_tokenizer(),
        patch_size=args.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(CHAT_TEMPLATES / template).read_text(encoding="utf-8"),
    )


def one_view_model(
    make: Callable[..., PreTrainedModel], configure: Callable[..., PreTrainedConfig], layer: int | list[int],
    processor: ProcessorMixin, args: argparse.Namespace,
) -> PreTrainedModel:  # fmt: skip
    """A model with random weights that sees a picture as one view, by these layers of its tower."""
    tokenizer = processor.tokenizer
    config = configure(
        vision_config=clip_config(args),
        text_config=LlamaConfig(**text_settings(tokenizer, args), num_key_value_heads=4),
        image_token_index=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        vision_feature_layer=layer,
    )
    return make(config)


def make_llava(args: argparse.Namespace) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A LLaVA with random weights, and its processor."""
    processor = clip_processor(LlavaProcessor, LlavaImageProcessor, "llava.jinja", args, do_pad=True)
    return one_view_model(LlavaForConditionalGeneration, LlavaConfig, -2, processor, args), processor


def make_vipllava(args: argparse.Namespace) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A ViP-LLaVA with random weights, which reads three layers of its tower, and its processor."""
    processor = clip_processor(LlavaProcessor, LlavaImageProcessor, "vipllava.jinja", args, do_pad=True)
    return one_view_model(VipLlavaForConditionalGeneration, VipLlavaConfig, [-2, -3, 1], processor, args), processor


def make_llava_next(args: argparse.Namespace) -> tuple[LlavaNextForConditionalGeneration, ProcessorMixin]:
    """A LLaVA-NeXT around a Mistral with random weights, and its processor: a view of all and up to four tiles."""
    size = args.image_size
    pinpoints = [[size * rows, size * columns] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    processor = clip_processor(
        LlavaNextProcessor, LlavaNextImageProcessor, "llava_mistral.jinja", args, image_grid_pinpoints=pinpoints
    )
    tokenizer = processor.tokenizer
    config = LlavaNextConfig(
        vision_config=clip_config(args),
        text_config=MistralConfig(**text_settings(tokenizer, args), num_key_value_heads=2, sliding_window=None),
        image_grid_pinpoints=pinpoints,
        image_token_index=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,  # pyrefly: ignore[unexpected-keyword] - of any config
        vision_feature_layer=-2,
    )
    return LlavaNextForConditionalGeneration(config), processor


def make_gemma(args: argparse.Namespace) -> tuple[GemmaForCausalLM, GemmaTokenizer]:
    """A Gemma with random weights, and its tokenizer."""
    turns = ["<start_of_turn>", "<end_of_turn>"]
    vocabulary, merges = train_vocabulary(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *turns], 1000 if args.text is None else 2000, args.text
    )
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, extra_special_tokens=turns)
    template = CHAT_TEMPLATES / "gemma.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    config = GemmaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=2 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=args.hidden_size // 4,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GemmaForCausalLM(config), tokenizer


def make_llava_onevision(
    args: argparse.Namespace,
) -> tuple[LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor]:
    """A LLaVA-OneVision around a Qwen2 with random weights, and its processor: more tiles, scaled down to two."""
    tokenizer, size = llama_tokenizer(), args.image_size
    tokenizer.add_tokens(["<video>", "<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.eos_token, tokenizer.bos_token = "<|im_end|>", None
    pinpoints = [[size * rows, size * columns] for rows in range(1, 4) for columns in range(1, 4)]
    processor = LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size={"height": size, "width": size}, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer,
        num_image_tokens=(size // args.patch_size) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
        chat_template=(CHAT_TEMPLATES / "llava_onevision.jinja").read_text(encoding="utf-8"),
    )
    config = LlavaOnevisionConfig(
        vision_config=siglip_config(args),
        text_config=Qwen2Config(**text_settings(tokenizer, args), num_key_value_heads=2),
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_2",
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        pad_token_id=tokenizer.pad_token_id,  # pyrefly: ignore[unexpected-keyword] - of any config
    )
    model = LlavaOnevisionForConditionalGeneration(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
            torch.nn.init.normal_(parameter, std=0.02)  # zero in a new model
    return model, processor


def make_gemma3(args: argparse.Namespace) -> tuple[Gemma3ForConditionalGeneration, Gemma3Processor]:
    """A Gemma 3 that sees, with random weights: a SigLIP tower, a layer that sees 64 tokens back before one that sees all."""
    turns = ["<start_of_turn>", "<end_of_turn>"]
    marks = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    vocabulary, merges = train_vocabulary(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *turns, *marks.values()], 1000, args.text
    )
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges, extra_special_tokens=[*turns, *marks.values()], **marks)
    side = args.image_size // args.patch_size // 2
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": args.image_size, "width": args.image_size}),
        tokenizer=tokenizer,
        image_seq_length=side**2,
        chat_template=(CHAT_TEMPLATES / "gemma3.jinja").read_text(encoding="utf-8"),
    )
    config = Gemma3Config(
        vision_config=siglip_config(args),
        text_config=Gemma3TextConfig(
            **text_settings(tokenizer, args),
            num_key_value_heads=2,
            head_dim=args.hidden_size // 4,
            query_pre_attn_scalar=args.hidden_size // 4,
            sliding_window=64,
            layer_types=["full_attention" if n % 2 else "sliding_attention" for n in range(args.layers)],
        ),
        mm_tokens_per_image=side**2,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.02)  # zero in a new model
    return model, processor


def draw_shapes(rng: random.Random, size: int, count: int) -> tuple[Image.Image, list[tuple[float, float]]]:
    """A square picture of `count` shapes (discs, bars, and pins: a disc on a bar) that may hide one another in part.

    Returned with the (x, y) of each shape's middle, in pixels.
    """
    image = Image.new("RGB", (size, size), tuple(rng.randint(110, 235) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    scale = size * rng.uniform(0.5, 1.0) * min(1.0, math.sqrt(20 / max(count, 20)))
    placed: list[tuple[float, float]] = []
    while len(placed) < count:
        x, y = rng.uniform(0.08, 0.92) * size, rng.uniform(0.08, 0.92) * size
        # A shape wholly behind another could not be counted: centres keep a distance, given up if there is no room.
        distance = scale * 0.09 * rng.random() ** 0.3
        if any(math.hypot(x - other_x, y - other_y) < distance for other_x, other_y in placed):
            continue
        placed.append((x, y))
    for x, y in sorted(placed, key=lambda position: position[1]):
        width, height = scale * rng.uniform(0.025, 0.04), scale * rng.uniform(0.05, 0.09)
        head, body = (tuple(rng.randint(0, 110) for _ in range(3)) for _ in range(2))
        kind = rng.choice(["disc", "bar", "pin", "pin"])
        if kind != "disc":
            draw.rectangle([x - width, y - height, x + width, y + height], fill=body)
        if kind != "bar":
            top = y if kind == "disc" else y - height
            draw.ellipse([x - width, top - width, x + width, top + width], fill=head)
    return image, placed


def describe_grid(places: list[tuple[float, float]], size: int) -> str:
    """How many places lie in each cell of a square of `size` pixels, 9 at most: "0120 0000 3001 0010", row by row."""
    cells = [[0] * GRID for _ in range(GRID)]
    for x, y in places:
        cells[int(y / size * GRID)][int(x / size * GRID)] += 1
    return " ".join("".join(str(min(number, 9)) for number in row) for row in cells)


def shape_row(rng: random.Random, size: int, max_count: int) -> dict:
    """A question about a drawn picture of 1 to `max_count` shapes; every second time also where they are.

    Where things are teaches a small model to look, many numbers a picture: how soon it counts then hangs less on its seed.
    """
    count = rng.randint(1, max_count)
    question, answer = rng.choice(
        [("How many shapes are there?", f"{count} shapes."), ("도형이 몇 개 있나요?", f"{count}개입니다.")]
    )
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    image, places = draw_shapes(rng, size, count)
    if rng.random() < 0.5:
        messages += [
            {"role": "user", "content": "Where are they?"},
            {"role": "assistant", "content": describe_grid(places, size)},
        ]
    return {"messages": messages, "images": [image]}


def text_row(rng: random.Random, sentences: list[str]) -> dict:
    """A sentence to repeat: every word must have been an answer once, since LoRA leaves `lm_head` as it is."""
    sentence = rng.choice(sentences)
    messages = [{"role": "user", "content": f"Repeat: {sentence}"}, {"role": "assistant", "content": sentence}]
    return {"messages": messages, "images": []}


class Lessons(Dataset):
    """Batch n of the pretraining: shapes to count, and a quarter as many sentences to repeat."""

    def __init__(self, collator: LlavaDataCollator, args: argparse.Namespace):
        self.collator, self.args, self.sentences = collator, args, corpus()

    def __len__(self) -> int:
        return self.args.steps

    def __getitem__(self, step: int) -> dict:
        rng = random.Random(f"{self.args.seed} {step}")
        rows = [shape_row(rng, self.args.image_size, self.args.max_count) for _ in range(self.args.batch_size)]
        return self.collator(rows + [text_row(rng, self.sentences) for _ in range(self.args.batch_size // 4)])


def pretrain(model: LlavaForConditionalGeneration, processor: LlavaProcessor, args: argparse.Namespace) -> None:
    """Train all weights on drawn shapes, so that the sample has a base that sees."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, args.steps, pct_start=0.1)
    # Drawing keeps a GPU waiting; on a few CPU cores it would only compete with the training.
    workers = (os.cpu_count() or 1) - 2 if device == "cuda" else 0
    batches = DataLoader(Lessons(LlavaDataCollator(processor), args), batch_size=None, num_workers=max(workers, 0))
    with tqdm(batches, desc="Pretraining on shapes", unit="step") as bar:
        for batch in bar:
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}")


MAKERS = {
    "llava": make_llava,
    "vipllava": make_vipllava,
    "llava_next": make_llava_next,
    "llava_onevision": make_llava_onevision,
    "gemma3": make_gemma3,
    "gemma": make_gemma,
}


def main() -> None:
    """Make the model, train it if asked, and save it with its processor."""
    parser = Parser(__doc__)
    parser.add_argument("--architecture", choices=list(MAKERS), required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder to make, such as models/tiny-llava")
    parser.add_argument(
        "--pretrain", action="store_true", help="llava only: train it to count drawn shapes and to repeat sentences"
    )
    parser.add_argument("--text", type=Path, help="Gemma only: a file whose words become tokens, too, such as a CSV")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hidden_size", type=int, default=128, help="width of the language model")
    parser.add_argument("--layers", type=int, default=2, help="layers of the language model")
    parser.add_argument("--image_size", type=int, default=64, help="side of the picture in pixels")
    parser.add_argument("--patch_size", type=int, default=8)
    parser.add_argument("--vision_hidden_size", type=int, default=128)
    parser.add_argument("--vision_layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=850, help="steps of --pretrain")
    parser.add_argument("--max_count", type=int, default=20, help="shapes in a picture at most")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1.5e-3)
    args = parser.parse_args()
    if args.pretrain and args.architecture != "llava":
        raise ValueError("--pretrain is for --architecture llava: leave it out")
    if args.text is not None and (args.architecture != "gemma" or not args.text.is_file()):
        raise ValueError(f"--text {args.text}: expected a file, and --architecture gemma")
    with new_model(args.output) as folder:
        set_seed(args.seed)
        model, processing_class = MAKERS[args.architecture](args)
        if args.pretrain:
            pretrain(model, processing_class, args)
        save(model, processing_class, folder)
    print(f"{args.output}: {type(model).__name__} with {model.num_parameters():,} parameters")


if __name__ == "__main__":
    command.run(main)
