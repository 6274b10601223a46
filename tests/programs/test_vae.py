"""A variational autoencoder, as people write it: the loss reads what was sampled from."""

import torch
from helpers.programs import finished
from torch import nn
from torch.nn import functional as F


class Vae(nn.Module):
    def __init__(self, size=64, hidden=48, latent=8):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.mu, self.logvar = nn.Linear(hidden, latent), nn.Linear(hidden, latent)
        self.decoder = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, size))

    def encode(self, x):
        h = self.encoder(x)
        return self.mu(h), self.logvar(h)

    def reparameterize(self, mu, logvar):
        std = torch.exp(0.5 * logvar)
        return mu + torch.randn_like(std) * std

    def forward(self, x):
        mu, logvar = self.encode(x)
        return torch.sigmoid(self.decoder(self.reparameterize(mu, logvar))), mu, logvar


def loss_of(model, inputs):
    reconstruction, mu, logvar = model(*inputs)
    kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(1).mean()
    return F.binary_cross_entropy(reconstruction, inputs[0]) + 1e-3 * kl


def batch(step):
    return (torch.rand(6, 64, generator=torch.Generator().manual_seed(step)),)


def test_the_latent_keeps_its_width_where_the_loss_reads_it():
    model = finished(Vae, batch, loss_of)
    assert model.mu.out_features == 8
    assert model.encoder[0].out_features < 48


class Sampled(Vae):
    """It returns the reconstruction alone, and samples from a distribution of torch."""

    def forward(self, x):
        mu, logvar = self.encode(x)
        if self.training:
            mu = torch.distributions.Normal(mu, F.softplus(logvar) + 1e-4).rsample()
        return torch.sigmoid(self.decoder(mu))


def test_the_latent_may_go_where_nobody_reads_it():
    def reconstruction(model, inputs):
        return F.binary_cross_entropy(model(*inputs), inputs[0])

    model = finished(Sampled, batch, reconstruction, ratio=0.6)
    assert model.mu.out_features == model.logvar.out_features == model.decoder[0].in_features
