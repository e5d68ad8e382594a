"""DPM-Solver and DPM-Solver++ with the interface of the authors' code: every order, method and kind of time step.

Lu et al. 2022, "DPM-Solver" (algorithms 1-3, appendices B-D) and "DPM-Solver++" (algorithms 1-2). After the authors'
PyTorch code (LuChengTHU/dpm-solver, MIT licence), whose two sets of formulas, for noise and for data predictions, are
one here: with k = -h for data and k = h for noise, h = lambda_t - lambda_s, they differ in nothing but the factor of x
and the scale of the rest. `samplers.py` has multistep solvers for every path; this is for callers of the class.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.dpm_schedule import ModelFn, NoiseScheduleVP, expand_dims, known

SKIP_TYPES = ("logSNR", "time_uniform", "time_quadratic")
METHODS = ("singlestep", "multistep", "singlestep_fixed", "adaptive")
SOLVER_TYPES = ("dpm_solver", "taylor")


class DPM_Solver:  # noqa: N801  (official name)
    """Solves the diffusion ODE.

    Args:
        model_fn: predicts noise, see `model_wrapper`.
        predict_x0: DPM-Solver++ on data predictions, instead of DPM-Solver on noise predictions.
        thresholding: dynamic thresholding of the data predictions (Saharia et al. 2022), only with predict_x0, only
            sensible for pixels.
        max_val: the least bound of thresholding.
    """

    def __init__(
        self,
        model_fn: ModelFn,
        noise_schedule: NoiseScheduleVP,
        predict_x0: bool = False,
        thresholding: bool = False,
        max_val: float = 1.0,
    ) -> None:
        self.model, self.noise_schedule = model_fn, noise_schedule
        self.predict_x0, self.thresholding, self.max_val = predict_x0, thresholding, max_val

    # --- predictions --------------------------------------------------------------------------------------------------

    def noise_prediction_fn(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicted noise of x [B, ...] at t [B]."""
        return self.model(x, t)

    def data_prediction_fn(self, x: Tensor, t: Tensor) -> Tensor:
        """Predicted x_0, thresholded if asked for."""
        alpha, sigma = (
            self._at(self.noise_schedule.marginal_alpha, t, x),
            self._at(self.noise_schedule.marginal_std, t, x),
        )
        x0 = (x - sigma * self.model(x, t)) / alpha
        if self.thresholding:
            s = torch.quantile(x0.abs().flatten(1), 0.995, dim=1).clamp(min=self.max_val)
            s = expand_dims(s, x0.ndim)
            x0 = torch.clamp(x0, -s, s) / s
        return x0

    def model_fn(self, x: Tensor, t: Tensor) -> Tensor:
        """The prediction that the updates work on."""
        return self.data_prediction_fn(x, t) if self.predict_x0 else self.noise_prediction_fn(x, t)

    def denoise_to_zero_fn(self, x: Tensor, s: Tensor) -> Tensor:
        """The last step, from s to 0: the data prediction."""
        return self.data_prediction_fn(x, s)

    # --- times --------------------------------------------------------------------------------------------------------

    def get_time_steps(self, skip_type: str, t_T: float | Tensor, t_0: float | Tensor, N: int, device: Any) -> Tensor:  # noqa: N803
        """N + 1 times from t_T down to t_0, equally spaced in lambda, t or the root of t."""
        known("skip_type", skip_type, SKIP_TYPES)
        kind = {"device": device, "dtype": torch.get_default_dtype()}
        t_T, t_0 = (torch.as_tensor(t, **kind).reshape(1) for t in (t_T, t_0))  # noqa: N806
        if skip_type == "logSNR":
            lambda_T, lambda_0 = (float(self.noise_schedule.marginal_lambda(t)) for t in (t_T, t_0))  # noqa: N806
            return self.noise_schedule.inverse_lambda(torch.linspace(lambda_T, lambda_0, N + 1, device=device))
        if skip_type == "time_uniform":
            return torch.linspace(float(t_T), float(t_0), N + 1, device=device)
        return torch.linspace(float(t_T) ** 0.5, float(t_0) ** 0.5, N + 1, device=device) ** 2

    def get_orders_and_timesteps_for_singlestep_solver(
        self,
        steps: int,
        order: int,
        skip_type: str,
        t_T: float,  # noqa: N803
        t_0: float,
        device: Any,
    ) -> tuple[Tensor, list[int]]:
        """(times between the steps, order of each step), together `steps` network calls (DPM-Solver, section 3.4)."""
        known("order", order, (1, 2, 3))
        if order == 3:
            K = steps // 3 + 1  # noqa: N806
            orders = {0: [3] * (K - 2) + [2, 1], 1: [3] * (K - 1) + [1], 2: [3] * (K - 1) + [2]}[steps % 3]
        else:
            orders = [order] * (steps // order) + [1] * (steps % order)
        if skip_type == "logSNR":
            return self.get_time_steps(skip_type, t_T, t_0, len(orders), device), orders
        ends = torch.tensor([0, *orders]).cumsum(0).to(device)
        return self.get_time_steps(skip_type, t_T, t_0, steps, device)[ends], orders

    # --- one step -----------------------------------------------------------------------------------------------------

    def _at(self, function: Callable[[Tensor], Tensor], t: Tensor, x: Tensor) -> Tensor:
        return expand_dims(function(t), x.ndim)

    def _step(self, x: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x times its factor, scale of the predictions, k), where a first-order step is x' - scale expm1(k) model."""
        ns = self.noise_schedule
        h = ns.marginal_lambda(t) - ns.marginal_lambda(s)
        if self.predict_x0:
            factor, scale, k = ns.marginal_std(t) / ns.marginal_std(s), ns.marginal_alpha(t), -h
        else:
            factor = torch.exp(ns.marginal_log_mean_coeff(t) - ns.marginal_log_mean_coeff(s))
            scale, k = ns.marginal_std(t), h
        return expand_dims(factor, x.ndim) * x, expand_dims(scale, x.ndim), expand_dims(k, x.ndim)

    def _between(self, s: Tensor, t: Tensor, r: float | Tensor) -> Tensor:
        """The time at which lambda is a share r of the way from s to t."""
        a, b = self.noise_schedule.marginal_lambda(s), self.noise_schedule.marginal_lambda(t)
        return self.noise_schedule.inverse_lambda(a + r * (b - a))

    def dpm_solver_first_update(
        self, x: Tensor, s: Tensor, t: Tensor, model_s: Tensor | None = None, return_intermediate: bool = False
    ) -> Any:
        """DPM-Solver-1, which is DDIM with eta 0: x [B, ...] from s [B] to t [B]."""
        model_s = self.model_fn(x, s) if model_s is None else model_s
        scaled, scale, k = self._step(x, s, t)
        x_t = scaled - scale * torch.expm1(k) * model_s
        return (x_t, {"model_s": model_s}) if return_intermediate else x_t

    def singlestep_dpm_solver_second_update(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        r1: float | Tensor | None = 0.5,
        model_s: Tensor | None = None,
        return_intermediate: bool = False,
        solver_type: str = "dpm_solver",
    ) -> Any:
        """DPM-Solver-2 with its inner time a share r1 of the way; two network calls."""
        known("solver_type", solver_type, SOLVER_TYPES)
        r1 = 0.5 if r1 is None else r1
        model_s = self.model_fn(x, s) if model_s is None else model_s
        s1 = self._between(s, t, r1)
        model_s1 = self.model_fn(self.dpm_solver_first_update(x, s, s1, model_s), s1)
        scaled, scale, k = self._step(x, s, t)
        phi_1 = torch.expm1(k)
        weight = 0.5 * phi_1 if solver_type == "dpm_solver" else phi_1 / k - 1.0
        x_t = scaled - scale * phi_1 * model_s - scale * weight / r1 * (model_s1 - model_s)
        return (x_t, {"model_s": model_s, "model_s1": model_s1}) if return_intermediate else x_t

    def singlestep_dpm_solver_third_update(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        r1: float | Tensor | None = 1.0 / 3.0,
        r2: float | Tensor | None = 2.0 / 3.0,
        model_s: Tensor | None = None,
        model_s1: Tensor | None = None,
        return_intermediate: bool = False,
        solver_type: str = "dpm_solver",
    ) -> Any:
        """DPM-Solver-3 with inner times at shares r1 and r2; three network calls."""
        known("solver_type", solver_type, SOLVER_TYPES)
        r1, r2 = 1.0 / 3.0 if r1 is None else r1, 2.0 / 3.0 if r2 is None else r2
        model_s = self.model_fn(x, s) if model_s is None else model_s
        s1, s2 = self._between(s, t, r1), self._between(s, t, r2)
        if model_s1 is None:
            model_s1 = self.model_fn(self.dpm_solver_first_update(x, s, s1, model_s), s1)
        scaled, scale, k = self._step(x, s, s2)  # k is r2 times that of the whole step
        x_s2 = scaled - scale * torch.expm1(k) * model_s
        x_s2 = x_s2 - r2 / r1 * scale * (torch.expm1(k) / k - 1.0) * (model_s1 - model_s)
        model_s2 = self.model_fn(x_s2, s2)
        scaled, scale, k = self._step(x, s, t)
        phi_1 = torch.expm1(k)
        phi_2 = phi_1 / k - 1.0
        D1_0, D1_1 = (model_s1 - model_s) / r1, (model_s2 - model_s) / r2  # noqa: N806
        x_t = scaled - scale * phi_1 * model_s
        if solver_type == "dpm_solver":
            x_t = x_t - scale * phi_2 * D1_1
        else:
            D1, D2 = (r2 * D1_0 - r1 * D1_1) / (r2 - r1), 2.0 * (D1_1 - D1_0) / (r2 - r1)  # noqa: N806
            x_t = x_t - scale * phi_2 * D1 - scale * (phi_2 / k - 0.5) * D2
        return (x_t, {"model_s": model_s, "model_s1": model_s1, "model_s2": model_s2}) if return_intermediate else x_t

    def multistep_dpm_solver_second_update(
        self, x: Tensor, models: Sequence[Tensor], times: Sequence[Tensor], t: Tensor, solver_type: str = "dpm_solver"
    ) -> Tensor:
        """2M: from times[-1] to t, with the predictions at the last two times."""
        known("solver_type", solver_type, SOLVER_TYPES)
        scaled, scale, k = self._step(x, times[-1], t)
        r0, phi_1 = self._ratio(times[-2], times[-1], t, x), torch.expm1(k)
        weight = 0.5 * phi_1 if solver_type == "dpm_solver" else phi_1 / k - 1.0
        return scaled - scale * phi_1 * models[-1] - scale * weight / r0 * (models[-1] - models[-2])

    def multistep_dpm_solver_third_update(
        self, x: Tensor, models: Sequence[Tensor], times: Sequence[Tensor], t: Tensor, solver_type: str = "dpm_solver"
    ) -> Tensor:
        """3M: from times[-1] to t, with the predictions at the last three times.

        As in the authors' code the second derivative has half of its weight: one step errs by h^3, as 2M's does.
        """
        known("solver_type", solver_type, SOLVER_TYPES)
        scaled, scale, k = self._step(x, times[-1], t)
        r0 = self._ratio(times[-2], times[-1], t, x)
        r1 = self._ratio(times[-3], times[-2], t, x, times[-1])
        D1_0, D1_1 = (models[-1] - models[-2]) / r0, (models[-2] - models[-3]) / r1  # noqa: N806
        D1, D2 = D1_0 + r0 / (r0 + r1) * (D1_0 - D1_1), (D1_0 - D1_1) / (r0 + r1)  # noqa: N806
        phi_1 = torch.expm1(k)
        phi_2 = phi_1 / k - 1.0
        return scaled - scale * (phi_1 * models[-1] + phi_2 * D1 + (phi_2 / k - 0.5) * D2)

    def _ratio(self, a: Tensor, b: Tensor, t: Tensor, x: Tensor, start: Tensor | None = None) -> Tensor:
        """The step from a to b in lambda, relative to that from `start` (default: b) to t."""
        la, lb, lt = (self.noise_schedule.marginal_lambda(s) for s in (a, b, t))
        ls = lb if start is None else self.noise_schedule.marginal_lambda(start)
        return expand_dims((lb - la) / (lt - ls), x.ndim)

    def singlestep_dpm_solver_update(
        self,
        x: Tensor,
        s: Tensor,
        t: Tensor,
        order: int,
        return_intermediate: bool = False,
        solver_type: str = "dpm_solver",
        r1: Any = None,
        r2: Any = None,
    ) -> Any:
        """A singlestep update of order 1, 2 or 3."""
        known("order", order, (1, 2, 3))
        options: dict[str, Any] = {"return_intermediate": return_intermediate}
        if order == 1:
            return self.dpm_solver_first_update(x, s, t, **options)
        options |= {"solver_type": solver_type, "r1": r1}
        if order == 2:
            return self.singlestep_dpm_solver_second_update(x, s, t, **options)
        return self.singlestep_dpm_solver_third_update(x, s, t, r2=r2, **options)

    def multistep_dpm_solver_update(
        self,
        x: Tensor,
        model_prev_list: Sequence[Tensor],
        t_prev_list: Sequence[Tensor],
        t: Tensor,
        order: int,
        solver_type: str = "dpm_solver",
    ) -> Tensor:
        """A multistep update of order 1, 2 or 3; the lists end with the latest."""
        known("order", order, (1, 2, 3))
        if order == 1:
            return self.dpm_solver_first_update(x, t_prev_list[-1], t, model_s=model_prev_list[-1])
        second, third = self.multistep_dpm_solver_second_update, self.multistep_dpm_solver_third_update
        return (second if order == 2 else third)(x, model_prev_list, t_prev_list, t, solver_type)

    # --- whole solvers ------------------------------------------------------------------------------------------------

    def dpm_solver_adaptive(
        self,
        x: Tensor,
        order: int,
        t_T: float,  # noqa: N803
        t_0: float,
        h_init: float = 0.05,
        atol: float = 0.0078,
        rtol: float = 0.05,
        theta: float = 0.9,
        t_err: float = 1e-5,
        solver_type: str = "dpm_solver",
    ) -> Tensor:
        """Steps as long as the difference between orders `order` - 1 and `order` (2 or 3) allows (appendix C).

        Args:
            h_init: first step in lambda.
            atol, rtol: allowed difference; 0.0078 is one of 256 grey levels in [-1, 1].
            theta: caution in the choice of the next step.
            t_err: ends when t is so near to t_0.
        """
        known("order", order, (2, 3))
        ns = self.noise_schedule
        s = torch.full((len(x),), float(t_T), device=x.device)
        lambda_s, lambda_0 = ns.marginal_lambda(s), ns.marginal_lambda(torch.full_like(s, float(t_0)))
        h, x_prev = torch.full_like(s, h_init), x
        while (s - t_0).abs().mean() > t_err:
            t = ns.inverse_lambda(lambda_s + h)
            options = {"solver_type": solver_type}
            if order == 2:
                lower, found = self.dpm_solver_first_update(x, s, t, return_intermediate=True)
                higher = self.singlestep_dpm_solver_second_update(x, s, t, 0.5, **found, **options)
            else:
                lower, found = self.singlestep_dpm_solver_second_update(
                    x, s, t, 1.0 / 3.0, return_intermediate=True, **options
                )
                higher = self.singlestep_dpm_solver_third_update(x, s, t, 1.0 / 3.0, 2.0 / 3.0, **found, **options)
            delta = torch.maximum(torch.full_like(x, atol), rtol * torch.maximum(lower.abs(), x_prev.abs()))
            error = ((higher - lower) / delta).flatten(1).square().mean(dim=1).sqrt().max()
            if not bool(error.isfinite()):
                raise ValueError("adaptive: the network gave non-finite values")
            if error <= 1.0:
                x, s, x_prev = higher, t, lower
                lambda_s = ns.marginal_lambda(s)
            h = torch.minimum(theta * h * error.float().pow(-1.0 / order), lambda_0 - lambda_s)
        return x

    @torch.no_grad()
    def sample(
        self,
        x: Tensor,
        steps: int = 20,
        t_start: float | None = None,
        t_end: float | None = None,
        order: int = 3,
        skip_type: str = "time_uniform",
        method: str = "singlestep",
        lower_order_final: bool = True,
        denoise_to_zero: bool = False,
        solver_type: str = "dpm_solver",
        atol: float = 0.0078,
        rtol: float = 0.05,
    ) -> Tensor:
        """x [B, ...] at t_start (None: T) -> x at t_end (None: 1 / N).

        Args:
            steps: network calls; adaptive takes as many as it needs.
            order: 1, 2 or 3.
            skip_type: where the times are, see `get_time_steps`.
            method: singlestep (steps of the order, and lower ones that use up the rest of the calls), singlestep_fixed
                (steps // order of them), multistep, or adaptive.
            lower_order_final: multistep with less than 15 steps ends in lower orders, which is steadier.
            denoise_to_zero: one more call, from t_end to 0.
            solver_type: dpm_solver or taylor, two ways to take the derivatives.
            atol, rtol: of adaptive.

        Raises:
            ValueError: an unknown name, an order that the method has not, or fewer steps than the order.
        """
        known("method", method, METHODS)
        t_0 = 1.0 / self.noise_schedule.total_N if t_end is None else t_end
        t_T = self.noise_schedule.T if t_start is None else t_start  # noqa: N806
        if method == "adaptive":
            x = self.dpm_solver_adaptive(x, order, t_T, t_0, atol=atol, rtol=rtol, solver_type=solver_type)
        elif method == "multistep":
            times = self.get_time_steps(skip_type, t_T, t_0, steps, x.device)
            x = self._multistep(x, times, order, lower_order_final and steps < 15, solver_type)
        else:
            if method == "singlestep":
                find = self.get_orders_and_timesteps_for_singlestep_solver
                times, orders = find(steps, order, skip_type, t_T, t_0, x.device)
            else:
                orders = [order] * (steps // order)
                times = self.get_time_steps(skip_type, t_T, t_0, len(orders), x.device)
            x = self._singlestep(x, times, orders, skip_type, solver_type)
        return self.denoise_to_zero_fn(x, torch.full((len(x),), t_0, device=x.device)) if denoise_to_zero else x

    def _multistep(self, x: Tensor, times: Tensor, order: int, lower_final: bool, solver_type: str) -> Tensor:
        steps = len(times) - 1
        if steps < order:
            raise ValueError(f"steps: got {steps}, expected at least the order {order}")
        models: deque[Tensor] = deque(maxlen=order)
        passed: deque[Tensor] = deque(maxlen=order)
        for i, t in enumerate(times.unbind()):
            t = t.expand(len(x))
            if i > 0:
                now = min(i, order, steps + 1 - i if lower_final else order)
                x = self.multistep_dpm_solver_update(x, models, passed, t, now, solver_type)
            if i < steps:
                models.append(self.model_fn(x, t))
                passed.append(t)
        return x

    def _singlestep(self, x: Tensor, times: Tensor, orders: list[int], skip_type: str, solver_type: str) -> Tensor:
        for i, order in enumerate(orders):
            inner = self.get_time_steps(skip_type, times[i], times[i + 1], order, x.device)
            lambdas = self.noise_schedule.marginal_lambda(inner)
            shares = (lambdas - lambdas[0]) / (lambdas[-1] - lambdas[0])
            r1, r2 = (shares[j] if order > j else None for j in (1, 2))
            s, t = (times[j].expand(len(x)) for j in (i, i + 1))
            x = self.singlestep_dpm_solver_update(x, s, t, order, solver_type=solver_type, r1=r1, r2=r2)
        return x
