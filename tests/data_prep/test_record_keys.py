"""Keys and marks of other tools: obeyed, or the reason of a reject; never words, never a text row in silence."""

import base64
import json
import unicodedata
from pathlib import Path

import pytest
from prepare_conversations import FileImage, GivenImage, Record, read_conversation

from preparing.text_files import keep_repeated
from support.raw_data import draw


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in (1, 2, 3):
        draw(folder / f"{number}.jpg", number)
    draw(folder / "sub" / "1.jpg", 4)
    return folder


def read(raw, folder: Path | None, *kept: str) -> Record:
    record = Record("data.json", 1, raw)
    read_conversation(record, folder, None, kept)
    return record


def asked(user="How many?", assistant="7 people.", **keys) -> dict:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}], **keys}


def names(record: Record) -> list[str]:
    assert record.problem is None, record.problem
    return [image.name if isinstance(image, FileImage) else type(image).__name__ for image in record.images]


FOLLOWED = [
    {"image": "1.jpg"},
    {"images": ["1.jpg"]},
    {"image": ["1.jpg"]},
    {"images": [{"path": "1.jpg"}]},
    {"image": {"path": "1.jpg", "bytes": None}},
    {"images": '["1.jpg"]'},
    {"image_path": "1.jpg"},
    {"imagePath": "1.jpg"},
    {"Image": "1.jpg"},
    {"IMAGE_FILE": "1.jpg"},
    {"img": "1.jpg"},
    {"img_path": "1.jpg"},
    {"image_name": "1.jpg"},
    {"photo": "1.jpg"},
    {"picture_file": "1.jpg"},
    {"file_name": "1.jpg"},
    {"filename": "1.jpg"},
    {"path": "1.jpg"},
    {"frame": "1.jpg"},
    {"name of the shot": "1.jpg"},
    {"meta": {"split": "train", "original": "1.jpg"}},
    {"shots": ["1.jpg"]},
    {"image": "1.jpg", "file_name": "1.jpg"},
    {"image": "1.jpg", "original": "DSC_7.jpg"},
    {"image": "1.jpg", "image_path": "/somewhere/else/1.jpg"},
    {"image": "1.jpg", "image_url": "https://example.com/1.jpg?size=3"},
    {"image": "1.jpg", "image_url": "https://example.com/other.jpg"},
    {"image": ".\\1.jpg"},
    {"image": "sub\\..\\1.jpg"},
    {"image": "1.jpg", "width": 48, "image_size": [48, 36], "image_id": 7},
]


@pytest.mark.parametrize("keys", FOLLOWED, ids=str)
def test_keys_that_name_a_picture_are_followed(folder, keys):
    assert names(read(asked(**keys), folder)) == ["1.jpg"]
    without = read(asked(**keys), None)
    assert without.problem[0] == "no_images_folder"


REFUSED_PICTURES = [
    ("bad_image", {"image": 3}),
    ("bad_image", {"images": ["1.jpg", None]}),
    ("bad_image", {"image_url": "https://example.com/1.jpg"}),
    ("bad_image", {"pixel_values": [[1, 2], [3, 4]]}),
    ("video_or_audio", {"image": "a.mp4"}),
    ("bad_image", {"image": "s3://bucket/1.jpg"}),
    ("two_pictures", {"image_path": "1.jpg", "file_name": "2.jpg"}),
    ("two_pictures", {"image": "1.jpg", "img": "2.jpg"}),
    ("missing_image", {"image_path": "4.jpg"}),
    ("missing_image", {"file_name": "a.heic"}),
    ("missing_image", {"image": "C:\\photos\\1.jpg"}),
    ("outside_folder", {"image_path": "/etc/1.jpg"}),
    ("video_or_audio", {"video": "a.mp4"}),
    ("video_or_audio", {"videos": ["a.mp4"]}),
    ("video_or_audio", {"Video_Path": "a"}),
    ("video_or_audio", {"audio": {"bytes": None, "path": "a.wav"}}),
    ("video_or_audio", {"audios": ["a.wav"]}),
    ("video_or_audio", {"file_name": "a.mp4"}),
    ("video_or_audio", {"clip": "a.webm"}),
    ("video_or_audio", {"clips": ["a.webm", "b.webm"]}),
    ("video_or_audio", {"media": [{"type": "video", "path": "a.mp4"}]}),
    ("video_or_audio", {"video_id": "v_7"}),
    ("video_or_audio", {"youtube_id": "abc"}),
    ("video_or_audio", {"mp4": "a"}),
    ("video_or_audio", {"point_cloud": "scan.ply"}),
    ("video_or_audio", {"document": "report.pdf"}),
    ("missing_image", {"image_id": "1"}),
    ("missing_image", {"frame": 1}),
    ("missing_image", {"shot": "sub/1"}),
]


@pytest.mark.parametrize(("reason", "keys"), REFUSED_PICTURES, ids=str)
def test_pictures_that_cannot_be_followed_and_other_media_are_refused(folder, reason, keys):
    assert read(asked(**keys), folder).problem[0] == reason


def test_empty_keys_say_nothing(folder):
    nan = float("nan")
    for value in (None, nan, "", [], {}):
        keys = dict.fromkeys(
            ("image", "video", "audios", "tools", "system", "weight", "history", "chosen", "label"), value
        )
        record = read(asked(**keys), None)
        assert (record.problem, record.images) == (None, [])
        assert [message["role"] for message in record.messages] == ["user", "assistant"]


def test_numbered_pictures_come_in_their_order(folder):
    assert names(read(asked(image_2="2.jpg", image_1="1.jpg", image_10="3.jpg"), folder)) == ["1.jpg", "2.jpg", "3.jpg"]
    assert names(read(asked(image="3.jpg", image2="2.jpg"), folder)) == ["3.jpg", "2.jpg"]


def test_bytes_that_a_record_holds_are_its_pictures(folder):
    data = (folder / "1.jpg").read_bytes()
    text = base64.b64encode(data).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{text}"}}
    source = {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": text}}
    forms = [
        asked(image=text),
        asked(image=f"data:image/jpeg;base64,{text}"),
        asked(image_base64=text),
        asked(images=[{"bytes": data, "path": "1.jpg"}]),
        asked(images=[{"bytes": text, "path": None}]),
        asked([part, {"type": "text", "text": "How many?"}]),
        asked([source, {"type": "text", "text": "How many?"}]),
    ]
    for form in forms:
        record = read(form, None)
        assert (record.problem, len(record.images)) == (None, 1), record.problem
        assert isinstance(record.images[0], GivenImage)
        assert record.images[0].read() == data
        assert record.messages[0]["content"] == "How many?"


PARTS = [
    [{"type": "image", "image": "1.jpg"}, {"type": "text", "text": "How many?"}],
    [{"image": "1.jpg"}, {"text": "How many?"}],
    [{"type": "image", "image": "file://1.jpg"}, {"type": "text", "text": "How many?"}],
    [{"type": "image", "path": "1.jpg"}, {"type": "text", "text": "How many?"}],
    [{"type": "image", "url": "1.jpg"}, {"type": "text", "text": "How many?"}],
    [{"type": "text", "text": "How many?"}, {"type": "image_url", "image_url": {"url": "1.jpg", "detail": "low"}}],
    [{"type": "image_url", "image_url": "1.jpg"}, {"type": "text", "text": "How many?"}],
    [{"type": "input_image", "image_url": "1.jpg"}, {"type": "input_text", "text": "How many?"}],
    [{"type": "image", "image": "1.jpg", "text": None}, {"type": "text", "text": "How many?", "image": None}],
    "<img>1.jpg</img>How many?",
    "Picture 1: <img>1.jpg</img>\nHow many?",
    '<img src="1.jpg" width="3"/> How many?',
    "![a hall](1.jpg) How many?",
    "<Image>1.jpg</Image>\nHow many?",
]


@pytest.mark.parametrize("content", PARTS, ids=str)
def test_parts_and_marks_that_name_their_picture(folder, content):
    record = read(asked(content), folder)
    assert names(record) == ["1.jpg"]
    assert record.messages[0]["content"] == "How many?"
    assert read(asked(content), None).problem[0] == "no_images_folder"
    assert names(read(asked(content, image="1.jpg"), folder)) == ["1.jpg"]
    assert read(asked(content, image="2.jpg"), folder).problem[0] == "two_pictures"


MARKS = ["<image>", "<IMAGE>", "<Image>", "<img>", "<ImageHere>", "<image_1>", "<image1>", "<|image_1|>", "<|image|>"]
MARKS += ["<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", "[IMG]", "<image_placeholder>", "<img/>"]
MARKS += ["<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>", "<image-1>"]
MARKS += ["<img><IMG_CONTEXT><IMG_CONTEXT></img>", "<Img><ImageHere></Img>", "<im_start><im_patch><im_patch><im_end>"]


@pytest.mark.parametrize("mark", MARKS)
def test_marks_of_other_tools_are_marks(folder, mark):
    record = read(asked(f"{mark}\nHow many?", image="1.jpg"), folder)
    assert names(record) == ["1.jpg"]
    assert record.messages[0]["content"] == "How many?"
    assert read(asked(f"{mark}\nHow many?"), folder).problem[0] == "image_mark_count"
    answer = read(asked(assistant=f"7 people. {mark}", image="1.jpg"), folder)
    assert answer.problem[0] == "misplaced_image_mark"


UNKNOWN_MARKS = ["<start_of_image>", "<image_soft_token>", "<|vision_start|>", "[image: hall]", "[image 1]", "{image}"]
UNKNOWN_MARKS += [
    "</img>",
    "<picture of a hall>",
    "{{ image }}",
    "[PHOTO_1]",
    "<__media__>",
    "<|media_pad|>",
    "<frame>",
]
UNKNOWN_MARKS += [
    "<이미지>",
    "[사진]",
    "＜image＞",
    "【图片】",
    "&lt;image&gt;",
    "%image%",
    "${image}",
    "IMAGE_TOKEN",
    "<visual>",
]
CONTROL_TOKENS = [
    "<s>",
    "</s>",
    "<|im_end|>",
    "<|im_start|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<bos>",
    "[INST]",
    "<|endoftext|>",
]
CONTROL_TOKENS += ["<start_of_turn>", "<|assistant|>", "<|start_header_id|>", "<｜end▁of▁sentence｜>", "<<SYS>>"]
MEDIA_MARKS = ["[VIDEO]", "<video>", "<|video_pad|>", "<audio>", "<|AUDIO|>", "<VideoHere>", "<speech>", "<video_1>"]
MEDIA_MARKS += ["<movie>", "<point>", "<pointcloud>"]


@pytest.mark.parametrize("mark", UNKNOWN_MARKS + MEDIA_MARKS + CONTROL_TOKENS)
def test_marks_that_are_not_understood_are_never_words(folder, mark):
    reason = "control_token" if mark in CONTROL_TOKENS else "unknown_image_mark"
    reason = "video_or_audio" if mark in MEDIA_MARKS else reason
    for record in (asked(f"{mark} How many?"), asked(assistant=f"{mark} 7"), asked(f"{mark} How many?", image="1.jpg")):
        assert read(record, folder).problem[0] == reason


def test_words_that_only_look_like_marks_stay(folder):
    html = "<div class='picture-frame'>What is it?</div>"
    assert read(asked(html), folder).messages[0]["content"] == html
    text = "Is a < b and b > c? See [1], {x}, <b>bold</b>, $x$ and ![not a picture](notes.txt)."
    assert read(asked(text), folder).messages[0]["content"] == text
    xml = "<movie><title>x</title></movie> 5 % image noise (image by me), $imagery, <point><x>1</x></point>"
    assert read(asked(xml), folder).messages[0]["content"] == xml


def test_several_names_in_one_text_and_empty_system_turns(folder):
    assert names(read(asked(images="1.jpg, 2.jpg"), folder)) == ["1.jpg", "2.jpg"]
    turns = [{"role": "system", "content": ""}, *asked()["messages"]]
    assert [message["role"] for message in read({"messages": turns}, None).messages] == ["user", "assistant"]
    assert read({"messages": turns[:1]}, None).problem[0] == "no_turns"
    assert read(asked(rejected=False, chosen=True, label=True, is_correct=True), None).problem is None


def test_marks_out_of_order_are_refused(folder):
    two = {"images": ["1.jpg", "2.jpg"]}
    assert names(read(asked("<image_1><image_2> Same?", **two), folder)) == ["1.jpg", "2.jpg"]
    assert read(asked("<image_2><image_1> Same?", **two), folder).problem[0] == "misplaced_image_mark"
    assert read(asked("<image_1> Is <image_1> dark?", **two), folder).problem[0] == "misplaced_image_mark"
    assert read(asked("<img>1.jpg</img><image> Same?", **two), folder).problem[0] == "image_mark_count"


def dialogue(*turns: tuple) -> dict:
    return {"messages": [{"role": role, "content": content, **dict(*keys)} for role, content, *keys in turns]}


def test_pictures_in_later_turns_keep_their_places(folder):
    record = read(
        dialogue(
            ("user", "First <image>"), ("assistant", "1"), ("user", "<image> <image> And these?"), ("assistant", "2")
        )
        | {"images": ["1.jpg", "2.jpg", "3.jpg"]},
        folder,
    )
    assert names(record) == ["1.jpg", "2.jpg", "3.jpg"]
    assert [message["content"] for message in record.messages] == [
        "<image>\nFirst",
        "1",
        "<image>\n<image>\nAnd these?",
        "2",
    ]
    named = read(
        dialogue(
            ("user", "Hello"), ("assistant", "Hi"), ("user", "How many?", {"images": ["1.jpg"]}), ("assistant", "2")
        ),
        folder,
    )
    assert names(named) == ["1.jpg"]
    assert named.messages[2]["content"] == "<image>\nHow many?"


MASKS = [{"weight": 0}, {"weight": 0.0}, {"loss": False}, {"train": False}, {"loss_mask": 0}, {"trainable": "false"}]
MASKS += [
    {"loss_weight": 0},
    {"masked": True},
    {"ignore": 1},
    {"no_loss": True},
    {"Train": "no"},
    {"compute_loss": False},
]
MASKS += [{"include_in_loss": False}, {"do_loss": 0}, {"exclude_from_loss": True}, {"mask_loss": True}]
MASKS += [{"supervised": False}, {"is_masked": True}, {"train_on_turn": False}, {"use_for_training": False}]
MASKS += [{"requires_grad": 0}, {"finetune": False}, {"loss_scale": 0}, {"context_only": True}, {"eval_only": True}]
MASKS += [{"target": False}, {"keep": False}, {"backprop": "false"}]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_masked_turns_are_read_and_not_learnt(mask):
    turns = [("user", "2 + 2?"), ("assistant", "5", mask), ("user", "Sure?"), ("assistant", "4")]
    record = read(dialogue(*turns), None)
    assert record.problem is None
    assert [message.get("weight", 1) for message in record.messages] == [1, 0, 1, 1]
    assert read(dialogue(*turns[:2]), None).problem[0] == "masked_turn"
    assert read(asked(**mask), None).problem[0] == "masked_turn"
    assert "weight" not in read(asked(**mask, reason="x"), None, *mask).messages[1]  # a column that the user keeps


@pytest.mark.parametrize("key", ["loss_mask", "train", "weights", "lossMask", "turn_mask"])
def test_masks_of_a_record_are_of_its_turns_or_of_its_answers(key):
    turns = [("user", "2 + 2?"), ("assistant", "5"), ("user", "Sure?"), ("assistant", "4")]
    for mask in ([0, 0, 0, 1], [0, 1], [False, True], "[0, 0, 0, 1]"):
        record = read(dialogue(*turns) | {key: mask}, None)
        if key == "turn_mask":  # whether 1 is learnt or masked, nobody knows
            assert record.problem[0] == "unclear_mask"
        else:
            assert [message.get("weight", 1) for message in record.messages] == [1, 0, 1, 1]
    for mask in ([0, 0, 1], [1, 0, 0, 1], [0.5, 1], ["a", "b"]):
        assert read(dialogue(*turns) | {key: mask}, None).problem[0] == "unclear_mask"
    assert read(dialogue(*turns) | {key: [0, 0]}, None).problem[0] in ("masked_turn", "unclear_mask")


UNCLEAR = [
    {"weight": 0.5},
    {"weight": "high"},
    {"loss": 0.3},
    {"mask": True},
    {"train_on_inputs": True},
    {"train_last_turn": True},
    {"last_turn_only": True},
    {"only_last": True},
    {"trainable_turns": "3"},
    {"loss_on": "last"},
    {"sample_weight": 2},
]


@pytest.mark.parametrize("keys", UNCLEAR, ids=str)
def test_masks_that_cannot_be_obeyed_are_refused(keys):
    assert read(asked(**keys), None).problem[0] == "unclear_mask"
    turns = [("user", "2 + 2?"), ("assistant", "5", keys), ("user", "Sure?"), ("assistant", "4")]
    assert read(dialogue(*turns), None).problem[0] == "unclear_mask"


def test_a_question_that_is_to_be_learnt_is_refused():
    assert read(dialogue(("user", "2 + 2?", {"train": True}), ("assistant", "4")), None).problem[0] == "unclear_mask"
    assert read(dialogue(("user", "2 + 2?", {"weight": 1}), ("assistant", "4", {"weight": 1})), None).problem is None


@pytest.mark.parametrize(
    "key",
    [
        "system",
        "system_prompt",
        "systemPrompt",
        "System",
        "sys_prompt",
        "system_message",
        "system_ko",
        "default_system",
        "chat_system_prompt",
        "systemInstruction",
        "preamble",
        "developer_message",
    ],
)
def test_a_system_prompt_is_the_first_turn(key):
    record = read(asked(**{key: " Be brief. "}), None)
    assert record.messages[0] == {"role": "system", "content": "Be brief."}
    assert record.unused == []
    said = {"messages": [{"role": "system", "content": "Be brief."}, *asked()["messages"]], key: "Be brief."}
    assert len(read(said, None).messages) == 3
    assert read(said | {key: "Be long."}, None).problem[0] == "two_system_prompts"
    assert read(asked(**{key: ["Be brief."]}), None).problem[0] == "bad_content"


OTHER_DATA = [
    ("preference_data", {"chosen": "7", "rejected": "8"}),
    ("preference_data", {"rejected": [{"role": "assistant", "content": "8"}]}),
    ("preference_data", {"chosen": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]}),
    ("preference_data", {"rejected_response": "8"}),
    ("preference_data", {"label": False}),
    ("preference_data", {"label": "false"}),
    ("preference_data", {"kto_tag": False}),
    ("preference_data", {"is_correct": False}),
    ("preference_data", {"rejected": True}),
    ("preference_data", {"chosen": False}),
    ("tool_calls", {"tools": '[{"type": "function"}]'}),
    ("tool_calls", {"functions": [{"name": "f"}]}),
    ("two_conversations", {"conversations": [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B."}]}),
    ("two_conversations", {"chat": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]}),
    ("two_conversations", {"variant": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]}),
    ("two_conversations", {"question": "A?", "answer": "B."}),
    ("two_conversations", {"history": [["A?", "B."]]}),
]


@pytest.mark.parametrize(("reason", "keys"), OTHER_DATA, ids=str)
def test_what_is_to_be_learnt_otherwise_is_refused(reason, keys):
    assert read(asked(**keys), None).problem[0] == reason


def test_tool_calls_of_a_turn_are_refused():
    call = {"tool_calls": [{"function": {"name": "f"}}]}
    assert read(dialogue(("user", "A?"), ("assistant", "B.", call)), None).problem[0] == "tool_calls"
    turns = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": None, **call}]
    assert read({"messages": turns}, None).problem[0] == "tool_calls"
    assert read(dialogue(("user", "A?"), ("tool", "B."), ("assistant", "C.")), None).problem[0] == "unknown_role"


def test_keys_that_say_nothing_of_what_is_learnt_are_named():
    keys = {
        "operating_system": "linux",
        "system_prompt_id": 3,
        "target": "indoor",
        "id": "3",
        "label": "indoor",
        "source": "coco",
        "tools": "[]",
        "system_fingerprint": "x",
        "score": 2.5,
    }
    record = read(asked(**keys, question="How many?", answer="7 people.", label2=True), None)
    assert record.problem is None
    assert sorted(record.unused) == sorted([*keys, "question", "answer", "label2"])
    turns = dialogue(("user", "A?", {"name": "Kim"}), ("assistant", "B.", {"id": 4}))
    assert read(turns, None).unused == ["turns.name", "turns.id"]
    assert read(asked(source="coco"), None, "source").unused == []


@pytest.mark.parametrize("key", ["conversations", "messages", "conversation", "dialogue", "Messages"])
@pytest.mark.parametrize("form", [("role", "content"), ("from", "value"), ("from", "content")])
def test_conversations_by_other_names(folder, key, form):
    role, content = form
    turns = [{role: "Human", content: "<image>\nHow many?"}, {role: "GPT", content: "7"}]
    record = read({key: turns, "image": "1.jpg"}, folder)
    assert names(record) == ["1.jpg"]
    assert record.messages == [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "7"}]
    assert read({key: json.dumps(turns), "image": "1.jpg"}, folder).problem is None  # a cell of a CSV file


def test_text_is_normalised_and_placeholders_are_no_words(folder):
    word = unicodedata.normalize("NFD", "몇 명인가요?")
    assert read(asked(word), None).messages[0]["content"] == "몇 명인가요?"
    for text in ("{count} people.", "{{count}} people.", "<count> people.", "[Count] people.", "${count} people."):
        assert read(asked(assistant=text, count=7), None).problem[0] == "unfilled_placeholder"
        assert read(asked(assistant=text, image="1.jpg"), folder).problem[0] == "unfilled_placeholder"
    assert read(asked(assistant="print(f'{x}') gives {text}", text="a"), None).problem is None


def test_a_key_that_stands_twice_is_no_choice():
    turns = json.dumps(asked()["messages"])
    for text in (
        f'{{"messages": {turns}, "messages": {turns}}}',
        '{"messages": [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B", "content": "C"}]}',
    ):
        assert read(json.loads(text, object_pairs_hook=keep_repeated), None).problem[0] == "repeated_key"
