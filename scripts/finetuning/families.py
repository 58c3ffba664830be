"""The families of models that are trained here, and in what they differ: the one file to edit for another family.

A family is a class of transformers, by its `model_type`. How a dialogue is written follows from the language model inside
(`dialogue_form`), and so do the kernels (`kernels/lora_layers.py`).
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig
from transformers.image_processing_utils import select_best_resolution

VICUNA_VOCABULARY, LLAMA3_VOCABULARY = 32_064, 128_000
# Towers whose picture is one grid of patches. CLIP puts a class token before them, SigLIP does not.
CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Family:
    """What is particular to the models of one `model_type`.

    Args:
        templates: form of dialogue -> file of chat_templates/.
        towers: types of vision towers that it is tried with.
        picture_inputs: what the processor makes of pictures, with an entry for each; none for text models.
        features: `(config, size, processed size)`, heights and widths of a picture as given and as the tower sees it -> how
            many vectors the model makes of it, computed from its config and not from the processor that is checked.
        views: `(config, size)` -> how often the tower sees a picture: once, and each tile of it.
        several_as_views: whether several pictures of a row are seen in one view each, a picture alone in tiles too.
        shares_prefix: whether dialogues about a picture can share its tokens: only where tokens see none behind them.
        can_crop: whether `image_aspect_ratio: crop` means something; families with tiles show whole pictures.
    """

    model_type: str
    templates: dict[str, str]
    picture_inputs: tuple[str, ...] = ()
    towers: tuple[str, ...] = ()
    features: Callable[[PreTrainedConfig, Size, Size], int] | None = None
    views: Callable[[PreTrainedConfig, Size], int] = lambda config, size: 1
    can_crop: bool = False
    several_as_views: bool = False
    shares_prefix: bool = True
    like: tuple[str, ...] = field(default=())  # language models inside, to name the nearest family of a stranger

    def features_of_row(self, config: PreTrainedConfig, sizes: Sequence[Size], processed: Size) -> list[int]:
        """For each picture of a row how many vectors the model makes of it."""
        if self.features is None:
            return []
        if self.several_as_views and len(sizes) > 1:
            return [features_of_one_view(config, size, processed) + 1 for size in sizes]  # and a newline
        return [self.features(config, size, processed) for size in sizes]


def features_of_one_view(config: Any, size: Size, processed: Size) -> int:
    """LLaVA-1.5: a vector for each patch of the one view; the first, CLIP's class token, is dropped by `default`."""
    patch = config.vision_config.patch_size
    num_vectors = (processed[0] // patch) * (processed[1] // patch) + (config.vision_config.model_type == CLIP)
    return num_vectors - (getattr(config, "vision_feature_select_strategy", "default") == "default")


def features_of_tiles(config: Any, size: Size, processed: Size) -> int:
    """LLaVA-NeXT and OneVision: one view of all, and tiles without their padding, with a newline behind each row of patches.

    As their models' `pack_image_features` cuts them (https://llava-vl.github.io/blog/2024-01-30-llava-next).
    """
    tile = config.vision_config.image_size
    side = tile // config.vision_config.patch_size
    resolution = select_best_resolution(size, config.image_grid_pinpoints)
    rows, columns = (length // tile * side for length in resolution)
    height, width = size
    # The branches round as the model does: 7 digits, then down.
    if width / height > columns / rows:
        rows -= 2 * ((rows - int(round(height * (columns / width), 7))) // 2)
    else:
        columns -= 2 * ((columns - int(round(width * (rows / height), 7))) // 2)
    if hasattr(config, "vision_aspect_ratio"):
        # OneVision: more patches than so many tiles have (`anyres_max_9`) are scaled down to them.
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_")) * side**2
        ratio = math.sqrt(rows * columns / most)
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
    return features_of_one_view(config, size, (tile, tile)) + rows * columns + rows


def views_of_tiles(config: Any, size: Size) -> int:
    """LLaVA-NeXT and OneVision: the view of all, and the tiles of the grid that fits the picture best."""
    rows, columns = (
        length // config.vision_config.image_size
        for length in select_best_resolution(size, config.image_grid_pinpoints)
    )
    return 1 + rows * columns


def features_of_pooled_patches(config: Any, size: Size, processed: Size) -> int:
    """Gemma 3: the patches of the one view are averaged to so many vectors, 256 in the published models."""
    return config.mm_tokens_per_image


LLAVA_TEMPLATES = {"vicuna": "llava.jinja", "mistral": "llava_mistral.jinja", "llama3": "llava_llama3.jinja"}
GEMMA_TEMPLATES = {"gemma": "gemma.jinja"}

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llava",
            LLAVA_TEMPLATES,
            ("pixel_values",),
            (CLIP, SIGLIP),
            features_of_one_view,
            can_crop=True,
            like=("llama",),
        ),
        Family(
            "vipllava", {"vicuna": "vipllava.jinja"}, ("pixel_values",), (CLIP,), features_of_one_view, can_crop=True
        ),
        Family(
            "llava_next",
            LLAVA_TEMPLATES,
            ("pixel_values", "image_sizes"),
            (CLIP,),
            features_of_tiles,
            views=views_of_tiles,
            like=("mistral", "mixtral"),
        ),
        Family(
            "llava_onevision",
            {"chatml": "llava_onevision.jinja"},
            ("pixel_values", "image_sizes", "batch_num_images"),
            (SIGLIP,),
            features_of_tiles,
            views=views_of_tiles,
            several_as_views=True,
            like=("qwen2",),
        ),
        Family(
            "gemma3",
            {"gemma": "gemma3.jinja"},
            ("pixel_values",),
            (SIGLIP,),
            features_of_pooled_patches,
            shares_prefix=False,
            like=("gemma", "paligemma"),
        ),
        Family("gemma", GEMMA_TEMPLATES),
        Family("gemma2", GEMMA_TEMPLATES),
        Family("gemma3_text", GEMMA_TEMPLATES),
    )
}
PICTURE_INPUTS = tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.picture_inputs))
KNOWN_TYPES = f"this project trains {', '.join(FAMILIES)}"


def is_vision(config: PreTrainedConfig) -> bool:
    """Whether the model has a part for pictures."""
    return hasattr(config, "vision_config")


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model. Raises ValueError that names the nearest one where it has none."""
    if config.model_type in FAMILIES:
        family = FAMILIES[config.model_type]
        if is_vision(config) and config.vision_config.model_type not in family.towers:
            raise ValueError(
                f"{config.model_type} with a vision tower of type {config.vision_config.model_type} is not known here, only "
                f"with {' or '.join(family.towers)}"
            )
        return family
    inside = config.get_text_config().model_type

    def nearness(name: str) -> float:
        """How alike the names are; the same kind of language model inside counts as a quarter of the name."""
        same_inside = any(inside.startswith(kind) for kind in (*FAMILIES[name].like, name))
        return difflib.SequenceMatcher(None, name, config.model_type).ratio() + same_inside / 4

    candidates = [name for name, family in FAMILIES.items() if bool(family.picture_inputs) == is_vision(config)]
    nearest = max(candidates, key=nearness)
    other = "" if is_vision(config) else ", and --chat_template_path trains another text model as it is"
    raise ValueError(
        f"models of type {config.model_type} are not known here: {KNOWN_TYPES}. The nearest to it is {nearest}; "
        f'docs/architecture.md ("Add a model") says what another family needs{other}'
    )


def largest_picture(config: Any) -> Size | None:
    """Height and width of a picture that becomes the most tokens; None where all become as many."""
    if not is_vision(config) or "image_sizes" not in family_of(config).picture_inputs:
        return None
    return max(map(tuple, config.image_grid_pinpoints), key=lambda size: features_of_tiles(config, size, (0, 0)))


def template_of(config: PreTrainedConfig) -> str:
    """File of chat_templates/ for a model of a known family. Raises ValueError for a language model not tried in it."""
    templates, form = FAMILIES[config.model_type].templates, dialogue_form(config)
    if form not in templates:
        raise ValueError(
            f"{config.model_type} around a language model of type {config.get_text_config().model_type} is not known here, only "
            f"around {', '.join(templates)}: give the form of its dialogues with --chat_template_path"
        )
    return templates[form]


def dialogue_form(config: PreTrainedConfig) -> str:
    """How the language model inside writes a dialogue: `vicuna`, `mistral`, `llama3`, `chatml` or `gemma`.

    Raises ValueError for a language model whose form is not known here.
    """
    text = config.get_text_config()
    if text.model_type.startswith("gemma"):
        return "gemma"
    if text.model_type == "qwen2":
        return "chatml"
    if text.model_type == "mistral":
        return "mistral"
    if text.model_type == "llama" and text.vocab_size <= VICUNA_VOCABULARY:
        return "vicuna"
    if text.model_type == "llama" and text.vocab_size >= LLAMA3_VOCABULARY:
        return "llama3"
    raise ValueError(
        f"{config.model_type} around a language model of type {text.model_type} with {text.vocab_size:,} tokens: how it "
        "writes dialogues is not known here; give its form with --chat_template_path"
    )
