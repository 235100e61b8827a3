"""The Muon optimizer: momentum with orthogonalised updates for matrices, AdamW for biases."""

import math
from collections.abc import Iterable

import torch

from distributed import computes_in_bfloat16

MUON_LR_SCALE = 5  # times a config's learning_rate, which is meant for AdamW and discriminators
MOMENTUM = 0.95
ITERATIONS = 5  # of Newton-Schulz
# Coefficients of the quintic polynomial that moves singular values towards 1 (Jordan et al., 2024).
A, B, C = 3.4445, -4.7750, 2.0315
RMS = 0.2  # of the entries of an update at a learning rate of 1, as with AdamW (Liu et al., 2025)
EPSILON = 1e-8  # AdamW's


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """Returns approximately the polar factor of a matrix [M, N]: singular values of about 1.

    Newton-Schulz iterations leave the singular values between 0.6 and 1.3, which suffices. They run
    in bfloat16 except on processors without it, where that would take twenty times as long.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    dtype = torch.bfloat16 if computes_in_bfloat16(matrix.device) else torch.float32
    x = (matrix.T if is_tall else matrix).to(dtype)
    x = x / (x.norm() + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = A * x + (B * gram + C * gram @ gram) @ x
    return (x.T if is_tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Takes steps of equal size in all directions of a weight as a matrix, [C_out, C_in * k].

    Uses Nesterov's momentum. It is for weights of two or more dimensions in layers without weight
    norm. Biases take AdamW's steps at the same learning rate, without weight decay.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024; scaled
    as in Liu et al., "Muon is scalable for LLM training", 2025.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, betas: tuple[float, float]):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self) -> None:
        """Updates all parameters that have a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.dim() > 1:
                    self._step(param, group["lr"])
                else:
                    self._adamw_step(param, group["lr"], group["betas"])

    def _step(self, param: torch.Tensor, lr: float) -> None:
        if not self.state[param]:
            self.state[param]["momentum"] = torch.zeros_like(param)
        momentum = self.state[param]["momentum"]
        momentum.mul_(MOMENTUM).add_(param.grad)
        direction = (param.grad + MOMENTUM * momentum).flatten(1)
        size = lr * RMS * math.sqrt(max(direction.shape))
        param.sub_(size * orthogonalise(direction).view_as(param))

    def _adamw_step(self, param: torch.Tensor, lr: float, betas: tuple[float, float]) -> None:
        state = self.state[param]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        state["step"] += 1
        state["exp_avg"].lerp_(param.grad, 1 - betas[0])
        state["exp_avg_sq"].lerp_(param.grad.square(), 1 - betas[1])
        mean, square = (
            state[name] / (1 - beta ** state["step"])
            for name, beta in zip(("exp_avg", "exp_avg_sq"), betas, strict=True)
        )
        param.sub_(lr * mean / (square.sqrt() + EPSILON))
