"""Evaluating real runs of a tiny LLaVA: one that learned nothing, and one that learned to say the one right count."""

import json
import os
import shutil
from functools import partial
from pathlib import Path

import compare
import evaluate_llava
import generate
import pytest
import torch
import yaml
from conftest import ROOT, run_command, run_here
from datasets import Dataset, DatasetDict, Image, List
from peft import LoraConfig, get_peft_model
from PIL import Image as PilImage
from transformers import LlavaForConditionalGeneration

from finetuning.data.dataset import open_dataset, open_split
from finetuning.data.pictures import open_picture
from finetuning.inference.count_file import settings_of
from finetuning.models.processing import load_processing_class
from finetuning.run_folder import EvaluationFolder, open_run
from finetuning.tasks.exam import make_exam
from support.training import train


@pytest.fixture(scope="module")
def zero_run(tmp_path_factory, tiny_llava, cctv_dataset):
    """A finished run whose adapter is as it was before the first step: it changes nothing."""
    run = tmp_path_factory.mktemp("outputs") / "zero"
    model = LlavaForConditionalGeneration.from_pretrained(tiny_llava)
    get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.*q_proj")).save_pretrained(run)
    load_processing_class(str(tiny_llava)).save_pretrained(run)
    arguments = {"dataset_name": str(cctv_dataset), "model_name_or_path": str(tiny_llava)}
    (run / "arguments.yaml").write_text(yaml.safe_dump(arguments))
    (run / "metrics.json").write_text(json.dumps({"completed": True}))
    return run


def evaluation(run, split="test"):
    return json.loads((run / "evaluation" / split / "metrics.json").read_text(encoding="utf-8"))


def answer_lines(run, split="test"):
    lines = (run / "evaluation" / split / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def evaluate(run, *flags):
    evaluate_llava.main(evaluate_llava.parse_arguments(["--run", str(run), "--max_new_tokens", "4", *flags]))


def test_a_zero_adapter_is_no_measurable_change_and_a_second_call_only_shows_it(zero_run, capsys):
    evaluate(zero_run)
    assert "No measurable change: mean absolute error" in capsys.readouterr().out
    assert {path.name for path in (zero_run / "evaluation" / "test").iterdir()} == {
        "metrics.json", "answers.jsonl", "table.md", "report.html", "predicted_vs_true.png", "error_by_crowd_size.png",
        "counts.jsonl", "manifest.json",
    }  # fmt: skip
    page = (zero_run / "report.html").read_text(encoding="utf-8")
    assert "No measurable change" in page and page.count("data:image/jpeg") > 2
    metrics = evaluation(zero_run)
    assert [part["outcome"] for part in metrics["verdict"]] == ["no measurable change"] * 2
    assert metrics["scores"]["base"] == metrics["scores"]["tuned"]
    assert all(line["base"] == line["tuned"] for line in answer_lines(zero_run))

    before = (zero_run / "evaluation" / "test" / "metrics.json").stat().st_mtime_ns
    evaluate(zero_run)
    again = capsys.readouterr().out
    assert "finished already" in again and "No measurable change: mean absolute error" in again
    assert (zero_run / "evaluation" / "test" / "metrics.json").stat().st_mtime_ns == before

    refused = run_here("scripts/evaluate_llava.py", "--run", zero_run, "--max_new_tokens", "5")
    assert refused.returncode == 1
    assert "max_new_tokens: 4 -> 5" in refused.stderr and "--overwrite" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_every_question_gets_a_median_with_an_interval_calibrated_on_validation_rows(zero_run):
    evaluate(zero_run)
    lines = EvaluationFolder(zero_run, "test").read_counts()
    assert [line["truth"] for line in lines] == [line["truth"] for line in answer_lines(zero_run)]
    assert all(line["low"] <= line["count"] <= line["high"] and 0 < line["probability"] <= 1 for line in lines)
    scores = evaluation(zero_run)["distribution"]
    assert scores["mae"] == pytest.approx(sum(abs(line["count"] - line["truth"]) for line in lines) / len(lines))
    assert scores["coverage"] == sum(line["low"] <= line["truth"] <= line["high"] for line in lines) / len(lines)
    # A handful of validation rows promises nothing, and the table says so.
    assert "fewer than the 300" in (zero_run / "evaluation" / "test" / "table.md").read_text(encoding="utf-8")
    forms, largest, calibration = settings_of(zero_run)
    assert largest >= max(line["truth"] for line in lines) and calibration.rows > 0
    assert all(line["question"] in forms for line in lines)


def test_generate_counts_pictures_as_the_evaluation_did(zero_run, raw_cctv, tmp_path, capsys):
    evaluate(zero_run)
    known = EvaluationFolder(zero_run, "test").read_counts()[0]
    picture = next(raw_cctv.rglob(f"{Path(known['image_id']).stem}*"))
    flags = ["--model", str(zero_run), "--image", str(picture), "--output", str(tmp_path / "counts.jsonl"), "--counts"]
    generate.main(generate.parse_options([*flags, "--question", known["question"], "Busy?", "--list_wide", "1"]))
    counted, other = [json.loads(line) for line in (tmp_path / "counts.jsonl").read_text("utf-8").splitlines()]
    assert {key: counted[key] for key in ("count", "low", "high")} == {
        key: known[key] for key in ("count", "low", "high")
    }
    assert other["count"] is None and other["question"] == "Busy?"
    assert f"{picture.name}: {known['count']}, between" in capsys.readouterr().out
    with pytest.raises(ValueError, match="add --counts"):
        generate.main(generate.parse_options([*flags[:-1], "--question", "Busy?", "--list_wide", "1"]))


def test_two_processes_without_a_gpu_answer_as_one(zero_run, raw_cctv, tmp_path):
    """Each question is asked once, in order, and every figure is one process's: of evaluate_llava.py and generate.py."""
    launch = (
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "accelerate_configs/ddp.yaml",
        "--num_processes",
        "2",
    )
    asked = ("--image", raw_cctv / "frames", "--question", "How many?", "Crowded?", "--batch_size", "2")
    flags = ("--run", zero_run, "--split", "train", "--batch_size", "2", "--max_new_tokens", "4")
    result = run_command(
        *(*launch, "--main_process_port", "0", "tests/support/generate_and_evaluate.py", "--model", zero_run),
        *(*asked, "--max_new_tokens", "4", "--output", tmp_path / "two.jsonl", "--", *flags),
        env=os.environ | {"PYTHONPATH": str(ROOT / "scripts"), "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("120 answers: ") == 1
    generate.main(
        generate.parse_options(
            [*map(str, ("--model", zero_run, *asked, "--max_new_tokens", "4", "--output", tmp_path / "one.jsonl"))]
        )
    )
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    two, two_answers = evaluation(zero_run, "train"), answer_lines(zero_run, "train")
    assert len(two_answers) > 20
    evaluate(zero_run, *flags[2:6], "--overwrite")
    assert (evaluation(zero_run, "train"), answer_lines(zero_run, "train")) == (two, two_answers)
    kept = zero_run / "evaluation" / "train.previous-1" / "metrics.json"
    assert json.loads(kept.read_text(encoding="utf-8")) == two


def test_an_evaluation_that_was_stopped_goes_on_where_it_was(zero_run):
    """The answers on disk are taken as they are; only the missing ones are asked."""
    unfinished = EvaluationFolder(zero_run, "validation").unfinished_file
    with pytest.MonkeyPatch.context() as stop:
        stop.setattr(
            "finetuning.tasks.evaluate.answer_with_both", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            evaluate(zero_run, "--split", "validation")
    with unfinished.open("a", encoding="utf-8") as file:
        for answer in ("3 people.", "일곱 명입니다."):
            file.write(json.dumps({"tuned": answer}) + "\n")
    evaluate(zero_run, "--split", "validation")
    lines = answer_lines(zero_run, "validation")
    assert [line["tuned"] for line in lines[:2]] == ["3 people.", "일곱 명입니다."]
    assert [line["tuned_count"] for line in lines[:2]] == [3, 7]
    assert [line["tuned"] for line in lines[2:]] == [line["base"] for line in lines[2:]]
    assert not unfinished.exists()


def test_the_page_is_made_again_in_korean_without_asking_again(zero_run, capsys, monkeypatch):
    evaluate(zero_run)
    monkeypatch.setattr("finetuning.tasks.evaluate.answer_with_both", None)
    evaluate(zero_run, "--language", "ko")
    assert "잴 수 있는 변화가 없습니다: 평균 절대 오차" in capsys.readouterr().out
    page = (zero_run / "report.html").read_text(encoding="utf-8")
    assert '<html lang="ko">' in page and "사람 수 점수" in page and "Counting scores" not in page
    evaluate(zero_run, "--language", "en")
    assert "Counting scores" in (zero_run / "report.html").read_text(encoding="utf-8")


def test_rows_that_were_trained_on_and_other_datasets_leave_the_runs_page_alone(
    zero_run, cctv_dataset, tmp_path, capsys
):
    evaluate(zero_run)
    held_out = (zero_run / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    evaluate(zero_run, "--split", "train", "--limit", "4", "--overwrite")
    assert "THE RUN WAS TRAINED ON THESE VERY ROWS" in capsys.readouterr().out
    assert "THE RUN WAS TRAINED ON" in (zero_run / "evaluation" / "train" / "report.html").read_text(encoding="utf-8")

    shutil.copytree(cctv_dataset, tmp_path / "elsewhere")
    evaluate(zero_run, "--dataset", str(tmp_path / "elsewhere"), "--split", "train", "--limit", "4")
    assert "TRAINED ON" not in capsys.readouterr().out  # another dataset's train split was not trained on
    assert evaluation(zero_run, "elsewhere/train")["settings"]["dataset"] == str(tmp_path / "elsewhere")
    assert (zero_run / "report.html").read_text(encoding="utf-8") == held_out


def test_a_run_of_several_sets_says_what_became_of_each(zero_run, cctv_dataset, tmp_path, capsys):
    run, general = tmp_path / "mixed", tmp_path / "general"
    shutil.copytree(zero_run, run, ignore=shutil.ignore_patterns("evaluation"))
    shutil.copytree(cctv_dataset, general)
    arguments = yaml.safe_load((run / "arguments.yaml").read_text()) | {"dataset_mixer": {str(general): 0.2}}
    (run / "arguments.yaml").write_text(yaml.safe_dump(arguments))
    evaluate(run, "--limit", "4")
    assert f"not evaluated: --run {run} --dataset {general} --split test" in capsys.readouterr().out
    evaluate(run, "--dataset", str(general), "--limit", "4")
    assert "Also trained on" not in capsys.readouterr().out
    evaluate(run, "--limit", "4")  # asks nothing again
    shown = capsys.readouterr().out
    assert "This evaluation is finished already" in shown and f"| {general} | " in shown
    verdict = evaluation(run, "general/test")["verdict"][0]
    assert evaluation(run)["mixed_in"] == [{"dataset": str(general), "verdict": verdict}]
    assert "Also trained on" in (run / "report.html").read_text(encoding="utf-8")


def test_two_runs_are_compared_pair_by_pair_on_one_page(zero_run, tmp_path, capsys):
    evaluate(zero_run)
    other = tmp_path / "other"
    shutil.copytree(zero_run, other)
    answers = answer_lines(other)
    for line in answers:  # this one counts right
        line["tuned"] = line["reference"]
    (other / "evaluation" / "test" / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)), encoding="utf-8")
    capsys.readouterr()
    output = compare.main(compare.parse_arguments([str(zero_run), str(other), "--output", str(tmp_path / "both.html")]))
    shown, page = capsys.readouterr().out, output.read_text(encoding="utf-8")
    assert "mean absolute error (unparsable answers taken as 0) went from" in shown and " to 0.00 people" in shown
    assert "other against zero" in page and page.count("data:image/jpeg") > 2
    shutil.rmtree(other / "evaluation" / "test")
    with pytest.raises(ValueError, match=r"no finished evaluation in .*other/evaluation/test: evaluate both runs"):
        compare.main(compare.parse_arguments([str(zero_run), str(other)]))


@pytest.fixture(scope="module")
def sevens(tmp_path_factory):
    """Pictures that all show seven people, each with two questions, and one row that asks something else."""
    folder = tmp_path_factory.mktemp("data") / "sevens"
    pictures = [PilImage.new("RGB", (64, 64), (40 + 10 * number, 90, 160)) for number in range(12)]
    rows = [
        {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "images": [picture],
            "image_id": f"picture {number}",
            "count": 7,
        }
        for number, picture in enumerate(pictures)
        for question, answer in [("How many people are in view?", "7 people."), ("사람이 몇 명 있나요?", "7명입니다.")]
    ]
    other = rows[0] | {"messages": [{"role": "user", "content": "Busy?"}, {"role": "assistant", "content": "Yes."}]}
    split = Dataset.from_list([*rows, other]).cast_column("images", List(Image()))
    DatasetDict({"train": split, "validation": split, "test": split}).save_to_disk(folder)
    return folder


def test_a_planted_improvement_is_found(sevens, tiny_llava, tmp_path, capsys, request):
    """Every weight is trained, so the base is another model than the run's: it is loaded for its own answers."""
    flags = [
        *("--language_model", "full", "--projector", "full", "--vision_tower", "frozen", "--max_steps", "25"),
        *("--per_device_train_batch_size", "8"),
    ]
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(1)
    train(tiny_llava, sevens, tmp_path / "run", *flags)
    evaluate(tmp_path / "run", "--max_new_tokens", "8")
    shown = capsys.readouterr().out
    # Every picture shows seven people: who always says seven is right without looking.
    assert "Matched by a trivial answer: mean absolute error (unparsable answers taken as 0) went from " in shown
    metrics = evaluation(tmp_path / "run")
    assert metrics["not_counting_questions"] == 1
    assert metrics["scores"]["tuned"]["n"] == 24 and metrics["scores"]["tuned"]["exact"] == 1.0
    assert metrics["scores"]["base"]["exact"] == 0.0
    assert metrics["scores"]["train_median"]["mae"] == 0.0
    outcomes = [(part["outcome"], part["num_groups"]) for part in metrics["verdict"]]
    assert outcomes == [("matched by a trivial answer", 12)] * 2
    assert metrics["verdict"][0]["trivial"]["answer"] == "always 7 (train median)"
    assert (tmp_path / "run" / "evaluation" / "test" / "loss.png").is_file()


def test_questions_are_cut_before_the_answer_that_states_the_count(sevens):
    rows = open_split(open_dataset(str(sevens), vision=True), "test", "sevens")
    exam = make_exam(rows, rows)
    assert (len(exam.facts), exam.refused) == (24, [(24, "no answer states the row's count, 7")])
    first = exam.questions[0]
    assert first["messages"] == [{"role": "user", "content": "How many people are in view?"}]
    assert (exam.facts[0]["reference"], exam.facts[0]["question"]) == ("7 people.", "How many people are in view?")
    assert open_picture(first["images"][0]).size == (64, 64)
    wrong = rows.remove_columns("count").add_column("count", [8] * 25)
    nothing = make_exam(wrong, wrong)
    assert nothing.facts == [] and nothing.describe_refused().startswith(
        "25 rows cannot be scored: no answer states the row's count, 8 (row 0, 1, 2, ...)"
    )


def test_what_is_no_finished_run_is_named(tmp_path):
    with pytest.raises(ValueError, match="no run here"):
        open_run(str(tmp_path / "nothing"))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "arguments.yaml").write_text("dataset_name: x\n")
    with pytest.raises(ValueError, match="training has not ended here"):
        open_run(str(tmp_path / "begun"))
