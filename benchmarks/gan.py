"""A small GAN on 8 x 8 images, trained as Lightning users do it by hand, and how far its images are from real ones.

The loss is the non-saturating one of *Generative Adversarial Nets* (Goodfellow et al., arXiv 1406.2661).
"""

from collections.abc import Sequence

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT, PIXELS = 16, 64


def latents(count: int, generator: torch.Generator | None = None) -> Tensor:
    """What images are generated from (count x 16). FP32 in any case: every precision is to see the same values."""
    return torch.randn(count, LATENT, dtype=torch.float32, generator=generator)


class GAN(L.LightningModule):
    """A generator and a discriminator, each with its own Adam, one step of either for a batch.

    It predicts images (batch x 64, from -1 to 1) from latents.
    """

    def __init__(self, *, width: int = 128, lr: float = 1e-3) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.lr = lr
        self.generator = nn.Sequential(
            *(nn.Linear(LATENT, width), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, PIXELS), nn.Tanh()),
        )
        self.discriminator = nn.Sequential(
            *(nn.Linear(PIXELS, width), nn.LeakyReLU(0.2)),
            *(nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1)),
        )

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        real = flat(batch[0])
        generating, discriminating = self.optimizers()  # type: ignore[misc]
        latent = latents(len(real)).to(real)

        self.toggle_optimizer(discriminating)
        generated = self.generator(latent).detach()
        loss = self._loss(real, is_real=True) + self._loss(generated, is_real=False)
        discriminating.zero_grad()
        self.manual_backward(loss)
        discriminating.step()
        self.untoggle_optimizer(discriminating)

        self.toggle_optimizer(generating)
        loss = self._loss(self.generator(latent), is_real=True)
        generating.zero_grad()
        self.manual_backward(loss)
        generating.step()
        self.untoggle_optimizer(generating)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.generator(batch)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.Adam(part.parameters(), lr=self.lr, betas=(0.5, 0.999))
            for part in (self.generator, self.discriminator)
        ]

    def _loss(self, images: Tensor, *, is_real: bool) -> Tensor:
        logits = self.discriminator(images).float()
        return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, float(is_real)))


def flat(images: Tensor) -> Tensor:
    """Images of values from 0 to 1 as the GAN has them: batch x 64, from -1 to 1."""
    return images.flatten(1) * 2 - 1


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """The Fréchet distance between the Gaussians fitted to two samples (each count x features), in float64.

    |m1 - m2|**2 + tr(C1 + C2 - 2 (C1 C2)**0.5), of their means m and covariances C: Dowson and Landau, *The Fréchet
    distance between multivariate normal distributions* (1982). Heusel et al. (arXiv 1706.08500) take it of a network's
    features; here it is of pixels. C1 C2 has the eigenvalues of R C2 R with R = C1**0.5, which is symmetric.
    NaN where a value is inf or NaN.
    """
    one, other = one.double(), other.double()
    if not (one.isfinite().all() and other.isfinite().all()):
        return float("nan")
    covariance, other_covariance = one.T.cov(), other.T.cov()
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ other_covariance @ root).clamp(min=0).sqrt().sum()
    means = (one.mean(0) - other.mean(0)).square().sum()
    return float(means + covariance.trace() + other_covariance.trace() - 2 * shared)
