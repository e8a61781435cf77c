"""The solver's formula: one linear update per step, and the integrals of l, s, b that its coefficients are made of.

In y = x0 + sigma n and lambda = -log sigma the ODE is dy/dlambda = -l y - f with f = (1 - l) y - D (paper, eq. 5-8
for VP; restated for y). From node lambda_s, with integrals all starting at lambda_s,

    L = int l,   S = int s,   B = int exp(-S) b,   E = exp(L + S),
    g(lambda) = exp(-S) f - B,
    y_t = exp(-L_t) [ y_s - C - sum_k J_k g_k ],   C = int E B,   J_k = int E (lambda - lambda_s)^k / k!

where g_k approximates the k-th derivative of g at lambda_s (paper, eq. 11, 12 and appendix B). g_k is a linear
combination of g at a few nodes, so every update is linear in y_s and in the f of those nodes.

The code keeps m = -f = D - (1 - l) y, everywhere: without statistics (l = 1) m is the denoised D itself, and fitted weights
multiply D. So an update reads

    y_t = decay y_s + offset + sum_j weights_j m_j,
    decay = exp(-L_t),   weights_j = exp(-L_t - S_j) sum_k J_k M_kj,   offset = exp(-L_t) [ sum_jk J_k M_kj B_j - C ]

with M the matrix of `derivative_weights`. The coefficients belong to channels (or elements) and depend on the schedule
alone. They are computed here, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from .ems import EMS

__all__ = ["StepIntegrals", "Update", "data_prediction_step", "derivative_weights", "integrate_step", "make_update"]

_GAUSS_POINTS = 6
_LONGEST_PANEL = 0.25
"""Six Gauss points on panels of at most 0.25 in lambda leave the quadrature error below 1e-13."""
_VALUES = 2**17
"""Of l, s or b, quadrature points times elements, that are integrated at a time: some twenty times as many are alive."""


@dataclass(frozen=True)
class StepIntegrals:
    """Integrals over one step from lambda_s to lambda_t, each [C, ...] in float64.

    `moments[k]` is exp(-L) J_k and `offset` is exp(-L) C of the module's formulas: scaled so that nothing overflows.
    """

    L: Tensor
    S: Tensor
    B: Tensor
    offset: Tensor
    moments: tuple[Tensor, ...]


@dataclass(frozen=True)
class Update:
    """x_t = decay x_s + offset + sum_j weights[j] m_{nodes[j]}: every step of the solver, fitted or not, in x or in y.

    Args:
        decay, offset: [C, ...] float64, or [1] where all channels agree.
        weights: the same, one for each node.
        nodes: indices of the evaluations whose m = D - (1 - l) y the weights multiply.
    """

    decay: Tensor
    offset: Tensor
    weights: tuple[Tensor, ...]
    nodes: tuple[int, ...]

    @classmethod
    def of_numbers(cls, decay: float, weights: Sequence[float], nodes: Sequence[int]) -> Update:
        """An update without offset whose coefficients are plain numbers."""
        number = lambda v: torch.tensor([v], dtype=torch.float64)  # noqa: E731
        return cls(number(decay), number(0.0), tuple(map(number, weights)), tuple(nodes))

    def in_host_space(self, alpha_s: float, alpha_t: float) -> Update:
        """The same update of x = alpha y (`space`): x_t / alpha_t = decay x_s / alpha_s + ..."""
        weights = tuple(w * alpha_t for w in self.weights)
        return replace(self, decay=self.decay * (alpha_t / alpha_s), offset=self.offset * alpha_t, weights=weights)

    def after_redoing(self, taken: Update, redone: Update) -> Update:
        """This update and the correction before it as one update, from the x where the model was called.

        `taken` led there and `redone` leads over the same step again, so both begin with the same decay x_s. They differ by
        their offsets and weights alone: x_redone = x_taken + (offsets' difference) + sum_j (weights' difference)_j m_j. So the
        x before the step is not needed any more, and the latent is gone through once instead of twice.
        """
        weights = dict(zip(redone.nodes, redone.weights, strict=True))
        for node, weight in zip(taken.nodes, taken.weights, strict=True):
            weights[node] = weights[node] - weight if node in weights else -weight
        weights = {node: self.decay * weight for node, weight in weights.items()}
        for node, weight in zip(self.nodes, self.weights, strict=True):
            weights[node] = weights[node] + weight if node in weights else weight
        offset = self.offset + self.decay * (redone.offset - taken.offset)
        return Update(self.decay, offset, tuple(weights.values()), tuple(weights))


@lru_cache(maxsize=1)
def _gauss() -> tuple[Tensor, Tensor, Tensor]:
    """Nodes and weights on [0, 1], and the matrix that integrates from 0 to each node (collocation)."""
    n = _GAUSS_POINTS
    # Golub-Welsch: eigenvalues of the Jacobi matrix of the Legendre polynomials.
    k = torch.arange(1, n, dtype=torch.float64)
    beta = k / (4 * k**2 - 1).sqrt()
    values, vectors = torch.linalg.eigh(torch.diag(beta, 1) + torch.diag(beta, -1))
    nodes, weights = (values + 1) / 2, vectors[0] ** 2
    powers = torch.arange(n, dtype=torch.float64)
    vandermonde = nodes[:, None] ** powers
    to_node = nodes[:, None] ** (powers + 1) / (powers + 1)
    return nodes, weights, torch.linalg.solve(vandermonde.T, to_node.T).T


def _panels(grid: Tensor, lam_s: float, lam_t: float) -> Tensor:
    """Ends of the quadrature panels: the step's ends, the statistics' knots inside it, and points in between."""
    low, high = min(lam_s, lam_t), max(lam_s, lam_t)
    knots = grid[(grid > low) & (grid < high)].tolist()
    points = [low]
    for a, b in pairwise([low, *knots, high]):
        pieces = max(1, math.ceil((b - a) / _LONGEST_PANEL))
        points += [a + (b - a) * (j + 1) / pieces for j in range(pieces)]
    edges = torch.tensor(points, dtype=torch.float64)
    return edges if lam_t >= lam_s else edges.flip(0)


def integrate_step(ems: EMS, lam_s: float, lam_t: float, orders: int) -> StepIntegrals:
    """Integrals of the module's formulas from `lam_s` to `lam_t` (either direction), J_0 .. J_{orders-1}.

    Statistics per element are integrated some elements at a time: all at once would take gigabytes.
    """
    edges = _panels(ems.lambdas.to(torch.float64), lam_s, lam_t)
    shape = ems.l.shape[1:]
    most = max(_VALUES // (_GAUSS_POINTS * len(edges)), 1)
    columns = (ems.columns(part) for part in torch.arange(shape.numel()).split(most)) if ems.per_element else [ems]
    parts = [_integrals(part, edges, lam_s, orders) for part in columns]
    if len(parts) == 1:
        L, S, B, offset, *moments = (v.reshape(shape) for v in parts[0])
    else:
        L, S, B, offset, *moments = (torch.cat(v).reshape(shape) for v in zip(*parts, strict=True))
    return StepIntegrals(L, S, B, offset, tuple(moments))


def _integrals(ems: EMS, edges: Tensor, lam_s: float, orders: int) -> tuple[Tensor, ...]:
    """L, S, B, exp(-L) C and exp(-L) J_k over the panels between `edges`, [columns] each."""
    nodes, weights, to_node = _gauss()
    left, width = edges[:-1], edges.diff()
    lam = left[:, None] + width[:, None] * nodes  # [panels, gauss]
    l, s, b = (v.reshape(len(left), len(nodes), -1) for v in ems.at(lam.flatten()))
    h = width.reshape(-1, 1, 1)

    def running(values: Tensor) -> tuple[Tensor, Tensor]:
        """Integral from lam_s to each node, and to the last edge."""
        whole = torch.tensordot(values, weights, dims=([1], [0])) * h[:, 0]
        before = torch.cat([torch.zeros_like(whole[:1]), whole.cumsum(0)])
        inside = torch.einsum("ij,pjc->pic", to_node, values) * h
        return before[:-1, None] + inside, before[-1]

    def total(values: Tensor) -> Tensor:
        return (torch.tensordot(values, weights, dims=([1], [0])) * h[:, 0]).sum(0)

    L, L_t = running(l)
    S, S_t = running(s)
    B, B_t = running((-S).exp() * b)
    E = (L - L_t + S).exp()
    distance = (lam - lam_s)[..., None]
    moments = (total(E * distance**k / math.factorial(k)) for k in range(orders))
    return L_t, S_t, B_t, total(E * B), *moments


def derivative_weights(lambdas: Sequence[float], pseudo: bool) -> Tensor:
    """Weights M [n, n] with g_k = sum_j M[k, j] g(lambda_j): derivatives 0 .. n-1 at the first of n nodes.

    True: those of the interpolating polynomial, i.e. the solution of
    sum_k (lambda_j - lambda_0)^k / k! g_k = g_j - g_0 (paper, eq. 13). Pseudo: k! times the k-th divided difference
    of the first k + 1 nodes (paper, appendix D.1).
    """
    n = len(lambdas)
    nodes = torch.tensor(lambdas, dtype=torch.float64) - lambdas[0]
    scale = nodes.abs().max().item() or 1.0
    nodes = nodes / scale
    factorial = torch.tensor([math.factorial(k) for k in range(n)], dtype=torch.float64)
    if pseudo:
        weights = torch.zeros(n, n, dtype=torch.float64)
        for k in range(n):
            for j in range(k + 1):
                others = torch.cat([nodes[:j], nodes[j + 1 : k + 1]])
                weights[k, j] = 1 / (nodes[j] - others).prod()
    else:
        weights = torch.linalg.inv(nodes[:, None] ** torch.arange(n, dtype=torch.float64))
    return weights * factorial[:, None] / scale ** torch.arange(n, dtype=torch.float64)[:, None]


def make_update(
    steps: Sequence[StepIntegrals], lambdas: Sequence[float], start: int, nodes: Sequence[int], pseudo: bool
) -> Update:
    """The update of y from node `start` to `start + 1` with g expanded through `nodes` (the first is `start`).

    Args:
        steps: integrals of every step up to `start`, step i leading from node i to node i + 1.
        lambdas: half log-SNR of every node.
        start: the node that the step begins at.
        nodes: indices of the evaluations used, at most len(steps[start].moments) of them.
        pseudo: how derivatives are taken, see `derivative_weights`.
    """
    step = steps[start]
    M = derivative_weights([lambdas[j] for j in nodes], pseudo)
    offset, weights = -step.offset, []
    for j, node in enumerate(nodes):
        share = sum((J * M[k, j] for k, J in zip(range(len(nodes)), step.moments)), torch.zeros_like(step.offset))
        S, B = _from_node(steps, start, node)
        weights.append((-S).exp() * share)
        offset = offset + share * B
    return Update((-step.L).exp(), offset, tuple(weights), tuple(nodes))


def _from_node(steps: Sequence[StepIntegrals], start: int, node: int) -> tuple[Tensor, Tensor]:
    """S(lambda_node) and B(lambda_node), integrals beginning at lambda_start."""
    S, B = torch.zeros_like(steps[start].S), torch.zeros_like(steps[start].B)
    if node > start:
        for i in range(start, node):
            B = B + (-S).exp() * steps[i].B
            S = S + steps[i].S
    else:
        for i in range(start - 1, node - 1, -1):
            S = S - steps[i].S
            B = B - (-S).exp() * steps[i].B
    return S, B


def data_prediction_step(level_s: float, level_t: float, alpha_s: float, alpha_t: float, node: int) -> Update:
    """The exact first-order data-prediction step in host space, from the evaluation `node` (there m = D).

    x_t = (n_t / n_s) x_s + (alpha_t - alpha_s n_t / n_s) D, with n the amplitude of the noise in x (the host's level).
    It is the limit of the general step for l = 1, s = b = 0, finite where lambda is not: from t = 1 of a flow
    (lambda = -inf) and to sigma = 0 (lambda = inf), where it returns D.
    """
    ratio = level_t / level_s
    return Update.of_numbers(ratio, [alpha_t - alpha_s * ratio], [node])
