"""Recorded passes compute what the model itself computes, batch after batch, of any length."""

import pytest
import torch

from finetuning.kernels.cuda_graphs import PAD_MULTIPLE, GraphedModel, pad_batch
from finetuning.kernels.lora_layers import fuse_lora
from finetuning.kernels.model_patches import ignore_right_padding
from finetuning.kernels.packed_attention import register_packed_attention
from support.tiny_models import DECODER, VOCABULARY, relative_error, tiny_gemma, with_lora

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph is recorded on a CUDA GPU only")


def packed_batch(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(3, VOCABULARY, (1, sum(lengths)), generator=generator),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": ends,
    }


def padded_batch(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=generator)}


def model_for(attention: str, device: str = "cpu", dtype: torch.dtype = torch.float32, dropout: float = 0.0):
    register_packed_attention()
    model = with_lora(tiny_gemma(attention), DECODER, lora_dropout=dropout).train().to(device)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    fuse_lora(model)
    ignore_right_padding(model)
    return model


def pass_through(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states of a forward pass, whose gradients are added to the parameters'."""
    base_model = model.get_base_model()
    hooks = base_model._forward_pre_hooks.values()
    for hook in hooks:  # the adapters' 16-bit copies
        hook(base_model, (), {})
    hidden = hidden_states(model, batch)
    hidden.float().square().mean().backward()
    return hidden.detach().clone()


def hidden_states(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    rows = {}
    if "cu_seq_lens_q" in batch:
        longest = int(batch["cu_seq_lens_q"].diff().max())
        rows = {"cu_seq_lens_k": batch["cu_seq_lens_q"], "max_length_q": longest, "max_length_k": longest}
    return model.get_base_model().model(**batch, **rows, use_cache=False).last_hidden_state


def graph(model) -> GraphedModel:
    language_model = model.get_base_model().model
    graphed = GraphedModel(language_model, [p for p in model.parameters() if p.requires_grad])
    language_model.forward = graphed
    return graphed


@pytest.mark.parametrize(("attention", "make"), [("packed", packed_batch), ("sdpa", padded_batch)])
def test_what_is_padded_changes_no_real_token(attention, make):
    model = model_for(attention)
    batch = make([5, 9, 3])
    tokens = batch["input_ids"].shape[1]
    longer = pad_batch(batch)
    assert longer["input_ids"].shape[1] == PAD_MULTIPLE
    if attention == "packed":
        assert longer["cu_seq_lens_q"].tolist() == [0, 5, 14, 17, PAD_MULTIPLE]
    expected = pass_through(model, batch)
    given = pass_through(model, longer)
    torch.testing.assert_close(given[:, :tokens], expected, rtol=1e-5, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize(
    ("attention", "make", "dtype", "tolerance"),
    [("sdpa", padded_batch, torch.float32, 1e-5), ("packed", packed_batch, torch.bfloat16, 2e-2)],
)
def test_recorded_passes_equal_the_models_own(attention, make, dtype, tolerance):
    plain, graphed_model = (model_for(attention, "cuda", dtype) for _ in range(2))
    graphed = graph(graphed_model)
    # Two lengths of one padded length, another one, and the first again; two passes are accumulated before each step.
    for number, lengths in enumerate([[5, 9, 3], [30, 2, 4], [40, 60, 70], [5, 9, 3]]):
        grads, hidden = [], []
        for model in (plain, graphed_model):
            model.zero_grad()
            for part in range(2):
                batch = {name: tensor.cuda() for name, tensor in make(lengths, seed=10 * number + part).items()}
                hidden.append(pass_through(model, batch))
            grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        assert relative_error(hidden[2], hidden[0]) < tolerance and relative_error(hidden[3], hidden[1]) < tolerance
        for name, grad in grads[0].items():
            assert relative_error(grads[1][name], grad) < tolerance, name
        with torch.no_grad():  # what the optimizer does is seen by the next pass
            for model, own in zip((plain, graphed_model), grads, strict=True):
                for name, parameter in model.named_parameters():
                    if name in own:
                        parameter -= 0.1 * own[name]
    assert len(graphed.passes) == 2
    batch = {name: tensor.cuda() for name, tensor in make([5, 9, 3]).items()}
    with torch.no_grad():
        given, expected = (hidden_states(model.eval(), batch) for model in (graphed_model, plain))
    assert given.shape == expected.shape and relative_error(given, expected) < tolerance


@needs_gpu
def test_dropout_goes_on_where_a_checkpoint_left_it():
    model = model_for("sdpa", "cuda", dropout=0.3)
    graph(model)
    batch = {name: tensor.cuda() for name, tensor in padded_batch([9, 4]).items()}
    torch.cuda.manual_seed(7)
    first = [pass_through(model, batch) for _ in range(3)]
    assert relative_error(first[1], first[0]) > 1e-3
    torch.cuda.manual_seed(7)
    assert all(torch.equal(pass_through(model, batch), expected) for expected in first)


@needs_gpu
def test_unknown_inputs_are_refused():
    model = model_for("sdpa", "cuda")
    graph(model)
    ids = torch.ones(1, 4, dtype=torch.long, device="cuda")
    with pytest.raises(ValueError, match=r"cuda_graphs: the model is given \['inputs_embeds'\]"):
        model.get_base_model().model(ids, inputs_embeds=torch.ones(1, 4, 32, device="cuda"))
