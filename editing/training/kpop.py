"""KPOP (arXiv 2403.12326): the concept leaves the weights while a learned prompt keeps it.

theta is the original network, theta' the sanitised one, p the prompt, c_e a concept to erase and c_n a neutral text.
Each iteration makes one step of eq. 6 (knowledge transfer, into p) and one of eq. 7 (knowledge removal, from theta').

Read from the authors' later code, where the paper is silent: one concept drawn at random at a time; z_t from theta'
with c_e and guidance 3, at a random one of 50 DDIM steps. `chain` walks such a path and makes an iteration at each of
its steps, which costs one network call an iteration where a `fresh` path each time costs 50 on average; the noise
levels are distributed alike. `overshoot` is the same code's `negative_guidance`: 0 is eq. 7, 1 pushes past the neutral
output as ESD does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..edits.blocks import parse_blocks, within
from ..edits.spec import PromptTokens
from ..files.artefacts import Artefact
from ..methods.kpop import prompt_of
from .changes import Changes
from .loop import Predict, Sampling, Text, draws, learned_state, restore_learned, slope
from .path import Path

METHOD = "KPOP"
STARTS = ("noise", "concept")
KEYS_AND_VALUES = ("one", "two")  # one p for both, as the paper writes it, or one each, as the code has it


@dataclass(frozen=True)
class KPOPOptions:
    lr: float = 1e-5
    prompt_lr: float = 1e-5
    lam: float = 0.1  # lambda of eq. 7
    overshoot: float = 0.0
    guidance: float = 3.0
    path: str = "chain"
    path_steps: int = 50
    batch: int = 1
    seed: int = 0


def difference(a: Tensor, b: Tensor) -> Tensor:
    """|| a - b ||^2, as a mean over the numbers. a, b: [B, 4, h, w]."""
    return (a - b).square().mean()


def neutral_target(e_n: Tensor, e_e: Tensor, overshoot: float) -> Tensor:
    """What theta' is to answer to c_e. e_n, e_e: theta's outputs for c_n and c_e, [B, 4, h, w]."""
    return e_n - overshoot * (e_e - e_n)


class LearnedPrompt:
    """p, and how it enters the cross-attentions of some blocks. k, v: [1, n, W].

    mechanism "concat": ctx_k = [c; k], ctx_v = [c; v] before W_k, W_v; "additive": c + k, where n is the length of c.
    """

    def __init__(
        self, start: Tensor, mechanism: str = "concat", blocks: str = "middle", keys_and_values: str = "one"
    ) -> None:
        self.k = nn.Parameter(start.clone())
        two = keys_and_values == "two" and mechanism == "concat"
        self.v = nn.Parameter(start.clone()) if two else self.k
        self.mechanism, self.blocks, self.parts = mechanism, blocks, parse_blocks(blocks)

    @property
    def tensors(self) -> dict[str, nn.Parameter]:
        return {"k": self.k} if self.v is self.k else {"k": self.k, "v": self.v}

    def patch(self, n: Tensor, context: Tensor, value: Tensor, extra: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The host's `attn2_patch`. context, value: [B, T, W]."""
        if not any(within((*extra["block"], 0), part) for part in self.parts):
            return n, context, value
        k, v = (x.to(context.dtype).expand(len(context), -1, -1) for x in (self.k, self.v))
        if self.mechanism == "additive":
            return n, context + k, value + v
        return n, torch.cat([context, k], 1), torch.cat([value, v], 1)

    def result(self, name: str, **about: Any) -> PromptTokens:
        """about: more of an Artefact's fields."""
        k, v = (x.detach()[0].to("cpu", torch.float32, copy=True) for x in (self.k, self.v))
        n, width = k.shape
        return prompt_of(
            Artefact(
                "prompt",
                name,
                {"k": k, "v": v},
                METHOD,
                text_width=width,
                tokens=n,
                mechanism=self.mechanism,
                blocks=self.blocks,
                **about,
            )
        )


def prompt_start(start: str, mechanism: str, size: int, concept: Tensor, seed: int) -> Tensor:
    """p_0 [1, n, W]. concept: [1, T, W], the encoding of a concept; additive prompts have its length.

    Not in the paper, which says that p aligns with no text at first: noise as strong as the encoding's tokens, or
    (concept) the encoding's own first tokens. An additive prompt starts from a hundredth of the noise.
    """
    n = concept.shape[1] if mechanism == "additive" else size
    if start == "concept" and mechanism == "concat":
        return concept[:, [1 + i % (concept.shape[1] - 1) for i in range(n)]].clone()
    noise = torch.randn(1, n, concept.shape[2], generator=draws(seed)).to(concept)
    return noise * concept.std() * (0.01 if mechanism == "additive" else 1)


class KPOP:
    """The alternating training. concepts: the set E, each a text of one row; all have the same number of tokens.

    neutral: what each is to become, one text for all in the paper. What a concept's text says besides, a style or a
    place, its neutral one may say as well: it is not unlearned then.
    """

    def __init__(
        self,
        predict: Predict,
        sampling: Sampling,
        concepts: Sequence[Text],
        neutral: Sequence[Text],
        empty: Text,
        changes: Changes,
        prompt: LearnedPrompt,
        shape: Sequence[int],
        options: KPOPOptions,
    ) -> None:
        self.predict, self.changes, self.prompt, self.options = predict, changes, prompt, options
        self.concepts, self.neutral = concepts, neutral
        self.path = Path(predict, sampling, concepts, empty, shape, options)
        self.adam = torch.optim.Adam(changes.tensors.values(), lr=options.lr)
        self.prompt_adam = torch.optim.Adam(prompt.tensors.values(), lr=options.prompt_lr)

    def step(self, i: int) -> float:
        """One iteration; returns L_R."""
        z, sigma, which = self.path.noisy(i)
        c, c_n = (Text.stack([texts[w] for w in which]) for texts in (self.concepts, self.neutral))
        s = torch.full((len(z),), sigma, device=z.device)
        with torch.no_grad(), self.changes.off():
            (e_e,), (e_n,) = self.predict(z, s, c), self.predict(z, s, c_n)
        target, outputs = neutral_target(e_n, e_e, self.options.overshoot), []

        def with_prompt() -> Tensor:
            return difference(self.predict(z, s, c, patch=self.prompt.patch)[0], e_e)

        def removal() -> Tensor:
            outputs.extend(self.predict(z, s, c))
            return difference(outputs[0], target)

        kept = learned_state("prompt", self.prompt_adam)
        try:
            slope(self.prompt_adam, with_prompt)  # eq. 5
            self.prompt_adam.step()  # eq. 6
            losses = [removal] if self.options.lam == 0 else [removal, lambda: self.options.lam * with_prompt()]
            loss = slope(self.adam, *losses)  # eq. 7
            onward = z
            if self.options.path == "chain":
                onward = self.path.onward(z, outputs[0].detach(), sigma, self.path.towards)
        except BaseException:  # the host interrupts in the middle of a network's call
            restore_learned("prompt", self.prompt_adam, kept)
            raise
        self.adam.step()
        self.path.z = onward
        return loss

    def state(self) -> dict[str, Tensor]:
        learned = learned_state("weights", self.adam) | learned_state("prompt", self.prompt_adam)
        return {**learned, "z": self.path.z.flatten().to("cpu", copy=True)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.path.z = state["z"].reshape(self.path.shape).to(self.path.z, copy=True)
        restore_learned("weights", self.adam, state)
        restore_learned("prompt", self.prompt_adam, state)

    def preview(self) -> Tensor | None:
        return self.path.clean
