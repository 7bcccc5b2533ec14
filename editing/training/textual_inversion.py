"""A concept from pictures: tokens e that, in place of words, make the network denoise them (textual inversion,
arXiv 2208.01618, with the loss of eq. 4 of the KPOP paper; here the tokens stand behind the text encoder).

L = || eps - eps_theta(z_t, t, c(e)) ||^2 for a picture z_0, noise eps and a noise level drawn at random; only e learns.
c(e) is a caption's encoding with e in the places of its first tokens of padding: what the caption says of the picture,
e need not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..edits.learned import placed
from ..files.artefacts import Artefact
from .loop import Predict, Sampling, Text, draws, learned_state, restore_learned, sigma_at, slope

METHOD = "learned concept"


@dataclass(frozen=True)
class ConceptOptions:
    tokens: int = 4
    lr: float = 1e-2
    batch: int = 4
    seed: int = 0


def tokens_start(options: ConceptOptions, empty: Tensor, like: Tensor | None = None) -> Tensor:
    """e_0 [n, W]: the tokens `like` [m, W] in turn, or those of the empty prompt [1, T, W] with some noise."""
    if like is not None and len(like):
        return like[[i % len(like) for i in range(options.tokens)]].clone()
    start = empty[0, 1 : 1 + options.tokens]
    noise = torch.randn(start.shape, generator=draws(options.seed)).to(start)
    return start + 0.1 * empty.std() * noise


class LearnedTokens:
    """The training. latents: [P, 4, h, w], the pictures; captions: a text for each, and where it has room for e."""

    def __init__(
        self,
        predict: Predict,
        sampling: Sampling,
        latents: Tensor,
        captions: Sequence[Text],
        at: Sequence[int],
        start: Tensor,
        options: ConceptOptions,
    ) -> None:
        self.predict, self.sampling, self.options = predict, sampling, options
        self.latents, self.captions, self.at = latents, captions, at
        self.e = nn.Parameter(start.clone())
        self.adam = torch.optim.Adam([self.e], lr=options.lr)
        self.clean = latents[:1]

    def step(self, i: int) -> float:
        generator, B = draws(self.options.seed, i), self.options.batch
        which = torch.randint(len(self.latents), (B,), generator=generator).tolist()
        percents = (torch.arange(B) + torch.rand(B, generator=generator)) / B  # one from each part of the timesteps
        eps = torch.randn(B, *self.latents.shape[1:], generator=generator).to(self.latents)
        sigma = torch.tensor([sigma_at(self.sampling, p) for p in percents.tolist()], device=eps.device)
        z = self.sampling.noise_scaling(sigma, eps.clone(), self.latents[which])
        text, at = Text.stack([self.captions[w] for w in which]), [self.at[w] for w in which]

        def loss() -> Tensor:
            (e,) = self.predict(z, sigma, replace(text, c=placed(text.c, self.e, at)))
            self.clean = (z - sigma[:, None, None, None] * e.detach())[B // 2 : B // 2 + 1]
            return (eps - e).square().mean()

        value = slope(self.adam, loss)
        self.adam.step()
        return value

    def state(self) -> dict[str, Tensor]:
        return learned_state("learned", self.adam)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        restore_learned("learned", self.adam, state)

    def preview(self) -> Tensor:
        return self.clean

    def artefact(self, name: str, empty: Tensor, **about: object) -> Artefact:
        """empty: [1, T, W], the empty prompt's encoding. Neutral are the captions: what they say is no part of it."""
        e = self.e.detach().to("cpu", torch.float32, copy=True)
        neutral = torch.cat([text.c for text in self.captions]).mean(0)
        rest = {"neutral": neutral, "empty": empty[0]}
        tensors = {"learned": e, **{key: x.to("cpu", torch.float32, copy=True) for key, x in rest.items()}}
        return Artefact("concept", name, tensors, METHOD, text_width=e.shape[1], tokens=len(e), **about)  # type: ignore[arg-type]
