"""How a direction is learned (safe region, arXiv 2505.15427): c + d is to be denoised as if away from a concept.

The parametrisation, target and recipe are those of the authors' code (ptuner/train_ptuner.py): d = b a with b = 0 at
the start, L = 10 MSE(eps(z_t, c + d), psi(z_t, c_o)), Adam, one update at each denoising step of sampling chains that
are steered by d themselves. Theirs advance with LMS, ours with Euler steps, so that a chain's whole state is z.

eps: [B, 4, h, w]; noise levels (sigma) are in units of the clean latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..edits.spec import Concept, Direction
from ..files.artefacts import Artefact
from ..methods.safe_region import shift
from .loop import Predict, Text, draws, learned_state, restore_learned, slope

GOALS = ("away", "towards")
METHOD = "safe region"


def psi(e_o: Tensor, e_null: Tensor, s: float, goal: str = "away") -> Tensor:
    """eps(c_o) + s (eps(null) - eps(c_o)), which points away from c_o, or eps(null) + s (eps(c_o) - eps(null))."""
    return e_o + s * (e_null - e_o) if goal == "away" else e_null + s * (e_o - e_null)


@dataclass(frozen=True)
class Settings:
    """All that decides what is learned; `seed` also the pictures."""

    prompts: tuple[str, ...]
    goal: str = "away"
    guidance: float = 7.5  # s
    learning_rate: float = 0.06
    seed: int = 0
    sampling_steps: int = 50
    cfg: float = 7.5
    scheduler: str = "normal"
    start_percent: float = 0.18  # the paper's step 10 of 50: before it, a chain runs without d and teaches nothing
    end_percent: float = 1.0
    shape: tuple[int, ...] = (1, 4, 64, 64)
    precision: str = "auto"

    def __post_init__(self) -> None:
        if self.goal not in GOALS:
            raise ValueError(f"goal is {self.goal!r}; choose one of {', '.join(GOALS)}")
        for name, value in (("learning_rate", self.learning_rate), ("sampling_steps", self.sampling_steps)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value}; give a number above 0")
        for name, value in (("guidance", self.guidance), ("cfg", self.cfg)):
            if not abs(value) < float("inf"):
                raise ValueError(f"{name} is {value}; give a finite number")


class LearnedDirection:
    """A direction while it is learned: d = b a, with b: [T, 1] and a: [1, W], fp32 on the CPU.

    contexts: each prompt's c; sigmas: [S + 1], the noise levels of one chain, 0 last; active: [S], the denoising steps
    that d takes part in. begun: what was learned with the same settings, to go on with.
    """

    def __init__(
        self,
        predict: Predict,
        contexts: Sequence[Text],
        sigmas: Tensor,
        active: Sequence[bool],
        concept: Concept,
        settings: Settings,
        begun: Artefact | None = None,
    ) -> None:
        if not any(active):
            raise ValueError("no denoising step lies between start_percent and end_percent; widen them")
        if concept.empty is None:
            raise ValueError(
                f'concept "{concept.name}" comes without the empty prompt; connect a CLIPTextEncode '
                "with no text to its `empty` input"
            )
        self.predict, self.contexts, self.sigmas, self.active = predict, contexts, sigmas.tolist(), active
        self.concept, self.settings, self.device = concept, settings, contexts[0].c.device
        self.c_o = [Text(phrase.tokens.to(self.device)) for phrase in concept.phrases]
        self.null = concept.empty.to(self.device).expand(settings.shape[0], -1, -1)
        # LoRA's initialisation, so that d = 0.
        self.b = torch.zeros(min(text.c.shape[1] for text in contexts), 1).requires_grad_()
        self.a = torch.randn(1, concept.width, generator=draws(settings.seed)).requires_grad_()
        self.adam = torch.optim.Adam([self.b, self.a], lr=settings.learning_rate)
        self.position = 0  # denoising steps taken, over all chains
        self.z: Tensor | None = None  # the chain's picture, on the CPU; None before its first step
        self.clean: Tensor | None = None
        if begun is not None:
            self.restore(state_in(begun, concept, settings))

    def step(self, i: int) -> float:
        """One update. Where d takes no part, the chain runs on without one."""
        while (loss := self.denoise()) is None:
            pass
        return loss

    def denoise(self) -> float | None:
        """One denoising step of a chain; the loss of the update, if it made one."""
        S, B, set_to = len(self.active), self.settings.shape[0], self.settings
        chain, i = divmod(self.position, S)
        rows = range(chain * B, chain * B + B)
        c = Text.stack([self.contexts[row % len(self.contexts)] for row in rows])
        o = replace(Text.stack([self.c_o[row % len(self.c_o)] for row in rows]), of=c.of)
        null = Text(self.null, c.of, positive=False)
        z = (self.first(chain, self.sigmas[0]) if self.z is None else self.z).to(self.device)
        sigma, level = torch.full((B,), self.sigmas[i], device=self.device), self.sigmas[i]
        with torch.no_grad():
            e_o, e_null = self.predict(z, sigma, o, null)
        found: list[Tensor] = []

        def loss() -> Tensor:
            d = (self.b @ self.a).to(self.device)
            found.extend(self.predict(z, sigma, replace(c, c=shift(c.c, d, torch.ones(B, device=self.device)))))
            return 10 * F.mse_loss(found[0], psi(e_o, e_null, set_to.guidance, set_to.goal))

        value = None
        if self.active[i]:
            value = slope(self.adam, loss)
            self.adam.step()
        else:
            with torch.no_grad():
                found.extend(self.predict(z, sigma, c))
        e_cfg = e_null + set_to.cfg * (found[0].detach() - e_null)
        self.clean = z - level * e_cfg
        self.z = None if i + 1 == S else (z + (self.sigmas[i + 1] - level) * e_cfg).cpu()
        self.position += 1
        return value

    def first(self, chain: int, sigma: float) -> Tensor:
        """A chain's noise, its own for each chain and seed."""
        return torch.randn(self.settings.shape, generator=draws(self.settings.seed, chain)) * sigma

    def state(self) -> dict[str, Tensor]:
        z = torch.zeros(self.settings.shape) if self.z is None else self.z
        return {
            **learned_state("direction", self.adam),
            "z": z.flatten().clone(),
            "position": torch.tensor([float(self.position)]),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        restore_learned("direction", self.adam, state)
        self.position = int(state["position"])
        begins = self.position % len(self.active) == 0
        self.z = None if begins else state["z"].reshape(self.settings.shape).clone()

    def preview(self) -> Tensor | None:
        return self.clean

    def artefact(self, losses: Sequence[float], backbone: str = "") -> Artefact:
        """As its file holds it, with what a longer training goes on from."""
        tensors = {"b": self.b.detach().clone(), "a": self.a.detach().clone()}
        if losses:
            tensors["losses"] = torch.tensor(losses)
            for p, name in ((self.b, "adam.b"), (self.a, "adam.a")):
                held = self.adam.state[p]
                tensors[name] = torch.stack([held["exp_avg"], held["exp_avg_sq"]])
        if self.z is not None:
            tensors["z"] = self.z
        return Artefact(
            "direction",
            self.concept.name,
            tensors,
            METHOD,
            tuple(p.text for p in self.concept.phrases),
            backbone,
            self.concept.width,
            len(self.b),
            "add",
            "all",
            {**about(self.concept, self.settings), "steps": len(losses), "position": self.position},
        )


def about(concept: Concept, settings: Settings) -> dict[str, Any]:
    """All that decides what is learned, but for the model and the number of steps; as JSON gives it back."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()}
    return {**plain, "concept": concept.key}


def state_in(begun: Artefact, concept: Concept, settings: Settings) -> dict[str, Tensor]:
    """The state of a training that a direction's file holds; refuses one of other settings, or that holds none."""
    held = begun.tensors
    if "adam.b" not in held:
        raise ValueError(f'resume: "{begun.name}" does not hold what training goes on from; start anew')
    for key, value in about(concept, settings).items():
        if (before := begun.training.get(key)) != value:
            raise ValueError(
                f'resume: "{begun.name}" was learned with {key} {before!r:.60}, not {value!r:.60}; '
                "set it back, or start anew"
            )
    m, v = (torch.cat([held["adam.b"][i].flatten(), held["adam.a"][i].flatten()]) for i in range(2))
    return {
        "direction": torch.cat([held["b"].flatten(), held["a"].flatten()]),
        "direction.m": m,
        "direction.v": v,
        "direction.t": torch.tensor([float(len(held["losses"]))]),
        "z": held.get("z", torch.zeros(settings.shape)).flatten(),
        "position": torch.tensor([float(begun.training["position"])]),
    }


def random_like(direction: Direction, seed: int) -> Direction:
    """The control: a direction as strong at every token, but pointing anywhere."""
    noise = torch.randn(direction.d.shape, generator=torch.Generator().manual_seed(seed))
    noise = noise * (direction.d.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
    return Direction(f"random as {direction.name}", noise)
