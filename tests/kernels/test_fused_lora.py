"""The fused LoRA computation is PEFT's: same loss, same gradients, same files."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from finetuning.kernels import layer_kernels
from finetuning.kernels.fused_lora import FusedLoraLinear, Projections, follow_adapters, fuse_lora
from finetuning.kernels.layer_kernels import drop
from finetuning.training.prepare_model import ignore_right_padding, see_as_in_inference
from support.tiny_models import (
    DECODER,
    LANGUAGE_MODEL,
    VOCABULARY,
    llava_batch,
    loss_and_grads,
    relative_error,
    tiny_gemma,
    tiny_llava,
    with_lora,
)

# What is rounded how is the library's affair that multiplies: cuBLAS rounds where the CPU does not.
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"))]


@pytest.fixture
def nan_in_new_memory():
    """Whatever is read before it was written, as oneDNN's AMX kernels do behind rows that lie apart, becomes NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def text_batch() -> dict[str, torch.Tensor]:
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


def test_gradients_reach_a_trained_projector():
    model = with_lora(tiny_llava(), LANGUAGE_MODEL, modules_to_save=["multi_modal_projector"]).train()
    expected = loss_and_grads(model, llava_batch())
    assert sum("projector" in name for name in expected[1]) == 4
    fuse_lora(model)
    assert_same(loss_and_grads(model, llava_batch()), expected)


@pytest.mark.parametrize("kept", ["16 bits", "fp32", "4 bits", "divided", "4 bits, divided"])
@pytest.mark.parametrize("device", DEVICES)
def test_small_updates_are_not_lost_to_16_bits(kept, device):
    """What the adapter adds is a thousandth of y, less than bf16 can show beside it; over many tokens it must be there."""
    torch.manual_seed(0)
    base = nn.Linear(512, 256, bias=False, dtype=torch.float32 if kept == "fp32" else torch.bfloat16)
    if "4 bits" in kept:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        packed = bitsandbytes.nn.Params4bit(base.weight.data, requires_grad=False, quant_type="nf4")
        base = bitsandbytes.nn.Linear4bit(512, 256, bias=False, compute_dtype=torch.bfloat16)
        base.weight = packed.to(device)
    base = nn.Sequential(base).to(device)
    layer = get_peft_model(base, LoraConfig(r=64, lora_alpha=32, target_modules=["0"])).base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight, std=3e-4)
    x = torch.randn(512, 512, device=device).to(torch.bfloat16)
    a, b = (matrix["default"].weight.detach() for matrix in (layer.lora_A, layer.lora_B))
    taught = 0.5 * x.float() @ a.T @ b.T
    projections = Projections([layer], divided="divided" in kept)
    with torch.autocast(device, torch.bfloat16):
        follow_adapters([projections])
    weight = projections.weight()
    base = x.float() @ weight.float().T
    assert 5e-4 < taught.std() / base.std() < 2e-3

    def share_that_shows(y: torch.Tensor, base=base, taught=taught) -> float:
        return ((y.float() - base) * taught).sum().item() / taught.square().sum().item()

    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        as_peft = layer(x)
    room, wide = projections.new_input(len(x))
    assert share_that_shows(projections.forward(x, None)[0]) == pytest.approx(1, abs=0.05)
    assert share_that_shows(projections.forward(room.copy_(x), None, wide)[0]) == pytest.approx(1, abs=0.05)
    assert share_that_shows(as_peft) < 0.7
    grad = x[:, :256]
    of_gradient = grad.float() @ weight.float(), 0.5 * grad.float() @ b @ a
    room, wide = projections.new_grad(len(x), None)
    for given in (
        projections.backward(room.copy_(grad), x[:, :64], None, True, wide),
        projections.backward(grad, x[:, :64], None, True),
    ):
        assert share_that_shows(given[0], *of_gradient) == pytest.approx(1, abs=0.05)
        torch.testing.assert_close(given[1].float(), grad.float() @ b, rtol=0.02, atol=1e-3)


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
    assert_same(loss_and_grads(model, llava_batch()), expected)
    with torch.no_grad(), model.disable_adapter():  # PEFT's and bitsandbytes' own code, on the stacked weights
        torch.testing.assert_close(model(**llava_batch()).logits, expected_base, rtol=0, atol=0)
    model.merge_adapter()
    model.unmerge_adapter()  # weights that were quantised twice more, into memory of their own
    with torch.no_grad():
        as_peft = model(**llava_batch(), use_cache=True).logits
        assert relative_error(as_peft, expected_base) > 0.01
        torch.testing.assert_close(model(**llava_batch(), use_cache=False).logits, as_peft, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4_bit_weights_are_unpacked_in_front_of_the_adapters_as_bitsandbytes_unpacks_them(quant_type):
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(6, 64)
    packed, state = functional.quantize_4bit(weight, quant_type=quant_type)
    room = torch.zeros(6, 70)
    layer_kernels.unpack_4bit(packed, state.absmax, state.code, state.blocksize, room[:, :64])
    assert torch.equal(room[:, :64], functional.dequantize_4bit(packed, state))
    assert room[:, 64:].eq(0).all() and relative_error(room[:, :64], weight) < 0.2


def test_weights_quantised_twice_are_unpacked_as_one_stack_and_stay_quantised_twice():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    functional = bitsandbytes.functional
    torch.manual_seed(0)
    layers = []
    for rows in (128, 384):  # 256 and 768 blocks of 64 weights: whole blocks of 256 scales
        base = bitsandbytes.nn.Linear4bit(128, rows, bias=False, compute_dtype=torch.float32)
        packed, state = functional.quantize_4bit(
            torch.randn(rows, 128) * rows, quant_type="nf4", compress_statistics=True
        )
        base.weight = bitsandbytes.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
        layers.append(get_peft_model(nn.Sequential(base), LoraConfig(r=4, target_modules=["0"])).base_model.model[0])
    expected = torch.cat([functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state) for layer in layers])
    stack = Projections(layers)
    stack.refresh(None)
    assert torch.equal(stack.weight(), expected)
    assert torch.equal(stack.weight_and_b()[:, :128], expected)
    for layer in layers:
        state = layer.weight.quant_state
        assert state.nested and state.absmax.dtype == torch.uint8
        assert state.absmax.untyped_storage().data_ptr() == stack.absmax.untyped_storage().data_ptr()


@pytest.mark.parametrize("fused", [False, True])
def test_the_mask_of_right_padding_changes_nothing(fused):
    model = with_lora(tiny_gemma(), DECODER).train()
    batch = text_batch()
    assert batch["attention_mask"].sum() == 33  # of 40: seven are padding
    expected = loss_and_grads(model, batch)
    if fused:
        fuse_lora(model)
    ignore_right_padding(model)
    masks = []
    for layer in model.get_base_model().model.layers:
        layer.register_forward_pre_hook(copy_tensors, with_kwargs=True, prepend=True)
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    assert_same(loss_and_grads(model, batch), expected)
    assert masks == [None] * 3


def copy_tensors(module, args, kwargs):
    """What FSDP2 does first of all when it moves a layer's inputs to its GPU."""
    return args, {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in kwargs.items()}


def test_a_frozen_tower_sees_in_training_what_it_sees_in_inference():
    model = with_lora(tiny_llava().to(torch.bfloat16), LANGUAGE_MODEL).train()
    pixels = llava_batch()["pixel_values"]

    model_of_images = model.get_base_model().model
    mixed = []
    model_of_images.vision_tower.embeddings.register_forward_hook(
        lambda *_: mixed.append(torch.is_autocast_enabled("cpu"))
    )

    def features() -> torch.Tensor:
        return torch.cat(model_of_images.get_image_features(pixels).pooler_output)

    expected = features()
    with torch.autocast("cpu", torch.bfloat16):
        features()
        see_as_in_inference(model)
        assert torch.equal(features(), expected)
    assert mixed == [False, True, False]


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
    dropped = drop(ones, seed, 0.05)
    assert dropped.unique().tolist() == [0, pytest.approx(1 / 0.95)]
    assert (dropped == 0).double().mean().item() == pytest.approx(0.05, abs=0.002)  # 4 standard deviations
    assert torch.equal(dropped, drop(ones, seed, 0.05))
    assert ((dropped == 0) & (drop(ones, seed + 1, 0.05) == 0)).double().mean().item() == pytest.approx(
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


def test_generation_with_a_cache_is_unchanged():
    model = with_lora(tiny_gemma(), DECODER).eval()
    prompt = text_batch()["input_ids"][:1]
    generate = partial(model.generate, input_ids=prompt, max_new_tokens=8, do_sample=False)
    expected = generate()
    fuse_lora(model)
    assert torch.equal(generate(), expected)


def test_what_is_not_plain_lora_keeps_pefts_code():
    model = with_lora(tiny_llava(), LANGUAGE_MODEL, use_dora=True).train()
    expected = loss_and_grads(model, llava_batch())
    assert fuse_lora(model) == 0
    assert_same(loss_and_grads(model, llava_batch()), expected, tolerance=1e-7)


def test_16_bit_base_keeps_fp32_adapters_and_their_gradients(nan_in_new_memory):
    model = with_lora(tiny_llava().to(torch.bfloat16), LANGUAGE_MODEL).train()
    batch = llava_batch()
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    _, expected = loss_and_grads(model, batch)
    fuse_lora(model)
    _, grads = loss_and_grads(model, batch)
    assert {grad.dtype for grad in grads.values()} == {torch.float32}
    # bf16 keeps 8 bits; PEFT rounds the activations as often as this does.
    assert max(relative_error(grad, expected[name]) for name, grad in grads.items()) < 0.06


def test_stack_follows_weights_that_are_replaced():
    model = with_lora(tiny_llava(), LANGUAGE_MODEL)
    layers = [model.get_submodule(f"base_model.model.model.language_model.layers.0.self_attn.{n}_proj") for n in "qkv"]
    weights = [layer.get_base_layer().weight for layer in layers]
    before = [weight.clone() for weight in weights]
    projections = Projections(layers)
    projections.refresh(None)
    assert projections.weight().data_ptr() == weights[0].data_ptr()
    assert all(map(torch.equal, weights, before))
    weights[1].data = torch.ones_like(weights[1])
    projections.refresh(None)
    assert projections.weight()[32:48].eq(1).all()
    assert weights[1].data_ptr() == projections.weight()[32:].data_ptr()
    model.double()
    projections.refresh(None)
    assert torch.equal(projections.weight()[:32], before[0].double())
    assert weights[1].data_ptr() == projections.weight()[32:].data_ptr()


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
    assert qkv.joined.shape == (32 + 16 + 16 + 10, 32 + 4 + 2 + 4)
    assert qkv.joined[32:48, 32:36].eq(0).all()
    assert qkv.joined[32:48, 36:38].ne(0).all()


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


def kernel_cases(layer_kernels):
    """Name -> result of each function on the same numbers."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 40), torch.randn(40)
    grad, residual = torch.randn(6, 40), torch.randn(6, 40)
    gate_up, grad_activated = torch.randn(6, 2 * 24), torch.randn(6, 24)
    cos, sin = torch.randn(1, 3, 12), torch.randn(1, 3, 12)
    qkv = torch.randn(2, 3, (3 + 2 + 2) * 12)
    wide = torch.zeros(6, 50)  # rows that lie apart
    packed = torch.randint(256, (120, 1), dtype=torch.uint8)  # blocks of 8 numbers in rows of 40
    scales, code = torch.rand(30), torch.randn(16)
    rotated = layer_kernels.split_and_rotate(qkv, cos, sin, (3, 2))
    rows_apart = torch.zeros(6, 90)
    layer_kernels.split_and_rotate_backward(*rotated, cos, sin, rows_apart[:, :84])
    cases = {
        "rms_norm": (layer_kernels.rms_norm(hidden, weight, 1.0, 1e-5, wide[:, :40]), wide[:, 40:]),
        "rms_norm_backward": layer_kernels.rms_norm_backward(hidden, weight, 0.0, 1e-5, grad, residual),
        "rotate": rotated,
        "rotate_backward": (rows_apart,),
        "drop": (layer_kernels.drop(hidden, torch.tensor([2**31 - 3, 12345]), 0.4),),
        "drop of rows that lie apart": (layer_kernels.drop(wide[:, :40], torch.tensor([2**31 - 3, 12345]), 0.4),),
        "unpack_4bit": (layer_kernels.unpack_4bit(packed, scales, code, 8, wide[:, :40]), wide[:, 40:]),
        "quantize_rows": (layer_kernels.quantize_rows(hidden)[1],),
        "quick_gelu": (layer_kernels.quick_gelu(3 * hidden),),
    }
    for is_gelu in (False, True):
        room, grads = torch.zeros(6, 30), torch.zeros(6, 50)
        cases[f"activation {is_gelu}"] = (layer_kernels.gated_activation(gate_up, is_gelu, room[:, :24]), room)
        activated = layer_kernels.gated_activation_backward(gate_up, grad_activated, is_gelu, grads[:, :48])
        cases[f"activation_backward {is_gelu}"] = (activated, grads)
    return cases


def compare_kernels():
    expected = kernel_cases(layer_kernels)
    layer_kernels.has_kernel = lambda tensor: True
    given = kernel_cases(layer_kernels)
    assert given.keys() == expected.keys()
    for name in given:
        torch.testing.assert_close(given[name], expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_gpu_kernels_compute_what_plain_torch_does():
    pytest.importorskip("triton", reason="Triton comes with the CUDA build of torch")
    # Triton's interpreter runs the kernels on a CPU; it must be asked for before Triton is imported.
    paths = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", "import test_fused_lora; test_fused_lora.compare_kernels()"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, cwd=Path(__file__).parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
