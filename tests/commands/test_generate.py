"""Asking: batches equal single questions, a file half done is continued, mistakes are named before weights are loaded."""

import io
import json
import unicodedata

import pytest
import torch
from generate import find_images, main, parse_options, read_questions
from PIL import Image

from finetuning.data.collator import prompt_batch
from finetuning.inference.generation import answer_batch
from finetuning.models.loading import load_for_inference

QUESTIONS = ["How many people are in view?", "사람이 몇 명 있나요? 모두 세어 주세요."]


@pytest.fixture(scope="module")
def pictures(raw_cctv, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in (1, 20, 40):
        with Image.open(raw_cctv / "frames" / f"seq_{number:06d}.jpg") as image:
            image.save(folder / f"{number:02d}.png")
    return folder


def ask(*flags) -> None:
    main(parse_options([str(flag) for flag in flags]))


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_batched_answers_equal_single_ones(tiny_llava, pictures):
    """Left padding: rows of different lengths, with two, one and no picture, answer as they do alone (LLaVA-NeXT#365)."""
    model, processor = load_for_inference(str(tiny_llava))
    images = [Image.open(path) for path in sorted(pictures.iterdir())]
    rows = [
        {"messages": [{"role": "user", "content": QUESTIONS[0] * times}], "images": images[:count]}
        for times, count in ((1, 1), (6, 2), (3, 0), (2, 1))
    ]
    together = answer_batch(model, processor, rows, max_new_tokens=12)
    alone = [answer_batch(model, processor, [row], max_new_tokens=12)[0] for row in rows]
    assert together == alone
    assert len(set(alone)) > 1
    with torch.no_grad():
        batch = model(**prompt_batch(processor, rows)).logits[:, -1]
        single = torch.cat([model(**prompt_batch(processor, [row])).logits[:, -1] for row in rows])
    torch.testing.assert_close(batch, single, rtol=1e-4, atol=1e-5)


def test_a_file_half_done_is_continued_and_not_redone(tiny_llava, pictures, tmp_path, capsys):
    (tmp_path / "questions.txt").write_text("\n\n".join(QUESTIONS) + "\n", encoding="utf-8-sig")
    output = tmp_path / "answers.jsonl"
    flags = ["--model", tiny_llava, "--image", pictures, "--max_new_tokens", "8", "--batch_size", "4"]
    flags += ["--question", tmp_path / "questions.txt", "--output", output]
    ask(*flags)
    complete = read_lines(output)
    expected = [(str(path), question) for path in sorted(pictures.iterdir()) for question in QUESTIONS]
    assert [(line["image"], line["question"]) for line in complete] == expected

    # Killed while the fourth line was being written. What is there stays as it is, even if the model would differ now.
    lines = output.read_text(encoding="utf-8").splitlines(keepends=True)
    first = json.dumps(complete[0] | {"answer": "kept"}, ensure_ascii=False) + "\n"
    output.write_text(first + "".join(lines[1:3]) + lines[3][:25], encoding="utf-8")
    ask(*flags)
    assert "3 of 6 are answered, continuing" in capsys.readouterr().out
    assert read_lines(output) == [complete[0] | {"answer": "kept"}, *complete[1:]]
    with pytest.raises(ValueError, match="max_new_tokens: 8 -> 9"):
        ask(*flags, "--max_new_tokens", "9")
    (tmp_path / "answers.settings.json").unlink()
    with pytest.raises(ValueError, match=r"without the answers\.settings\.json"):
        ask(*flags)


def test_one_answer_streams_and_a_conversation_remembers(tiny_llava, pictures, capsys, monkeypatch):
    flags = ["--model", tiny_llava, "--image", pictures / "01.png", "--max_new_tokens", "6", "--question", QUESTIONS[0]]
    model, processor = load_for_inference(str(tiny_llava))
    row = {"messages": [{"role": "user", "content": QUESTIONS[0]}], "images": [Image.open(pictures / "01.png")]}
    first = answer_batch(model, processor, [row], max_new_tokens=6)[0]
    row["messages"] += [{"role": "assistant", "content": first}, {"role": "user", "content": QUESTIONS[1]}]
    second = answer_batch(model, processor, [row], max_new_tokens=6)[0]

    ask(*flags)
    assert capsys.readouterr().out.split() == first.split()
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTIONS[1] + "\n\n"))
    ask(*flags, "--chat")
    said = " ".join(capsys.readouterr().out.split())
    assert " ".join(first.split()) in said and " ".join(second.split()) in said


def test_a_text_model_answers_and_refuses_pictures(tiny_gemma, tmp_path, pictures):
    output = tmp_path / "answers.jsonl"
    ask("--model", tiny_gemma, "--max_new_tokens", "4", "--question", *QUESTIONS, "--output", output)
    assert [(line["image"], line["question"]) for line in read_lines(output)] == [(None, each) for each in QUESTIONS]
    questions = [f"{number}?" for number in range(7)]
    with pytest.raises(ValueError, match=r"reads text only; 21 answers need a file"):
        ask("--model", tiny_gemma, "--question", *questions, "--image", pictures)


def test_several_answers_come_to_the_screen_and_a_missing_picture_is_told(tiny_llava, tmp_path, pictures, capsys):
    flags = ["--model", tiny_llava, "--max_new_tokens", "4", "--question", *QUESTIONS]
    ask(*flags, "--output", tmp_path / "answers.jsonl")
    capsys.readouterr()
    ask(*flags)
    said = capsys.readouterr()
    expected = [
        line for each in read_lines(tmp_path / "answers.jsonl") for line in (each["question"], f"  {each['answer']}")
    ]
    assert said.out.splitlines() == expected
    assert "Asked without a picture" in said.err
    ask(*flags, "--image", pictures / "01.png")
    said = capsys.readouterr()
    assert said.out.splitlines()[::3] == [str(pictures / "01.png")] * 2 and "without a picture" not in said.err


def test_all_mistakes_in_pictures_and_questions_are_named_together(tmp_path, pictures):
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.txt").write_text(f"{pictures / '01.png'}\n{tmp_path / 'missing.png'}\n", encoding="utf-8")
    problems = []
    words = [tmp_path / "broken.jpg", tmp_path / "empty", tmp_path / "list.txt", pictures]
    assert str(pictures / "01.png") in find_images([str(word) for word in words], problems)
    assert len(problems) == 3
    assert "broken.jpg: its bytes are no picture that can be read" in "; ".join(problems)
    assert "empty: no pictures in this folder" in "; ".join(problems)
    assert "missing.png: no such file" in "; ".join(problems)
    assert read_questions(["a?", "a?", str(tmp_path / "nothing.txt")], problems) == ["a?"]
    assert "nothing.txt: no such file" in problems[-1]


def test_files_of_questions_and_paths_in_the_code_pages_of_korea(tmp_path, pictures):
    question = "화면에 몇 명이 있습니까?"
    for encoding in ("utf-8", "utf-8-sig", "cp949"):
        (tmp_path / "questions.txt").write_bytes(f"{question}\r\n\r\n".encode(encoding))
        problems = []
        assert read_questions([str(tmp_path / "questions.txt")], problems) == [question]
        assert problems == []
    assert read_questions([unicodedata.normalize("NFD", question), question], []) == [question]
    (tmp_path / "questions.txt").write_bytes(b"\xff\xff\xff")
    problems = []
    assert read_questions([str(tmp_path / "questions.txt")], problems) == []
    assert find_images([str(tmp_path / "questions.txt")], problems) == []
    assert [problem.partition(":")[2] for problem in problems] == [" neither UTF-8 nor CP949; save it as UTF-8"] * 2
