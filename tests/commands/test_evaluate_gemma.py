"""Facts read out of answers, scored field by field; perplexity; and the evaluation of a run from end to end."""

import json
import math
from pathlib import Path

import datasets
import evaluate_gemma
import pytest
import torch
import train_gemma
from conftest import ROOT, SHARED, must_run

from finetuning.arguments import parse_arguments
from finetuning.data.dataset import load_wording
from finetuning.evaluation.perplexity import AnswerLoss, answer_losses, perplexity
from finetuning.models.loading import load_base_model
from finetuning.models.processing import load_processing_class
from finetuning.tasks.anime_facts import (
    FactReader,
    compile_clause,
    guess_most_common,
    score_facts,
    share_right,
    summarise,
)

REAL_TABLE = SHARED / "anime" / "anime-dataset-2023.csv"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The sample catalogue, prepared in English (`en`) and Korean (`ko`)."""
    folder = tmp_path_factory.mktemp("anime")
    must_run("data_prep/make_sample_anime.py", "--output", folder / "anime.csv", "--titles", "40")
    for language in ("en", "ko"):
        must_run(
            *("data_prep/prepare_anime.py", "--csv", folder / "anime.csv", "--output", folder / language),
            *("--language", language, "--validation_share", "0.3", "--test_share", "0.5"),
        )
    return folder


def open_reader(folder: Path) -> tuple[FactReader, datasets.DatasetDict]:
    dataset = datasets.load_from_disk(str(folder))
    return FactReader(load_wording(str(folder)), dataset["train"]), dataset


@pytest.mark.parametrize("language", ["en", "ko"])
def test_every_taught_answer_is_read_back_whole(data, language):
    reader, dataset = open_reader(data / language)
    for rows in dataset.values():
        for question in reader.questions(rows):
            assert reader.read(question["kind"], question["reference"]) == question["facts"]


@pytest.mark.skipif(not REAL_TABLE.is_file(), reason=f"the real table is not at {REAL_TABLE}")
@pytest.mark.parametrize("language", ["en", "ko"])
def test_every_answer_about_a_real_title_is_read_back_whole(tmp_path, language):
    # Among the names: "feel.", "m.o.e.", "Production I.G", "Studio 4°C".
    must_run(
        *("data_prep/prepare_anime.py", "--csv", REAL_TABLE, "--output", tmp_path / "data", "--language", language)
    )
    reader, dataset = open_reader(tmp_path / "data")
    questions = [question for rows in dataset.values() for question in reader.questions(rows)]
    assert len(questions) == 3771
    for question in questions:
        # In place of unknown genres, words of the synopsis may be read as such: what is unknown is not scored.
        said = reader.read(question["kind"], question["reference"])
        assert {field: said.get(field) for field in question["facts"]} == question["facts"]


def test_facts_in_own_words_count_too(data):
    reader, _ = open_reader(data / "en")
    text = "It is a 26-episode series by Studio Tanuki, a mystery with some comedy. I would give it 7.5/10."
    assert reader.read("made", text) == {"episodes": 26, "studios": frozenset({"studio tanuki"})}
    assert reader.read("about", text) == {"genres": frozenset({"mystery", "comedy"})}
    assert reader.read("received", text) == {"score": 7.5}
    assert reader.read("received", "10점 만점에 8.1점") == {"score": 8.1}
    assert reader.read("made", "I do not know that title.") == {}


def test_unknown_names_are_read_as_they_are_and_are_wrong(data):
    reader, _ = open_reader(data / "en")
    said = reader.read("made", "It was animated by Studio Tanuki and Studio Nowhere. It has 1,204 episodes.")
    assert said == {"studios": frozenset({"studio tanuki", "studio nowhere"}), "episodes": 1204}
    assert score_facts(said, {"studios": frozenset({"studio tanuki"}), "episodes": 1204}) == {
        "studios": 0.0,
        "episodes": 1.0,
    }


def test_korean_sentences_with_particles_are_turned_round():
    pattern = compile_clause("애니메이션 제작은 {studios:이|가} 맡았습니다.")
    for text, name in (
        ("애니메이션 제작은 Sunrise가 맡았습니다.", "Sunrise"),
        ("애니메이션 제작은 매드하우스, 본즈가 맡았습니다. 모두 26화입니다.", "매드하우스, 본즈"),
        ("애니메이션 제작은 黃金이(가) 맡았습니다.", "黃金"),
    ):
        assert pattern.search(text)["studios"] == name


def test_scores_of_facts():
    truth = {
        "genres": frozenset({"action", "drama"}),
        "producers": frozenset({"a", "b"}),
        "studios": frozenset({"s"}),
        "episodes": 26,
        "rating": "PG - Children",
        "score": 8.0,
    }
    said = {
        "genres": frozenset({"action", "comedy", "sports"}),
        "producers": frozenset({"b", "a"}),
        "studios": frozenset({"s", "t"}),
        "episodes": 26,
        "score": 8.3,
    }
    scores = score_facts(said, truth)
    assert scores == pytest.approx(
        {"genres": 0.4, "producers": 1.0, "studios": 0.0, "episodes": 1.0, "rating": 0.0, "score": 0.3}
    )
    assert share_right(scores) == pytest.approx(2.4 / 6)
    assert share_right(score_facts(said | {"score": 8.1}, {"score": 8.0})) == 1.0
    assert score_facts({}, {"score": 8.0}) == {"score": None}
    assert share_right({}) is None  # nothing is known of the title: nothing to score
    assert summarise([scores, {"score": None}, {}]) == pytest.approx(
        {
            "n": 2,
            "right": 0.2,
            "genres_f1": 0.4,
            "producers_exact": 1.0,
            "studios_exact": 0.0,
            "episodes_exact": 1.0,
            "rating_exact": 0.0,
            "score_error": 0.3,
            "score_stated": 0.5,
        }
    )


def test_the_guess_is_the_commonest_value_of_each_field_counted_once_per_title():
    unknown = {"genres": [], "producers": [], "studios": [], "episodes": None, "rating": None, "score": None}
    rows = [{"anime_id": number, "messages": ""} | unknown for number in (1, 1, 1, 2, 3)]
    for row, episodes, score in zip(rows, (12, 12, 12, 1, 1), (5.0, 5.0, 5.0, 7.0, 8.0), strict=True):
        row |= {"episodes": episodes, "score": score}
    assert guess_most_common(datasets.Dataset.from_list(rows)) == {"episodes": 1, "score": 7.0}


def test_the_loss_of_answers_does_not_depend_on_the_batch(tiny_gemma):
    model = load_base_model(str(tiny_gemma), dtype=torch.float32).eval()
    tokenizer = load_processing_class(str(tiny_gemma))
    conversations = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in (
            ("Who?", "Sunrise."),
            ("몇 화까지 있는지 알려 주세요.", "26화입니다."),
            ("Hm", "A much longer answer."),
        )
    ]
    expected = []
    for messages in conversations:
        encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids = torch.tensor([encoded["input_ids"]])
        with torch.no_grad():
            log_probabilities = model(input_ids=ids).logits[0].log_softmax(-1)
        marked = [index for index, mark in enumerate(encoded["assistant_masks"]) if mark]
        total = -sum(log_probabilities[index - 1, ids[0, index]].item() for index in marked)
        expected.append(AnswerLoss(total, len(marked)))
    for batch_size in (1, 3):
        losses = answer_losses(model, tokenizer, conversations, batch_size=batch_size)
        assert [loss.num_tokens for loss in losses] == [loss.num_tokens for loss in expected]
        assert [loss.total for loss in losses] == pytest.approx([loss.total for loss in expected], rel=1e-5)
    assert perplexity([AnswerLoss(math.log(4) * 3, 3), AnswerLoss(0.0, 1)]) == pytest.approx(4**0.75)


def test_a_run_is_evaluated_from_end_to_end(tiny_gemma, data, tmp_path, capsys):
    run = tmp_path / "run"
    recipe = ROOT / "scripts" / "configs" / "gemma_sample.yaml"
    flags = ["--model_name_or_path", tiny_gemma, "--dataset_name", data / "en", "--output_dir", run, "--max_steps", "8"]
    flags += ["--eval_strategy", "no", "--save_strategy", "no", "--logging_steps", "4"]
    train_gemma.main(*parse_arguments(recipe, [str(flag) for flag in flags]))
    ask = evaluate_gemma.parse_arguments(["--run", str(run), "--max_new_tokens", "8", "--limit", "12"])
    evaluate_gemma.main(ask)
    shown = capsys.readouterr().out
    folder = run / "evaluation" / "facts"
    assert {path.name for path in folder.iterdir()} == {
        *("answers.jsonl", "metrics.json", "table.md", "report.html", "manifest.json"),
        *("facts_taught.png", "facts_never_taught.png", "loss.png"),
    }
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    assert set(metrics["scores"]) == {"test", "validation"}
    for scores in metrics["scores"].values():
        assert set(scores) == {"base", "tuned", "guess"}
        assert scores["tuned"]["perplexity"] < scores["base"]["perplexity"]  # even eight steps teach the sentences
        assert scores["guess"]["right"] > 0
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text("utf-8").splitlines()]
    assert [line["split"] for line in lines] == ["test"] * 12 + ["validation"] * 12
    assert [difference["grouped_by"] for difference in metrics["verdict"]] == ["titles"] * 4
    assert "**Facts: taught titles**" in shown
    assert "**Facts: titles never taught**" in shown
    assert lines[0]["question"] in (run / "report.html").read_text("utf-8").replace("&#34;", '"')
    evaluate_gemma.main(ask)
    assert "finished already" in capsys.readouterr().out
