"""Deep supervision: an auxiliary head runs in both modes and is returned in training only."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, interpolate

import ocsfast

EPOCHS, CLASSES = 10, 3
torch.manual_seed(0)
images = torch.tensor(load_digits().images, dtype=torch.float32).unsqueeze(1) / 16
masks = (images[:, 0] > 0.3).long() + (images[:, 0] > 0.7).long()  # paper, edge, ink
inputs = images + 0.1 * torch.randn_like(images)
train, test = torch.arange(600), slice(1200, 1500)


def block(i, o, stride=1):
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU())


class UNet(nn.Module):
    def __init__(self, c=8):
        super().__init__()
        self.enter, self.down, self.deep = block(1, c), block(c, 2 * c, 2), block(2 * c, 2 * c)
        self.up = nn.ConvTranspose2d(2 * c, c, 2, 2)
        self.join, self.head = block(2 * c, c), nn.Conv2d(c, CLASSES, 1)
        self.aux = nn.Conv2d(2 * c, CLASSES, 1)

    def forward(self, x):
        skip = self.enter(x)
        low = self.deep(self.down(skip))
        aux = self.aux(low)
        out = self.head(self.join(torch.cat([self.up(low), skip], 1)))
        return (out, interpolate(aux, out.shape[2:])) if self.training else out


model = UNet()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
for epoch in range(EPOCHS):
    model.train()
    for index in train[torch.randperm(len(train))].split(50):
        out, aux = model(inputs[index])
        loss = cross_entropy(out, masks[index]) + 0.5 * cross_entropy(aux, masks[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scheduler.step()
    report = ocsfast.step(model, 0.6, epochs=EPOCHS)
    print(f"epoch {epoch + 1}: {report.stage}, loss {loss.item():.3f}")

hits = (model.eval()(inputs[test]).argmax(1) == masks[test]).float().mean()
print(f"{1 - report.cost / report.cost_dense:.3f} of the MACs gone, accuracy {hits:.3f}")
ocsfast.save(model, "deep.safetensors")
again = UNet()
ocsfast.load(again, "deep.safetensors")
torch.testing.assert_close(again.eval()(inputs[test]), model(inputs[test]))
