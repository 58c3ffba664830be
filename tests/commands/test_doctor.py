"""The doctor: the first error of a log is told as its cause, what follows from it is not, and what is not known is said."""

import re

import doctor
import pytest
import yaml
from conftest import ROOT, run_command

LAUNCHER = """\
W1130 12:00:08.921000 4242 torch/distributed/elastic/multiprocessing/api.py:900] Sending process 4243 closing signal SIGTERM
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
    ("torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 86.00 MiB (GPU 0; 14.76 GiB total capacity; 13.57 GiB already allocated\n", "no room"),
    ("RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`\n", "no room"),
    ("RuntimeError: [enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 33554432 bytes. Error code 12 (Cannot allocate memory)\n", "main memory"),
    ("OSError: [Errno 12] Cannot allocate memory\n", "main memory"),
    ("numpy._core._exceptions._ArrayMemoryError: Unable to allocate 12.4 GiB for an array with shape (20000, 336, 336, 3) and data type float32\n", "main memory"),
    ("ValueError: Some modules are dispatched on the CPU or the disk. Make sure you have enough GPU RAM to fit the quantized model.\n", "GPU"),
    ("RuntimeError: unable to write to file </torch_71_123_4>: No space left on device (28)\n", "/dev/shm"),
    ("RuntimeError: unable to open shared memory object </torch_29919_1396182366> in read-write mode: Too many open files (24)\n", "open files"),
    ("ERROR: Unexpected bus error encountered in worker. This might be caused by insufficient shared memory (shm).\n", "shm"),
    ("ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0. Your Tesla T4 GPU has compute capability 7.5.\n", "Ampere"),
    ("RuntimeError: \"addmm_impl_cpu_\" not implemented for 'Half'\n", "CPU"),
    ("RuntimeError: \"LayerNormKernelImpl\" not implemented for 'Half'\n", "CPU"),
    ("ImportError: FlashAttention2 has been toggled on, but it cannot be used due to the following error: the package flash_attn seems to be not installed.\n", "flash-attn"),
    ("RuntimeError: FlashAttention only support fp16 and bf16 data type\n", "dtype"),
    ("NVIDIA GeForce RTX 5090 with CUDA capability sm_120 is not compatible with the current PyTorch installation.\n", "no code for this GPU"),
    ("RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling NumCudaDevices() that might have already set an error? Error 803: system has unsupported display driver / cuda driver combination\n", "driver"),
    ("RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized\n", "fabric"),
    ("ImportError: libcudart.so.11.0: cannot open shared object file: No such file or directory\n", "builds"),
    ("OSError: libcusparse.so.12: undefined symbol: __nvJitLinkAddData_12_1, version libnvJitLink.so.12\n", "builds"),
    ("ImportError: /lib/x86_64-linux-gnu/libstdc++.so.6: version `GLIBCXX_3.4.32' not found\n", "system library"),
    ("ImportError: libGL.so.1: cannot open shared object file: No such file or directory\n", "OpenCV"),
    ("AttributeError: 'NoneType' object has no attribute 'cget_col_row_stats'\n", "bitsandbytes"),
    ("ImportError: Using `bitsandbytes` 4-bit quantization requires the latest version of bitsandbytes: `pip install -U bitsandbytes`\n", "bitsandbytes"),
    ("ImportError: Using `low_cpu_mem_usage=True` or a `device_map` requires Accelerate: `pip install 'accelerate>=0.26.0'`\n", "not active, or incomplete"),
    ("ImportError: cannot import name 'is_torch_fx_available' from 'transformers.utils'\n", "Versions"),
    ("ImportError: cannot import name 'cached_download' from 'huggingface_hub'\n", "Versions"),
    ("AttributeError: module 'transformers' has no attribute 'AutoModelForVision2Seq'\n", "Versions"),
    ("ValueError: numpy.dtype size changed, may indicate binary incompatibility. Expected 96 from C header, got 88 from PyObject\n", "NumPy"),
    ("TypeError: SFTConfig.__init__() got an unexpected keyword argument 'max_seq_length'\n", "older TRL"),
    ("TypeError: TrainingArguments.__init__() got an unexpected keyword argument 'evaluation_strategy'\n", "older TRL"),
    ("TypeError: LlamaForCausalLM.forward() got an unexpected keyword argument 'num_items_in_batch'\n", "Versions"),
    ("ModuleNotFoundError: No module named 'trl'\n", "environment"),
    ("ModuleNotFoundError: No module named 'torch._six'\n", "Versions"),
    ("huggingface_hub.utils._errors.GatedRepoError: 403 Client Error. (Request ID: Root=1-66) Cannot access gated repo for url https://huggingface.co/google/gemma-2b-it/resolve/main/config.json.\n", "gated"),
    ("OSError: You are trying to access a gated repo.\nMake sure to have access to it at https://huggingface.co/google/gemma-2b.\n", "gated"),
    ("huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error. Repository Not Found for url: https://huggingface.co/api/models/llava-hf/llava-7b.\n", "No such model"),
    ("OSError: llava-hf/llava does not appear to have a file named preprocessor_config.json. Checkout 'https://huggingface.co/llava-hf/llava/tree/main' for available files.\n", "file"),
    ("OSError: Can't load tokenizer for 'google/gemma-2b-it'. If you were trying to load it from 'https://huggingface.co/models', make sure you don't have a local directory with the same name.\n", "file"),
    ("OSError: Error no file named pytorch_model.bin, model.safetensors, tf_model.h5 found in directory ./checkpoint-100\n", "file"),
    ("requests.exceptions.ConnectionError: HTTPSConnectionPool(host='huggingface.co', port=443): Max retries exceeded with url: /api/models\n", "Hub"),
    ("httpx.ConnectError: [Errno -2] Name or service not known\n", "reach"),
    ("requests.exceptions.SSLError: HTTPSConnectionPool(host='huggingface.co', port=443): certificate verify failed\n", "Hub"),
    ("ssl.SSLCertVerificationError: [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate in certificate chain\n", "proxy"),
    ("huggingface_hub.errors.HfHubHTTPError: 429 Client Error: Too Many Requests for url\n", "limits"),
    ("ValueError: The checkpoint you are trying to load has model type `gemma3` but Transformers does not recognize this architecture.\n", "model type"),
    ("Exception: data did not match any variant of untagged enum ModelWrapper at line 1251003 column 3\n", "tokeni"),
    ("safetensors_rust.SafetensorError: Error while deserializing header: InvalidHeaderDeserialization\n", "cut off"),
    ("safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata, file not fully covered\n", "cut off"),
    ("RuntimeError: PytorchStreamReader failed reading zip archive: failed finding central directory\n", "cut off"),
    ("_pickle.UnpicklingError: Weights only load failed. This file can still be loaded, to do so you have two options\n", "pickle"),
    ("_pickle.UnpicklingError: invalid load key, 'v'.\n", "cut off"),
    ("RuntimeError: Error(s) in loading state_dict for PeftModelForCausalLM:\n	size mismatch for base_model.model.model.embed_tokens.weight\n", "shape"),
    ("ValueError: Please specify `target_modules` in `peft_config`\n", "No layer"),
    ("ValueError: Target module LlamaDecoderLayer() is not supported. Currently, only the following modules are supported: `torch.nn.Linear`\n", "layer"),
    ("ValueError: Can't find 'adapter_config.json' at './out'\n", "adapter"),
    ("ValueError: Image features and image tokens do not match: tokens: 0, features 2359296\n", "image"),
    ("ValueError: The input provided to the model are wrong. The number of image tokens is 0 while the number of image given to the model is 1. This prevents correct indexing and breaks batch generation.\n", "image"),
    ("ValueError: Invalid input type. Must be a single image, a list of images, or a list of batches of images.\n", "image"),
    ("IndexError: index out of range in self\n", "out of range"),
    ("../aten/src/ATen/native/cuda/Indexing.cu:1290: indexSelectLargeIndex: block: [8,0,0], thread: [64,0,0] Assertion `srcIndex < srcSelectDimSize` failed.\n", "out of range"),
    ("jinja2.exceptions.TemplateError: Conversation roles must alternate user/assistant/user/assistant/...\n", "template"),
    ("ValueError: Cannot use chat template functions because tokenizer.chat_template is not set and no template argument was passed!\n", "template"),
    ("ValueError: Asking to pad but the tokenizer does not have a padding token.\n", "padding"),
    ("ValueError: Unable to create tensor, you should probably activate truncation and/or padding with 'padding=True' 'truncation=True'\n", "different lengths"),
    ("RuntimeError: stack expects each tensor to be equal size, but got [576] at entry 0 and [577] at entry 1\n", "different lengths"),
    ("OSError: image file is truncated (32 bytes not processed)\n", "damaged"),
    ("PIL.Image.DecompressionBombError: Image size (199756800 pixels) exceeds limit of 178956970 pixels\n", "large"),
    ("datasets.exceptions.DatasetGenerationError: An error occurred while generating the dataset\n", "no valid JSON"),
    ("pyarrow.lib.ArrowInvalid: JSON parse error: Column(/messages/[]/content) changed from string to array in row 5\n", "type"),
    ("json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)\n", "JSON"),
    ("KeyError: 'messages'\n", "column"),
    ("AssertionError: No inf checks were recorded for this optimizer.\n", "gradient"),
    ("RuntimeError: Trying to backward through the graph a second time (or directly access saved tensors after they have already been freed).\n", "custom loss"),
    ("RuntimeError: one of the variables needed for gradient computation has been modified by an inplace operation\n", "custom loss"),
    ("torch.utils.checkpoint.CheckpointError: torch.utils.checkpoint: Recomputed values for the following tensors have different metadata than during the forward pass.\n", "second time"),
    ("ValueError: You cannot perform fine-tuning on purely quantized models.\n", "4-bit"),
    ("ValueError: The model you are trying to fine-tune is quantized with QuantizationMethod.BITS_AND_BYTES but that quantization method do not support training.\n", "4-bit"),
    ("RuntimeError: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cuda:1!\n", "different devices"),
    ("RuntimeError: Caught OutOfMemoryError in replica 1 on device 1.\n", "several GPUs"),
    ("ValueError: Must flatten tensors with uniform dtype but got torch.bfloat16 and torch.uint8\n", "dtypes"),
    ("RuntimeError: 'weight' must be 2-D\n", "flat"),
    ("AttributeError: 'DeepSpeedZeRoOffload' object has no attribute 'backward'\n", "DeepSpeed"),
    ("AssertionError: Check batch related parameters. train_batch_size is not equal to micro_batch_per_gpu * gradient_acc_step * world_size 8 != 1 * 4 * 1\n", "DeepSpeed"),
    ("AttributeError: 'DeepSpeedCPUAdam' object has no attribute 'ds_opt_adam'\n", "DeepSpeed"),
    ("RuntimeError: Error building extension 'cpu_adam'\n", "DeepSpeed"),
    ("RuntimeError: Ninja is required to load C++ extensions\n", "DeepSpeed"),
    ("torch.distributed.DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:1333, invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.19.3\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 35000\n", "NCCL"),
    ("ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\n", "NCCL"),
    ("[rank0]:[E ProcessGroupNCCL.cpp:607] [Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=1800000) ran for 1800170 milliseconds before timing out.\n", "waits"),
    ("torch.distributed.DistStoreError: Timed out after 901 seconds waiting for clients. 1/2 clients joined.\n", "reach"),
    ("RuntimeError: Default process group has not been initialized, please make sure to call init_process_group.\n", "process"),
    ("ValueError: Error initializing torch.distributed using env:// rendezvous: environment variable RANK expected, but not set\n", "The script was started"),
    ("sbatch: error: Batch job submission failed: Requested node configuration is not available\n", "Slurm"),
    ("sbatch: error: invalid partition specified: gpu\n", "Slurm"),
    ("srun: error: Unable to create step for job 77: More processors requested than permitted\n", "Slurm"),
    ("slurmstepd: error: *** STEP 12.0 ON n1 CANCELLED AT 2026-11-02T03:04:05 DUE TO NODE FAILURE ***\n", "Slurm"),
    ("wandb: ERROR Error while calling W&B API: permission denied (<Response [403]>)\n", "W&B"),
    ("wandb.errors.errors.CommError: Run initialization has timed out after 90.0 sec.\n", "W&B"),
    ("FileNotFoundError: [Errno 2] No such file or directory: 'data/cctv/train.json'\n", "is not there"),
    ("OSError: [Errno 30] Read-only file system: '/root/.cache'\n", "cannot be written"),
    ("OSError: [Errno 116] Stale file handle\n", "network"),
    ("OSError: [Errno 5] Input/output error\n", "disk"),
    ("yaml.scanner.ScannerError: mapping values are not allowed here\n", "recipe"),
    ("KeyboardInterrupt\n", "stopped"),
    ("RuntimeError: cuDNN error: CUDNN_STATUS_EXECUTION_FAILED\n", "kernel"),
    ("RuntimeError: cutlassF: no kernel found to launch!\n", "attention"),
    ("RuntimeError: No available kernel. Aborting execution.\n", "attention"),
    ("triton.runtime.errors.OutOfResources: out of resource: shared memory, Required: 114688, Hardware limit: 101376.\n", "kernel"),
    ("RuntimeError: Unable to find a valid cuDNN algorithm to run convolution\n", "kernel"),
    ("ValueError: --load_best_model_at_end requires the save and eval strategy to match, but found\n", "Evaluation and saving do"),
    ("ValueError: Trainer: evaluation requires an eval_dataset.\n", "validation"),
    ("ValueError: You have set `args.eval_strategy` to steps but you didn't pass an `eval_dataset` to `Trainer`.\n", "validation"),
    ("ValueError: No valid checkpoint found in output directory (outputs/x)\n", "checkpoint"),
    ("ValueError: loaded state dict contains a parameter group that doesn't match the size of optimizer's group\n", "checkpoint"),
    ("terminate called after throwing an instance of 'c10::Error'\n  what():  CUDA error: an illegal memory access was encountered\n", "kernel"),
    ("zsh: killed     python scripts/train_llava.py\n", "main memory"),
    ("bash: line 1:  4242 Killed                  python scripts/train_llava.py\n", "main memory"),
    ("NotImplementedError: Cannot copy out of meta tensor; no data!\n", "never loaded"),
    ("AttributeError: 'LlavaConfig' object has no attribute 'vocab_size'\n", "Versions"),
    ("OSError: [Errno 122] Disk quota exceeded\n", "quota"),
    ("RuntimeError: The detected CUDA version (11.8) mismatches the version that was used to compile PyTorch (12.8). Please make sure to use the same CUDA versions.\n", "CUDA"),
    ("RuntimeError: Found dtype Float but expected Half\n", "dtype"),
    ("RuntimeError: self and mat2 must have the same dtype, but got BFloat16 and Float\n", "dtype"),
    ("RuntimeError: probability tensor contains either `inf`, `nan` or element < 0\n", "NaN"),
    ("{'loss': 0.0, 'grad_norm': nan, 'learning_rate': 1.9e-05, 'epoch': 0.02}\n", "finite"),
    ("ValueError: Tokenizer class GemmaTokenizer does not exist or is not currently imported.\n", "tokeni"),
    ("ImportError: requires the protobuf library but it was not found in your environment\n", "environment"),
    ("ImportError: cannot instantiate this tokenizer from a slow version. If it's based on sentencepiece, make sure you have sentencepiece installed.\n", "incomplete"),
    ("Killed\n", "main memory"),
    ("train.sh: line 12: 48213 Killed                  ./train.sh\n", "main memory"),
    ("Loading checkpoint shards:  33%|###  | 1/3 [00:31<01:02, 31.2s/it]Killed\n", "main memory"),
    ("{\"loss\": NaN, \"grad_norm\": NaN, \"learning_rate\": 0.0002}\n", "not finite"),
    ("/var/spool/slurmd/job812/slurm_script: line 31: accelerate: command not found\n", "environment is not active"),
    ("zsh: command not found: accelerate\n", "environment is not active"),
    ("'accelerate' is not recognized as an internal or external command,\n", "environment is not active"),
    ("ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: 1.13.1)\n", "pip"),
    ("error: externally-managed-environment\n", "managed by its distribution"),
    ("RuntimeError: expected mat1 and mat2 to have the same dtype, but got: c10::BFloat16 != c10::Half\n", "dtype"),
    ("RuntimeError: Error(s) in loading state_dict for PeftModel:\n\tsize mismatch for lm_head.weight: copying a param with shape torch.Size([0])\n", "ZeRO-3"),
    ("ValueError: Packing is not supported for vision-language models.\n", "packs no rows"),
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
        "TypeError: unsupported operand type(s) for +: 'int' and 'str'\n",
        "IndexError: list index out of range\n",
        "NameError: name 'foo' is not defined\n",
        "RuntimeError: something went wrong in my_kernel\n",
        "ValueError: too many values to unpack (expected 2)\n",
        "RecursionError: maximum recursion depth exceeded\n",
        "TypeError: my_function() got an unexpected keyword argument 'banana'\n",
        "AttributeError: 'Thing' object has no attribute 'forward'\n",
        "SyntaxError: invalid syntax\n",
        "IndentationError: unexpected indent\n",
        "UnboundLocalError: local variable 'x' referenced before assignment\n",
        "RuntimeError: shape '[2, 3]' is invalid for input of size 7\n",
        "KeyError: 42\n",
        "ValueError: could not convert string to float: 'abc'\n",
        "RuntimeError: The size of tensor a (577) must match the size of tensor b (1025) at non-singleton dimension 1\n",
        "OverflowError: int too large to convert to float\n",
        "TypeError: 'NoneType' object is not subscriptable\n",
        "ValueError: invalid literal for int() with base 10: 'x'\n",
        "EOFError: EOF when reading a line\n",
        "sqlite3.OperationalError: database is locked\n",
        "AttributeError: module 'math' has no attribute 'sqroot'\n",
        "ImportError: attempted relative import with no known parent package\n",
        "RuntimeError: dictionary changed size during iteration\n",
        "LookupError: unknown encoding: klingon\n",
        "kafka.errors.NoBrokersAvailable: NoBrokersAvailable\n",
        "django.core.exceptions.ImproperlyConfigured: The SECRET_KEY setting must not be empty.\n",
    ],
)
def test_an_unknown_error_is_called_unknown_also_where_the_launcher_speaks_of_it(log):
    text, known = doctor.describe_log(TRACE + log + LAUNCHER, "en")
    assert not known
    assert text.startswith("Not known") and log.strip() in text


@pytest.mark.parametrize(
    "line",
    [
        "{'loss': 1.203, 'grad_norm': 0.51, 'learning_rate': 1.403e-05, 'epoch': 0.41}",
        "wandb: Run data is saved locally in /x/wandb/run-20261130_401403",
        "The model is loaded; 403 rows",
        "  0%|          | 0/401 [00:00<?, ?it/s]",
        "UserWarning: torch.utils.checkpoint: the use_reentrant parameter should be passed explicitly.",
        "zero3_init_flag: true",
        "[WARNING] async_io requires the dev libaio .so object and headers but these were not found.",
        "W1130 12:00:00 OMP_NUM_THREADS",
        "Some weights of LlavaForConditionalGeneration were not initialized from the model checkpoint",
        "Generating train split: 100 examples",
        "warnings.warn(\"User provided device_type of 'cuda', but CUDA is not available. Disabling\")",
        "The attention mask and the pad token id were not set",
        "Setting pad_token_id to eos_token_id",
        "NCCL version 2.27.5+cuda12.9",
        "Unused kwargs: ['_load_in_4bit']",
    ],
)
def test_a_line_that_tells_of_no_error_is_passed_over(line):
    assert not doctor.read_log(line)


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
