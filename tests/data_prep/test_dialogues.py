"""messages.txt as people write it: who speaks, what is filled in, and what is refused in the text form's own words."""

import json

import pytest

from preparing.dialogues import check_templates, fill_in, read_dialogues

VALUES = {"id": "1", "count": "7", "people": "7", "men": "3"}


@pytest.fixture
def read(tmp_path):
    """[(contents filled in, or the problem) of each dialogue]"""

    def run(text: str):
        (tmp_path / "messages.txt").write_text(text, encoding="utf-8")
        dialogues, _ = read_dialogues(tmp_path / "messages.txt")
        check_templates(dialogues, list(VALUES), {"count", "people"})
        return [
            dialogue.problem or [fill_in(message["content"], VALUES) for message in dialogue.messages]
            for dialogue in dialogues
        ]

    return run


@pytest.mark.parametrize(
    "text",
    [
        "USER: How many?\nASSISTANT: {count} people.",
        "user : How many?\nassistant：{count} people.",
        "Human: How many?\nAssistant: {count} people.",
        "Q: How many?\nA: {count} people.",
        "Question: How many?\nAnswer: {people} people.",
        "**USER:** How many?\n**ASSISTANT:** {count} people.",
        "**User**: How many?\n**Bot**: {count} people.",
        "**Q: How many?**\n**A: {count} people.**",
        "### Human: How many?\n### Assistant: {count} people.",
        "- Prompt: How many?\n- Response: {count} people.",
        "질문: How many?\n답변: {count} people.",
        "문: How many?\n답: {count} people.",
        "사용자: How many?\n어시스턴트: {count} people.",
        "---\nUSER: How many?\nASSISTANT: {count} people.\n---",
        "====\nUSER: How many?\nASSISTANT: {count} people.\n* * *\n",
        json.dumps([{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "{count} people."}]),
        json.dumps(
            {"conversations": [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "{count} people."}]}
        ),
    ],
)
def test_speakers_of_other_tools_are_understood(read, text):
    assert read(text) == [["How many?", "7 people."]]


def test_a_rule_ends_a_dialogue_like_a_blank_line(read):
    one = "USER: How many?\nASSISTANT: {count}.\n"
    assert read(f"{one}---\n{one.replace('many', 'much')}") == [["How many?", "7."], ["How much?", "7."]]


@pytest.mark.parametrize(
    ("template", "filled"),
    [
        ('{"count": {count}}', '{"count": 7}'),
        ('{"count": "{count}", "men": {men}}', '{"count": "7", "men": 3}'),
        (
            '```json\n{"people": [{"kind": "men", "n": {men}}]}\n```',
            '```json\n{"people": [{"kind": "men", "n": 3}]}\n```',
        ),
        ('{{"count": {count}}}', '{"count": 7}'),
        ("{{now}} {count}", "{now} 7"),
        ("{count} (men: {men})", "7 (men: 3)"),
    ],
)
def test_braces_of_json_are_text(read, template, filled):
    assert read(f"USER: How many?\nASSISTANT: {template}") == [["How many?", filled]]


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{count}} people.", "{{count}} would be taught as the words {count}: write {count} to fill it in"),
        ("{{ Count }} people.", "would be taught as the words"),
        ("<count> people.", "<count> is not filled in: write {count}"),
        ("< Number > people.", "is not filled in"),
        ("[count] people and {men} men.", "[count] is not filled in"),
        ("[인원수]명입니다.", "is not filled in"),
        ("$count people.", "$count is not filled in"),
        ("${count} people.", "would keep its $"),
        ("%{count} people.", "would keep its %"),
        ("%count% people.", "%count% is not filled in"),
        ("%d people.", "%d is not filled in"),
        ("%(count)s people.", "is not filled in"),
        ("___ people.", "___ is not filled in"),
        ("N people.", "N is not filled in"),
        ("X명", "X is not filled in"),
        ("XX people.", "XX is not filled in"),
        ("○○명입니다.", "is not filled in"),
        ("{} people.", "{} is no column in braces"),
        ("{Count} people.", "{Count} is no column in braces, expected one of id, count"),
        ("{ count } people.", "is no column in braces"),
        ('{"count": {cuont}}', "is no column in braces"),
        ("{count people.", "a brace that is meant is written twice"),
        ("{'count': {count}}", "a brace that is meant is written twice"),
        ("{{{count}}} people.", "would keep one pair of braces"),
        ("(count) people.", "states no number"),
        ("#count# people.", "states no number"),
        ("@count people.", "states no number"),
        ("｛count｝명", "states no number"),
        ("<%= count %>", "states no number"),
        ("### people.", "states no number"),
        ("?? people.", "states no number"),
        ("... people.", "states no number"),
        ("00 people.", "states no number"),
        ("COUNT", "states no number"),
        ('{{"count": N}}', "states no number"),
    ],
)
def test_what_would_be_taught_as_a_placeholder_is_refused(read, template, told):
    [(reason, detail)] = read(f"USER: How many?\nASSISTANT: {template}")
    assert reason == "bad_template"
    assert told in detail


@pytest.mark.parametrize(
    "form", ['{"count": N}', '{"count": <number>}', '{"count": int, "unit": "people"}', "{'n': ...}"]
)
def test_a_question_may_show_the_form_of_its_answer(read, form):
    asked = f"How many? Answer as {form}."
    assert read(f'USER: {asked}\nASSISTANT: {{"count": {{count}}}}') == [[asked, '{"count": 7}']]


@pytest.mark.parametrize("answer", ["0", "0.", "None.", "No one.", "10", "I cannot tell.", r"\boxed{{{count}}}"])
def test_answers_without_a_placeholder_stay(read, answer):
    [[_, stated]] = read(f"USER: How many?\nASSISTANT: {answer}")
    assert stated == answer.replace("{{{count}}}", "{7}")


@pytest.mark.parametrize(
    "text",
    [
        "[User] [3:15 PM] How many?\n[Bot] [3:16 PM] {count} people.",
        "3:15 PM - User: How many?\n3:16 PM - Bot: {count} people.",
        "<|user|> How many?\n<|assistant|> {count} people.",
        "How many?\n{count} people.",
        "Dialogue 1\nUSER: How many?\nASSISTANT: {count} people.",
        "USER: How many?\nHuman: How many?\nASSISTANT: {count} people.",
        "USER: How many?\nASSISTANT: {count} people.\nQ: Men?\nA: {men}.",
        "사용자: 몇 명?\n답변: {count}명.\n어시스턴트: {count}명.",
    ],
)
def test_lines_that_may_be_turns_are_refused_in_the_words_of_the_text_form(read, text):
    [(reason, detail)] = read(text)
    assert reason == "bad_turn"
    assert "USER: or ASSISTANT: (사용자:, 어시스턴트:)" in detail
    assert "content" not in detail


def test_keys_that_are_not_used_are_named(tmp_path):
    turns = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "{count}"}]
    content = [{"id": "a", "messages": turns, "split": "train"}, {"messages": turns[:1], "split": "test"}]
    (tmp_path / "m.json").write_text(json.dumps(content))
    assert read_dialogues(tmp_path / "m.json")[1] == ["key 'split' of 2 dialogues is not used"]
