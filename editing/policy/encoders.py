"""The text encoders that a server's graphs use, remembered by what they encode: a policy's words are encoded with the
very one that made a run's prompts.

Nothing here keeps a text encoder in memory. What a policy needs of one, the encodings of its words, is made when the
encoder is at work anyway.
"""

from __future__ import annotations

import logging
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..edits.spec import Concept
from ..presets.document import Preset
from ..presets.parts import Words

MOST = 16  # encoders that are remembered, each with some encodings
TEXTS = 64  # of the prompts that were tokenized, or encoded, last
Encoding = tuple[Tensor, Tensor | None]  # [B, T, W], and the pooled [B, P] if there is one


class Encoder:
    """One text encoder as it stands: its weights, with the patches of LoRAs, and the layer that it is read at."""

    def __init__(self, clip: Any) -> None:
        self.stage = weakref.ref(clip.cond_stage_model)
        self.see(clip)
        self.concepts: dict[Words, Concept] = {}
        self.said: OrderedDict[str, Encoding] = OrderedDict()  # prompts, for gates that ask what they say

    def see(self, clip: Any) -> None:
        self.clip = weakref.ref(clip)

    def hear(self, text: str, encoding: Encoding) -> None:
        """What it made of a prompt."""
        self.said[text] = tuple(None if x is None else x.detach().to("cpu", copy=True) for x in encoding)  # type: ignore[assignment]
        self.said.move_to_end(text)
        while len(self.said) > TEXTS:
            self.said.popitem(last=False)

    def memory(self) -> Memory | None:
        """The text encoder, which is not asked again for what it has encoded; None if it is not in memory any more."""
        clip = self.clip()
        return None if clip is None else Memory(clip, self)

    def concept(self, words: Words) -> Concept:
        if words not in self.concepts:
            clip = self.clip()
            if clip is None:
                raise ValueError(
                    f'"{words.name}" is new in the policy, and the text encoder of this prompt is not in memory any '
                    "more; change a letter of the prompt, so that it is encoded anew"
                )
            self.concepts[words] = words.encoded(clip)
        return self.concepts[words]


class Memory:
    """A CLIP for one run's gates: it is at work on the device as seldom as may be, for the run is about to begin there,
    and makes tokens of a text once for all of them."""

    def __init__(self, clip: Any, encoder: Encoder) -> None:
        self.clip, self.encoder = clip, encoder
        self.now: tuple[Any, str] = (None, "")
        self.tokens: dict[tuple[str, bool], Any] = {}  # by the text, and whether with the words' numbers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.clip, name)

    def tokenize(self, text: str, return_word_ids: bool = False) -> Any:
        key = text, return_word_ids
        if key not in self.tokens:
            self.tokens[key] = self.clip.tokenize(text, return_word_ids=return_word_ids)
        self.now = self.tokens[key], text
        return self.tokens[key]

    def encode_from_tokens(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        known, text = self.now
        if known is not tokens or args or kwargs != {"return_pooled": True}:
            return self.clip.encode_from_tokens(tokens, *args, **kwargs)
        if text not in self.encoder.said:
            self.encoder.hear(text, self.clip.encode_from_tokens(tokens, return_pooled=True))
        return self.encoder.said[text]


@dataclass(frozen=True)
class Said:
    """What text encoders are told: one text, or one each, None where nobody knows all of it; pictures: whether they see
    some too."""

    texts: tuple[str, ...] | None = None
    pictures: bool = False

    @property
    def text(self) -> str | None:
        """For people."""
        return None if self.texts is None else "\n".join(self.texts)


UNKNOWN = Said()


class Made:
    """An encoding of a prompt, by which encoder, and of what."""

    def __init__(self, tensor: Tensor, encoder: Encoder, said: Said, forget: Any) -> None:
        self.tensor, self.encoder, self.said = weakref.ref(tensor, forget), encoder, said


class Encoders:
    def __init__(self) -> None:
        self.known: OrderedDict[Any, Encoder] = OrderedDict()
        self.made: dict[int, Made] = {}  # by the encoding's id
        self.parts: deque[tuple[Any, Said]] = deque(maxlen=4 * TEXTS)  # tokens for one encoder, and what they say
        self.own = False  # whether a policy's words are being encoded

    def tokenized(self, tokens: Any, text: Any, **how: Any) -> None:
        """The host's CLIP made tokens of a text. how: what else it was given, such as pictures or a template."""
        if self.own or not isinstance(text, str):
            return
        pictures = any(name.startswith("image") and is_given(value) for name, value in how.items())
        said = Said(None if any(map(is_given, how.values())) else (text,), pictures)
        self.parts += [(part, said) for part in parts_of(tokens)]

    def said(self, tokens: Any) -> Said:
        """Of a prompt's tokens: nodes put together those that several encoders read, each of a text of its own."""
        found = [self._said(part) for part in parts_of(tokens)]
        pictures = any(said.pictures for said in found)
        if any(said.texts is None for said in found) or not found:
            return Said(None, pictures)
        texts = [text for said in found for text in said.texts or ()]
        return Said(tuple(dict.fromkeys(texts)), pictures)

    def _said(self, part: Any) -> Said:
        if isinstance(part, list) and not part:
            return Said(())
        return next((said for known, said in reversed(self.parts) if known is part), UNKNOWN)

    def encoded(self, clip: Any, tokens: Any, result: Any, words: Iterable[Words]) -> None:
        """What the host's CLIP made of a prompt's tokens; `words`, of the policy, are encoded as well."""
        tensor = tensor_of(result)
        if self.own or tensor is None:
            return
        encoder, said = self.of(clip), self.said(tokens)
        if isinstance(result, dict) and len(said.texts or ()) == 1:  # CLIP Text Encode asks for one
            encoder.hear((said.texts or ("",))[0], (tensor, result.get("pooled_output")))
        place = id(tensor)
        self.made[place] = Made(tensor, encoder, said, lambda _: self.made.pop(place, None))
        self.own = True
        try:
            for each in words:
                encoder.concept(each)
        except (
            Exception
        ) as error:  # of whatever kind this encoder is: the prompt is the user's, and sampling will refuse
            logging.warning(
                "ConceptGuard policy: %s cannot encode the policy's words: %s",
                type(clip.cond_stage_model).__name__,
                error,
            )
        finally:
            self.own = False

    def of(self, clip: Any) -> Encoder:
        patcher = getattr(clip, "patcher", None)
        stage = clip.cond_stage_model
        key = id(stage), getattr(patcher, "patches_uuid", None), getattr(clip, "layer_idx", None)
        encoder = self.known.pop(key, None)
        if encoder is None or encoder.stage() is not stage:
            encoder = Encoder(clip)
        encoder.see(clip)
        self.known[key] = encoder
        while len(self.known) > MOST:
            self.known.popitem(last=False)
        return encoder

    def behind(self, tensors: Iterable[Tensor], width: int) -> tuple[list[Encoder], list[Said]]:
        """The encoders that made these encodings, and what each encoding says.

        Where one is not as an encoder made it (averaged, joined, scaled), any of those of the model's text width may
        have had a part in it: then all of them. width: W of the encodings [B, T, W] that the model reads.
        """
        found: dict[int, Encoder] = {}
        said: list[Said] = []
        for tensor in tensors:
            made = self.made.get(id(tensor))
            if made is not None and made.tensor() is tensor:
                found[id(made.encoder)] = made.encoder
                said.append(made.said)
            else:
                found |= {id(each): each for each in self.of_width(width)}
                said.append(UNKNOWN)
        return list(found.values()), said

    def of_width(self, width: int) -> Iterator[Encoder]:
        """Those that were in use last, and those whose encodings somebody holds: the words' own width tells."""
        for encoder in (*self.known.values(), *(made.encoder for made in list(self.made.values()))):
            if any(concept.width == width for concept in encoder.concepts.values()):
                yield encoder


def parts_of(tokens: Any) -> list[Any]:
    """Tokens by the encoder that reads them."""
    return list(tokens.values()) if isinstance(tokens, dict) else [tokens]


def is_given(value: Any) -> bool:
    return value is not None and value is not False and not (isinstance(value, (list, dict)) and not value)


def words_of(presets: Iterable[Preset]) -> list[Words]:
    """The concepts of presets that are in words."""
    found: Iterable[Any] = (getattr(edit, "concept", None) for preset in presets for edit in preset.edits)
    return list(dict.fromkeys(each for each in found if getattr(each, "phrases", ())))


def tensor_of(result: Any) -> Tensor | None:
    """The encoding [B, T, W] in what a CLIP returns, in any of its forms."""
    if isinstance(result, dict):
        result = result.get("cond")
    if isinstance(result, tuple):
        result = result[0] if result else None
    return result if isinstance(result, Tensor) and result.ndim == 3 else None
