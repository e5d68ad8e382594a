"""What a lecture says of the families, held against measured rows.

A row is what `scripts/compare.py` measured of one run at one setting: family, name, fid, recall, diversity, sharpness,
seconds_per_picture, network_calls_per_picture, steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
SUPPORTED, NOT, UNKNOWN = "supported", "not supported", "not measured"
# module of a recipe (longest prefix wins) -> family
FAMILIES = {
    "ldm.models.vae": "VAE",
    "ldm.models.gan": "GAN",
    "ldm.models.stylegan2": "GAN",
    "ldm.models.diffusion": "diffusion",
    "ldm.models.diffusion.latent_diffusion": "latent diffusion",
    "ldm.models.diffusion.engine": "latent diffusion",
    "ldm.models.autoregressive": "autoregressive",
    "ldm.models.net2net": "autoregressive",
}


def family_of(model: str) -> str:
    """Family of a recipe given by its dotted path."""
    known = [m for m in FAMILIES if model.startswith(m)]
    return FAMILIES[max(known, key=len)] if known else model.rpartition(".")[2]


@dataclass
class Verdict:
    """claim: the lecture's words; verdict: supported, not supported or not measured; why: the figures."""

    claim: str
    verdict: str
    why: str


def of(rows: Sequence[Row], *families: str) -> list[Row]:
    return [r for r in rows if r["family"] in families]


def best(rows: Sequence[Row]) -> Row:
    """The row of the smallest FID."""
    return min(rows, key=lambda r: r["fid"])


def vae_is_blurrier(rows: Sequence[Row]) -> tuple[bool, str]:
    vae, others = best(of(rows, "VAE")), [best(of(rows, f)) for f in ("GAN", "diffusion") if of(rows, f)]
    said = ", ".join(f"{r['sharpness']:.2f} ({r['name']})" for r in (vae, *others))
    return all(vae["sharpness"] < r["sharpness"] for r in others), f"Sharpness, 1 being that of the data: {said}."


def gan_has_quality(rows: Sequence[Row]) -> tuple[bool, str]:
    gan, vae = best(of(rows, "GAN")), best(of(rows, "VAE"))
    return gan["fid"] < vae["fid"], f"FID {gan['fid']:.3g} ({gan['name']}) against {vae['fid']:.3g} ({vae['name']})."


def gan_is_fast(rows: Sequence[Row]) -> tuple[bool, str]:
    gan, other = best(of(rows, "GAN")), best(of(rows, "diffusion", "latent diffusion"))
    times = other["seconds_per_picture"] / gan["seconds_per_picture"]
    return times > 1, f"A picture of {other['name']} takes {times:.3g} times as long as one of {gan['name']}."


def gan_loses_modes(rows: Sequence[Row]) -> tuple[bool, str]:
    gan, others = best(of(rows, "GAN")), [best(of(rows, f)) for f in ("VAE", "diffusion") if of(rows, f)]
    said = ", ".join(f"{r['recall']:.2f} and {r['diversity']:.2f} ({r['name']})" for r in (gan, *others))
    fewer = all(gan["recall"] < r["recall"] and gan["diversity"] < r["diversity"] for r in others)
    return fewer, f"Recall and diversity: {said}."


def diffusion_is_best(rows: Sequence[Row]) -> tuple[bool, str]:
    first = best(rows)
    others = best([r for r in rows if r["family"] != first["family"]])
    why = f"The smallest FID is {first['fid']:.3g} ({first['name']}), of the other families {others['fid']:.3g}"
    return first["family"] in ("diffusion", "latent diffusion"), f"{why} ({others['name']})."


def diffusion_needs_steps(rows: Sequence[Row]) -> tuple[bool, str]:
    path = sorted((r for r in of(rows, "diffusion") if r.get("steps")), key=lambda r: r["steps"])
    said = ", ".join(f"{r['fid']:.3g} at {r['steps']} steps ({r['seconds_per_picture']:.3g} s)" for r in path)
    costly = path[-1]["seconds_per_picture"] > path[0]["seconds_per_picture"]
    return costly and path[-1]["fid"] < path[0]["fid"], f"FID of {path[0]['run_name']}: {said}."


Check = Callable[[Sequence[Row]], tuple[bool, str]]
# the claim, the families without which it cannot be measured (each entry: one of these), and the check
CLAIMS: tuple[tuple[str, tuple[tuple[str, ...], ...], Check], ...] = (
    ("VAE: blurrier than GAN and diffusion", (("VAE",), ("GAN", "diffusion")), vae_is_blurrier),
    ("GAN: high quality", (("GAN",), ("VAE",)), gan_has_quality),
    ("GAN: fast sampling", (("GAN",), ("diffusion", "latent diffusion")), gan_is_fast),
    ("GAN: mode collapse", (("GAN",), ("VAE", "diffusion")), gan_loses_modes),
    (
        "Diffusion: best quality",
        (("diffusion", "latent diffusion"), ("VAE", "GAN", "autoregressive")),
        diffusion_is_best,
    ),
    ("Diffusion: N steps, which buy quality with time", (("diffusion",),), diffusion_needs_steps),
)


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """Every claim with what these rows say of it."""
    verdicts = []
    for claim, needed, check in CLAIMS:
        missing = [" or ".join(group) for group in needed if not of(rows, *group)]
        if not missing and check is diffusion_needs_steps and len({r.get("steps") for r in of(rows, "diffusion")}) < 2:
            missing = ["diffusion at two numbers of steps"]
        if missing:
            verdicts.append(Verdict(claim, UNKNOWN, f"No {', no '.join(missing)} here."))
            continue
        holds, why = check(rows)
        verdicts.append(Verdict(claim, SUPPORTED if holds else NOT, why))
    return verdicts
