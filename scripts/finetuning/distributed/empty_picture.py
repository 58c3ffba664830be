"""Batches without a picture, where every process must make the same passes: they see an empty one, times zero."""

import torch
from torch import nn

from finetuning import upstream
from finetuning.families import family_of
from finetuning.models.parts import base_model_of


def see_an_empty_picture(model: nn.Module) -> None:
    """Let passes without pictures run the tower on an empty one, and add its features times zero; in place.

    A process whose rows have no picture would skip the tower and the projector. Where their weights are sharded, the others
    would wait for it for ever (DeepSpeed#7170); where gradients are averaged by DeepSpeed, it would have none to send.
    """
    seer = base_model_of(model).model
    config, forward = seer.config, seer.forward
    side = config.vision_config.image_size
    family = family_of(config)
    inputs = {"image_sizes": [[side, side]]} if "image_sizes" in family.picture_inputs else {}
    views = family.views(config, (side, side))

    def forward_with_picture(input_ids=None, *, inputs_embeds=None, pixel_values=None, **kwargs):
        cache = upstream.cache_of(kwargs)
        if pixel_values is None and input_ids is not None and (cache is None or cache.get_seq_length() == 0):
            embeddings = seer.get_input_embeddings()(input_ids)
            empty = torch.zeros(views, 3, side, side, dtype=seer.dtype, device=embeddings.device)
            features = seer.get_image_features(pixel_values=empty, **inputs).pooler_output
            nothing = 0 * sum(feature.sum() for feature in features).to(embeddings.dtype)
            return forward(inputs_embeds=embeddings + nothing, **kwargs)
        return forward(input_ids=input_ids, inputs_embeds=inputs_embeds, pixel_values=pixel_values, **kwargs)

    upstream.replace(seer, "forward", forward_with_picture)
