"""How a direction is learned (safe region, arXiv 2505.15427): c + d is to be denoised as if away from a concept.

The parametrisation, target and recipe are those of the authors' code (ptuner/train_ptuner.py): d = b a with b = 0 at
the start, L = 10 MSE(eps(z_t, c + d), psi(z_t, c_o)), Adam, one update at each denoising step of sampling chains that
are steered by d themselves. Theirs advance with LMS, ours with Euler steps, so that a chain's whole state is z.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..edits.spec import Concept, Direction
from ..files.artefacts import Artefact
from ..methods.safe_region import direction_of, shift
from .mode import gradients

GOALS = ("away", "towards")
METHOD = "safe region"

# eps of each context [B, L, W] at (z [B, ...], sigma, prompts' indices): gradient.Predictor
Predict = Callable[..., list[Tensor]]
Report = Callable[[int, float, Tensor], None]  # updates done, loss, the predicted clean picture


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


@dataclass
class Learner:
    """A direction while it is learned. b: [T, 1], a: [1, W], fp32 on the CPU; z: the chain's picture."""

    concept: Concept
    settings: Settings
    b: Tensor
    a: Tensor
    backbone: str = ""
    position: int = 0  # denoising steps taken, over all chains
    z: Tensor | None = None
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.adam = torch.optim.Adam([self.b.requires_grad_(), self.a.requires_grad_()], lr=self.settings.learning_rate)

    @classmethod
    def start(cls, concept: Concept, settings: Settings, tokens: int, backbone: str = "") -> Learner:
        """b = 0 and a ~ N(0, 1): LoRA's initialisation, so that d = 0."""
        a = torch.randn(1, concept.width, generator=torch.Generator().manual_seed(settings.seed % 2**63))
        return cls(concept, settings, torch.zeros(tokens, 1), a, backbone)

    @classmethod
    def resume(cls, concept: Concept, settings: Settings, found: Artefact) -> Learner:
        """Where a learner left off; refuses what was learned with other settings, or has no end to go on from."""
        if "adam.b" not in found.tensors:
            raise ValueError(f'resume: "{found.name}" does not hold what training goes on from; start anew')
        wanted = {**plain(asdict(settings)), "concept": concept.key}
        for key, value in wanted.items():
            if (before := found.training.get(key)) != value:
                raise ValueError(
                    f'resume: "{found.name}" was learned with {key} {before!r:.60}, not {value!r:.60}; '
                    "set it back, or start anew"
                )
        one = cls(concept, settings, found.tensors["b"].clone(), found.tensors["a"].clone(), found.backbone)
        one.position, one.losses = int(found.training["position"]), found.tensors["losses"].tolist()
        one.z = found.tensors["z"].clone() if "z" in found.tensors else None
        for p, name in ((one.b, "adam.b"), (one.a, "adam.a")):
            average, square = found.tensors[name].clone()
            one.adam.state[p] = {"step": torch.tensor(float(one.done)), "exp_avg": average, "exp_avg_sq": square}
        return one

    @property
    def done(self) -> int:
        return len(self.losses)

    def artefact(self) -> Artefact:
        tensors = {"b": self.b.detach().clone(), "a": self.a.detach().clone()}
        if self.losses:
            tensors["losses"] = torch.tensor(self.losses)
            for p, name in ((self.b, "adam.b"), (self.a, "adam.a")):
                state = self.adam.state[p]
                tensors[name] = torch.stack([state["exp_avg"], state["exp_avg_sq"]])
        if self.z is not None:
            tensors["z"] = self.z
        training = {
            **plain(asdict(self.settings)),
            "steps": self.done,
            "position": self.position,
            "concept": self.concept.key,
        }
        return Artefact(
            "direction",
            self.concept.name,
            tensors,
            METHOD,
            tuple(p.text for p in self.concept.phrases),
            self.backbone,
            self.concept.width,
            len(self.b),
            "add",
            "all",
            training,
        )

    def direction(self) -> Direction:
        with gradients():  # so that more can be learned through a model that it edits
            return direction_of(self.artefact())

    def learn(
        self,
        steps: int,
        predict: Predict,
        contexts: Sequence[Tensor],
        sigmas: Tensor,
        active: Sequence[bool],
        report: Report,
        device: torch.device | str = "cpu",
    ) -> None:
        """Until `steps` updates are done. contexts: each prompt's c [1, L, W]; sigmas: [S + 1], of one chain, 0 last;
        active: [S], the denoising steps that d takes part in. What `report` raises leaves a state to go on from.
        """
        S, B, set_to = len(sigmas) - 1, self.settings.shape[0], self.settings
        if not any(active):
            raise ValueError("no denoising step lies between start_percent and end_percent; widen them")
        if self.concept.empty is None:
            raise ValueError(
                f'concept "{self.concept.name}" comes without the empty prompt; connect a CLIPTextEncode '
                "with no text to its `empty` input"
            )
        c_o = [phrase.tokens.to(device) for phrase in self.concept.phrases]
        null = self.concept.empty.to(device).expand(B, -1, -1)
        while self.done < steps:
            chain, i = divmod(self.position, S)
            rows = range(chain * B, chain * B + B)
            picks = [row % len(contexts) for row in rows]
            c, o = joined([contexts[j] for j in picks]), joined([c_o[row % len(c_o)] for row in rows])
            z, sigma = (self.first(chain, sigmas[0]) if self.z is None else self.z).to(device), float(sigmas[i])
            with torch.no_grad():
                e_o, e_null = predict(z, sigma, picks, o, null)
            if active[i]:
                d = (self.b @ self.a).to(device)
                (e,) = predict(z, sigma, picks, shift(c, d, torch.ones(B, device=device)))
                loss = 10 * F.mse_loss(e, psi(e_o, e_null, set_to.guidance, set_to.goal))
                self.update(loss)
            else:
                with torch.no_grad():
                    (e,) = predict(z, sigma, picks, c)
            e_cfg = e_null + set_to.cfg * (e.detach() - e_null)
            z_next = z + (float(sigmas[i + 1]) - sigma) * e_cfg
            self.position += 1
            self.z = None if i + 1 == S else z_next.cpu()
            report(self.done, self.losses[-1] if self.losses else 0.0, z - sigma * e_cfg)

    def update(self, loss: Tensor) -> None:
        """One Adam step."""
        self.b.grad, self.a.grad = torch.autograd.grad(loss, [self.b, self.a])
        value = float(loss.detach())
        if not all(torch.isfinite(x).all() for x in (loss.detach(), self.b.grad, self.a.grad)):
            raise ValueError(
                f"the loss or its gradient is no number after {self.done} steps; lower learning_rate or "
                "set precision to fp32"
            )
        self.adam.step()
        self.losses.append(value)

    def first(self, chain: int, sigma: Tensor) -> Tensor:
        """A chain's noise, its own for each chain and seed."""
        generator = torch.Generator().manual_seed((self.settings.seed * 1_000_003 + chain) % 2**63)
        return torch.randn(self.settings.shape, generator=generator) * float(sigma)


def joined(contexts: Sequence[Tensor]) -> Tensor:
    """[B, L, W] of B contexts [1, L_i, W]; shorter ones are repeated, as the host does."""
    longest = max(c.shape[1] for c in contexts)
    if any(longest % c.shape[1] for c in contexts):
        raise ValueError(
            f"the prompts are of {sorted({c.shape[1] for c in contexts})} tokens, which cannot share a "
            "batch; use a batch of 1, or prompts of one length"
        )
    return torch.cat([c.repeat(1, longest // c.shape[1], 1) for c in contexts])


def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


def random_like(direction: Direction, seed: int) -> Direction:
    """The control: a direction as strong at every token, but pointing anywhere."""
    noise = torch.randn(direction.d.shape, generator=torch.Generator().manual_seed(seed))
    noise = noise * (direction.d.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))
    return Direction(f"random as {direction.name}", noise)
