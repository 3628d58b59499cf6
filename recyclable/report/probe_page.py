"""What a probe found, for people: lines for a terminal, a page that needs no network, TensorBoard scalars."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from recyclable.report.compare import table
from recyclable.weights.durable import write_text

TITLES = {
    "apply": "Apply the old weights as they are",
    "init": "Recycle: start from the old weights",
    "both": "Recycle: start from the old weights, and distil",
    "distill": "Distil from the old model",
    "scratch": "Start afresh",
}
_BLUE, _ORANGE, _GRAY = "#1f5f99", "#b35c00", "#666666"
_STYLE = """
body { margin: 0 auto; max-width: 1180px; padding: 16px; background: #fff; color: #1a1a1a;
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.verdict { border-left: 6px solid #1f5f99; padding: .25rem 0 .25rem 1rem; }
.figures { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }
figure { margin: 0; max-width: 520px; }
figure svg { width: 100%; height: auto; display: block; }
figcaption, .note { font-size: .9rem; color: #444; }
.table { overflow-x: auto; margin-top: 1rem; }
table { border-collapse: collapse; overflow-wrap: normal; font-variant-numeric: tabular-nums; font-size: .95rem; }
th, td { padding: .25rem .75rem .25rem 0; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 5.5rem; }
"""


def summary(result: Mapping[str, Any], reason: str) -> str:
    """The verdict, then the evidence, for a terminal."""
    evidence = result["evidence"]
    lines = [f"verdict: {result['verdict']}" + "".join(f"; {line}" for line in _how_sure(result))]
    lines += [reason] if reason else []
    if found := evidence.get("compatibility"):
        lines += ["", table([{"weights": who, **row} for who, row in _score_rows(found).items()])]
    if found := evidence.get("connectivity"):
        lines += ["", f"loss barrier on the path: {found['barrier']:.4f} ({len(found['mu'])} points)"]
    lines += ["", table(_layer_rows(evidence["distance"]))]
    if "report" in result:
        lines += ["", f"probe: done, see {result['report']}"]
    return "\n".join(lines)


def write_page(result: Mapping[str, Any], reason: str, names: Mapping[str, str], path: Path) -> None:
    """One HTML file: the verdict first, then its evidence; nothing in it is loaded from elsewhere.

    Args:
        result: the JSON of a probe.
        names: what was probed, by what it is (`weights`, `new base`, `task`).
    """
    evidence = result["evidence"]
    parts = [
        f'<div class="verdict"><h1>{TITLES[result["verdict"]]}</h1><p>{escape(reason)}</p>',
        *(f"<p>{escape(line[:1].upper() + line[1:])}.</p>" for line in _how_sure(result)),
        "</div>",
        *(f'<div class="note">{escape(what.capitalize())}: {escape(name)}</div>' for what, name in names.items()),
    ]
    for name, section in _SECTIONS.items():
        if name in evidence:
            parts += section(evidence[name])
    if missing := [name for name in _SECTIONS if name not in evidence]:
        hint = "" if "compatibility" in evidence else " With a task, outdated weights are tried on its dev set."
        parts += [f'<h2>Not measured</h2><p class="note">{escape(", ".join(missing))}.{hint}</p>']
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    title = f"<title>Probe: {escape(TITLES[result['verdict']])}</title><style>{_STYLE}</style>"
    body = "\n".join(parts)
    page = f'<!doctype html>\n<html lang="en"><head>{head}{title}</head><body>\n{body}\n</body></html>\n'
    write_text(path, page)


def write_scalars(evidence: Mapping[str, Any], folder: Path) -> None:
    """TensorBoard: `path/loss` and `path/<metric>` by thousandths of mu, `distance/ratio` by layer group."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        if found := evidence.get("connectivity"):
            metric = evidence["compatibility"]["metric"]
            for mu, score, loss in zip(found["mu"], found["metric"], found["loss"], strict=True):
                writer.add_scalar("path/loss", loss, round(1000 * mu))
                writer.add_scalar(f"path/{metric}", score, round(1000 * mu))
        for place, layer in enumerate(evidence["distance"]["layers"]):
            if "ratio" in layer:
                writer.add_scalar("distance/ratio", layer["ratio"], place)


def _how_sure(result: Mapping[str, Any]) -> list[str]:
    lines = []
    if "expected_gain" in result:
        told = result["evidence"]["compatibility"]
        over = "knowing nothing of the task"
        if "base" in told:
            over = f"the new base alone, or a guess if that is better, in {told['metric']}"
        lines.append(f"expected gain over {over}: {result['expected_gain']:+.3f}")
    if "confidence" in result:
        lines.append(f"confidence {result['confidence']:.2f}, as far as the number of examples goes")
    if "fitted_on" in result:
        lines.append(f"the rule's thresholds were fitted on {result['fitted_on']} only, not on this kind of task")
    return lines


def _score_rows(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    rows = {
        "on their own base": found["old"],
        "on the new base, unchanged": found["new"],
    }
    if "majority" in found:
        rows["knowing only label frequencies"] = found["majority"]
    if "chance" in found:
        rows["guessing"] = {"accuracy": found["chance"]}
    if "base" in found:
        rows |= {"the new base without them": found["base"], "guessing": found["guessing"]}
    names = list(found["old"])
    return {who: {name: row.get(name) for name in names} for who, row in rows.items()}


def _layer_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    entries = [*found["layers"], {"layer": "whole", **found["whole"]}]
    columns = {
        "layer": "layer",
        "elements": "elements",
        "l2": "upgrade L2",
        "relative": "of the old norm",
        "cosine": "cosine old, new",
        "tuning_l2": "tuning L2",
        "ratio": "upgrade / tuning",
        "tuning_cosine": "cosine of both",
    }
    present = [name for name in columns if any(name in entry for entry in entries)]
    return [{columns[name]: entry.get(name) for name in present} for entry in entries]


def _compatibility(found: Mapping[str, Any]) -> list[str]:
    rows = [{"weights": who, **row} for who, row in _score_rows(found).items()]
    note = f"{found['examples']} dev examples. How much of their score the outdated weights keep without any training."
    return ["<h2>Applied unchanged</h2>", _table(rows), f'<p class="note">{note}</p>']


def _connectivity(found: Mapping[str, Any]) -> list[str]:
    paths = {"with the backbone": found}
    if "adapter_alone" in found:
        paths["adapter alone"] = found["adapter_alone"]

    def loss(axis: Any) -> None:
        for (name, path), color in zip(paths.items(), (_BLUE, _ORANGE), strict=False):
            axis.plot(path["mu"], path["loss"], "o-", ms=3, color=color, label=name)
            axis.plot([0, 1], [path["loss"][0], path["loss"][-1]], "--", color=color, lw=1)
        axis.set(xlabel="old model (0) to new model (1)", ylabel="dev loss")

    def metric(axis: Any) -> None:
        for (name, path), color in zip(paths.items(), (_BLUE, _ORANGE), strict=False):
            axis.plot(path["mu"], path["metric"], "o-", ms=3, color=color, label=name)
        axis.set(xlabel="old model (0) to new model (1)", ylabel="dev score")

    note = (
        "No barrier: the loss nowhere rises over the straight line between its ends (dashed)."
        if found["barrier"] == 0
        else f"The loss rises by {found['barrier']:.4f} at most over the straight line between its ends (dashed)."
    )
    several = len(paths) > 1
    figures = [_figure(loss, note, legend=several), _figure(metric, "The score on the same path.", legend=several)]
    return ["<h2>The path from the old model to the new one</h2>", f'<div class="figures">{"".join(figures)}</div>']


def _distance(found: Mapping[str, Any]) -> list[str]:
    layers = found["layers"]
    names, tuned = [layer["layer"] for layer in layers], any("tuning_rms" in layer for layer in layers)

    def moved(axis: Any) -> None:
        bars = {"upgrade": ("rms", _BLUE), **({"tuning": ("tuning_rms", _ORANGE)} if tuned else {})}
        for i, (label, (key, color)) in enumerate(bars.items()):
            places = [place + (i - (len(bars) - 1) / 2) * 0.38 for place in range(len(names))]
            axis.barh(places, [layer.get(key, 0) for layer in layers], 0.36, color=color, label=label)
        _layer_axis(axis, names, "RMS of the change per weight")

    def ratio(axis: Any) -> None:
        axis.barh(range(len(names)), [layer.get("ratio", 0) for layer in layers], 0.6, color=_BLUE)
        axis.axvline(1, color=_GRAY, lw=1, ls="--")
        _layer_axis(axis, names, "upgrade / tuning (L2)")

    def cosine(axis: Any) -> None:
        axis.barh(range(len(names)), [layer.get("tuning_cosine", 0) for layer in layers], 0.6, color=_ORANGE)
        axis.axvline(0, color=_GRAY, lw=1)
        axis.set_xlim(-1, 1)
        _layer_axis(axis, names, "cosine of upgrade and tuning")

    height = 1.2 + 0.3 * len(names)
    figures = [_figure(moved, "How far each layer's weights moved.", height, legend=True)]
    if tuned:
        text = "Above 1 the upgrade moved the layer further than tuning had."
        figures.append(_figure(ratio, text, height))
        text = "Near 0 the two moved it in unrelated directions; below, the upgrade undid some of the tuning's way."
        figures.append(_figure(cosine, text, height))
    left = f"Not compared: {', '.join(found['left_out'])}." if found["left_out"] else ""
    return [
        "<h2>How far the upgrade moved the weights</h2>",
        f'<div class="figures">{"".join(figures)}</div>',
        _table(_layer_rows(found)),
        f'<p class="note">{escape(left)}</p>' if left else "",
    ]


def _similarity(found: Mapping[str, Any]) -> list[str]:
    figures = []
    if "heads" in found:

        def heads(axis: Any) -> None:
            image = axis.pcolormesh(found["heads"], vmin=0, vmax=1, cmap="Blues", edgecolors="white")
            axis.set(xlabel="head", ylabel="layer")
            for set_ticks, count in ((axis.set_xticks, len(found["heads"][0])), (axis.set_yticks, len(found["heads"]))):
                numbers = range(0, count, -(-count // 12))
                set_ticks([number + 0.5 for number in numbers], numbers)
            axis.figure.colorbar(image, ax=axis)

        figures.append(_figure(heads, "Attention patterns of the two bases on the same texts: 1 is the same."))
    if "cka" in found:

        def cka(axis: Any) -> None:
            axis.plot(range(len(found["cka"])), found["cka"], "o-", ms=3, color=_BLUE, label="hidden states (CKA)")
            if "neurons" in found:
                places = range(1, len(found["neurons"]) + 1)
                axis.plot(places, found["neurons"], "s-", ms=3, color=_ORANGE, label="top neurons in common")
            axis.locator_params("x", integer=True)
            axis.set(xlabel="layer (0: embeddings)", ylim=(0, 1.05))

        figures.append(_figure(cka, "Layer by layer, on the same texts: 1 is the same.", legend=True))
    return ["<h2>How alike the two bases compute</h2>", f'<div class="figures">{"".join(figures)}</div>']


_SECTIONS: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
    "compatibility": _compatibility,
    "connectivity": _connectivity,
    "distance": _distance,
    "similarity": _similarity,
}


def _table(rows: list[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.1e}"
        return "" if value is None else escape(f"{value:,}" if isinstance(value, int) else str(value))

    head = "".join(f"<th>{escape(name)}</th>" for name in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{cell(v)}</td>' for v in row.values())}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _layer_axis(axis: Any, names: list[str], label: str) -> None:
    axis.set(yticks=range(len(names)), xlabel=label)
    axis.set_yticklabels(names)
    axis.invert_yaxis()
    axis.locator_params("x", nbins=5)


def _figure(draw: Callable[[Any], None], caption: str, height: float = 2.9, legend: bool = False) -> str:
    """A plot as inline SVG, as wide as a phone, so that its letters are readable there."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption, "font.size": 10}):
        figure = Figure((4.4, height), layout="constrained")
        axis = figure.subplots()
        draw(axis)
        axis.spines[["top", "right"]].set_visible(False)
        if legend:
            figure.legend(loc="outside upper center", frameon=False, fontsize=10, ncols=2)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows svg by itself
    label = escape(caption, quote=True)
    return f'<figure role="img" aria-label="{label}">{svg}<figcaption>{escape(caption)}</figcaption></figure>'
