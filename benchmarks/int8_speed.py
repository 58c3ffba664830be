"""Speed of products with frozen weights in INT8 beside bf16 and FP8, in turns, on one GPU of compute capability 9.0.

    python benchmarks/int8_speed.py --output benchmarks/results/int8

Each product x W^T has a low-rank part of 64 columns, which the INT8 kernel adds before it rounds. INT8 is timed with the
quantisation of x and without. `--tiles` times a list of tiles at the first shape, `--prefill MODEL` the prompts of 64 rows
through a whole decoder of random weights, loaded in 16 bits and in NF4. Writes int8_speed.json and prints tables.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from answer_speed import random_model

from finetuning.inference.packed_decoder import KeyValuePool, PackedDecoder
from finetuning.inference.packed_prompts import PackedPrompts, Segment
from finetuning.kernels import int8
from finetuning.kernels.fp8 import E4M3_MAX, fp8_linear, quantize_rows_to_fp8
from finetuning.kernels.int8_base import hold_base_in_int8

# name -> (in, out): LLaVA-1.5-7B's decoder and Gemma-2b's
SHAPES = {
    "gate, up": (4096, 22016),
    "q, k, v": (4096, 12288),
    "o": (4096, 4096),
    "down": (11008, 4096),
    "gate, up backward": (22016, 4096),
    "Gemma's gate, up": (2048, 32768),
    "Gemma's down": (16384, 2048),
}
RANKS = 64
TILES = [
    int8.Tile(rows=128, columns=128, depth=128, stages=3, warps=8),
    int8.Tile(rows=128, columns=128, depth=128, stages=4, warps=4),
    int8.Tile(rows=128, columns=128, depth=256, stages=3, warps=8),
    int8.Tile(rows=128, columns=256, depth=64, stages=4, warps=8),
    int8.Tile(rows=128, columns=256, depth=128, stages=3, warps=8),
    int8.Tile(rows=128, columns=256, depth=128, stages=4, warps=8),
    int8.Tile(rows=256, columns=128, depth=128, stages=3, warps=8),
    int8.Tile(rows=64, columns=256, depth=128, stages=4, warps=4),
]


def random_product(tokens: int, width: int, features: int) -> dict[str, torch.Tensor]:
    """x with a channel of outliers, W, x_a and b, in bf16 on the GPU."""
    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
    x[:, 7] *= 50
    weight = torch.randn(features, width, device="cuda", dtype=torch.bfloat16) / width**0.5
    x_a = torch.randn(tokens, RANKS, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(features, RANKS, device="cuda", dtype=torch.bfloat16)
    return {"x": x, "weight": weight, "x_a": x_a, "b": b}


def block_scaled_fp8(x: torch.Tensor, weight: torch.Tensor) -> Callable[[], torch.Tensor]:
    """cuBLASLt's FP8 product with scales for 1x128 of x and 128x128 of W; the time does not depend on their values."""
    x_values, w_values = ((part / part.abs().max() * E4M3_MAX).to(torch.float8_e4m3fn) for part in (x, weight))
    blocks = x.shape[1] // 128
    x_scale = torch.rand(blocks, len(x), device="cuda").T
    w_scale = torch.rand(len(weight) // 128, blocks, device="cuda").T
    return lambda: torch._scaled_mm(
        x_values, w_values.T, scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16, use_fast_accum=False
    )


def ways(x: torch.Tensor, weight: torch.Tensor, x_a: torch.Tensor, b: torch.Tensor) -> dict[str, Callable]:
    """Name -> one product."""
    joined_x, joined_w = torch.cat([x, x_a], 1), torch.cat([weight, b], 1)
    fp8_x, fp8_weight = quantize_rows_to_fp8(x), quantize_rows_to_fp8(weight)
    int8_x, int8_weight = int8.quantize_rows_to_int8(x), int8.quantize_rows_to_int8(weight)
    out = x.new_empty(len(x), len(weight))

    def fp8_rows() -> torch.Tensor:
        return torch._scaled_mm(
            fp8_x[0], fp8_weight[0].T, scale_a=fp8_x[1], scale_b=fp8_weight[1].T, out_dtype=x.dtype, use_fast_accum=True
        )

    def fp8_as_trained() -> torch.Tensor:
        low_rank = torch.mm(x_a, b.T)
        return low_rank.add_(fp8_linear(x, *fp8_weight, out_dtype=x.dtype))

    known = {
        "bf16": lambda: torch.mm(joined_x, joined_w.T),
        "FP8, rows": fp8_rows,
        "FP8, rows, quantised and added": fp8_as_trained,
        "FP8, blocks": block_scaled_fp8(x, weight),
        "INT8, int32 sums alone": lambda: torch._int_mm(int8_x[0], int8_weight[0].T),
        "INT8": lambda: int8.int8_linear(int8_x, int8_weight, out, (x_a, b.T)),
        "INT8, quantised": lambda: int8.int8_linear(int8.quantize_rows_to_int8(x), int8_weight, out, (x_a, b.T)),
        "quantisation to INT8": lambda: int8.quantize_rows_to_int8(x),
    }
    return {name: call for name, call in known.items() if runs(name, call)}


def runs(name: str, call: Callable) -> bool:
    """Whether cuBLASLt of this torch has that product; says so where it has not."""
    try:
        call()
    except RuntimeError as error:
        print(f"{name}: left out, {str(error).splitlines()[0]}", flush=True)
        return False
    return True


def check(tokens: int, width: int, features: int, tile: int8.Tile) -> dict[str, float]:
    """Relative distance of the kernels from plain torch in fp64, and of the INT8 product from the exact one."""
    given = random_product(tokens, width, features)
    x, weight, x_a, b = given.values()
    values, scale = int8.quantize_rows_to_int8(x)
    w_values, w_scale = int8.quantize_rows_to_int8(weight)
    rotated = (x.double().unflatten(1, (-1, 128)) @ int8.hadamard(torch.float64, x.device)).flatten(1)
    expected = (rotated / 128**0.5 / scale[:, None]).round().clamp(-127, 127)
    spans = torch.tensor([[0, RANKS]], device="cuda", dtype=torch.int32).repeat(features, 1)
    out = torch.full((tokens, features), torch.nan, device="cuda", dtype=torch.bfloat16)
    int8.launch_int8_linear((values, scale), (w_values, w_scale), out, (x_a, b.T), spans, False, tile)
    low_rank = x_a.double() @ b.double().T
    product = (values.double() @ w_values.double().T) * scale[:, None] * w_scale
    dense = out.new_full(out.shape, torch.nan)  # b not transposed, and no spans: as the backward pass calls it
    int8.launch_int8_linear((values, scale), (w_values, w_scale), dense, (x_a, b.T.contiguous()), None, False, tile)
    added = out.clone()
    int8.launch_int8_linear((values, scale), (w_values, w_scale), added, None, None, True, tile)
    return {
        "values that differ": (values.double() != expected).double().mean().item(),
        "product": relative(out, product + low_rank),
        "the same, b dense": relative(dense, product + low_rank),
        "added": relative(added, product + out.double()),
        "INT8 beside exact": relative(product, x.double() @ weight.double().T),
    }


def relative(given: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of `expected`."""
    return ((given.double() - expected).norm() / expected.norm()).item()


def milliseconds(calls: dict[str, Callable], rounds: int, bar: tqdm, repeated: int = 20) -> dict[str, float]:
    """Median time of each call over `rounds` rounds in turns, `repeated` calls a round."""
    times = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeated):
                call()
            end.record()
            end.synchronize()
            if number:  # the first is to warm up
                times[name].append(start.elapsed_time(end) / repeated)
            bar.update()
    return {name: statistics.median(found) for name, found in times.items()}


def prefill_calls(name: str, rows: int, tokens: int) -> dict[str, Callable]:
    """The prompts of `rows` rows through the decoder of a model with an adapter; held in INT8 it was loaded in bf16 or NF4."""
    prompts = PackedPrompts([Segment(torch.randint(3, 30000, (tokens,))) for _ in range(rows)], "cuda")
    asked = torch.arange(1, rows + 1, device="cuda") * tokens - 1
    calls = {}
    for precision in ("bf16", "INT8", "NF4", "NF4 to INT8"):
        model = random_model(name, nf4=precision.startswith("NF4"))
        if precision.endswith("INT8"):
            hold_base_in_int8(model)
        decoder = PackedDecoder(model)
        decoder.refresh()
        pool = KeyValuePool(decoder, rows * tokens)
        hidden = decoder.text_model.embed_tokens(prompts.tokens)
        calls[precision] = partial(prefill, decoder, hidden, prompts, asked, pool)
    return calls


@torch.no_grad()
def prefill(
    decoder: PackedDecoder, hidden: torch.Tensor, prompts: PackedPrompts, asked: torch.Tensor, pool: KeyValuePool
) -> torch.Tensor:
    """Logits of the rows' next tokens."""
    return decoder.logits(decoder.prefill(hidden.clone(), prompts, asked, pool, 0))


def print_table(title: str, rows: dict[str, dict[str, float]], form: str) -> None:
    """One Markdown table: a row for each key of `rows`."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    print(f"\n| {title} | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, row in rows.items():
        print(
            f"| {name} | {' | '.join(format(row[column], form) if column in row else '' for column in columns)} |",
            flush=True,
        )


def main() -> None:
    """Check, time and print; what is known so far is written after each shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for int8_speed.json")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4856], help="rows of x")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--tiles", action="store_true", help="time and check all tiles at the first shape, not the shapes"
    )
    parser.add_argument("--prefill", metavar="MODEL", help="time the prompts of 64 rows; its config alone is read")
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        sys.exit("int8_speed.py: a GPU of compute capability 9.0 (H100, H200) is needed, and there is none")
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    found = {"machine": torch.cuda.get_device_name(), "torch": torch.__version__}
    print_table("check", {str(shape): check(*shape, int8.tile_of(shape[0])) for shape in CHECKED}, ".2e")
    with tqdm(unit="call", disable=None) as bar:
        if options.prefill:
            calls = prefill_calls(options.prefill, 64, 607)
            logits = {name: call().float() for name, call in calls.items()}
            found["prefill"] = milliseconds(calls, options.rounds, bar, repeated=1)
            found["logits differ by"] = {
                held: relative(logits[held], logits[loaded].double())
                for loaded, held in (("bf16", "INT8"), ("NF4", "NF4 to INT8"))
            }
            rows = {key: found[key] for key in ("prefill", "logits differ by")}
            print_table(f"{options.prefill}, 64 rows of 607 tokens, ms", rows, ".3f")
        elif options.tiles:
            width, features = next(iter(SHAPES.values()))
            given = random_product(options.tokens[0], width, features)
            operands = int8.quantize_rows_to_int8(given["x"]), int8.quantize_rows_to_int8(given["weight"])
            low_rank, out = (given["x_a"], given["b"].T), torch.empty(options.tokens[0], features, **BF16)
            calls = {
                " x ".join(map(str, tile)): lambda tile=tile: int8.launch_int8_linear(
                    *operands, out, low_rank, None, False, tile
                )
                for tile in TILES
            }
            times = milliseconds(calls, options.rounds, bar)
            rate = 2 * options.tokens[0] * width * features / 1e9
            found["tiles"] = {name: {"ms": ms, "TOP/s": rate / ms} for name, ms in times.items()}
            print_table("tile", found["tiles"], ".3f")
        else:
            found["ms"] = {}
            for tokens in options.tokens:
                for name, (width, features) in SHAPES.items():
                    calls = ways(**random_product(tokens, width, features))
                    found["ms"][f"{tokens} x {name}"] = milliseconds(calls, options.rounds, bar)
                    write(options.output, found)
            print_table("milliseconds", found["ms"], ".3f")
    write(options.output, found)


BF16 = {"device": "cuda", "dtype": torch.bfloat16}
CHECKED = [(4856, 4096, 4096), (100, 256, 400), (48, 11008, 512), (1, 2048, 320)]  # tokens, in, out


def write(folder: Path, found: dict) -> None:
    """int8_speed.json, whole."""
    (folder / "int8_speed.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
