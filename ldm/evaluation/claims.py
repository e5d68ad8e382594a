"""What a lecture says of the families, held against measured rows.

A row is what `scripts/compare.py` measured of one run at one setting: family, name, fid, precision, recall, diversity,
sharpness, seconds_per_picture, steps. What is said of GANs is judged, and stated, for each of their rows: the best one
alone would hide that others fail.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
SUPPORTED, PARTLY, NOT = "supported", "partly supported", "not supported"
OPEN, UNKNOWN = "cannot be told", "not measured"
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
    """claim: the lecture's words; verdict: one of the words above; why: the figures."""

    claim: str
    verdict: str
    why: str


def of(rows: Sequence[Row], *families: str) -> list[Row]:
    return [r for r in rows if r["family"] in families]


def best(rows: Sequence[Row]) -> Row:
    """The row of the smallest FID."""
    return min(rows, key=lambda r: r["fid"])


def listed(rows: Sequence[Row], **figures: str) -> str:
    """ "0.70 and 1.2 (VAE), ..." of the figures key=format."""
    return ", ".join(f"{' and '.join(format(r[k], f) for k, f in figures.items())} ({r['name']})" for r in rows)


def best_of_each(rows: Sequence[Row], *families: str) -> list[Row]:
    """The best row of each of these families that is there."""
    return [best(of(rows, f)) for f in families if of(rows, f)]


# --- checks -----------------------------------------------------------------------------------------------------------

# whether the claim holds of each row that it is about (None: these figures cannot tell), and the figures
Found = tuple[list[bool | None], str]


def vae_is_blurrier(rows: Sequence[Row]) -> Found:
    vae, others = best(of(rows, "VAE")), [*of(rows, "GAN"), *best_of_each(rows, "diffusion")]
    said = listed([vae, *others], sharpness=".2f")
    return [vae["sharpness"] < r["sharpness"] for r in others], f"Sharpness, 1 being that of the data: {said}."


def gan_has_quality(rows: Sequence[Row]) -> Found:
    """Near the data as a whole (FID), and each picture like a real one (precision)."""
    gans, vae = of(rows, "GAN"), best(of(rows, "VAE"))
    figures = {"fid": ".3g", "precision": ".2f"}
    holds = [r["fid"] < vae["fid"] and r["precision"] > vae["precision"] for r in gans]
    return holds, f"FID and precision: {listed(gans, **figures)}, against {listed([vae], **figures)}."


def gan_is_fast(rows: Sequence[Row]) -> Found:
    other, gans = best(of(rows, "diffusion", "latent diffusion")), of(rows, "GAN")
    times = [other["seconds_per_picture"] / r["seconds_per_picture"] for r in gans]
    factors = [format(t, ".3g" if t < 100 else ",.0f") for t in times]
    said = ", ".join(f"{f} times as long as one of {r['name']}" for f, r in zip(factors, gans, strict=True))
    return [t > 1 for t in times], f"A picture of {other['name']} takes {said}."


def gan_loses_modes(rows: Sequence[Row]) -> Found:
    """Fewer real pictures reached, and less spread, than with every other family.

    Recall counts balls around drawn pictures, which are large where those are scattered far from the data: the recall
    of a row with less than half of the others' precision is no sign of modes that are kept.
    """
    gans, others = of(rows, "GAN"), best_of_each(rows, "VAE", "diffusion")

    def collapsed(r: Row) -> bool | None:
        if all(r["recall"] < o["recall"] and r["diversity"] < o["diversity"] for o in others):
            return True
        return None if r["precision"] < min(o["precision"] for o in others) / 2 else False

    holds = [collapsed(r) for r in gans]
    figures = {"precision": ".2f", "recall": ".2f", "diversity": ".2f"}
    why = f"Precision, recall and diversity: {listed([*gans, *others], **figures)}."
    vague = ", ".join(r["name"] for r, held in zip(gans, holds, strict=True) if held is None)
    if vague:
        why += f" Of {vague} it cannot be told: so low a precision makes recall too high."
    return holds, why


def diffusion_is_best(rows: Sequence[Row]) -> Found:
    """Of every family its best row; a family is judged by what it can do."""
    families = list(dict.fromkeys(r["family"] for r in rows))
    ranked = sorted(best_of_each(rows, *families), key=lambda r: r["fid"])
    holds = ranked[0]["family"] in ("diffusion", "latent diffusion")
    gans = [r for r in of(rows, "GAN") if r not in ranked]
    more = f"; further GANs: {listed(gans, fid='.3g')}" if gans else ""
    return [holds], f"The smallest FID of each family: {listed(ranked, fid='.3g')}{more}."


def diffusion_needs_steps(rows: Sequence[Row]) -> Found:
    path = sorted((r for r in of(rows, "diffusion") if r.get("steps")), key=lambda r: r["steps"])
    said = ", ".join(f"{r['fid']:.3g} at {r['steps']} steps ({r['seconds_per_picture']:.3g} s)" for r in path)
    costly = path[-1]["seconds_per_picture"] > path[0]["seconds_per_picture"]
    return [costly and path[-1]["fid"] < path[0]["fid"]], f"FID of {path[0]['run_name']}: {said}."


Check = Callable[[Sequence[Row]], Found]
# the claim, the families without which it cannot be measured (each entry: one of these), the figures that a row must
# have to be looked at, and the check
CLAIMS: tuple[tuple[str, tuple[tuple[str, ...], ...], tuple[str, ...], Check], ...] = (
    ("VAE: blurrier than GAN and diffusion", (("VAE",), ("GAN", "diffusion")), ("sharpness",), vae_is_blurrier),
    ("GAN: high quality", (("GAN",), ("VAE",)), ("precision",), gan_has_quality),
    ("GAN: fast sampling", (("GAN",), ("diffusion", "latent diffusion")), ("seconds_per_picture",), gan_is_fast),
    (
        "GAN: mode collapse",
        (("GAN",), ("VAE", "diffusion")),
        ("precision", "recall", "diversity"),
        gan_loses_modes,
    ),
    (
        "Diffusion: best quality",
        (("diffusion", "latent diffusion"), ("VAE", "GAN", "autoregressive")),
        (),
        diffusion_is_best,
    ),
    (
        "Diffusion: N steps, which buy quality with time",
        (("diffusion",),),
        ("seconds_per_picture",),
        diffusion_needs_steps,
    ),
)


def judge(rows: Sequence[Row]) -> list[Verdict]:
    """Every claim with what these rows say of it."""
    verdicts = []
    for claim, needed, figures, check in CLAIMS:
        there = [r for r in rows if all(r.get(k) is not None for k in ("fid", *figures))]
        missing = [" or ".join(group) for group in needed if not of(there, *group)]
        if not missing and check is diffusion_needs_steps and len({r.get("steps") for r in of(there, "diffusion")}) < 2:
            missing = ["diffusion at two numbers of steps"]
        if missing:
            verdicts.append(Verdict(claim, UNKNOWN, f"No {', no '.join(missing)} here."))
            continue
        verdicts.append(_verdict(claim, *check(there)))
    return verdicts


def _verdict(claim: str, holds: list[bool | None], why: str) -> Verdict:
    known = [h for h in holds if h is not None]
    if not known:
        return Verdict(claim, OPEN, why)
    word = NOT if not any(known) else SUPPORTED if all(holds) else PARTLY
    return Verdict(claim, word, f"{why} So of {sum(known)} of {len(holds)}." if word == PARTLY else why)
