"""The label audit finds one fault of each kind, by name and row, and passes clean data; for LLaVA and for Gemma."""

import io
import json

import numpy as np
import pytest
from check_data import RECIPE, parse_options
from check_data import main as check_data
from conftest import SHARED, run_command
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PillowImage
from trl.data_utils import prepare_multimodal_messages

from finetuning.command_line import read_command
from finetuning.data.collator import LlavaDataCollator, place_images, prompt_batch, tokenize, until_the_question
from finetuning.data.label_audit import REASONS, Auditor, check_first_rows
from finetuning.data.label_preview import picture_as_seen, token_pieces
from finetuning.models.processing import load_config, load_processing_class

# A template for both models that does three things wrong, to the rows that ask for them.
FAULTY_TEMPLATE = """
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] not in ['user', 'assistant'] -%}
        {{- raise_exception('no role ' ~ message['role']) -}}
    {%- endif -%}
    {%- set parts = message['content'] if message['content'] is not string else [] -%}
    {%- set text = message['content'] if message['content'] is string else parts[-1]['text'] -%}
    {%- set marks = '<image>\n' * (parts | selectattr('type', 'equalto', 'image') | list | length) -%}
    {%- if message['role'] == 'assistant' -%}
        {{- 'ASSISTANT:' -}}
        {%- generation -%}{{- ' ' + text + ('' if 'FOREVER' in text else END) -}}{%- endgeneration -%}
    {%- elif 'LEARNT' in text -%}
        {%- generation -%}{{- 'USER: ' + marks + text + ' ' -}}{%- endgeneration -%}
    {%- else -%}
        {{- 'USER: ' + marks + text + ' ' + ('Please. ' if 'POLITE' in text and add_generation_prompt else '') -}}
    {%- endif -%}
{%- endfor -%}
{{- 'ASSISTANT:' if add_generation_prompt else '' -}}
"""


def dialogue(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def picture(cut: bool = False, brightness: int = 0) -> dict[str, bytes | None]:
    buffer = io.BytesIO()
    shades = PillowImage.linear_gradient("L").resize((80, 60)).point(lambda value: min(255, value + brightness))
    shades.convert("RGB").save(buffer, "JPEG")
    return {"bytes": buffer.getvalue()[: 400 if cut else None], "path": None}


GOOD = dialogue("How many people are in view?", "7 people.")
# Reason code -> the row (messages, pictures) that has this fault and no other.
FAULTS = {
    "unreadable_image": (GOOD, [picture(), picture(cut=True)]),
    "refused_by_template": ([{"role": "tool", "content": "7"}, *GOOD], []),
    "image_tokens_differ": (dialogue("<image> How many?", "7 people."), [picture()]),
    "too_long": (dialogue("How many? " * 150, "7 people."), []),
    "bos_count": (dialogue("How many? <s>", "7 people."), []),
    "nothing_supervised": (GOOD[:1], [picture()]),
    "empty_answer": (dialogue("How many?", " "), []),
    "end_not_supervised": (dialogue("How many?", "7 people FOREVER"), []),
    "ends_early": (dialogue("How many?", "7</s> people."), []),
    "image_supervised": (dialogue("How many? LEARNT", "7 people."), [picture()]),
    "padding_supervised": (dialogue("How many?", "7 <pad> people."), []),
    "prompt_differs": (dialogue("How many? POLITE", "7 people."), [picture()]),
    "blank_image": (GOOD, [picture(brightness=255)]),
}
# Several pictures, text only, several turns, letters outside the vocabulary.
CLEAN = [
    (GOOD, [picture()] * 2),
    (GOOD, []),
    ([*GOOD, *dialogue("네 명인가요?", "아니요, 똠 7명입니다.")], [picture()]),
]


def test_one_fault_of_each_kind_is_found_once_and_by_row(tiny_llava, tmp_path):
    assert [*FAULTS, "labels_differ"] == list(REASONS)
    rows = [{"messages": messages, "images": images} for messages, images in [*FAULTS.values(), *CLEAN]]
    features = Features(
        {"messages": List({"role": Value("string"), "content": Value("string")}), "images": List(Image())}
    )
    DatasetDict(train=Dataset.from_list(rows, features=features)).save_to_disk(tmp_path / "data")
    before = sorted(path.name for path in (tmp_path / "data").rglob("*"))
    (tmp_path / "faulty.jinja").write_text(FAULTY_TEMPLATE.replace("END", "eos_token"), encoding="utf-8")

    result = run_command(
        *("scripts/check_data.py", "--dataset_name", tmp_path / "data", "--model_name_or_path", tiny_llava),
        *("--chat_template_path", tmp_path / "faulty.jinja", "--max_length", "250"),
        *("--output", tmp_path / "check", "--preview", "8"),
    )
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    found = json.loads((tmp_path / "check" / "check.json").read_text(encoding="utf-8"))
    assert [(fault["row"], fault["reason"]) for fault in found["faults"]] == list(enumerate(FAULTS))
    assert f"{tmp_path / 'data'}: 13 of 16 rows have faults" in result.stderr
    assert "train row 0: picture 2: it does not decode" in result.stderr
    for row, code in enumerate(FAULTS):
        assert f"{code} (1 rows)" in result.stderr
        assert f"train row {row}: " in result.stderr
    page = (tmp_path / "check" / "preview.html").read_text(encoding="utf-8")
    assert page.count("<article ") == 7  # four of the faulty rows, and the three good ones
    assert page.count("<img ") == 3
    # The data is only read.
    assert sorted(path.name for path in (tmp_path / "data").rglob("*")) == before


def save(rows: list[dict], folder) -> None:
    message = {"role": Value("string"), "content": Value("string")}
    features = {"messages": List(message), "images": List(Image())}
    features |= {"count": Value("int64")} if "count" in rows[0] else {}
    DatasetDict(train=Dataset.from_list(rows, features=Features(features))).save_to_disk(folder)


def check(folder, model, *flags: str) -> list:
    words = ["--dataset_name", str(folder), "--model_name_or_path", str(model), "--output", str(folder / "check")]
    options, recipe_flags = parse_options([*words, "--processes", "1", *flags])
    return check_data(read_command(RECIPE, recipe_flags)[1], options)


def test_rows_without_pictures_first_and_last(tiny_llava, tmp_path):
    rows = [{"messages": GOOD, "images": []}] * 20 + [{"messages": GOOD, "images": [picture()]}] * 2
    save([*rows, *rows[:20]], tmp_path / "mixed")
    audits = check(tmp_path / "mixed", tiny_llava)
    assert [(audit.num_images, audit.faults) for audit in audits] == [
        (len(r["images"]), []) for r in [*rows, *rows[:20]]
    ]
    assert not any(audit.faults for audit in check(tmp_path / "mixed", tiny_llava, "--sample", "3"))


def test_a_sample_is_spread_over_each_split(tiny_llava, tmp_path):
    save([{"messages": GOOD, "images": [picture()]}] * 9, tmp_path / "data")
    assert [audit.row for audit in check(tmp_path / "data", tiny_llava, "--sample", "3")] == [0, 4, 8]
    assert len(check(tmp_path / "data", tiny_llava, "--sample", "99")) == 9


def noise(seed: int, quality: int = 95, brightness: int = 0, person: bool = False) -> dict[str, bytes | None]:
    shades = np.random.default_rng(seed).integers(0, 200, (9, 12, 3), dtype=np.uint8) + np.uint8(brightness)
    shown = PillowImage.fromarray(shades).resize((160, 120))
    if person:
        shown.paste((0, 0, 0), (80, 60, 84, 70))
    buffer = io.BytesIO()
    shown.save(buffer, "JPEG", quality=quality)
    return {"bytes": buffer.getvalue(), "path": None}


def test_pictures_that_look_the_same_and_are_labelled_differently_are_found(tiny_llava, tmp_path):
    def row(image, count, answer=None):
        return {"messages": dialogue("How many?", answer or f"{count} people."), "images": [image], "count": count}

    rows = [row(noise(1), 3), row(noise(2), 4), row(noise(1, 60, 9), 5), row(noise(2, 60), 4), row(noise(3), None)]
    rows += [row(noise(4), 1), row(noise(4, person=True), 2), row(noise(5), 6, "6"), row(noise(5), 6, "Six people.")]
    save(rows, tmp_path / "counts")
    audits = check(tmp_path / "counts", tiny_llava)
    assert [audit.row for audit in audits if audit.faults] == [0, 2]
    assert audits[2].faults == [("labels_differ", "it says '5', train row 0 says '3' of a picture that looks the same")]
    # Without a column of counts short answers are compared, and long ones are not.
    answers = [
        (1, "Yes."),
        (1, "yes"),
        (2, "Yes."),
        (2, "No."),
        (3, "A hall with many people."),
        (3, "It is a dark room."),
    ]
    rows = [{"messages": dialogue("Dark?", answer), "images": [noise(seed)]} for seed, answer in answers]
    save(rows, tmp_path / "answers")
    assert [audit.row for audit in check(tmp_path / "answers", tiny_llava) if audit.faults] == [2, 3]


def test_nothing_to_see_is_a_fault_of_the_data_and_stops_no_training(tiny_llava):
    processor, config = load_processing_class(str(tiny_llava)), load_config(str(tiny_llava))
    black = picture() | {"bytes": encoded(PillowImage.new("RGB", (64, 48)))}
    nearly = PillowImage.new("RGB", (100, 100), "white")
    nearly.paste((0, 0, 0), (0, 0, 9, 9))
    rows = [
        {"messages": GOOD, "images": [image]} for image in (black, {"bytes": encoded(nearly), "path": None}, picture())
    ]
    audits = Auditor(processor, config)(rows)
    assert [[code for code, _ in audit.faults] for audit in audits] == [["blank_image"], ["blank_image"], []]
    assert audits[0].faults[0][1] == "each pixel is (0, 0, 0)"
    assert audits[1].faults[0][1] == "99.2% of its values are 255: it is white"
    check_first_rows(Dataset.from_list(rows), processor, config)


def encoded(image: PillowImage.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_rows_of_which_only_the_text_is_tokenised_are_what_the_collator_makes(tiny_llava):
    processor, config = load_processing_class(str(tiny_llava)), load_config(str(tiny_llava))
    later = [*dialogue("<image>\nHow many?", "7"), *dialogue("<image>\n<image>\nAnd here?", "8 명")]
    rows = [{"messages": messages, "images": images} for messages, images in CLEAN]
    rows += [{"messages": later, "images": [picture()] * 3}, {"messages": [*GOOD, *GOOD], "images": []}]
    alone = [Auditor(processor, config)([row])[0] for row in rows]
    together = Auditor(processor, config)
    together([{"messages": GOOD, "images": [picture()]}])
    assert len(together.tokens_of_kind) == 1
    for mine, light, row in zip(alone, together(rows), rows, strict=True):
        assert (mine.num_tokens, mine.num_supervised, mine.faults) == (light.num_tokens, light.num_supervised, [])
        batch = LlavaDataCollator(processor)([row])
        typed = prepare_multimodal_messages(place_images(row["messages"]), images=row["images"])
        ids, labels = tokenize(processor, typed, [together.tokens_of_kind[80, 60, False]])
        assert ids.tolist() == batch["input_ids"][0].tolist()
        assert labels.tolist() == batch["labels"][0].tolist()
        asked = {"messages": row["messages"][:1], "images": row["images"]}
        prompt = prompt_batch(processor, [asked])["input_ids"][0].tolist()
        cut = until_the_question(asked)
        typed = prepare_multimodal_messages(place_images(cut["messages"]), images=cut["images"])
        assert tokenize(processor, typed, [together.tokens_of_kind[80, 60, False]], prompt=True)[0].tolist() == prompt


def test_clean_data_passes(tiny_llava, cctv_dataset, tmp_path):
    flags = ["--dataset_name", str(cctv_dataset), "--model_name_or_path", str(tiny_llava)]
    options, recipe_flags = parse_options([*flags, "--output", str(tmp_path), "--processes", "2"])
    audits = check_data(read_command(RECIPE, recipe_flags)[1], options)
    assert len(audits) > 40 and not any(audit.faults for audit in audits)
    found = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    assert found["rows"] == len(audits) and found["faults"] == []


def test_faults_of_gemma_rows(tiny_gemma, tmp_path):
    template = tmp_path / "faulty.jinja"
    template.write_text(FAULTY_TEMPLATE.replace("END", "'<end_of_turn>'"), encoding="utf-8")
    tokenizer, config = (
        load_processing_class(str(tiny_gemma), chat_template_path=str(template)),
        load_config(str(tiny_gemma)),
    )
    for_gemma = {"<s>": "<bos>", "</s>": "<end_of_turn>"}
    rows, expected = [], []
    for code, (messages, _) in FAULTS.items():
        if "image" not in code:
            texts = [message["content"] for message in messages]
            for llama, own in for_gemma.items():
                texts = [text.replace(llama, own) for text in texts]
            messages = [message | {"content": text} for message, text in zip(messages, texts, strict=True)]
            rows.append({"messages": messages})
            expected.append([code])
    rows.append({"messages": GOOD})
    audits = Auditor(tokenizer, config, max_length=250)(rows)
    assert [[code for code, _ in audit.faults] for audit in audits] == [*expected, []]

    # The project's own template: clean, and a system turn is refused with the template's words.
    tokenizer = load_processing_class(str(tiny_gemma))
    good, system = Auditor(tokenizer, config)(
        [{"messages": [*GOOD, *GOOD]}, {"messages": [{"role": "system", "content": "Be brief."}, *GOOD]}]
    )
    assert good.faults == []
    assert [code for code, _ in system.faults] == ["refused_by_template"]
    assert "Gemma has no system role" in system.faults[0][1]


def test_the_published_llava_template_never_teaches_to_stop(tiny_llava, tmp_path):
    """Without the end-of-sequence token inside the marks, as in the template on the Hub."""
    published = (
        "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
        "{% if message['role'] != 'assistant' %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
        "{% endfor %}{% else %}"
        "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
        "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    (tmp_path / "published.jinja").write_text(published, encoding="utf-8")
    processor = load_processing_class(str(tiny_llava), chat_template_path=str(tmp_path / "published.jinja"))
    rows = Dataset.from_list([{"messages": GOOD, "images": [picture()]}])
    with pytest.raises(ValueError, match=r"(?s)bos_count.*end_not_supervised"):
        check_first_rows(rows, processor, load_config(str(tiny_llava)))


def test_a_processor_of_another_model_is_found_by_the_models_own_patch_size(tiny_llava):
    processor, config = load_processing_class(str(tiny_llava)), load_config(str(tiny_llava))
    processor.patch_size = 16  # 16 tokens where the tower gives (64 / 8)² = 64 features
    (audit,) = Auditor(processor, config)([{"messages": GOOD, "images": [picture()]}])
    assert [code for code, _ in audit.faults] == ["image_tokens_differ"]
    assert "64 features" in audit.faults[0][1]


def test_the_preview_shows_the_tokens_and_the_picture_as_the_model_gets_them(tiny_llava):
    processor = load_processing_class(str(tiny_llava))
    tokenizer = processor.tokenizer
    ids = [tokenizer.bos_token_id, *[processor.image_token_id] * 3]
    ids += tokenizer.encode("똠 7", add_special_tokens=False)
    labels = [-100] * 4 + ids[4:]
    pieces = token_pieces(tokenizer, ids, labels)
    assert pieces[:2] == [("<s>", False, True), ("<image> × 3", False, True)]
    assert "".join(text for text, supervised, _ in pieces[2:] if supervised).strip() == "똠 7"
    flat = PillowImage.new("RGB", (64, 64), (200, 100, 50))
    pixels = processor.image_processor(flat, return_tensors="pt")["pixel_values"][0]
    assert picture_as_seen(pixels, processor).tobytes() == flat.tobytes()


@pytest.mark.parametrize("name", ["llava-1.5-7b-hf", "gemma-2b-it"])
def test_real_processors_pass(name):
    folder = SHARED / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip(f"the real {name} tokenizer is not on this machine (../shared/data)")
    processing_class, config = load_processing_class(str(folder)), load_config(str(folder))
    korean = dialogue("화면에 사람이 몇 명 보이나요?", "모두 12명이 보입니다.")
    images = [picture()] if name.startswith("llava") else []
    audits = Auditor(processing_class, config)([{"messages": [*GOOD, *korean], "images": images}] * 2)
    assert [audit.faults for audit in audits] == [[], []]
    assert (audits[0].num_tokens > 576) == name.startswith("llava")


def save_splits(folder, rows):
    features = Features(
        {
            "messages": List({"role": Value("string"), "content": Value("string")}),
            "images": List(Image()),
            **({"task": Value("string")} if "task" in rows[0] else {}),
            **({"count": Value("int64")} if "count" in rows[0] else {}),
        }
    )
    split = Dataset.from_list(rows, features=features)
    DatasetDict(train=split, validation=split).save_to_disk(folder)
    return folder


def check_scored(tiny_llava, folder, *flags):
    words = ["--dataset_name", folder, "--model_name_or_path", tiny_llava, *flags]
    options, recipe = parse_options(["--output", str(folder / "check"), "--processes", "1", *map(str, words)])
    return check_data(read_command(RECIPE, recipe)[1], options)


def test_it_says_which_rows_can_be_scored_before_anything_is_trained(tiny_llava, tmp_path, capsys):
    rows = [
        {"messages": dialogue("Is it day?", answer), "images": [picture()]} for answer in ["Yes."] * 9 + ["It is dusk."]
    ]
    check_scored(tiny_llava, save_splits(tmp_path / "yes", rows))
    shown = capsys.readouterr().out
    assert "Scoring: task yes_no, read off the data: 9 of 10 train answers begin with yes or no (90%)" in shown
    assert "validation: 9 of 10 rows can be scored" in shown
    assert "1 rows cannot be scored: its answer begins with neither yes nor no (row 9)" in shown
    found = json.loads((tmp_path / "yes" / "check" / "check.json").read_text(encoding="utf-8"))["scoring"]
    assert found["splits"]["train"]["scored"] == 9 and found["splits"]["train"]["refused"][0]["row"] == 9


def test_data_of_which_nothing_can_be_scored_is_an_error_unless_no_answers_are_wanted(tiny_llava, tmp_path):
    rows = [{"messages": dialogue("Many?", "Some."), "images": [picture()], "count": 7}] * 3
    folder = save_splits(tmp_path / "some", rows)
    with pytest.raises(
        ValueError, match=r"not one row of split validation can be scored .*no answer states the row's count, 7"
    ):
        check_scored(tiny_llava, folder)
    check_scored(tiny_llava, folder, "--eval_answers", "0")
    check_scored(tiny_llava, folder, "--task", "short_answer")
    with pytest.raises(ValueError, match="task 'shout' does not exist; the tasks are count, yes_no"):
        check_scored(tiny_llava, folder, "--task", "shout")


def test_a_breakdown_is_scored_by_its_total(tiny_llava, tmp_path, capsys):
    answers = [
        f"There are {men + women} people: {men} men and {women} women." for men, women in ((3, 4), (5, 1), (0, 2))
    ]
    rows = [
        {"messages": dialogue("How many?", answer), "images": [picture()], "count": count}
        for answer, count in zip(answers, (7, 6, 2), strict=True)
    ]
    check_scored(tiny_llava, save_splits(tmp_path / "breakdown", rows))
    assert "validation: 3 of 3 rows can be scored" in capsys.readouterr().out


def test_tasks_can_be_mixed_by_a_column(tiny_llava, tmp_path, capsys):
    rows = [
        {"messages": dialogue("Is it day?", "Yes."), "images": [picture()], "task": "yes_no"},
        {"messages": dialogue("Where?", "Seoul"), "images": [picture()], "task": "short_answer"},
        {"messages": dialogue("Say something.", "Anything."), "images": [picture()], "task": None},
    ]
    check_scored(tiny_llava, save_splits(tmp_path / "mixed", rows))
    shown = capsys.readouterr().out
    assert "tasks by the column task: yes_no (1 of 3 rows), short_answer (1 of 3 rows)" in shown
    assert "1 rows cannot be scored: its column task is empty (row 2)" in shown
