"""Lists of prompts as they are published: tables, JSON, folders of pictures, plain text. Columns are found by name.

I2P, Six-CD, UnlearnDiffAtk, Ring-A-Bell and MMA-Diffusion name what they hold each in their own way, which NAMES has;
some of Six-CD's lists are of concepts alone, beside a folder `templates` with prompts around a {name}. COCO's
annotations are JSON; UnlearnCanvas (style/object/) and DreamBench (a folder a subject, beside prompts_and_classes.txt)
are folders, whose names make the prompts.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...editing.edits.encode import lines_of
from ...editing.files.header import json_of

ERASE, KEEP, ATTACK = KINDS = "erase", "keep", "attack"
MAX_BYTES = 256 * 1024**2
MOST_SEED = 2**64 - 1
MOST_CFG = 1000  # I2P has prompts that people drew with 150

# What a column is called; of several that a table has, the first of these counts.
NAMES = {
    "prompt": ("adv_prompt", "adversarial_prompt", "sensitive_prompt", "prompt", "prompts", "caption", "text"),
    "seed": ("sd_seed", "evaluation_seed", "eval_seed", "seed"),
    "cfg": ("sd_guidance_scale", "evaluation_guidance", "guidance_scale", "guidance", "cfg"),
    "group": ("categories", "category", "class", "concept", "target", "object", "artist", "style", "label"),
    "kind": ("kind",),
}
ATTACKS = "adv_prompt", "adversarial_prompt", "sensitive_prompt"  # columns of prompts that somebody searched for
HOLE = re.compile(r"\{\w+\}")  # in a template, for the concept
PICTURES = ".jpg", ".jpeg", ".png", ".webp"
LIVE = "cat", "dog"  # DreamBench's subjects that are alive, for which it has other prompts


@dataclass(frozen=True)
class Case:
    """A picture to draw. group: the class that it shows, or the list's category; cfg: the list's own, if it has one.

    kind: "erase" if the prompt asks for what is to go, "attack" if it was searched for so that it gets past, "keep" if
    its picture is to stay.
    """

    prompt: str
    seed: int
    cfg: float | None = None
    group: str = ""
    kind: str = ERASE
    row: int = 0  # of its prompt in the list, from 0: several seeds share it


@dataclass(frozen=True)
class Row:
    """A prompt of a list, with what the list says of it."""

    prompt: str
    seed: int | None = None
    cfg: float | None = None
    group: str = ""
    kind: str = ""


def cases_of(
    rows: Sequence[Row], kind: str = ERASE, erased: Iterable[str] = (), seed: int = 0, seeds: int = 1
) -> list[Case]:
    """`seeds` pictures of each prompt, from its own seed on; prompts without one get seeds that no two share.

    kind: of prompts whose list does not say. erased: the groups that are to go, if given; all others are to stay.
    """
    if kind not in KINDS:
        raise ValueError(f'kind is "{kind}"; choose one of {", ".join(KINDS)}')
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; give 1 or more pictures for each prompt")
    gone = {name.strip().casefold() for name in erased} - {""}
    if gone and not gone & {group for row in rows for group in groups(row.group)}:
        raise ValueError(f"none of the prompts is of {', '.join(sorted(gone))}; name classes that the list has")
    out = []
    for i, row in enumerate(rows):
        first = seed + i * seeds if row.seed is None else row.seed
        own = (ERASE if groups(row.group) & gone else KEEP) if gone else row.kind or kind
        case = Case(row.prompt, 0, row.cfg, row.group, own, i)
        out += [replace(case, seed=(first + j) & MOST_SEED) for j in range(seeds)]
    return out


def groups(text: str) -> set[str]:
    """I2P gives a prompt several categories, apart by commas; each counts, and so does the whole."""
    return {part.strip().casefold() for part in (text, *text.split(","))} - {""}


def read(path: Path) -> list[Row]:
    """The prompts of a file or a folder. Raises ValueError that names the file, what is wrong and the mend."""
    if path.is_dir():
        rows = list(folder(path))
    elif not path.is_file():
        raise ValueError(f'there is no list of prompts "{path.name}"; name a CSV, JSON or text file, or a folder')
    else:
        rows = parsed(text_of(path), path.suffix.lower(), path.name, templates_of(path))
    if not rows:
        raise ValueError(f'"{path.name}" holds no prompts; give it at least one')
    return rows


def text_of(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f'"{path.name}" has more than {MAX_BYTES // 1024**2} MiB; split the list')
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f'"{path.name}" is no UTF-8 text (byte {error.start}); save it as UTF-8') from None


def templates_of(path: Path) -> list[str]:
    """Six-CD's: the lines of the file in `templates` that is called by the list, or of the one that no list beside is
    called by; without their quotes."""
    files = sorted((path.parent / "templates").glob("*.txt"))
    lists = {each.stem for each in path.parent.glob("*.csv")}
    own = [file for file in files if path.stem in file.stem.split("_")] or [f for f in files if f.stem not in lists]
    lines = [line.strip().strip('"') for line in text_of(own[0]).splitlines()] if len(own) == 1 else []
    return [line for line in lines if HOLE.search(line)]


def parsed(text: str, suffix: str = ".txt", name: str = "prompts", templates: Sequence[str] = ()) -> list[Row]:
    """What a file of that suffix says. templates: of prompts, for a list of concepts alone."""
    if suffix in (".csv", ".tsv"):
        return table(text, "\t" if suffix == ".tsv" else ",", name, templates)
    if suffix in (".json", ".jsonl"):
        return structured(text, suffix == ".jsonl", name)
    if suffix not in (".txt", ""):
        raise ValueError(f'"{name}" is of a kind that is not read ({suffix}); save it as .csv, .tsv, .json or .txt')
    return [Row(line) for line in lines_of(text) if not line.startswith("#")]


# --- tables and JSON -------------------------------------------------------------------------------------------------


def table(text: str, separator: str, name: str, templates: Sequence[str] = ()) -> list[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    found: list[dict[str, Any]] = []
    try:
        found.extend(reader)
    except csv.Error as error:
        raise ValueError(f'"{name}" is no table, near line {len(found) + 2}: {error}; mend its quotes') from None
    return from_records(found, list(reader.fieldnames or ()), name, templates)


def structured(text: str, lines: bool, name: str) -> list[Row]:
    """A list of objects or prompts, {"annotations": ..} or {"prompts": ..}, {class: prompts}, or an object a line."""
    try:
        value = [json_of(line) for line in text.splitlines() if line.strip()] if lines else json_of(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'"{name}" is no JSON ({error}); mend it, or save the prompts as plain text') from None
    if isinstance(value, dict):
        inner = next(
            (value[key] for key in ("annotations", "prompts", "data") if isinstance(value.get(key), list)), None
        )
        value = [each for group in value.items() for each in listed(*group)] if inner is None else inner
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return [Row(each.strip()) for each in value if each.strip()]
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ValueError(f'"{name}" holds neither prompts nor objects with a prompt; give a list of either')
    return from_records(value, list(dict.fromkeys(key for each in value for key in each)), name)


def listed(group: str, prompts: Any) -> Iterator[Any]:
    """{class: [prompts]}, as objects."""
    for each in prompts if isinstance(prompts, list) else [None]:
        yield {"prompt": each, "class": group} if isinstance(each, str) else each


def from_records(
    records: Sequence[Mapping[str, Any]], columns: Sequence[Any], name: str, templates: Sequence[str] = ()
) -> list[Row]:
    known = {plain(column): column for column in reversed(columns)}
    found = {what: next((known[each] for each in names if each in known), None) for what, names in NAMES.items()}
    if found["prompt"] is None and found["group"] is not None and templates:
        concepts = [str(record[found["group"]] or "").strip() for record in records]
        return [Row(line_with(concept, line), group=concept) for concept in concepts if concept for line in templates]
    if found["prompt"] is None:
        there = ", ".join(str(column)[:40] for column in columns[:12]) or "none"
        raise ValueError(f'"{name}" has no column of prompts, but {there}; call it one of {", ".join(NAMES["prompt"])}')
    attack = ATTACK if plain(found["prompt"]) in ATTACKS else ""
    rows = []
    for i, record in enumerate(records, 1):
        prompt, seed, cfg, group, kind = (
            "" if column is None or record.get(column) is None else str(record[column]).strip()
            for column in (found[what] for what in ("prompt", "seed", "cfg", "group", "kind"))
        )
        if prompt:
            where = f'"{name}", prompt {i}'
            rows.append(Row(prompt, whole(seed, where), number(cfg, where), group, sort(kind, where) or attack))
    return rows


def line_with(concept: str, template: str) -> str:
    return HOLE.sub(lambda _: concept, template)


def plain(column: Any) -> str:
    return re.sub(r"[\s-]+", "_", str(column).strip().lower())


def whole(text: str, where: str) -> int | None:
    """A seed; tables that went through a spreadsheet have 12.0 for 12."""
    if not text:
        return None
    if not re.fullmatch(r"\d+(\.0*)?", text) or int(text.split(".")[0]) > MOST_SEED:
        raise ValueError(f'{where}: the seed is "{text[:40]}"; give a whole number from 0 to 2^64 - 1')
    return int(text.split(".")[0])


def number(text: str, where: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= MOST_CFG:
        raise ValueError(f'{where}: the guidance is "{text[:40]}"; give a number from 0 to {MOST_CFG}')
    return value


def sort(text: str, where: str) -> str:
    if text and text.lower() not in KINDS:
        raise ValueError(f'{where}: the kind is "{text[:40]}"; it is one of {", ".join(KINDS)}')
    return text.lower()


# --- folders ---------------------------------------------------------------------------------------------------------


def folder(path: Path) -> Iterator[Row]:
    """UnlearnCanvas or DreamBench, by what is in the folder."""
    inner = sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
    listed = (path / "prompts_and_classes.txt", path.parent / "prompts_and_classes.txt")
    text = next((each for each in listed if each.is_file()), None)
    if text is not None:
        yield from dreambench(text_of(text), {each.name for each in inner}, text.name)
        return
    pairs = [(style, thing) for style in inner for thing in sorted(style.iterdir()) if thing.is_dir()]
    if not pairs:
        raise ValueError(
            f'"{path.name}" is no folder of prompts: it has neither style/object folders (UnlearnCanvas) nor '
            "prompts_and_classes.txt (DreamBench)"
        )
    for style, thing in pairs:
        if any(each.suffix.lower() in PICTURES for each in thing.iterdir()):
            words = style.name.replace("_", " ")
            yield Row(f"A {thing.name} image in {words} style", group=f"{words}, {thing.name}")


def dreambench(text: str, subjects: set[str], name: str) -> Iterator[Row]:
    """Its lines `subject,class` and its templates 'a {0} {1} in the jungle', without the token of the subject."""
    classes = dict(re.findall(r"^\s*([\w-]+)\s*,\s*([A-Za-z][\w -]*?)\s*$", text, re.MULTILINE))
    classes.pop("subject_name", None)
    parts = re.split(r"(?im)^.*\blive\b.*$", text)
    things, living = (re.findall(r"'([^'\n]*\{1\}[^'\n]*)'", part) for part in (parts[0], "".join(parts[1:])))
    chosen = {subject: kind for subject, kind in classes.items() if not subjects or subject in subjects}
    if not chosen or not things:
        raise ValueError(f"\"{name}\" has no lines subject,class, or no prompts such as 'a {{0}} {{1}} in the jungle'")
    for subject, kind in chosen.items():
        for template in living or things if kind in LIVE else things:
            prompt = " ".join(template.replace("{0}", "").replace("{1}", kind).split())
            yield Row(prompt, group=subject, kind=KEEP)
