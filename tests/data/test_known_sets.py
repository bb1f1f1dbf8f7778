"""Data sets that users of LLaVA have, as they are downloaded: what is asked, answered and shown by their first row."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dpn_cli.data.loading import load_data
from dpn_cli.data.options import DataOptions
from dpn_cli.errors import DataError

ASKED, LETTER = "what ?", "what ?\nA. red\nB. green\nAnswer with the option's letter from the given choices directly."
STOCK = "Describe the image."
PICTURES = ["a.png", "17.jpg", "val2017/000000000042.jpg", "images/train/3/image.png"]
COCO = {"info": {}, "licenses": [], "images": [{"id": 17, "file_name": "17.jpg"}, {"id": 4, "file_name": "4.jpg"}]}
OTHER = {"category_id": 1, "bbox": [1, 2, 3, 4], "area": 3.5, "iscrowd": 0, "segmentation": [[1, 2]]}
PROGRAM = [{"operation": "select: thing", "dependencies": [], "argument": "a red thing (42)"}]
PARTS = [{"type": "text", "text": ASKED}, {"type": "image_url", "image_url": {"url": "a.png"}}]

SETS: dict[str, tuple[Any, str, str | None, str]] = {
    "LLaVA, its pretraining": (
        [{"id": "0", "image": "a.png", "caption": "red thing", "blip_caption": "a red", "url": "https://x/y.jpg"}],
        STOCK, "red thing", "a.png",
    ),
    "LLaVA, the same without captions of the web": (
        [{"id": "0", "image": "a.png", "blip_caption": "a red thing", "url": "https://x/y.jpg"}],
        STOCK, "a red thing", "a.png",
    ),
    "ShareGPT4V": (
        [{"id": "0", "image": "a.png", "conversations": [
            {"from": "human", "value": f"{ASKED}\n<image>"}, {"from": "gpt", "value": "red"}]}],
        ASKED, "red", "a.png",
    ),
    "GQA": (
        {"0": {"semantic": PROGRAM, "semanticStr": "select: a red thing (42)", "entailed": [], "equivalent": ["0"],
               "question": ASKED, "imageId": "17", "groups": {"global": None, "local": "x"}, "answer": "red",
               "annotations": {"answer": {"0": "42"}, "question": {}, "fullAnswer": {}},
               "types": {"detailed": "x"}, "fullAnswer": "It is red.", "isBalanced": True}},
        ASKED, "red", "17.jpg",
    ),
    "TextVQA": (
        {"dataset_type": "val", "data": [
            {"question": ASKED, "image_id": "17", "image_classes": ["Red thing"], "question_tokens": ["what"],
             "flickr_original_url": "https://x/y.jpg", "image_width": 9, "answers": ["red"] * 10, "set_name": "val"}]},
        ASKED, "red", "17.jpg",
    ),
    "TextCaps": (
        {"data": [{"caption_str": "a red thing", "caption_tokens": ["a", "red"], "reference_strs": ["a red", "red one"],
                   "reference_tokens": [["a", "red"]], "image_id": "17", "image_classes": ["Red"]}]},
        STOCK, "a red thing", "17.jpg",
    ),
    "DocVQA": (
        {"dataset_name": "SP-DocVQA", "data": [
            {"questionId": 1, "question": ASKED, "question_types": ["handwritten text"], "image": "a.png", "docId": 1,
             "ucsf_document_id": "x", "answers": ["red"], "data_split": "val"}]},
        ASKED, "red", "a.png",
    ),
    "InfographicVQA": (
        {"data": [{"questionId": 1, "question": ASKED, "image_local_name": "17.jpg", "image_url": "https://x/y.jpg",
                   "ocr_output_file": "17.json", "answers": ["red"], "data_split": "val"}]},
        ASKED, "red", "17.jpg",
    ),
    "ChartQA": ([{"imgname": "a.png", "query": ASKED, "label": "red"}], ASKED, "red", "a.png"),
    "VizWiz": (
        [{"image": "17.jpg", "question": ASKED, "answer_type": "other", "answerable": 1,
          "answers": [{"answer": "red", "answer_confidence": "yes"}] * 2}],
        ASKED, "red", "17.jpg",
    ),
    "A-OKVQA": (
        [{"split": "val", "image_id": 42, "question_id": "x", "question": ASKED, "choices": ["red", "green"],
          "correct_choice_idx": 0, "direct_answers": ["red"], "rationales": ["It is red."]}],
        LETTER, "A", "000000000042.jpg",
    ),
    "AI2D": ([{"image": "a.png", "question": ASKED, "options": ["red", "green"], "answer": "1"}], LETTER, "B", "a.png"),
    "POPE": ([{"question_id": 1, "image": "a.png", "text": ASKED, "label": "no"}], ASKED, "no", "a.png"),
    "MM-Vet": (
        {"v1_0": {"imagename": "a.png", "question": ASKED, "answer": "red", "imagesource": "https://x/y.png",
                  "capability": ["ocr", "math"]}},
        ASKED, "red", "a.png",
    ),
    "ScienceQA": (
        {"3": {"question": ASKED, "choices": ["red", "green"], "answer": 1, "hint": "", "image": "image.png",
               "task": "closed choice", "lecture": "On colours.", "solution": "See.", "split": "train"}},
        LETTER, "B", "image.png",
    ),
    "RefCOCO, captions of regions": (
        [{"image": "a.png", "question": ASKED, "answer": ["the red", "red one"], "bbox": [1, 2, 3, 4], "iscrowd": 0}],
        ASKED, "the red", "a.png",
    ),
    "COCO": ({**COCO, "annotations": [{"image_id": 17, "id": 5, "caption": "red"}]}, STOCK, "red", "17.jpg"),
    "captions by file": ({"a.png": ["a red thing", "red"], "17.jpg": ["green"]}, STOCK, "a red thing", "a.png"),
    "TRL, preferences": (
        [{"images": ["a.png"], "prompt": [{"role": "user", "content": [{"type": "image"}, PARTS[0]]}],
          "chosen": [{"role": "assistant", "content": "red"}], "rejected": [{"role": "assistant", "content": "cat"}]}],
        ASKED, "red", "a.png",
    ),
    "RLHF-V": (
        [{"image": "a.png", "question": ASKED, "chosen": "red", "rejected": "a dog", "origin_dataset": "x"}],
        ASKED, "red", "a.png",
    ),
    "Qwen-VL": (
        [{"id": "0", "conversations": [
            {"from": "user", "value": f"<img>a.png</img>\n{ASKED}"}, {"from": "assistant", "value": "red"}]}],
        ASKED, "red", "a.png",
    ),
    "MMMU": (
        [{"id": "x", "question": f"<image 1> {ASKED}", "options": "['red', 'green']", "answer": "A", "image_1": "a.png",
          "image_2": None, "img_type": "['Plots']", "subfield": "Art", "explanation": "It is so."}],
        LETTER, "A", "a.png",
    ),
    "OpenAI, a batch": (
        [{"custom_id": "r", "method": "POST", "url": "/v1/chat/completions", "body": {
            "model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": PARTS}]}}],
        ASKED, None, "a.png",
    ),
}  # fmt: skip


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in PICTURES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name, format="PNG")
    return tmp_path


def load(folder: Path, content: Any, **options: Any) -> Any:
    (folder / "data.json").write_text(json.dumps(content))
    return load_data(DataOptions(str(folder / "data.json"), **options))


@pytest.mark.parametrize("name", SETS)
def test_a_data_set_is_read_as_it_is_downloaded(name: str, pictures: Path) -> None:
    content, question, answer, image = SETS[name]
    first = load(pictures, content).samples[0]
    [turn] = first.turns
    assert (turn.question, turn.answer) == (question, answer)
    assert [path.name for path in first.images] == [image]


@pytest.mark.parametrize(
    ("asked", "read"),
    [
        (f"<image 2> and <image 1>: {ASKED}", f"image 2 and image 1: {ASKED}"),
        (f"<image 1><image 2> What of <image 1> ?\n{ASKED}", f"What of image 1 ?\n{ASKED}"),
        (f"{ASKED} <image 1>", ASKED),
        ("Is <image 2> red ? <image 1> <image 2>", "Is image 2 red ?"),
        (ASKED, ASKED),
    ],
)
def test_numbered_images_are_named(pictures: Path, asked: str, read: str) -> None:
    row = {"image_2": "17.jpg", "image_1": "a.png", "answer": "red", "question": asked}
    [sample] = load(pictures, [row]).samples
    assert [path.name for path in sample.images] == ["a.png", "17.jpg"]
    assert (sample.turns[0].question, sample.turns[0].images) == (read, 2)


def test_choices_may_be_numbered_images(pictures: Path) -> None:
    row = {"image_1": "a.png", "image_2": "17.jpg", "question": "Which one ?", "options": "['<image 1>', '<image 2>']"}
    [sample] = load(pictures, [{**row, "answer": "B"}]).samples
    assert sample.turns[0].question.startswith("Which one ?\nA. image 1\nB. image 2\n")
    assert sample.turns[0].answer == "B"


def test_a_number_without_an_image_is_refused(pictures: Path) -> None:
    with pytest.raises(DataError, match="the text names image 3 of 2"):
        load(pictures, [{"image_1": "a.png", "image_2": "17.jpg", "answer": "red", "question": "Is <image 3> red ?"}])


def test_a_request_that_is_no_row_stays_what_it_is(pictures: Path) -> None:
    asked = {"image": "a.png", "question": ASKED, "answer": "red", "params": {"note": "x"}}
    assert load(pictures, [asked]).samples[0].turns[0].answer == "red"
    request = {"body": {"messages": []}, "params": {"messages": []}}
    with pytest.raises(DataError, match="not read"):
        load(pictures, [{**request, "note": "which one ?"}])


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([{"image_id": 9, "id": 1, "caption": "red"}], "no annotation has the id of one of its images as image_id"),
        ([{"image_id": 17, "id": 1, **OTHER}], "annotations without text .*bbox.*expected captions, or questions"),
        (
            [{"image_id": 17, "caption": "red"}, {"image_id": 9, "caption": "x"}],
            "row 2: an annotation without an",
        ),
        ([{"image_id": 17, "caption": "red"}, {"image_id": 4, "caption": "x"}], r"row 2: missing image file .*/4\.jpg"),
        ([{"image_id": 17, "caption": "red"}, "x"], "row 2: not an object"),
    ],
)
def test_annotations_that_cannot_be_used_are_named(pictures: Path, annotations: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(pictures, {**COCO, "annotations": annotations})


def test_an_id_of_two_images_is_refused(pictures: Path) -> None:
    twice = {**COCO, "images": [*COCO["images"], {"id": 17, "file_name": "a.png"}]}
    with pytest.raises(DataError, match=r"gives the id 17 to two images, 17\.jpg and a\.png"):
        load(pictures, {**twice, "annotations": [{"image_id": 17, "caption": "red"}]})


def test_pictures_lie_beside_the_folder_of_annotations(pictures: Path) -> None:
    (pictures / "annotations").mkdir()
    images = [{"id": 42, "file_name": "000000000042.jpg"}]
    content = {"images": images, "annotations": [{"image_id": 42, "caption": "red"}]}
    (pictures / "annotations" / "captions_val2017.json").write_text(json.dumps(content))
    for data in (pictures / "annotations", pictures / "annotations" / "captions_val2017.json"):
        [sample] = load_data(DataOptions(str(data))).samples
        assert sample.images == (pictures / "val2017" / "000000000042.jpg",)


def test_a_file_of_annotations_is_parsed_once(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"annotations": [{"image_id": 17, "caption": "red"}], **COCO}  # so that it begins as a file of rows does
    (pictures / "captions.json").write_text(json.dumps(first))
    parsed, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda text: parsed.append(text) or loads(text))
    for data in (pictures / "captions.json", pictures):
        assert load_data(DataOptions(str(data))).samples[0].images == (pictures / "17.jpg",)
        assert len(parsed) == 1
        parsed.clear()


ROW = {"question": ASKED, "answer": "red"}


def test_rows_of_the_users_own_go_before_annotations_beside_them(pictures: Path) -> None:
    (pictures / "instances.json").write_text(json.dumps({**COCO, "annotations": [{"image_id": 17, **OTHER}]}))
    (pictures / "captions.json").write_text(json.dumps({**COCO, "annotations": [{"image_id": 17, "caption": "x"}]}))
    (pictures / "rows.jsonl").write_text(json.dumps({"image": "a.png", **ROW}))
    [sample] = load_data(DataOptions(str(pictures))).samples
    assert sample.images == (pictures / "a.png",)


def test_questions_without_their_picture_are_bad_rows(pictures: Path) -> None:
    (pictures / "images").mkdir(exist_ok=True)
    (pictures / "17.jpg").rename(pictures / "images" / "000000000017.jpg")
    questions = [{"image_id": 17, "question": ASKED, "question_id": 1}]
    assert load(pictures, {"questions": questions}).samples[0].images == (pictures / "images" / "000000000017.jpg",)
    with pytest.raises(DataError, match="row 2: no image path"):
        load(pictures, {"questions": [*questions, {"pic_id": 17, "question": ASKED, "question_id": 2}]})


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.png", "texts": [{"user": ASKED, "assistant": "red", "label": 3, "output": None, "prompt": ""}]},
        {"image": "a.png", **ROW, "params": {"prompt": "a cat on a mat", "steps": 3}},
    ],
    ids=["other names in a message", "settings that made the image"],
)
def test_what_stands_beside_a_question_does_not_take_its_place(pictures: Path, row: Any) -> None:
    ignored = ("params",) if "params" in row else ()
    [turn] = load(pictures, [row], ignored=ignored).samples[0].turns
    assert (turn.question, turn.answer) == (ASKED, "red")


def test_settings_of_an_image_are_no_request(pictures: Path) -> None:
    with pytest.raises(DataError, match="params"):
        load(pictures, [{"image": "a.png", "params": {"prompt": "a cat on a mat", "steps": 3}}])


def test_the_key_of_a_row_names_its_picture(pictures: Path) -> None:
    rows = {"a.png": {"image": None, **ROW}, "17.jpg": {"image_id": 7, **ROW}}
    assert [sample.images for sample in load(pictures, rows).samples] == [
        (pictures / "a.png",), (pictures / "17.jpg",),
    ]  # fmt: skip


def test_a_text_beside_a_question_is_no_conversation(pictures: Path) -> None:
    with pytest.raises(DataError, match=r"not read .`qa`"):
        load(pictures, [{"image": "a.png", **ROW, "qa": "open"}])


@pytest.mark.parametrize("number", ["17", "17.0"])
@pytest.mark.parametrize("column", ["image_id", "img_id"])
def test_a_cell_may_hold_the_number_of_a_picture(pictures: Path, column: str, number: str) -> None:
    (pictures / "data.csv").write_text(f"{column},question,answer\n{number},{ASKED},red\n")
    [sample] = load_data(DataOptions(str(pictures / "data.csv"))).samples
    assert sample.images == (pictures / "17.jpg",)


def test_a_cell_may_spell_out_a_list_of_images(pictures: Path) -> None:
    (pictures / "data.csv").write_text(f"images,question,answer\n\"['a.png', '17.jpg']\",{ASKED},red\n")
    [sample] = load_data(DataOptions(str(pictures / "data.csv"))).samples
    assert sample.images == (pictures / "a.png", pictures / "17.jpg")
