"""Steps without statistics: coefficients that are good on the trajectories of several small diffusion models at once.

Without statistics nothing is known of the model but that it is a diffusion model. So every step is a linear update

    y_t = (sigma_t / sigma_s) y_s + (1 - sigma_t / sigma_s) D_s + sum_j v_j (D_j - D_s),        y = x0 + sigma n,

exact where D is constant (the first two terms are DDIM), whose factors v of the last evaluations are chosen by weighted
least squares on typical trajectories y*(lambda) with D*(lambda). They are kept in `typical.safetensors`, which
`benchmarks/typical.py` makes on the development networks of the zoo, guided and not. A formula's factors come from polynomials
instead: polynomials of D in lambda (DPM-Solver++), of the noise in sigma (DEIS) or of the noise in the number of the step
(iPNDM) each win on some schedules and lose on others.

The choice goes through the schedule once, in closed loop. Where the run is off a trajectory by e, the denoiser answers

    D = D*(lambda) + response(lambda) e,        e = y - y*(lambda),

with a response that was measured along real errors: 0 under much noise, towards 1 at the clean end. Then every y and D of
the run is known for every trajectory before the first model call, errors included, and each step aims at y* itself. The
factors of a step minimise the sum over trajectories of |y_t - y*_t|^2 / (smallest possible of that trajectory + `_FLOOR` of
DDIM's), so that no trajectory counts for more than can be gained on it, plus `_RIDGE` guidance^2 |v|^2: what the response
does not foresee in the answers to errors grows with the guidance scale, and large factors would blow it up. Where the guidance
scale of the run is known, trajectories of scales near it count most. After each evaluation the step that led there is redone
with it (as UniC does, arXiv 2302.04867), then the next one is taken.

Nothing here is infinite at sigma = 0 or at t = 1 of a flow, so these are steps like all others: the last one may extrapolate
D, and D at t = 1 serves as history.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .coefficients import Update
from .space import Space

__all__ = ["FILE", "LAST", "MOST_STEPS", "Trajectories", "load_trajectories", "stored_trajectories", "typical_steps"]

FILE = Path(__file__).with_name("typical.safetensors")
LAST = 4
"""How many evaluations an update looks back to."""
MOST_STEPS = 40
"""With more steps a formula is taken: its order of convergence is proven on every model, while this choice was measured up to
30 steps and, on a network with random weights at 80, converged more slowly (tests/pipelines/test_cli.py)."""
_RIDGE, _FLOOR, _OWN_RIDGE = 0.1, 0.1, 1e-2
_UNKNOWN_GUIDANCE = 3.0
_NEAR_GUIDANCE = 0.5
"""Trajectories of a guidance scale that is off by a factor of e to this power count exp(-1/2) times."""
_NEGLIGIBLE = 1e-12
"""Squared errors of DDIM below this, where the data's variance is 1, are not worth a higher order."""


@dataclass(frozen=True, eq=False)
class Trajectories:
    """D* along trajectories of several models on one grid, projected on their main directions, less D at their ends.

    y* follows from D* by dy/dlambda = D - y; less sigma times the start noise it begins as D* does.

    Args:
        lambdas: [K] increasing, evenly spaced.
        denoised: [K, F]; F numbers are the coordinates of all trajectories side by side.
        response: [K, F] of D to an error of y.
        owner: [F] which model and guidance scale a coordinate belongs to, 0 .. M - 1.
        guidance: [M] that scale.
    """

    lambdas: Tensor
    denoised: Tensor
    response: Tensor
    owner: Tensor
    guidance: Tensor

    def weights(self, guidance: float | None) -> Tensor:
        """[M], 1 in sum: how much each counts in a run of this guidance scale; all alike where it is not known."""
        if guidance is None:
            return torch.full_like(self.guidance, 1 / len(self.guidance))
        known = self.guidance.log()
        nearest = min(max(math.log(max(abs(guidance), 1.0)), known.min().item()), known.max().item())
        return (-0.5 * ((known - nearest) / _NEAR_GUIDANCE) ** 2).softmax(0)

    @cached_property
    def state(self) -> Tensor:
        """[K, F] y* on the grid."""
        state = [self.denoised[0]]
        for i in range(len(self.lambdas) - 1):
            state.append(self._advanced(state[-1], i, 1.0))
        return torch.stack(state)

    @property
    def _spacing(self) -> float:
        return (self.lambdas[-1] - self.lambdas[0]).item() / (len(self.lambdas) - 1)

    def at(self, lam: float) -> tuple[Tensor, Tensor, Tensor]:
        """D*, y* and the response [F] at any lambda: D* and the response constant below the grid, D* and y* fading above it."""
        low, high = self.lambdas[0].item(), self.lambdas[-1].item()
        place = (min(max(lam, low), high) - low) / self._spacing
        i = min(int(place), len(self.lambdas) - 2)
        fade = math.exp(high - lam) if lam > high else 1.0
        state = self._advanced(self.state[i], i, place - i)
        return self._cubic(self.denoised, i, place - i) * fade, state * fade, self._cubic(self.response, i, place - i)

    def _cubic(self, values: Tensor, i: int, u: float) -> Tensor:
        """The value at u of a spacing beyond grid point i, on the cubic through four grid points around it."""
        first = min(max(i - 1, 0), len(values) - 4)
        weights = torch.tensor(_lagrange(u + i - first - 1), dtype=torch.float64)
        return weights @ values[first : first + 4]

    def _advanced(self, state: Tensor, i: int, u: float) -> Tensor:
        """Y* at u of a spacing beyond grid point i, from y* there: e^-h y + integral of e^(r - h) D*(r) over r from 0 to h."""
        h = u * self._spacing
        state = state * math.exp(-h)
        for node, weight in _GAUSS:
            state = state + h * weight * math.exp(node * h - h) * self._cubic(self.denoised, i, node * u)
        return state

    def varied(self, variants: Sequence[tuple[float, float]]) -> Trajectories:
        """The same trajectories side by side, each moved in lambda (another scale of the data) and of another response.

        Args:
            variants: the shift in lambda and the factor of the response, which stays below 1.
        """
        found = [[self.at(lam - shift) for lam in self.lambdas.tolist()] for shift, _ in variants]
        denoised = torch.cat([torch.stack([row[0] for row in rows]) for rows in found], 1)
        answers = [(factor * torch.stack([row[2] for row in rows])).clamp(max=1) for rows, (_, factor) in zip(found, variants)]
        owner = torch.cat([self.owner + k * len(self.guidance) for k in range(len(variants))])
        return Trajectories(self.lambdas, denoised, torch.cat(answers, 1), owner, self.guidance.repeat(len(variants)))


_GAUSS = ((0.5 - math.sqrt(0.15), 5 / 18), (0.5, 4 / 9), (0.5 + math.sqrt(0.15), 5 / 18))
"""Nodes and weights on [0, 1]."""


def _lagrange(u: float) -> list[float]:
    """Weights of the values at -1, 0, 1, 2 in the cubic through them, at u."""
    return [
        -u * (u - 1) * (u - 2) / 6,
        (u + 1) * (u - 1) * (u - 2) / 2,
        -(u + 1) * u * (u - 2) / 2,
        (u + 1) * u * (u - 1) / 6,
    ]


_VARIANTS = ((-0.8, 1.0), (0.0, 0.5), (0.0, 1.5), (0.8, 1.0))
"""Data of another scale or model space is seen at another lambda, and a response is a mean over pictures that differ in it."""


@lru_cache(maxsize=1)
def stored_trajectories(path: Path = FILE) -> Trajectories:
    """The trajectories of the package as they were measured. The file is a safetensors one; reading it needs torch only."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    values = {}
    for name, entry in json.loads(content[8:start]).items():
        low, high = entry["data_offsets"]
        dtype = {"F32": torch.float32, "I32": torch.int32}[entry["dtype"]]
        flat = torch.frombuffer(bytearray(content[start + low : start + high]), dtype=dtype)
        values[name] = flat.reshape(entry["shape"]).to(torch.float64)
    owner = values["owner"].long()
    return Trajectories(values["lambdas"], values["denoised"], values["response"][:, owner], owner, values["guidance"])


@lru_cache(maxsize=1)
def load_trajectories() -> Trajectories:
    """Those that steps are chosen on: the stored ones, varied."""
    return stored_trajectories().varied(_VARIANTS)


def typical_steps(
    levels: Sequence[float], space: Space, guidance: float | None = None, trajectories: Trajectories | None = None
) -> list[tuple[Update | None, Update]]:
    """The steps for falling host `levels` [n + 1] (`plan.check_levels`), in the host's x.

    Args:
        levels: they may start at t = 1 of a flow and end at 0.
        space: of the host.
        guidance: scale, None where it is not known.
        trajectories: to choose the coefficients on, those of the package if not given.

    Returns:
        for step i the update that redoes step i - 1 with D_i (none at the first), and the one that leads on.
    """
    scale = _UNKNOWN_GUIDANCE if guidance is None else max(abs(guidance), 1.0)
    trajectories = trajectories or load_trajectories()
    loop = _ClosedLoop(tuple(levels), space, trajectories, trajectories.weights(guidance), _RIDGE * scale**2)
    steps = []
    for i in range(len(levels) - 1):
        loop.evaluate(i)
        redone = loop.update(i - 1, i, [i - 1, i, *range(i - 2, -1, -1)][:LAST]) if i else None
        steps.append((redone, loop.update(i, i + 1, list(range(i, -1, -1))[:LAST])))
    return steps


class _ClosedLoop:
    """The run so far on every trajectory: y (corrected, or predicted where not yet) and D at the nodes, [F] each."""

    def __init__(
        self, levels: tuple[float, ...], space: Space, trajectories: Trajectories, weights: Tensor, ridge: float
    ) -> None:
        host = torch.tensor(levels, dtype=torch.float64)
        self.levels, self.alphas = levels, space.alpha_of(host).tolist()
        self.lambdas = space.lambda_of(host).tolist()
        self.owner, self.weights, self.ridge = trajectories.owner, weights, ridge
        found = [trajectories.at(lam) for lam in self.lambdas]
        self.true = [state for _, state, _ in found]
        self.ideal = [(denoised, response) for denoised, _, response in found]
        self.y = [self.true[0]]
        self.denoised: list[Tensor] = []

    def evaluate(self, i: int) -> None:
        """D at node i, where the run is."""
        denoised, response = self.ideal[i]
        self.denoised.append(denoised + response * (self.y[i] - self.true[i]))

    def update(self, start: int, end: int, nodes: list[int]) -> Update:
        """The best update from node `start` (which `nodes` begin with) to `end`; the run is there afterwards."""
        ratio = math.exp(self.lambdas[start] - self.lambdas[end])  # sigma_t / sigma_s, 0 at either infinite end
        ddim = ratio * self.y[start] + (1 - ratio) * self.denoised[start]
        target = self.true[end] - ddim
        factors: list[float] = []
        if len(nodes) > 1:
            changes = torch.stack([self.denoised[j] - self.denoised[start] for j in nodes[1:]], 1)
            v = _best_factors(changes, target, self.owner, self.weights, self.ridge)
            factors, ddim = v.tolist(), ddim + changes @ v
        self.y[end : end + 1] = [ddim]
        weights = [1 - ratio - sum(factors), *factors]
        # In the host's x = alpha y the noise has the amplitude that the host calls its level.
        decay = self.levels[end] / self.levels[start]
        return Update.of_numbers(decay, [w * self.alphas[end] for w in weights], nodes)


def _best_factors(changes: Tensor, target: Tensor, owner: Tensor, weights: Tensor, ridge: float) -> Tensor:
    """Factors v [m], changes @ v near target: changes [F, m], target [F], coordinates owned as `owner` [F], `weights` [M]."""
    m = changes.shape[1]
    products = torch.zeros(len(weights), m + 1, m + 1, dtype=torch.float64)
    columns = torch.cat([changes, target[:, None]], 1)
    products.index_add_(0, owner, columns[:, :, None] * columns[:, None, :])
    gram, right, ddim = products[:, :m, :m], products[:, :m, m], products[:, m, m]
    relative = 1 / (ddim + _NEGLIGIBLE)
    eye = torch.eye(m, dtype=torch.float64)
    own = torch.linalg.solve(gram * relative[:, None, None] + _OWN_RIDGE * eye, right * relative[:, None])
    smallest = ddim - 2 * (own * right).sum(1) + torch.einsum("ki,kij,kj->k", own, gram, own)
    weight = weights / (smallest.clamp(min=0) + _FLOOR * ddim + _NEGLIGIBLE)
    return torch.linalg.solve(torch.einsum("k,kij->ij", weight, gram) + ridge * eye, weight @ right)
