"""Distillation from a feature map: the student imitates what a hook sees in a teacher."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

import ocsfast

EPOCHS = 24
torch.manual_seed(0)
images, labels = (torch.tensor(x, dtype=torch.float32) for x in load_digits(return_X_y=True))
images, labels = images.view(-1, 1, 8, 8) / 8 - 1, labels.long()
train, test, seen = torch.arange(800), slice(1200, None), {}


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.conv3, self.fc = nn.Conv2d(32, 24, 3, padding=1), nn.Linear(24, 10)

    def forward(self, x):
        x = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).relu()
        return self.fc(self.conv3(x).relu().mean((2, 3)))


def epoch_of(optimizer, loss_of):
    for index in train[torch.randperm(len(train))].split(50):
        loss = loss_of(images[index], labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


teacher, student = Network(), Network()
first = torch.optim.AdamW(teacher.parameters(), lr=1e-2)
for _ in range(4):
    epoch_of(first, lambda x, y: cross_entropy(teacher(x), y))
teacher.eval().requires_grad_(False)
teacher.conv3.register_forward_hook(lambda module, args, output: seen.update(teacher=output))
student.conv3.register_forward_hook(lambda module, args, output: seen.update(student=output))


def imitating(x, y):
    teacher(x)
    return cross_entropy(student(x), y) + mse_loss(seen["student"], seen["teacher"])


optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
for _ in range(EPOCHS):
    epoch_of(optimizer, imitating)
    report = ocsfast.step(student, 0.5, epochs=EPOCHS)
hits = (student.eval()(images[test]).argmax(1) == labels[test]).float().mean()
print(f"{1 - report.cost / report.cost_dense:.3f} of the MACs gone, accuracy {hits:.3f}")
ocsfast.save(student, "student.safetensors")
again = Network()
ocsfast.load(again, "student.safetensors")
torch.testing.assert_close(again.eval()(images[test]), student(images[test]))
