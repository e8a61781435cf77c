"""What the form of the fitted steps could reach: gradient descent through the network, which no user could afford.

    python benchmarks/oracle.py [--only digits waves] [--guidance 1 4] [--steps 5 8] [--rounds 300] [--noises 64]

Begins at the fit of effort "quick" (`zoo.bench.fit`), then turns every lambda and coefficient by Adam so that the mean log of
the final error falls on noises of its own, eight at a time. Printed are the errors over the best rival's of the fit and of what
was reached, on noise that neither saw: what lies between them, a better way of fitting could still win.
"""

from __future__ import annotations

import argparse
import math

import torch
from common import geometric_mean
from torch import Tensor
from zoo import NETWORKS, load
from zoo.bench import QUICK, Bench, fit

from dpm_solver_v3.ems_tools.compute import EFFORTS
from dpm_solver_v3.sampler import FittedSteps

BATCH, FIRST = 8, 3000
"""Noises in one turn, and the index of the first of them in a `Bench`."""


class Form:
    """Fitted steps as numbers that a gradient can turn: lambdas, and what is added to first-order steps (DDIM) on them."""

    def __init__(self, steps: FittedSteps) -> None:
        self.lambdas = torch.tensor(steps.lambdas, dtype=torch.float64, requires_grad=True)
        n = len(steps.lambdas)
        decay, weights = torch.tensor(steps.decay, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
        for i, row in enumerate(steps.weights):
            weights[i, : i + 1] = torch.tensor(row, dtype=torch.float64)
        first = self._first().detach()
        self.decay = ((decay - first) / self._scale(first)).requires_grad_()
        self.weights = (weights - torch.diag(1 - first)).requires_grad_()

    def _first(self) -> Tensor:
        """The share of y in a first-order step, 0 in the last."""
        return torch.cat([(self.lambdas[:-1] - self.lambdas[1:]).exp(), self.lambdas.new_zeros(1)])

    @staticmethod
    def _scale(first: Tensor) -> Tensor:
        """Under much noise a small part of y is a large error of the picture: a share of y turns relative to DDIM's."""
        return torch.where(first > 0, first, torch.ones_like(first))

    def _decays(self) -> Tensor:
        first = self._first()
        return first + self.decay * self._scale(first)

    def run(self, denoiser: torch.nn.Module, noise: Tensor) -> Tensor:
        """The end of the run from unit noise [K, C, ...]."""
        sigmas, first, decays = (-self.lambdas).exp(), self._first(), self._decays()
        y, history = noise * sigmas[0], list[Tensor]()
        for i in range(len(sigmas)):
            history.append(denoiser(y.float(), sigmas[i].float().expand(len(y))).double())
            y = decays[i] * y + (1 - first[i]) * history[-1]
            y = y + sum(self.weights[i, j] * D for j, D in enumerate(history))
        return y

    def steps(self) -> FittedSteps:
        """As a file holds them."""
        first = self._first()
        weights = (self.weights + torch.diag(1 - first)).tolist()
        rows = tuple(tuple(row[: i + 1]) for i, row in enumerate(weights))
        return FittedSteps(tuple(self.lambdas.tolist()), tuple(self._decays().tolist()), rows)


def descend(bench: Bench, steps: FittedSteps, rounds: int, noises: int) -> FittedSteps:
    """Turn the numbers of `steps` for `rounds` batches."""
    form = Form(steps)
    ids = list(range(FIRST, FIRST + noises))
    clean = bench.solve(ids).double()
    rates = ((form.lambdas, 2e-3), (form.decay, 3e-4), (form.weights, 1e-3))
    optimizer = torch.optim.Adam([{"params": [value], "lr": rate} for value, rate in rates])
    for k in range(rounds):
        for group, (_, rate) in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * k / rounds))
        pick = [(k * BATCH + j) % noises for j in range(BATCH)]
        part = [ids[j] for j in pick]
        end = form.run(bench.denoiser(part), bench.noise(part).double())
        loss = (end - clean[pick]).square().flatten(1).mean(1).log().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return form.steps()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=sorted(NETWORKS), default=["digits", "waves"])
    parser.add_argument("--guidance", nargs="+", type=float, default=[1.0, 4.0])
    parser.add_argument("--steps", nargs="+", type=int, default=[5, 8])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--noises", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.only:
        network = load(name)
        for guidance in [g for g in network.entry.guidances if g in args.guidance]:
            bench = Bench(network, guidance, QUICK)
            for row in fit(network, guidance, EFFORTS["quick"], tuple(args.steps))[0]:
                rival, theirs = bench.best_rival(row.steps)
                assert row.coefficients is not None
                reached = descend(bench, row.coefficients, args.rounds, args.noises)
                a, b = (geometric_mean(bench.fitted_errors(s) / theirs).item() for s in (row.coefficients, reached))
                print(f"{name}, {guidance:g}, {row.steps} steps, over {rival}: fit {a:.2f}, descent {b:.2f}", flush=True)


if __name__ == "__main__":
    main()
