"""The policy's document, in TOML or JSON, checked as strictly as presets are.

on = true
prompts = false                        # whether the record holds the prompts' texts

[[rules]]
families = ["SD1.x", "SDXL"]           # empty: all that can be edited
presets = ["no-weapons", "mine.json"]  # of those that came with the pack, or files beside the policy
"""

from __future__ import annotations

import json
import tomllib
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from ..files.header import Twins, json_of
from ..presets.document import explained
from ..presets.parts import AnyGate, ImageGate, Part
from ..presets.texts import Name

MAX_BYTES = 256 * 1024
Choice = Literal["refuse", "pass"]
Listener = Literal["log", "user"]


class Rule(Part):
    """Presets for some families of models, and a gate for all of their edits beside their own.

    strength: times that of each edit; above 0, for a rule that does nothing is a mistake.
    """

    families: Annotated[tuple[Name, ...], Field(max_length=64)] = ()
    presets: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=500)], ...], Field(min_length=1)]
    strength: Annotated[float, Field(gt=0, le=16)] = 1.0
    gate: AnyGate | None = None

    def covers(self, family: str) -> bool:
        return not self.families or family in self.families


class Keeping(Part):
    """How much of the record stays: the file that is written to, and `files` older ones, of so many MB each."""

    megabytes: Annotated[float, Field(ge=0.001, le=1024)] = 16.0
    files: Annotated[int, Field(ge=0, le=1000)] = 8


class Policy(Part):
    """others: what happens to models that no rule covers, or that cannot be edited.

    pictures: what happens to runs that begin with a picture (img2img, inpainting, ControlNet): "edit" keeps the edits
    on through all of their steps, whatever their windows are, and opens gates that look at the prompt.
    pictures_gate: if given, only pictures that it flags count for that, and those that cannot be shown to it.
    training: what happens to training nodes, which make no picture but weights.
    tell: whom it tells what the edits did: the host's log, the user on the sampler's node.
    """

    on: bool
    rules: Annotated[tuple[Rule, ...], Field(min_length=1, max_length=64)]
    others: Choice = "refuse"
    pictures: Literal["edit", "refuse", "pass"] = "edit"
    tell: Annotated[tuple[Listener, ...], Field(max_length=2)] = ("log", "user")
    prompts: bool = False
    pictures_gate: ImageGate | None = None
    training: Choice = "pass"
    record: Keeping = Keeping()

    @model_validator(mode="after")
    def _one_rule_a_family(self) -> Policy:
        for i, rule in enumerate(self.rules[:-1], 1):
            if not rule.families:
                raise ValueError(f"rule {i} covers every family, and none behind it is ever asked; put it last")
        return self

    def rule(self, family: str) -> Rule | None:
        """The first that covers a family."""
        return next((rule for rule in self.rules if rule.covers(family)), None)


def read(data: bytes, ending: str) -> Policy:
    """The document of a .toml or .json file. Raises ValueError that says what is wrong with it."""
    if len(data) > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // 1024} KB; a policy is words and numbers")
    try:
        return Policy.model_validate_json(json.dumps(parsed(data, ending)))
    except ValidationError as error:
        raise ValueError(explained(error)) from None


def parsed(data: bytes, ending: str) -> Any:
    try:
        if ending == ".toml":
            return plain(tomllib.loads(data.decode()))
        return json_of(data)
    except UnicodeDecodeError:
        raise ValueError("it is not text in UTF-8; save it so") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"it is not TOML: {error}") from None
    except Twins as error:
        raise ValueError(f"it {error}, and only one can be meant; take the other out") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it cannot be read as {ending.removeprefix('.').upper()}: {error}") from None


def plain(value: Any) -> Any:
    """TOML's values as JSON's: dates, which no field takes, as text."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value if isinstance(value, (str, int, float, bool)) else str(value)
