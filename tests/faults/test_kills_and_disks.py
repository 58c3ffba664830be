"""Commands that are killed, and disks that fail: what is left is what an undisturbed command leaves, or a sentence says why not.

FAULTS=whole (make test-faults) tries all commands at 200 moments and on all kinds of disks; without it a sample is tried.
"""

import json
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import combinations_with_replacement, pairwise
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, must_run, run_command

from finetuning.run_folder import read_progress
from support.cases_of_faults import Case, contents, of_training, rows_of, size_of, train_words
from support.fork_server import Commands
from support.training import SAMPLE

WHOLE = os.environ.get("FAULTS") == "whole"
FAULTY_DISK = ROOT / "tests" / "support" / "faulty_disk.c"
TRAININGS = ["train_llava", "train_gemma"]
USES = ["evaluate_llava", "evaluate_gemma", "generate", "merge_adapter", "check_data"]
PREPARATIONS = ["prepare_cctv", "prepare_anime", "prepare_conversations"]
MAKERS = ["make_tiny_model", "make_sample_cctv"]
KILLED = [*TRAININGS, *USES, *PREPARATIONS, *MAKERS] if WHOLE else ["train_llava", "prepare_cctv"]
MOMENTS = {"train_llava": 50, "evaluate_llava": 30, "generate": 30} if WHOLE else {"train_llava": 2}
# Ctrl-C: 20 moments of a training, 5 of each other command that runs long.
PRESSED = ["train_llava", *(["evaluate_llava", "generate", "merge_adapter", "check_data"] if WHOLE else [])]
PRESSES, OTHER_PRESSES = {"train_llava": 20 if WHOLE else 2}, 5
OTHERS = 15 if WHOLE else 1  # moments of each other command; 245 in all
TIMES = {"full": 6, "quota": 2, "inodes": 4, "readonly": 1}  # a limit each
ON_DISKS = (
    [(name, kind) for name in KILLED for kind in TIMES]
    if WHOLE
    else [("train_llava", "full"), ("prepare_cctv", "readonly")]
)
WORDS = {
    "full": "no space left|disk full",
    "quota": "quota exceeded|disk full",
    "inodes": "no space left",
    "readonly": "read-only file system",
}


@pytest.fixture(scope="module")
def faulty_disk(tmp_path_factory) -> Path | None:
    """The library that makes disks fail, compiled; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    library = tmp_path_factory.mktemp("disk") / "faulty_disk.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, FAULTY_DISK, "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def commands(tmp_path_factory, faulty_disk) -> Commands:
    """The server of commands, in which disks can be made to fail."""
    preloaded = {"LD_PRELOAD": str(faulty_disk)} if faulty_disk else {}
    server = Commands(tmp_path_factory.mktemp("logs"), **preloaded)
    yield server
    server.close()


@pytest.fixture(scope="module")
def rivals(tmp_path_factory) -> Commands:
    """A second server, for commands that run beside those of the first."""
    server = Commands(tmp_path_factory.mktemp("rivals"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def anime_dataset(tmp_path_factory) -> Path:
    """A prepared table of 12 drawn-up titles."""
    folder = tmp_path_factory.mktemp("anime")
    must_run("data_prep/make_sample_anime.py", "--output", folder / "table.csv", "--titles", "12", by=run_command)
    must_run("data_prep/prepare_anime.py", "--csv", folder / "table.csv", "--output", folder / "anime", by=run_command)
    return folder / "anime"


@pytest.fixture(scope="module")
def trained(commands, case, tmp_path_factory) -> Callable[[str], Path]:
    """`trained(kind)`: a finished run of LLaVA or Gemma, for the commands that use one."""

    @cache
    def of(kind: str) -> Path:
        folder = tmp_path_factory.mktemp("trained")
        result = commands.run(*case(f"train_{kind}").words(folder))
        assert result.code == 0, result.log
        return folder / kind

    return of


@pytest.fixture(scope="module")
def case(request) -> Callable[[str], Case]:
    """`case(name)`: a command by name, with what it needs made first."""

    @cache
    def of(name: str) -> Case:
        get = request.getfixturevalue
        if name == "prepare_cctv":
            raw = get("raw_cctv")
            words = ["data_prep/prepare_cctv.py", "--frames", raw / "frames", "--labels", raw / "labels.csv"]
            words += ["--messages", raw / "messages.txt", "--gap", "3", "--output"]
            return Case(lambda folder: [*words, folder / name], rows_of(name))
        if name == "prepare_anime":
            words = ["data_prep/prepare_anime.py", "--csv", get("anime_dataset").parent / "table.csv", "--output"]
            return Case(lambda folder: [*words, folder / name], rows_of(name))
        if name == "prepare_conversations":
            source = get("tmp_path_factory").mktemp("conversations") / "rows.jsonl"
            turns = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Three."}]
            lines = [
                json.dumps({"id": str(n), "conversations": [*turns[:1], turns[1] | {"value": f"{n}."}]})
                for n in range(90)
            ]
            source.write_text("\n".join(lines), encoding="utf-8")
            words = ["data_prep/prepare_conversations.py", "--input", source, "--output"]
            return Case(lambda folder: [*words, folder / name], rows_of(name))
        if name == "train_llava":
            model, data = get("tiny_llava"), get("cctv_dataset")
            return Case(lambda folder: train_words("llava", model, data, folder / "llava"), of_training("llava"))
        if name == "train_gemma":
            model, data = get("tiny_gemma"), get("anime_dataset")
            return Case(lambda folder: train_words("gemma", model, data, folder / "gemma"), of_training("gemma"))
        if name == "check_data":
            words = ["scripts/check_data.py", "--config", SAMPLE, "--model_name_or_path", get("tiny_llava")]
            words += ["--dataset_name", get("cctv_dataset"), "--processes", "1", "--output"]
            return Case(lambda folder: [*words, folder / name], contents(f"{name}/check.json"))
        if name == "make_tiny_model":
            words = ["scripts/make_tiny_model.py", "--architecture", "llava", "--output"]
            return Case(lambda folder: [*words, folder / name], contents(f"{name}/*"))
        if name == "make_sample_cctv":
            words = ["data_prep/make_sample_cctv.py", "--frames", "40", "--output"]
            return Case(lambda folder: [*words, folder / name], contents(f"{name}/*.*", f"{name}/frames/*"))
        if name.startswith("evaluate"):
            kind = name.removeprefix("evaluate_")
            evaluated = f"{kind}/evaluation/{'test' if kind == 'llava' else 'facts'}"
            return Case(
                lambda folder: [f"scripts/{name}.py", "--run", folder / kind, "--limit", "12", "--batch_size", "1"],
                contents(f"{evaluated}/answers.jsonl", f"{evaluated}/table.md"),
                lambda folder: shutil.copytree(get("trained")(kind), folder / kind, dirs_exist_ok=True),
            )
        run = get("trained")("llava")
        if name == "merge_adapter":
            words = ["scripts/merge_adapter.py", "--run", run, "--rows", "1", "--output"]
            return Case(lambda folder: [*words, folder / name], contents(f"{name}/*.safetensors", f"{name}/*.json"))
        assert name == "generate"
        words = [
            "scripts/generate.py",
            "--model",
            run,
            "--image",
            get("raw_cctv") / "frames",
            "--question",
            "How many?",
        ]
        words += ["--batch_size", "1", "--max_new_tokens", "4", "--output"]
        return Case(lambda folder: [*words, folder / "answers.jsonl"], contents("answers.jsonl"))

    return of


@pytest.fixture(scope="module")
def undisturbed(commands, case, tmp_path_factory) -> Callable[[str], tuple[dict[str, object], float, int]]:
    """`undisturbed(name)`: what a command leaves by itself, seconds that it takes, and bytes that it leaves."""

    @cache
    def of(name: str) -> tuple[dict[str, object], float, int]:
        command, folder = case(name), tmp_path_factory.mktemp(name) / "work"
        command.before(folder)
        before, started = size_of(folder), time.monotonic()
        result = commands.run(*command.words(folder))
        assert result.code == 0, result.log
        return command.result(folder), time.monotonic() - started, size_of(folder) - before

    return of


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_killed_at_random_moments_a_command_ends_as_if_nothing_had_been(
    commands, case, undisturbed, tmp_path, name, record_property
):
    expected, seconds, _ = undisturbed(name)
    command, draw, folder = case(name), random.Random(name), tmp_path / "work"
    command.before(folder)
    killed = ended = 0
    for number in range(MOMENTS.get(name, OTHERS)):
        job = commands.start(*command.words(folder))
        time.sleep(draw.uniform(0, seconds))
        job.kill(workers_too=number % 2 == 0)
        result = job.wait()
        done = result.code == 0 or "never overwritten" in result.log  # this start, or one whose end was killed
        assert done or result.code == -9, result.log
        assert "Traceback" not in result.log, result.log
        killed += result.code == -9
        if done:
            ended += 1
            assert command.result(folder) == expected
            shutil.rmtree(folder)
            command.before(folder)
    result = commands.run(*command.words(folder))
    assert result.code == 0 or "never overwritten" in result.log, result.log
    assert command.result(folder) == expected
    left = [path.name for path in folder.iterdir() if path.name.startswith(".") or "unfinished" in path.name]
    assert not left
    record_property("killed", killed)
    print(f"{name}: killed {killed} times, {ended} ended before")


@pytest.mark.slow
@pytest.mark.skipif(not WHOLE, reason="a launch that is killed ten times: make test-faults")
def test_a_killed_loader_process_ends_the_training_in_a_sentence_and_it_goes_on(
    commands, undisturbed, tiny_llava, cctv_dataset, tmp_path
):
    expected, seconds, _ = undisturbed("train_llava")
    words = train_words("llava", tiny_llava, cctv_dataset, tmp_path / "llava", dataloader_num_workers=1)
    draw, sentences = random.Random(0), 0
    for _ in range(10):
        job = commands.start(*words)
        deadline, wait = time.monotonic() + 60, draw.uniform(0, seconds / 4)
        while (
            time.monotonic() < deadline and not (workers := loaders_of(job.process)) and psutil.pid_exists(job.process)
        ):
            time.sleep(0.01)
        time.sleep(wait)
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        result = job.wait()
        assert "Traceback" not in result.log, result.log
        if result.code:
            assert "a process that reads data" in result.log.splitlines()[-1]
            sentences += 1
    assert sentences
    result = commands.run(*words)
    assert result.code == 0, result.log
    weights = "llava/adapter_model.safetensors"
    assert (tmp_path / weights).read_bytes() == expected[weights]


def loaders_of(process: int) -> list[psutil.Process]:
    try:
        return psutil.Process(process).children()
    except psutil.NoSuchProcess:
        return []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), ON_DISKS)
def test_a_failing_disk_is_a_sentence_with_a_name_and_the_same_command_then_ends_well(
    commands, faulty_disk, case, undisturbed, tmp_path, name, kind
):
    if faulty_disk is None:
        pytest.skip("no C compiler, by which disks are made to fail")
    expected, _, size = undisturbed(name)
    command, draw = case(name), random.Random(f"{name} {kind}")
    refused = 0
    for number in range(TIMES[kind] if WHOLE else 1):
        folder = tmp_path / f"work{number}"
        command.before(folder)
        limit = {"inodes": draw.randrange(8), "readonly": 0}.get(kind, int(size * draw.uniform(0, 0.9)))
        result = commands.run(*command.words(folder), FAULTY_DISK=f"{kind} {limit} {folder}")
        assert "Traceback" not in result.log, (kind, limit, result.log)
        if result.code:
            refused += 1
            said = [
                line for line in result.log.replace("\r", "\n").splitlines() if re.search(WORDS[kind], line.lower())
            ]
            assert result.code == 1 and any(str(folder) in line for line in said), (kind, limit, result.log)
            result = commands.run(*command.words(folder))
        assert result.code == 0, (kind, limit, result.log)
        assert command.result(folder) == expected, (kind, limit)
    assert refused


@pytest.mark.slow
@pytest.mark.skipif(not WHOLE, reason="all pairs of commands at once: make test-faults")
@pytest.mark.parametrize("names", list(combinations_with_replacement(KILLED, 2)), ids="+".join)
def test_two_commands_at_once_leave_what_each_leaves_alone(commands, rivals, case, undisturbed, tmp_path, names):
    folder, both = tmp_path / "work", [case(name) for name in names]
    expected = [undisturbed(name)[0] for name in names]
    folder.mkdir()
    for command in dict.fromkeys(both):
        if command.before is not Path.mkdir:
            command.before(folder)
    jobs = [server.start(*command.words(folder)) for server, command in zip((commands, rivals), both, strict=True)]
    results = [job.wait() for job in jobs]
    for command, result in zip(both, results, strict=True):
        assert "Traceback" not in result.log and result.code in (0, 1), result.log
        if result.code:
            assert str(folder) in result.log.splitlines()[-1], result.log
            again = commands.run(*command.words(folder))
            assert again.code == 0 or "never overwritten" in again.log, again.log
    assert 0 in [result.code for result in results]
    for command, wanted in zip(both, expected, strict=True):
        assert command.result(folder) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESSED)
def test_ctrl_c_at_random_moments_is_a_sentence_and_nothing_is_lost(commands, case, undisturbed, tmp_path, name):
    expected, seconds, _ = undisturbed(name)
    command, draw, folder = case(name), random.Random(f"Ctrl-C {name}"), tmp_path / "work"
    command.before(folder)
    stopped = ended = 0
    for _ in range(PRESSES.get(name, OTHER_PRESSES)):
        job = commands.start(*command.words(folder))
        time.sleep(draw.uniform(0.2, max(seconds, 0.3)))  # before that, Python itself begins
        job.press_ctrl_c()
        result = job.wait()
        assert result.code in (0, 75, 130) and "Traceback" not in result.log, result.log
        stopped += result.code != 0
        if result.code == 0:
            ended += 1
            assert command.result(folder) == expected
            shutil.rmtree(folder)
            command.before(folder)
    result = commands.run(*command.words(folder))
    assert result.code == 0, result.log
    assert command.result(folder) == expected
    if name.startswith("train"):
        attempts = read_progress(folder / "llava")["attempts"]
        assert all(
            after["from_step"] == before["step"]
            for before, after in pairwise(attempts)
            if before.get("reason") == "Ctrl-C"
        )
    print(f"{name}: Ctrl-C stopped it {stopped} times, {ended} had ended")
