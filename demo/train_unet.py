"""Train the demo UNet with its text encoder and its reference encoder, jointly, on the painted world."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss, scaled_dot_product_attention

from . import model, world
from .autoencoder import initialise
from .training import averaged, device, numbers, renumber, step_with

IMAGE = -1  # placeholder ids of reference tokens


class TextEncoder(nn.Module):
    """CLIP's text model as the host computes it, trainable: rows of the vocabulary that the world uses, and no others.

    The stock module adds in place, which autograd refuses; `export` writes the stock module's state dict.
    """

    def __init__(self, used: list[int]):
        import comfy.ops
        from comfy.clip_model import CLIPTextModel

        super().__init__()
        self.clip = CLIPTextModel(model.TEXT_CONFIG, torch.float32, device(), comfy.ops.manual_cast)
        del self.clip.text_model.embeddings.token_embedding  # 49,408 rows, of which the world uses a few hundred
        initialise(self.clip)
        nn.init.normal_(self.clip.text_model.embeddings.position_embedding.weight, std=0.05)
        self.used = used
        self.rows = nn.Parameter(torch.randn(len(used), model.WIDTH) * 0.15)
        self.register_buffer("row_of", torch.zeros(model.VOCABULARY, dtype=torch.long), persistent=False)
        self.row_of[torch.tensor(used)] = torch.arange(len(used))

    def forward(self, ids: Tensor, image_tokens: Tensor) -> Tensor:
        """ids [b, 77] with IMAGE where reference tokens go (image_tokens [r, k, WIDTH], in order) -> [b, 77, WIDTH]."""
        text, heads = self.clip.text_model, model.TEXT_CONFIG["num_attention_heads"]
        x = self.rows[self.row_of[ids.clamp(min=0)]]
        x = x.masked_scatter((ids == IMAGE)[..., None], image_tokens)
        x = x + text.embeddings.position_embedding.weight
        for layer in text.encoder.layers:
            h, a = layer.layer_norm1(x), layer.self_attn
            q, k, v = (p(h).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
            x = x + a.out_proj(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.layer_norm2(x))
        return text.final_layer_norm(x)


def word_weights(text: TextEncoder, tokenize, pictures: list[world.Picture]) -> Tensor:
    """The rows of the vocabulary that name each picture's object and its style, as weights of a mean: [n, 2, rows]."""
    row = {token: i for i, token in enumerate(text.used)}
    out = torch.zeros(len(pictures), 2, len(row), device="cpu")
    for i, p in enumerate(pictures):
        for j, words in enumerate((p.objects[0], p.style or "plain")):
            tokens = tokenize(words)
            for token in tokens:
                out[i, j, row[token]] += 1 / len(tokens)
    return out.to(device())


def cosine_alphas() -> Tensor:
    """SD1's noise schedule: the cumulative product of 1 - beta, [1000]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


LEARN_ON = 5e-4  # the peak of the learning rate for weights that have learned before
READ = 0.4  # from this share of the steps on the encoders stay as they are, for transformers to read by
DECAY = 0.3  # the share of the steps in which the learning rate falls, on batches twice as large


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, plateau, and a linear decay."""
    return peak * min(step / 300, 1.0, max((steps - step) / (DECAY * steps), 0.002))


PROBES: dict[str, tuple[str, ...]] = {
    "first": tuple(world.OBJECTS),
    "second": tuple(world.OBJECTS),
    "style": tuple(world.STYLES),
    "background": tuple(world.BACKGROUNDS),
    "role": tuple(world.ROLES),
    "gender": tuple(world.GENDERS),
    "tone": tuple(world.TONES),
}


def said(picture: world.Picture) -> list[int]:
    """What a caption tells about its picture, a class a probe; the last class of each says nothing."""
    words = picture.caption.split()
    first, second = (*picture.objects, None, None)[:2]
    told = {"first": first, "second": second, "style": picture.style, "role": picture.role}
    told |= {
        k: v if v in words else None
        for k, v in (("background", picture.background), ("gender", picture.gender), ("tone", picture.tone))
    }
    return [names.index(told[k]) if told[k] else len(names) for k, names in PROBES.items()]


class Captions:
    """The training pictures' captions as token ids, and the reference pictures that stand in some of them."""

    def __init__(self, pictures: list[world.Picture], references: Tensor, tokenize) -> None:
        self.references = references.to(device())
        self.ids = torch.tensor(
            [model.split_reference(tokenize, p.caption, [IMAGE] * model.IMAGE_TOKENS) for p in pictures]
        )
        self.reference_of = torch.tensor([p.reference is not None for p in pictures]).cumsum(0) - 1
        self.empty = torch.tensor(model.split_reference(tokenize, "", []))

    def batch(
        self, text: TextEncoder, reference: nn.Module, size: int, dropout: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Picture numbers [b], the ids that were read [b, 77], their encoding [b, 77, W], and the reference tokens and
        the numbers of their pictures."""
        i = torch.randint(len(self.ids), (size,))
        ids = torch.where(torch.rand(size, 1) < dropout, self.empty, self.ids[i])
        shown = i[(ids == IMAGE).any(1)]
        tokens = reference(self.references[self.reference_of[shown]].float() / 255)
        return i, ids, text(ids, tokens), tokens, shown


class Trainer:
    """Master weights and their average in fp32; the UNet computes in bf16."""

    def __init__(
        self,
        pictures: list[world.Picture],
        latents: Tensor,
        references: Tensor,
        tokenize,
        steps: int,
        seed: int = 0,
        batch: int = 24,
        peak: float = 8e-4,
    ):
        torch.manual_seed(seed)
        self.steps, self.batch, self.peak = steps, batch, peak
        self.pictures, self.latents, self.tokenize = pictures, latents.to(device()), tokenize
        self.captions = Captions(pictures, references, tokenize)
        shown = [p for p in pictures if p.reference]
        names = {t for p in shown for words in (p.objects[0], p.style or "plain") for t in tokenize(words)}
        used = sorted(set(self.captions.ids.flatten().tolist()) - {IMAGE} | {*names, *tokenize("plain")})
        self.text, self.reference = TextEncoder(used), model.ReferenceEncoder()
        self.unet = model.build_unet()
        initialise(self.unet)
        for name, w in self.unet.named_parameters():  # residual branches start silent
            if any(end in name for end in ("proj_out", "out_layers.3", "out.2")):
                nn.init.zeros_(w)
        self.master = nn.ModuleDict({"unet": self.unet, "text": self.text, "reference": self.reference})
        self.master.requires_grad_(True)
        self.half = model.build_unet(torch.bfloat16).requires_grad_(True)
        self.average = {k: v.detach().clone() for k, v in self.master.state_dict().items()}
        self.alphas, self.step, self.reads = cosine_alphas(), 0, False
        self.named = word_weights(self.text, tokenize, shown)
        self.opt = torch.optim.AdamW(
            self.master.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, foreach=True
        )

    def read(self, batch: int, dropout: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A batch's picture numbers [b], its text encoding [b, 77, W], and the reference tokens and theirs."""
        i, _, context, tokens, shown = self.captions.batch(self.text, self.reference, batch, dropout)
        return i, context, tokens, shown

    def teach_words(self, steps: int, batch: int = 64, lr: float = 2e-3) -> None:
        """Before the UNet: every padding token learns to tell what the caption said, as CLIP's last token does.

        SD's UNet starts from a text encoder that can read; with one that cannot, 70 tokens of padding drown the words.
        """
        told = torch.tensor([said(p) for p in self.pictures])
        sizes = [len(names) + 1 for names in PROBES.values()]
        probe = nn.Linear(model.WIDTH, sum(sizes))
        weights = [*self.text.parameters(), *self.reference.parameters(), *probe.parameters()]
        opt = torch.optim.AdamW(weights, lr=lr, weight_decay=0.01)
        for step in range(steps):
            i, context, _, _ = self.read(batch, 0.0)
            ends = (self.captions.ids[i] == model.END).float().multinomial(4, replacement=True)  # the end or padding
            logits = probe(context.gather(1, ends[..., None].expand(-1, -1, model.WIDTH))).flatten(0, 1)
            target = told[i].repeat_interleave(4, 0)
            loss = sum(cross_entropy(part, target[:, k]) for k, part in enumerate(logits.split(sizes, 1)))
            opt.zero_grad()
            loss.backward()
            for group in opt.param_groups:
                group["lr"] = lr * min(1, step / 50, (steps - step) / (0.3 * steps))
            opt.step()
            if step % 50 == 0:
                print(f"words {step}/{steps} loss {loss.item():.4f}", flush=True)

    def loss(self, batch: int, dropout: float = 0.1) -> Tensor:
        i, context, tokens, shown = self.read(batch, dropout)
        x, noise, t = (
            self.latents[i].float(),
            torch.randn(batch, *self.latents.shape[1:]),
            torch.randint(1000, (batch,)),
        )
        a = self.alphas[t].view(-1, 1, 1, 1)
        z = a.sqrt() * x + (1 - a).sqrt() * noise
        # On a processor a third less time than the fused kernel's backward on such short sequences.
        with sdpa_kernel(SDPBackend.MATH) if device().type == "cpu" else nullcontext():
            eps = self.half(z.bfloat16(), t.float(), context=context.bfloat16(), transformer_options={}).float()
        snr = a / (1 - a)
        weight = (snr + 1).clamp(max=5) / snr  # v-prediction's emphasis on noisy steps, where words decide; min-SNR-5
        loss = (weight * (eps - noise).square()).mean()
        if len(shown):
            words = self.named[self.captions.reference_of[shown]] @ self.text.rows.detach()
            target = words.repeat_interleave(model.IMAGE_TOKENS // 2, 1)
            loss = loss + 0.2 * mse_loss(tokens, target) / target.var()
        return loss

    def update(self) -> Tensor:
        """One step: gradients of the bf16 copy move the fp32 master, and the average follows."""
        late = self.step >= (1 - DECAY) * self.steps
        if self.step >= READ * self.steps and not self.reads:
            self.learn_to_read_no_more()
        with torch.no_grad():
            torch._foreach_copy_(list(self.half.parameters()), list(self.unet.parameters()))
        loss = self.loss(2 * self.batch if late else self.batch)
        loss.backward()
        for w, h in zip(self.unet.parameters(), self.half.parameters(), strict=True):
            w.grad, h.grad = h.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.master.parameters(), 1.0, foreach=True)
        step_with(self.opt, learning_rate(self.step, self.steps, self.peak))
        self.step += 1
        if self.step % 4 == 0:
            decay = min(0.99, self.step / (self.step + 200))
            now = self.master.state_dict()
            torch._foreach_lerp_(list(self.average.values()), [now[k] for k in self.average], 1 - decay)
        return loss.detach()

    def learn_to_read_no_more(self) -> None:
        """The encoders become their averages and stay so."""
        for name, encoder in (("text.", self.text), ("reference.", self.reference)):
            encoder.load_state_dict({k.removeprefix(name): v for k, v in self.average.items() if k.startswith(name)})
            encoder.requires_grad_(False)
        self.reads = True

    def state(self) -> dict:
        return {
            "step": self.step,
            "master": self.master.state_dict(),
            "average": self.average,
            "opt": self.opt.state_dict(),
            "used": self.text.used,
            "reads": self.reads,
        } | numbers()

    def start_from(self, tensors: dict[str, Tensor]) -> None:
        """Take over shipped weights (load.read of the model file), so that training goes on where they were left."""
        master = {k: v for k, v in tensors.items() if k.startswith(("unet.", "reference."))}
        master |= {k.replace("text.", "text.clip.", 1): v for k, v in tensors.items() if k.startswith("text.")}
        rows = self.text.rows.detach().clone()
        for token, row in zip(tensors["used"].long().tolist(), tensors["rows"], strict=True):
            if token in self.text.used:
                rows[self.text.used.index(token)] = row
        missing, unknown = self.master.load_state_dict(master | {"text.rows": rows}, strict=False)
        assert not unknown and missing == ["text.clip.text_projection.weight"], (missing, unknown)
        self.average = {k: v.detach().clone() for k, v in self.master.state_dict().items()}

    def resume(self, state: dict) -> None:
        self.step, self.average = state["step"], averaged(state["average"])
        self.master.load_state_dict(state["master"])
        self.opt.load_state_dict(state["opt"])
        if state["reads"]:
            self.learn_to_read_no_more()
        renumber(state)
