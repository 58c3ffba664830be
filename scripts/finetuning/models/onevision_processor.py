"""LLaVA-OneVision's processor for pictures, without its part for videos, which needs torchvision."""

from typing import Any

from transformers import LlavaOnevisionProcessor as WithVideos
from transformers import PreTrainedTokenizerBase, ProcessorMixin


# Of the same name, so that saved folders name a class that transformers knows.
class LlavaOnevisionProcessor(WithVideos):
    """transformers' processor with a tokenizer and an image processor only."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        num_image_tokens: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",  # noqa: S107 - a mark in a text
        video_token: str = "<video>",  # noqa: S107
        vision_aspect_ratio: str = "anyres_max_9",
        **kwargs,
    ):
        self.num_image_tokens, self.vision_aspect_ratio = num_image_tokens, vision_aspect_ratio
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_token, self.video_token = image_token, video_token
        self.image_token_id, self.video_token_id = tokenizer.convert_tokens_to_ids([image_token, video_token])
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
