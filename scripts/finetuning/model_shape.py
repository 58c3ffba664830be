"""Sizes of a model from its `config.json`, without PyTorch: parameters of each part, and its linear layers.

What a config leaves out is the default of transformers' config class of its `model_type`.
"""

from dataclasses import dataclass
from typing import Any

# Defaults of transformers' LlamaConfig, GemmaConfig and CLIPVisionConfig, of which published configs leave some out.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "gemma": {
        "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 16, "head_dim": 256, "vocab_size": 256000, "tie_word_embeddings": True,
    },
    "clip_vision_model": {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
        "image_size": 224, "patch_size": 32, "num_channels": 3,
    },
}  # fmt: skip


@dataclass(frozen=True)
class TextShape:
    """A Llama or Gemma: `layers` decoder layers of `width`, a gated MLP of `mlp_width`."""

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
    def head_parameters(self) -> int:
        """Of the embedding, and of `lm_head` where it is not the same."""
        return self.vocabulary * self.width * (1 if self.is_tied else 2)

    @property
    def parameters(self) -> int:
        """Of the whole language model."""
        return self.layers * (self.linear_parameters + 2 * self.width) + self.width + self.head_parameters


@dataclass(frozen=True)
class VisionShape:
    """A CLIP vision tower of which the hidden state number `read` goes to the projector (0: the embeddings)."""

    layers: int
    width: int
    heads: int
    mlp_width: int
    image_size: int
    patch_size: int
    channels: int
    read: int
    keeps_class_token: bool

    @property
    def patches(self) -> int:
        """Of a picture, without the class token."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Of a picture in the language model."""
        return self.patches + self.keeps_class_token

    @property
    def block_parameters(self) -> int:
        """Of one block: attention and MLP with biases, two layer norms."""
        width, mlp = self.width, self.mlp_width
        return 4 * (width * width + width) + 2 * width * mlp + mlp + width + 4 * width

    @property
    def parameters(self) -> int:
        """Of the whole tower."""
        embeddings = self.width + self.channels * self.patch_size**2 * self.width + (self.patches + 1) * self.width
        return embeddings + self.layers * self.block_parameters + 4 * self.width

    @property
    def trainable_parameters(self) -> int:
        """Of those that get a gradient: the blocks that are read (`models.trainable.gets_no_gradient`)."""
        return self.parameters - (self.layers - self.read) * self.block_parameters - 2 * self.width


@dataclass(frozen=True)
class ModelShape:
    """A text model, or a LLaVA: vision tower, projector of two linear layers with biases, language model."""

    kind: str
    text: TextShape
    vision: VisionShape | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ModelShape":
        """The shape that a `config.json` says. Raises ValueError for a type that is not trained here."""
        kind = config.get("model_type")
        if kind == "llava":
            text, vision = config.get("text_config", {}), config.get("vision_config", {})
            tied = config.get("tie_word_embeddings", False)
            read = config.get("vision_feature_layer", -2)
            keeps = config.get("vision_feature_select_strategy", "default") != "default"
            return cls(
                kind, text_shape(text | {"tie_word_embeddings": tied}), vision_shape(vision, read, keeps_class=keeps)
            )
        if kind in ("llama", "gemma"):
            return cls(kind, text_shape(config))
        raise ValueError(f"model_type {kind}: its memory and time are not known; known are llava, gemma and llama")

    @property
    def projector_layers(self) -> dict[str, tuple[int, int]]:
        """Linear layer of the projector -> (in, out)."""
        if self.vision is None:
            return {}
        return {"linear_1": (self.vision.width, self.text.width), "linear_2": (self.text.width, self.text.width)}

    @property
    def parameters(self) -> dict[str, int]:
        """Part -> parameters; the names of `models.parts`."""
        if self.vision is None:
            return {"language_model": self.text.parameters}
        projector = sum(inner * outer + outer for inner, outer in self.projector_layers.values())
        return {
            "language_model": self.text.parameters,
            "projector": projector,
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
            layers["projector"] = [(name, *size) for name, size in self.projector_layers.items()]
            layers["vision_tower"] = block * self.vision.read
        return layers


def text_shape(config: dict[str, Any]) -> TextShape:
    """Of a text model's config. Raises ValueError for a type that is not trained here."""
    kind = config.get("model_type", "llama")
    if kind not in ("llama", "gemma"):
        raise ValueError(f"model_type {kind}: its memory and time are not known; known are llama and gemma")
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


def vision_shape(config: dict[str, Any], read: int, *, keeps_class: bool) -> VisionShape:
    """Of a CLIP tower's config; `read` as LLaVA's `vision_feature_layer` says it, from the end where negative."""
    kind = config.get("model_type", "clip_vision_model")
    if kind != "clip_vision_model" or not isinstance(read, int):
        raise ValueError(f"vision tower {kind}, layer {read}: known is a CLIP tower of which one layer is read")
    known = DEFAULTS[kind] | {name: value for name, value in config.items() if value is not None}
    layers = known["num_hidden_layers"]
    return VisionShape(
        layers=layers,
        width=known["hidden_size"],
        heads=known["num_attention_heads"],
        mlp_width=known["intermediate_size"],
        image_size=known["image_size"],
        patch_size=known["patch_size"],
        channels=known["num_channels"],
        read=read if read >= 0 else layers + 1 + read,
        keeps_class_token=keeps_class,
    )
