"""Freeze, then unfreeze: what is frozen is left alone, and may go once it trains again."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import ocsfast

EPOCHS = 14
torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
labels = torch.tensor(digits.target)
train, test = torch.arange(800), slice(1200, None)


def conv(i, o):
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.body = conv(1, 16), nn.Sequential(conv(16, 24), conv(24, 24))
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


model = Network()
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
for epoch in range(EPOCHS):
    model.body.requires_grad_(not 3 <= epoch < 6)
    model.train()
    before = model.body[0][0].weight.detach().clone()
    for index in train[torch.randperm(len(train))].split(50):
        loss = cross_entropy(model(images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    same = torch.equal(before, model.body[0][0].weight)
    scheduler.step()
    report = ocsfast.step(model, 0.6, epochs=EPOCHS, deadline=0.8)
    print(f"epoch {epoch + 1}: {report.stage}, body {'as it was' if same else 'trained'}")

print(f"{1 - report.cost / report.cost_dense:.3f} of the MACs gone")
model.eval()
print(f"accuracy {(model(images[test]).argmax(1) == labels[test]).float().mean():.3f}")
ocsfast.save(model, "freezing.safetensors")
again = Network()
ocsfast.load(again, "freezing.safetensors")
torch.testing.assert_close(again.eval()(images[test]), model(images[test]))
