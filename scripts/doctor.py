"""What is wrong: with this machine, or with the run that wrote a log?

    python scripts/doctor.py                      the machine: driver, torch, bitsandbytes, memory, disk, Hub, versions
    python scripts/doctor.py slurm/logs/train.log what the first error means, and what to do
    python scripts/doctor.py train.log --language ko

Causes are in scripts/diagnoses.yaml; docs/troubleshooting.md shows all of them. Exit status: 0 nothing found (machine) or
a cause known (log), 1 a problem of the machine, or a log that is not understood.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import yaml

from finetuning import command
from finetuning.flags import Parser

ROOT = Path(__file__).resolve().parents[1]
DIAGNOSES = Path(__file__).with_name("diagnoses.yaml")
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108  (looked at, not written to)
# A line that ends a trace: `ValueError: ...`, `[rank1]: torch.OutOfMemoryError: ...`.
# Also `kafka.errors.NoBrokersAvailable: ...`: a class of a module, whatever its name.
RANK = r"^(?:\[?rank\d+\]?:\s*|\d+:\s*)?"
ERROR = re.compile(RANK + r"(?:(?:[\w.]+\.)?\w*(?:Error|Exception|Interrupt)\b(?::|$)|(?:[a-z_]\w*\.)+[A-Z]\w+: )")
LONGEST = 400  # characters of a log line that are looked at and shown; progress bars have many thousands
MESSAGE = 5  # lines that the message of one error may have
WORDS = {
    "en": {
        "line": "line {number}: {text}",
        "cause": "Cause:   {text}",
        "do": "What to do: {text}",
        "also": "Also in this log, later:",
        "unknown": "Not known. The first error of this log:",
        "nothing": "No error found in {lines} lines. If the run stopped, look at the logs of the other ranks and nodes.",
        "well": "Nothing wrong was found.",
        "title": "Troubleshooting",
        "other": "[한국어](troubleshooting.ko.md)",
        "head": "| message | cause | what to do |",
        "intro": "The first error of a log is the cause; what comes after it mostly follows from it. This finds it, and checks the\nmachine:",
    },
    "ko": {
        "line": "{number}번째 줄: {text}",
        "cause": "원인:   {text}",
        "do": "할 일:  {text}",
        "also": "이 로그의 뒤쪽에 있는 것:",
        "unknown": "모르는 오류입니다. 이 로그의 첫 오류:",
        "nothing": "{lines}줄에서 오류를 찾지 못했습니다. 실행이 멈췄다면 다른 랭크와 노드의 로그를 보세요.",
        "well": "잘못된 것을 찾지 못했습니다.",
        "title": "문제 해결",
        "other": "[English](troubleshooting.md)",
        "head": "| 메시지 | 원인 | 할 일 |",
        "intro": "로그의 첫 오류가 원인이고, 그 뒤의 것은 대개 거기서 나옵니다. 아래 명령이 첫 오류를 찾고, 기계도 점검합니다.",
    },
}


@dataclass(frozen=True)
class Diagnosis:
    """One kind of error: the expressions that find it, and its cause and remedy by language."""

    says: tuple[str, ...]
    cause: dict[str, str]
    do: dict[str, str]
    follows: bool  # a consequence of an earlier error, told only where no cause is found

    def finds(self, line: str) -> bool:
        """Whether a line of a log is this error."""
        return any(re.search(expression, line) for expression in self.says)


@dataclass(frozen=True)
class Finding:
    number: int  # of the line, from 1
    line: str
    diagnosis: Diagnosis | None  # None for an error that is not known


def read_diagnoses() -> dict[str, list[Diagnosis]]:
    """Title (English) -> diagnoses, in the order of diagnoses.yaml."""
    sections = yaml.safe_load(DIAGNOSES.read_text(encoding="utf-8"))
    return {
        section["title"]["en"]: [
            Diagnosis(tuple(entry["says"]), entry["cause"], entry["do"], entry.get("follows", False))
            for entry in section["entries"]
        ]
        for section in sections
    }


def read_log(text: str) -> list[Finding]:
    """The errors of a log in order, each kind once, the cause first.

    The first error that is known and no consequence of another comes first. An unknown error that ends a trace before it
    comes before it: what follows may only follow from it.
    """
    known = [diagnosis for section in read_diagnoses().values() for diagnosis in section]
    findings: list[Finding] = []
    seen: list[Diagnosis] = []
    for number, whole in enumerate(re.split(r"[\r\n]+", text), start=1):
        line = whole[:LONGEST]
        diagnosis = next((one for one in known if one.finds(line)), None)
        if diagnosis is None and ERROR.search(line):
            findings.append(Finding(number, line, None))
        elif diagnosis is not None and findings and is_rest_of(findings[-1], number, line, diagnosis):
            findings[-1] = Finding(number, line, diagnosis)
        elif diagnosis is not None and diagnosis not in seen:
            seen.append(diagnosis)
            findings.append(Finding(number, line, diagnosis))
    return sorted(findings, key=lambda finding: finding.diagnosis is not None and finding.diagnosis.follows)


def is_rest_of(error: Finding, number: int, line: str, diagnosis: Diagnosis) -> bool:
    """Whether a line that is known goes on with the message of an error that is not known by its first line.

    What the launcher says right behind an unknown error does not make it known.
    """
    near = number - error.number <= MESSAGE
    return error.diagnosis is None and near and not diagnosis.follows and not ERROR.search(line)


def describe_log(text: str, language: str) -> tuple[str, bool]:
    """What to print about a log; whether its cause is known."""
    words, findings = WORDS[language], read_log(text)
    if not findings:
        return words["nothing"].format(lines=text.count("\n") + 1), False
    first, *later = findings
    shown = words["line"].format(number=first.number, text=first.line.strip())
    if first.diagnosis is None:
        lines = [words["unknown"], shown]
        later = [finding for finding in later if finding.diagnosis is not None]
    else:
        lines = [
            shown,
            words["cause"].format(text=first.diagnosis.cause[language]),
            words["do"].format(text=first.diagnosis.do[language]),
        ]
    if later:
        lines += ["", words["also"]]
        lines += ["  " + words["line"].format(number=one.number, text=one.line.strip()[:100]) for one in later[:5]]
    return "\n".join(lines), first.diagnosis is not None


def troubleshooting_page(language: str) -> str:
    """docs/troubleshooting.md, or its Korean twin: every diagnosis, one heading a subject."""
    words = WORDS[language]
    sections = yaml.safe_load(DIAGNOSES.read_text(encoding="utf-8"))
    lines = [f"# {words['title']}", "", words["other"], "", words["intro"], ""]
    lines += ["```bash", "python scripts/doctor.py", "python scripts/doctor.py train.log", "```"]
    for section in sections:
        lines += ["", f"## {section['title'][language]}", "", words["head"], "|---|---|---|"]
        for entry in section["entries"]:
            messages = "<br>".join(f"`{as_text(expression)}`" for expression in entry["says"])
            lines.append(f"| {messages} | {entry['cause'][language]} | {entry['do'][language]} |")
    return "\n".join(lines) + "\n"


def as_text(expression: str) -> str:
    """A regular expression as a person would write the message: `A (b|c) \\d+` -> `A b N`."""
    text = re.sub(r"^\^|\$$|\\b|\[[^\]]*\]\*|(?<=[\w')\]-])\?", "", expression)
    text = re.sub(r"\[(\w)\w+\]", r"\1", text)
    text = re.sub(r"(?<!\\)\(([^()|]*)(\|[^()]*)?\)", r"\1", text)
    text = re.sub(r"\\d\+|\[\\d\.\]\+", "N", text)
    text = re.sub(r"\\[ws]\*|\\s\*", "", text.replace(r"\s+", " "))
    text = re.sub(r"\[[^\]]*\]\+|\\w\+", "...", text)
    return re.sub(r"\\(.)", r"\1", text.replace(".*", "...").replace(".?", "")).replace("|", "/")


# ---- the machine -----------------------------------------------------------------------------------------------------


def machine() -> Iterator[tuple[str, str, str | None]]:
    """(what, what was found, what is wrong and what to do or None), one after the other."""
    yield from versions()
    yield from gpus()
    yield from rooms()
    yield hub()


def versions() -> Iterator[tuple[str, str, str | None]]:
    """Installed versions against the pins of requirements.txt."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    yield "Python", python, None if python == "3.11" else "the pins were tested with 3.11: python3.11 -m venv .venv"
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        name, _, pinned = line.partition("#")[0].strip().partition("==")
        if not pinned:
            continue
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, "missing", "pip install -r requirements.txt"
            continue
        same = found.partition("+")[0] == pinned
        yield name, found, None if same else f"{pinned} was tested: pip install -r requirements.txt"


def gpus() -> Iterator[tuple[str, str, str | None]]:
    """Driver, torch's CUDA, each GPU, bitsandbytes' library, NCCL between the GPUs."""
    try:
        import torch
    except ImportError as error:
        yield "torch", "cannot be imported", f"{error}: make a fresh virtual environment from requirements.txt"
        return
    driver = driver_version()
    built = torch.version.cuda or "none (CPU build)"
    yield "driver", driver or "none", None
    wrong = None
    if driver and not torch.cuda.is_available():
        wrong = (
            f"there is a driver, but torch (CUDA {built}) sees no GPU: update the driver, or install torch for its CUDA"
        )
    yield "torch's CUDA", built, wrong
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        covered = any(arch.startswith(f"sm_{major}") for arch in torch.cuda.get_arch_list())
        yield (
            f"GPU {index}",
            f"{torch.cuda.get_device_name(index)}, capability {major}.{minor}, {memory:.1f} GiB, "
            f"{'bf16' if major >= 8 else 'fp16 (no bf16)'}",
            None if covered else f"this torch has no code for sm_{major}{minor}",
        )
    try:
        from bitsandbytes.cextension import lib
    except (ImportError, RuntimeError, OSError) as error:
        yield "bitsandbytes", "cannot be imported", f"{str(error).splitlines()[0]}: python -m bitsandbytes says more"
    else:
        loaded = getattr(lib, "compiled_with_cuda", False)
        missing = torch.cuda.is_available() and not loaded
        yield (
            "bitsandbytes' library",
            "CUDA" if loaded else "CPU",
            "no library for this CUDA: python -m bitsandbytes" if missing else None,
        )
    if torch.cuda.device_count() > 1:
        found, wrong = all_reduce_between_gpus(torch.cuda.device_count())
        yield "NCCL", found, wrong


def driver_version() -> str | None:
    """Version of the NVIDIA driver; None without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False)
    except subprocess.TimeoutExpired:
        return "nvidia-smi does not answer"
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout.strip() else None


ALL_REDUCE = """
import os, torch, torch.distributed as dist
rank = int(os.environ["LOCAL_RANK"]); torch.cuda.set_device(rank); dist.init_process_group("nccl")
number = torch.full((1,), rank + 1.0, device="cuda"); dist.all_reduce(number); print("sum", number.item())
"""


def all_reduce_between_gpus(count: int) -> tuple[str, str | None]:
    """One number added up over all GPUs by NCCL, in processes of their own."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={count}",
        "--no-python",
    ]
    command += [sys.executable, "-c", ALL_REDUCE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        return "no answer in 60 s", "the GPUs do not reach each other: try NCCL_P2P_DISABLE=1, and NCCL_DEBUG=INFO"
    expected = f"sum {count * (count + 1) / 2}"
    if done.stdout.count(expected) == count:
        return f"{count} GPUs add up", None
    return "failed", f"{(done.stderr.strip().splitlines() or ['no message'])[-1]}: try NCCL_DEBUG=INFO"


def rooms() -> Iterator[tuple[str, str, str | None]]:
    """Main memory, shared memory, disk."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    low = "a 7B model in 16 bits takes 14 GiB while it is loaded" if memory < 16 else None
    yield "main memory", f"{memory:.1f} GiB, {os.cpu_count()} CPU cores", low
    if SHARED_MEMORY.is_dir():
        shared = shutil.disk_usage(SHARED_MEMORY).free / 2**30
        wrong = (
            "loader processes need more: start the container with --ipc=host or --shm-size=8g" if shared < 1 else None
        )
        yield str(SHARED_MEMORY), f"{shared:.1f} GiB free", wrong
    for what, folder in (("disk, outputs", ROOT), ("disk, Hub cache", hub_cache())):
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free / 2**30
        wrong = "a 7B model takes 14 GiB, a LoRA checkpoint 2: make room, or set HF_HOME" if free < 20 else None
        yield what, f"{free:.0f} GiB free ({folder})", wrong


def hub_cache() -> Path:
    """Folder of the Hub's cache, by the environment variables that huggingface_hub reads."""
    home = os.environ.get("HF_HOME") or str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def hub() -> tuple[str, str, str | None]:
    """Whether there is a token (never shown) and what the cache holds."""
    token = "HF_TOKEN" in os.environ or (hub_cache().parent / "token").is_file()
    cache = hub_cache()
    models = sorted(path.name.removeprefix("models--").replace("--", "/") for path in cache.glob("models--*"))
    held = f"cache: {', '.join(models[:5]) or 'empty'}{', ...' if len(models) > 5 else ''}"
    offline = os.environ.get("HF_HUB_OFFLINE") == "1"
    wrong = (
        "HF_HUB_OFFLINE=1 and an empty cache: download on a machine with internet first"
        if offline and not models
        else None
    )
    return "Hub", f"{'token set' if token else 'no token (gated models need HF_TOKEN)'}; {held}", wrong


def main() -> None:
    """Check the machine, or read a log; exit status 1 where something is wrong, or the log is not understood."""
    parser = Parser(__doc__)
    parser.add_argument("log", nargs="?", help="a log, or - for standard input; without one the machine is checked")
    parser.add_argument("--language", choices=sorted(WORDS), default="en")
    args = parser.parse_args()
    if args.log is None:
        problems = 0
        for what, found, wrong in machine():
            problems += wrong is not None
            print(f"{'!' if wrong else ' '} {what:22} {found}" + (f"\n    {wrong}" if wrong else ""), flush=True)
        if not problems:
            print(WORDS[args.language]["well"])
            return
        sys.exit(1)
    if args.log != "-" and not Path(args.log).is_file():
        raise ValueError(
            f"{args.log}: no such file. Expected a log, such as slurm/logs/train-123.log, or - to read a pipe"
        )
    data = sys.stdin.buffer.read() if args.log == "-" else Path(args.log).read_bytes()
    # PowerShell's > writes UTF-16.
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    text, known = describe_log(data.decode(encoding, errors="replace"), args.language)
    print(text)
    if not known:
        sys.exit(1)


if __name__ == "__main__":
    command.run(main)
