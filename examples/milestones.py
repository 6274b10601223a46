"""A plain loop: SGD, MultiStepLR, and one line for the pruning."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import ocsfast

EPOCHS = 12
torch.manual_seed(0)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
labels = torch.tensor(digits.target)
train, test = torch.arange(1200), slice(1200, None)


def conv(i, o):
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())


def network():
    pool = nn.AdaptiveAvgPool2d(2)
    body = conv(1, 16), conv(16, 32), nn.MaxPool2d(2), conv(32, 32)
    return nn.Sequential(*body, pool, nn.Flatten(), nn.Linear(128, 10))


model = network()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[6, 10])
best = 0.0
for epoch in range(EPOCHS):
    model.train()
    for index in train[torch.randperm(len(train))].split(64):
        loss = cross_entropy(model(images[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scheduler.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
    report = ocsfast.step(model, 0.5, epochs=EPOCHS, accuracy=accuracy)
    if report.cut:  # the best so far was a larger model
        best = 0.0
    best = max(best, accuracy)
    print(f"epoch {epoch + 1}: {report.stage}, accuracy {accuracy:.3f}, best {best:.3f}")

print(f"{1 - report.cost / report.cost_dense:.3f} of the MACs gone")
ocsfast.save(model, "milestones.safetensors")
again = network()
ocsfast.load(again, "milestones.safetensors")
torch.testing.assert_close(again.eval()(images[test]), model(images[test]))
