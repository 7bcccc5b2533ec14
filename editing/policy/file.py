"""The policy as its file has it now: read again whenever it, or a preset that it names, has changed.

A file that is damaged, or gone, leaves the server without a policy to go by: then nothing is sampled, and the error
says which file to mend.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..presets.document import MAX_FILE, Preset
from ..presets.document import read as read_preset
from .document import MAX_BYTES, Policy, Rule, read

ENDINGS = (".toml", ".json")
Stamp = tuple[int, int, int] | None  # of a file's contents; None: it is not there


class Refused(ValueError):
    """Nothing is sampled: by the policy, or for want of one that can be read."""

    def __init__(self, why: str) -> None:
        super().__init__(f"ConceptGuard policy: {why}")


@dataclass(frozen=True)
class Loaded:
    """A policy and its presets, by the names that it has for them."""

    policy: Policy
    presets: Mapping[str, Preset]

    def of(self, rule: Rule) -> list[Preset]:
        return [self.presets[name] for name in rule.presets]

    def governs(self) -> str:
        """One line for people."""
        other = "all other models" if len(self.policy.rules) > 1 else "all models"
        rules = [
            f"{', '.join(rule.families) or other}: {', '.join(preset.name for preset in self.of(rule))}"
            for rule in self.policy.rules
        ]
        rest = {"refuse": "refused", "pass": "let pass, and logged"}[self.policy.others]
        return f"{'; '.join(rules)}; models that it cannot edit are {rest}"


class PolicyFile:
    """shipped: the folder of the presets that came with the pack."""

    def __init__(self, path: Path, shipped: Path) -> None:
        self.path, self.shipped = path, shipped
        self.stamps: dict[Path, Stamp] = {}
        self.found: Loaded | Refused = Refused("it has not been read yet")

    def now(self) -> Loaded:
        """Raises Refused, which names the file and the mend, while it is damaged."""
        if not self.stamps or any(stamp_of(path) != stamp for path, stamp in self.stamps.items()):
            self.found = self._read()
        if isinstance(self.found, Refused):
            raise Refused(str(self.found).removeprefix("ConceptGuard policy: "))
        return self.found

    def _read(self) -> Loaded | Refused:
        self.stamps = {self.path: stamp_of(self.path)}
        try:
            loaded = self._loaded()
        except (ValueError, OSError) as error:
            why = "it is not there" if isinstance(error, FileNotFoundError) else str(error)
            logging.error("ConceptGuard policy: %s is damaged, and nothing is sampled: %s", self.path, why)
            return Refused(
                f'nothing is sampled on this server, for its policy file "{self.path.name}" is damaged: {why}. Whoever '
                "runs the server mends it there (it is read again at once), or sets on = false in it"
            )
        what = f"governs {loaded.governs()}" if loaded.policy.on else "is off"
        logging.info("ConceptGuard policy: %s %s", self.path, what)
        return loaded

    def _loaded(self) -> Loaded:
        if self.path.suffix not in ENDINGS:
            raise ValueError(f"its name ends in {self.path.suffix!r}; a policy is a .toml or a .json file")
        policy = read(contents(self.path, MAX_BYTES), self.path.suffix)
        presets = {name: self._preset(name) for rule in policy.rules for name in rule.presets}
        for name, gate in gates_of(policy, presets):
            if getattr(gate, "decode", "preview") != "preview":
                raise ValueError(
                    f'{name}: its in-flight gate decodes with a VAE, and a policy has none; set decode to "preview"'
                )
        return Loaded(policy, presets)

    def _preset(self, name: str) -> Preset:
        path = self.shipped / f"{name}.json" if "." not in name and "/" not in name else self.path.parent / name
        self.stamps[path] = stamp_of(path)
        try:
            return read_preset(contents(path, MAX_FILE))
        except FileNotFoundError:
            raise ValueError(
                f'the preset "{name}" is neither one of the pack\'s nor a file beside the policy'
            ) from None
        except (ValueError, OSError) as error:
            raise ValueError(f'the preset "{name}": {error}') from None


def gates_of(policy: Policy, presets: Mapping[str, Preset]) -> Iterator[tuple[str, Any]]:
    """Each with the name of whose it is."""
    for number, rule in enumerate(policy.rules, 1):
        yield f"rule {number}", rule.gate
    for name, preset in presets.items():
        for edit in preset.edits:
            yield f'the preset "{name}"', edit.gate


def contents(path: Path, most: int) -> bytes:
    """At most a byte more than it may have."""
    with path.open("rb") as file:
        return file.read(most + 1)


def stamp_of(path: Path) -> Stamp:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def chosen(given: str | None, folder: Path, shipped: Path) -> PolicyFile | None:
    """The file that `given` names (an environment variable's value), or policy.toml or .json of a folder; None: there
    is none, and no policy."""
    if given:
        return PolicyFile(Path(given).expanduser().absolute(), shipped)
    there = [folder / f"policy{ending}" for ending in ENDINGS]
    return next((PolicyFile(path, shipped) for path in there if path.exists()), None)
