"""Models as they are loaded: precision of a Gemma in fp16."""

import torch
from transformers import GemmaForCausalLM

from finetuning.models.loading import load_base_model


def test_fp16_keeps_the_sums_that_overflow_in_fp32(tiny_gemma):
    """The residual stream of real Gemmas exceeds fp16's 65,504; here the embedding is scaled up until it does."""
    ids = torch.tensor([[2, 9, 300, 301, 302, 400]])
    models = {dtype: load_base_model(str(tiny_gemma), dtype=dtype) for dtype in (torch.float32, torch.float16)}
    plain = GemmaForCausalLM.from_pretrained(tiny_gemma, dtype=torch.float16)
    for model in (*models.values(), plain):
        embedding = model.get_input_embeddings()
        # Only what enters the stream; the output layer shares these weights. Times Gemma's own sqrt(96), it is 98,000.
        scale = 10_000 / embedding.weight.abs().max().item()
        embedding.register_forward_hook(lambda module, inputs, output, scale=scale: output * scale)
    with torch.no_grad():
        assert not torch.isfinite(plain(input_ids=ids).logits).all()
        expected, logits = (model(input_ids=ids).logits for model in models.values())
    assert logits.dtype == torch.float16
    assert torch.allclose(logits.float(), expected, atol=2e-3 * expected.abs().max().item())
