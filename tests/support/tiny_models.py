"""Two-layer models of the real classes with random weights, for the tests of speed."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    CLIPVisionConfig,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

IMAGE_TOKEN, NUM_IMAGE_TOKENS, VOCABULARY = 99, 16, 100
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "initializer_range": 0.2,
}


def tiny_llava(attention: str = "sdpa", **text_settings) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = LlamaConfig(**TEXT | text_settings, num_key_value_heads=2)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    return LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)


def tiny_gemma(attention: str = "sdpa", head_dim: int = 16, **text_settings) -> GemmaForCausalLM:
    torch.manual_seed(0)
    config = GemmaConfig(**TEXT | text_settings, num_key_value_heads=1, head_dim=head_dim)
    model = GemmaForCausalLM._from_config(config, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # zero at the start, as 1 + weight: something to tell the offset by
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def tiny_gemma3(attention: str = "sdpa") -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    config = Gemma3TextConfig(**TEXT, num_key_value_heads=2, head_dim=16, sliding_window=8)
    return Gemma3ForCausalLM._from_config(config, attn_implementation=attention)


def with_lora(model: torch.nn.Module, target_modules: str | list[str], **settings):
    """PEFT model whose B matrices are not zero, so that every gradient is alive."""
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=target_modules, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


DECODER = r".*(language_model|model)\.layers\..*(q|k|v|o|gate|up|down)_proj"
LANGUAGE_MODEL = r".*language_model\..*(q|k|v|o|gate|up|down)_proj"


def llava_batch(rows: int = 2, tokens: int = 30) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    input_ids = torch.randint(3, IMAGE_TOKEN, (rows, tokens))
    input_ids[:, 2 : 2 + NUM_IMAGE_TOKENS] = IMAGE_TOKEN
    labels = input_ids.clone()
    labels[:, : tokens - 5] = -100
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(rows, 3, 32, 32),
        "labels": labels,
    }


def lora_grads(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss_and_grads(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), lora_grads(model)


def relative_error(given: torch.Tensor, expected: torch.Tensor) -> float:
    return float((given - expected).norm() / expected.norm())


def text_batch() -> dict[str, torch.Tensor]:
    """Two rows of 20 tokens, the second of which ends with seven of padding."""
    torch.manual_seed(1)
    input_ids = torch.randint(3, VOCABULARY, (2, 20))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 13:] = 0
    labels = torch.where(attention_mask == 1, input_ids, -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def assert_same(given, expected, tolerance=1e-5):
    loss, grads = given
    expected_loss, expected_grads = expected
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert grads.keys() == expected_grads.keys()
    assert {name: round(relative_error(g, expected_grads[name]), 9) for name, g in grads.items()} == pytest.approx(
        dict.fromkeys(grads, 0.0), abs=tolerance
    )
