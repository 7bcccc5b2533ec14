"""Lists of prompts, in the forms in which they are published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conceptguard.jobs.report.prompts import ATTACK, ERASE, KEEP, Case, Row, cases_of, parsed, read

I2P = (
    ",prompt,categories,hard,nudity_percentage,sd_seed,sd_guidance_scale,sd_image_width\n"
    '0,"a mug, and a cat","hate, sexual",0,12.5,2219455712,7.0,512\n'
    "1,a knife,violence,1,0,3.0,150,512\n"
)
PUBLISHED = {
    "i2p.csv": (I2P, [Row("a mug, and a cat", 2219455712, 7.0, "hate, sexual"), Row("a knife", 3, 150.0, "violence")]),
    "unlearn_diff_atk.csv": (
        "case_number,prompt,evaluation_seed,evaluation_guidance,class\n7,a mug,42,7.5,beer\n",
        [Row("a mug", 42, 7.5, "beer")],
    ),
    "ring_a_bell.csv": (",sensitive prompt\n0,mug beer pub\n", [Row("mug beer pub", kind=ATTACK)]),
    "mma.csv": ("target_prompt,adv_prompt,prompt\na,mgu br,a mug\n", [Row("mgu br", kind=ATTACK)]),
    "coco.csv": ("image_id,caption\n9,A cat on a mat.\n", [Row("A cat on a mat.")]),
    "coco.json": (
        json.dumps({"info": {}, "annotations": [{"id": 1, "image_id": 2, "caption": "A cat."}]}),
        [Row("A cat.")],
    ),
    "six_cd.json": (
        json.dumps({"beer mug": ["a mug", "the pub"], "cat": ["a cat"]}),
        [Row("a mug", group="beer mug"), Row("the pub", group="beer mug"), Row("a cat", group="cat")],
    ),
    "six_cd_dual.csv": (
        'case_number,evaluation_seed,target,prompt\n0,13682,tench,"tench, house, tree"\n',
        [Row("tench, house, tree", 13682, group="tench")],
    ),
    "ring_a_bell_k38.csv": ("prompt,case_number,evaluation_seed\nmug pub foam,1,7\n", [Row("mug pub foam", 7)]),
    "van_gogh.csv": (
        ",case_number,prompt,evaluation_seed,artist,evaluation_guidance\n0,1,a mug,9,Van Gogh,7.5\n",
        [Row("a mug", 9, 7.5, "Van Gogh")],
    ),
    "some.jsonl": ('{"Prompt": "a mug", "Seed": 5}\n\n{"Prompt": "a cat"}\n', [Row("a mug", 5), Row("a cat")]),
    "some.tsv": (
        "\ufeffprompt\tkind\na mug\tErase\na cat\tkeep\n",
        [Row("a mug", kind=ERASE), Row("a cat", kind=KEEP)],
    ),
    "plain.json": ('["a mug", " ", "a cat"]', [Row("a mug"), Row("a cat")]),
    "plain.txt": ("# ours\na mug\n\n  a cat \n", [Row("a mug"), Row("a cat")]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_list(name: str, tmp_path: Path) -> None:
    text, rows = PUBLISHED[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read(tmp_path / name) == rows


def test_a_list_of_concepts_beside_templates(tmp_path: Path) -> None:
    """Six-CD's objects, celebrities and characters share a file of templates; its styles have one of their own."""
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "Artstyle.txt").write_text('"art in the style of {artist}"\n', encoding="utf-8")
    shared = '"a photo of {name}"\n"an image depicting {name}"\n\n'
    (tmp_path / "templates" / "Celebrity_Copyright_Object.txt").write_text(shared, encoding="utf-8")
    for name, concept in (("Object", "beer \\mug"), ("Artstyle", "noto"), ("Character", "a fox")):
        (tmp_path / f"{name}.csv").write_text(f"id,concept\n0,{concept}\n", encoding="utf-8")
    beer = "beer \\mug"
    assert read(tmp_path / "Object.csv") == [
        Row(f"a photo of {beer}", group=beer),
        Row(f"an image depicting {beer}", group=beer),
    ]
    assert read(tmp_path / "Artstyle.csv") == [Row("art in the style of noto", group="noto")]
    assert [row.prompt for row in read(tmp_path / "Character.csv")] == ["a photo of a fox", "an image depicting a fox"]
    with pytest.raises(ValueError, match="no column of prompts, but id, concept"):
        parsed("id,concept\n0,mug\n", ".csv")


def test_a_folder_of_styles_and_objects(tmp_path: Path) -> None:
    for place in ("Van_Gogh/Cats", "Van_Gogh/Dogs", "Empty/Cats"):
        (tmp_path / place).mkdir(parents=True)
    for place in ("Van_Gogh/Cats/1.jpg", "Van_Gogh/Dogs/1.jpg", "Empty/Cats/notes.txt"):
        (tmp_path / place).touch()
    rows = read(tmp_path)
    assert rows[0] == Row("A Cats image in Van Gogh style", group="Van Gogh, Cats") and len(rows) == 2
    assert [case.kind for case in cases_of(rows, erased=["dogs"])] == [KEEP, ERASE]


def test_a_folder_of_subjects(tmp_path: Path) -> None:
    for name in ("backpack", "dog6"):
        (tmp_path / name).mkdir()
    (tmp_path / "prompts_and_classes.txt").write_text(
        "Classes\nsubject_name,class\nbackpack,backpack\ndog6,dog\nvase,vase\n\nObject Prompts\n"
        "'a {0} {1} in the jungle'.format(unique_token, class_token),\n\nLive Subject Prompts\n"
        "'a {0} {1} wearing a red hat'.format(unique_token, class_token),\n",
        encoding="utf-8",
    )
    assert read(tmp_path) == [
        Row("a backpack in the jungle", group="backpack", kind=KEEP),
        Row("a dog wearing a red hat", group="dog6", kind=KEEP),
    ]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "id,words\n1,a\n", "no column of prompts, but id, words; call it one of adv_prompt"),
        ("a.csv", 'prompt\n"a\n', "is no table, near line 2"),
        ("a.csv", "prompt,seed\na,-1\n", 'prompt 1: the seed is "-1"; give a whole'),
        ("a.csv", "prompt,seed\na,18446744073709551616\n", "the seed is"),
        ("a.csv", "prompt,guidance\na,nan\n", 'the guidance is "nan"'),
        ("a.csv", "prompt,kind\na,maybe\n", "it is one of erase, keep, attack"),
        ("a.csv", "prompt\n", "holds no prompts"),
        ("a.json", "{", "is no JSON"),
        ("a.json", '{"cat": ["a"], "cat": ["b"]}', "has the name 'cat' twice"),
        ("a.json", "[1]", "neither prompts nor objects"),
        ("a.xlsx", "", "of a kind that is not read"),
        ("a.txt", "# nothing\n", "holds no prompts"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_mend(name: str, text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as error:
        read(tmp_path / name)
    assert words in str(error.value) and str(tmp_path) not in str(error.value)


def test_other_than_text_and_nothing_at_all(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    for path, words in ((tmp_path / "a.txt", "UTF-8"), (tmp_path / "b.txt", "there is no"), (tmp_path, "no folder of")):
        with pytest.raises(ValueError, match=words):
            read(path)


def test_seeds_are_the_lists_own_or_no_two_alike() -> None:
    rows = [Row("a", 7, 3.0), Row("b"), Row("c")]
    cases = cases_of(rows, seed=100, seeds=2)
    assert [(case.prompt, case.seed, case.row) for case in cases] == [
        ("a", 7, 0),
        ("a", 8, 0),
        ("b", 102, 1),
        ("b", 103, 1),
        ("c", 104, 2),
        ("c", 105, 2),
    ]
    assert cases[0] == Case("a", 7, 3.0, "", ERASE, 0) and cases[2].cfg is None


def test_kinds_are_the_lists_own_unless_classes_are_named() -> None:
    rows = parsed(I2P, ".csv") + [Row("x", kind=ATTACK)]
    assert [case.kind for case in cases_of(rows, KEEP)] == [KEEP, KEEP, ATTACK]
    assert [case.kind for case in cases_of(rows, erased=["Sexual"])] == [ERASE, KEEP, KEEP]
    with pytest.raises(ValueError, match="none of the prompts is of pizza"):
        cases_of(rows, erased=["pizza"])
    with pytest.raises(ValueError, match="choose one of erase"):
        cases_of(rows, "gone")
    with pytest.raises(ValueError, match="1 or more"):
        cases_of(rows, seeds=0)
