"""The doctor: the first error of a log is told as its cause, what follows from it is not, and what is not known is said."""

import re

import doctor
import pytest
import yaml
from conftest import ROOT, run_command

LAUNCHER = """\
E1130 12:00:09.123000 4242 torch/distributed/elastic/multiprocessing/api.py:874] failed (exitcode: 1) local_rank: 0
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
subprocess.CalledProcessError: Command '['accelerate']' returned non-zero exit status 1.
"""
TRACE = 'Traceback (most recent call last):\n  File "train.py", line 94, in <module>\n    main()\n'

# (last lines of a log as libraries write them, a word of the cause)
LOGS = [
    ("[rank1]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has 14.58 GiB\n", "no room"),
    ("ValueError: this run cannot work:\n  - memory: each GPU must hold at least 15.5 GiB before it sees a row\n", "exceed"),
    ("RuntimeError: DataLoader worker (pid 71) is killed by signal: Bus error. It is possible that ...\n", "/dev/shm"),
    ("slurmstepd: error: Detected 1 oom_kill event in StepId=88.0. Some of the step tasks\n", "main memory"),
    ("OSError: [Errno 24] Too many open files\n", "open files"),
    ("OSError: [Errno 28] No space left on device: '/home/kim/.cache/huggingface'\n", "disk is full"),
    ("ValueError: Your setup doesn't support bf16/gpu. You need torch>=1.10\n", "Ampere"),
    ("RuntimeError: FlashAttention only supports Ampere GPUs or newer.\n", "capability 8.0"),
    ("ImportError: flash_attn_2_cuda.cpython-311-x86_64-linux-gnu.so: undefined symbol: _ZN3c104cuda\n", "flash-attn"),
    ("ValueError: Attempting to unscale FP16 gradients.\n", "fp32"),
    ("RuntimeError: expected scalar type Half but found BFloat16\n", "dtype"),
    ("train_llava.py: the loss is nan at step 31 (rows 4, 5, 6, 7)\n", "not finite"),
    ("Exception: Current loss scale already at minimum - cannot decrease scale anymore.\n", "overflows"),
    ("RuntimeError: CUDA error: no kernel image is available for execution on the device\n", "no code for this GPU"),
    ("RuntimeError: The NVIDIA driver on your system is too old (found version 11040).\n", "driver is older"),
    ("AssertionError: Torch not compiled with CUDA enabled\n", "CPU build"),
    ("RuntimeError: CUDA error: device-side assert triggered\n", "out of range"),
    ("OSError: libbitsandbytes_cuda121.so: cannot open shared object file: No such file\n", "bitsandbytes"),
    ("deepspeed.ops.op_builder.builder.MissingCUDAException: CUDA_HOME does not exist, unable to compile CUDA op(s)\n", "DeepSpeed"),
    ("RuntimeError: operator torchvision::nms does not exist\n", "torchvision"),
    ("TypeError: SFTTrainer.__init__() got an unexpected keyword argument 'tokenizer'\n", "older TRL"),
    ("huggingface_hub.errors.GatedRepoError: 401 Client Error.\nCannot access gated repo for url\n", "gated"),
    ("OSError: llava-hf/llava-1.5-7 is not a local folder and is not a valid model identifier\n", "No such model"),
    ("OSError: We couldn't connect to 'https://huggingface.co' to load the files\n", "does not reach the Hub"),
    ("safetensors_rust.SafetensorError: Error while deserializing header: HeaderTooLarge\n", "cut off"),
    ("ValueError: Target modules {' v_proj'} not found in the base model.\n", "blanks"),
    ("RuntimeError: size mismatch for model.embed_tokens.weight: copying a param with shape torch.Size([0])\n", "ZeRO-3"),
    ("ValueError: Image features and image tokens do not match: tokens: 512, features 576\n", "max_length"),
    ("WARNING: tokenization mismatch: 63 vs. 64. (ignored)\n", "answer was not found"),
    ("jinja2.exceptions.TemplateError: System role not supported\n", "template"),
    ("PIL.UnidentifiedImageError: cannot identify image file <_io.BytesIO object at 0x7f>\n", "damaged"),
    ("UnicodeDecodeError: 'utf-8' codec can't decode byte 0xc7 in position 0\n", "CP949"),
    ("RuntimeError: element 0 of tensors does not require grad and does not have a grad_fn\n", "trainable"),
    ("RuntimeError: Expected to mark a variable ready only once.\n", "checkpointing"),
    ("RuntimeError: Expected to have finished reduction in the prior iteration before starting a new one.\n", "no gradient"),
    ("ValueError: You can't train a model that has been loaded in 8-bit precision on a different device\n", "device_map"),
    ("RuntimeError: Caught RuntimeError in replica 0 on device 0.\n", "several GPUs"),
    ("torch.distributed.DistNetworkError: EADDRINUSE: address already in use, port: 29500\n", "port"),
    ("torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3384, unhandled system error\n", "NCCL failed"),
    ("slurmstepd: error: *** JOB 91 ON node1 CANCELLED AT 2026-11-30T12:00:00 DUE TO TIME LIMIT ***\n", "time limit"),
    ("wandb.errors.errors.UsageError: api_key not configured (no-tty). call wandb.login(key=[your_api_key])\n", "key"),
]  # fmt: skip


@pytest.mark.parametrize(("log", "word"), LOGS, ids=[log[:40] for log, _ in LOGS])
def test_the_cause_of_a_log_is_found_above_what_the_launcher_says_of_it(log, word):
    text, known = doctor.describe_log(f"  1%|          | 1/100 [00:01<01:39]\r\n{TRACE}{log}{LAUNCHER}", "en")
    assert known
    assert word in text.partition("What to do")[0].partition("Cause:")[2]


@pytest.mark.parametrize(
    "log",
    [
        "KeyError: 'frobnicate'\n",
        "ValueError: the moon is in the wrong house\n",
        "AssertionError\n",
        "AttributeError: 'NoneType' object has no attribute 'shape'\n",
        "ZeroDivisionError: division by zero\n",
    ],
)
def test_an_unknown_error_is_called_unknown_also_where_the_launcher_speaks_of_it(log):
    text, known = doctor.describe_log(TRACE + log + LAUNCHER, "en")
    assert not known
    assert text.startswith("Not known") and log.strip() in text


def test_an_unknown_error_before_a_known_one_is_not_passed_over():
    text, known = doctor.describe_log("KeyError: 'a'\n" + "RuntimeError: CUDA out of memory\n", "en")
    assert not known and "KeyError" in text and "CUDA out of memory" in text


def test_a_consequence_is_told_where_nothing_else_is_there():
    text, known = doctor.describe_log("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)\n", "ko")
    assert known and "다른 랭크" in text


def test_every_entry_has_both_languages_and_finds_what_it_shows():
    sections = yaml.safe_load(doctor.DIAGNOSES.read_text(encoding="utf-8"))
    entries = [entry for section in sections for entry in section["entries"]]
    assert len(entries) >= 60
    for entry in entries:
        assert entry.keys() <= {"says", "cause", "do", "follows"}
        assert set(entry["cause"]) == set(entry["do"]) == {"en", "ko"}
        assert all(re.compile(expression) for expression in entry["says"])


@pytest.mark.parametrize(("language", "name"), [("en", "troubleshooting.md"), ("ko", "troubleshooting.ko.md")])
def test_the_page_shows_every_entry(language, name):
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == doctor.troubleshooting_page(language)


def test_the_command_reads_a_file_and_refuses_what_is_none(tmp_path):
    log = tmp_path / "train.log"
    log.write_text("RuntimeError: CUDA out of memory\n")
    done = run_command("scripts/doctor.py", log)
    assert done.returncode == 0 and "load_in_4bit" in done.stdout
    log.write_text("RuntimeError: CUDA out of memory\n", encoding="utf-16")  # as PowerShell's > writes it
    assert "load_in_4bit" in run_command("scripts/doctor.py", log).stdout
    missing = run_command("scripts/doctor.py", tmp_path / "no.log")
    assert missing.returncode == 1 and "no such file" in missing.stderr and "Traceback" not in missing.stderr


def test_the_machine_is_checked_and_no_token_is_shown(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_a_test")
    found = {what: (value, wrong) for what, value, wrong in doctor.machine()}
    assert {"Python", "torch", "driver", "main memory", "Hub"} <= found.keys()
    assert "hf_secret_of_a_test" not in str(found) and "token set" in found["Hub"][0]
