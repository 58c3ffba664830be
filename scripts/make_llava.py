"""Make a LLaVA of a language model and a vision tower that do not know each other yet, to train in two stages.

    python scripts/make_llava.py --language_model lmsys/vicuna-7b-v1.5 --vision_tower openai/clip-vit-large-patch14-336 \\
        --output models/my-llava

The language model is a Llama or a Mistral, the tower a CLIP. Their weights are copied as they are; the projector between them
is drawn at random. The vocabulary gets a token for pictures, and one for padding where it has none. Stage 1 trains the
projector alone, stage 2 goes on with LoRA: docs/training.md has both commands.
"""

from finetuning import command  # first: see there

# isort: split
import argparse
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from finetuning.families import dialogue_form
from finetuning.flags import Parser
from finetuning.models.processing import SAFE, load_config, template_path
from finetuning.models.published_names import new_model, save

VOCABULARY_MULTIPLE = 64  # rows of the embedding, as published


def join(
    language_model: PreTrainedModel, tower: CLIPVisionModel, tokenizer: PreTrainedTokenizerBase
) -> LlavaForConditionalGeneration:
    """One model of both, with a new projector in the language model's dtype; their weights are not copied.

    Adds the image token, and a padding token where there is none, to `tokenizer`, and rows for them to the embeddings.
    """
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    language_model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=VOCABULARY_MULTIPLE)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,  # pyrefly: ignore[unexpected-keyword] - of any config
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    projector = type(model.model.multi_modal_projector)(config)
    for module in projector.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=config.text_config.initializer_range)
            torch.nn.init.zeros_(module.bias)
    model.model.multi_modal_projector = projector.to(language_model.dtype)
    model.model.language_model, model.lm_head = language_model.model, language_model.lm_head
    model.model.vision_tower = tower.to(language_model.dtype)
    model.config.dtype = language_model.dtype
    return model


def make_processor(tower_name: str, tower: CLIPVisionModel, tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """The tower's own picture settings, the whole picture padded to a square, and the dialogue form of the language model."""
    settings = AutoImageProcessor.from_pretrained(tower_name, **SAFE).to_dict()
    settings.pop("image_processor_type", None)
    return LlavaProcessor(
        image_processor=LlavaImageProcessor(**settings | {"do_pad": True}),
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def refuse_other_parts(language_model: str, vision_tower: str) -> None:
    """Raise ValueError, all reasons together, for parts that cannot be joined."""
    text, vision = load_config(language_model), AutoConfig.from_pretrained(vision_tower, **SAFE)
    problems = []
    if text.model_type not in ("llama", "mistral"):
        problems.append(f"--language_model {language_model} is of type {text.model_type}, expected llama or mistral")
    if vision.model_type not in ("clip", "clip_vision_model"):
        problems.append(f"--vision_tower {vision_tower} is of type {vision.model_type}, expected clip")
    if not problems:
        dialogue_form(text)
    if problems:
        raise ValueError("; ".join(problems))


def main() -> None:
    """Join the two models and write the LLaVA. Raises ValueError where they cannot be joined."""
    parser = Parser(__doc__)
    parser.add_argument("--language_model", required=True, help="Hub name or folder of a Llama or a Mistral")
    parser.add_argument("--vision_tower", required=True, help="Hub name or folder of a CLIP")
    parser.add_argument("--output", type=Path, required=True, help="folder to make, such as models/my-llava")
    parser.add_argument("--seed", type=int, default=0, help="of the projector's weights")
    args = parser.parse_args()
    refuse_other_parts(args.language_model, args.vision_tower)
    with new_model(args.output) as folder:
        make(args, folder)


def make(args: argparse.Namespace, folder: Path) -> None:
    """The model and its processor, saved in `folder`."""
    set_seed(args.seed)
    language_model = AutoModelForCausalLM.from_pretrained(args.language_model, use_safetensors=True, **SAFE)
    tower = CLIPVisionModel.from_pretrained(args.vision_tower, use_safetensors=True, **SAFE)
    tokenizer = AutoTokenizer.from_pretrained(args.language_model, **SAFE)
    model = join(language_model, tower, tokenizer)
    processor = make_processor(args.vision_tower, tower, tokenizer)
    template = template_path(model.config, None)
    assert template is not None  # of a family that is known
    processor.chat_template = template.read_text(encoding="utf-8")
    save(model, processor, folder)
    print(f"{args.output}: {model.num_parameters():,} parameters; train its projector first (docs/training.md)")


if __name__ == "__main__":
    command.run(main)
