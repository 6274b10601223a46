"""An operator between two layers: what of the first may go, proved by the cut itself."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from helpers.between import convs, free, grouped, linears
from helpers.choices import third
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import rnn

from ocsfast.cut.removal import cut_model

# x is [2, 6, 8] behind a linear layer; all 8 features may go.
ON_FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    # spellings
    "abs_": lambda x: (x + 1).abs_(),
    "absolute_": lambda x: (x + 0).absolute_(),
    "gelu_": lambda x: torch.ops.aten.gelu_(x + 0),
    "mish, in place": lambda x: F.mish(x + 0, inplace=True),
    "multiply, divide, subtract": lambda x: torch.subtract(torch.multiply(x, x), torch.divide(x, 2.0)),
    "true_divide, floor_divide, negative": lambda x: torch.true_divide(x, 2).negative() + x // 2,
    "arctan, fix": lambda x: torch.arctan(x) + x.fix(),
    "comparisons": lambda x: x * ((torch.greater(x, 0) & (x < 1)) | ~(x != -1) ^ (x > 2)),
    "special functions": lambda x: torch.special.erf(x) + torch.special.expit(x),
    "frexp": lambda x: torch.frexp(x)[0],
    "complex numbers": lambda x: torch.complex(x, x).abs() + torch.polar(x, x).real,
    "clamped by tensors": lambda x: x.clamp(x - 1, x.mean(1, keepdim=True)),
    "addcmul, addcdiv, lerp": lambda x: torch.lerp(x.addcmul(x, x), x.addcdiv(x, x.exp()), x.sigmoid()),
    "random numbers": lambda x: x + torch.poisson(x.exp()) + torch.normal(x, x.exp()),
    "written to out=": lambda x: torch.add(x, x, out=torch.empty_like(x)),
    # losses
    "mse": lambda x: x * F.mse_loss(x, x.sigmoid()),
    "mse of each": lambda x: F.mse_loss(x, x.sigmoid(), reduction="none"),
    "mse summed": lambda x: x * F.mse_loss(x, 2 * x, reduction="sum"),
    "l1 and its smooth forms": lambda x: x * (F.l1_loss(x, 2 * x) + F.smooth_l1_loss(x, x.exp())),
    "huber": lambda x: x * F.huber_loss(x, x.exp()),
    "binary cross entropy": lambda x: x * F.binary_cross_entropy(x.sigmoid(), x.tanh().square()),
    "binary cross entropy of logits": lambda x: x * F.binary_cross_entropy_with_logits(x, x.sigmoid()),
    "divergence": lambda x: x * F.kl_div(x.log_softmax(-1), x.softmax(-1), reduction="batchmean"),
    "divergence of each": lambda x: F.kl_div(x, x.sigmoid(), reduction="none"),
    "cosine embedding": lambda x: x * F.cosine_embedding_loss(x[0], x[1], torch.ones(6)),
    "cosine similarity": lambda x: x * F.cosine_similarity(x, 2 * x + x.abs(), dim=-1)[..., None],
    "pairwise distance": lambda x: x * F.pairwise_distance(x, x.abs(), eps=0.0)[..., None],
    "margins": lambda x: x * (F.soft_margin_loss(x, x.sign()) + F.margin_ranking_loss(x, 2 * x, -x)),
    "triplet": lambda x: x * F.triplet_margin_loss(x, 2 * x, x.square()),
    "poisson": lambda x: x * F.poisson_nll_loss(x, x.sigmoid()),
    # products
    "cdist": lambda x: torch.cdist(x, x.exp() - 1) @ x,
    "pdist, dist": lambda x: x * F.pdist(x[0]).mean() * torch.dist(x, 2 * x),
    "addmv": lambda x: torch.addmv(x[0, 0], x[0].t(), x[0].mean(1)),
    "addbmm": lambda x: torch.addbmm(x[0], x @ x.transpose(1, 2), x),
    "addr, outer": lambda x: (
        torch.addr(x[0], x[0].mean(1), x[0, 0]) + torch.outer(x[1].mean(1), x[1, 1])
    ),
    "inner": lambda x: x * torch.inner(x, x.mean(1))[..., :1],
    "tensordot": lambda x: x * torch.tensordot(x, x[0, 0], 1)[..., None],
    "chains": lambda x: torch.linalg.multi_dot([x[0], x[1].t(), x[0]]),
    "kron": lambda x: torch.kron(x, torch.ones(1, 2, 1)),
    "cross": lambda x: torch.linalg.cross(x[:, :3], x[:, 3:], dim=1),
    "norms": lambda x: x * x.norm() + torch.linalg.matrix_norm(x)[:, None, None] * x,
    "trace": lambda x: x * torch.trace(x[0] @ x[1].t()),
    # places
    "diagonal": lambda x: torch.diagonal(x.transpose(1, 2) @ x, dim1=1, dim2=2),
    "diag_embed": lambda x: x @ torch.diag_embed(x.mean(1)),
    "swapped": lambda x: x.movedim(1, 2).swapdims(1, 2).unsafe_chunk(2, 1)[0],
    "stacks": lambda x: torch.vstack([x[0], x[1]]) + torch.dstack([x[0], x[1]]).sum(-1).repeat(2, 1),
    "columns": lambda x: torch.cat(torch.column_stack([x[0].t(), x[1].t()]).t().hsplit(2), -1),
    "broadcast together": lambda x: sum(torch.broadcast_tensors(x, x[:, :1])),
    "broadcast to a size": lambda x: x * x.mean(1, True).broadcast_to(x.shape),
    "fliplr": lambda x: x.fliplr(),
    "diff, trapezoid": lambda x: x.diff(dim=1) * torch.trapezoid(x, dim=1)[:, None],
    "bags of rows": lambda x: F.embedding_bag(torch.tensor([[0, 2], [1, 1]]), x[0]),
}


@pytest.mark.parametrize("between", ON_FEATURES.values(), ids=list(ON_FEATURES))
@pytest.mark.filterwarnings("ignore:An output with one or more")
def test_features_pass(between):
    assert free(linears(between), "first.weight") == 8


def gram(x: Tensor) -> Tensor:
    """The product of every two channels of [n, c, h, w]: [n, c, c]."""
    return torch.einsum("nchw,ndhw->ncd", x, x)


# x is [2, 8, 8, 8] behind a convolution; all 8 channels may go, and the operator looks at those left.
OVER_CHANNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "amax": lambda x: x * x.amax(1, keepdim=True),
    "amin over several": lambda x: x * x.amin((1, 2), keepdim=True),
    "max": lambda x: x * x.max(1, keepdim=True).values,
    "min without its dimension": lambda x: x * x.min(1)[0][:, None],
    "max of all": lambda x: x * x.max(),
    "aminmax": lambda x: x * torch.aminmax(x, dim=1, keepdim=True)[0],
    "softmax": lambda x: x.softmax(1),
    "softmin": lambda x: F.softmin(x, 1),
    "log_softmax": lambda x: x.log_softmax(1),
    "gumbel": lambda x: F.gumbel_softmax(x, dim=1),
    "logsumexp": lambda x: x * x.logsumexp(1, keepdim=True),
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "prod": lambda x: x * x.prod(1, keepdim=True),
    "cumprod": lambda x: x.cumprod(1),
    "cumsum, in place": lambda x: (x + 0).cumsum_(1),
    "all": lambda x: x * (x > -1).all(1, keepdim=True),
    "any": lambda x: x * (x > 2).any(1, keepdim=True),
    "nanmean": lambda x: x * x.nanmean(1, keepdim=True),
    "renorm": lambda x: x.renorm(2, 1, 1.0),
    "normalized by one": lambda x: F.normalize(x, p=1),
    "diagonal by einsum": lambda x: x * torch.einsum("ncc->nc", gram(x))[..., None, None],
    "trace by einsum": lambda x: x * torch.einsum("ncc->n", gram(x)).view(-1, 1, 1, 1),
    "a letter summed away": lambda x: (
        x * torch.einsum("nchw,nd->nc", x, x.mean((2, 3)))[..., None, None]
    ),
    "dots in the middle": lambda x: torch.einsum("n...h,nc->nc...h", x.mean(1), x.mean((2, 3))),
    "letters by number": lambda x: torch.einsum(x, [0, 1, ...], x, [0, 1, ...], [0, 1, ...]),
    "letters of size one": lambda x: torch.einsum("nchw,nchw->nchw", x, x.mean((2, 3), keepdim=True)),
    "turned": lambda x: x.rot90(1, (2, 3)),
    "fractional pool": lambda x: F.fractional_max_pool2d(x, 2, output_size=4),
    "pooled and put back": lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
    "the place of the largest in a row": lambda x: x * x.max(2, keepdim=True).indices,
    "gradient": lambda x: torch.gradient(x, dim=2)[0],
}


@pytest.mark.parametrize("between", OVER_CHANNELS.values(), ids=list(OVER_CHANNELS))
def test_channels_pass(between):
    assert free(convs(between), "first.weight") == 8


STAYING: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "places of the largest": (lambda x: x * x.max(1, keepdim=True).indices, r"aten\.max "),
    "argmax": (lambda x: x * x.argmax(1, keepdim=True), r"aten\.argmax "),
    "cumprod, in place": (lambda x: (x + 0).cumprod_(1), r"aten\.cumprod "),
    "cumulative maximum": (lambda x: x.cummax(1).values, r"aten\.cummax "),
    "classes": (lambda x: x * F.cross_entropy(x, torch.zeros(2, 8, 8).long()), "number the classes"),
    "an inverse": (lambda x: x * torch.linalg.inv(gram(x)).mean(), "all rows and columns"),
    "singular values": (lambda x: x * torch.linalg.svdvals(gram(x)).mean(), "all rows and columns"),
    "strides": (lambda x: x.as_strided(x.shape, x.stride()), "memory by place"),
}


@pytest.mark.parametrize(("between", "reason"), STAYING.values(), ids=list(STAYING))
def test_channels_stay_for_a_reason(between, reason):
    families = convs(between)
    assert free(families, "first.weight") == 0
    assert any(re.search(reason, f.reason) for f in families.frozen), families.frozen


def written(how: str, x: Tensor) -> Tensor:
    """Writes into a tensor or a view of it, and reads the tensor that the view is of."""
    out = x + 1
    if how == "a transposed view":
        out.transpose(1, 2).mul_(x.transpose(1, 2))
    elif how == "a diagonal":
        out = x.transpose(1, 2) @ x
        torch.diagonal(out, dim1=1, dim2=2).add_(1.0)
        return x @ out
    elif how == "its own shape":
        out.transpose_(1, 2).transpose_(1, 2).unsqueeze_(0).squeeze_(0)
    elif how == "neighbours":
        out[..., 1:].add_(x[..., :-1])
    elif how == "a flipped one":
        out.copy_(x.flip(2))
    else:
        out = torch.empty(2, 6, 8)
        torch.cat([x[..., :4], x[..., 4:]], -1, out=out)
    return out


@pytest.mark.parametrize(
    ("how", "left"),
    [
        ("a transposed view", 8),
        ("a diagonal", 8),
        ("its own shape", 8),
        ("neighbours", 0),  # all are tied to one another
        ("a flipped one", 8),  # in pairs
        ("a size of the code's own", 0),
    ],
)
def test_what_is_written_through_a_view_reaches_its_base(how, left):
    assert free(linears(lambda x: written(how, x)), "first.weight") == left


class Pooled3d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv3d(3, 8, 3, padding=1), nn.Conv3d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, places = F.max_pool3d(self.first(x), 2, return_indices=True)
        return self.second(F.max_unpool3d(x, places, 2))


class Pooled1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, places = F.max_pool1d(self.first(x), 2, return_indices=True)
        return self.second(F.max_unpool1d(x, places, 2))


@pytest.mark.parametrize(("model", "side"), [(Pooled1d, (8,)), (Pooled3d, (4, 4, 4))])
def test_maxima_are_put_back_by_channel(model, side):
    assert free(grouped(model(), torch.randn(2, 3, *side)), "first.weight") == 8


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags(mode):
    model = nn.Sequential(nn.EmbeddingBag(20, 8, mode=mode), nn.Linear(8, 3))
    families = grouped(model, torch.randint(20, (3, 4)))
    assert free(families, "0.weight", 1) == 8
    assert free(families, "0.weight", 0) == 0
    assert next((a.module, a.name) for a in families.attributes) == ("0", "embedding_dim")


def test_an_embedding_of_bounded_norm():
    model = nn.Sequential(nn.Embedding(20, 8, max_norm=1.0), nn.Linear(8, 3))
    before = model[0].weight.detach().mul_(3).clone()
    assert free(grouped(model, torch.randint(20, (3, 4))), "0.weight", 1) == 8
    assert torch.equal(model[0].weight, before)


def test_experts_stay_so_that_their_neurons_may_go():
    """A softmax over experts would let these go, but then no width of a stack of matrices could."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(6, 3)
            self.up, self.down = nn.Parameter(torch.randn(3, 6, 10)), nn.Parameter(torch.randn(3, 10, 4))

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.einsum("ni,eih->neh", x, self.up).tanh()
            return torch.einsum("neh,eho,ne->no", hidden, self.down, self.gate(x).softmax(-1))

    first = nn.Linear(5, 6)
    families = grouped(nn.Sequential(first, Experts()), torch.randn(4, 5))
    assert sorted(f.size for f in families.families) == [6, 10]
    assert any("two others shrink already" in f.reason for f in families.frozen)


class Packed(nn.Module):
    """Sequences of several lengths: what of each is packed depends on the batch."""

    def __init__(self, cell: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 10)
        self.cell, self.second = cell(10, 12, 2, bidirectional=True), nn.Linear(24, 3)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        x = rnn.pack_padded_sequence(self.embed(ids).transpose(0, 1), lengths, enforce_sorted=False)
        x, _ = rnn.pad_packed_sequence(self.cell(x)[0], total_length=ids.shape[1])
        return self.second(x)


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences_of_several_lengths(cell):
    """They are traced at full length; the cut model is right at any."""
    model = Packed(cell).double()
    batch = torch.randint(20, (4, 6)), torch.tensor([6, 2, 5, 2])
    families = grouped(model, *batch)
    assert sorted(f.size for f in families.families) == [10, 12]
    pruned = third(families)
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for axis in families.axes:
            gone = torch.nonzero((axis.groups >= 0) & pruned[axis.groups]).flatten()
            zeroed.get_parameter(axis.tensor).index_fill_(axis.axis, gone, 0.0)
    cut_model(model, families, pruned)
    assert model.cell.hidden_size < 12
    assert torch.allclose(model(*batch), zeroed(*batch), atol=1e-12)


class SplitAttention(nn.Module):
    """ResNeSt's: every channel is a mixture of its two branches, shared out by a softmax over these."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.share, self.second = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        n, _, h, w = x.shape
        x = x.view(n, 2, -1, h, w)
        share = self.share(x.sum(1).mean((2, 3), keepdim=True)).view(n, 1, 2, -1).transpose(1, 2)
        return self.second((x * share.softmax(1).reshape(n, 2, -1, 1, 1)).sum(1))


def test_branches_that_a_softmax_shares_out_stay_so_that_channels_may_go():
    families = grouped(SplitAttention(), torch.randn(2, 3, 8, 8))
    assert [f.size for f in families.families] == [8]
    assert free(families, "first.weight") == free(families, "share.weight") == 16
