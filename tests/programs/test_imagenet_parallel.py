"""The ImageNet example's way with several GPUs: features in DataParallel, a classifier beside them."""

import torch
from helpers.programs import finished
from torch import nn
from torch.nn import functional as F


class Vgg(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        layers, width = [], 3
        for size in (16, "pool", 24, 24, "pool"):
            if size == "pool":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(width, size, 3, padding=1), nn.ReLU(inplace=True)]
                width = size
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Linear(width * 4, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, classes)
        )

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


def make():
    model = Vgg()
    model.features = nn.DataParallel(model.features)
    return model


def batch(step):
    return (torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step)),)


def loss_of(model, inputs):
    return F.cross_entropy(model(*inputs), torch.arange(4))


def test_features_in_a_wrapper_and_a_classifier_beside_them():
    model = finished(make, batch, loss_of)
    convs = [layer for layer in model.features.module if isinstance(layer, nn.Conv2d)]
    assert model.classifier[0].in_features == 4 * convs[-1].out_channels
    assert sum(conv.out_channels for conv in convs) < 64


def test_the_whole_model_in_a_wrapper():
    model = finished(lambda: nn.DataParallel(Vgg()), batch, loss_of)
    assert type(model) is nn.DataParallel
    assert model.module.features[0].out_channels == model.module.features[3].in_channels
