"""The fused LoRA computation is PEFT's: same loss, same gradients, same files."""

from functools import partial

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from safetensors.torch import load_file

from finetuning.kernels.dropout import hashed_dropout
from finetuning.kernels.lora_layers import FusedLoraLinear, fuse_lora, stack_4bit_weights, stacks_of
from support.tiny_models import (
    DECODER,
    LANGUAGE_MODEL,
    assert_same,
    llava_batch,
    loss_and_grads,
    relative_error,
    text_batch,
    tiny_gemma,
    tiny_llava,
    with_lora,
)


@pytest.fixture
def nan_in_new_memory():
    """Whatever is read before it was written, as oneDNN's AMX kernels do behind rows that lie apart, becomes NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("make", "targets", "batch", "layers"),
    [
        (tiny_llava, LANGUAGE_MODEL, llava_batch, 21),
        (tiny_llava, "all-linear", llava_batch, 21 + 18 + 2),  # tower (3 layers of 6) and projector too
        (tiny_gemma, DECODER, text_batch, 21),
        (tiny_llava, ["q_proj", "v_proj"], llava_batch, 0 + 6),
    ],
    ids=["llava", "llava-all-linear", "gemma", "llava-some"],
)
def test_loss_and_gradients_equal_peft(make, targets, batch, layers, checkpointing, attention):
    model = with_lora(make(attention), targets).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = loss_and_grads(model, batch())
    fused = fuse_lora(model)
    assert fused == layers or targets == ["q_proj", "v_proj"]
    assert fused > 0
    assert_same(loss_and_grads(model, batch()), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("how", [{"use_rslora": True}, {"use_dora": True}, {"use_rslora": True, "use_dora": True}])
@pytest.mark.parametrize(
    ("make", "targets", "batch", "layers"),
    [(tiny_llava, "all-linear", llava_batch, 41), (tiny_gemma, DECODER, text_batch, 21)],
    ids=["llava", "gemma"],
)
def test_rank_stabilised_lora_and_dora_are_pefts(make, targets, batch, layers, how, checkpointing):
    model = with_lora(make(), targets, **how).train()
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = loss_and_grads(model, batch())
    assert fuse_lora(model) == layers
    for _ in range(2):
        assert_same(loss_and_grads(model, batch()), expected)
    # What was trained since is followed.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn_like(parameter).abs()
        fused = model(**batch(), use_cache=False).logits
        torch.testing.assert_close(fused, model(**batch(), use_cache=True).logits, rtol=1e-4, atol=1e-4)


def test_gradients_reach_a_trained_projector():
    model = with_lora(tiny_llava(), LANGUAGE_MODEL, modules_to_save=["multi_modal_projector"]).train()
    expected = loss_and_grads(model, llava_batch())
    assert sum("projector" in name for name in expected[1]) == 4
    fuse_lora(model)
    assert_same(loss_and_grads(model, llava_batch()), expected)


@pytest.mark.filterwarnings("ignore:.*erge lora module to 4-bit")
def test_nf4_gradients_equal_peft(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

    # Rows of whole blocks of 64, as in real models: on a CPU with AVX-512 bitsandbytes unpacks shorter ones wrongly.
    tiny_llava(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["vision_tower", "multi_modal_projector", "lm_head"],
    )
    base = LlavaForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
    )
    model = with_lora(base, LANGUAGE_MODEL).train()
    expected = loss_and_grads(model, llava_batch())
    with torch.no_grad(), model.disable_adapter():
        expected_base = model(**llava_batch()).logits
    assert fuse_lora(model) == 21
    stack_4bit_weights(model)
    stacked = [stack.frozen.stack.data_ptr() for stack in stacks_of(model)]
    assert_same(loss_and_grads(model, llava_batch()), expected)
    assert [stack.frozen.stack.data_ptr() for stack in stacks_of(model)] == stacked  # and not a second time
    with torch.no_grad(), model.disable_adapter():  # PEFT's and bitsandbytes' own code, on the stacked weights
        torch.testing.assert_close(model(**llava_batch()).logits, expected_base, rtol=0, atol=0)
    model.merge_adapter()
    model.unmerge_adapter()  # weights that were quantised twice more, into memory of their own
    with torch.no_grad():
        as_peft = model(**llava_batch(), use_cache=True).logits
        assert relative_error(as_peft, expected_base) > 0.01
        torch.testing.assert_close(model(**llava_batch(), use_cache=False).logits, as_peft, rtol=1e-4, atol=1e-4)


def test_only_supervised_rows_are_computed_after_the_last_attention():
    model = with_lora(tiny_llava(), LANGUAGE_MODEL).train()
    batch = llava_batch()
    fuse_lora(model)
    expected = loss_and_grads(model, batch)
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    rows = (shifted != -100).flatten().nonzero().flatten()
    assert len(rows) == 10
    assert_same(loss_and_grads(model, {**batch, "supervised_rows": rows}), expected)


def test_dropout_drops_as_often_as_asked_and_backward_drops_the_same():
    seed = torch.tensor([5, 9])
    ones = torch.ones(400, 500)
    dropped = hashed_dropout(ones, seed, 0.05)
    assert dropped.unique().tolist() == [0, pytest.approx(1 / 0.95)]
    assert (dropped == 0).double().mean().item() == pytest.approx(0.05, abs=0.002)  # 4 standard deviations
    assert torch.equal(dropped, hashed_dropout(ones, seed, 0.05))
    assert ((dropped == 0) & (hashed_dropout(ones, seed + 1, 0.05) == 0)).double().mean().item() == pytest.approx(
        0.0025, abs=0.0005
    )

    model = with_lora(tiny_llava(), LANGUAGE_MODEL, lora_dropout=0.3).double().train()
    fuse_lora(model)
    batch = llava_batch()
    batch["pixel_values"] = batch["pixel_values"].double()

    def loss() -> torch.Tensor:
        torch.manual_seed(7)
        return model(**batch, use_cache=False).loss

    loss().backward()
    probes = [name for name, p in model.named_parameters() if p.requires_grad and "layers.1" in name]
    assert len(probes) == 14
    parameters = dict(model.named_parameters())
    for name in probes:
        parameter = parameters[name]
        direction = torch.randn_like(parameter)
        step = 1e-3  # the final norm of Llama computes in fp32
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            above = loss()
            parameter.add_(direction, alpha=-2 * step)
            below = loss()
            parameter.add_(direction, alpha=step)
        slope = float((above - below) / (2 * step))
        assert float((parameter.grad * direction).sum()) == pytest.approx(slope, rel=5e-3), name
    model.eval()
    with torch.no_grad():
        assert loss() == loss()


def test_checkpointing_draws_the_same_dropout_again():
    model = with_lora(tiny_llava(), LANGUAGE_MODEL, lora_dropout=0.3).train()
    fuse_lora(model)
    torch.manual_seed(3)
    expected = loss_and_grads(model, llava_batch())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(3)
    assert_same(loss_and_grads(model, llava_batch()), expected)


def test_adapters_stay_pefts(tmp_path):
    model = with_lora(tiny_gemma(), DECODER).eval()
    batch = text_batch()
    with torch.no_grad():
        expected = model(**batch).logits
        with model.disable_adapter():
            expected_base = model(**batch).logits
    model.save_pretrained(tmp_path / "before")
    before = {name: p.clone() for name, p in model.named_parameters()}
    fuse_lora(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(**batch, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(model(**batch, use_cache=False).logits, expected_base, rtol=0, atol=0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    model.save_pretrained(tmp_path / "after")
    saved = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("before", "after")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    model.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = type(tiny_gemma()).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "targets", "make_batch"), [(tiny_llava, LANGUAGE_MODEL, llava_batch), (tiny_gemma, DECODER, text_batch)]
)
def test_generation_is_token_for_token_what_it_was(make, targets, make_batch):
    model = with_lora(make(), targets).eval()
    batch = make_batch()
    del batch["labels"]
    batch["attention_mask"][1, :2] = 0  # padded on the left
    generate = partial(model.generate, **batch, max_new_tokens=12, do_sample=False, eos_token_id=None)
    expected = generate()
    fuse_lora(model)
    assert torch.equal(generate(), expected)
    assert torch.equal(generate(use_cache=False), expected)


def test_what_is_not_plain_lora_keeps_pefts_code():
    model = with_lora(tiny_llava(), LANGUAGE_MODEL, use_dora=True, lora_dropout=0.1)
    assert fuse_lora(model) == 0
    model = with_lora(tiny_llava(), LANGUAGE_MODEL, use_dora=True).train()
    for module in model.modules():
        if type(module) is LoraLinear:
            module.lora_bias["default"] = True
            module.lora_B["default"].bias = torch.nn.Parameter(torch.randn(module.out_features))
    expected = loss_and_grads(model, llava_batch())
    assert fuse_lora(model) == 0
    assert_same(loss_and_grads(model, llava_batch()), expected, tolerance=1e-7)


@pytest.mark.parametrize("dora", [False, True])
def test_16_bit_base_keeps_fp32_adapters_and_their_gradients(dora, nan_in_new_memory):
    model = with_lora(tiny_llava().to(torch.bfloat16), LANGUAGE_MODEL, use_dora=dora).train()
    batch = llava_batch()
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    _, expected = loss_and_grads(model, batch)
    fuse_lora(model)
    _, grads = loss_and_grads(model, batch)
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    # bf16 keeps 8 bits; PEFT rounds the activations as often as this does.
    assert max(relative_error(grad, expected[name]) for name, grad in grads.items()) < 0.08


def test_ranks_and_scales_of_a_stack_may_differ():
    patterns = {
        "rank_pattern": {"k_proj": 2, "up_proj": 7, "down_proj": 1},
        "alpha_pattern": {"v_proj": 11, "gate_proj": 1},
    }
    model = with_lora(tiny_llava(), LANGUAGE_MODEL, **patterns).train()
    expected = loss_and_grads(model, llava_batch())
    fuse_lora(model)
    assert_same(loss_and_grads(model, llava_batch()), expected)
    qkv = model.base_model.model.model.language_model.layers[0].fused_qkv
    assert (qkv.ranks, qkv.scales) == ([4, 2, 4], [1.5, 3.0, 2.75])
    assert qkv.frozen.joined.shape == (32 + 16 + 16 + 10, 32 + 4 + 2 + 4)
    assert qkv.frozen.joined[32:48, 32:36].eq(0).all()
    assert qkv.frozen.joined[32:48, 36:38].ne(0).all()


def test_autocast_over_an_fp32_base():
    model = with_lora(tiny_llava(), LANGUAGE_MODEL).train()
    with torch.autocast("cpu", torch.bfloat16):
        _, expected = loss_and_grads(model, llava_batch())
        fuse_lora(model)
        _, grads = loss_and_grads(model, llava_batch())
    weight = model.base_model.model.model.language_model.layers[0].mlp.down_proj.get_base_layer().weight
    assert weight.dtype == torch.float32
    assert max(relative_error(grad, expected[name]) for name, grad in grads.items()) < 0.06


def test_lone_layers_keep_their_bias():
    model = with_lora(tiny_llava(), "all-linear")
    fuse_lora(model)
    lone = [module for module in model.modules() if isinstance(module, FusedLoraLinear)]
    assert len(lone) == 20
    assert all(layer.get_base_layer().bias is not None for layer in lone)
