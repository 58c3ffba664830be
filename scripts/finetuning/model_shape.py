"""Sizes of a model from its `config.json`, without PyTorch: parameters of each part, and its linear layers.

What a config leaves out is the default of transformers' config class of its `model_type`.
"""

from dataclasses import dataclass
from typing import Any

# Defaults of transformers' config classes, of which published configs leave some out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "mistral": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "qwen2": {
        "hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 151936, "tie_word_embeddings": False,
    },
    "gemma": {
        "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 16, "head_dim": 256, "vocab_size": 256000, "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208, "tie_word_embeddings": True,
    },
    "clip_vision_model": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 32, "num_channels": 3,
    },
    "siglip_vision_model": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 16, "num_channels": 3,
    },
}  # fmt: skip
LANGUAGE_MODELS = ("llama", "mistral", "qwen2", "gemma", "gemma3_text")
TEXT_MODELS = ("llama", "gemma", "gemma3_text")  # that are trained alone
# Layers of a tower that a family reads where its config does not say so.
READS = {"llava": -2, "llava_next": -2, "vipllava": [-2, -5, -8, -11, 6], "llava_onevision": -1, "gemma3": -1}
HAS_NEWLINE = ("llava_next", "llava_onevision")


@dataclass(frozen=True)
class TextShape:
    """A Llama, Mistral, Qwen2, Gemma or Gemma 3: `layers` decoder layers of `width`, a gated MLP of `mlp_width`."""

    kind: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    vocabulary: int
    is_tied: bool

    @property
    def query_width(self) -> int:
        """Of all query heads."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """Of all key heads, and of all value heads."""
        return self.kv_heads * self.head_width

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Linear layer of a decoder layer -> (in, out)."""
        width, mlp = self.width, self.mlp_width
        return {
            "q_proj": (width, self.query_width),
            "k_proj": (width, self.kv_width),
            "v_proj": (width, self.kv_width),
            "o_proj": (self.query_width, width),
            "gate_proj": (width, mlp),
            "up_proj": (width, mlp),
            "down_proj": (mlp, width),
        }

    @property
    def linear_parameters(self) -> int:
        """Of the linear layers of one decoder layer."""
        return sum(inner * outer for inner, outer in self.projections.values())

    @property
    def norms_heads(self) -> bool:
        """Whether queries and keys are normed by head, and products before their residual, as in Gemma 3."""
        return self.kind == "gemma3_text"

    @property
    def other_parameters(self) -> int:
        """Of one decoder layer beside its matrices: norms, and Qwen2's biases."""
        biases = self.query_width + 2 * self.kv_width if self.kind == "qwen2" else 0
        return (4 * self.width + 2 * self.head_width if self.norms_heads else 2 * self.width) + biases

    @property
    def head_parameters(self) -> int:
        """Of the embedding, and of `lm_head` where it is not the same."""
        return self.vocabulary * self.width * (1 if self.is_tied else 2)

    @property
    def parameters(self) -> int:
        """Of the whole language model."""
        return self.layers * (self.linear_parameters + self.other_parameters) + self.width + self.head_parameters


@dataclass(frozen=True)
class VisionShape:
    """A CLIP or SigLIP tower. Of its hidden states (0: the embeddings) `reads` go to the projector, side by side.

    Args:
        keeps_first: whether the projector sees the first vector of a picture, CLIP's class token.
        pooled: vectors that the patches of a picture are averaged to, as in Gemma 3; 0: they are not.
        drops_norm: whether the norm behind the blocks comes after what is read.
    """

    kind: str
    layers: int
    width: int
    heads: int
    mlp_width: int
    image_size: int
    patch_size: int
    channels: int
    reads: tuple[int, ...]
    keeps_first: bool
    pooled: int = 0
    drops_norm: bool = True

    @property
    def is_clip(self) -> bool:
        """Whether a class token comes before the patches, and a norm before the blocks."""
        return self.kind == "clip_vision_model"

    @property
    def read(self) -> int:
        """The deepest hidden state that is read: as many blocks get a gradient."""
        return max(self.reads)

    @property
    def patches(self) -> int:
        """Of a view, without the class token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def vectors(self) -> int:
        """Of a view inside the tower."""
        return self.patches + self.is_clip

    @property
    def tokens(self) -> int:
        """Of a view in the language model."""
        return self.pooled or self.vectors - (not self.keeps_first)

    @property
    def block_parameters(self) -> int:
        """Of one block: attention and MLP with biases, two layer norms."""
        width, mlp = self.width, self.mlp_width
        return 4 * (width * width + width) + 2 * width * mlp + mlp + width + 4 * width

    @property
    def parameters(self) -> int:
        """Of the whole tower. CLIP has a class token and a norm before the blocks, SigLIP a bias of the patches."""
        embeddings = self.channels * self.patch_size**2 * self.width + self.vectors * self.width
        return embeddings + self.layers * self.block_parameters + self.width * (5 if self.is_clip else 3)

    @property
    def trainable_parameters(self) -> int:
        """Of those that get a gradient: the blocks that are read (`models.trainable.gets_no_gradient`)."""
        unread = (self.layers - self.read) * self.block_parameters
        return self.parameters - unread - (2 * self.width if self.drops_norm else 0)


@dataclass(frozen=True)
class ModelShape:
    """A text model, or a model that sees: vision tower, projector, language model."""

    kind: str
    text: TextShape
    vision: VisionShape | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ModelShape":
        """The shape that a `config.json` says. Raises ValueError for a type that is not trained here."""
        kind = config.get("model_type")
        if kind in READS:
            text = {"model_type": "gemma3_text" if kind == "gemma3" else "llama"} | config.get("text_config", {})
            tied = config.get("tie_word_embeddings", kind == "gemma3")
            return cls(kind, text_shape(text | {"tie_word_embeddings": tied}), vision_shape(config))
        if kind in TEXT_MODELS:
            return cls(kind, text_shape(config))
        raise ValueError(
            f"model_type {kind}: its memory and time are not known; known are {', '.join([*READS, *TEXT_MODELS])}"
        )

    @property
    def projector_layers(self) -> dict[str, tuple[int, int]]:
        """Matrices of the projector -> (in, out)."""
        if self.vision is None:
            return {}
        if self.kind == "gemma3":
            return {"mm_input_projection_weight": (self.vision.width, self.text.width)}
        read = self.vision.width * len(self.vision.reads)
        return {"linear_1": (read, self.text.width), "linear_2": (self.text.width, self.text.width)}

    @property
    def projector_parameters(self) -> int:
        """Matrices with biases, what is normed before them, and a newline; Gemma 3's one matrix has no bias."""
        matrices = sum(inner * outer for inner, outer in self.projector_layers.values())
        if self.kind == "gemma3":
            return matrices + self.vision.width
        normed = 2 * self.vision.width * len(self.vision.reads) if self.kind == "vipllava" else 0
        return matrices + normed + (3 if self.kind in HAS_NEWLINE else 2) * self.text.width

    @property
    def parameters(self) -> dict[str, int]:
        """Part -> parameters; the names of `models.parts`."""
        if self.vision is None:
            return {"language_model": self.text.parameters}
        return {
            "language_model": self.text.parameters,
            "projector": self.projector_parameters,
            "vision_tower": self.vision.parameters,
        }

    @property
    def lora_layers(self) -> dict[str, list[tuple[str, int, int]]]:
        """Part -> (last name, in, out) of every linear layer that LoRA may adapt."""
        layers = {"language_model": [(n, *s) for n, s in self.text.projections.items()] * self.text.layers}
        if self.vision is not None:
            width, mlp = self.vision.width, self.vision.mlp_width
            block = [(name, width, width) for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
            block += [("fc1", width, mlp), ("fc2", mlp, width)]
            linear = {} if self.kind == "gemma3" else self.projector_layers  # whose matrix is a bare parameter
            layers["projector"] = [(name, *size) for name, size in linear.items()]
            layers["vision_tower"] = block * self.vision.read
        return layers


def text_shape(config: dict[str, Any]) -> TextShape:
    """Of a text model's config. Raises ValueError for a type that is not trained here."""
    kind = config.get("model_type", "llama")
    if kind not in LANGUAGE_MODELS:
        raise ValueError(
            f"model_type {kind}: its memory and time are not known; known are {', '.join(LANGUAGE_MODELS)}"
        )
    known = DEFAULTS[kind] | {name: value for name, value in config.items() if value is not None}
    width, heads = known["hidden_size"], known["num_attention_heads"]
    return TextShape(
        kind=kind,
        layers=known["num_hidden_layers"],
        width=width,
        heads=heads,
        kv_heads=known.get("num_key_value_heads", heads),
        head_width=known.get("head_dim", width // heads),
        mlp_width=known["intermediate_size"],
        vocabulary=known["vocab_size"],
        is_tied=known["tie_word_embeddings"],
    )


def vision_shape(config: dict[str, Any]) -> VisionShape:
    """Of the config of a model that sees; layers of its tower count from the end where negative."""
    family, tower = config["model_type"], config.get("vision_config", {})
    kind = tower.get("model_type", "siglip_vision_model" if family == "gemma3" else "clip_vision_model")
    if kind not in ("clip_vision_model", "siglip_vision_model"):
        raise ValueError(f"vision tower {kind}: its memory and time are not known; known are CLIP and SigLIP")
    known = DEFAULTS[kind] | {name: value for name, value in tower.items() if value is not None}
    layers = known["num_hidden_layers"]
    reads = config.get("vision_feature_layer", config.get("vision_feature_layers", READS[family]))
    reads = [reads] if isinstance(reads, int) else reads
    strategy = config.get("vision_feature_select_strategy", "full" if family == "llava_onevision" else "default")
    return VisionShape(
        kind=kind,
        layers=layers,
        width=known["hidden_size"],
        heads=known["num_attention_heads"],
        mlp_width=known["intermediate_size"],
        image_size=known["image_size"],
        patch_size=known["patch_size"],
        channels=known["num_channels"],
        reads=tuple(layer if layer >= 0 else layers + 1 + layer for layer in reads),
        keeps_first=family == "gemma3" or strategy != "default",
        pooled=config.get("mm_tokens_per_image", 256) if family == "gemma3" else 0,
        drops_norm=family != "gemma3",
    )
